//! What a command may do on this host, and what it may not: as a program with children of its own shows it, with the real
//! Portolan. Each refusal has a twin that is allowed.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use portolan::model::sha256_hex;
use serde_json::{Value, json};

use crate::fake::script::with_tools;
use crate::harness::{Answer, Database, Remote, Script, eventually, fake_mcp, kill, processes_naming, scripts};
use crate::process::{self, Program};

/// A Portolan, and a home that is not its own.
struct Host {
    program: Program,
    remote: Remote,
    database: Database,
    folder: tempfile::TempDir,
}

/// What a command says: its exit code and both outputs.
#[derive(Debug)]
struct Said {
    code: i64,
    out: String,
    #[expect(dead_code, reason = "printed when an assertion fails")]
    err: String,
}

impl Host {
    async fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // A user of the children's own must be able to pass.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let database = Database::new().await;
        for made in ["home/notes", "home/.ssh", "beside"] {
            std::fs::create_dir_all(folder.path().join(made)).unwrap();
        }
        std::fs::write(folder.path().join("home/.ssh/key"), "a key").unwrap();
        std::fs::write(folder.path().join("home/notes/note"), "a note").unwrap();
        std::fs::write(folder.path().join("templates.json"), "{}").unwrap();
        let program = run(folder.path(), &database, arguments);
        let remote = Remote::new(&program.url);
        Self { program, remote, database, folder }
    }

    /// Stops and starts it again, on the same data.
    fn again(&mut self, arguments: &[&str]) {
        self.program.signal("-TERM");
        assert_eq!(self.program.exit_code(), Some(0));
        self.program = run(self.folder.path(), &self.database, arguments);
        self.remote = Remote::new(&self.program.url);
    }

    fn at(&self, path: &str) -> String {
        self.folder.path().join(path).display().to_string()
    }

    /// A fake server with a shell, whose configuration names these paths.
    async fn shell(&self, server_name: &str, named: &[&str]) -> (String, Value, Script) {
        let script = Script::new(self.folder.path(), &json!({ "tools": with_tools(&["sh"]) }));
        let mut args = vec!["stdio".to_owned()];
        args.extend(named.iter().map(|path| self.at(path)));
        args.push(script.0.display().to_string());
        let server = self.remote.create(server_name, json!({ "command": fake_mcp(), "args": args })).await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
        (server["id"].as_str().unwrap().to_owned(), server, script)
    }

    async fn sh(&self, id: &str, script: &str) -> Said {
        let run = self.remote.run(id, "sh", json!({ "script": script })).await;
        let said: Value = serde_json::from_str(run["func_return"].as_str().unwrap()).unwrap();
        let text = |key: &str| said[key].as_str().unwrap().trim().to_owned();
        Said { code: said["code"].as_i64().unwrap(), out: text("out"), err: text("err") }
    }

    async fn delete(&self, id: &str) {
        self.remote.send("DELETE", &format!("/v1/mcp-servers/{id}"), None).await.expect(204);
    }

    /// Where the private folders of a server are.
    fn own(&self, id: &str) -> PathBuf {
        self.folder.path().join("portolan-data/children").join(sha256_hex(id))
    }

    /// The processes of this test's servers.
    fn left(&self) -> Vec<u32> {
        processes_naming(&scripts(self.folder.path()).to_string_lossy())
    }

    /// Stops it; nothing may be left.
    async fn stop(mut self) {
        self.program.signal("-TERM");
        assert_eq!(self.program.exit_code(), Some(0));
        assert_eq!(self.left(), Vec::<u32>::new());
        self.database.remove().await;
    }
}

fn run(folder: &Path, database: &Database, arguments: &[&str]) -> Program {
    run_with(folder, database, arguments, None)
}

fn run_with(folder: &Path, database: &Database, arguments: &[&str], variable: Option<(&str, &str)>) -> Program {
    let plain = process::command(folder, database.url().as_deref());
    // Whoever starts it leaves a file open in it.
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec 7< /dev/zero; exec \"$@\"", "sh"]).arg(plain.get_program()).args(arguments);
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?)))).env_remove("DATABASE_URL");
    command.envs(database.url().map(|url| ("DATABASE_URL", url))).current_dir(folder).stderr(Stdio::null());
    command.env("HOME", folder.join("home")).env("CANARY", "in the environment of Portolan").envs(variable);
    Program::start(command)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The keeper of a child: its parent.
