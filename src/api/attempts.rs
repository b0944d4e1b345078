//! Wrong tokens, counted by the address they come from, so that a guesser is told to stop and does not fill the log.
//!
//! The right token is let in whatever the count is: what keeps guessers out is the length of tokens, not this.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hashlink::LruCache;
use tokio::time::Instant;

/// How many wrong tokens an address may send at once, and how long it takes until it may send one more.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_secs(3);
/// How many addresses are remembered; the one that was heard of longest ago is forgotten first.
const MAX_ADDRESSES: usize = 8192;
/// How often at most a line of the log tells of one address.
const TELL_EVERY: Duration = Duration::from_secs(60);

pub struct Attempts(Mutex<LruCache<IpAddr, Record>>);

struct Record {
    left: u32,
    /// Up to when `left` is counted.
    since: Instant,
    told: Option<Instant>,
    /// How many the log has not told of yet.
    untold: u64,
}

impl Default for Attempts {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MAX_ADDRESSES)))
    }
}

impl Attempts {
    /// Counts a wrong token from `address`. If it is one too many, says how long to wait.
    pub fn fail(&self, address: IpAddr) -> Option<Duration> {
        let address = network(address);
        let (too_many, untold) = self.count(address, Instant::now());
        if let Some(attempts) = untold {
            tracing::warn!(client.address = %address, attempts, "wrong tokens");
        }
        too_many
    }

    /// How long to wait if it is one too many, and how many to tell of if it is time to.
    fn count(&self, address: IpAddr, now: Instant) -> (Option<Duration>, Option<u64>) {
        // A count is whole after every statement.
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // By `entry` it would grow without limit.
        if !records.contains_key(&address) {
            records.insert(address, Record { left: BURST, since: now, told: None, untold: 0 });
        }
        let record = records.get_mut(&address).expect("it was just inserted");
        let refilled = u32::try_from((now - record.since).as_millis() / REFILL.as_millis()).unwrap_or(u32::MAX);
        record.left = record.left.saturating_add(refilled);
        record.since = if record.left < BURST { record.since + REFILL * refilled } else { now };
        record.left = record.left.min(BURST);
        record.untold += 1;
        let tell = record.told.is_none_or(|told| now - told >= TELL_EVERY);
        let untold = tell.then(|| {
            record.told = Some(now);
            std::mem::take(&mut record.untold)
        });
        match record.left.checked_sub(1) {
            Some(left) => {
                record.left = left;
                (None, untold)
            }
            None => (Some(REFILL - (now - record.since)), untold),
        }
    }
}

/// Who has an IPv6 address usually has the 2^64 around it, too.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_its_attempts_back_one_by_one() {
        let attempts = Attempts::default();
        let (here, there) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let start = Instant::now();
        let tries = |address, at: Duration, number: u32| {
            (0..number).filter(|_| attempts.count(address, start + at).0.is_none()).count()
        };
        assert_eq!(tries(here, Duration::ZERO, 100), BURST as usize);
        assert_eq!(tries(there, Duration::ZERO, 100), BURST as usize, "another address has its own");
        assert_eq!(attempts.count(here, start + Duration::from_secs(1)).0, Some(Duration::from_secs(2)));
        assert_eq!(tries(here, REFILL - Duration::from_millis(1), 10), 0);
        assert_eq!(tries(here, REFILL, 10), 1);
        assert_eq!(tries(here, REFILL * 3, 10), 2);
        assert_eq!(tries(here, REFILL * 1_000, 100), BURST as usize);
    }

    #[test]
    fn the_log_tells_of_an_address_once_a_minute_how_often_it_tried() {
        let attempts = Attempts::default();
        let here = "192.0.2.1".parse().unwrap();
        let start = Instant::now();
        let mut told = Vec::new();
        for second in 0..180 {
            told.extend(attempts.count(here, start + Duration::from_secs(second)).1.map(|number| (second, number)));
        }
        assert_eq!(told, [(0, 1), (60, 60), (120, 60)]);
    }

    #[test]
    fn an_ipv6_network_is_one_address_and_a_mapped_one_is_ipv4() {
        let of = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("2001:db8:1:2::1"), "2001:db8:1:2::");
        assert_ne!(of("2001:db8:1:3::1"), "2001:db8:1:2::");
        assert_eq!(of("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(of("192.0.2.1"), "192.0.2.1");
    }

    #[test]
    fn no_more_addresses_are_remembered_than_may_be() {
        let attempts = Attempts::default();
        let now = Instant::now();
        for number in 0..2 * MAX_ADDRESSES as u32 {
            attempts.count(std::net::Ipv4Addr::from_bits(number).into(), now);
        }
        assert!(attempts.0.lock().unwrap().len() <= MAX_ADDRESSES);
    }
}
