//! Placeholders of other programs, and templates, which are theirs here (CONTRACT row 17).
//!
//! No program knows a way to write a placeholder that is none, nor does a template: what looks like one is one.

use std::ops::Range;

use crate::mcp::templates;

use super::Format;

/// The text with each template as [`template`] writes it: how two texts compare that mean the same.
pub fn canonical(text: &str) -> String {
    with_templates(text, template)
}

/// The text with something else in place of each template, of which `replacement` gets the name and the default.
pub fn with_templates(text: &str, mut replacement: impl FnMut(&str, Option<&str>) -> String) -> String {
    let mut changed = String::with_capacity(text.len());
    let mut from = 0;
    for found in templates(text) {
        changed += &text[from..found.range.start];
        changed += &replacement(found.name, found.default.map(|default| &text[default]));
        from = found.range.end;
    }
    changed + &text[from..]
}

pub fn template(name: &str, default: Option<&str>) -> String {
    match default {
        Some(default) => format!("{{{{ {name} | {default} }}}}"),
        None => format!("{{{{ {name} }}}}"),
    }
}

/// What a name of any grammar is called as a variable here; `None` when nothing is left of it.
pub fn variable_name(name: &str) -> Option<String> {
    let upper: String =
        name.trim().chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    let digit = upper.starts_with(|c: char| c.is_ascii_digit());
    let name = if digit { format!("_{upper}") } else { upper };
    name.contains(|c| c != '_').then_some(name)
}

/// A placeholder of another program.
#[derive(Debug, PartialEq)]
pub enum Placeholder<'a> {
    /// `${VAR}`, `${VAR:-default}`, `${env:VAR}`
    Variable { name: &'a str, default: Option<&'a str> },
    /// `${input:id}`
    Input(&'a str),
    /// What only that program knows, on its own machine.
    Foreign,
}

/// Of VS Code, Cursor and Windsurf; what is asked of VS Code with a colon is found by it.
const FOREIGN: [&str; 13] = [
    "workspaceFolder",
    "workspaceFolderBasename",
    "workspaceRoot",
    "userHome",
    "pathSeparator",
    "/",
    "cwd",
    "execPath",
    "file",
    "fileDirname",
    "fileBasename",
    "relativeFile",
    "extensionPath",
];

/// The placeholders in a text that the program understands, from left to right; `format` is `None` for any of those that
/// keep servers under `mcpServers`.
pub fn placeholders(text: &str, format: Option<Format>) -> Vec<(Range<usize>, Placeholder<'_>)> {
    let mut found = Vec::new();
    let mut from = 0;
    // Where the next `}` is: looked for again and again, it would take quadratic time.
    let mut brace = 0;
    while let Some(start) = text[from..].find("${").map(|more| from + more) {
        from = start + 2;
        if brace < from {
            let Some(more) = text[from..].find('}') else { break };
            brace = from + more;
        }
        if let Some(placeholder) = placeholder(&text[from..brace], format) {
            from = brace + 1;
            found.push((start..from, placeholder));
        }
    }
    found
}

fn placeholder(inside: &str, format: Option<Format>) -> Option<Placeholder<'_>> {
    let plain = matches!(format, None | Some(Format::Claude));
    let prefixed = matches!(format, None | Some(Format::Cursor | Format::Windsurf | Format::VsCode));
    // No further than a name goes, so that what begins with many of these takes linear time.
    let name = inside.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count();
    let after = inside[name..].strip_prefix(':');
    match after.map(|after| (&inside[..name], after)) {
        Some((name, default)) if plain && is_variable(name) && default.starts_with('-') => {
            Some(Placeholder::Variable { name, default: Some(&default[1..]) })
        }
        Some(("env", name)) if prefixed => Some(Placeholder::Variable { name, default: None }),
        Some(("input", id)) if format == Some(Format::VsCode) => Some(Placeholder::Input(id)),
        Some(("file" | "command" | "config" | "workspaceFolder" | "input", _)) if prefixed => {
            Some(Placeholder::Foreign)
        }
        None if prefixed && FOREIGN.contains(&inside) => Some(Placeholder::Foreign),
        None if plain && is_variable(inside) => Some(Placeholder::Variable { name: inside, default: None }),
        _ => None,
    }
}

fn is_variable(name: &str) -> bool {
    let start = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    name.bytes().next().is_some_and(start) && name.bytes().all(|byte| start(byte) || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_template_has_one_spelling() {
        assert_eq!(canonical("a{{A}}b{{  B|c }}d{{ e }}{{ F | }}"), "a{{ A }}b{{ B | c }}d{{ e }}{{ F |   }}");
        assert_eq!(canonical("{{ F |   }}"), "{{ F |   }}");
    }

    #[test]
    fn each_program_has_its_own_placeholders() {
        let found = |text, format| {
            let found = placeholders(text, format).into_iter().map(|(range, what)| (text[range].to_owned(), what));
            found.collect::<Vec<_>>()
        };
        let variable = |text: &str, name, default| (text.to_owned(), Placeholder::Variable { name, default });
        let text = "a${A}b${env:B}c$C${D:-d:e}";
        let (a, b, d) =
            (variable("${A}", "A", None), variable("${env:B}", "B", None), variable("${D:-d:e}", "D", Some("d:e")));
        assert_eq!(found(text, Some(Format::Claude)), [a, d]);
        assert_eq!(found(text, Some(Format::Cursor)), [b]);
        assert_eq!(found(text, None).len(), 3);
        assert_eq!(found(text, Some(Format::Letta)), []);
        let code = "${input:git-hub} ${workspaceFolder}/x ${workspaceFolder:api} ${command:c} ${unknown} ${A}";
        let kinds: Vec<_> = found(code, Some(Format::VsCode)).into_iter().map(|(_, what)| what).collect();
        let foreign = || Placeholder::Foreign;
        assert_eq!(kinds, [Placeholder::Input("git-hub"), foreign(), foreign(), foreign()]);
        assert_eq!(found("${userHome}/x", None), [("${userHome}".to_owned(), Placeholder::Foreign)]);
        assert_eq!(found("${ A } ${} ${A ${B", None), []);
        // In quadratic time these would not end.
        for start in ["${", "${A", "${env-"] {
            let many = start.repeat(1024 * 1024 / start.len()) + "}";
            assert!(placeholders(&many, None).len() <= 1, "{start}");
            assert_eq!(placeholders(&many[..many.len() - 1], None), []);
        }
    }

    #[test]
    fn every_name_becomes_a_variable() {
        for (name, variable) in [("git-hub.token", "GIT_HUB_TOKEN"), ("1st", "_1ST"), ("É", ""), ("", ""), ("a", "A")]
        {
            assert_eq!(variable_name(name).unwrap_or_default(), variable);
        }
    }
}
