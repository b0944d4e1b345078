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
use tokio::signal::unix::{SignalKind, signal};
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
    let (mut from, mut to) = tokio::net::UnixStream::from_std(portolan)?.into_split();
    let begun = homes::prepare(&order).and_then(|()| begin(&order, pipes));
    let tmp = order.tmp.clone();
    drop(order);
    let (child, told) = match begun {
        Ok(begun) => begun,
        Err(error) => return to.write_all(&line(&Report::Unprepared(error.to_string()))?).await,
    };
    let mut told = tokio::io::BufReader::new(told).lines();
    let mut level = None;
    let failed = loop {
        tokio::select! {
            _ = from.read_u8() => {
                end_all(child, None).await;
                return Ok(());
            }
            line = told.next_line() => match line?.map(|line| serde_json::from_str(&line)).transpose()? {
                Some(report @ Report::Confined(_)) => level = Some(report),
                Some(report) => break Some(report),
                // The socket closed by itself with the start of the command.
                None if level.is_some() => break None,
                None => break Some(Report::Unprepared("it ended before it was the command".to_owned())),
            },
        }
    };
    drop(told);
    if let Some(failed) = failed {
        end_all(child, None).await;
        return to.write_all(&line(&failed)?).await;
    }
    let mut started = line(&level)?;
    started.extend(line(&Report::Started)?);
    to.write_all(&started).await?;
    let mut status = None;
    while status.is_none() {
        tokio::select! {
            _ = somebody_left.recv() => status = reap(child),
            word = from.read_u8() => match word {
                // Fails only when nobody of the group is left.
                Ok(TERMINATE) => drop(kill_process_group(child, Signal::TERM)),
                _ => break,
            },
        }
    }
    let (status, all) = end_all(child, status).await;
    let _ = homes::remove(&tmp);
    drop(deaf);
    to.write_all(&line(&Report::Ended(status.map(WaitStatus::as_raw), all))?).await
}

/// Starts the process that becomes the child, and gives it its order and its pipes, of which no copy stays here.
fn begin(order: &Order, pipes: Pipes<std::os::fd::OwnedFd>) -> io::Result<(Pid, tokio::net::UnixStream)> {
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
    Ok((pid, tokio::net::UnixStream::from_std(ours)?))
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
            // The leader may be gone and its group not.
            let _ = kill_process_group(child, Signal::KILL);
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
