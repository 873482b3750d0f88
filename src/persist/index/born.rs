//! Inodes that were made since the table began. They are many (a program that makes files makes
//! thousands) and their numbers lie close together: two bits each, in groups.
//!
//! Part of the [`super::Index`].

use super::{Map, empty};
use crate::persist::Id;

/// Numbers in one group.
const GROUP: u64 = 64;

#[derive(Debug, Default)]
struct Group {
    made: u64,
    /// Those whose number a directory has had since.
    dirs: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Born(Map<Id, Group>);

/// The group of a number, as the number of its first divided by [`GROUP`], and its bit there.
fn place(id: &Id) -> (Id, u64) {
    let group = Id {
        dev: id.dev,
        ino: id.ino / GROUP,
    };
    (group, 1 << (id.ino % GROUP))
}

impl Born {
    pub const fn new() -> Born {
        Born(empty())
    }

    /// Was it made since, and if so, has a directory had its number?
    pub fn get(&self, id: &Id) -> Option<bool> {
        let (group, bit) = place(id);
        let group = self.0.get(&group)?;
        (group.made & bit != 0).then_some(group.dirs & bit != 0)
    }

    /// Without memory for it nothing is noted.
    pub fn add(&mut self, id: &Id, was_dir: bool) {
        if self.0.try_reserve(1).is_err() {
            return;
        }
        let (group, bit) = place(id);
        let group = self.0.entry(group).or_default();
        group.made |= bit;
        if was_dir {
            group.dirs |= bit;
        } else {
            group.dirs &= !bit;
        }
    }

    pub fn remove(&mut self, id: &Id) {
        let (group, bit) = place(id);
        if let Some(group) = self.0.get_mut(&group) {
            group.made &= !bit;
            group.dirs &= !bit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn agrees_with_a_map() {
        let mut born = Born::new();
        let mut model = HashMap::new();
        let mut seed = 7u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let ino = match seed >> 61 {
                0 => u64::MAX - (seed >> 40) % 200,
                _ => (seed >> 40) % 300,
            };
            let id = Id {
                dev: (seed >> 33) % 2,
                ino,
            };
            match (seed >> 35) % 4 {
                0 => {
                    born.remove(&id);
                    model.remove(&id);
                }
                kind => {
                    born.add(&id, kind == 1);
                    model.insert(id, kind == 1);
                }
            }
            assert_eq!(born.get(&id), model.get(&id).copied());
        }
        assert!(model.len() > 500);
        for (id, was_dir) in model {
            assert_eq!(born.get(&id), Some(was_dir));
        }
    }
}
