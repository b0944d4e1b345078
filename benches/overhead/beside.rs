//! Those who come in beside normal traffic and are of no use to it, as a process of their own: this program, run again.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Clients that send a byte of a header each second; every fourth has asked for much before, and reads nothing of it.
pub(crate) const SLOW: usize = 4_000;
/// Callers of a tool that never answers; whoever is turned away comes again after a second.
pub(crate) const WAITERS: usize = 500;

/// A second: between two bytes, and between two tries.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(crate) enum Kind {
    Slow,
    /// The path they all post to.
    Waiting(String),
}

impl Kind {
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Slow => format!("{SLOW} slow clients"),
            Self::Waiting(_) => format!("{WAITERS} waiting for a hung server"),
        }
    }
}

pub(crate) struct Others {
    process: Child,
}

impl Others {
    /// Returns when each of them has connected once.
    pub(crate) async fn come(kind: &Kind, address: SocketAddr) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
        command.args(["beside", &address.to_string()]);
        if let Kind::Waiting(path) = kind {
            command.arg(path);
        }
        let mut process = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("it can be run again");
        let mut lines = BufReader::new(process.stdout.take().expect("a pipe was asked for")).lines();
        let line = lines.next_line().await.expect("it can be read");
        assert_eq!(line.as_deref(), Some("here"), "they could not connect");
        Self { process }
    }

    /// Ends their connections all at once, and gives Portolan the time to clear up after them.
    pub(crate) async fn leave(mut self) {
        self.process.kill().await.expect("it is ours");
        sleep(PAUSE).await;
    }
}

/// Does what the process was started for: `ADDRESS`, and the path for those who wait.
pub(crate) fn serve(arguments: &[String]) -> ! {
    let (address, path) = match arguments {
        [address] => (address, None),
        [address, path] => (address, Some(path.clone())),
        _ => panic!("an address, and perhaps a path"),
    };
    let address = address.parse().expect("an address and a port");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("threads can be had");
    runtime.block_on(async {
        let mut others = JoinSet::new();
        match path {
            None => {
                for number in 0..SLOW {
                    let stream = connect(address).await.expect("Portolan listens");
                    others.spawn(be_slow(address, stream, number));
                }
            }
            Some(path) => {
                for _ in 0..WAITERS {
                    let stream = connect(address).await.expect("Portolan listens");
                    others.spawn(wait(address, stream, path.clone()));
                }
            }
        }
        let mut stdout = std::io::stdout();
        writeln!(stdout, "here").and_then(|()| stdout.flush()).expect("the benchmark waits for it");
        others.join_next().await;
    });
    std::process::exit(1)
}

/// A small segment size keeps the system's buffers small, so that one who does not read holds up who writes.
async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    SockRef::from(&socket).set_tcp_mss(536)?;
    socket.connect(address).await
}

async fn be_slow(address: SocketAddr, first: TcpStream, number: usize) {
    let mut first = Some(first);
    // Not all in the same moment.
    sleep(PAUSE.mul_f64(number as f64 / SLOW as f64)).await;
    loop {
        let stream = match first.take() {
            Some(stream) => Ok(stream),
            None => connect(address).await,
        };
        if let Ok(mut stream) = stream {
            // Ends with an error when it is cut.
            let _ = drip(&mut stream, number.is_multiple_of(4)).await;
        }
        sleep(PAUSE).await;
    }
}

async fn drip(stream: &mut TcpStream, asks: bool) -> std::io::Result<()> {
    if asks {
        stream.write_all("GET /openapi.yaml HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(4).as_bytes()).await?;
    }
    stream.write_all(b"GET /v1/health HTTP/1.1\r\nhost: localhost\r\nx-slow: ").await?;
    loop {
        sleep(PAUSE).await;
        stream.write_all(b"a").await?;
    }
}

async fn wait(address: SocketAddr, first: TcpStream, path: String) {
    let mut first = Some(first);
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\
         connection: close\r\n\r\n{{}}"
    );
    loop {
        let stream = match first.take() {
            Some(stream) => Ok(stream),
            None => connect(address).await,
        };
        if let Ok(mut stream) = stream
            && stream.write_all(request.as_bytes()).await.is_ok()
        {
            // Whatever it is, there will be another try.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
        sleep(PAUSE).await;
    }
}
