//! Frames that are longer than a datagram: cut here, joined there (pure). What waits for the rest of its pieces is bounded
//! in number, bytes and time.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::frame::{self, PART_HEADER};

/// Pieces of one frame: enough for the longest UDP payload over the shortest datagrams.
const MOST_PARTS: usize = 64;
/// Frames that wait for pieces.
const MOST_WAITING: usize = 64;
/// Bytes that wait for others.
const MOST_BYTES: usize = 512 << 10;
/// Pieces travel together: what has not come by then is lost.
const PATIENCE: Duration = Duration::from_millis(500);

/// Cuts a frame into datagrams of at most `room` bytes; none where that takes too many.
pub(super) fn cut(message: u32, whole: &[u8], room: usize) -> Option<impl Iterator<Item = Bytes>> {
    let piece = room.checked_sub(PART_HEADER).filter(|piece| *piece > 0)?;
    let count = whole.len().div_ceil(piece);
    if count > MOST_PARTS {
        return None;
    }
    // Of the same length: two halves rather than a whole and a rest, so that packets stay alike.
    let piece = whole.len().div_ceil(count.max(1)).max(1);
    let count = u8::try_from(whole.len().div_ceil(piece)).ok()?;
    Some((0..count).zip(whole.chunks(piece)).map(move |(index, bytes)| {
        let mut part = BytesMut::with_capacity(PART_HEADER + bytes.len());
        frame::put_part(message, index, count, &mut part);
        part.extend_from_slice(bytes);
        part.freeze()
    }))
}

struct Waiting {
    message: u32,
    since: Instant,
    parts: Vec<Option<Bytes>>,
    missing: usize,
    bytes: usize,
}

/// The pieces that came over one connection.
#[derive(Default)]
pub(super) struct Joiner {
    /// Oldest first.
    waiting: Vec<Waiting>,
    bytes: usize,
}

impl Joiner {
    /// Takes a piece; the last one of a frame brings the frame. Adds to `unjoined` how many frames were given up.
    pub(super) fn take(
        &mut self,
        now: Instant,
        (message, index, count): (u32, u8, u8),
        bytes: &[u8],
        unjoined: &mut u64,
    ) -> Option<Bytes> {
        let (index, count) = (usize::from(index), usize::from(count));
        if count > MOST_PARTS || index >= count {
            *unjoined += 1;
            return None;
        }
        self.forget(|waiting| now.saturating_duration_since(waiting.since) > PATIENCE, unjoined);
        let at = match self.waiting.iter().position(|waiting| waiting.message == message) {
            Some(at) => at,
            None => {
                while self.waiting.len() >= MOST_WAITING {
                    self.forget_oldest(unjoined);
                }
                self.waiting.push(Waiting { message, since: now, parts: vec![None; count], missing: count, bytes: 0 });
                self.waiting.len() - 1
            }
        };
        let waiting = &mut self.waiting[at];
        if waiting.parts.len() != count || waiting.parts[index].is_some() {
            return None;
        }
        if waiting.missing == 1 {
            let waiting = self.waiting.remove(at);
            self.bytes -= waiting.bytes;
            let mut whole = BytesMut::with_capacity(waiting.bytes + bytes.len());
            for part in &waiting.parts {
                whole.extend_from_slice(part.as_deref().unwrap_or(bytes));
            }
            return Some(whole.freeze());
        }
        waiting.parts[index] = Some(Bytes::copy_from_slice(bytes));
        waiting.missing -= 1;
        waiting.bytes += bytes.len();
        self.bytes += bytes.len();
        while self.bytes > MOST_BYTES {
            self.forget_oldest(unjoined);
        }
        None
    }

    fn forget_oldest(&mut self, unjoined: &mut u64) {
        if !self.waiting.is_empty() {
            self.bytes -= self.waiting.remove(0).bytes;
            *unjoined += 1;
        }
    }

