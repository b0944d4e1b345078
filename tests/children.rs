//! Children of every kind: what they print, when they die, what they leave behind.

use serde_json::json;

use crate::fake::script::with_tools;
use crate::harness::{Portolan, eventually, fake_mcp};

fn alive(pid: &str) -> bool {
    // A zombie has an entry, too, but no command line.
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_child_starts_goes_with_it() {
    let portolan = Portolan::start().await;
    for how in ["stop", "kill", "delete"] {
        let (server, _script) =
            portolan.create_stdio(how, &json!({ "tools": with_tools(&["spawn_child", "pid"]) })).await;
        let id = server["id"].as_str().unwrap();
        let grandchild = portolan.run(id, "spawn_child", json!({})).await["func_return"].take();
        let grandchild = grandchild.as_str().unwrap().to_owned();
        let child = portolan.run(id, "pid", json!({})).await["func_return"].take();
        assert!(alive(&grandchild));
        match how {
            "kill" => crate::harness::kill(child.as_str().unwrap().parse().unwrap()),
            "delete" => drop(portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204)),
            _ => portolan.app.mcp.forget(id),
        }
        eventually("the grandchild ends", || !alive(&grandchild)).await;
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_error_is_drained_and_a_banner_is_passed_over() {
    let portolan = Portolan::start().await;
    let script = json!({
        "banner": "Welcome!\n{\"not\": \"JSON-RPC\"}\n", "stderr": "w".repeat(300_000),
        "tools": with_tools(&["stderr"]),
    });
    let (server, _script) = portolan.create_stdio("talks", &script).await;
    assert_eq!(server["status"]["state"], "ready", "{server}");
    let run = portolan.run(server["id"].as_str().unwrap(), "stderr", json!({"bytes": 5_000_000})).await;
    assert_eq!(run["func_return"], "done");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_dies_at_any_stage_is_told_apart_by_its_exit_code() {
    let portolan = Portolan::start().await;
    for (stage, code) in [("start", 3), ("initialize", 4)] {
        let (server, _script) = portolan.create_stdio(stage, &json!({"exit_at": stage, "exit_code": code})).await;
        assert_eq!(server["status"]["state"], "unreachable");
        let error = server["status"]["error"].as_str().unwrap();
        assert!(error.contains(&format!("exit status: {code}")), "{error}");
        let tool = format!("/v1/mcp-servers/{}/refresh", server["id"].as_str().unwrap());
        portolan.send("PATCH", &tool, None).await.expect(404);
    }
    let (server, script) = portolan.create_stdio("list", &json!({"exit_at": "list"})).await;
    assert_eq!(server["status"]["state"], "unreachable", "{server}");
    script.set(&json!({}));
    let id = server["id"].as_str().unwrap();
    assert!(portolan.refresh(id).await.expect(200)["added"].as_array().unwrap().len() > 5, "and it can come back");
    eventually("one child is left", || portolan.children().len() == 1).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dying_child_says_names_no_secret() {
    let portolan = Portolan::start().await;
    let script = "echo first >&2; echo \"no luck with $KEY\u{1b}[31m\" >&2; exit 1";
    let config = json!({"command": "/bin/sh", "args": ["-c", script], "env": {"KEY": "hunter2-secret"}});
    let server = portolan.create("secretive", config).await;
    let error = server["status"]["error"].as_str().unwrap();
    assert!(error.contains(r"no luck with ********\u{1b}[31m"), "{error}");
    let refused = portolan.refresh(server["id"].as_str().unwrap()).await.expect(404);
    assert!(!refused.to_string().contains("hunter2"), "{refused}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_child_is_given_up_in_time_and_leaves_nothing() {
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.start_timeout = std::time::Duration::from_millis(700);
        settings.upstream.list_timeout = std::time::Duration::from_millis(700);
    })
    .await;
    for stage in ["initialize", "list"] {
        let (server, _script) = portolan.create_stdio(stage, &json!({"silent_at": stage, "stubborn": true})).await;
        assert_eq!(server["status"]["state"], "unreachable", "{server}");
        assert!(server["status"]["error"].as_str().unwrap().contains("in time"), "{server}");
        eventually("its child is ended", || portolan.children().is_empty()).await;
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_wait_for_a_server_share_its_failure() {
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.start_timeout = std::time::Duration::from_secs(2);
    })
    .await;
    let (server, script) = portolan.create_stdio("dead", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let tool = portolan.tool_id(id, "echo").await;
    script.set(&json!({"silent_at": "initialize"}));
    portolan.app.mcp.forget(id);
    let path = format!("/v1/mcp-servers/{id}/tools/{tool}/run");
    let body = json!({});
    let runs = (0..10).map(|_| portolan.post(&path, &body));
    for answer in futures_util::future::join_all(runs).await {
        answer.expect(502);
    }
    let starts = script.seen().iter().map(|(pid, _)| *pid).collect::<std::collections::HashSet<_>>().len();
    // The first child, and at most one attempt for those who came before it failed, and one after.
    assert!(starts <= 3, "{starts} children were started for 10 callers");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_reads_no_more_can_be_replaced() {
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.list_timeout = std::time::Duration::from_millis(500);
    })
    .await;
    let (server, _script) = portolan.create_stdio("deaf", &json!({ "tools": with_tools(&["deaf"]) })).await;
    let id = server["id"].as_str().unwrap();
    assert_eq!(portolan.run(id, "deaf", json!({})).await["func_return"], "done");
    portolan.refresh(id).await.expect(404);
    assert_eq!(portolan.run(id, "echo", json!({"message": "heard"})).await["func_return"], "heard");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_deleted_while_others_wait_for_it_keeps_no_child() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("deleted", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    script.set(&json!({"list_delay_ms": 700}));
    let messages = script.methods().len();
    let delete = async {
        eventually("a refresh is under way", || script.methods().len() > messages).await;
        portolan.delete(&format!("/v1/mcp-servers/{id}")).await
    };
    let (first, second, third, deleted) =
        tokio::join!(portolan.refresh(id), portolan.refresh(id), portolan.refresh(id), delete);
    deleted.expect(204);
    for refresh in [first, second, third] {
        assert_eq!(refresh.expect(404)["code"], "not_found");
    }
    eventually("its child is ended", || portolan.children().is_empty()).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_without_end_is_ended() {
    let portolan = Portolan::start().await;
    // It greets, then asks and asks, and reads nothing more.
    let ping = r#"{"jsonrpc":"2.0","id":{n},"method":"ping"}"#;
    let asking = json!({"deaf": true, "steps": [{"repeat": [1_000_000_000, {"say": ping}]}]});
    let (server, _script) = portolan.create_stdio("asks", &json!({"acts": {"list": asking}})).await;
    assert_eq!(server["status"]["state"], "unreachable", "{server}");
    eventually("its child is ended", || portolan.children().is_empty()).await;
    let fine = json!({"command": fake_mcp(), "args": ["stdio"]});
    assert_eq!(portolan.create("fine", fine).await["status"]["state"], "ready");
    portolan.stop().await;
}

/// How much of what was written to a process's standard input it has not read.
fn unread(pid: u32) -> u64 {
    let input = std::fs::File::open(format!("/proc/{pid}/fd/0")).unwrap();
    rustix::io::ioctl_fionread(input).unwrap()
}

/// Whether all of a process's threads have come to a stop: one that is in a read may take what comes before.
fn is_stopped(pid: u32) -> bool {
    let is_stopped = |thread: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(is_stopped)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_a_child_never_read_is_made_to_its_successor_and_one_that_it_read_is_not() {
    let portolan = Portolan::start().await;
    let script = portolan.script(&json!({}));
    let (fake, file) = (fake_mcp(), script.0.to_string_lossy().into_owned());
    let signal = |signal: &str, pid: u32| {
        assert!(std::process::Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    };
    // The second is a child of a child, which holds its standard input as well.
    let chain = format!("{} stdio {file}; exit", fake.display());
    for (name, command, args) in
        [("alone", fake.to_str().unwrap(), json!(["stdio", file])), ("chain", "sh", json!(["-c", chain]))]
    {
        let config = json!({"mcp_server_type": "stdio", "command": command, "args": args});
        let id = portolan.create(name, config).await["id"].as_str().unwrap().to_owned();
        let servers = || {
            let is_fake =
                |pid: &u32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("fake-mcp"));
            portolan.children().into_iter().filter(is_fake).collect::<Vec<_>>()
        };
        let path = portolan.remote().path(&id, "echo").await;
        let remote = portolan.remote();
        let [pid] = servers()[..] else { panic!("one server") };
        assert_eq!(unread(pid), 0);
        signal("-STOP", pid);
        eventually("it stops", || is_stopped(pid)).await;
        let running = tokio::spawn(async move { remote.post(&path, &json!({"args": {"message": "here"}})).await });
        eventually("the call is in the pipe", || unread(pid) > 0).await;
        signal("-KILL", pid);
        let outcome = running.await.unwrap().expect(200);
        assert_eq!((&outcome["status"], &outcome["func_return"]), (&json!("success"), &json!("here")), "{name}");

        let path = portolan.remote().path(&id, "slow").await;
        let remote = portolan.remote();
        let [other] = servers()[..] else { panic!("one server") };
        assert_ne!(pid, other);
        let before = script.seen().len();
        let running = tokio::spawn(async move { remote.post(&path, &json!({"args": {"ms": 60_000}})).await });
        eventually("the call was read", || script.seen().len() > before).await;
        signal("-KILL", other);
        let outcome = running.await.unwrap().expect(200);
        let said = outcome["func_return"].as_str().unwrap();
        assert!(outcome["status"] == "error" && said.contains("the tool may have run"), "{outcome}");
        portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
    }
    portolan.stop().await;
}
