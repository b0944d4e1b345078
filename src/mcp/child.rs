//! A child process of ours, as Portolan sees it: how it is started, what it gets, and its certain death.
//!
//! Between Portolan and the child stands its keeper, another process of this program: it starts the child, tells how that
//! went and how the child ended, and ends it with everything that it started. Whoever owns a child calls [`supervise`].

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf, pipe};
use tokio::process::{Child as Process, Command};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{self, Landlock};
use crate::model::{Connector, Secret, Stdio as Config};
use crate::secrets::scrub;

use super::Error;
use super::commands::{Commands, TemplatesError};
use super::homes::{self, Folders, Homes, Residence};
use super::keeper::children_of;
use super::order::{self, END, KEEP, Named, Order, Reach, Report, TERMINATE, User};
use super::template::FilledStdio;
use super::users::{UserError, find_user, may_pass};

/// What a child gets of Portolan's own environment; the rest comes from its configuration.
const INHERITED: [&str; 4] = ["PATH", "LANG", "LC_ALL", "TZ"];
/// How long a child has to leave after its standard input closed, and again after SIGTERM (MCP 2025-11-25, lifecycle,
/// shutdown); then it is killed with all that it started.
const GRACE: Duration = Duration::from_secs(2);
/// How long that may take the keeper, which gives itself 5 s.
const KILL_TIMEOUT: Duration = Duration::from_secs(6);
/// How often what a keeper left behind is killed, until nobody is left.
const ROUNDS: usize = 1_000;
/// How much of standard error is kept, in bytes, and how much of its last line an error shows, in characters.
const STDERR_KEPT: usize = 64 * 1024;
const STDERR_SHOWN: usize = 300;

/// All children of this Portolan, and what each of them gets. Clones share everything.
#[derive(Clone)]
pub struct Children(Arc<Shared>);

struct Shared {
    settings: config::Children,
    commands: Commands,
    homes: Homes,
    user: Option<User>,
    wrapper: Vec<String>,
    reach: Option<Reach>,
    /// Processes of ours that run: every other child of this process was left by a keeper that is gone.
    keepers: Mutex<HashSet<u32>>,
    /// How the last child of each server was confined.
    levels: Mutex<HashMap<String, Arc<[String]>>>,
}

/// Why no children can be had as the settings ask for them.
#[derive(Debug, thiserror::Error)]
pub enum ChildrenError {
    #[error(transparent)]
    Templates(#[from] TemplatesError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("Cannot make the folder for the private folders of commands: {0}.")]
    Folder(io::Error),
    #[error(
        "The user of --child-user cannot pass the folders above those of commands, as the data folder is closed to others; \
         name another one with --child-dir."
    )]
    Closed,
}

/// A child that was started, and its pipes.
pub struct Child {
    pub stdin: pipe::Sender,
    pub stdout: pipe::Receiver,
    pub stderr: pipe::Receiver,
    pub kept: Kept,
}

/// A child's keeper. Its drop ends the child, and sees to it that the end comes.
pub struct Kept {
    keeping: Option<Keeping>,
    children: Children,
}

struct Keeping {
    keeper: Process,
    reports: Lines<BufReader<OwnedReadHalf>>,
    words: OwnedWriteHalf,
    // Given up in this order: nobody lives in the folders when they are.
    _known: Known,
    _residence: Residence,
}

impl Drop for Kept {
    /// A start that failed, or that nobody waits for any more, has an end too. Without a runtime there is nobody to see it.
    fn drop(&mut self) {
        let Some(mut keeping) = self.keeping.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let children = self.children.clone();
        let ending = async move {
            let _ = keeping.words.write_all(&[END]).await;
            let ended = timeout(KILL_TIMEOUT, async {
                loop {
                    match next(&mut keeping.reports).await {
                        Ok(Report::Ended(_, all)) => break all,
                        Ok(_) => {}
                        Err(_) => break false,
                    }
                }
            });
            let all = ended.await.unwrap_or(false);
            keeping.end(&children, all).await;
        };
        self.children.0.homes.tracker().spawn_on(ending, &runtime);
    }
}

impl Keeping {
    /// Waits for the keeper, and kills what it left behind unless it saw the end of all.
    async fn end(mut self, children: &Children, all: bool) {
        if timeout(KILL_TIMEOUT, self.keeper.wait()).await.is_err() {
            let _ = self.keeper.start_kill();
        }
        if !all {
            let children = children.clone();
            let _ = tokio::task::spawn_blocking(move || children.sweep()).await;
        }
    }
}

/// A keeper that is known to be one.
struct Known(Children, u32);

