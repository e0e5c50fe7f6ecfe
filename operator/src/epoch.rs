//! How often the leadership of the operators has changed: what the agents fence by.

/// The epoch that goes into every mutating call. One operator runs for now, without a Lease: 0, "no leadership". The
/// Lease's `leaseTransitions` comes here.
pub fn operator_epoch() -> u64 {
    0
}
