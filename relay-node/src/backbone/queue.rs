//! What waits for its turn on a link, flow by flow: a flood fills its own queue, not the others'. Deficit round robin
//! (one quantum a round); where there is too much, the oldest packet of a flow that has more than its share is dropped,
//! and nothing is sent that has waited too long. It stands before QUIC's own queue, which is kept short.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustc_hash::FxHashMap;
use slab::Slab;

use super::report::{LinkDrop, LinkDrops};

/// Bytes that wait for one link, with [`OVERHEAD`] for each packet.
const MOST_BYTES: usize = 512 << 10;
/// What a packet costs beside its bytes.
const OVERHEAD: usize = 64;
/// Flows that have a queue each; where there are more, the others share as many again.
const MOST_FLOWS: usize = 512;
/// What a flow may send in one round: the longest frame, so that one round is enough for it.
const QUANTUM: usize = 1500;
/// What has waited longer gives way to what is behind it in its flow.
const TOO_OLD: Duration = Duration::from_millis(25);
/// And what has waited and will wait for longer than this, here and in the network together; but so long it may wait here.
const TOO_OLD_TOGETHER: Duration = Duration::from_millis(40);
const NEVER_TOO_OLD: Duration = Duration::from_millis(10);
/// The newest packet of a flow is worth more: a flow that sends no more than its share loses nothing to a thread that
/// was late.
const NEWEST_TOO_OLD: Duration = Duration::from_millis(120);

struct Item {
    frame: Bytes,
    since: Instant,
}

#[derive(Default)]
struct Flow {
    key: u64,
    items: VecDeque<Item>,
    /// With overhead.
    bytes: usize,
    credit: usize,
}

/// The packets that wait for one link.
#[derive(Default)]
pub(super) struct FairQueue {
    flows: Slab<Flow>,
    flow_by_key: FxHashMap<u64, usize>,
    /// Flows with packets, in the order of their turns.
    turns: VecDeque<usize>,
    /// Where the longest was seen last; checked before it is believed.
    longest: usize,
    bytes: usize,
    /// What waits in the network.
    elsewhere: Duration,
    /// Empty queues of flows that have gone.
    spare: Vec<VecDeque<Item>>,
}