async fn keeper(host: &Host, id: &str) -> u32 {
    let child = host.remote.run(id, "pid", json!({})).await["func_return"].as_str().unwrap().to_owned();
    let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_has_what_is_its_own_and_no_more() {
    let host = Host::start(&["--child-max-files", "2000", "--child-max-processes", "20000"]).await;
    let script = Script::new(host.folder.path(), &json!({ "tools": with_tools(&["sh", "env"]) }));
    let config = json!({"command": fake_mcp(), "args": ["stdio", script.0], "env": {"MINE": "a b"}});
    let server = host.remote.create("own", config).await;
    let id = server["id"].as_str().unwrap();
    let environment = host.remote.run(id, "env", json!({})).await;
    let environment: Value = serde_json::from_str(environment["func_return"].as_str().unwrap()).unwrap();
    let own = host.own(id);
    for (name, value) in environment.as_object().unwrap() {
        match &**name {
            "MINE" => assert_eq!(value, "a b"),
            "HOME" => assert_eq!(Path::new(value.as_str().unwrap()), own.join("home")),
            "TMPDIR" => {
                let name = Path::new(value.as_str().unwrap()).strip_prefix(&own).unwrap().to_string_lossy();
                assert!(name.starts_with("tmp-") && !name.contains('/'), "{name}");
            }
            "PATH" | "LANG" | "LC_ALL" | "TZ" => assert_eq!(*value, json!(std::env::var(name).unwrap())),
            _ => panic!("{name} is nothing of a command"),
        }
    }
    assert!(environment["PATH"].is_string() && environment["MINE"].is_string());
    let said = host.sh(id, "pwd; umask; stat -c %a . \"$HOME\" \"$TMPDIR\"").await;
    assert_eq!(said.out, format!("{}\n0077\n700\n700\n700", own.join("home").display()), "{said:?}");
    let limits = host.sh(id, "ulimit -c; ulimit -Hc; ulimit -n; ulimit -Hn").await;
    assert_eq!(limits.out, "0\n0\n1024\n2000");
    let processes = host.sh(id, "grep 'Max processes' /proc/self/limits | tr -s ' ' | cut -d' ' -f4").await.out;
    assert!(processes.parse::<u64>().unwrap() <= 20_000, "{processes}");
    let status = host.sh(id, "cat /proc/self/status").await.out;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).expect(name).trim().to_owned();
    assert_eq!(field("NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    if is_root() {
        assert_eq!(field("CapBnd:"), "0000000000000000", "root does not get them back");
    }
    // It leads a session and a group of its own.
    let child = host.remote.run(id, "pid", json!({})).await["func_return"].as_str().unwrap().to_owned();
    let ids = host.sh(id, &format!("cut -d' ' -f5,6 /proc/{child}/stat")).await;
    assert_eq!(ids.out, format!("{child} {child}"));
    // Its files are its three pipes: seen in one that opens nothing itself.
    let out = scripts(host.folder.path()).join("files");
    let look = format!("exec ls -l /proc/self/fd 2> {0} >&2", out.display());
    host.remote.create("files", json!({"command": "/bin/sh", "args": ["-c", look]})).await;
    let files = std::fs::read_to_string(&out).unwrap();
    let files: Vec<_> = files.lines().filter_map(|line| line.split_once(" -> ")).collect();
    // The last is the folder that is being listed; the two outputs were sent elsewhere.
    let [(_, stdin), (_, stdout), (_, stderr), (_, listed)] = files[..] else { panic!("{files:?}") };
    assert!(stdin.starts_with("pipe:") && listed.ends_with("/fd"), "{files:?}");
    assert_eq!([stdout, stderr], [&*out.to_string_lossy(); 2]);
    host.stop().await;
}

/// What a command tries, and whether it may: with Landlock and without, where its user is Portolan's.
fn attempts(host: &Host, other: &str, keeper: u32) -> Vec<(String, bool, bool)> {
    let (at, portolan) = (|path: &str| host.at(path), host.program.child.id());
    let other = host.own(other).display().to_string();
    let test = std::process::id();
    vec![
        // The allowed twins.
        ("echo x > \"$HOME/x\" && cat \"$HOME/x\"".to_owned(), true, true),
        ("mkdir \"$TMPDIR/x\" && echo x > \"$TMPDIR/x/y\" && mv \"$TMPDIR/x/y\" \"$HOME/y\"".to_owned(), true, true),
        ("cat /usr/bin/env > /dev/null && /usr/bin/env true && ls /usr/lib > /dev/null".to_owned(), true, true),
        (format!("cat {0}/note && echo x > {0}/new && rm {0}/new", at("home/notes")), true, true),
        (format!("echo x > {0}/x && rm {0}/x", at("beside")), true, true),
        ("cat /proc/self/environ /proc/$PPID/environ".to_owned(), true, true),
        ("kill -0 $PPID".to_owned(), true, true),
        // Portolan's own files.
        (format!("ls {}", at("portolan-data")), false, true),
        (format!("ls {}/children", at("portolan-data")), false, true),
        (format!("echo x > {}/planted", at("portolan-data")), false, true),
        (format!("cat {}", at("portolan-data/database-of-a-test")), false, true),
        (format!("cat {}/../database-of-a-test", at("portolan-data/children")), false, true),
        (format!("ln -s {0} \"$HOME/link\" && ls \"$HOME/link/\"", at("portolan-data")), false, true),
        (format!("ls {}", at("home/notes/link/")), false, true),
        (format!("ln {}/database-of-a-test \"$HOME/hard\"", at("portolan-data")), false, true),
        (format!("mv {}/database-of-a-test \"$HOME/hard2\"", at("portolan-data")), false, true),
        (format!("cat {}", at("templates.json")), false, true),
        (format!("echo '{{}}' > {}", at("templates.json")), false, true),
        (format!("ls {other}/home"), false, true),
        (format!("cat {other}/home/token"), false, true),
        (format!("ls {other}/tmp-*/ && echo x > {other}/home/planted"), false, true),
        // Homes.
        (format!("ls {}", at("home")), false, true),
        (format!("cat {}", at("home/.ssh/key")), false, true),
        (format!("cat {}/../.ssh/key", at("home/notes")), false, true),
        (format!("cat /proc/self/root/{}", at("home/.ssh/key")), false, true),
        (format!("echo x > {}", at("home/planted")), false, true),
        // Other processes. Portolan and keepers let nobody look, Landlock or not; and nobody without capabilities looks into
        // one that has some.
        (format!("cat /proc/{test}/environ"), false, !is_root()),
        (format!("cat /proc/{portolan}/environ"), false, false),
        (format!("head -c 1 /proc/{portolan}/mem"), false, false),
        (format!("readlink /proc/{portolan}/fd/1"), false, false),
        (format!("cat /proc/{portolan}/maps"), false, false),
        (format!("ls /proc/{portolan}/root/"), false, false),
        (format!("ls /proc/{portolan}/cwd/"), false, false),
        (format!("cat /proc/{keeper}/environ"), false, false),
        (format!("head -c 1 /proc/{keeper}/mem"), false, false),
        (format!("kill -0 {portolan}"), false, true),
        (format!("kill -0 {keeper}"), false, true),
        (format!("kill -0 {test}"), false, true),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_reaches_what_is_allowed_and_nothing_else() {
    for landlock in ["best-effort", "required", "off"] {
        let mut host = Host::start(&[]).await;
        let file = host.at("templates.json");
        host.again(&["--child-landlock", landlock, "--stdio-templates", &file]);
        std::fs::write(host.at("portolan-data/database-of-a-test"), "rows").unwrap();
        std::os::unix::fs::symlink(host.at("portolan-data"), host.at("home/notes/link")).unwrap();
        let (other, ..) = host.shell("other", &[]).await;
        host.sh(&other, "echo secret > \"$HOME/token\"").await;
        // The data folder is named, and is not had by that.
        let (id, server, _script) = host.shell("curious", &["home/notes", "portolan-data", "templates.json"]).await;
        let level: Vec<_> =
            server["status"]["confinement"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        assert_eq!(level.iter().any(|word| word.starts_with("landlock-")), landlock != "off", "{level:?}");
        for word in ["session", "limits", "no_new_privs", "capabilities"] {
            assert!(level.contains(&word), "{level:?}");
        }
        let keeper = keeper(&host, &id).await;
        for (attempt, with, without) in attempts(&host, &other, keeper) {
            // What belongs to signals came with version 6.
            if attempt.starts_with("kill") && landlock != "off" && !level.contains(&"signals") {
                continue;
            }
            let said = host.sh(&id, &attempt).await;
            let expected = if landlock == "off" { without } else { with };
            assert_eq!(said.code == 0, expected, "{landlock}: {attempt}: {said:?}");
            if !expected {
                assert!(!said.out.contains("CANARY") && !said.out.contains("a key"), "{attempt}: {said:?}");
            }
        }
        assert!(Path::new(&host.at("home/notes/note")).exists());
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_and_tools_that_the_operator_names_are_open() {
    let mut host = Host::start(&[]).await;
    let (id, ..) = host.shell("closed", &[]).await;
    let look = format!("cat {}", host.at("home/notes/note"));
    assert_ne!(host.sh(&id, &look).await.code, 0);
    let paths = format!("{}:{}", host.at("home/notes"), host.at("nowhere"));
    host.again(&["--child-paths", &paths]);
    assert_eq!(host.sh(&id, &look).await.out, "a note");
    assert_ne!(host.sh(&id, &format!("cat {}", host.at("home/.ssh/key"))).await.code, 0);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_a_request_names_is_not_open_by_that() {
    let mut host = Host::start(&[]).await;
    let notes = host.at("home/notes");
    std::fs::write(host.at("variables.json"), json!({ "FILED": notes }).to_string()).unwrap();
    host.again(&["--variables-file", "variables.json"]);
    let script = Script::new(host.folder.path(), &json!({ "tools": with_tools(&["sh"]) }));
    let look = format!("cat {notes}/note");
    for (template, given, reaches) in [
        ("{{ DIR | /nowhere }}".to_owned(), true, false),
        (format!("{{{{ DIR | {notes} }}}}"), false, true),
        ("{{ FILED | /nowhere }}".to_owned(), false, true),
        ("{{ FILED | /nowhere }}/../notes".to_owned(), true, true),
    ] {
        let dir = format!("--dir={template}");
        let config = json!({
            "command": fake_mcp(), "args": ["stdio", dir, template, script.0],
            "env": {"DIR": template, "LIST": format!("/nowhere:{template}")},
        });
        let server = host.remote.create(&format!("{template} {given}"), config).await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
        let path = host.remote.path(server["id"].as_str().unwrap(), "sh").await;
        let mut request = host.remote.request("POST", &path).json(&json!({"args": {"script": look}}));
        if given {
            request = request.header("x-portolan-variables", json!({ "DIR": notes }).to_string());
        }
        let run = Answer::of("POST", &path, request).await.expect(200);
        let said = run["func_return"].as_str().unwrap();
        assert_eq!(said.contains("a note"), reaches, "{template}: {said}");
    }
    host.stop().await;
}

/// What gets away from its parent, its group, its session and SIGTERM; each names the script.
const RUNAWAYS: [&str; 5] = [
    "tail -n 0 -f $FILE > /dev/null 2>&1 &",
    "setsid tail -n 0 -f $FILE > /dev/null 2>&1 &",
    "setsid sh -c 'setsid tail -n 0 -f $FILE &' > /dev/null 2>&1 < /dev/null",
    "trap '' TERM HUP INT; setsid sh -c '(setsid tail -n 0 -f $FILE &) &' > /dev/null 2>&1 < /dev/null",
    "trap '' TERM; (exec sh -c 'while :; do setsid tail --pid=$$ -n 0 -f $FILE; done' > /dev/null 2>&1 < /dev/null &)",
];

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_command_starts_is_left() {
    for how in ["delete", "change", "child", "keeper", "stop", "kill"] {
        let mut host = Host::start(&[]).await;
        let (id, _, script) = host.shell("parent", &[]).await;
        let (beside, _, other) = host.shell("beside", &[]).await;
        let file = script.0.display().to_string();
        for runaway in RUNAWAYS {
            let before = processes_naming(&file).len();
            host.sh(&id, &runaway.replace("$FILE", &file)).await;
            eventually("it runs", || processes_naming(&file).len() > before).await;
        }
        let keeper = keeper(&host, &id).await;
        let child = host.remote.run(&id, "pid", json!({})).await["func_return"].as_str().unwrap().parse().unwrap();
        match how {
            "delete" => host.delete(&id).await,
            "change" => {
                let url = json!({"config": {"mcp_server_type": "sse", "server_url": "http://127.0.0.1:1/sse"}});
                let path = format!("/v1/mcp-servers/{id}");
                let server = host.remote.send("PATCH", &path, Some(&url)).await.expect(200);
                assert_eq!(server["status"]["confinement"], Value::Null, "it is no command any more");
            }
            "child" => kill(child),
            "keeper" => kill(keeper),
            "stop" => host.program.signal("-TERM"),
            _ => host.program.signal("-KILL"),
        }
        eventually(&format!("nothing is left after {how}"), || processes_naming(&file).is_empty()).await;
        if matches!(how, "stop" | "kill") {
            host.program.exit_code();
            eventually("nothing is left", || host.left().is_empty()).await;
            host.database.remove().await;
            continue;
        }
        // Others are not harmed, and their keepers are not taken for what was left.
        assert_eq!(host.sh(&beside, "echo here").await.out, "here", "{how}");
        assert_eq!(other.starts(), 1, "{how}");
        let zombies = || crate::harness::zombies_of(host.program.child.id()).is_empty();
        eventually("no zombie", zombies).await;
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_lasts_as_long_as_its_server_and_what_is_temporary_a_start() {
    let mut host = Host::start(&[]).await;
    let (id, ..) = host.shell("keeps", &[]).await;
    let (kept, ..) = host.shell("stays", &[]).await;
    let fill =
        "mkdir -p \"$TMPDIR/a/b\"; for i in 1 2 3 4 5 6 7 8 9; do head -c 100000 /dev/zero > \"$TMPDIR/a/b/$i\"; done
                chmod 000 \"$TMPDIR/a/b\"; echo kept > \"$HOME/cache\"";
    assert_eq!(host.sh(&id, fill).await.code, 0);
    let folders = |own: &Path| {
        let names = std::fs::read_dir(own).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("tmp-")).collect::<Vec<_>>()
    };
    assert_eq!(folders(&host.own(&id)).len(), 1);
    host.again(&[]);
    assert!(folders(&host.own(&id)).is_empty(), "it goes with its child");
    let said = host.sh(&id, "ls -A \"$TMPDIR\"; cat \"$HOME/cache\"").await;
    assert_eq!(said.out, "kept");
    // A child that puts links in the place of its folders gains nothing by it.
    std::fs::write(host.at("beside/precious"), "text").unwrap();
    let beside = host.at("beside");
    host.program.signal("-TERM");
    assert_eq!(host.program.exit_code(), Some(0));
    std::fs::remove_dir_all(host.own(&id).join("home")).unwrap();
    // A keeper that was killed leaves the second behind.
    for name in ["home", "tmp-left"] {
        std::os::unix::fs::symlink(&beside, host.own(&id).join(name)).unwrap();
    }
    std::fs::create_dir(host.own(&id).join("tmp-old")).unwrap();
    host.program = run(host.folder.path(), &host.database, &[]);
    host.remote = Remote::new(&host.program.url);
    assert_eq!(host.sh(&id, "ls -A \"$TMPDIR\" \"$HOME\" | grep -c precious").await.out, "0");
    assert!(Path::new(&host.at("beside/precious")).exists());
    let own = host.own(&id);
    assert_eq!(folders(&own).len(), 1, "that of the child");
    // An old child and a new one of the same server do not disturb each other.
    let old = async {
        let script = "echo old > \"$TMPDIR/file\"; echo x > \"$HOME/under-way\"; sleep 2; cat \"$TMPDIR/file\"";
        host.sh(&id, script).await
    };
    let new = async {
        eventually("the old one is at work", || own.join("home/under-way").exists()).await;
        let change = json!({"config": {"env": {"NEW": "yes"}}});
        host.remote.send("PATCH", &format!("/v1/mcp-servers/{id}"), Some(&change)).await.expect(200);
        host.sh(&id, "echo $NEW > \"$TMPDIR/file\"; ls \"$TMPDIR\"").await
    };
    let (old, new) = tokio::join!(old, new);
    assert_eq!((&*old.out, &*new.out), ("old", "file"));
    eventually("the old one is gone", || folders(&own).len() == 1).await;
    assert_eq!(host.sh(&id, "cat \"$TMPDIR/file\"").await.out, "yes");
    host.delete(&id).await;
    eventually("its folders are gone", || !own.exists()).await;
    assert!(host.own(&kept).exists());
    host.stop().await;
}

/// A start that is refused: what it says.
fn refusal(folder: &Path, arguments: &[&str]) -> String {
    let output = process::command(folder, None).args(arguments).stderr(Stdio::piped()).output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_can_run_as_another_user() {
    let folder = tempfile::tempdir().unwrap();
    let said = refusal(folder.path(), &["--child-user", "no-such-user"]);
    assert!(said.contains("There is no user"), "{said}");
    if !is_root() {
        let said = refusal(folder.path(), &["--child-user", "65534:65534"]);
        assert!(said.contains("needs root"), "{said}");
        return;
    }
    let said = refusal(folder.path(), &["--child-user", "65534"]);
    assert!(said.contains("--child-dir"), "the data folder is for its owner alone: {said}");
    let children = folder.path().join("children");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let host = Host::start(&["--child-user", "65534:65533", "--child-dir", &children.display().to_string()]).await;
    std::fs::write(host.at("portolan-data/database-of-a-test"), "rows").unwrap();
    // It writes its log and its starts there.
    std::fs::set_permissions(scripts(host.folder.path()), std::fs::Permissions::from_mode(0o777)).unwrap();
    let (id, server, _script) = host.shell("nobody", &[]).await;
    assert!(server["status"]["confinement"].as_array().unwrap().contains(&json!("user")), "{server}");
    assert_eq!(host.sh(&id, "id -u; id -g; id -G").await.out, "65534\n65533\n65533");
    let status = host.sh(&id, "grep -E '^(Uid|Gid|Groups|CapEff|CapPrm)' /proc/self/status | tr '\\t' ' '").await.out;
    assert!(status.contains("Uid: 65534 65534 65534 65534"), "{status}");
    assert!(status.contains("Gid: 65533 65533 65533 65533"), "{status}");
    assert_eq!(
        host.sh(&id, "echo x > \"$HOME/x\" && echo x > \"$TMPDIR/x\" && stat -c %u:%g:%a \"$HOME\"").await.out,
        "65534:65533:700"
    );
    for refused in
        [format!("ls {}", host.at("portolan-data")), format!("cat {}", host.at("portolan-data/database-of-a-test"))]
    {
        assert_ne!(host.sh(&id, &refused).await.code, 0, "{refused}");
    }
    // Its end is certain, too.
    let own = children.join(sha256_hex(&id));
    assert!(own.exists());
    host.delete(&id).await;
    eventually("it is gone", || host.left().is_empty() && !own.exists()).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_can_run_below_another_command() {
    let mut host = Host::start(&["--child-wrapper", "env WRAPPED=yes"]).await;
    let (id, server, _script) = host.shell("wrapped", &[]).await;
    let level = server["status"]["confinement"].to_string();
    assert!(level.contains("wrapper") && !level.contains("landlock"), "{level}");
    assert_eq!(host.sh(&id, "echo $WRAPPED").await.out, "yes");
    host.again(&["--child-wrapper", "env WRAPPED=yes", "--child-landlock", "required"]);
    assert_eq!(host.sh(&id, "echo $WRAPPED").await.out, "yes");
    assert_ne!(host.sh(&id, &format!("ls {}", host.at("portolan-data"))).await.code, 0);
    let server = host.remote.send("GET", &format!("/v1/mcp-servers/{id}"), None).await.expect(200);
    assert!(server["status"]["confinement"].to_string().contains("landlock-"), "{server}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_be_started_is_told_as_before() {
    let host = Host::start(&[]).await;
    let plain = host.at("beside/plain");
    std::fs::write(&plain, "text").unwrap();
    for (command, part) in
        [("no-such-command", "was not found"), ("/nonexistent", "was not found"), (&*plain, "may not be executed")]
    {
        let server =
            host.remote.create(command.rsplit('/').next().unwrap(), json!({"command": command, "args": []})).await;
        assert_eq!(server["status"]["state"], "unreachable");
        assert!(server["status"]["error"].as_str().unwrap().contains(part), "{server}");
        assert_eq!(server["status"]["confinement"], Value::Null);
    }
    // Its environment is the one in which it is looked for.
    std::fs::write(host.at("beside/found"), "#!/bin/sh\nexit 7\n").unwrap();
    std::fs::set_permissions(host.at("beside/found"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = json!({"command": "found", "args": [], "env": {"PATH": host.at("beside")}});
    let server = host.remote.create("found", path).await;
    assert!(server["status"]["error"].as_str().unwrap().contains("exit status: 7"), "{server}");
    host.stop().await;
}

/// Every way to ask for a command: method, path after the collection, body. `$REMOTE` is a server behind a URL, `$OLD` one
/// that was registered before the rule, `$FAKE` and `$SCRIPT` the command.
fn ways_in() -> Vec<(&'static str, &'static str, Value)> {
    let (command, args) = ("$FAKE", json!(["stdio", "$SCRIPT"]));
    let stdio = json!({"command": command, "args": args});
    let full = json!({"mcp_server_type": "stdio", "command": command, "args": args, "env": {"A": "b"}});
    let typed = json!({"type": "stdio", "command": command, "args": args});
    let with = |config: &Value, more: Value| {
        let mut merged = config.clone();
        merged.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        merged
    };
    let flat = |config: &Value| with(config, json!({"server_name": "new"}));
    let create = |config: Value| ("POST", "/", json!({"server_name": "new", "config": config}));
    vec![
        create(full.clone()),
        create(stdio.clone()),
        create(typed.clone()),
        create(with(&typed, json!({"mcp_server_type": "stdio"}))),
        create(with(&full, json!({"env": null}))),
        create(with(&full, json!({"server_url": null, "auth_token": null, "custom_headers": null}))),
        create(with(&full, json!({"server_url": "http://127.0.0.1:1/"}))),
        create(with(&full, json!({"mcp_server_type": "sse"}))),
        create(with(&stdio, json!({"type": "streamable_http"}))),
        create(with(&stdio, json!({"type": "STDIO"}))),
        create(with(&stdio, json!({"mcp_server_type": " stdio"}))),
        create(with(&stdio, json!({"mcp_server_type": "sse", "type": "stdio"}))),
        create(with(&stdio, json!({"mcp_server_type": null, "type": null}))),
        ("POST", "/", flat(&stdio)),
        ("POST", "/", flat(&typed)),
        ("POST", "/", flat(&full)),
        ("POST", "", flat(&full)),
        ("POST", "/", json!({"server_name": "new", "type": "stdio", "config": stdio})),
        ("POST", "/", with(&flat(&full), json!({"config": full}))),
        ("POST", "/?type=sse", json!({"server_name": "new", "config": full})),
        ("PATCH", "/$REMOTE", json!({"config": full})),
        ("PATCH", "/$REMOTE", json!({"config": typed})),
        ("PATCH", "/$REMOTE", json!({"config": stdio})),
        ("PATCH", "/$REMOTE", full.clone()),
        ("PATCH", "/$REMOTE/", typed),
        ("PATCH", "/$REMOTE", json!({"server_name": "renamed", "config": full})),
        ("PATCH", "/$OLD", json!({"config": with(&full, json!({"env": {"MORE": "x"}}))})),
        ("PATCH", "/$OLD", json!({"config": {"args": ["stdio", "more", "$SCRIPT"]}})),
        ("PATCH", "/$OLD", json!({"config": {"command": "/bin/sh"}})),
        ("PATCH", "/$OLD", json!({"config": {"env": {"MORE": "x"}}})),
        ("PATCH", "/$OLD", json!({"server_name": "old, renamed"})),
        ("PATCH", "/$OLD", json!({"config": full})),
        ("PATCH", "/$OLD/refresh", Value::Null),
        ("PATCH", "/$OLD/refresh?agent_id=agent-1", Value::Null),
        ("POST", "/$OLD/tools/$TOOL/run", json!({"args": {}})),
        ("POST", "/$OLD/tools/$TOOL/run/", json!({})),
        ("GET", "/$OLD", Value::Null),
        ("GET", "/$OLD/tools", Value::Null),
        ("GET", "/$OLD/tools/$TOOL", Value::Null),
        ("GET", "/", Value::Null),
    ]
}

/// A host with a server behind a URL and a command, both registered while commands were allowed.
struct Before {
    host: Host,
    remote: String,
    old: String,
    tool: String,
    script: Script,
}

impl Before {
    async fn new() -> Self {
        let host = Host::start(&[]).await;
        let config = json!({"mcp_server_type": "streamable_http", "server_url": "http://127.0.0.1:1/mcp"});
        let remote = host.remote.create("remote", config).await["id"].as_str().unwrap().to_owned();
        // It says that its list has changed, and it dies: both make Portolan come back by itself.
        let script = Script::new(
            host.folder.path(),
            &json!({ "tools": with_tools(&["echo", "changed"]), "list_changed": true }),
        );
        let config = json!({"command": fake_mcp(), "args": ["stdio", script.0]});
        let old = host.remote.create("old", config).await["id"].as_str().unwrap().to_owned();
        host.remote.run(&old, "changed", json!({})).await;
        let tool = host.remote.path(&old, "echo").await;
        let tool = tool.rsplit('/').nth(1).unwrap().to_owned();
        assert_eq!(script.starts(), 1);
        Self { host, remote, old, tool, script }
    }

    fn fill(&self, text: &str) -> String {
        let fake = fake_mcp().display().to_string();
        let script = self.script.0.display().to_string();
        [("$REMOTE", &self.remote), ("$OLD", &self.old), ("$TOOL", &self.tool), ("$FAKE", &fake), ("$SCRIPT", &script)]
            .into_iter()
            .fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
    }

    async fn ask(&self, method: &str, path: &str, body: &Value) -> Answer {
        let body: Value = serde_json::from_str(&self.fill(&body.to_string())).unwrap();
        let path = format!("/v1/mcp-servers{}", self.fill(path));
        self.host.remote.send(method, &path, Some(&body).filter(|body| !body.is_null())).await
    }
}

/// Arguments, and a variable of the environment.
type Spelling = (&'static [&'static str], Option<(&'static str, &'static str)>);

#[tokio::test(flavor = "multi_thread")]
async fn no_way_in_starts_a_command_where_they_are_off() {
    let spellings: [Spelling; 8] = [
        (&["--stdio", "off"], None),
        (&["--stdio", "OFF"], None),
        (&[], Some(("PORTOLAN_STDIO", "off"))),
        (&[], Some(("MCP_DISABLE_STDIO", "true"))),
        (&[], Some(("MCP_DISABLE_STDIO", "True"))),
        (&["--stdio", "any"], Some(("MCP_DISABLE_STDIO", "1"))),
        (&["--stdio", "templates", "--stdio-templates", "templates.json"], Some(("MCP_DISABLE_STDIO", "yes"))),
        (&["--stdio", "templates", "--stdio-templates", "templates.json"], None),
    ];
    for (number, (arguments, variable)) in spellings.into_iter().enumerate() {
        let mut before = Before::new().await;
        before.host.program.signal("-TERM");
        assert_eq!(before.host.program.exit_code(), Some(0));
        let mut arguments = arguments.to_vec();
        arguments.extend(["--idle-timeout", "200ms"]);
        before.host.program = run_with(before.host.folder.path(), &before.host.database, &arguments, variable);
        before.host.remote = Remote::new(&before.host.program.url);
        let templates = number == 7;
        let code = if templates { "stdio_not_in_templates" } else { "stdio_disabled" };
        // All of them with the first spelling, and one of each kind with the others.
        let ways = ways_in();
        let ways = ways.iter().enumerate().filter(|(place, _)| number % 7 == 0 || [0, 20, 26, 32, 34].contains(place));
        for (_, (method, path, body)) in ways {
            let answer = before.ask(method, path, body).await;
            let what = format!("{arguments:?} {variable:?}: {method} {path} {body}: {} {}", answer.status, answer.text);
            match (*method, *path) {
                ("GET", _) => assert_eq!(answer.status, 200, "{what}"),
                (_, "/$OLD/refresh" | "/$OLD/refresh?agent_id=agent-1") => {
                    assert_eq!((answer.status, answer.header("x-should-retry")), (404, Some("false")), "{what}");
                }
                (_, path) if path.contains("/run") => {
                    assert_eq!((answer.status, answer.header("x-should-retry")), (502, Some("false")), "{what}");
                    assert!(
                        answer.text.contains(if templates { "--stdio-templates" } else { "switched off" }),
                        "{what}"
                    );
                }
                // It changes no command.
                (_, "/$OLD") if body.get("config").is_none() => assert_eq!(answer.status, 200, "{what}"),
                _ => {
                    assert!(matches!(answer.status, 403 | 422), "{what}");
                    if answer.status == 403 {
                        assert!(answer.text.contains(code), "{what}");
                    }
                }
            }
        }
        // It goes on looking at its sessions in between.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let old = before.ask("GET", "/$OLD", &Value::Null).await.expect(200);
        assert_eq!(old["status"]["state"], "disabled", "{old}");
        assert!(old["status"]["error"].as_str().unwrap().contains("stdio"), "{old}");
        assert!(old["status"]["tool_count"].as_u64().unwrap() > 0, "{old}");
        let all = before.ask("GET", "/", &Value::Null).await.expect(200);
        assert_eq!(all.as_array().unwrap().len(), 2, "nothing was registered: {all}");
        assert_eq!(before.script.starts(), 1, "{arguments:?} {variable:?}: a command was started");
        assert_eq!(before.host.left(), Vec::<u32>::new());
        // A server behind a URL is what it was, and the rule may change again.
        let url = json!({"config": {"server_url": "http://127.0.0.1:2/mcp"}});
        before.ask("PATCH", "/$REMOTE", &url).await.expect(200);
        before.host.again(&[]);
        let run = before.host.remote.run(&before.old, "echo", json!({"message": "again"})).await;
        assert_eq!((&run["func_return"], before.script.starts()), (&json!("again"), 2));
        before.ask("DELETE", "/$OLD", &Value::Null).await.expect(204);
        before.host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_commands_are_allowed_the_same_ways_lead_in() {
    let mut led = 0;
    for (method, path, body) in ways_in() {
        let before = Before::new().await;
        before.host.remote.run(&before.old, "die", json!({})).await;
        eventually("it is gone", || before.host.left().is_empty()).await;
        let starts = before.script.starts();
        let answer = before.ask(method, path, &body).await;
        if answer.status == 200 && before.script.starts() > starts {
            led += 1;
        }
        before.host.stop().await;
    }
    assert!(led >= 15, "{led} of the ways start a command where that is allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_allow_what_they_name_and_refuse_the_rest() {
    let mut host = Host::start(&[]).await;
    let script = Script::new(host.folder.path(), &json!({}));
    let (fake, file) = (fake_mcp().display().to_string(), script.0.display().to_string());
    let templates = json!({"fake": {"command": fake, "args": ["stdio", ["one", "two"], file], "env": ["KEY"]}});
    std::fs::write(host.at("templates.json"), templates.to_string()).unwrap();
    host.again(&["--stdio", "templates", "--stdio-templates", "templates.json"]);
    let create = async |name: &str, args: Value, env: Value| {
        let config = json!({"command": fake, "args": args, "env": env});
        host.remote.post("/v1/mcp-servers", &json!({"server_name": name, "config": config})).await
    };
    for (args, env) in [
        (json!(["stdio", "three", file]), json!({})),
        (json!(["stdio", "one", file, "more"]), json!({})),
        (json!(["stdio", file]), json!({})),
        (json!(["stdio", "one", file]), json!({"LD_PRELOAD": "/tmp/x.so"})),
    ] {
        let refused = create("refused", args, env).await.expect(403);
        assert_eq!(refused["code"], "stdio_not_in_templates");
    }
    assert_eq!(script.starts(), 0);
    let server = create("allowed", json!(["stdio", "one", file]), json!({"KEY": "x"})).await.expect(200);
    assert_eq!(server["status"]["state"], "ready", "{server}");
    let path = format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap());
    let two = json!({"config": {"args": ["stdio", "two", file]}});
    host.remote.send("PATCH", &path, Some(&two)).await.expect(200);
    let three = json!({"config": {"args": ["stdio", "three", file]}});
    host.remote.send("PATCH", &path, Some(&three)).await.expect(403);
    // The operator takes it out of the file: the row stays, and is not started.
    std::fs::write(host.at("templates.json"), "{}").unwrap();
    let starts = script.starts();
    host.again(&["--stdio", "templates", "--stdio-templates", "templates.json"]);
    host.remote.send("PATCH", &format!("{path}/refresh"), None).await.expect(404);
    let server = host.remote.send("GET", &path, None).await.expect(200);
    assert_eq!((&server["status"]["state"], script.starts()), (&json!("disabled"), starts));
    host.stop().await;
}

#[test]
fn a_rule_that_cannot_be_read_is_no_open_door() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("bad.json"), r#"{"x": {"command": "c", "argv": []}}"#).unwrap();
    for (arguments, part) in [
        (&["--stdio", "of"] as &[&str], "possible values"),
        (&["--stdio", "templates"], "needs --stdio-templates"),
        (&["--stdio", "templates", "--stdio-templates", "missing.json"], "Cannot read the file"),
        (&["--stdio", "templates", "--stdio-templates", "bad.json"], "not what it should be"),
        (&["--mcp-disable-stdio=ture"], "write true or false"),
        (&["--child-landlock", "on"], "possible values"),
        (&["--child-max-files", "3"], "16"),
    ] {
        let said = refusal(folder.path(), arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}
