//! README and `docs/` say what the program says: its settings, its error codes, the sentences that it refuses with. What
//! can only be tried is tried by `tests/docs/run.py`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use axum::http::StatusCode;
use clap::{Arg, ArgAction, CommandFactory};
use portolan::config::Cli;
use serde_json::Value;

/// Set, the table of settings in README is written anew in place of being compared.
const UPDATE: &str = "PORTOLAN_UPDATE_DOCS";

/// Flags in examples that are no settings.
const EXAMPLES: [&str; 1] = ["--dir"];

fn troubleshooting() -> String {
    read("docs/troubleshooting.md")
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn with_extension(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![repository().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The pages that people read: their names and texts.
fn documents() -> Vec<(String, String)> {
    let mut paths = with_extension("docs", "md");
    paths.extend(["README.md", "SECURITY.md"].map(|name| repository().join(name)));
    let name = |path: &Path| path.strip_prefix(repository()).unwrap().display().to_string();
    paths.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The part of a page under a heading, to the next one of its level or above.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let (_, rest) = page.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("there is no {heading}"));
    let level = heading.split(' ').next().unwrap();
    let end = (1..=level.len()).filter_map(|level| rest.find(&format!("\n{} ", "#".repeat(level)))).min();
    &rest[..end.unwrap_or(rest.len())]
}

/// The tables of a text: their rows, without head and rule, each row its cells.
fn tables(text: &str) -> Vec<Vec<Vec<&str>>> {
    let mut tables = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if !(line.starts_with('|') && lines.peek().is_some_and(|rule| rule.starts_with("|---"))) {
            continue;
        }
        lines.next();
        let mut rows = Vec::new();
        while let Some(row) = lines.next_if(|line| line.starts_with('|')) {
            rows.push(row.trim_matches('|').split(" | ").map(str::trim).collect());
        }
        tables.push(rows);
    }
    tables
}

fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`')
}

// --- Settings --------------------------------------------------------------------------------------------------------

fn settings() -> Vec<Arg> {
    let mut command = Cli::command();
    command.build();
    let is_shown = |arg: &&Arg| !arg.is_hide_set() && arg.get_env().is_some();
    command.get_arguments().filter(is_shown).cloned().collect()
}

/// A text of `--help` in a cell of a table.
fn cell(text: &str) -> String {
    let escape = |(number, part): (usize, &str)| match number % 2 {
        // Between backticks everything stands for itself, but for what ends a cell.
        1 => part.replace('|', "\\|"),
        _ => part.replace('|', "\\|").replace('*', "\\*").replace('<', "&lt;"),
    };
    text.split('`').enumerate().map(escape).collect::<Vec<_>>().join("`").replace('\n', " ")
}

fn row(arg: &Arg) -> String {
    let flag = arg.get_long().unwrap();
    let variable = arg.get_env().unwrap().to_str().unwrap();
    let takes_value = !matches!(arg.get_action(), ArgAction::SetTrue);
    let defaults = arg.get_default_values().iter().filter(|_| takes_value);
    let default: Vec<_> = defaults.map(|value| format!("`{}`", value.to_str().unwrap())).collect();
    let values = arg.get_possible_values();
    let choice: Vec<_> = values.iter().map(|value| format!("`{}`", value.get_name())).collect();
    let choice = match takes_value && !choice.is_empty() {
        true => format!(" ({})", choice.join(", ")),
        false => String::new(),
    };
    let what = arg.get_long_help().or(arg.get_help()).unwrap().to_string();
    format!("| `--{flag}` | `{variable}` | {} | {}{choice} |", default.join(", "), cell(&what)).replace("|  |", "| |")
}

