//! Durations as people write them: `90`, `90s`, `500ms`, `15m`, `1h30m`.

use std::time::Duration;

/// When checkpoints are taken by the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interval {
    /// Never (also the answer to a `CKPT_INTERVAL` set further up).
    Off,
    Every(Duration),
    /// Daly's formula from the measured cost.
    Auto,
}

/// FIG. 5's default.
pub const DEFAULT: Duration = Duration::from_secs(30 * 60);
/// Longer intervals are mistakes: a hundred years.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// `off`, `default`, `auto` or a duration above zero.
pub fn parse_interval(text: &str) -> Option<Interval> {
    match text {
        "off" => Some(Interval::Off),
        "default" => Some(Interval::Every(DEFAULT)),
        "auto" => Some(Interval::Auto),
        _ => parse_duration(text).map(Interval::Every),
    }
}

/// Whole numbers with units, largest first, each unit once; a bare number is seconds.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut total_ms: u64 = 0;
    let mut smallest = u64::MAX;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest.get(..digits)?.parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let unit = &rest[..letters];
        rest = &rest[letters..];
        let unit_ms = match unit {
            "" if digits == text.len() => 1000,
            _ => UNITS.iter().find(|(name, _)| *name == unit)?.1,
        };
        if unit_ms >= smallest {
            return None;
        }
        smallest = unit_ms;
        total_ms = total_ms.checked_add(number.checked_mul(unit_ms)?)?;
    }
    let duration = Duration::from_millis(total_ms);
    (total_ms > 0 && duration <= LONGEST).then_some(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let ms = |text| parse_duration(text).map(|d| d.as_millis());
        assert_eq!(ms("90"), Some(90_000));
        assert_eq!(ms("90s"), Some(90_000));
        assert_eq!(ms("500ms"), Some(500));
        assert_eq!(ms("15m"), Some(900_000));
        assert_eq!(ms("1h30m"), Some(5_400_000));
        assert_eq!(ms("1d2h3m4s5ms"), Some(93_784_005));
        for wrong in [
            "",
            "0",
            "0s",
            "s",
            "1x",
            "-1",
            "+1",
            "1.5s",
            "1 s",
            "1s1s",
            "1m1h",
            "1h30",
            " 1",
            "1\u{e9}",
            "99999999999999999999",
            "18446744073709551615h",
            "999999d",
        ] {
            assert_eq!(ms(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn words() {
        assert_eq!(parse_interval("off"), Some(Interval::Off));
        assert_eq!(parse_interval("auto"), Some(Interval::Auto));
        assert_eq!(parse_interval("default"), Some(Interval::Every(DEFAULT)));
        assert_eq!(parse_interval("never"), None);
    }
}
