//! The streams of a VMM's own state. A device's blob has one stream only.

use slackwater_handover::Reason;
use slackwater_proto::refusal::Refusal;
use slackwater_proto::transfer::VmmState;

/// The most streams besides the main one.
pub const MAX_CHANNELS: u8 = 16;

/// One of several streams, or the only one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Channel {
    number: u8,
    more: u8,
}

impl Channel {
    /// All streams, the main one first, if there are `more` besides it.
    pub fn all(more: u8) -> impl Iterator<Item = Self> {
        (0..=more).map(move |number| Self { number, more })
    }

    /// 0 for the main one.
    pub fn number(self) -> usize {
        self.number.into()
    }

    /// How many there are.
    pub fn count(self) -> usize {
        usize::from(self.more) + 1
    }

    /// Whether it is the main one: its end is the end of all.
    pub fn is_main(self) -> bool {
        self.number == 0
    }

    pub(super) fn to_proto(self) -> VmmState {
        VmmState { channel: self.number.into(), more_channels: self.more.into() }
    }

    /// Checks what a source sent.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, with the field and its valid range.
    pub fn from_proto(state: VmmState) -> Result<Self, Refusal> {
        let invalid = |message: String| Refusal::invalid_argument(Reason::BlobRejected, message);
        let VmmState { channel, more_channels } = state;
        let more =
            u8::try_from(more_channels).ok().filter(|more| *more <= MAX_CHANNELS).ok_or_else(|| {
                invalid(format!(
                    "header.vmm.more_channels is {more_channels}; it must be 0 to {MAX_CHANNELS}"
                ))
            })?;
        let number = u8::try_from(channel).ok().filter(|number| *number <= more).ok_or_else(|| {
            invalid(format!(
                "header.vmm.channel is {channel}; with more_channels {more} it must be 0 to {more}"
            ))
        })?;
        Ok(Self { number, more })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_the_same_at_both_ends() {
        for channel in Channel::all(3) {
            assert_eq!(Channel::from_proto(channel.to_proto()).unwrap(), channel);
            assert_eq!(channel.count(), 4);
        }
        assert_eq!(Channel::from_proto(VmmState::default()).unwrap(), Channel::default());
        assert_eq!(Channel::all(2).filter(|channel| channel.is_main()).count(), 1);
    }

    #[test]
    fn an_invalid_channel_is_refused_with_the_valid_range() {
        let refusal = |channel, more_channels| {
            Channel::from_proto(VmmState { channel, more_channels }).unwrap_err().message
        };
        assert_eq!(refusal(0, 17), "header.vmm.more_channels is 17; it must be 0 to 16");
        assert_eq!(refusal(3, 2), "header.vmm.channel is 3; with more_channels 2 it must be 0 to 2");
        assert_eq!(refusal(256, 0), "header.vmm.channel is 256; with more_channels 0 it must be 0 to 0");
    }
}
