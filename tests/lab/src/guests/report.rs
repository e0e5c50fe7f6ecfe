//! What the guests report: lines that begin with `count=N errors=N devices=N`.

/// A guest's report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Rounds done.
    pub count: u64,
    /// How often a card or the disk held something other than what the guest had put there.
    pub errors: u64,
    /// How many cards it found.
    pub devices: usize,
}

impl Report {
    /// The last complete report in the guest's output. A guest that moves may have written half of a line on
    /// one node and the rest on the other.
    #[must_use]
    pub fn last_of(output: &str) -> Option<Self> {
        let whole = output.rsplit_once('\n')?.0;
        whole.lines().rev().find_map(Self::parse)
    }

    /// A line may have further fields, which depend on the guest.
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
    fn the_last_complete_line_is_the_report() {
        let output = "count=0000000008 errors=0000000000 devices=0000000002\n\
                    count=0000000016 errors=0000000003 devices=0000000002\ncount=00000";
        assert_eq!(Report::last_of(output), Some(Report { count: 16, errors: 3, devices: 2 }));
    }

    #[test]
    fn the_rest_of_a_line_that_began_at_another_node_is_no_report() {
        assert_eq!(Report::last_of("0024 errors=0000000000 devices=0000000002\n"), None);
        assert_eq!(Report::last_of("count=0000000024 errors=0000000000 devices=2"), None);
        assert_eq!(Report::last_of(""), None);
    }
}
