//! The ChannelData message (RFC 8656 §12.4).

use std::ops::Range;

/// Number of a channel, 0x4000..=0x4FFF (RFC 8656 §12, Table 2).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ChannelNumber(u16);

impl ChannelNumber {
    /// The number, if it may be bound.
    pub const fn new(number: u16) -> Option<Self> {
        match number {
            0x4000..=0x4FFF => Some(Self(number)),
            _ => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// A ChannelData message in a packet that stays where it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ChannelData<'a> {
    channel: ChannelNumber,
    data: &'a [u8],
}

/// Why a packet is not a ChannelData message.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelDataError {
    /// Shorter than its header or than the length the header claims (RFC 8656 §12.6: discard).
    #[error("shorter than its header says")]
    Truncated,
    /// Not 0x4000..=0x4FFF.
    #[error("the channel number is reserved")]
    Channel,
}

impl<'a> ChannelData<'a> {
    /// Length of the header: channel number and length of the data.
    pub const HEADER: usize = 4;

    /// Reads a datagram or a whole stream frame. What lies behind the length is padding and is left out.
    ///
    /// # Errors
    /// See [`ChannelDataError`].
    pub fn parse(packet: &'a [u8]) -> Result<Self, ChannelDataError> {
        let (header, rest) = packet.split_first_chunk::<4>().ok_or(ChannelDataError::Truncated)?;
        let number = u16::from_be_bytes([header[0], header[1]]);
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let channel = ChannelNumber::new(number).ok_or(ChannelDataError::Channel)?;
        let data = rest.get(..len).ok_or(ChannelDataError::Truncated)?;
        Ok(Self { channel, data })
    }

    /// The channel it travels on.
    pub fn channel(&self) -> ChannelNumber {
        self.channel
    }

    /// The application data; may be empty.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Where the data stands in the packet.
    pub fn range(&self) -> Range<usize> {
        Self::HEADER..Self::HEADER + self.data.len()
    }

    /// The header for data of this length.
    pub fn header(channel: ChannelNumber, len: u16) -> [u8; 4] {
        let [c0, c1] = channel.0.to_be_bytes();
        let [l0, l1] = len.to_be_bytes();
        [c0, c1, l0, l1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_rfc_8656_12_allows() {
        use ChannelDataError::{Channel, Truncated};
        type Read = Result<(u16, &'static [u8]), ChannelDataError>;
        let cases: &[(&str, &'static [u8], Read)] = &[
            ("empty", &[], Err(Truncated)),
            ("header cut", &[0x40, 0, 0], Err(Truncated)),
            ("zero length", &[0x40, 0, 0, 0], Ok((0x4000, &[]))),
            ("zero length, padded", &[0x40, 0, 0, 0, 1, 2, 3, 4], Ok((0x4000, &[]))),
            ("one byte", &[0x4F, 0xFF, 0, 1, 9], Ok((0x4FFF, &[9]))),
            ("one byte, padded", &[0x40, 1, 0, 1, 9, 0, 0, 0], Ok((0x4001, &[9]))),
            ("shorter than its length", &[0x40, 0, 0, 3, 1, 2], Err(Truncated)),
            ("longest length, no data", &[0x40, 0, 0xFF, 0xFF], Err(Truncated)),
            ("channel 0x3FFF", &[0x3F, 0xFF, 0, 0], Err(Channel)),
            ("channel 0x5000", &[0x50, 0, 0, 0], Err(Channel)),
            ("channel 0xFFFF", &[0xFF, 0xFF, 0, 0], Err(Channel)),
        ];
        for (what, packet, expected) in cases {
            let read = ChannelData::parse(packet).map(|message| (message.channel().get(), message.data()));
            assert_eq!(read, *expected, "{what}");
            if let Ok(message) = ChannelData::parse(packet) {
                assert_eq!(&packet[message.range()], message.data(), "{what}");
            }
        }
    }

    #[test]
    fn header_is_what_parse_reads() {
        let channel = ChannelNumber::new(0x4ABC).expect("in range");
        let mut packet = ChannelData::header(channel, 2).to_vec();
        packet.extend(b"hi");
        let read = ChannelData::parse(&packet).expect("whole");
        assert_eq!((read.channel(), read.data()), (channel, &b"hi"[..]));
    }
}
