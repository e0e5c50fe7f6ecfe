//! QEMU's versions.

/// Major and minor number of a version such as `10.0.2`; None if it does not begin so.
pub(super) fn release(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim().split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    // `10.0-rc1`, `9.2+ds`: the rest is the packager's.
    let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
    let minor = minor.get(..digits)?.parse().ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_the_beginning_of_a_version() {
        for (text, expected) in [
            ("10.0.2", Some((10, 0))),
            ("9.2.91", Some((9, 2))),
            ("10.1", Some((10, 1))),
            ("9.2-rc1", Some((9, 2))),
            ("10.0+ds.1", Some((10, 0))),
            ("", None),
            ("10", None),
            ("v10.0.2", None),
            ("acme-hv 7", None),
            ("10..2", None),
            ("10.x.2", None),
            ("99999999999.0.0", None),
        ] {
            assert_eq!(release(text), expected, "{text:?}");
        }
    }
}
