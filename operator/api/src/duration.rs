//! Durations as Kubernetes writes them (`metav1.Duration`, which is Go's), without the forms that are likely
//! slips. docs/decisions/0021 says why this is not a library's type.

use std::time::Duration;

/// A duration that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not a duration; write hours, minutes, seconds and milliseconds in that order, as in 5m, \
     1m30s or 500ms"
)]
pub struct DurationError {
    /// The text.
    pub value: String,
}

/// The same as a pattern, for the CRD's schema.
pub(crate) const DURATION_PATTERN: &str = "^([0-9]{1,9}h)?([0-9]{1,9}m)?([0-9]{1,9}s)?([0-9]{1,9}ms)?$";

/// Units in the order in which they may be written, with their milliseconds.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads `5m`, `1m30s`, `500ms`: whole numbers, each unit at most once, larger units first. Every such text
/// means the same to Go's `time.ParseDuration`; signs, fractions and spaces, which that allows, are refused
/// here.
///
/// # Errors
/// [`DurationError`], which repeats the value and shows what would be right.
pub fn parse_duration(value: &str) -> Result<Duration, DurationError> {
    let error = || DurationError { value: value.to_owned() };
    let mut rest = value;
    let mut units = UNITS.iter();
    let mut milliseconds: u64 = 0;
    if rest.is_empty() {
        return Err(error());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
        let (number, tail) = rest.split_at(digits);
        let unit_length = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_length);
        let (_, factor) = units.find(|(name, _)| *name == unit).ok_or_else(error)?;
        if number.len() > 9 {
            return Err(error());
        }
        let count: u64 = number.parse().map_err(|_| error())?;
        milliseconds += count * factor;
        rest = tail;
    }
    Ok(Duration::from_millis(milliseconds))
}

/// Writes a measured duration for people and for Go's `time.ParseDuration`: `87.412ms`, `2.013s`. Rounds down
/// to microseconds below a second and to milliseconds above.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let (whole, thousandths, unit) = if duration < Duration::from_secs(1) {
        (duration.as_millis(), duration.subsec_micros() % 1_000, "ms")
    } else {
        (u128::from(duration.as_secs()), duration.subsec_millis(), "s")
    };
    if thousandths == 0 {
        return format!("{whole}{unit}");
    }
    let digits = format!("{thousandths:03}");
    format!("{whole}.{}{unit}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_units_in_descending_order_are_read() {
        for (text, ms) in
            [("5m", 300_000), ("1m30s", 90_000), ("500ms", 500), ("24h", 86_400_000), ("1h0m1s", 3_601_000)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
    }

    #[test]
    fn what_is_ambiguous_or_a_slip_is_refused_with_a_message() {
        for text in [
            "",
            "5",
            "m",
            "5 m",
            "-5m",
            "1.5h",
            "5M",
            "30s1m",
            "5m5m",
            "5minutes",
            "9999999999s",
            "5m ",
            "٣m",
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{text:?} is not a duration")), "{error}");
        }
    }

    #[test]
    fn measured_durations_keep_three_places_and_no_trailing_zeros() {
        for (micros, text) in [
            (0, "0ms"),
            (87_412, "87.412ms"),
            (87_400, "87.4ms"),
            (999_999, "999.999ms"),
            (1_000_000, "1s"),
            (2_013_999, "2.013s"),
            (75_000_000, "75s"),
        ] {
            assert_eq!(format_duration(Duration::from_micros(micros)), text);
        }
    }
}
