//! Import and export: the files of other programs come in, all of them or nothing, and go out again with the same meaning.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use portolan::config::StdioPolicy;
use portolan::model::{By, Connector, Remote};
use portolan::store::{self, Database as Pools, NewServer, Step};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fake::{self, Fake, Script};
use crate::harness::{Answer, Database, PATIENCE, Portolan, fake_mcp};
use crate::process::{Program, command};

const IMPORT: &str = "/v1/portolan/import";
const EXPORT: &str = "/v1/portolan/export";
const LIST: &str = "/v1/mcp-servers/";
const DEAD: &str = "http://127.0.0.1:1/mcp";
const FORMATS: [&str; 5] = ["claude", "cursor", "windsurf", "vscode", "letta"];

/// A real file of a program.
fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/configs/{name}.json"))
}

/// A database of its own, and the program on it.
struct Place {
    folder: TempDir,
    database: Database,
}

impl Place {
    async fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), database: Database::new().await }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = command(self.folder.path(), self.database.url().as_deref());
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What the program says: exit code, standard output, standard error.
    async fn say(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let mut command = self.command(args);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    #[track_caller]
    fn done((code, out, err): (Option<i32>, String, String)) -> String {
        assert_eq!(code, Some(0), "{err}");
        out
    }

    async fn import(&self, file: &Path, more: &[&str]) -> String {
        let args = [&["import", file.to_str().unwrap()], more].concat();
        Self::done(self.say(&args).await)
    }

    async fn export(&self, format: &str, more: &[&str]) -> String {
        let args = [&["export", "--format", format], more].concat();
        Self::done(self.say(&args).await)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let file = self.folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        file
    }

    async fn remove(self) {
        self.database.remove().await;
    }
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_file_of_each_program_comes_back_with_the_same_meaning() {
    for format in FORMATS {
        let (place, empty) = (Place::new().await, Place::new().await);
        let said = place.import(&sample(format), &[]).await;
        let again = place.import(&sample(format), &[]).await;
        assert!(again.contains("0 added, 0 changed"), "{format}: {again}");
        let written = place.export(format, &["--secrets"]).await;
        let expected = match format {
            "claude" => json_of(&std::fs::read_to_string(sample(format)).unwrap()),
            "cursor" => json!({"mcpServers": {
                "server-name": {
                    "command": "npx",
                    "args": ["-y", "mcp-server", "--level", "${env:LOG_LEVEL}"],
                    "env": {"API_KEY": "${env:API_KEY}"},
                },
                "remote": {
                    "url": "http://localhost:3000/mcp",
                    "headers": {"Authorization": "Bearer ${env:MY_SERVICE_TOKEN}"},
                },
                "oauth-server": {"url": "https://api.example.com/mcp"},
                "older": {"url": "https://mcp.example.com/sse"},
            }}),
            "windsurf" => json!({"mcpServers": {
                "github": {
                    "command": "npx",
                    "args": ["-y", "@modelcontextprotocol/server-github"],
                    "env": {"GITHUB_PERSONAL_ACCESS_TOKEN": "<YOUR_PERSONAL_ACCESS_TOKEN>"},
                },
                "remote-http-mcp": {
                    "serverUrl": "https://mcp.example.com/mcp",
                    "headers": {"API_KEY": "Bearer ${env:AUTH_TOKEN}"},
                },
            }}),
            "vscode" => json!({
                "inputs": [
                    {"type": "promptString", "id": "perplexity_key", "description": "PERPLEXITY_KEY", "password": true},
                    {"type": "promptString", "id": "regional_token", "description": "REGIONAL_TOKEN", "password": true},
                    {"type": "promptString", "id": "region", "description": "REGION", "default": "eu"},
                ],
                "servers": {
                    "perplexity": {
                        "type": "stdio",
                        "command": "npx",
                        "args": ["-y", "server-perplexity-ask"],
                        "env": {"PERPLEXITY_API_KEY": "${input:perplexity_key}", "PORT": "3000"},
                    },
                    "context7": {"type": "http", "url": "https://mcp.context7.com/mcp"},
                    "regional": {
                        "type": "http",
                        "url": "https://mcp.example.com/mcp",
                        "headers": {"Authorization": "Bearer ${input:regional_token}", "X-Region": "${input:region}"},
                    },
                },
            }),
            _ => json!({"mcpServers": {
                "everything": {
                    "transport": "stdio",
                    "command": "npx",
                    "args": ["-y", "@modelcontextprotocol/server-everything"],
                },
                "events": {"transport": "sse", "url": "https://mcp.example.com/v1/events"},
                "search": {
                    "transport": "streamable_http",
                    "url": "https://mcp.example.com/mcp",
                    "headers": {"Authorization": "Bearer {{ SEARCH_TOKEN | none }}", "X-Team": "maps"},
                },
                "by-hand": {
                    "transport": "streamable_http",
                    "url": "https://other.example.com/mcp",
                    "headers": {"X-API-Key": "{{ OTHER_KEY }}", "X-Team": "roads"},
                },
            }}),
        };
        assert_eq!(json_of(&written), expected, "{format}");
        for line in match format {
            "claude" => vec![
                "variable   GITHUB_PERSONAL_ACCESS_TOKEN has to be set; for github",
                "variable   REGION has a default; for api-server",
            ],
            "cursor" => {
                vec!["ignored    oauth-server, auth: Sign-ins are not taken over", "variable   LOG_LEVEL has to be set"]
            }
            "windsurf" => vec!["ignored    git, disabled: It is switched off", "ignored    github, disabledTools: "],
            "vscode" => {
                vec!["ignored    perplexity, dev: ", "variable   REGION has a default", "variable   REGIONAL_TOKEN"]
            }
            _ => vec!["variable   OTHER_KEY has to be set; for by-hand", "Servers: 4 added, 0 changed, 0 unchanged"],
        } {
            assert!(said.contains(line), "{format}: {line}\n{said}");
        }
        // The order of the file stays, too.
        let keys = |file: &Value| {
            let servers = file.as_object().unwrap().values().next_back().unwrap().as_object().unwrap().clone();
            servers.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(keys(&json_of(&written)), keys(&expected), "{format}");

        // Into an empty Portolan, with the secrets and without: the same file comes out.
        for secrets in [&["--secrets"][..], &[]] {
            let written = place.export(format, secrets).await;
            let file = place.file("written", &written);
            assert!(place.import(&file, &[]).await.contains("0 added, 0 changed"), "{format}: {written}");
            empty.import(&file, &["--format", format, "--replace"]).await;
            assert_eq!(empty.export(format, secrets).await, written, "{format}");
        }
        place.remove().await;
        empty.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_holds_what_another_one_brought() {
    let (place, other) = (Place::new().await, Place::new().await);
    place.import(&sample("letta"), &[]).await;
    let letta = place.export("letta", &["--secrets"]).await;
    // Cursor and Windsurf have no defaults, and are asked for those that need none.
    for format in ["claude", "vscode", "letta"] {
        let file = place.file("written", &place.export(format, &["--secrets"]).await);
        other.import(&file, &["--replace"]).await;
        assert_eq!(other.export("letta", &["--secrets"]).await, letta, "{format}");
    }
    let (code, cursor, said) = place.say(&["export", "--format", "cursor", "--secrets"]).await;
    assert_eq!(code, Some(0));
    assert!(said.contains("left out   search, headers.Authorization: This file has no defaults"), "{said}");
    assert!(json_of(&cursor).get("portolan").is_none());
    place.remove().await;
    other.remove().await;
}

/// Sends a file as it is.
async fn post(portolan: &Portolan, query: &str, file: impl Into<reqwest::Body>) -> Answer {
    let path = format!("{IMPORT}{query}");
    let request = portolan.request("POST", &path).header("content-type", "application/json").body(file);
    Answer::of("POST", &path, request).await
}

/// The servers by name, with their secrets.
async fn servers(portolan: &Portolan) -> Vec<(String, Value)> {
    let list = portolan.get(&format!("{LIST}?reveal=true")).await.expect(200);
    let list = list.as_array().unwrap().iter();
    list.map(|server| (server["server_name"].as_str().unwrap().to_owned(), server.clone())).collect()
}

/// Waits until all servers have been connected to.
async fn tooled(portolan: &Portolan) -> Vec<(String, Value)> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let servers = servers(portolan).await;
        if servers.iter().all(|(_, server)| server["status"]["state"] != "never_connected") {
            return servers;
        }
        assert!(tokio::time::Instant::now() < deadline, "{servers:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_adds_changes_leaves_and_with_replace_removes() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let script = portolan.script(&json!({}));
    let program = json!({"command": fake_mcp(), "args": ["stdio", script.0]});
    let file = json!({"mcpServers": {
        "kept": program, "changed": {"url": http.url, "headers": {"x-mark": "one"}}, "gone": {"url": http.url},
    }});
    let dry = portolan.post(&format!("{IMPORT}?dry_run=true"), &file).await.expect(200);
    assert_eq!((&dry["dry_run"], &dry["added"]), (&json!(true), &json!(["kept", "changed", "gone"])));
    assert!(servers(&portolan).await.is_empty());

    let report = portolan.post(IMPORT, &file).await.expect(200);
    assert_eq!(
        report,
        json!({
            "dry_run": false, "added": ["kept", "changed", "gone"], "changed": [], "unchanged": [], "removed": [],
            "ignored": [], "variables": [],
        })
    );
    let before = tooled(&portolan).await;
    let names: Vec<_> = before.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["kept", "changed", "gone"], "in the order of the file");
    for (name, server) in &before {
        assert_eq!(server["status"]["state"], "ready", "{name}: {server}");
        assert!(server["status"]["tool_count"].as_u64().unwrap() > 0, "{name}: {server}");
    }
    let id = |number: usize| before[number].1["id"].as_str().unwrap();
    let ran = portolan.run(id(1), "headers", json!({})).await;
    assert!(ran["func_return"].as_str().unwrap().contains("one"), "{ran}");
    portolan.run(id(0), "echo", json!({"text": "hi"})).await;
    assert_eq!(portolan.children().len(), 1);

    // Merged: what is not in the file stays.
    let file = json!({"mcpServers": {
        "kept": program, "changed": {"url": http.url, "headers": {"x-mark": "two"}}, "new": {"url": DEAD},
    }});
    let expected = |dry_run: bool, removed: Value| {
        json!({
            "dry_run": dry_run, "added": ["new"], "changed": ["changed"], "unchanged": ["kept"], "removed": removed,
            "ignored": [], "variables": [],
        })
    };
    let dry = portolan.post(&format!("{IMPORT}?dry_run=true&mode=replace"), &file).await.expect(200);
    assert_eq!(dry, expected(true, json!(["gone"])));
    assert_eq!(portolan.post(IMPORT, &file).await.expect(200), expected(false, json!([])));
    assert_eq!(servers(&portolan).await.len(), 4);
    let ran = portolan.run(id(1), "headers", json!({})).await;
    assert!(ran["func_return"].as_str().unwrap().contains("two"), "the old session is not used: {ran}");
    assert_eq!(portolan.tools(id(1)).await.len(), before[1].1["status"]["tool_count"].as_u64().unwrap() as usize);

    // Replaced: it is gone, and so is the child of one that is a command no more.
    let file = json!({"mcpServers": {"changed": {"url": http.url, "headers": {"x-mark": "two"}}}});
    let report = portolan.post(&format!("{IMPORT}?mode=replace"), &file).await.expect(200);
    assert_eq!((&report["removed"], &report["unchanged"]), (&json!(["kept", "gone", "new"]), &json!(["changed"])));
    let left = servers(&portolan).await;
    assert_eq!((left.len(), left[0].1["id"].as_str().unwrap()), (1, id(1)), "and it is the same server");
    crate::harness::eventually("the child ends", || portolan.children().is_empty()).await;

    // What is switched off is neither added nor removed.
    let file = json!({"mcpServers": {"changed": {"url": DEAD, "disabled": true}, "other": {"command": "x", "enabled": false}}});
    let report = portolan.post(&format!("{IMPORT}?mode=replace"), &file).await.expect(200);
    assert_eq!((&report["removed"], &report["added"], &report["changed"]), (&json!([]), &json!([]), &json!([])));
    assert_eq!(report["ignored"][0]["key"], "disabled");
    assert_eq!(servers(&portolan).await, left);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_of_any_kind_is_told_its_place_and_stores_nothing() {
    let portolan = Portolan::start().await;
    let deep = format!("{{\"mcpServers\": {}{}}}", "[".repeat(200), "]".repeat(200));
    let good = r#""good": {"command": "true"}"#;
    let one = |server: &str| format!(r#"{{"mcpServers": {{{good}, "bad": {server}}}}}"#);
    let code = |server: &str| format!(r#"{{"servers": {{{good}, "bad": {server}}}}}"#);
    let long = "n".repeat(256);
    let cases: Vec<(String, &str)> = vec![
        (String::new(), "The file is empty."),
        (" \n\t".to_owned(), "The file is empty."),
        ("{\n  \"mcpServers\": {\n    x: 1}}".to_owned(), "The file is not valid JSON (line 3 column 5)."),
        ("{\"mcpServers\": {}".to_owned(), "The file is not valid JSON (line 1 column 17)."),
        ("{\"mcpServers\": {} /* }".to_owned(), "The file is not valid JSON (line 1 column 19)."),
        ("[{\"command\": \"x\"}]".to_owned(), "The file must be a JSON object."),
        ("\"canary\"".to_owned(), "The file must be a JSON object."),
        (
            r#"{"mcpServers": {"a": {}, "a": {}}}"#.to_owned(),
            "The key a appears twice in one object (line 1 column 33).",
        ),
        (deep, "The file is nested too deeply (line 1 column 142)."),
        ("{}".to_owned(), "This is no file of MCP servers: it has neither mcpServers nor servers."),
        (
            r#"{"github": {"command": "canary"}}"#.to_owned(),
            "This is no file of MCP servers: it has neither mcpServers nor servers.",
        ),
        (
            r#"{"mcpServers": {}, "servers": {}}"#.to_owned(),
            "The file has both mcpServers and servers; say with the format which of them is meant.",
        ),
        (r#"{"mcpServers": [{"command": "canary"}]}"#.to_owned(), "mcpServers: This must be an object."),
        (r#"{"servers": null}"#.to_owned(), "servers: This must be an object."),
        (one("\"canary\""), "mcpServers.bad: This must be an object."),
        (one("{}"), "mcpServers.bad: A server needs a command or a url."),
        (one(r#"{"args": ["canary"]}"#), "mcpServers.bad: A server needs a command or a url."),
        (one(r#"{"command": ["canary"]}"#), "mcpServers.bad.command: This must be a string."),
        (one(r#"{"command": " "}"#), "mcpServers.bad.command: A stdio server needs a command of 1 to 4096 characters."),
        (one(r#"{"command": "x", "args": "canary"}"#), "mcpServers.bad.args: This must be a list of strings."),
        (
            one(r#"{"command": "x", "args": ["a", 7]}"#),
            "mcpServers.bad.args[1]: This must be a string of at most 32 KiB.",
        ),
        (one(r#"{"command": "x", "env": ["canary"]}"#), "mcpServers.bad.env: This must be an object of strings."),
        (
            one(r#"{"command": "x", "env": {"A": {"b": "canary"}}}"#),
            "mcpServers.bad.env.A: This must be a string of at most 32 KiB.",
        ),
        (
            one(r#"{"command": "x", "env": {"A=B": "canary"}}"#),
            "mcpServers.bad.env[\"A=B\"]: The name of an environment variable is not empty and has no \"=\".",
        ),
        (
            one(r#"{"command": "x", "url": "http://canary/"}"#),
            "mcpServers.bad.url: Give either command or server_url, not both.",
        ),
        (
            one(r#"{"type": "sse", "command": "canary"}"#),
            "mcpServers.bad.command: Only a stdio server takes this field. (1 more problems are listed in errors.)",
        ),
        (
            one(r#"{"type": "http", "url": "http://h/", "env": {"A": "canary"}}"#),
            "mcpServers.bad.env: Only a stdio server takes this field.",
        ),
        (one(r#"{"type": "ws", "url": "http://canary/"}"#), "mcpServers.bad.type: This must be stdio, sse or http."),
        (
            one(r#"{"type": "sse", "transport": "http", "url": "http://canary/"}"#),
            "mcpServers.bad.transport: The transport is given twice, and differently.",
        ),
        (
            one(r#"{"url": "http://canary/", "serverUrl": "http://canary/2"}"#),
            "mcpServers.bad.serverUrl: This is given twice, under two names.",
        ),
        (
            one(r#"{"serverUrl": "ftp://canary/"}"#),
            "mcpServers.bad.serverUrl: This must be an http or https URL with a host, of at most 2048 characters.",
        ),
        (
            one(r#"{"url": "http://169.254.169.254/canary"}"#),
            "mcpServers.bad.url: This address may not be connected to: it is that of a cloud's metadata service.",
        ),
        (
            one(r#"{"url": "http://h/", "headers": {"Host Name": "canary"}}"#),
            "mcpServers.bad.headers[\"Host Name\"]: This is not a valid HTTP header name.",
        ),
        (
            one(r#"{"url": "http://h/", "headers": {"Mcp-Session-Id": "canary"}}"#),
            "mcpServers.bad.headers.Mcp-Session-Id: This header is set by Portolan itself.",
        ),
        (
            one(r#"{"url": "http://h/", "headers": {"X-A": "********"}}"#),
            "mcpServers.bad.headers.X-A: This is a mask, and nothing is stored that it stands for; give the value itself.",
        ),
        (
            one(r#"{"url": "https://${CANARY}/mcp"}"#),
            "mcpServers.bad.url: A placeholder cannot stand in a URL here; write the URL itself.",
        ),
        (
            one(r#"{"command": "${CANARY:-npx}"}"#),
            "mcpServers.bad.command: A placeholder cannot stand here; only in arguments, variables and header values.",
        ),
        (
            one(r#"{"command": "x", "args": ["${userHome}/canary"]}"#),
            "mcpServers.bad.args[0]: Only the program that this file is for knows what this placeholder stands for; write \
             that itself.",
        ),
        (
            code(r#"{"command": "x", "env": {"A": "${workspaceFolder}/canary"}}"#),
            "servers.bad.env.A: Only the program that this file is for knows what this placeholder stands for; write that \
             itself.",
        ),
        (
            one(r#"{"command": "x", "args": ["", "${A:-}"]}"#),
            "mcpServers.bad.args[1]: A default is not empty, begins and ends without white space, and has no placeholder \
             and no brace in it.",
        ),
        (
            code(r#"{"command": "x", "env": {"A": "${input:é}"}}"#),
            "servers.bad.env.A: This placeholder has no name that a variable could have.",
        ),
        (
            one(r#"{"command": "x", "envFile": "/canary"}"#),
            "mcpServers.bad.envFile: Portolan reads no files of variables; write the variables into env.",
        ),
        (
            one(r#"{"command": "x", "cwd": "/canary"}"#),
            "mcpServers.bad.cwd: Portolan starts each command in a folder of its own; write env -C FOLDER COMMAND as command \
             and args.",
        ),
        (one("{\"command\": \"canary\\u0000\"}"), "mcpServers.bad.command: A NUL character is not allowed here."),
        (
            format!(r#"{{"mcpServers": {{{good}, " good ": {{"command": "canary"}}}}}}"#),
            "mcpServers[\" good \"]: Another server of the file has this name already, but for white space around it.",
        ),
        (
            format!(r#"{{"mcpServers": {{{good}, "{long}": {{"command": "canary"}}}}}}"#),
            "A name has 1 to 255 characters and no control characters.",
        ),
        (
            format!(r#"{{"mcpServers": {{{good}, " ": {{"command": "canary"}}}}}}"#),
            "mcpServers[\" \"]: A name has 1 to 255 characters and no control characters.",
        ),
        (r#"{"inputs": {"id": "canary"}, "servers": {}}"#.to_owned(), "inputs: This must be a list of objects."),
        (r#"{"inputs": ["canary"], "servers": {}}"#.to_owned(), "inputs[0]: This must be an object with an id."),
        (r#"{"mcp": {"servers": {"bad": {"url": 5}}}}"#.to_owned(), "mcp.servers.bad.url: This must be a string."),
    ];
    let mut wrong = Vec::new();
    for (file, expected) in cases {
        let answer = post(&portolan, "", file.clone()).await;
        if answer.status != 422 {
            wrong.push(format!("{file}\n{}", answer.text));
            continue;
        }
        let answer = answer.expect(422);
        let detail = answer["detail"].as_str().unwrap();
        if detail != expected && !(file.contains(&long) && detail.ends_with(expected)) {
            wrong.push(format!("{file}\n{detail}\n{expected}"));
        }
        assert!(!answer.to_string().to_lowercase().contains("canary"), "{answer}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(servers(&portolan).await.is_empty());
    let invalid = post(&portolan, "", b"{\"mcpServers\":\n{\"a\xff".to_vec()).await.expect(422);
    assert_eq!(invalid["detail"], "The file is not UTF-8 (line 2 column 4).");
    let large = format!("{{\"mcpServers\": {{}}, \"x\": \"{}\"}}", "x".repeat(1024 * 1024));
    assert_eq!(post(&portolan, "", large).await.expect(413)["code"], "body_too_large");
    for (query, message) in [
        ("?format=vim", "This must be claude, cursor, windsurf, vscode or letta."),
        ("?mode=all", "This must be merge or replace."),
        ("?dry_run=yes", "This must be false or true."),
        ("?dry_run=true&dry_run=false", "This is given more than once."),
    ] {
        assert_eq!(post(&portolan, query, "{\"mcpServers\": {}}").await.expect(422)["detail"], message);
    }
    let insisted = post(&portolan, "?format=vscode", one("{\"command\": \"x\"}")).await.expect(422);
    assert_eq!(insisted["detail"], "servers: The file has no such key.");
    let form = portolan.request("POST", IMPORT).header("content-type", "text/plain").body("{\"mcpServers\": {}}");
    Answer::of("POST", IMPORT, form).await.expect(415);
    let format = portolan.get(&format!("{EXPORT}?format=vim")).await.expect(422);
    assert_eq!(format["errors"][0]["loc"], json!(["query", "format"]));
    assert!(servers(&portolan).await.is_empty());

    // The twins: comments, a byte order mark, names with white space around them, an empty query.
    let file = "\u{feff}{ // c\n\"mcpServers\": {\" good \": {\"url\": \"http://127.0.0.1:1/\", /* d */ \"type\": \"streamableHttp\",},},}";
    let request = portolan.request("POST", &format!("{IMPORT}?mode=&dry_run=&format="));
    let answer = request.header("content-type", "application/json").body(file).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.json::<Value>().await.unwrap()["added"], json!(["good"]));
    portolan.stop().await;
}

/// Servers with a secret in each place that can hold one.
async fn create_secretive(portolan: &Portolan) {
    let config = json!({
        "command": "/nowhere/canary",
        "args": ["-y", "--api-key", "secret-1", "--url=https://u:secret-2@h/", "--token", "{{ OWN_TOKEN }}", "run"],
        "env": {"API_KEY": "secret-3", "LEVEL": "debug", "OTHER_KEY": "{{ OTHER_KEY }}"},
    });
    portolan.create("my files", config).await;
    let config = json!({
        "server_url": format!("{DEAD}?api_key=secret-4&q=1"), "auth_header": "X-Api-Key", "auth_token": "secret-5",
        "custom_headers": {"X-Other": "Bearer secret-6", "X-Own": "Bearer {{ OWN_TOKEN }}"},
    });
    portolan.create("search", config).await;
    let config = json!({"mcp_server_type": "sse", "server_url": DEAD, "auth_token": "secret-7"});
    portolan.create("events", config).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_leaves_out_what_answers_mask_of_templates() {
    let portolan = Portolan::start().await;
    let config = json!({
        "command": "/nowhere/canary",
        "args": ["{{ API_KEY | hunter-1 }}", "--token={{ T | hunter-2 }}", "{{ REGION | eu }}/{{ DB_PASS | hunter-3 }}"],
        "env": {"C": "{{ DB_PASS | hunter-4 }}", "D": "x {{ A_TOKEN | hunter-5 }}", "E": "{{ E | shown }}"},
    });
    portolan.create("t", config).await;
    let list = portolan.get(LIST).await.expect(200).to_string();
    assert!(!list.contains("hunter") && list.contains("{{ E | shown }}"), "{list}");
    for format in FORMATS {
        let path = format!("{EXPORT}?format={format}");
        let bare = portolan.get(&path).await.expect(200);
        assert!(!bare.to_string().contains("hunter"), "{format}: {bare}");
        // The others have no defaults.
        if !["claude", "letta"].contains(&format) {
            continue;
        }
        let full = portolan.get(&format!("{path}&reveal=true")).await.expect(200).to_string();
        for number in 1..=5 {
            assert!(full.contains(&format!("hunter-{number}")), "{format}: {full}");
        }
        let report = portolan.post(IMPORT, &bare).await.expect(200);
        assert_eq!(report["unchanged"], json!(["t"]), "{format}: {report}\n{bare}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_leaves_secrets_out_and_means_them_where_they_are_known() {
    let portolan = Portolan::start().await;
    create_secretive(&portolan).await;
    let before = servers(&portolan).await;
    for format in FORMATS {
        let path = format!("{EXPORT}?format={format}");
        let bare = portolan.get(&path).await.expect(200);
        assert!(!bare.to_string().contains("secret-"), "{bare}");
        let full = portolan.get(&format!("{path}&reveal=true")).await.expect(200);
        for number in 1..=7 {
            assert!(full.to_string().contains(&format!("secret-{number}")), "{format}: secret-{number}");
        }
        for file in [bare, full] {
            for mode in ["merge", "replace"] {
                let report = portolan.post(&format!("{IMPORT}?mode={mode}"), &file).await.expect(200);
                let unchanged = json!(["my files", "search", "events"]);
                assert_eq!(report["unchanged"], unchanged, "{format}: {report}\n{file}");
                assert_eq!(
                    (&report["added"], &report["changed"], &report["removed"]),
                    (&json!([]), &json!([]), &json!([]))
                );
            }
        }
    }
    let stripped = |servers: &[(String, Value)]| {
        let servers = servers.iter().cloned().map(|(name, mut server)| {
            server.as_object_mut().unwrap().remove("status");
            server.as_object_mut().unwrap().remove("updated_at");
            (name, server)
        });
        servers.collect::<Vec<_>>()
    };
    assert_eq!(stripped(&servers(&portolan).await), stripped(&before));
    let claude = portolan.get(EXPORT).await.expect(200);
    assert_eq!(
        claude["mcpServers"]["my files"],
        json!({
            "command": "/nowhere/canary",
            "args": [
                "-y", "--api-key", "${MY_FILES_API_KEY_2}", "--url=https://u:${MY_FILES_U}@h/", "--token", "${OWN_TOKEN}", "run"
            ],
            "env": {"API_KEY": "${MY_FILES_API_KEY}", "LEVEL": "debug", "OTHER_KEY": "${OTHER_KEY}"},
        })
    );
    assert_eq!(
        claude["mcpServers"]["search"],
        json!({
            "type": "http",
            "url": format!("{DEAD}?api_key=${{SEARCH_API_KEY}}&q=1"),
            "headers": {
                "X-Api-Key": "${SEARCH_X_API_KEY}", "X-Other": "Bearer ${SEARCH_X_OTHER}", "X-Own": "Bearer ${OWN_TOKEN}"
            },
        })
    );

    // Something else changes, an argument moves, a secret is written anew: those that were left out stay.
    let mut file = claude.clone();
    let files = &mut file["mcpServers"]["my files"];
    files["args"] = json!(["--api-key", "${MY_FILES_API_KEY_2}", "stop"]);
    files["env"] = json!({"API_KEY": "${MY_FILES_API_KEY}", "NEW": "${MY_FILES_API_KEY}"});
    let search = &mut file["mcpServers"]["search"];
    search["headers"]["X-Other"] = json!("secret-8");
    let report = portolan.post(IMPORT, &file).await.expect(200);
    assert_eq!((&report["changed"], &report["unchanged"]), (&json!(["my files", "search"]), &json!(["events"])));
    let after = servers(&portolan).await;
    assert_eq!(after[0].1["args"], json!(["--api-key", "secret-1", "stop"]));
    assert_eq!(
        after[0].1["env"],
        json!({"API_KEY": "secret-3", "NEW": "{{ MY_FILES_API_KEY }}"}),
        "in another place it is a variable"
    );
    assert_eq!(after[1].1["server_url"], format!("{DEAD}?api_key=secret-4&q=1"));
    assert_eq!(
        after[1].1["custom_headers"],
        json!({"X-Api-Key": "secret-5", "X-Other": "secret-8", "X-Own": "Bearer {{ OWN_TOKEN }}"})
    );

    // Elsewhere nobody gets them.
    let mut file = portolan.get(EXPORT).await.expect(200);
    file["mcpServers"]["events"]["url"] = json!("http://127.0.0.1:2/mcp");
    portolan.post(IMPORT, &file).await.expect(200);
    let moved = &servers(&portolan).await[2].1;
    assert_eq!(moved["server_url"], "http://127.0.0.1:2/mcp");
    assert!(
        !moved.to_string().contains("secret-7") && moved.to_string().contains("{{ EVENTS_AUTHORIZATION }}"),
        "{moved}"
    );
    file["mcpServers"]["search"]["url"] = json!("http://127.0.0.1:2/mcp?api_key=${SEARCH_API_KEY}&q=1");
    let refused = portolan.post(IMPORT, &file).await.expect(422);
    assert_eq!(refused["errors"][0]["loc"], json!(["body", "mcpServers", "search", "url"]));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_and_unopened_servers_are_respected_by_import_and_export() {
    let portolan = Portolan::start_with(|settings| settings.children.stdio = StdioPolicy::Off).await;
    let file = json!({"mcpServers": {"url": {"url": DEAD}, "program": {"command": "true"}}});
    let refused = portolan.post(IMPORT, &file).await.expect(422);
    assert!(refused["detail"].as_str().unwrap().starts_with("mcpServers.program.command: "), "{refused}");
    assert!(servers(&portolan).await.is_empty(), "not the other one either");
    let file = json!({"mcpServers": {"lost": {"url": DEAD, "headers": {"X-A": "secret"}}, "fine": {"url": DEAD}}});
    portolan.post(IMPORT, &file).await.expect(200);
    tooled(&portolan).await;

    // One whose key is gone.
    const SEALED: &str =
        "UPDATE servers SET config = 'v1.000000000000' || substr(config, 16) WHERE server_name = 'lost'";
    match &portolan.app.store.database {
        Pools::Postgres(pool) => drop(sqlx::query(SEALED).execute(pool).await.unwrap()),
        Pools::Sqlite { write, .. } => drop(sqlx::query(SEALED).execute(write).await.unwrap()),
    }
    let written = portolan.get(EXPORT).await.expect(200);
    assert_eq!(written["mcpServers"], json!({"fine": {"type": "http", "url": DEAD}}));
    assert_eq!(written["portolan"]["left_out"][0]["server"], "lost");
    assert!(written["portolan"]["left_out"][0]["reason"].as_str().unwrap().contains("sealed with a key"), "{written}");
    let refused = portolan.post(IMPORT, &file).await.expect(422);
    assert!(refused["detail"].as_str().unwrap().starts_with("mcpServers.lost: "), "{refused}");
    // The key `portolan` of an export is passed over.
    let report = portolan.post(IMPORT, &written).await.expect(200);
    assert_eq!((&report["unchanged"], &report["ignored"]), (&json!(["fine"]), &json!([])));
    assert_eq!(servers(&portolan).await.len(), 2);
    let report = portolan.post(&format!("{IMPORT}?mode=replace"), &written).await.expect(200);
    assert_eq!(report["removed"], json!(["lost"]));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_at_once_lose_nothing() {
    let portolan = Portolan::start().await;
    let file = |mark: usize| {
        let server =
            |number: usize| (format!("s{number}"), json!({"url": DEAD, "headers": {"X-Mark": format!("{mark}")}}));
        json!({"mcpServers": (0..10).map(server).collect::<serde_json::Map<_, _>>()})
    };
    let files: Vec<_> = (0..6).map(file).collect();
    let imports = files.iter().map(|file| async { portolan.post(IMPORT, file).await.status });
    for status in futures_util::future::join_all(imports).await {
        // Too many changes at once are told so, and nothing is done.
        assert!(matches!(status, 200 | 503), "{status}");
    }
    let servers = servers(&portolan).await;
    assert_eq!(servers.len(), 10);
    let marks: Vec<_> = servers.iter().map(|(_, server)| &server["custom_headers"]).collect();
    assert!(marks.iter().all(|mark| *mark == marks[0]), "one file as a whole: {marks:?}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_reads_and_writes_files() {
    let place = Place::new().await;
    let file = place.file(
        "servers.json",
        r#"{"mcpServers": {"a": {"url": "http://127.0.0.1:1/", "headers": {"X-A": "secret-a"}}}}"#,
    );
    let dry = place.import(&file, &["--dry-run"]).await;
    assert!(dry.contains("added      a\n") && dry.ends_with("A dry run: nothing was stored.\n"), "{dry}");
    assert_eq!(json_of(&place.export("claude", &[]).await), json!({"mcpServers": {}}));
    place.import(&file, &[]).await;

    let mode = |file: &Path| std::fs::metadata(file).unwrap().permissions().mode() & 0o777;
    let output = place.folder.path().join("out.json");
    std::fs::write(&output, "old").unwrap();
    std::fs::set_permissions(&output, PermissionsExt::from_mode(0o644)).unwrap();
    let args = ["--secrets", "--output", output.to_str().unwrap()];
    assert_eq!(place.export("windsurf", &args).await, "");
    assert_eq!(mode(&output), 0o600);
    let written = json_of(&std::fs::read_to_string(&output).unwrap());
    assert_eq!(written["mcpServers"]["a"], json!({"serverUrl": "http://127.0.0.1:1/", "headers": {"X-A": "secret-a"}}));
    place.export("windsurf", &args[1..]).await;
    assert!(!std::fs::read_to_string(&output).unwrap().contains("secret-a"));

    // Whatever goes wrong is one sentence, and what was there stays.
    let broken = place.file("broken.json", "{\"mcpServers\": {\"a\": {\"url\": 1}}}");
    let large = place.file("large.json", &" ".repeat(1024 * 1024 + 1));
    for (args, message) in [
        (vec!["import", broken.to_str().unwrap()], "portolan: mcpServers.a.url: This must be a string.\n"),
        (vec!["import", large.to_str().unwrap()], "portolan: The file is empty.\n"),
        (
            vec!["import", "/nowhere/file.json"],
            "portolan: Cannot read /nowhere/file.json: No such file or directory (os error 2).\n",
        ),
        (
            vec!["export", "--output", "/nowhere/file.json"],
            "portolan: Cannot write /nowhere/file.json: No such file or directory (os error 2).\n",
        ),
    ] {
        let (code, out, err) = place.say(&args).await;
        assert_eq!((code, &*out, &*err), (Some(1), "", message), "{args:?}");
    }
    let large = place.file("large.json", &format!("{{\"x\": \"{}\"}}", "x".repeat(1024 * 1024)));
    let (code, _, err) = place.say(&["import", large.to_str().unwrap()]).await;
    assert_eq!((code, &*err), (Some(1), "portolan: The file is larger than 1048576 bytes, the most that is read.\n"));
    let programs = place.file("programs.json", r#"{"mcpServers": {"p": {"command": "true"}}}"#);
    let (code, _, err) = place.say(&["--stdio", "off", "import", programs.to_str().unwrap()]).await;
    assert!(code == Some(1) && err.starts_with("portolan: mcpServers.p.command: "), "{err}");

    // A Portolan that is started on it finds the servers, and connects to them.
    let http = fake::http::serve(Fake::new(Script::default()));
    let live = place.file("live.json", &json!({"servers": {"live": {"type": "http", "url": http.url}}}).to_string());
    let said = place.import(&live, &["--replace"]).await;
    assert!(said.contains("removed    a\n") && said.contains("1 added, 0 changed, 0 unchanged, 1 removed"), "{said}");
    let mut program = Program::start(place.command(&[]));
    let remote = crate::harness::Remote::new(&program.url);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let list = remote.send("GET", LIST, None).await.expect(200);
        assert_eq!(list.as_array().unwrap().len(), 1);
        if list[0]["status"]["state"] == "ready" {
            assert!(list[0]["status"]["tool_count"].as_u64().unwrap() > 0);
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{list}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    drop(program);
    place.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_file_calls_things_cannot_steer_a_terminal() {
    let place = Place::new().await;
    let text =
        r#"{"mcpServers": {"a": {"command": "c", "k\u001b[2J": 1}, "b\u001b[2J": {"command": "c", "disabled": true}}}"#;
    let said = place.import(&place.file("servers.json", text), &[]).await;
    assert!(!said.contains('\u{1b}'), "{said:?}");
    for name in [r"a, k\u{1b}[2J: ", r"b\u{1b}[2J, disabled: "] {
        assert!(said.contains(name), "{said}");
    }
    place.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_of_which_one_cannot_be_done_store_nothing() {
    let portolan = Portolan::start().await;
    let stays = portolan.create("stays", json!({"server_url": DEAD})).await;
    let store = &portolan.app.store;
    let revision = store.server_by_name("stays").await.unwrap().unwrap().revision;
    let steps = |revision| {
        let connector = Connector::Sse(Remote {
            server_url: DEAD.to_owned(),
            auth_header: None,
            auth_token: None,
            custom_headers: None,
            oauth: None,
        });
        let add = NewServer {
            id: format!("mcp_server-{}", uuid::Uuid::new_v4()),
            server_name: "comes".to_owned(),
            connector,
            created_at: None,
            tools: vec![],
            sign_in: None,
        };
        [Step::Add(Box::new(add)), Step::Remove { id: stays["id"].as_str().unwrap().to_owned(), revision }]
    };
    let names = async || servers(&portolan).await.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let refused = store.change_servers(&steps(revision + 1), &By::default(), |_| {}).await;
    assert!(matches!(refused, Err(store::Error::Overtaken)), "{refused:?}");
    assert_eq!(names().await, ["stays"]);
    store.change_servers(&steps(revision), &By::default(), |_| {}).await.unwrap();
    assert_eq!(names().await, ["comes"]);
    portolan.stop().await;
}
