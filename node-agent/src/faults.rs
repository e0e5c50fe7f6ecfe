//! Faults on demand, for tests: compiled with the feature `faults` only, and never part of a release.
//!
//! The file that the environment variable `SLACKWATER_FAULTS_FILE` names holds one `name=value` a line. It is read each time that a
//! fault's place is passed, so a test sets and clears faults while the agent runs.

/// The value of a fault, if it is set now.
pub fn value(name: &str) -> Option<String> {
    let path = std::env::var_os("SLACKWATER_FAULTS_FILE")?;
    let text = std::fs::read_to_string(path).ok()?;
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

/// Whether a fault is set now, to whatever value.
pub fn is_set(name: &str) -> bool {
    value(name).is_some()
}
