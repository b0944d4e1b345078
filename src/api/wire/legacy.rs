//! What Letta's older SDKs read: servers without ids, in the flat shape in which they were sent, and tools as MCP has them
//! (docs/CONTRACT.md, By name).

use bytes::Bytes;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::api::reveal::Shown;
use crate::mcp::{accept, listed_schema};
use crate::model::{Server, ServerType};

use super::answer::ConnectorObject;

/// A server as its configuration: Letta's keys in Letta's order, secrets masked (CONTRACT row 6).
#[derive(Serialize)]
pub struct ServerConfig<'a> {
    server_name: &'a str,
    r#type: ServerType,
    #[serde(flatten)]
    connector: ConnectorObject,
}

impl<'a> ServerConfig<'a> {
    pub fn new(server: &'a Server, shown: Shown) -> Self {
        let connector = ConnectorObject::of(server, shown);
        Self { server_name: &server.server_name, r#type: server.server_type, connector }
    }
}

/// All servers, each under its name.
pub struct Configs<'a>(Vec<ServerConfig<'a>>);

impl<'a> Configs<'a> {
    pub fn new(servers: &'a [Server], shown: Shown) -> Self {
        Self(servers.iter().map(|server| ServerConfig::new(server, shown)).collect())
    }
}

impl Serialize for Configs<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_map(self.0.iter().map(|config| (config.server_name, config)))
    }
}

/// The keys of a tool that Letta always shows, in its order; what else there is comes behind them.
const TOOL_KEYS: [&str; 7] = ["name", "title", "description", "inputSchema", "outputSchema", "annotations", "_meta"];

/// A tool that a list accepted.
fn tool(definition: &str) -> Map<String, Value> {
    let given: Map<String, Value> = serde_json::from_str(definition).unwrap_or_default();
    let mut tool: Map<_, _> = TOOL_KEYS.map(|key| (key.to_owned(), Value::Null)).into_iter().collect();
    tool.extend(given);
    tool
}

/// The live list of a server: its tools as it lists them, the schemas as Letta closes them, and how healthy they are. Of
/// what no sync would keep there is nothing.
pub fn live_tools(listed: &[Box<RawValue>]) -> Vec<u8> {
    let (offered, _) = accept(listed);
    let tools = offered.iter().map(|offered| {
        let mut tool = tool(&offered.definition);
        let (schema, health) = listed_schema(&tool["inputSchema"]);
        tool["inputSchema"] = schema;
        tool.insert("health".to_owned(), json!(health));
        tool
    });
    array(tools)
}

/// The outcome of a test: the tools of a server that is not registered, as it lists them, and what no sync would keep.
pub fn trial(listed: &[Box<RawValue>]) -> Vec<u8> {
    let (offered, skipped) = accept(listed);
    let mut json = br#"{"status":"success","tools":"#.to_vec();
    json.append(&mut array(offered.iter().map(|offered| tool(&offered.definition))));
    json.extend_from_slice(br#","skipped":"#);
    serde_json::to_writer(&mut json, &skipped).expect("what is skipped is texts");
    json.push(b'}');
    json
}

/// Written one by one: all of them at once as values would take several times the memory.
fn array(tools: impl Iterator<Item = Map<String, Value>>) -> Vec<u8> {
    let mut array = vec![b'['];
    for tool in tools {
        if array.len() > 1 {
            array.push(b',');
        }
        serde_json::to_writer(&mut array, &tool).expect("a tool is JSON");
    }
    array.push(b']');
    array
}

/// What came of a run, from the JSON of a `ToolExecutionResult`.
pub fn execution(result: Bytes) -> Bytes {
    #[derive(Deserialize)]
    struct Told {
        status: String,
        func_return: String,
    }
    #[derive(Serialize)]
    struct Execution {
        result: String,
        success: bool,
    }
    let Told { status, func_return } = serde_json::from_slice(&result).expect("a result is JSON of ours");
    let execution = Execution { result: func_return, success: status == "success" };
    serde_json::to_vec(&execution).expect("it is two values").into()
}
