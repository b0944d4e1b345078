//! Letta's JSON, exactly: what a client sends becomes a model, a model becomes what a client reads (docs/CONTRACT.md).

mod answer;
mod events;
mod legacy;
mod logs;
mod mask;
mod request;

pub use answer::{ServerObject, ToolExecutionResult, ToolObject, tools_array};
pub use events::frame;
pub use legacy::{Configs, ServerConfig, execution, live_tools, trial};
pub use logs::{ChangesPage, RunsPage};
pub use mask::{masked_url, same_origin};
pub use request::{CreateServer, UpdateServer, approved_hash, run_arguments};
