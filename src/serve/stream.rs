//! The bytes of a connection: its socket, its requests' bodies and its answers' bodies, each of which tells the
//! connection whose turn it is.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::BoxError;
use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::Full;
use super::connections::Connection;

/// How much of what nobody wants is read at once.
const WASTE: usize = 16 * 1024;

/// The socket of a connection.
pub struct Stream {
    socket: TcpStream,
    connection: Arc<Connection>,
    /// The last bytes that came.
    tail: u32,
    lingers: bool,
}

impl Stream {
    pub fn new(socket: TcpStream, connection: Arc<Connection>) -> Self {
        Self { socket, connection, tail: 0, lingers: false }
    }

    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Ready(written) => self.connection.progress(*written.as_ref().unwrap_or(&0)),
            Poll::Pending => self.connection.stall(),
        }
        written
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        let came = &buf.filled()[before..];
        if came.is_empty() {
            self.connection.hang_up();
        } else {
            let last = &came[came.len().saturating_sub(4)..];
            let tail = last.iter().fold(self.tail, |tail, byte| tail << 8 | u32::from(*byte));
            // A line may end without a carriage return (RFC 9112, 2.2).
            self.connection.hear(tail.to_be_bytes().ends_with(b"\n\r\n") || tail.to_be_bytes().ends_with(b"\n\n"));
            self.tail = tail;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
        // hyper flushes only what it has written to the end.
        self.connection.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.lingers {
            ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
            self.lingers = self.connection.lingers();
        }
        let mut waste = [MaybeUninit::uninit(); WASTE];
        while self.lingers {
            let mut waste = ReadBuf::uninit(&mut waste);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut waste))?;
            self.lingers = !waste.filled().is_empty();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.connection.is_stalled() {
            // Its client reads nothing: the kernel need not keep the answer for it.
            let _ = self.socket.set_zero_linger();
        }
    }
}

/// The body of a request. Its end is the error [`Full`] if its client was waited for, and others took all places.
pub struct Arriving {
    body: Incoming,
    connection: Arc<Connection>,
}

impl Arriving {
    pub fn new(body: Incoming, connection: Arc<Connection>) -> Self {
        Self { body, connection }
    }
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        match &frame {
            Poll::Pending => self.connection.await_body(),
            Poll::Ready(Some(Err(_))) => self.connection.body_left(),
            Poll::Ready(Some(Ok(_))) if !self.body.is_end_stream() => self.connection.body_flows(),
            Poll::Ready(_) if !self.connection.body_ended() => return Poll::Ready(Some(Err(Full.into()))),
            Poll::Ready(_) => {}
        }
        frame.map_err(BoxError::from)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.connection.body_left();
    }
}

/// The body of an answer.
pub struct Answer {
    body: Body,
    connection: Arc<Connection>,
    /// Ends an event stream.
    stop: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Answer {
    pub fn new(body: Body, connection: Arc<Connection>, streams_events: bool) -> Self {
        let stop = streams_events.then(|| Box::pin(connection.stream_events()));
        Self { body, connection, stop }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.stop.as_mut().is_some_and(|stop| stop.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(None);
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.complete();
    }
}
