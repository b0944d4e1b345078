//! Taking turns, and what comes of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Barrier;

use super::call::Caller;

/// Calls before each turn that do not count: caches and branches learn the caller's way again.
const UNCOUNTED: usize = 20;

/// One figure, measured several times.
#[derive(Default)]
pub(crate) struct Laps(pub(crate) Vec<f64>);

impl Laps {
    pub(crate) fn add(&mut self, time: Duration) {
        self.0.push(milliseconds(time));
    }
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// The times of one turn's calls in milliseconds, ascending.
pub(crate) struct Times(Vec<f64>);

impl Times {
    pub(crate) fn p50(&self) -> f64 {
        median(self.0.iter().copied())
    }

    pub(crate) fn p99(&self) -> f64 {
        self.0[(self.0.len() * 99).div_ceil(100) - 1]
    }
}

/// Lets each caller make its calls while the others wait, `turns` times over.
pub(crate) async fn take_turns<const N: usize>(callers: Vec<Caller>, turns: usize, calls: usize) -> [Vec<Times>; N] {
    // On a worker thread, where Portolan's own tasks run in Portolan.
    let turn = async |caller| tokio::spawn(take_turn(caller, calls)).await.expect("every answer is right");
    in_turns(callers, turns, turn).await
}

/// As [`take_turns`], for crowds whose callers call all at once: calls per second, turn by turn.
pub(crate) async fn take_turns_in_crowds<const N: usize>(
    crowds: Vec<Vec<Caller>>,
    turns: usize,
    calls: usize,
) -> [Laps; N] {
    in_turns(crowds, turns, async |crowd| call_at_once(crowd, calls).await).await.map(Laps)
}

/// Forwards and backwards by turns, so that nobody always follows the same one; the first turn warms up.
async fn in_turns<C, T, const N: usize>(
    callers: Vec<C>,
    turns: usize,
    take_turn: impl AsyncFn(C) -> (C, T),
) -> [Vec<T>; N] {
    assert_eq!(callers.len(), N);
    let mut taken = [(); N].map(|()| Vec::with_capacity(turns));
    let mut callers: Vec<_> = callers.into_iter().map(Some).collect();
    for turn in 0..=turns {
        for step in 0..N {
            let next = if turn % 2 == 0 { step } else { N - 1 - step };
            let caller = callers[next].take().expect("it came back from its last turn");
            let (caller, result) = take_turn(caller).await;
            callers[next] = Some(caller);
            if turn > 0 {
                taken[next].push(result);
            }
        }
    }
    taken
}

async fn take_turn(mut caller: Caller, calls: usize) -> (Caller, Times) {
    for _ in 0..UNCOUNTED {
        caller.call().await;
    }
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let start = Instant::now();
        caller.call().await;
        times.push(milliseconds(start.elapsed()));
    }
    times.sort_by(f64::total_cmp);
    (caller, Times(times))
}

/// Lets all callers make their calls at once; how many calls per second they got.
async fn call_at_once(callers: Vec<Caller>, calls: usize) -> (Vec<Caller>, f64) {
    let count = callers.len();
    let ready = Arc::new(Barrier::new(count + 1));
    let tasks: Vec<_> = callers
        .into_iter()
        .map(|mut caller| {
            let ready = ready.clone();
            tokio::spawn(async move {
                ready.wait().await;
                for _ in 0..calls {
                    caller.call().await;
                }
                caller
            })
        })
        .collect();
    ready.wait().await;
    let start = Instant::now();
    let mut callers = Vec::with_capacity(count);
    for task in tasks {
        callers.push(task.await.expect("every answer is right"));
    }
    (callers, (count * calls) as f64 / start.elapsed().as_secs_f64())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
