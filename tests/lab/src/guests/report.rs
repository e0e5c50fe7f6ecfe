//! What the guests say, each in lines that begin with `count=N errors=N devices=N`.

/// What a guest has said of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Rounds done.
    pub count: u64,
    /// How often it found something else than it had left: in a card, and on its disk.
    pub errors: u64,
    /// Cards that it found.
    pub devices: usize,
}

impl Report {
    /// The last report that is whole, of what the guest has said so far. A guest that moves may have said the half of a line at
    /// the one node and the rest at the other.
    #[must_use]
    pub fn last_of(said: &str) -> Option<Self> {
        let whole = said.rsplit_once('\n')?.0;
        whole.lines().rev().find_map(Self::parse)
    }

    /// A guest may say more in the line than what all say.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let mut number =
            |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok();
        let (count, errors, devices) = (number("count")?, number("errors")?, number("devices")?);
        Some(Self { count, errors, devices: usize::try_from(devices).ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_line_counts() {
        let said = "count=0000000008 errors=0000000000 devices=0000000002\n\
                    count=0000000016 errors=0000000003 devices=0000000002\ncount=00000";
        assert_eq!(Report::last_of(said), Some(Report { count: 16, errors: 3, devices: 2 }));
    }

    #[test]
    fn the_rest_of_a_line_that_began_at_another_node_is_no_report() {
        assert_eq!(Report::last_of("0024 errors=0000000000 devices=0000000002\n"), None);
        assert_eq!(Report::last_of("count=0000000024 errors=0000000000 devices=2"), None);
        assert_eq!(Report::last_of(""), None);
    }
}