impl Drop for Known {
    fn drop(&mut self) {
        self.0.keepers().remove(&self.1);
    }
}

impl Children {
    /// `folder` is where the private folders go without `--child-dir`; `own` are files and folders that no child may
    /// ever reach. Work in the background goes on `tracker`.
    ///
    /// # Errors
    /// One sentence for the person who starts Portolan.
    pub fn new(
        settings: config::Children,
        folder: PathBuf,
        mut own: Vec<PathBuf>,
        tracker: TaskTracker,
    ) -> Result<Self, ChildrenError> {
        let commands = Commands::read(&settings)?;
        let user = settings.child_user.as_deref().map(find_user).transpose()?;
        let folder = settings.child_dir.clone().unwrap_or(folder);
        homes::make(&folder, user).map_err(ChildrenError::Folder)?;
        let folder = folder.canonicalize().map_err(ChildrenError::Folder)?;
        if let Some(user) = user
            && !folder.ancestors().all(|above| may_pass(user, above))
        {
            return Err(ChildrenError::Closed);
        }
        let wrapper: Vec<String> =
            settings.child_wrapper.iter().flat_map(|wrapper| wrapper.split_whitespace()).map(str::to_owned).collect();
        own.push(folder.clone());
        own.extend(settings.stdio_templates.clone());
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let own = own.into_iter().map(absolute).collect();
        let is_asked_for = match settings.child_landlock {
            Landlock::Required => true,
            // Landlock takes away the right to mount, which is what such commands do.
            Landlock::BestEffort => wrapper.is_empty(),
            Landlock::Off => false,
        };
        let reach = is_asked_for.then(|| Reach {
            required: settings.child_landlock == Landlock::Required,
            own,
            homes: homes_of_users(),
            allowed: settings.child_paths.clone(),
        });
        let (homes, keepers, levels) = (Homes::new(folder, tracker), Mutex::default(), Mutex::default());
        Ok(Self(Arc::new(Shared { settings, commands, homes, user, wrapper, reach, keepers, levels })))
    }

    /// Whether the policy allows such a server.
    ///
    /// # Errors
    /// [`Error::StdioOff`], [`Error::NoTemplate`].
    pub fn check(&self, connector: &Connector) -> Result<(), Error> {
        self.0.commands.check(connector)
    }

    /// Whether the policy may allow it once its variables have values.
    ///
    /// # Errors
    /// Those of [`Children::check`].
    pub fn check_unfilled(&self, connector: &Connector) -> Result<(), Error> {
        self.0.commands.check_unfilled(connector)
    }

    /// How the last child of this server was confined; `None` when none was started.
    pub fn level(&self, server_id: &str) -> Option<Arc<[String]>> {
        self.0.levels.lock().expect("no code panics while it holds the levels").get(server_id).cloned()
    }

    /// Forgets a server that was deleted, and removes its folders. May take a while.
    pub fn forget(&self, server_id: &str) {
        self.0.levels.lock().expect("no code panics while it holds the levels").remove(server_id);
        self.0.homes.remove(server_id);
    }

    /// The folders that there are.
    pub fn folders(&self) -> Folders {
        self.0.homes.folders()
    }

    /// Removes folders whose servers are gone; whether they are is to be asked after [`Children::folders`]. May take a while.
    pub fn remove_folders(&self, gone: impl Iterator<Item = String>) {
        self.0.homes.clear_all(gone);
    }

