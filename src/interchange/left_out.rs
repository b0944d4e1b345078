//! Secrets left out: a template of a made-up name in place of each, so that the file tells which variables to set, and means
//! what it did where the secrets are known.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::mcp::{hidden_parts, templates};
use crate::model::{Connector, Remote, Secret, SecretMap, Stdio};
use crate::secrets::{Spot, is_secret_variable, secret_args, secret_spots, without_scheme};

use super::placeholders::{template, variable_name, with_templates};

/// These servers, by name, without their secrets, and the names of the templates that stand for them. The same servers give
/// the same names.
pub fn leave_out(servers: &[(&str, &Connector)]) -> (Vec<Connector>, BTreeSet<String>) {
    let mut names = Names::default();
    for (_, connector) in servers {
        each_text(connector, |text| {
            names.taken.extend(templates(text).map(|template| template.name.to_owned()));
        });
    }
    let bare = servers.iter().map(|(server, connector)| match connector {
        Connector::Stdio(stdio) => Connector::Stdio(names.bare_stdio(server, stdio)),
        Connector::Sse(remote) => Connector::Sse(names.bare_remote(server, remote)),
        Connector::StreamableHttp(remote) => Connector::StreamableHttp(names.bare_remote(server, remote)),
    });
    let bare = bare.collect();
    (bare, names.made)
}

fn each_text(connector: &Connector, mut see: impl FnMut(&str)) {
    match connector {
        Connector::Stdio(Stdio { args, env, .. }) => {
            args.iter().for_each(|arg| see(arg));
            env.iter().flatten().for_each(|(_, value)| see(value.expose()));
        }
        Connector::Sse(remote) | Connector::StreamableHttp(remote) => {
            remote.auth_token.iter().for_each(|token| see(token.expose()));
            remote.custom_headers.iter().flatten().for_each(|(_, value)| see(value.expose()));
        }
    }
}

#[derive(Default)]
struct Names {
    taken: BTreeSet<String>,
    made: BTreeSet<String>,
}

impl Names {
    /// A template for what `key` of a server is.
    fn make(&mut self, server: &str, key: &str) -> String {
        let server = variable_name(server).unwrap_or_else(|| "SERVER".to_owned());
        let key = variable_name(key.trim_start_matches('-')).unwrap_or_else(|| "SECRET".to_owned());
        let base = if key.starts_with(&server) { key } else { format!("{server}_{key}") };
        let numbered = (2..).map(|number| format!("{base}_{number}"));
        let free = std::iter::once(base.clone()).chain(numbered).find(|name| !self.taken.contains(name));
        let name = free.expect("numbers do not end");
        self.taken.insert(name.clone());
        self.made.insert(name.clone());
        template(&name, None)
    }

    fn bare_stdio(&mut self, server: &str, Stdio { command, args, env }: &Stdio) -> Stdio {
        let env = env.as_ref().map(|env| {
            let bare = env.iter().map(|(name, value)| {
                let text = value.expose();
                let bare = without_templates(text);
                let is_hidden = is_secret_variable(name, text) || !hidden_parts(text, Vec::new()).is_empty();
                let is_secret =
                    !without_scheme(&bare).trim().is_empty() && (is_hidden || is_secret_variable(name, &bare));
                (name.clone(), if is_secret { self.make(server, name).into() } else { value.clone() })
            });
            bare.collect()
        });
        let parts = secret_args(args);
        let bare = args.iter().zip(parts).enumerate().map(|(number, (arg, parts))| {
            let flag = number.checked_sub(1).map(|before| args[before].as_str()).filter(|flag| is_flag(flag));
            self.bare_text(server, arg, hidden_parts(arg, parts), flag, number)
        });
        Stdio { command: command.clone(), args: bare.collect(), env }
    }

    /// An argument without its secret parts; each is called what stands before it.
    fn bare_text(
        &mut self,
        server: &str,
        text: &str,
        parts: Vec<Range<usize>>,
        flag: Option<&str>,
        number: usize,
    ) -> String {
        let mut bare = String::new();
        let mut from = 0;
        for part in parts {
            let part = whole_templates(text, part);
            // Two parts may have touched one template.
            let part = part.start.max(from)..part.end;
            if part.is_empty() || without_templates(&text[part.clone()]).is_empty() {
                continue;
            }
            // Nothing of an earlier part, which is a secret.
            let before = text[from..part.start].trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
            let before = strip_scheme(before);
            let word = before.rsplit(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))).next();
            let called = word.filter(|word| !word.is_empty()).or(flag.filter(|_| part.start == 0));
            bare += &text[from..part.start];
            bare += &match called {
                Some(name) => self.make(server, name),
                None => self.make(server, &format!("ARG_{number}")),
            };
            from = part.end;
        }
        bare + &text[from..]
    }

    fn bare_remote(&mut self, server: &str, remote: &Remote) -> Remote {
        let mut url = String::new();
        let mut from = 0;
        for (spot, range) in secret_spots(&remote.server_url) {
            let key = match spot {
                Spot::User => "USER".to_owned(),
                Spot::Password => "PASSWORD".to_owned(),
                Spot::Segment(_) => "PATH".to_owned(),
                Spot::Parameter(name, _) => name,
            };
            url += &remote.server_url[from..range.start];
            url += &self.make(server, &key);
            from = range.end;
        }
        url += &remote.server_url[from..];
        let token_name = remote.auth_header.as_deref().unwrap_or("Authorization");
        let auth_token = remote.auth_token.as_ref().map(|token| self.bare_header(server, token_name, token));
        let custom_headers = remote.custom_headers.as_ref().map(|headers| {
            let bare = headers.iter().map(|(name, value)| (name.clone(), self.bare_header(server, name, value)));
            bare.collect::<SecretMap>()
        });
        Remote { server_url: url, auth_token, custom_headers, ..remote.clone() }
    }

    /// Any value of a header may be a secret, but for one that is a variable.
    fn bare_header(&mut self, server: &str, name: &str, value: &Secret) -> Secret {
        let text = value.expose();
        let secret = without_scheme(text);
        if without_templates(secret).trim().is_empty() {
            return value.clone();
        }
        (text[..text.len() - secret.len()].to_owned() + &self.make(server, name)).into()
    }
}

