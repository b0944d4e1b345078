//! Misbehaviour, step by step: what a script's acts put in the place of an answer.

use std::{
    io::{self, Write},
    os::unix::process::CommandExt,
    pin::Pin,
    process::{Command, exit},
    sync::Arc,
    time::Duration,
};

use ::http::{HeaderName, StatusCode, header};
use axum::{body::Bytes, response::Response};
use futures_util::{Stream, StreamExt, future::BoxFuture, stream};
use tokio::{sync::mpsc, time::sleep};

use super::{
    Fake,
    answer::Messages,
    http::plain,
    script::{Act, PostReply, Script, Step},
    sse, stdio,
};

const BLOCK: usize = 64 << 10;
/// What was written before an end must have left by then.
const FLUSH: Duration = Duration::from_millis(50);

/// A part of what goes over the wire.
pub(crate) enum Piece {
    Bytes(Bytes),
    /// The end of the connection.
    Cut,
    /// The end of the process, with this code or by SIGKILL; of the connection where the fake is part of a test.
    Exit(Option<i32>, bool),
}

pub(super) type Pieces = Pin<Box<dyn Stream<Item = Piece> + Send>>;

impl From<String> for Piece {
    fn from(text: String) -> Self {
        Self::Bytes(text.into())
    }
}

impl Piece {
    /// As a part of a body.
    pub(super) async fn take(self) -> io::Result<Bytes> {
        match self {
            Self::Bytes(bytes) => return Ok(bytes),
            Self::Exit(code, true) => {
                sleep(FLUSH).await;
                end(code)
            }
            Self::Cut | Self::Exit(_, false) => sleep(FLUSH).await,
        }
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

fn end(code: Option<i32>) -> ! {
    if let Some(code) = code {
        exit(code);
    }
    let _sent = Command::new("kill").args(["-KILL", &std::process::id().to_string()]).status();
    loop {
        std::thread::park();
    }
}

pub(super) fn text(text: String) -> Pieces {
    Box::pin(stream::iter([Piece::from(text)]))
}

/// An act that begins.
pub(crate) struct Scene {
    pub(super) act: Act,
    fake: Arc<Fake>,
    id: String,
    usual: Option<Messages>,
}

impl Act {
    pub(super) fn has_answer(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Answer))
    }
}

impl Scene {
    /// `usual` is what [`Step::Answer`] says.
    pub(super) fn new(fake: &Arc<Fake>, act: Act, id: Option<&str>, usual: Option<Messages>) -> Self {
        Self { act, fake: fake.clone(), id: id.unwrap_or("null").to_owned(), usual }
    }

    /// All that goes over the wire; `frame` makes a message one of the transport's. Nothing is made before it is asked for.
    pub(super) fn pieces(self, frame: impl Fn(&str) -> String + Send + Sync + 'static) -> Pieces {
        let (sender, mut pieces) = mpsc::channel(1);
        let mut wire = Wire { sender, held: Vec::new(), drip: None };
        let mut usual = self.usual;
        let Act { steps, .. } = self.act;
        let (fake, id) = (self.fake, self.id);
        let playing = async move {
            for step in &steps {
                wire.play(step, 0, &id, &frame, &fake, &mut usual).await?;
            }
            wire.flush().await
        };
        let mut playing = Some(Box::pin(playing));
        Box::pin(stream::poll_fn(move |context| {
            // The player lives in the stream: who drops that ends it.
            if let Some(player) = &mut playing
                && player.as_mut().poll(context).is_ready()
            {
                playing = None;
            }
            pieces.poll_recv(context)
        }))
    }
}

/// Where the pieces go; small ones are gathered.
struct Wire {
    sender: mpsc::Sender<Piece>,
    held: Vec<u8>,
    drip: Option<Duration>,
}

impl Wire {
    async fn send(&self, piece: Piece) -> Option<()> {
        self.sender.send(piece).await.ok()
    }

    async fn flush(&mut self) -> Option<()> {
        if self.held.is_empty() {
            return Some(());
        }
        let held = std::mem::take(&mut self.held);
        self.send(Piece::Bytes(held.into())).await
    }

    async fn write(&mut self, bytes: &[u8]) -> Option<()> {
        match self.drip {
            None => {
                self.held.extend_from_slice(bytes);
                if self.held.len() < BLOCK { Some(()) } else { self.flush().await }
            }
            Some(pause) => {
                for byte in bytes {
                    self.send(Piece::Bytes(vec![*byte].into())).await?;
                    sleep(pause).await;
                }
                Some(())
            }
        }
    }

