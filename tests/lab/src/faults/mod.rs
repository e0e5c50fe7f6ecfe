//! What befalls a migration, when, and how it must end all the same.
//!
//! | module | what it is |
//! |---|---|
//! | [`matrix`] | every phase, every fault, and the end of each cell, written down beforehand. Pure data |
//! | [`stage`] | two nodes and a VM on one of them, ready for the next cell, whatever became of the last |
//! | [`scene`] | one cell played: the migration is brought to its phase, befallen, healed, and awaited |
//! | [`questions`] | did it end so, is everything where it belongs, does the status tell the truth |
//! | [`report`] | the table |
//! | [`walk`] | the same with faults and instants that are drawn, back and forth |
//!
//! Who runs the VM is judged by the kernels' traces and by the guest's own count; no agent is asked.

pub mod matrix;
pub mod questions;
pub mod report;
pub mod scene;
pub mod stage;
pub mod walk;
