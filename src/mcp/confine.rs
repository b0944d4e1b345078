//! The process that becomes a child: it gives up what the command shall not have, and then is the command.
//!
//! A process of its own, so that everything here is done by ordinary code before an ordinary `exec`, and not between a
//! fork and its exec, where hardly anything may be done. Whoever cannot be confined as asked is not started.

use std::io::{self, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, setsid, umask};

use super::order::{Order, Report, line, read_line, receive_pipes};

/// How many files a command may open at first; it may raise that itself up to its limit. Some programs take time or
/// memory for each that they may open.
const USUAL_FILES: u64 = 1024;

/// Does what the order on standard input says; returns only if that is not possible, and has said so.
pub fn become_child() {
    leave_files_behind();
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let Ok(keeper) = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from) else { return };
    let report = match enter(&keeper) {
        Ok(refused) => Report::Failed(refused.raw_os_error().unwrap_or(Errno::INVAL.raw_os_error())),
        Err(error) if error.get_ref().is_some_and(|inner| inner.is::<NoLandlock>()) => Report::Unconfined,
        Err(error) => Report::Unprepared(error.to_string()),
    };
    if let Ok(report) = line(&report) {
        let _ = (&keeper).write_all(&report);
    }
}

/// Whoever started Portolan may have left files open in it; the command is not to have them. Before this process hides
/// itself, which hides the list from it, too.
#[expect(unsafe_code, reason = "files that are known by their numbers alone")]
fn leave_files_behind() {
    let listed = std::fs::read_dir("/dev/fd").into_iter().flatten().flatten();
    let listed: Vec<i32> = listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let all = if listed.is_empty() { (3..USUAL_FILES as i32).collect() } else { listed };
    for number in all.into_iter().filter(|number| *number > 2) {
        // SAFETY: the number is used for this one call, in a process of one thread, and a number of no file is an error.
        let file = unsafe { BorrowedFd::borrow_raw(number) };
        let _ = fcntl_setfd(file, FdFlags::CLOEXEC);
    }
}

/// Landlock is required, and the kernel has none.
#[derive(Debug, thiserror::Error)]
#[error("this kernel has no Landlock")]
struct NoLandlock;

/// Becomes the command; returns what the system said if it would not have it.
fn enter(mut keeper: &UnixStream) -> io::Result<io::Error> {
    let [stdin, stdout, stderr] = receive_pipes(keeper)?;
    let order: Order = read_line(&mut BufReader::new(keeper))?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let level = confine(&order)?;
    keeper.write_all(&line(&Report::Confined(level))?)?;
    let mut command = Command::new(&order.program);
    command.args(&order.args).env_clear().envs(order.env.iter().map(|(name, value)| (name, value)));
    Ok(command.stdin(stdin).stdout(stdout).stderr(stderr).exec())
}

/// Gives up all that is not the command's; says what that is.
fn confine(order: &Order) -> io::Result<Vec<String>> {
    let mut level = vec!["session".to_owned(), "limits".to_owned()];
    setsid()?;
    umask(Mode::RWXG | Mode::RWXO);
    limit(order)?;
    give_up(order, &mut level)?;
    std::env::set_current_dir(&order.home)?;
    die_with_the_keeper()?;
    Ok(level)
}

fn limit(order: &Order) -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let most = |resource, most: u64| {
        let limit = getrlimit(resource);
        Some(limit.maximum.map_or(most, |maximum| maximum.min(most)))
    };
    let files = most(Resource::Nofile, order.max_files);
    setrlimit(Resource::Nofile, Rlimit { current: files.map(|files| files.min(USUAL_FILES)), maximum: files })?;
    if let Some(processes) = order.max_processes {
        let processes = most(Resource::Nproc, processes);
        setrlimit(Resource::Nproc, Rlimit { current: processes, maximum: processes })?;
    }
    Ok(())
}

/// Privileges, files, signals, in an order in which each step may still be made.
#[cfg(target_os = "linux")]
fn give_up(order: &Order, level: &mut Vec<String>) -> io::Result<()> {
    use super::reach;
    use rustix::process::{Gid, Uid};
    use rustix::thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
        set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    };
    // Paths are looked up with the rights that there still are.
    let fence = order.reach.as_ref().map(|reach| reach::fence(order, reach)).transpose()?;
    // Root gets back what is in this set with its next exec. The kernel says which it knows.
    for capability in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << capability);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // No such capability, or no right to take it away: then it is no root that needs it.
            Err(_) => break,
        }
    }
    if let Some(user) = order.user {
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        level.push("user".to_owned());
    }
    set_no_new_privs(true)?;
    level.push("no_new_privs".to_owned());
    // Kernels before 4.3 know no ambient set.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    level.push("capabilities".to_owned());
    match fence.flatten().map(reach::Fence::close).transpose()?.flatten() {
        Some(kept) => level.extend(kept),
        None if order.reach.as_ref().is_some_and(|reach| reach.required) => return Err(io::Error::other(NoLandlock)),
        None => {}
    }
    Ok(())
}

/// Asks the kernel to kill the child with its keeper. A change of user forgets that, so it comes after.
#[cfg(target_os = "linux")]
fn die_with_the_keeper() -> io::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    let keeper = getppid();
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before it was asked for; the socket then ends, and its end is the next thing that is tried.
    if getppid() == keeper { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
}

// Elsewhere there is less to give up, and nobody to ask.

#[cfg(not(target_os = "linux"))]
fn give_up(_: &Order, _: &mut Vec<String>) -> io::Result<()> {
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn die_with_the_keeper() -> io::Result<()> {
    Ok(())
}