#[test]
fn the_settings_table_is_what_help_says() {
    let readme = read("README.md");
    let settings = settings();
    assert!(settings.len() > 40);
    let mut table = vec!["| flag | variable | default | what |".to_owned(), "|---|---|---|---|".to_owned()];
    table.extend(settings.iter().map(row));
    let written: Vec<_> =
        readme.lines().skip_while(|line| *line != table[0]).take_while(|line| line.starts_with('|')).collect();
    assert!(!written.is_empty(), "README has no table of settings");
    if std::env::var_os(UPDATE).is_some() {
        let anew = readme.replace(&written.join("\n"), &table.join("\n"));
        std::fs::write(repository().join("README.md"), anew).unwrap();
        return;
    }
    let (says, helps): (BTreeSet<_>, BTreeSet<_>) =
        (written.iter().copied().collect(), table.iter().map(|row| &**row).collect());
    let too_much: Vec<_> = says.difference(&helps).collect();
    let missing: Vec<_> = helps.difference(&says).collect();
    let how = format!("{UPDATE}=1 cargo test --locked --test promises documents:: writes the table anew");
    assert!(too_much.is_empty() && missing.is_empty(), "README: {too_much:#?}\n--help: {missing:#?}\n{how}");
    assert_eq!(written, table, "the order is that of --help; {how}");
}

/// Texts between backticks, outside of fenced blocks.
fn code_spans(text: &str) -> Vec<String> {
    let mut spans = Vec::new();
    let mut fenced = false;
    let mut prose = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            prose.push_str(line);
            prose.push(' ');
        }
        // A span ends with its paragraph at the latest.
        if line.is_empty() || line.starts_with('|') {
            spans.extend(prose.split('`').skip(1).step_by(2).map(str::to_owned));
            prose.clear();
        }
    }
    spans.extend(prose.split('`').skip(1).step_by(2).map(str::to_owned));
    spans
}

/// Every flag and variable of the program, those of its commands and the hidden ones, too.
fn known_settings() -> (BTreeSet<String>, BTreeSet<String>) {
    fn gather(command: &clap::Command, flags: &mut BTreeSet<String>, variables: &mut BTreeSet<String>) {
        for arg in command.get_arguments() {
            flags.extend(arg.get_long().map(|flag| format!("--{flag}")));
            variables.extend(arg.get_env().map(|variable| variable.to_str().unwrap().to_owned()));
        }
        command.get_subcommands().for_each(|command| gather(command, flags, variables));
    }
    let mut command = Cli::command();
    command.build();
    let (mut flags, mut variables) = Default::default();
    gather(&command, &mut flags, &mut variables);
    (flags, variables)
}

#[test]
fn every_setting_that_a_page_names_is_one() {
    let (mut flags, mut variables) = known_settings();
    flags.extend(EXAMPLES.map(str::to_owned));
    // Those of the tests.
    variables.extend(["PORTOLAN_TEST_POSTGRES_URL", "PORTOLAN_BIN", UPDATE].map(str::to_owned));
    let is_name = |it: char| it.is_ascii_uppercase() || it.is_ascii_digit() || it == '_';
    let mut named = 0;
    for (page, text) in documents() {
        for span in code_spans(&text) {
            if let Some(flag) = span.split([' ', '=', '\'']).next().filter(|flag| flag.starts_with("--")) {
                assert!(flags.contains(flag), "{page}: there is no setting {flag}");
                named += 1;
            }
        }
        for (at, _) in text.match_indices("PORTOLAN_") {
            let end = text[at..].find(|it| !is_name(it)).map_or(text.len(), |end| at + end);
            assert!(variables.contains(&text[at..end]), "{page}: there is no variable {}", &text[at..end]);
            named += 1;
        }
    }
    assert!(named > 100, "{named}");
}

// --- Error codes and states ------------------------------------------------------------------------------------------

/// The codes that `error.rs` answers with, and their statuses.
fn codes_of_the_source() -> BTreeMap<String, u16> {
    let number = |name: &str| {
        let is_it = |code: &u16| {
            let reason = StatusCode::from_u16(*code).ok().and_then(|code| code.canonical_reason());
            reason.is_some_and(|reason| reason.to_uppercase().replace(['-', ' '], "_") == name)
        };
        (400..600).find(is_it).unwrap_or_else(|| panic!("which status is {name}?"))
    };
    let source = read("src/error.rs");
    let pairs = source.split("StatusCode::").skip(1).filter_map(|rest| {
        let (status, rest) = rest.split_once(',')?;
        let code = rest.trim_start().strip_prefix('"')?.split_once('"')?.0;
        status.chars().all(|it| it.is_ascii_uppercase() || it == '_').then(|| (code.to_owned(), number(status)))
    });
    pairs.collect()
}

