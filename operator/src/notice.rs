//! Something to report to the user as a Kubernetes event. Plain data: [`cluster`](crate::cluster) writes it.

/// What an event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Something is not as it should be.
    pub warning: bool,
    /// CamelCase.
    pub reason: &'static str,
    /// For a person.
    pub note: String,
}