impl FairQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Bytes that wait, with what they cost beside themselves.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// For so long packets wait in the network's queue too.
    pub(super) fn set_elsewhere(&mut self, elsewhere: Duration) {
        self.elsewhere = elsewhere;
    }

    /// Puts a frame behind those of its flow.
    pub(super) fn push(&mut self, key: u64, frame: Bytes, now: Instant, drops: &mut LinkDrops) {
        let cost = frame.len() + OVERHEAD;
        let is_one_too_many = self.flows.len() >= MOST_FLOWS && !self.flow_by_key.contains_key(&key);
        let key = if is_one_too_many { key % MOST_FLOWS as u64 } else { key };
        let index = match self.flow_by_key.get(&key) {
            Some(index) => *index,
            None => {
                let items = self.spare.pop().unwrap_or_default();
                let index = self.flows.insert(Flow { key, items, bytes: 0, credit: QUANTUM });
                self.flow_by_key.insert(key, index);
                self.turns.push_back(index);
                index
            }
        };
        let flow = &mut self.flows[index];
        flow.items.push_back(Item { frame, since: now });
        flow.bytes += cost;
        self.bytes += cost;
        if self.flows.get(self.longest).is_none_or(|longest| longest.bytes < self.flows[index].bytes) {
            self.longest = index;
        }
        while self.bytes > MOST_BYTES {
            self.drop_oldest_of_the_longest();
            drops.add(LinkDrop::QueueFull, 1);
        }
    }

    /// The next frame in turn; what is too old is dropped on the way.
    pub(super) fn pop(&mut self, now: Instant, drops: &mut LinkDrops) -> Option<Bytes> {
        let too_old = TOO_OLD_TOGETHER.saturating_sub(self.elsewhere).clamp(NEVER_TOO_OLD, TOO_OLD);
        loop {
            let index = *self.turns.front()?;
            let flow = &mut self.flows[index];
            let Some(item) = flow.items.front() else {
                // Flows without packets have no turn.
                self.turns.pop_front();
                continue;
            };
            let patience = if flow.items.len() > 1 { too_old } else { NEWEST_TOO_OLD };
            if now.saturating_duration_since(item.since) > patience {
                self.take_front(index);
                drops.add(LinkDrop::TooOld, 1);
                continue;
            }
            if flow.credit < item.frame.len().min(QUANTUM) {
                flow.credit += QUANTUM;
                self.turns.rotate_left(1);
                continue;
            }
            flow.credit = flow.credit.saturating_sub(item.frame.len());
            return self.take_front(index);
        }
    }

    /// Forgets everything, and says how many packets that were.
    pub(super) fn clear(&mut self) -> usize {
        let count = self.flows.iter().map(|(_, flow)| flow.items.len()).sum();
        *self = Self::default();
        count
    }

    fn drop_oldest_of_the_longest(&mut self) {
        let share = self.bytes / self.turns.len().max(1);
        if self.flows.get(self.longest).is_none_or(|flow| flow.bytes < share) {
            // It has shrunk since; there is always one with its share or more.
            let longest = self.turns.iter().copied().max_by_key(|index| self.flows[*index].bytes);
            self.longest = longest.unwrap_or_default();
        }
        self.take_front(self.longest);
    }

    fn take_front(&mut self, index: usize) -> Option<Bytes> {
        let flow = self.flows.get_mut(index)?;
        let item = flow.items.pop_front()?;
        let cost = item.frame.len() + OVERHEAD;
        flow.bytes -= cost;
        self.bytes -= cost;
        if flow.items.is_empty() {
            let flow = self.flows.remove(index);
            self.flow_by_key.remove(&flow.key);
            if self.turns.front() == Some(&index) {
                self.turns.pop_front();
            } else {
                self.turns.retain(|other| *other != index);
            }
            if self.spare.len() < 64 {
                self.spare.push(flow.items);
            }
        }
        Some(item.frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(flow: u8, length: usize) -> Bytes {
        Bytes::from(vec![flow; length])
    }

    #[test]
    fn one_flow_is_first_in_first_out() {
        let (mut queue, mut drops, now) = (FairQueue::default(), LinkDrops::default(), Instant::now());
        for number in 0..100 {
            queue.push(1, frame(number, 200), now, &mut drops);
        }
        for number in 0..100 {
            assert_eq!(queue.pop(now, &mut drops).map(|frame| frame[0]), Some(number));
        }
        assert_eq!((queue.pop(now, &mut drops), queue.bytes()), (None, 0));
        assert_eq!(drops, LinkDrops::default());
    }

    #[test]
    fn a_flood_does_not_make_others_wait_or_lose() {
        let (mut queue, mut drops, now) = (FairQueue::default(), LinkDrops::default(), Instant::now());
        for _ in 0..10_000 {
            queue.push(0, frame(0, 1200), now, &mut drops);
        }
        assert!(queue.bytes() <= MOST_BYTES);
        let flooded = drops.of(LinkDrop::QueueFull);
        assert!(flooded > 9_000);
        // Twenty calls of 200 bytes a packet come upon the full queue.
        for call in 1..=20 {
            for _ in 0..5 {
                queue.push(call.into(), frame(call, 200), now, &mut drops);
            }
        }
        // Five packets of 200 bytes are one turn: each call is through in the first round, behind one turn of the flood.
        let first: Vec<u8> = (0..102).filter_map(|_| queue.pop(now, &mut drops)).map(|frame| frame[0]).collect();
        let of_calls = first.iter().filter(|flow| **flow != 0).count();
        assert_eq!(of_calls, 100, "{first:?}");
        assert!(drops.of(LinkDrop::QueueFull) > flooded, "the flood made room");
    }

    #[test]
    fn flows_of_any_packet_size_get_the_same_bytes() {
        let (mut queue, mut drops, now) = (FairQueue::default(), LinkDrops::default(), Instant::now());
        for _ in 0..1_000 {
            queue.push(1, frame(1, 100), now, &mut drops);
        }
        for _ in 0..100 {
            queue.push(2, frame(2, 1_400), now, &mut drops);
        }
        let mut bytes = [0; 3];
        while bytes.iter().sum::<usize>() < 100_000 {
            let frame = queue.pop(now, &mut drops).expect("there are more");
            bytes[usize::from(frame[0])] += frame.len();
        }
        assert!(bytes[1].abs_diff(bytes[2]) < 3 * QUANTUM, "{bytes:?}");
    }

    #[test]
    fn the_oldest_of_the_longest_flow_goes_first() {
        let (mut queue, mut drops, now) = (FairQueue::default(), LinkDrops::default(), Instant::now());
        let mut number = 0u32;
        while drops.of(LinkDrop::QueueFull) == 0 {
            queue.push(1, Bytes::copy_from_slice(&number.to_be_bytes()), now, &mut drops);
            number += 1;
        }
        let first = queue.pop(now, &mut drops).expect("a full queue");
        assert_eq!(first[..], 1u32.to_be_bytes(), "number 0 was dropped");
    }

    #[test]
    fn what_has_waited_too_long_is_not_sent() {
        let (mut queue, mut drops, now) = (FairQueue::default(), LinkDrops::default(), Instant::now());
        for number in 1..=3 {
            queue.push(1, frame(number, 200), now, &mut drops);
        }
        queue.push(2, frame(4, 200), now, &mut drops);
        let later = now + TOO_OLD + Duration::from_millis(1);
        // The newest of each flow are left.
        assert_eq!(queue.pop(later, &mut drops).map(|frame| frame[0]), Some(3));
        let later = now + NEWEST_TOO_OLD + Duration::from_millis(1);
        assert_eq!(queue.pop(later, &mut drops), None);
        assert_eq!((drops.of(LinkDrop::TooOld), queue.bytes()), (3, 0));
    }

    #[test]
    fn where_the_network_lets_packets_wait_they_wait_less_here() {
        for (elsewhere, too_old) in [(0, 25), (15, 25), (25, 15), (60, 10)] {
            let (mut queue, mut drops, now) = (FairQueue::default(), LinkDrops::default(), Instant::now());
            queue.set_elsewhere(Duration::from_millis(elsewhere));
            for number in 1..=3 {
                queue.push(1, frame(number, 200), now, &mut drops);
            }
            let at = now + Duration::from_millis(too_old);
            assert_eq!(queue.pop(at, &mut drops).map(|frame| frame[0]), Some(1), "{elsewhere}");
            let later = at + Duration::from_millis(1);
            assert_eq!(queue.pop(later, &mut drops).map(|frame| frame[0]), Some(3), "{elsewhere}");
        }
    }

    #[test]
    fn memory_is_bounded_however_many_flows_there_are() {
        let (mut queue, mut drops, now) = (FairQueue::default(), LinkDrops::default(), Instant::now());
        for key in 0..100_000 {
            queue.push(key, frame(0, 1), now, &mut drops);
        }
        assert!(queue.bytes() <= MOST_BYTES && queue.flows.len() <= 2 * MOST_FLOWS);
        assert_eq!(queue.flows.len(), queue.turns.len());
        assert_eq!(queue.flow_by_key.len(), queue.turns.len());
        let waiting = MOST_BYTES / (OVERHEAD + 1);
        assert_eq!((queue.clear(), queue.bytes(), queue.is_empty()), (waiting, 0, true));
    }
}
