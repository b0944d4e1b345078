//! Which commands may be servers: any, those of the operator's file, or none. Asked when a server is registered or changed,
//! and again before each start, because a row may be older than the rule.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use crate::config::{Children, StdioPolicy};
use crate::model::{Connector, Stdio};

use super::Error;
use super::template::is_templated;

pub enum Commands {
    Any,
    Templates(Vec<Template>),
    Off,
}

/// A command that the operator allows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    command: String,
    #[serde(default)]
    args: Vec<Argument>,
    /// The variables that may be set, to whatever value.
    #[serde(default)]
    env: BTreeSet<String>,
}

/// One argument: this text, or one of these.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Argument {
    Exactly(String),
    OneOf(Vec<String>),
}

/// Why the file of templates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplatesError {
    #[error("--stdio templates needs --stdio-templates, the JSON file that names the commands.")]
    Missing,
    #[error("Cannot read the file of --stdio-templates: {0}.")]
    Unreadable(std::io::Error),
    #[error("The file of --stdio-templates is not what it should be: {0}.")]
    Malformed(serde_json::Error),
}

impl Commands {
    /// Reads the rule, and the operator's file where there is one.
    ///
    /// # Errors
    /// One sentence for the person who starts Portolan.
    pub fn read(settings: &Children) -> Result<Self, TemplatesError> {
        let policy = if settings.mcp_disable_stdio { StdioPolicy::Off } else { settings.stdio };
        match (policy, &settings.stdio_templates) {
            (StdioPolicy::Off, _) => Ok(Self::Off),
            (StdioPolicy::Any, _) => Ok(Self::Any),
            (StdioPolicy::Templates, None) => Err(TemplatesError::Missing),
            (StdioPolicy::Templates, Some(file)) => Self::templates(file),
        }
    }

    fn templates(file: &Path) -> Result<Self, TemplatesError> {
        let text = std::fs::read(file).map_err(TemplatesError::Unreadable)?;
        let named: BTreeMap<String, Template> = serde_json::from_slice(&text).map_err(TemplatesError::Malformed)?;
        Ok(Self::Templates(named.into_values().collect()))
    }

    /// Whether a server of this kind may be had.
    ///
    /// # Errors
    /// [`Error::StdioOff`], [`Error::NoTemplate`].
    pub fn check(&self, connector: &Connector) -> Result<(), Error> {
        self.check_but_for(connector, |_| false)
    }

    /// As [`Commands::check`], of a configuration whose variables have no values yet: whether it may be one that is
    /// allowed.
    ///
    /// # Errors
    /// [`Error::StdioOff`], [`Error::NoTemplate`].
    pub fn check_unfilled(&self, connector: &Connector) -> Result<(), Error> {
        self.check_but_for(connector, is_templated)
    }

    fn check_but_for(&self, connector: &Connector, is_open: fn(&str) -> bool) -> Result<(), Error> {
        match (connector, self) {
            (Connector::Stdio(_), Self::Off) => Err(Error::StdioOff),
            (Connector::Stdio(stdio), Self::Templates(templates))
                if !templates.iter().any(|one| one.fits(stdio, is_open)) =>
            {
                Err(Error::NoTemplate)
            }
            _ => Ok(()),
        }
    }
}

impl Template {
    /// `is_open`: which arguments may be anything.
    fn fits(&self, stdio: &Stdio, is_open: fn(&str) -> bool) -> bool {
        let Stdio { command, args, env } = stdio;
        *command == self.command
            && args.len() == self.args.len()
            && args.iter().zip(&self.args).all(|(given, allowed)| match allowed {
                _ if is_open(given) => true,
                Argument::Exactly(text) => given == text,
                Argument::OneOf(texts) => texts.contains(given),
            })
            && env.iter().flatten().all(|(name, _)| self.env.contains(name))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn stdio(command: &str, args: &[&str], env: &[&str]) -> Connector {
        let env = env.iter().map(|&name| (name.to_owned(), "value".to_owned().into())).collect();
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        Connector::Stdio(Stdio { command: command.to_owned(), args, env: Some(env) })
    }

    #[test]
    fn a_template_is_met_to_the_letter() {
        let text = r#"{"files": {"command": "npx", "args": ["-y", "files", ["/srv/a", "/srv/b"]], "env": ["KEY"]}}"#;
        let named: BTreeMap<String, Template> = serde_json::from_str(text).unwrap();
        let commands = Commands::Templates(named.into_values().collect());
        for (command, args, env, fits) in [
            ("npx", &["-y", "files", "/srv/a"] as &[&str], &[] as &[&str], true),
            ("npx", &["-y", "files", "/srv/b"], &["KEY"], true),
            ("npx", &["-y", "files", "/srv/c"], &[], false),
            ("npx", &["-y", "files", "/srv/a/../c"], &[], false),
            ("npx", &["-y", "files"], &[], false),
            ("npx", &["-y", "files", "/srv/a", "/srv/b"], &[], false),
            ("npx", &["files", "-y", "/srv/a"], &[], false),
            ("/usr/bin/npx", &["-y", "files", "/srv/a"], &[], false),
            ("npx ", &["-y", "files", "/srv/a"], &[], false),
            ("npx", &["-y", "files", "/srv/a"], &["LD_PRELOAD"], false),
            ("npx", &["-y", "files", "/srv/a"], &["KEY", "PATH"], false),
            ("npx", &["-y", "files", "/srv/a"], &["key"], false),
        ] {
            assert_eq!(commands.check(&stdio(command, args, env)).is_ok(), fits, "{command} {args:?} {env:?}");
        }
        for bad in [
            r#"[]"#,
            r#"{"x": {}}"#,
            r#"{"x": {"command": "c", "arg": []}}"#,
            r#"{"x": {"command": "c", "args": "a"}}"#,
        ] {
            assert!(serde_json::from_str::<BTreeMap<String, Template>>(bad).is_err(), "{bad}");
        }
    }
}
