//! Numbers, times and opaque bytes in the form people read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Now in Unix milliseconds.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// A span in its two greatest units, the second only while the first is small: `42s`, `3m12s`, `14h`, `2d3h`.
pub(crate) fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (great, unit, rest, small) = match seconds {
        0..60 => return format!("{seconds}s"),
        60..3_600 => (seconds / 60, 'm', seconds % 60, 's'),
        3_600..86_400 => (seconds / 3_600, 'h', seconds % 3_600 / 60, 'm'),
        _ => (seconds / 86_400, 'd', seconds % 86_400 / 3_600, 'h'),
    };
    if great < 10 && rest > 0 { format!("{great}{unit}{rest}{small}") } else { format!("{great}{unit}") }
}

/// Time since a Unix millisecond; `-` for never.
pub(crate) fn age(at_ms: u64, now_ms: u64) -> String {
    if at_ms == 0 { "-".into() } else { span(Duration::from_millis(now_ms.saturating_sub(at_ms))) }
}

/// Time until a Unix millisecond; `expired` when it is past.
pub(crate) fn left(at_ms: u64, now_ms: u64) -> String {
    match at_ms.checked_sub(now_ms) {
        Some(left) => span(Duration::from_millis(left)),
        None => "expired".into(),
    }
}

/// `1536` as `1.5 KiB`.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count, 1024, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// Bytes a second as bits a second, the way links are sold: `125000` as `1.0 Mbit/s`.
pub(crate) fn bit_rate(bytes_per_second: u64) -> String {
    let units = ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s", "Pbit/s", "Ebit/s"];
    scaled(bytes_per_second.saturating_mul(8), 1000, &units)
}

fn scaled(count: u64, base: u64, units: &[&str]) -> String {
    let (mut whole, mut unit) = (count as f64, 0);
    // 999.95 would print as 1000.0 of the unit below.
    while whole >= base as f64 - 0.05 && unit + 1 < units.len() {
        whole /= base as f64;
        unit += 1;
    }
    let unit_name = units.get(unit).copied().unwrap_or_default();
    if unit == 0 { format!("{count} {unit_name}") } else { format!("{whole:.1} {unit_name}") }
}

/// Thousandths as `41.2%`.
pub(crate) fn permille(thousandths: u32) -> String {
    format!("{}.{}%", thousandths / 10, thousandths % 10)
}

/// Bytes in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes from hexadecimal; colons between them are fine.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let byte = |pair: &[u8]| {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()
    };
    digits.chunks(2).map(byte).collect()
}

/// A measured time: `0.42 ms`, `12.3 ms`, `1.20 s`.
pub(crate) fn measured(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1e3;
    match ms {
        ..10.0 => format!("{ms:.2} ms"),
        ..1000.0 => format!("{ms:.1} ms"),
        _ => format!("{:.2} s", ms / 1e3),
    }
}

/// A Unix millisecond in RFC 3339, UTC; `None` for never and for what no calendar knows.
pub(crate) fn timestamp(at_ms: u64) -> Option<String> {
    if at_ms == 0 {
        return None;
    }
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000).ok()?.format(&Rfc3339).ok()
}

/// The time of day of a Unix millisecond, UTC, for lines that scroll by.
pub(crate) fn clock(at_ms: u64) -> String {
    let second = at_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}Z", second / 3600, second / 60 % 60, second % 60, at_ms % 1000)
}

/// Text from elsewhere with nothing in it that a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    let safe = |char: &char| matches!(char, '\\' | '"' | '\'') || char.escape_debug().count() == 1;
    text.chars().map(|char| if safe(&char) { char } else { char::REPLACEMENT_CHARACTER }).collect()
}

/// A span as people write it: `10s`, `500ms`, `2m`, `1h`, or bare seconds.
pub(crate) fn parse_span(text: &str) -> Result<Duration, String> {
    let digits = text.find(|char: char| !char.is_ascii_digit() && char != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err("write a number and ms, s, m, h or d".into()),
    };
    let number: f64 = number.parse().map_err(|_| "write a number and ms, s, m, h or d")?;
    let duration = Duration::try_from_secs_f64(number * scale).map_err(|e| e.to_string())?;
    if duration.is_zero() { Err("must be more than nothing".into()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_read_like_kubectls() {
        let cases = [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (192, "3m12s"),
            (600, "10m"),
            (3_599, "59m"),
            (3_660, "1h1m"),
            (50_400, "14h"),
            (86_400 * 2 + 3_600 * 3, "2d3h"),
            (86_400 * 40, "40d"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(span(Duration::from_secs(seconds)), expected, "{seconds}");
        }
        assert_eq!((age(0, 5_000), age(9_000, 5_000), left(1, 5_000)), ("-".into(), "0s".into(), "expired".into()));
    }

    #[test]
    fn counts_carry_a_unit() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (u64::MAX, "16.0 EiB")];
        for (count, expected) in cases {
            assert_eq!(bytes(count), expected);
        }
        assert_eq!(bytes(1024 * 1024 - 1), "1.0 MiB");
        assert_eq!((bit_rate(0), bit_rate(125_000)), ("0 bit/s".into(), "1.0 Mbit/s".into()));
        assert_eq!((permille(1000), permille(7)), ("100.0%".into(), "0.7%".into()));
        assert_eq!(measured(Duration::from_micros(420)), "0.42 ms");
        assert_eq!(timestamp(1_700_000_000_123).as_deref(), Some("2023-11-14T22:13:20.123Z"));
        assert_eq!((timestamp(0), timestamp(u64::MAX)), (None, None));
        assert_eq!(clock(1_700_000_000_123), "22:13:20.123Z");
    }

    #[test]
    fn what_does_not_print_is_replaced() {
        assert_eq!(printable("ok\u{1b}[31m\\\""), "ok\u{fffd}[31m\\\"");
    }

    #[test]
    fn spans_are_read_as_written() {
        for (text, ms) in [("10s", 10_000), ("3", 3_000), ("500ms", 500), ("1.5m", 90_000), ("2h", 7_200_000)] {
            assert_eq!(parse_span(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for wrong in ["", "s", "0", "-1s", "1w", "1e400h"] {
            assert!(parse_span(wrong).is_err(), "{wrong}");
        }
    }
}