    fn keepers(&self) -> std::sync::MutexGuard<'_, HashSet<u32>> {
        self.0.keepers.lock().expect("no code panics while it holds the keepers")
    }

    /// Starts the command of a server by `deadline`.
    ///
    /// # Errors
    /// [`Error::Spawn`], [`Error::Unconfined`], and those of [`Children::check`].
    pub async fn start(
        &self,
        server_id: &str,
        command: FilledStdio<'_>,
        split_args: bool,
        deadline: Instant,
    ) -> Result<Child, Error> {
        self.check(&command.filled.connector)?;
        let cannot = |error: io::Error| Error::Spawn(error.kind());
        let residence = self.0.homes.enter(server_id);
        let order = self.order(command, split_args, &residence);
        let order = order::line(&order).map_err(cannot)?;
        let (stdin, ours_in) = io::pipe().map_err(cannot)?;
        let (ours_out, stdout) = io::pipe().map_err(cannot)?;
        let (ours_err, stderr) = io::pipe().map_err(cannot)?;
        let (control, theirs) = UnixStream::pair().map_err(cannot)?;
        order::send_pipes(&control, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]).map_err(cannot)?;
        // The child alone holds its ends, so that the end of one is seen.
        drop((stdin, stdout, stderr));
        let (keeper, known) = self.spawn(theirs).map_err(|error| {
            tracing::error!(%error, "the keeper of a command cannot be started");
            Error::Spawn(io::ErrorKind::Other)
        })?;
        control.set_nonblocking(true).map_err(cannot)?;
        let (reports, words) = tokio::net::UnixStream::from_std(control).map_err(cannot)?.into_split();
        let reports = BufReader::new(reports).lines();
        let keeping = Keeping { keeper, reports, words, _known: known, _residence: residence };
        let mut kept = Kept { keeping: Some(keeping), children: self.clone() };
        let Some(Keeping { reports, words, .. }) = &mut kept.keeping else { unreachable!("it was just made") };
        let starting = async {
            words.write_all(&order).await?;
            let mut level = Vec::new();
            loop {
                match next(reports).await? {
                    Report::Confined(how) => level = how,
                    Report::Started => return Ok(Ok(level)),
                    Report::Failed(errno) => return Err(io::Error::from_raw_os_error(errno)),
                    Report::Unconfined => return Ok(Err(Error::Unconfined)),
                    Report::Unprepared(reason) => return Err(io::Error::other(reason)),
                    Report::Ended(..) => return Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
        };
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let started = timeout_at(deadline, starting).await.map_err(late).flatten();
        // What the system says of a command has a number; the rest is about Portolan, and for its administrator.
        if let Err(error) = &started
            && error.raw_os_error().is_none()
            && error.kind() != io::ErrorKind::TimedOut
        {
            tracing::error!(server.id = server_id, %error, "a command cannot be started as it should");
        }
        let mut level = started.map_err(cannot)??;
        if !self.0.wrapper.is_empty() {
            level.push("wrapper".to_owned());
        }
        let levels = &self.0.levels;
        levels.lock().expect("no code panics while it holds the levels").insert(server_id.to_owned(), level.into());
        Ok(Child {
            stdin: pipe::Sender::from_owned_fd(ours_in.into()).map_err(cannot)?,
            stdout: pipe::Receiver::from_owned_fd(ours_out.into()).map_err(cannot)?,
            stderr: pipe::Receiver::from_owned_fd(ours_err.into()).map_err(cannot)?,
            kept,
        })
    }

    /// Starts a keeper, in a group of its own: signals to ours pass it by.
    fn spawn(&self, control: UnixStream) -> io::Result<(Process, Known)> {
        let mut command = Command::new(&self.0.settings.program);
        command.arg0("portolan").arg(KEEP).env_clear().process_group(0);
        command.stdin(std::os::fd::OwnedFd::from(control)).stdout(Stdio::null()).stderr(Stdio::null());
        // Held from before it exists until it is known, or it might be taken for one that was left.
        let mut keepers = self.keepers();
        let keeper = command.spawn()?;
        let id = keeper.id().ok_or(io::ErrorKind::NotFound)?;
        keepers.insert(id);
        drop(keepers);
        Ok((keeper, Known(self.clone(), id)))
    }

    fn order(&self, command: FilledStdio<'_>, split_args: bool, residence: &Residence) -> Order {
        let FilledStdio { config, filled } = command;
        let Shared { settings, user, wrapper, reach, .. } = &*self.0;
        let line = |config: &Config| {
            let mut line = wrapper.clone();
            line.push(config.command.clone());
            for (number, arg) in config.args.iter().enumerate() {
                // A value must not become several arguments, nor none.
                if split_args && !filled.was_templated(number) {
                    line.extend(arg.split_whitespace().map(str::to_owned));
                } else {
                    line.push(arg.clone());
                }
            }
            let program = line.remove(0);
            (program, line)
        };
        let (program, args) = line(config);
        let (home, tmp) = (residence.home(), residence.tmp());
        let inherited = INHERITED.into_iter().filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
        let private = [("HOME", &home), ("TMPDIR", &tmp)];
        let private = private.into_iter().map(|(name, path)| (name.to_owned(), path.to_string_lossy().into_owned()));
        let rest: BTreeMap<_, _> = inherited.chain(private).collect();
        let env = |config: &Config| {
            let own = config.env.iter().flatten().map(|(name, value)| (name.clone(), value.expose().to_owned()));
            let env: BTreeMap<_, _> = rest.clone().into_iter().chain(own).collect();
            env.into_iter().collect()
        };
        let named = filled.named.as_ref().map(|config| Named { args: line(config).1, env: env(config) });
        Order {
            server_id: residence.server_id.clone(),
            program,
            args,
            env: env(config),
            home,
            tmp,
            alone: residence.alone,
            wrapper_args: wrapper.len().saturating_sub(1),
            user: *user,
            max_files: settings.child_max_files,
            max_processes: settings.child_max_processes,
            reach: reach.clone(),
            named,
        }
    }

    /// Takes note of the end of children that are no keepers, which nobody else waits for. Takes a moment.
    pub fn reap_orphans(&self) {
        // Held all the while: the number of one that has gone may be given to a new keeper.
        let keepers = self.keepers();
        for pid in children_of(std::process::id()).into_iter().filter(|pid| !keepers.contains(pid)) {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = waitpid(Some(pid), WaitOptions::NOHANG);
            }
        }
    }

    /// Kills what a keeper left behind that was itself killed: with the death of the keeper it became Portolan's. Only
    /// where Portolan is the one that orphans go to, and so knows all its children. Takes a moment.
    fn sweep(&self) {
        #[cfg(target_os = "linux")]
        if !rustix::process::child_subreaper().is_ok_and(|reaper| reaper.is_some()) {
            return;
        }
        for _ in 0..ROUNDS {
            let left: Vec<_> = {
                let keepers = self.keepers();
                children_of(std::process::id()).into_iter().filter(|pid| !keepers.contains(pid)).collect()
            };
            if left.is_empty() {
                return;
            }
            for pid in left.into_iter().filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
                let _ = kill_process(pid, Signal::KILL);
                let _ = waitpid(Some(pid), WaitOptions::NOHANG);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        tracing::error!("processes that a command left behind cannot be killed");
    }
}

