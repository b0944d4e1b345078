//! Several Portolans on one PostgreSQL: what one does is so for all. On SQLite, which one process has for itself, there is
//! nothing to look at.

use serde_json::json;

use crate::harness::Portolan;

#[tokio::test]
async fn what_one_registers_another_runs() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, _script) = one.create_stdio("shared", &json!({})).await;
    let id = server["id"].as_str().expect("an id");
    let ran = other.run(id, "echo", json!({ "message": "over there" })).await;
    assert_eq!(ran["func_return"], "over there", "{ran}");
    other.stop().await;
    one.stop().await;
}