/// The codes in the examples of `openapi.yaml`.
fn codes_of_the_api() -> BTreeSet<String> {
    fn gather(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(object) => {
                if let (Some(Value::String(code)), Some(Value::String(_))) =
                    (object.get("code"), object.get("request_id"))
                {
                    found.insert(code.clone());
                }
                object.values().for_each(|value| gather(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| gather(value, found)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    gather(&api(), &mut found);
    found
}

fn api() -> Value {
    serde_norway::from_str(&read("openapi.yaml")).unwrap()
}

#[test]
fn every_error_code_has_its_row() {
    let source = codes_of_the_source();
    assert!(source.len() > 20, "{source:?}");
    let page = troubleshooting();
    let tables = tables(section(&page, "## Answers"));
    let rows: Vec<(String, u16)> =
        tables[0].iter().map(|row| (code(row[0]).unwrap().to_owned(), row[1].parse().unwrap())).collect();
    assert_eq!(rows.iter().cloned().collect::<BTreeMap<_, _>>(), source, "docs/troubleshooting.md, and src/error.rs");
    assert_eq!(rows.len(), source.len(), "a code has two rows");
    assert_eq!(codes_of_the_api(), source.into_keys().collect(), "openapi.yaml, and src/error.rs");
    for row in &tables[0] {
        assert!(row.len() == 4 && row.iter().all(|cell| !cell.is_empty()), "{row:?}");
    }
}

#[test]
fn every_state_has_its_row() {
    let api = api();
    let states = api.pointer("/components/schemas/MCPServerStatus/properties/state/enum").unwrap().as_array().unwrap();
    let states: BTreeSet<_> = states.iter().map(|state| state.as_str().unwrap()).collect();
    let page = troubleshooting();
    let tables = tables(section(&page, "## Servers"));
    let rows: BTreeSet<_> = tables[0].iter().map(|row| code(row[0]).unwrap()).collect();
    assert_eq!(rows, states);
}

// --- Sentences -------------------------------------------------------------------------------------------------------

/// The string literals of a Rust source, with `…` in place of what is filled in.
fn literals(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = source;
    while let Some(at) = rest.find(['"', '\'', '/']) {
        let (before, from) = rest.split_at(at);
        rest = &from[1..];
        if from.starts_with("//") {
            rest = from.split_once('\n').map_or("", |(_, rest)| rest);
        } else if from.starts_with('\'') {
            // A character, and not a lifetime: '"' begins no text.
            let mut chars = rest.char_indices();
            let is_escaped = rest.starts_with('\\');
            let end =
                if is_escaped { rest[1..].find('\'').map(|end| end + 1) } else { chars.nth(1).map(|(end, _)| end) };
            if let Some(end) = end.filter(|end| rest[*end..].starts_with('\'')) {
                rest = &rest[end + 1..];
            }
        } else if from.starts_with('"') {
            let hashes = before.len() - before.trim_end_matches('#').len();
            let is_raw = before.trim_end_matches('#').ends_with('r');
            let mut text = String::new();
            if is_raw {
                let end = format!("\"{}", "#".repeat(hashes));
                let (raw, after) = rest.split_once(&end).expect("a raw text ends");
                text.push_str(raw);
                rest = after;
            } else {
                let mut chars = rest.char_indices();
                loop {
                    match chars.next().expect("a text ends") {
                        (end, '"') => {
                            rest = &rest[end + 1..];
                            break;
                        }
                        (_, '\\') => match chars.next().expect("a text ends").1 {
                            // What follows the end of a line begins with what is no space.
                            '\n' => {
                                while chars.clone().next().is_some_and(|(_, it)| it.is_whitespace()) {
                                    chars.next();
                                }
                            }
                            other => text.push(other),
                        },
                        (_, other) => text.push(other),
                    }
                }
            }
            found.push(filled(&text));
        }
    }
    found
}

/// `{name}` is `…`, and `{{` is `{`.
fn filled(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(next) = chars.next() {
        match next {
            '{' if chars.next_if_eq(&'{').is_some() => out.push('{'),
            '}' if chars.next_if_eq(&'}').is_some() => out.push('}'),
            '{' => {
                while chars.next().is_some_and(|it| it != '}') {}
                out.push('…');
            }
            other => out.push(other),
        }
    }
    out
}

/// Whether `shown`, in which `…` is any text, is `said`.
fn is_said(shown: &str, said: &str) -> bool {
    let mut parts = shown.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = said.strip_prefix(first) else { return false };
    let parts: Vec<_> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }
    rest.ends_with(last)
}

fn quoted(cell: &str) -> Option<&str> {
    cell.strip_prefix('"')?.strip_suffix('"')
}

#[test]
fn sentences_are_read_as_the_compiler_reads_them() {
    let source = "let a = 'b'; // \"no\"\nf::<'a>('\"', '\\'', \"one \\\n   \\\"two\\\" {three:?} {{\", r#\"a\"b\"#)";
    assert_eq!(literals(source), ["one \"two\" … {", "a\"b"]);
    assert!(is_said("a … d", "a b c d") && is_said("… d", "c d") && is_said("a …", "a b") && is_said("a", "a"));
    assert!(!is_said("a", "a b") && !is_said("a … c", "a b") && !is_said("b …", "a b") && !is_said("a … b", "a … c"));
}

#[test]
fn every_sentence_that_is_quoted_is_one_of_the_program() {
    let source: Vec<_> =
        with_extension("src", "rs").iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let said: Vec<_> = source.iter().flat_map(|source| literals(source)).collect();
    let page = troubleshooting();
    let tables = tables(&page);
    let quotes: Vec<_> = tables.iter().flatten().filter_map(|row| quoted(row[0])).collect();
    assert!(quotes.len() > 50, "{}", quotes.len());
    for quote in quotes {
        assert!(said.iter().any(|said| is_said(quote, said)), "docs/troubleshooting.md: nothing says {quote:?}");
    }
}

/// Where the sentences of a refused start are: all of a file, or one type of it.
const REFUSALS: [(&str, Option<&str>); 12] = [
    ("src/app.rs", Some("pub enum StartError")),
    ("src/config.rs", Some("pub enum DatabaseUrlError")),
    ("src/api/tokens.rs", Some("pub enum TokenError")),
    ("src/api/origin.rs", None),
    ("src/store/mod.rs", Some("pub enum OpenError")),
    ("src/store/keys.rs", Some("pub enum KeyError")),
    ("src/store/sealing.rs", Some("pub enum SealError")),
    ("src/mcp/child.rs", Some("pub enum ChildrenError")),
    ("src/mcp/commands.rs", Some("pub enum TemplatesError")),
    ("src/mcp/users.rs", Some("pub enum UserError")),
    ("src/mcp/variables.rs", Some("pub enum VariablesFileError")),
    ("src/telemetry/export.rs", None),
];

#[test]
fn every_refused_start_has_its_row() {
    let page = troubleshooting();
    let tables = tables(section(&page, "## Starts"));
    let rows: Vec<_> = tables[0].iter().map(|row| quoted(row[0]).unwrap()).collect();
    let mut seen = 0;
    for (path, item) in REFUSALS {
        let source = read(path);
        let from = match item {
            Some(item) => source.split_once(item).unwrap_or_else(|| panic!("{path} has no {item}")).1,
            None => &source,
        };
        let item = if item.is_some() { from.split_once("\n}").unwrap().0 } else { from };
        for attribute in item.split("#[error(").skip(1) {
            let Some(sentence) = literals(attribute).into_iter().next() else { continue };
            if attribute.trim_start().starts_with('"') {
                assert!(rows.iter().any(|row| is_said(row, &sentence)), "docs/troubleshooting.md lacks {sentence:?}");
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "{seen}");
}

// --- Pages -----------------------------------------------------------------------------------------------------------

#[test]
fn every_page_is_in_the_index() {
    let index = read("docs/README.md");
    for path in with_extension("docs", "md") {
        let name = path.strip_prefix(repository().join("docs")).unwrap().display().to_string();
        assert!(name == "README.md" || index.contains(&format!("]({name})")), "docs/README.md does not name {name}");
    }
}

#[test]
fn yaml_in_the_pages_can_be_read() {
    let mut blocks = 0;
    for (page, text) in documents() {
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap();
            let read: Result<Value, _> = serde_norway::from_str(block);
            assert!(read.is_ok(), "{page}: {}\n{block}", read.unwrap_err());
            blocks += 1;
        }
    }
    assert!(blocks > 1);
}
