//! `portolan healthcheck`: asks the Portolan of this machine how it is, and ends with a status that says it. Made for
//! containers without a shell: it opens neither the database nor keys nor tokens.
//!
//! Where it asks is what the operator says, as a rule this machine, so it does not go through `egress`, which is about what
//! clients and servers say.

use std::error::Error;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use url::Url;

use crate::config::Healthcheck;

use super::{Document, Failure, say, value};

/// How long all of it may take: whoever runs a check gives it some seconds, and says nothing of one that was cut off.
const TIMEOUT: Duration = Duration::from_secs(3);
/// More than that is no answer of Portolan's, in bytes.
const MAX_ANSWER: usize = 64 * 1024;

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    url: String,
    /// HTTP status; `None` without an answer.
    status: Option<u16>,
}

/// Asks `/v1/health`, or `/v1/ready` if that is wanted, of `wanted.url`, or else of the Portolan of this machine that was
/// started with this `--listen`.
///
/// # Errors
/// One sentence: it does not answer within three seconds, or not as it should.
pub async fn run(listen: &str, wanted: &Healthcheck, as_json: bool) -> Result<(), Failure> {
    let path = if wanted.ready { "/v1/ready" } else { "/v1/health" };
    // Portolan takes `localhost` whatever names it is reached by; others it may not know.
    let (place, host) = match &wanted.url {
        Some(url) => (authority(url), authority(url)),
        None => (listen.to_owned(), "localhost".to_owned()),
    };
    let mut report = Report { url: format!("http://{place}{path}"), status: None };
    let answer = timeout(TIMEOUT, ask(&place, &host, path)).await;
    let problem = match answer {
        Err(_) => Some(format!("Portolan did not answer within {} s at {}.", TIMEOUT.as_secs(), report.url)),
        Ok(Err(reason)) => Some(format!("Portolan does not answer at {}: {reason}.", report.url)),
        Ok(Ok((status, body))) => {
            report.status = Some(status.as_u16());
            let says = |name: &str| body.get(name).and_then(Value::as_str);
            match (status, says("status"), says("code")) {
                (StatusCode::OK, Some("ok"), _) => None,
                (StatusCode::OK, ..) => Some(format!("What answers at {} is no Portolan.", report.url)),
                (_, _, Some("unavailable")) => Some("Portolan is not ready: its database does not answer.".to_owned()),
                _ => Some(format!("Portolan is not well: it answered {status} at {}.", report.url)),
            }
        }
    };
    if let Some(problem) = problem {
        return Err(Failure::from(problem).with(&report));
    }
    match as_json {
        true => say(Document(value(&report))),
        false => say(format_args!("Portolan is well at {}.", report.url)),
    }
    Ok(())
}

/// Host and port.
fn authority(url: &Url) -> String {
    format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default())
}

/// The status of the answer, and its body, which is null when it is no JSON.
async fn ask(place: &str, host: &str, path: &str) -> Result<(StatusCode, Value), Box<dyn Error + Send + Sync>> {
    let addresses: Vec<_> = lookup_host(place).await?.flat_map(reached).collect();
    if addresses.iter().any(|address| address.port() == 0) {
        return Err("port 0 is any port, so name the one it took with --url".into());
    }
    let stream = TcpStream::connect(&*addresses).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header(HOST, host).body(Empty::<Bytes>::new())?;
    let asking = async move {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
    };
    // The connection ends with its last sender.
    tokio::join!(asking, connection).0
}

/// Where one is reached that listens on an address: on all of them means on loopback, too.
fn reached(address: SocketAddr) -> Vec<SocketAddr> {
    let port = address.port();
    let (four, six) = ((Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into());
    match address {
        SocketAddr::V4(address) if address.ip().is_unspecified() => vec![four],
        SocketAddr::V6(address) if address.ip().is_unspecified() => vec![six, four],
        address => vec![address],
    }
}
