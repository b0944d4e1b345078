//! Requests that wait for their answers on a connection that carries many of them: stdio, and HTTP+SSE.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::value::RawValue;
use tokio::sync::oneshot;

use super::Error;
use super::budget::{Held, Oversize};
use super::message::{self, Inbound, RpcError};
use super::session::CallError;
use super::watch::Bell;

/// What a request got.
#[derive(Debug)]
pub enum Reply {
    Result(Answer),
    Error(RpcError),
    /// An answer came and could not be taken.
    Untaken(Oversize),
    /// No answer can come any more.
    Ended(Error),
}

/// The result of a request as the server wrote it, and the room it takes.
#[derive(Debug)]
pub struct Answer {
    pub result: Box<RawValue>,
    pub held: Held,
}

impl Reply {
    /// The same, of a request that was sent.
    pub fn into_result(self) -> Result<Answer, CallError> {
        match self {
            Self::Result(answer) => Ok(answer),
            Self::Error(error) => Err(CallError::Rpc(error)),
            Self::Untaken(oversize) => Err(CallError::Untaken(oversize)),
            Self::Ended(error) => Err(CallError::Lost(error)),
        }
    }
}

/// A request of the server's: its id, as it goes back, and its method.
pub type ServerRequest = (Box<RawValue>, String);

#[derive(Default)]
pub struct Exchange(Mutex<State>);

#[derive(Default)]
struct State {
    last: u64,
    waiting: HashMap<u64, oneshot::Sender<Reply>>,
    end: Option<Error>,
}

impl Exchange {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no code panics while it holds the state")
    }

    /// A place for the answer to a request that is to be sent; why not, when the connection has ended.
    pub fn open(self: &Arc<Self>) -> Result<Waiting, Error> {
        let mut state = self.state();
        if let Some(end) = &state.end {
            return Err(end.clone());
        }
        state.last += 1;
        let id = state.last;
        let (sender, answer) = oneshot::channel();
        state.waiting.insert(id, sender);
        Ok(Waiting { id, answer, exchange: self.clone() })
    }

    /// Takes what one text of the server brings: answers go to those who wait, notices to `bell`. Returns the server's own
    /// requests.
    pub fn receive(&self, text: &[u8], mut held: Held, bell: &Bell) -> Vec<ServerRequest> {
        let mut requests = Vec::new();
        for inbound in message::read(text) {
            match inbound {
                Inbound::Answer { id, result: Ok(result) } => {
                    self.deliver(id, Reply::Result(Answer { result, held: held.take() }));
                }
                Inbound::Answer { id, result: Err(error) } => self.deliver(id, Reply::Error(error)),
                Inbound::Request { id, method } => requests.push((id, method)),
                Inbound::Notification { method } if method == message::LIST_CHANGED => bell.list_changed(),
                Inbound::Notification { .. } => {}
            }
        }
        requests
    }

    /// Hands an answer to whoever waits for it. An answer to nobody, or a second one, changes nothing.
    pub fn deliver(&self, id: u64, reply: Reply) {
        let waiting = self.state().waiting.remove(&id);
        if let Some(waiting) = waiting {
            // Whoever waited may just have left.
            let _ = waiting.send(reply);
        }
    }

    /// An answer that could not be taken, and cannot be told whose it is unless only one request waits. `false` when
    /// nobody can be told.
    pub fn fail_the_only(&self, oversize: Oversize) -> bool {
        let mut state = self.state();
        if state.waiting.len() != 1 {
            return false;
        }
        for (_, waiting) in state.waiting.drain() {
            let _ = waiting.send(Reply::Untaken(oversize));
        }
        true
    }

    /// Ends all that waits, and all that comes later, with the first reason given.
    pub fn end(&self, reason: &Error) {
        let mut state = self.state();
        let reason = state.end.get_or_insert_with(|| reason.clone()).clone();
        for (_, waiting) in state.waiting.drain() {
            let _ = waiting.send(Reply::Ended(reason.clone()));
        }
    }

    /// How many requests wait for their answers.
    pub fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// Why the connection has ended, once it has.
    pub fn ended(&self) -> Option<Error> {
        self.state().end.clone()
    }
}

/// One request's place; dropping it gives the place up.
pub struct Waiting {
    pub id: u64,
    answer: oneshot::Receiver<Reply>,
    exchange: Arc<Exchange>,
}

impl Waiting {
    pub async fn reply(&mut self) -> Reply {
        // The sender is dropped without a word only with the exchange itself.
        (&mut self.answer).await.unwrap_or(Reply::Ended(Error::Closed))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.exchange.state().waiting.remove(&self.id);
    }
}
