//! Sizes in bytes as people write them. Pure.

/// The units that are understood, in bytes. Without a second letter they are binary, as memory and disks are cut.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
];

/// Reads a size such as `64MiB`, `64M`, `1.5 GB` or `4096`.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let error = || format!("{text:?} is no size; write for example 4096, 64KiB, 64MiB or 2GiB");
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(error)?;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(error);
    }
    let broken: f64 = number.parse().map_err(|_| error())?;
    let bytes = broken * factor as f64;
    if bytes.is_finite() && bytes < (1_u64 << 53) as f64 { Ok(bytes as u64) } else { Err(error()) }
}

/// The size in the largest unit of which there is at least one.
pub fn show(bytes: u64) -> String {
    let (unit, factor) = match bytes {
        0..1_024 => return format!("{bytes} B"),
        1_024..1_048_576 => ("KiB", 1_u64 << 10),
        1_048_576..1_073_741_824 => ("MiB", 1 << 20),
        _ => ("GiB", 1 << 30),
    };
    format!("{:.1} {unit}", bytes as f64 / factor as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let sizes = [("4096", 4_096), ("64MiB", 64 << 20), ("64 m", 64 << 20), ("1.5k", 1_536), ("2GB", 2_000_000_000)];
        for (text, bytes) in sizes {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "1.2.3", "-1", "12 parsecs", "99999999999999TiB", "1e3"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_a_fitting_unit() {
        assert_eq!((show(12), show(1_536), show(64 << 20)), ("12 B".into(), "1.5 KiB".into(), "64.0 MiB".into()));
    }
}
