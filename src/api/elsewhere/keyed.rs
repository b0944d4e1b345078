//! The row of a run with a key: written before it begins, and with what came of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{sleep, timeout};

use crate::api::drip::Ended;
use crate::api::repeats::Call;
use crate::error::Error;
use crate::model::hex;
use crate::store::{NewSharedRun, SharedProgress as Progress};

use super::{Elsewhere, Followed, GRACE, RECORD_TIMEOUT, WRITE_TIMEOUT, away};

/// When it is made sure that the row of a run that was not sent is gone, each after the one before.
const FREED_AFTER: [Duration; 3] = [Duration::from_secs(10), Duration::from_secs(60), Duration::from_secs(300)];

impl Elsewhere {
    /// The row of a run with a key. `is_repeated` will say whether another request, elsewhere or before this start, began it.
    pub fn record(&self, call: &Call, is_repeated: Arc<AtomicBool>) -> Record {
        let attempt = self.0.attempts.fetch_add(1, Ordering::Relaxed);
        let kept_for = self.0.settings.key_window + self.0.longest + GRACE;
        let run = self.row(hex(&call.identity), attempt, &call.server_id, call.arguments, kept_for);
        self.under_way().insert(attempt);
        Record { elsewhere: self.clone(), run: Arc::new(run), is_repeated, is_doubted: Arc::default() }
    }
}

/// The row of a run with a key.
#[derive(Clone)]
pub struct Record {
    elsewhere: Elsewhere,
    run: Arc<NewSharedRun>,
    is_repeated: Arc<AtomicBool>,
    /// The database did not say whether it took the row.
    is_doubted: Arc<AtomicBool>,
}

impl Record {
    /// Writes it, before the run begins; what came of the run, when there was one already.
    ///
    /// # Errors
    /// When its key belongs to a run with other arguments, [`Error::RunUnknown`], and what the database says.
    pub async fn begin(&self) -> Result<Option<Bytes>, Error> {
        let Elsewhere(shared) = &self.elsewhere;
        loop {
            self.is_repeated.store(false, Ordering::Relaxed);
            let begun = timeout(RECORD_TIMEOUT, shared.store.begin_shared_run(&self.run)).await;
            if !matches!(begun, Ok(Ok(_))) {
                self.is_doubted.store(true, Ordering::Relaxed);
            }
            if begun.map_err(|_| away())?? {
                return Ok(None);
            }
            self.is_repeated.store(true, Ordering::Relaxed);
            if let Followed::Ended(json) = self.elsewhere.follow(&self.run.id, Some(&self.run.arguments)).await? {
                return Ok(Some(json));
            }
        }
    }

    /// Writes what came of the run, unless it is another one's. A run that was not sent is forgotten.
    pub async fn end(self, ended: &Ended) {
        if !self.is_repeated.load(Ordering::Relaxed) {
            // Also when nobody knows whether it was ever written.
            let progress = ended.as_ref().ok().map(|json| Progress::Ended(Some(json.to_vec())));
            let kept_for = self.elsewhere.0.settings.key_window;
            if progress.is_none() {
                self.elsewhere.under_way().remove(&self.run.attempt);
                if self.is_doubted.load(Ordering::Relaxed) {
                    self.free_later();
                }
            }
            self.elsewhere.write(self.run, progress, kept_for).await;
        } else {
            self.elsewhere.under_way().remove(&self.run.attempt);
        }
    }

    /// A statement that was given up may still be carried out, after the row was removed: when a network that held it back
    /// lets it go, which takes as long as TCP goes on to try.
    fn free_later(&self) {
        // Of too many at once the others are found when somebody asks for them here, or their time is over.
        let Ok(place) = self.elsewhere.0.doubts.clone().try_acquire_owned() else { return };
        let (this, run) = (self.elsewhere.clone(), self.run.clone());
        let closing = this.0.closing.clone();
        let freed = async move {
            let _place = place;
            for pause in FREED_AFTER {
                sleep(pause).await;
                let _ = timeout(WRITE_TIMEOUT, this.0.store.free_shared_run(&run)).await;
            }
        };
        self.elsewhere.0.tasks.spawn(closing.run_until_cancelled_owned(freed));
    }
}
