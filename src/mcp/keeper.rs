//! The keeper of one child: a process of this same program between Portolan and the child, which ends the child and
//! everything that it started, also what left its group or its session, and also when Portolan was killed with -9.
//!
//! It makes itself the subreaper: whatever below it loses its parent becomes its own child, so that nothing gets away. The
//! end of its socket is the end of Portolan. Signals that ask it to go are meant for Portolan, whose end is its own.

use std::io::{self, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, kill_process_group, wait};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream as UnixSocket;
use tokio::net::unix::OwnedReadHalf;
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::time::{Instant, sleep};

use super::homes;
use super::order::{self, BECOME, Order, Pipes, Report, TERMINATE, line};

/// How long the end of everything may take; what cannot be killed by then hangs in the kernel.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// How long after a round of kills the next one comes.
const ROUND: Duration = Duration::from_millis(2);
/// How long the process that becomes the child may take to read its order.
const ORDER_TIMEOUT: Duration = Duration::from_secs(10);

/// This program, as the process that runs it sees it.
#[cfg(target_os = "linux")]
pub fn own_program() -> io::Result<std::path::PathBuf> {
    Ok("/proc/self/exe".into())
}

#[cfg(not(target_os = "linux"))]
pub fn own_program() -> io::Result<std::path::PathBuf> {
    std::env::current_exe()
}

/// What the keeper does. Its standard input is the socket to Portolan; nobody reads what it would say of its own failure.
pub fn keep_child() {
    guard();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let _told = runtime.and_then(|runtime| runtime.block_on(keep()));
}

/// Nobody of the same user looks into this process, and orphans below become its children.
fn guard() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, getpid, set_child_subreaper, set_dumpable_behavior};
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
        let _ = set_child_subreaper(Some(getpid()));
    }
}

async fn keep() -> io::Result<()> {
    let deaf = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let mut somebody_left = signal(SignalKind::child())?;
    let portolan = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let pipes = order::receive_pipes(&portolan)?;
    let order: Option<Order> = order::read_line(&mut BufReader::new(&portolan))?;
    // Nothing was sent after the order, so nothing was read ahead.
    let Some(order) = order else { return Ok(()) };
    portolan.set_nonblocking(true)?;
    let (mut from, mut to) = UnixSocket::from_std(portolan)?.into_split();
    let begun = homes::prepare(&order).and_then(|()| begin(&order, pipes));
    let tmp = order.tmp.clone();
    drop(order);
    let report = match begun {
        Err(error) => Report::Unprepared(error.to_string()),
        Ok((child, told)) => match started(told, &mut from).await {
            Err(report) => {
                end_all(child, None).await;
                report
            }
            Ok(level) => {
                let mut started = line(&Report::Confined(level))?;
                started.extend(line(&Report::Started)?);
                // Without a Portolan that reads it, the next thing from there is the end.
                let _ = to.write_all(&started).await;
                let status = ended(child, &mut from, &mut somebody_left).await;
                let (status, all) = end_all(child, status).await;
                Report::Ended(status.map(WaitStatus::as_raw), all)
            }
        },
    };
    let _ = to.write_all(&line(&report)?).await;
    // Told first: it may hold many files.
    let _ = homes::remove(&tmp);
    drop(deaf);
    Ok(())
}

/// Waits until the command runs; how it is confined, or why it does not run.
async fn started(told: UnixSocket, portolan: &mut OwnedReadHalf) -> Result<Vec<String>, Report> {
    let mut told = tokio::io::BufReader::new(told).lines();
    let mut level = None;
    let unprepared = |reason: &str| Err(Report::Unprepared(reason.to_owned()));
    loop {
        let line = tokio::select! {
            // It has nothing to say yet.
            _ = portolan.read_u8() => return unprepared("nobody waits for it any more"),
            line = told.next_line() => line,
        };
        match (line.map(|line| line.map(|line| serde_json::from_str(&line))), level) {
            (Ok(Some(Ok(Report::Confined(how)))), _) => level = Some(how),
            (Ok(Some(Ok(report))), _) => return Err(report),
            // The socket closed by itself with the start of the command.
            (Ok(None), Some(level)) => return Ok(level),
            _ => return unprepared("it ended before it was the command"),
        }
    }
}

/// Waits until the child has left, and says how, or until it is to go.
async fn ended(child: Pid, portolan: &mut OwnedReadHalf, somebody_left: &mut SignalStream) -> Option<WaitStatus> {
    loop {
        tokio::select! {
            _ = somebody_left.recv() => if let Some(status) = reap(child) {
                return Some(status);
            },
            word = portolan.read_u8() => match word {
                // Fails only when nobody of the group is left.
                Ok(TERMINATE) => drop(kill_process_group(child, Signal::TERM)),
                _ => return None,
            },
        }
    }
}

/// Starts the process that becomes the child, and gives it its order and its pipes, of which no copy stays here.
fn begin(order: &Order, pipes: Pipes<std::os::fd::OwnedFd>) -> io::Result<(Pid, UnixSocket)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(own_program()?);
    command.arg0("portolan").arg(BECOME).env_clear();
    let child =
        command.stdin(std::os::fd::OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    drop(command);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id is a positive i32");
    order::send_pipes(&ours, pipes.each_ref().map(AsFd::as_fd))?;
    drop(pipes);
    ours.set_write_timeout(Some(ORDER_TIMEOUT))?;
    (&ours).write_all(&line(order)?)?;
    ours.set_nonblocking(true)?;
    Ok((pid, UnixSocket::from_std(ours)?))
}

/// Takes note of everybody who has left; returns how the child did, if it is among them.
fn reap(child: Pid) -> Option<WaitStatus> {
    let mut status = None;
    while let Ok(Some((pid, how))) = wait(WaitOptions::NOHANG) {
        if pid == child {
            status = Some(how);
        }
    }
    status
}

/// Kills the child and all below this process until nobody is left: those that were started meanwhile, too. Returns how
/// the child ended, and whether all are gone.
async fn end_all(child: Pid, mut status: Option<WaitStatus>) -> (Option<WaitStatus>, bool) {
    let deadline = Instant::now() + END_TIMEOUT;
    if status.is_none() {
        let _ = kill_process_group(child, Signal::KILL);
        let _ = kill_process(child, Signal::KILL);
    }
    loop {
        status = status.or(reap(child));
        let left = below(std::process::id());
        // Without a list of them, the group and the child itself are all that can be reached.
        let all = left.is_empty() && status.is_some();
        if all || Instant::now() > deadline {
            // The leader may be gone and its group not. Its number may be another's by now, so only where nothing else tells.
            if cfg!(not(target_os = "linux")) {
                let _ = kill_process_group(child, Signal::KILL);
            }
            return (status, all);
        }
        for pid in left {
            let _ = kill_process(pid, Signal::KILL);
        }
        sleep(ROUND).await;
    }
}

/// All processes below a process, those that nobody has taken note of included.
pub fn below(process: u32) -> Vec<Pid> {
    let mut found = Vec::new();
    let mut next = vec![process];
    while let Some(parent) = next.pop() {
        for child in children_of(parent) {
            found.extend(i32::try_from(child).ok().and_then(Pid::from_raw));
            next.push(child);
        }
    }
    found
}

/// The children of a process as Linux lists them, thread by thread; nobody where there is no such list.
pub fn children_of(process: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    let lists = threads.flatten().filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}
