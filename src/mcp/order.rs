//! What is told of a child between Portolan, the child's keeper, and the process that becomes the child: one line of
//! JSON over a socket, never a command line or an environment, which others could read. The pipes go before it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The hidden commands of this program: the keeper of one child, and the process that becomes the child.
pub const KEEP: &str = "keep-child";
pub const BECOME: &str = "become-child";

/// A child that is to be started. Holds secrets in clear: the values of `env` and, it may be, of `args`.
#[derive(Serialize, Deserialize)]
pub struct Order {
    pub server_id: String,
    pub program: String,
    pub args: Vec<String>,
    /// All of its environment.
    pub env: Vec<(String, String)>,
    /// Its private folders: one that lasts, and one that goes with it.
    pub home: PathBuf,
    pub tmp: PathBuf,
    /// No other child of the same server is known: what is left of earlier ones may go.
    pub alone: bool,
    /// How many of the arguments are the wrapper's, and no configuration's.
    pub wrapper_args: usize,
    pub user: Option<User>,
    pub max_files: u64,
    pub max_processes: Option<u64>,
    /// `None` when Landlock is not asked for.
    pub reach: Option<Reach>,
    /// What of this names files that it may reach, where that is less than all: values that came with a request do not.
    pub named: Option<Named>,
}

/// Arguments and environment as their configuration has them.
#[derive(Serialize, Deserialize)]
pub struct Named {
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
}

impl Order {
    /// The arguments and the environment that name files.
    pub fn naming(&self) -> (&[String], &[(String, String)]) {
        match &self.named {
            Some(named) => (&named.args, &named.env),
            None => (&self.args, &self.env),
        }
    }
}

/// A user and a group, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// Which files a child is kept from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reach {
    /// It is not to be started without.
    pub required: bool,
    /// Portolan's own: never, whatever is named.
    pub own: Vec<PathBuf>,
    /// What is in there only as far as it is named.
    pub homes: Vec<PathBuf>,
    /// What every child may use.
    pub allowed: Vec<PathBuf>,
}

/// How a start went, and how the child ended.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// It is confined so, and is about to become the command.
    Confined(Vec<String>),
    /// The command runs.
    Started,
    /// There will be no child: what the system said of the command (errno).
    Failed(i32),
    /// There will be no child: what went wrong before, for the log.
    Unprepared(String),
    /// There will be no child: the kernel has no Landlock, and it is required.
    Unconfined,
    /// It is gone; its status as `wait` gives it, and whether all that it started are gone, too.
    Ended(Option<i32>, bool),
}

/// Portolan's words to a keeper, one byte each. The end of the socket means [`END`], too.
pub const TERMINATE: u8 = b't';
pub const END: u8 = b'e';

/// A value as a line.
pub fn line(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Reads a line; `None` at the end.
pub fn read_line<T: DeserializeOwned>(from: &mut impl io::BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

/// Standard input, output and error of a child.
pub type Pipes<T> = [T; 3];

/// Hands pipes over; what is written next comes after them. Does not block on a new socket.
pub fn send_pipes(socket: &UnixStream, pipes: Pipes<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&pipes));
    sendmsg(socket, &[IoSlice::new(b"\n")], &mut control, SendFlags::empty())?;
    Ok(())
}

/// Takes what [`send_pipes`] sent; no process that is started inherits it by accident.
pub fn receive_pipes(socket: &UnixStream) -> io::Result<Pipes<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    #[cfg(target_os = "linux")]
    let flags = RecvFlags::CMSG_CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let flags = RecvFlags::empty();
    recvmsg(socket.as_fd(), &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let mut received: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(pipes) = message {
            received.extend(pipes);
        }
    }
    #[cfg(not(target_os = "linux"))]
    for pipe in &received {
        rustix::io::fcntl_setfd(pipe, rustix::io::FdFlags::CLOEXEC)?;
    }
    received.try_into().map_err(|_| io::ErrorKind::UnexpectedEof.into())
}
