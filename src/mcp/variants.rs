//! What one server has for callers with values of their own (CONTRACT row 17): a few, each known by the mark of its values.

use std::collections::HashMap;
use std::sync::Arc;

use super::template::Mark;

/// How many there may be of one server.
const MOST: usize = 16;

pub struct Variants<T> {
    by_mark: HashMap<Mark, (u64, Arc<T>)>,
    /// Counts uses.
    clock: u64,
}

impl<T> Default for Variants<T> {
    fn default() -> Self {
        Self { by_mark: HashMap::new(), clock: 0 }
    }
}

impl<T> Variants<T> {
    /// The one for these values, if there is one.
    pub fn get(&mut self, mark: &Mark) -> Option<Arc<T>> {
        let (used, variant) = self.by_mark.get_mut(mark)?;
        self.clock += 1;
        *used = self.clock;
        Some(variant.clone())
    }

    /// The one for these values, made if there is none. When there are as many as may be, the one leaves that was not used
    /// for longest among those that nobody holds and that are idle; `None` when there is no such.
    pub fn get_or_make(
        &mut self,
        mark: &Mark,
        make: impl FnOnce() -> Arc<T>,
        is_idle: fn(&T) -> bool,
    ) -> Option<Arc<T>> {
        if let Some(known) = self.get(mark) {
            return Some(known);
        }
        if self.by_mark.len() >= MOST {
            let idle = self.by_mark.iter().filter(|(_, (_, one))| Arc::strong_count(one) == 1 && is_idle(one));
            let oldest = *idle.min_by_key(|(_, (used, _))| *used)?.0;
            self.by_mark.remove(&oldest);
        }
        self.clock += 1;
        let made = make();
        self.by_mark.insert(*mark, (self.clock, made.clone()));
        Some(made)
    }

    pub fn all(&self) -> Vec<Arc<T>> {
        self.by_mark.values().map(|(_, variant)| variant.clone()).collect()
    }

    /// Keeps those that `keep` says; nobody else gets hold of one meanwhile.
    pub fn retain(&mut self, mut keep: impl FnMut(&Arc<T>) -> bool) {
        self.by_mark.retain(|_, (_, variant)| keep(variant));
    }

    pub fn is_empty(&self) -> bool {
        self.by_mark.is_empty()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn mark(number: usize) -> Mark {
        [number as u8; 32]
    }

    fn get(variants: &mut Variants<usize>, number: usize) -> Option<Arc<usize>> {
        variants.get_or_make(&mark(number), || Arc::new(number), |_| true)
    }

    #[test]
    fn the_one_that_was_not_used_for_longest_makes_room() {
        let mut variants = Variants::default();
        for number in 0..MOST {
            assert_eq!(*get(&mut variants, number).unwrap(), number);
        }
        variants.get(&mark(0)).unwrap();
        assert_eq!(*get(&mut variants, MOST).unwrap(), MOST);
        assert!(variants.get(&mark(0)).is_some() && variants.get(&mark(1)).is_none());
        assert_eq!(variants.all().len(), MOST);
    }

    #[test]
    fn one_that_is_held_or_busy_stays() {
        let mut variants = Variants::default();
        let held: Vec<_> = (0..MOST).map(|number| get(&mut variants, number).unwrap()).collect();
        assert!(get(&mut variants, MOST).is_none());
        assert!(get(&mut variants, 3).is_some(), "what is there can be had");
        drop(held);
        assert!(variants.get_or_make(&mark(MOST), || Arc::new(MOST), |number| *number != 7 && *number > 20).is_none());
        assert_eq!(*variants.get_or_make(&mark(MOST), || Arc::new(MOST), |number| *number == 7).unwrap(), MOST);
        assert!(variants.get(&mark(7)).is_none());
    }
}
