//! `CKPT_INTERVAL=auto`: how long to compute between two checkpoints.
//!
//! J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart
//! dumps", Future Generation Computer Systems 22 (2006): with the cost d of a
//! checkpoint and the mean time M between failures
//!
//! > t = sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d   for d < 2M, else M
//!
//! The cost here is what the program loses: the time it stands still and the processor
//! time that writing takes (it may have only one processor). Pure code; the helper
//! feeds it.

use std::time::Duration;

/// Before anything was measured: soon enough that a short run is worth something, and
/// long enough that start-up is over.
const FIRST: Duration = Duration::from_secs(5);
const SHORTEST: Duration = Duration::from_millis(100);
/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;

/// Daly's formula; `cost` and `mtbf` in the same unit, which the result has too.
pub fn daly(cost: f64, mtbf: f64) -> f64 {
    let share = cost / (2.0 * mtbf);
    if share >= 1.0 {
        return mtbf;
    }
    (2.0 * cost * mtbf).sqrt() * (1.0 + share.sqrt() / 3.0 + share / 9.0) - cost
}

/// What one checkpoint has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// The program stood still.
    pub stop: Duration,
    /// Processor time of the helper and its writer outside the stop.
    pub cpu: Duration,
    /// From the stop until the generation was durable: checkpoints cannot follow one
    /// another faster.
    pub persist: Duration,
}

/// Chooses the intervals of one program.
#[derive(Debug, Clone)]
pub struct Pace {
    mtbf: Duration,
    /// The share of its time that the program may lose, 0 to 1.
    overhead: f64,
    cost: Option<f64>,
    measurements: u64,
    persist: Duration,
}

impl Pace {
    pub fn new(mtbf: Duration, overhead: f64) -> Pace {
        Pace {
            mtbf,
            overhead,
            cost: None,
            measurements: 0,
            persist: Duration::ZERO,
        }
    }

    /// Takes a measurement in.
    pub fn measured(&mut self, cost: Cost) {
        let new = (cost.stop + cost.cpu).as_secs_f64();
        // The first one is full and dearer than what follows: the second replaces it.
        self.cost = Some(match self.cost {
            Some(old) if self.measurements > 1 => old + (new - old) * NEWEST,
            _ => new,
        });
        self.measurements += 1;
        self.persist = cost.persist;
    }

    /// The time from one checkpoint to the next.
    pub fn interval(&self) -> Duration {
        let Some(cost) = self.cost else {
            return FIRST.min(self.mtbf);
        };
        let best = daly(cost, self.mtbf.as_secs_f64());
        let affordable = cost / self.overhead;
        let chosen = Duration::try_from_secs_f64(best.max(affordable)).unwrap_or(self.mtbf);
        chosen.max(self.persist).max(SHORTEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn cost(stop_ms: u64) -> Cost {
        Cost {
            stop: Duration::from_millis(stop_ms),
            ..Cost::default()
        }
    }

    /// The examples published with the formula: minutes.
    #[test]
    fn published_examples() {
        for (mtbf, expected) in [(24.0 * 60.0, 117.0), (6.0 * 60.0, 57.0)] {
            assert_eq!(daly(5.0, mtbf).round(), expected);
        }
        assert_eq!((daly(5.0, 15.0) * 10.0).round() / 10.0, 9.1);
    }

    #[test]
    fn costs_beyond_the_time_between_failures() {
        assert_eq!(daly(30.0, 15.0), 15.0);
        assert_eq!(daly(300.0, 15.0), 15.0);
    }

    #[test]
    fn a_cheap_checkpoint_is_taken_often() {
        let mut pace = Pace::new(DAY, 0.01);
        assert_eq!(pace.interval(), FIRST);
        pace.measured(cost(3));
        let interval = pace.interval().as_secs_f64();
        assert!((22.0..24.0).contains(&interval), "{interval}");
    }

    #[test]
    fn the_overhead_bounds_it() {
        // Failures every ten seconds ask for more than one percent.
        let mut pace = Pace::new(Duration::from_secs(10), 0.01);
        pace.measured(cost(100));
        assert_eq!(pace.interval(), Duration::from_secs(10));
        let mut pace = Pace::new(Duration::from_secs(10), 0.5);
        pace.measured(cost(100));
        assert!(pace.interval() < Duration::from_secs(2));
    }

    #[test]
    fn checkpoints_do_not_overlap() {
        let mut pace = Pace::new(Duration::from_secs(1), 0.5);
        let slow = Duration::from_secs(40);
        pace.measured(Cost {
            persist: slow,
            ..cost(1)
        });
        assert_eq!(pace.interval(), slow);
    }

    #[test]
    fn measurements_are_smoothed() {
        let mut pace = Pace::new(DAY, 0.01);
        pace.measured(cost(1000));
        let first = pace.interval();
        pace.measured(cost(10));
        let second = pace.interval();
        assert!(second < first / 5, "an increment after a full checkpoint");
        pace.measured(cost(1000));
        let third = pace.interval();
        assert!(second < third && third < first);
    }
}