    /// `None` once nobody takes any more.
    fn play<'a>(
        &'a mut self,
        step: &'a Step,
        number: usize,
        id: &'a str,
        frame: &'a (dyn Fn(&str) -> String + Send + Sync),
        fake: &'a Arc<Fake>,
        usual: &'a mut Option<Messages>,
    ) -> BoxFuture<'a, Option<()>> {
        let fill = move |text: &str| text.replace("{id}", id).replace("{n}", &number.to_string());
        Box::pin(async move {
            match step {
                Step::Say(text) => return self.write(frame(&fill(text)).as_bytes()).await,
                Step::Raw(text) => return self.write(fill(text).as_bytes()).await,
                Step::Bytes(bytes) => return self.write(bytes).await,
                Step::Fill(bytes) => {
                    for start in (0..*bytes).step_by(BLOCK) {
                        self.write(&[b'x'; BLOCK][..BLOCK.min(bytes - start)]).await?;
                    }
                    return Some(());
                }
                Step::Repeat(times, step) => {
                    for number in 0..*times {
                        self.play(step, number, id, frame, fake, usual).await?;
                    }
                    return Some(());
                }
                Step::Answer => {
                    let mut usual = usual.take()?;
                    while let Some(message) = usual.next().await {
                        self.write(frame(&message).as_bytes()).await?;
                    }
                    return Some(());
                }
                Step::Drip(ms) => {
                    self.flush().await?;
                    self.drip = Some(Duration::from_millis(*ms));
                    return Some(());
                }
                _ => self.flush().await?,
            }
            match step {
                Step::Pause(ms) => sleep(Duration::from_millis(*ms)).await,
                Step::Stderr(bytes) => {
                    let mut line = vec![b'e'; 1023];
                    line.push(b'\n');
                    for _ in 0..bytes.div_ceil(BLOCK) {
                        let _closed = io::stderr().write_all(&line.repeat(BLOCK / line.len()));
                    }
                }
                Step::Spawn => spawn(fake, false),
                Step::SpawnAway => spawn(fake, true),
                Step::Exit(code) => self.send(Piece::Exit(Some(*code), fake.standalone)).await?,
                Step::Kill => self.send(Piece::Exit(None, fake.standalone)).await?,
                Step::Cut => self.send(Piece::Cut).await?,
                Step::Silence => std::future::pending().await,
                _ => {}
            }
            Some(())
        })
    }
}

fn spawn(fake: &Fake, away: bool) {
    let mut command = Command::new("tail");
    command.args(["-n", "0", "-f"]).args(&fake.file);
    if away {
        command.process_group(0);
    }
    // It is to outlive this process.
    drop(command.spawn().expect("tail can be run"));
}

/// Plays a scene on standard output, from a thread that may wait.
pub(super) fn play_on_stdout(scene: Scene) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("threads can be had");
    runtime.block_on(play(scene));
}

/// Plays a scene on standard output.
pub(super) async fn play(scene: Scene) {
    let mut pieces = scene.pieces(|message| format!("{message}\n"));
    while let Some(piece) = pieces.next().await {
        match piece {
            Piece::Bytes(bytes) => stdio::send(&mut bytes.into()),
            Piece::Exit(code, _) => end(code),
            Piece::Cut => exit(0),
        }
    }
}

/// Status and header fields of an act's answer.
pub(super) fn head(act: &Act, content_type: &str) -> Response {
    let status = act.status.unwrap_or(200);
    let mut response = plain(StatusCode::from_u16(status).expect("the script names an HTTP status"));
    let fields = response.headers_mut();
    if !content_type.is_empty() {
        fields.insert(header::CONTENT_TYPE, content_type.parse().expect("a media type"));
    }
    for (name, value) in &act.headers {
        let name: HeaderName = name.parse().expect("the script's headers are well-formed");
        match value.as_str() {
            "" => drop(fields.remove(name)),
            value => drop(fields.insert(name, value.parse().expect("the script's headers are well-formed"))),
        }
    }
    response
}

/// Streamable HTTP: a scene as the answer to a request.
pub(super) async fn response(scene: Scene, script: &Script) -> Response {
    if scene.act.hold {
        return std::future::pending().await;
    }
    let kind = if script.reply == PostReply::Sse { "text/event-stream" } else { "application/json" };
    let mut response = head(&scene.act, kind);
    let framed = script.clone();
    let pieces = scene.pieces(move |message| match framed.reply {
        PostReply::Sse => sse::event(&framed, "message", message),
        PostReply::Json => message.to_owned(),
    });
    *response.body_mut() = sse::body(script, pieces);
    response
}
