//! How many bytes of servers' answers may be in memory, over all servers.
//!
//! A message takes room as it arrives and gives it back when its answer has gone out. The rule for one server is the
//! dynamic threshold of packet switches (Choudhury and Hahne, 1998): it may hold as much as is free. One hungry server
//! gets half of the room, two get a third each, and a newcomer always finds some. Nobody waits for room, so nothing can
//! deadlock: an answer that finds none fails alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The first bytes of every message are free: their number is bounded by the calls that may be in flight.
const FREE: usize = 64 * 1024;

/// The room for all servers.
pub struct Budget {
    bytes: usize,
    used: AtomicUsize,
}

/// One session's part of it.
pub struct Share {
    budget: Arc<Budget>,
    used: AtomicUsize,
}

/// Why a message cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Oversize {
    #[error("it is larger than {0} bytes, as --max-message-bytes says")]
    TooLarge(usize),
    #[error("the answers under way leave no room for it; --max-bytes-in-flight sets how much there is")]
    NoRoom,
}

impl Budget {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self { bytes, used: AtomicUsize::new(0) })
    }

    /// How many bytes are held, and how many may be.
    pub fn usage(&self) -> (usize, usize) {
        (self.used.load(Ordering::Relaxed), self.bytes)
    }

    pub fn share(self: &Arc<Self>) -> Arc<Share> {
        Arc::new(Share { budget: self.clone(), used: AtomicUsize::new(0) })
    }
}

/// The room that one message takes; dropping it gives the room back.
pub struct Held {
    share: Arc<Share>,
    /// How much of the message is counted.
    counted: usize,
}

impl Held {
    pub fn nothing(share: &Arc<Share>) -> Self {
        Self { share: share.clone(), counted: 0 }
    }

    /// Changes the size of the message to `size` bytes.
    ///
    /// # Errors
    /// [`Oversize::NoRoom`] when there is no room for that; what was held stays held.
    pub fn resize(&mut self, size: usize) -> Result<(), Oversize> {
        let counted = size.saturating_sub(FREE);
        let (ours, all) = (&self.share.used, &self.share.budget.used);
        if counted > self.counted {
            let more = counted - self.counted;
            let total = all.fetch_add(more, Ordering::Relaxed) + more;
            let own = ours.fetch_add(more, Ordering::Relaxed) + more;
            // What others take at the same moment may refuse both; it never lets both in.
            if own > self.share.budget.bytes.saturating_sub(total) {
                all.fetch_sub(more, Ordering::Relaxed);
                ours.fetch_sub(more, Ordering::Relaxed);
                return Err(Oversize::NoRoom);
            }
        } else {
            all.fetch_sub(self.counted - counted, Ordering::Relaxed);
            ours.fetch_sub(self.counted - counted, Ordering::Relaxed);
        }
        self.counted = counted;
        Ok(())
    }

    /// Takes the room of this message out; what follows on the same stream starts with nothing.
    pub fn take(&mut self) -> Self {
        let rest = Self::nothing(&self.share);
        std::mem::replace(self, rest)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.share.budget.used.fetch_sub(self.counted, Ordering::Relaxed);
        self.share.used.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Held({} bytes)", self.counted)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn one_server_gets_half_and_leaves_room_for_others() {
        let budget = Budget::new(1_000_000);
        let (greedy, other) = (budget.share(), budget.share());
        let mut first = Held::nothing(&greedy);
        first.resize(FREE + 500_000).unwrap();
        assert!(first.resize(FREE + 500_001).is_err());
        let mut second = Held::nothing(&greedy);
        assert!(second.resize(FREE + 1).is_err(), "it is the server that is bounded, not the message");
        second.resize(FREE).unwrap();
        let mut third = Held::nothing(&other);
        third.resize(FREE + 250_000).unwrap();
        assert!(third.resize(FREE + 250_001).is_err());
        drop(first);
        third.resize(FREE + 500_000).unwrap();
        let taken = third.take();
        third.resize(10).unwrap();
        drop((second, third, taken));
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
    }
}
