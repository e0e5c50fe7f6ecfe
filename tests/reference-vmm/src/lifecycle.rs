//! Which call of the contract is legal in which state. Pure: [`State::after`] returns the next state, or why
//! the call is out of order.
//!
//! ```text
//!            Resume               StartSave                      FinishSave
//!  Paused ◀─────────▶ Running      (either) ──▶ Saving{paused} ──────────────▶ Finishing ──▶ Paused
//!            Pause                    ▲                │                           │
//!                                     └────────────────┴───── AbortSave, or the ───┘ stream is closed
//!
//!  Incoming ── StartLoad ──▶ Loading ── valid ───────▶ Loaded ── FinishLoad ──▶ Paused
//!      ▲                        │
//!      └──────── refused ───────┘
//! ```
//! Pause and Resume set a state, so they may be repeated. AbortSave without a save does nothing: a save also
//! ends by itself when its reader closes the stream, and the caller cannot know which came first. Describe
//! and Quit are always legal.

use std::fmt;

/// The state of a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// The vCPU runs.
    Running,
    /// The vCPU is paused; it can be resumed.
    Paused,
    /// StartSave has been called: nothing is written yet. The vCPU runs unless `paused`.
    Saving {
        /// Pause has been called.
        paused: bool,
    },
    /// FinishSave has been called: RAM and machine are being written.
    Finishing,
    /// Started to take over a VM; nothing has been received yet.
    Incoming,
    /// StartLoad has been called: the VM is being received.
    Loading,
    /// All of it has been received and is valid.
    Loaded,
}

/// A call whose legality depends on the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::VariantArray)]
#[allow(missing_docs)]
pub enum Call {
    StartSave,
    SaveProgress,
    Pause,
    FinishSave,
    AbortSave,
    StartLoad,
    FinishLoad,
    Resume,
}

/// A call that is not legal in this state. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call:?} is out of order: {state}; {}", call.expects())]
pub struct OutOfOrder {
    /// What was called.
    pub call: Call,
    /// The state of the VMM.
    pub state: State,
}

impl State {
    /// The state after `call`. A save or a load that it starts ends later: [`Self::save_ended`],
    /// [`Self::load_ended`].
    ///
    /// # Errors
    /// If the call is out of order.
    pub fn after(self, call: Call) -> Result<Self, OutOfOrder> {
        use State::{Finishing, Incoming, Loaded, Loading, Paused, Running, Saving};
        Ok(match (call, self) {
            (Call::StartSave, Running) => Saving { paused: false },
            (Call::StartSave, Paused) => Saving { paused: true },
            (Call::SaveProgress, Saving { .. } | Finishing) => self,
            (Call::Pause, Running | Paused) => Paused,
            (Call::Pause, Saving { .. }) => Saving { paused: true },
            (Call::Pause, Finishing) => Finishing,
            (Call::FinishSave, Saving { paused: true }) => Finishing,
            (Call::AbortSave, Saving { .. } | Finishing) => self.save_ended(),
            (Call::AbortSave, Running | Paused) => self,
            (Call::StartLoad, Incoming) => Loading,
            (Call::FinishLoad, Loaded) => Paused,
            (Call::Resume, Paused | Running) => Running,
            (
                Call::StartSave
                | Call::SaveProgress
                | Call::Pause
                | Call::FinishSave
                | Call::AbortSave
                | Call::StartLoad
                | Call::FinishLoad
                | Call::Resume,
                Running | Paused | Saving { .. } | Finishing | Incoming | Loading | Loaded,
            ) => return Err(OutOfOrder { call, state: self }),
        })
    }

    /// The state after a save has ended, with any result.
    #[must_use]
    pub fn save_ended(self) -> Self {
        match self {
            Self::Saving { paused: false } => Self::Running,
            Self::Saving { paused: true } | Self::Finishing => Self::Paused,
            Self::Running | Self::Paused | Self::Incoming | Self::Loading | Self::Loaded => self,
        }
    }