    fn forget(&mut self, which: impl Fn(&Waiting) -> bool, unjoined: &mut u64) {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| !which(waiting));
        let gone = before - self.waiting.len();
        if gone > 0 {
            self.bytes = self.waiting.iter().map(|waiting| waiting.bytes).sum();
            *unjoined += gone as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::Frame;
    use super::*;

    fn part(bytes: &[u8]) -> ((u32, u8, u8), &[u8]) {
        match frame::read(bytes) {
            Ok(Frame::Part { message, index, count, bytes }) => ((message, index, count), bytes),
            other => panic!("not a part: {other:?}"),
        }
    }

    #[test]
    fn what_is_cut_is_joined_whatever_the_order() {
        let now = Instant::now();
        for length in [2, 1163, 1500, 2310, 9_000, 65_507] {
            let whole: Vec<u8> = (0..length).map(|value| value as u8).collect();
            let mut parts: Vec<Bytes> = cut(7, &whole, 1162).expect("few enough").collect();
            assert!(parts.iter().all(|part| part.len() <= 1162));
            for backwards in [false, true] {
                if backwards {
                    parts.reverse();
                }
                let (mut joiner, mut unjoined) = (Joiner::default(), 0);
                let mut joined = Vec::new();
                for bytes in &parts {
                    let (place, bytes) = if parts.len() > 1 { part(bytes) } else { continue };
                    joined.extend(joiner.take(now, place, bytes, &mut unjoined));
                }
                if parts.len() > 1 {
                    assert_eq!((joined.len(), &joined[0][..], joiner.bytes, unjoined), (1, &whole[..], 0, 0));
                }
            }
        }
        let two: Vec<Bytes> = cut(7, &[0; 1500], 1162).expect("few enough").collect();
        assert_eq!(two.iter().map(Bytes::len).collect::<Vec<_>>(), [757, 757], "halves");
        assert!(cut(7, &[0; 65_507], 500).is_none(), "too many");
        assert!(cut(7, &[0; 65_507], 3).is_none(), "no room for any");
    }

    #[test]
    fn a_replayed_or_contradicting_piece_changes_nothing() {
        let (now, mut joiner, mut unjoined) = (Instant::now(), Joiner::default(), 0);
        assert_eq!(joiner.take(now, (1, 0, 2), b"first ", &mut unjoined), None);
        assert_eq!(joiner.take(now, (1, 0, 2), b"again ", &mut unjoined), None);
        assert_eq!(joiner.take(now, (1, 2, 3), b"other", &mut unjoined), None);
        assert_eq!(joiner.take(now, (1, 1, 2), b"second", &mut unjoined).as_deref(), Some(&b"first second"[..]));
        assert_eq!((joiner.bytes, unjoined), (0, 0));
    }

    #[test]
    fn pieces_without_the_rest_are_forgotten() {
        let (now, mut joiner, mut unjoined) = (Instant::now(), Joiner::default(), 0);
        for message in 0..1_000 {
            assert_eq!(joiner.take(now, (message, 0, 2), &[0; 1_000], &mut unjoined), None);
            assert!(joiner.waiting.len() <= MOST_WAITING);
        }
        assert_eq!(unjoined, 1_000 - MOST_WAITING as u64, "the oldest made room");
        for message in 0..1_000 {
            assert_eq!(joiner.take(now, (message, 0, 64), &[0; 60_000], &mut unjoined), None);
            assert!(joiner.bytes <= MOST_BYTES);
        }
        let later = now + PATIENCE + Duration::from_millis(1);
        assert_eq!(joiner.take(later, (5_000, 0, 2), b"a", &mut unjoined), None);
        assert_eq!((joiner.waiting.len(), joiner.bytes), (1, 1), "the others were given up");
        assert_eq!(joiner.take(later, (1, 0, 65), b"", &mut unjoined), None, "more pieces than there can be");
        assert_eq!(joiner.waiting.len(), 1);
    }
}
