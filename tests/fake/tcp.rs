//! Listeners that do not get as far as HTTP. Dropping one closes its port and its connections.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::anywhere;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Manner {
    /// Never accepts; its queue of connections is full.
    Full,
    /// Accepts, and says nothing.
    Silent,
    /// Accepts, and hangs up.
    Closed,
    /// Says something else than HTTP.
    Banner,
    /// Reads the request and hangs up.
    Ignored,
    /// Sends header fields without end, one byte at a time.
    DrippedHead,
    /// Sends header fields without end, as fast as they are taken.
    EndlessHead,
}

pub(crate) struct Listener {
    pub(crate) addr: SocketAddr,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Listens on any free port.
pub(crate) fn listen(manner: Manner) -> Listener {
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("threads can be had");
        runtime.block_on(stopped.run_until_cancelled_owned(async move {
            let socket = TcpSocket::new_v4().expect("sockets can be had");
            socket.bind(anywhere()).expect("a free port");
            let listener = socket.listen(if matches!(manner, Manner::Full) { 0 } else { 128 }).expect("it is bound");
            let addr = listener.local_addr().expect("it is bound");
            let mut held = Vec::new();
            if matches!(manner, Manner::Full) {
                // As many as the kernel takes.
                while let Ok(Ok(stream)) = timeout(Duration::from_millis(200), TcpStream::connect(addr)).await {
                    held.push(stream);
                }
                let _waited_for = tell.send(addr);
                std::future::pending::<()>().await;
            }
            let _waited_for = tell.send(addr);
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(treat(stream, manner));
            }
        }));
    });
    Listener { addr: told.recv().expect("it listens"), stop, thread: Some(thread) }
}

async fn treat(mut stream: TcpStream, manner: Manner) {
    let mut request = [0; 4096];
    let _hung_up = match manner {
        Manner::Full | Manner::Silent => std::future::pending().await,
        Manner::Closed => Ok(()),
        Manner::Banner => stream.write_all(b"220 mail.example.com ESMTP ready\r\n").await,
        Manner::Ignored => stream.read(&mut request).await.map(drop),
        Manner::DrippedHead => {
            let _hung_up = stream.write_all(b"HTTP/1.1 200 OK\r\nx-slow: ").await;
            while stream.write_all(b"y").await.is_ok() {
                sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        }
        Manner::EndlessHead => {
            let _hung_up = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
            while stream.write_all(b"x-more: yes\r\n").await.is_ok() {}
            Ok(())
        }
    };
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
