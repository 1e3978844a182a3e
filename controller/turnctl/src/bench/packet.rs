//! What a packet carries besides ballast: checksum, flow, number, and when it was sent.

use std::ops::Range;

/// Bytes of the fields; the least size of a packet.
pub const HEADER: usize = 24;
/// The largest packet: what passes an Ethernet together with the longest headers of TURN.
pub const LARGEST: usize = 1400;

const CHECKSUM: Range<usize> = 0..4;
const FLOW: Range<usize> = 4..8;
const NUMBER: Range<usize> = 8..16;
const SENT: Range<usize> = 16..24;

/// The fields.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Packet {
    /// Index of its flow.
    pub flow: u32,
    /// Number in its flow, from 1.
    pub number: u64,
    /// Nanoseconds from the beginning of the run to its sending.
    pub sent: u64,
}

impl Packet {
    /// Writes the fields over the head of `payload`, whose rest is ballast.
    ///
    /// # Panics
    /// `payload` is shorter than [`HEADER`].
    pub fn write(&self, payload: &mut [u8]) {
        payload[FLOW].copy_from_slice(&self.flow.to_be_bytes());
        payload[NUMBER].copy_from_slice(&self.number.to_be_bytes());
        payload[SENT].copy_from_slice(&self.sent.to_be_bytes());
        let checksum = crc32fast::hash(&payload[CHECKSUM.end..]);
        payload[CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
    }

    /// Reads a payload of `size` bytes; nothing where one bit of it is another.
    pub fn read(payload: &[u8], size: usize) -> Option<Self> {
        if payload.len() != size || size < HEADER {
            return None;
        }
        let word = |range: Range<usize>| payload[range].iter().fold(0_u64, |all, byte| all << 8 | u64::from(*byte));
        if word(CHECKSUM) != u64::from(crc32fast::hash(&payload[CHECKSUM.end..])) {
            return None;
        }
        Some(Self { flow: u32::try_from(word(FLOW)).ok()?, number: word(NUMBER), sent: word(SENT) })
    }
}

/// Ballast that a codec's packet might be: no run of equal bytes.
pub(crate) fn ballast(size: usize) -> Vec<u8> {
    let mut state = 0x2545_F491_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(size)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_bit_is_seen() {
        let packet = Packet { flow: 7, number: 1 << 40, sent: u64::MAX };
        for size in [HEADER, 172, LARGEST] {
            let mut payload = ballast(size);
            packet.write(&mut payload);
            assert_eq!(Packet::read(&payload, size), Some(packet));
            for bit in 0..size * 8 {
                payload[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Packet::read(&payload, size), None, "bit {bit} of {size} bytes");
                payload[bit / 8] ^= 1 << (bit % 8);
            }
            assert_eq!(Packet::read(&payload[..size - 1], size), None);
        }
    }
}
