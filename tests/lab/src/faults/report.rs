//! The results of the cells, as a table.

use std::fmt::Write as _;
use std::time::Duration;

use super::matrix::{Cell, Expected};

/// The result of a cell.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The cell.
    pub cell: Cell,
    /// The observed end.
    pub seen: String,
    /// Differences from the expectation. Empty: it ended as expected.
    pub problems: Vec<String>,
    /// Where the VM runs now.
    pub home: Option<&'static str>,
    /// How long it took, preparation included.
    pub took: Duration,
    /// If it ended otherwise: the logs of the agents and the operator.
    pub evidence: String,
}

impl Outcome {
    /// A cell whose migration did not end.
    #[must_use]
    pub fn without_end(cell: Cell, why: String) -> Self {
        let seen = "no end was seen".to_owned();
        Self { cell, seen, problems: vec![why], home: None, took: Duration::ZERO, evidence: String::new() }
    }

    /// Whether it ended as expected.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.problems.is_empty()
    }
}

/// The table in Markdown: what was run, and the cells that cannot occur.
#[must_use]
pub fn markdown(all: &[Cell], outcomes: &[Outcome]) -> String {
    let run = outcomes.len();
    let ok = outcomes.iter().filter(|outcome| outcome.ok()).count();
    let impossible = all.iter().filter(|cell| matches!(cell.expected, Expected::CannotOccur(_))).count();
    let minutes = outcomes.iter().map(|outcome| outcome.took).sum::<Duration>().as_secs() / 60;
    let mut text = format!(
        "# The fault matrix\n\n\
         Written by `make fault-matrix`: every phase of a migration, every fault that can hit it there, \
         how it must end\n\
         (tests/lab/src/faults/matrix.rs, written before the run), and how it ended on the lab: real kernels, \
         real processes,\n\
         judged by the kernels' traces.\n\n\
         {} cells: {run} run, {ok} as expected, {impossible} cannot occur. {minutes} min.\n\n\
         | phase | fault | expected | seen | ok | s |\n|---|---|---|---|---|---|\n",
        all.len()
    );
    for cell in all {
        let (phase, fault, expected) = (cell.phase.name(), cell.fault.name(), cell.expected);
        let outcome = outcomes
            .iter()
            .find(|outcome| (outcome.cell.phase, outcome.cell.fault) == (cell.phase, cell.fault));
        let (seen, ok, seconds) = match (outcome, expected) {
            (Some(outcome), _) if outcome.ok() => {
                (outcome.seen.clone(), "yes", format!("{:.0}", outcome.took.as_secs_f64()))
            }
            (Some(outcome), _) => {
                let seen = format!("{}; {}", outcome.seen, outcome.problems.join("; "));
                (seen, "**no**", format!("{:.0}", outcome.took.as_secs_f64()))
            }
            (None, Expected::CannotOccur(_)) => (String::new(), "", String::new()),
            (None, _) => ("not run".to_owned(), "", String::new()),
        };
        let seen = seen.replace('|', "\\|").replace('\n', " ");
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {phase} | {fault} | {expected} | {seen} | {ok} | {seconds} |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::matrix::{Fault, Phase, VmmKind, cells};

    #[test]
    fn every_cell_has_its_row_which_shows_its_problems() {
        let all = cells(VmmKind::Contract);
        let cell =
            *all.iter().find(|cell| (cell.phase, cell.fault) == (Phase::Stop, Fault::TwinKilled)).unwrap();
        let text = markdown(&all, &[Outcome::without_end(cell, "a | b\nc".to_owned())]);
        let rows: Vec<&str> =
            text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| phase")).collect();
        assert_eq!(rows.len(), all.len());
        assert!(text.contains("1 run, 0 as expected"), "{text}");
        let row = rows.iter().find(|row| row.contains("| stop | twin-killed |")).unwrap();
        assert!(row.contains("a \\| b c") && row.contains("**no**"), "{row}");
    }
}