    /// The state after a load has ended. `valid`: everything was received and is valid.
    #[must_use]
    pub fn load_ended(self, valid: bool) -> Self {
        match self {
            Self::Loading if valid => Self::Loaded,
            Self::Loading => Self::Incoming,
            Self::Running
            | Self::Paused
            | Self::Saving { .. }
            | Self::Finishing
            | Self::Incoming
            | Self::Loaded => self,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "the VM is running and no save has begun",
            Self::Paused => "the VM is paused and no save has begun",
            Self::Saving { paused: false } => "a save has begun and the VM is running",
            Self::Saving { paused: true } => "a save has begun and the VM is paused",
            Self::Finishing => "FinishSave is sending the VM's state",
            Self::Incoming => "the VMM was started to take over a VM, of which nothing has been received",
            Self::Loading => "StartLoad is receiving the VM's state",
            Self::Loaded => "the VM's state has been received and waits for FinishLoad",
        })
    }
}

impl Call {
    fn expects(self) -> &'static str {
        match self {
            Self::StartSave => "expected: a VM that runs or is paused, without a save",
            Self::SaveProgress => "expected: a save between StartSave and its end",
            Self::Pause | Self::AbortSave => "expected: a VM that has been started, or loaded by FinishLoad",
            Self::FinishSave => "expected: StartSave and Pause before, once each save",
            Self::StartLoad => "expected: a VMM started with --incoming, into which nothing has been loaded",
            Self::FinishLoad => "expected: a StartLoad that has been answered",
            Self::Resume => "expected: a paused VM without a save (AbortSave ends one), or FinishLoad before",
        }
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::Call::*;
    use super::State::*;
    use super::*;

    const STATES: [State; 8] = [
        Running,
        Paused,
        Saving { paused: false },
        Saving { paused: true },
        Finishing,
        Incoming,
        Loading,
        Loaded,
    ];

    #[test]
    fn exactly_these_calls_are_legal() {
        let legal = [
            (StartSave, Running, Saving { paused: false }),
            (StartSave, Paused, Saving { paused: true }),
            (SaveProgress, Saving { paused: false }, Saving { paused: false }),
            (SaveProgress, Saving { paused: true }, Saving { paused: true }),
            (SaveProgress, Finishing, Finishing),
            (Pause, Running, Paused),
            (Pause, Paused, Paused),
            (Pause, Saving { paused: false }, Saving { paused: true }),
            (Pause, Saving { paused: true }, Saving { paused: true }),
            (Pause, Finishing, Finishing),
            (FinishSave, Saving { paused: true }, Finishing),
            (AbortSave, Running, Running),
            (AbortSave, Paused, Paused),
            (AbortSave, Saving { paused: false }, Running),
            (AbortSave, Saving { paused: true }, Paused),
            (AbortSave, Finishing, Paused),
            (StartLoad, Incoming, Loading),
            (FinishLoad, Loaded, Paused),
            (Resume, Paused, Running),
            (Resume, Running, Running),
        ];
        for &call in Call::VARIANTS {
            for state in STATES {
                let expected =
                    legal.iter().find(|(c, s, _)| (*c, *s) == (call, state)).map(|(_, _, next)| *next);
                assert_eq!(state.after(call).ok(), expected, "{call:?} in {state:?}");
            }
        }
    }

    #[test]
    fn a_refusal_names_the_call_the_state_and_what_was_expected() {
        assert_eq!(
            Saving { paused: false }.after(FinishSave).unwrap_err().to_string(),
            "FinishSave is out of order: a save has begun and the VM is running; \
             expected: StartSave and Pause before, once each save"
        );
    }

    #[test]
    fn a_migration_and_a_rollback_are_legal() {
        let run =
            |state: State, calls: &[Call]| calls.iter().try_fold(state, |state, call| state.after(*call));
        let saved = run(Running, &[StartSave, Pause, FinishSave]).unwrap().save_ended();
        assert_eq!(saved, Paused);
        assert_eq!(run(saved, &[AbortSave, Resume]), Ok(Running));
        assert_eq!(run(saved, &[StartSave, FinishSave]), Ok(Finishing), "a second attempt");
        let loaded = run(Incoming, &[StartLoad]).unwrap().load_ended(true);
        assert_eq!(run(loaded, &[FinishLoad, Resume]), Ok(Running));
        assert_eq!(run(Incoming, &[StartLoad]).unwrap().load_ended(false), Incoming);
    }
}
