//! Faults that hit a migration in each of its phases, and how it must end.
//!
//! | module | what it is |
//! |---|---|
//! | [`matrix`] | every phase, every fault, and the expected end of each cell. Pure data |
//! | [`stage`] | two nodes and a VM on one of them, ready for the next cell |
//! | [`scene`] | one cell: the migration is halted at its phase, the fault is injected and undone |
//! | [`questions`] | did it end as expected, is everything where it belongs, is the status true |
//! | [`report`] | the table |
//! | [`walk`] | migrations back and forth with random faults at random times |
//!
//! The kernels' traces and the guest's own count show which node runs the VM. The agents' word does not
//! count.

pub mod matrix;
pub mod questions;
pub mod report;
pub mod scene;
pub mod stage;
pub mod walk;