/// Whether an argument is the name of a flag and nothing else: only then may another one be called so.
fn is_flag(arg: &str) -> bool {
    arg.starts_with('-') && arg.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

/// A text without those of its templates that have no default: nothing of them is secret.
fn without_templates(text: &str) -> String {
    with_templates(text, |name, default| default.map(|default| template(name, Some(default))).unwrap_or_default())
}

/// A part of a text, and all of the templates that it has a part of.
fn whole_templates(text: &str, part: Range<usize>) -> Range<usize> {
    let touched = templates(text).map(|template| template.range);
    let touched = touched.filter(|range| range.start < part.end && part.start < range.end);
    touched.fold(part.clone(), |part, range| part.start.min(range.start)..part.end.max(range.end))
}

fn strip_scheme(before: &str) -> &str {
    let lower = before.to_ascii_lowercase();
    let scheme = ["bearer", "basic"].into_iter().find(|scheme| lower.ends_with(scheme));
    let rest = scheme.map_or(before, |scheme| &before[..before.len() - scheme.len()]);
    rest.trim_end_matches(|c: char| !c.is_ascii_alphanumeric())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn each_secret_has_a_variable_of_its_own() {
        let secrets = |map: &[(&str, &str)]| {
            map.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned().into())).collect::<SecretMap>()
        };
        let args = [
            "-y",
            "--api-key",
            "one",
            "--token=two",
            "--h=Authorization: Bearer three",
            "{{ API_KEY | sk-ant-abc123 }}",
            "sk-ant-one,sk-ant-two",
            "{{ DB_PASS | seven }}/x",
            "run",
        ];
        let stdio = Connector::Stdio(Stdio {
            command: "c".to_owned(),
            args: args.map(str::to_owned).into(),
            env: Some(secrets(&[
                ("GIT_TOKEN", "five"),
                ("GIT_KEY", "{{ GIT_KEY }}"),
                ("LEVEL", "debug"),
                ("OTHER_KEY", "{{ X | six }}"),
                ("PLACE", "{{ DB_PASS | eight }}"),
                ("REGION", "{{ REGION | eu }}"),
            ])),
        });
        let remote = Connector::Sse(Remote {
            server_url: "https://u:seven@h/mcp?api_key=eight&q=1".to_owned(),
            auth_header: None,
            auth_token: Some("Bearer nine".to_owned().into()),
            custom_headers: Some(secrets(&[("X-A", "ten"), ("X-B", "Bearer {{ B }}"), ("X-C", "")])),
            oauth: None,
        });
        let (bare, made) = leave_out(&[("git", &stdio), ("my server", &remote), ("my-server", &remote)]);
        let Connector::Stdio(Stdio { args, env, .. }) = &bare[0] else { panic!() };
        assert_eq!(
            args,
            &[
                "-y",
                "--api-key",
                "{{ GIT_API_KEY }}",
                "--token={{ GIT_TOKEN_2 }}",
                "--h=Authorization: Bearer {{ GIT_AUTHORIZATION }}",
                "{{ GIT_ARG_5 }}",
                "{{ GIT_ARG_6 }},{{ GIT_ARG_6_2 }}",
                "{{ GIT_ARG_7 }}/x",
                "run"
            ]
        );
        let env: Vec<_> = env.iter().flatten().map(|(_, value)| value.expose()).collect();
        assert_eq!(
            env,
            [
                "{{ GIT_KEY }}",
                "{{ GIT_TOKEN }}",
                "debug",
                "{{ GIT_OTHER_KEY }}",
                "{{ GIT_PLACE }}",
                "{{ REGION | eu }}"
            ]
        );
        let Connector::Sse(remote) = &bare[1] else { panic!() };
        assert_eq!(remote.server_url, "https://u:{{ MY_SERVER_PASSWORD }}@h/mcp?api_key={{ MY_SERVER_API_KEY }}&q=1");
        assert_eq!(remote.auth_token.as_ref().unwrap().expose(), "Bearer {{ MY_SERVER_AUTHORIZATION }}");
        let headers: Vec<_> = remote.custom_headers.iter().flatten().map(|(_, value)| value.expose()).collect();
        assert_eq!(headers, ["{{ MY_SERVER_X_A }}", "Bearer {{ B }}", ""]);
        let Connector::Sse(twin) = &bare[2] else { panic!() };
        assert_eq!(twin.auth_token.as_ref().unwrap().expose(), "Bearer {{ MY_SERVER_AUTHORIZATION_2 }}");
        assert_eq!(made.len(), 18);
    }
}
