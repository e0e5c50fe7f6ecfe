//! Which call of the contract is legal when. Pure: [`State::after`] says what a call makes of a state, or why it is out of order.
//!
//! ```text
//!            Resume               StartSave                      FinishSave
//!  Paused ◀─────────▶ Running      (either) ──▶ Saving{paused} ──────────────▶ Finishing ──▶ Paused   all has been given
//!            Pause                    ▲                │                           │
//!                                     └────────────────┴───── AbortSave, or the ───┘ reader of the stream is gone
//!
//!  Incoming ── StartLoad ──▶ Loading ── understood ──▶ Loaded ── FinishLoad ──▶ Paused
//!      ▲                        │
//!      └──────── refused ───────┘
//! ```
//! Pause and Resume say how the VM shall stand, so repeating one is no error. AbortSave without a save has nothing to do: a save
//! also ends by itself when its reader goes, and the caller cannot know which came first. Describe and Quit are always legal.

use std::fmt;

/// Where a VMM stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// The vCPU runs.
    Running,
    /// The vCPU stands still; it can be resumed.
    Paused,
    /// StartSave has been called: nothing is given yet. The vCPU runs unless `paused`.
    Saving {
        /// Pause has been called.
        paused: bool,
    },
    /// FinishSave has been called: RAM and machine are being given.
    Finishing,
    /// Started to take over a VM; nothing has come yet.
    Incoming,
    /// StartLoad has been called: the VM is coming.
    Loading,
    /// All of it has come and been understood.
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

/// A call that is not legal now. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call:?} is out of order: {state}; {}", call.expects())]
pub struct OutOfOrder {
    /// What was called.
    pub call: Call,
    /// Where the VMM stands.
    pub state: State,
}

impl State {
    /// The state once `call` has been carried out. A save or a load that begins ends later: [`Self::save_ended`],
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

    /// The state once a save has ended, in whatever way.
    #[must_use]
    pub fn save_ended(self) -> Self {
        match self {
            Self::Saving { paused: false } => Self::Running,
            Self::Saving { paused: true } | Self::Finishing => Self::Paused,
            Self::Running | Self::Paused | Self::Incoming | Self::Loading | Self::Loaded => self,
        }
    }

    /// The state once a load has ended: `understood`, or not.
    #[must_use]
    pub fn load_ended(self, understood: bool) -> Self {
        match self {
            Self::Loading if understood => Self::Loaded,
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
            Self::Finishing => "FinishSave is giving the VM's state",
            Self::Incoming => "the VMM was started to take over a VM, of which nothing has come",
            Self::Loading => "StartLoad is taking the VM's state",
            Self::Loaded => "the VM's state has come and waits for FinishLoad",
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
    fn a_migration_and_a_rollback_go_through() {
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