async fn next(reports: &mut Lines<BufReader<OwnedReadHalf>>) -> io::Result<Report> {
    let line = reports.next_line().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(serde_json::from_str(&line)?)
}

/// The homes of this host's users.
fn homes_of_users() -> Vec<PathBuf> {
    let others = std::fs::read_dir("/home").into_iter().flatten().flatten().map(|entry| entry.path());
    let ours = std::env::home_dir().into_iter().filter(|home| home.is_absolute());
    others.chain(ours).chain([PathBuf::from("/root")]).collect()
}

/// Waits for the end of the child, or brings it about. `ended` is told how it ended when nobody is left of it; what it
/// kept may still be tidied up then. `children` are those that it is one of.
pub async fn supervise(
    mut kept: Kept,
    children: &Children,
    end: &CancellationToken,
    ended: impl AsyncFnOnce(Option<ExitStatus>),
) {
    let mut keeping = kept.keeping.take().expect("it is supervised once");
    let (reports, words) = (&mut keeping.reports, &mut keeping.words);
    let mut report = tokio::select! {
        report = next(reports) => Some(report),
        () = end.cancelled() => None,
    };
    if report.is_none() {
        // The transport has closed standard input by now, which asks a server to leave.
        report = timeout(GRACE, next(reports)).await.ok();
    }
    if report.is_none() {
        // A keeper that is gone is seen by what it reports no more, here and below.
        let _ = words.write_all(&[TERMINATE]).await;
        report = timeout(GRACE, next(reports)).await.ok();
    }
    if report.is_none() {
        let _ = words.write_all(&[END]).await;
        report = timeout(KILL_TIMEOUT, next(reports)).await.ok();
    }
    let (status, all) = match report {
        Some(Ok(Report::Ended(status, all))) => (status.map(ExitStatus::from_raw), all),
        _ => {
            tracing::error!("the keeper of a command was lost");
            let _ = keeping.keeper.start_kill();
            (None, false)
        }
    };
    if all {
        ended(status).await;
        keeping.end(children, all).await;
    } else {
        keeping.end(children, all).await;
        ended(status).await;
    }
}

/// The last bytes of a child's standard error.
#[derive(Default)]
pub struct Stderr {
    kept: VecDeque<u8>,
    /// Something came before that.
    cut: bool,
}

impl Stderr {
    pub fn push(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        let excess = self.kept.len().saturating_sub(STDERR_KEPT);
        self.kept.drain(..excess);
        self.cut |= excess > 0;
    }

    /// The last line, escaped, without the secrets that the server was given.
    pub fn last_line(&self, secrets: &[Secret]) -> Option<String> {
        let bytes: Vec<u8> = self.kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
        // A line whose beginning is gone may begin within a secret, which is then not found.
        if self.cut && text.trim() == line {
            return None;
        }
        let line = scrub(line, secrets);
        Some(line.chars().take(STDERR_SHOWN).flat_map(char::escape_debug).collect())
    }
}
