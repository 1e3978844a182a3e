//! STUN Binding over UDP from a socket of the caller's, timed.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use turn_core::wire::attribute::{ChangeRequest, MappedAddress, OtherAddress, XorMappedAddress};
use turn_core::wire::{Class, Message, MessageWriter, Method, TransactionId};

/// CHANGE-REQUEST's flags (RFC 5780 §7.2).
pub(crate) const CHANGE_IP: u32 = 4;
pub(crate) const CHANGE_PORT: u32 = 2;

/// First pause before a request is sent again; it doubles (RFC 8489 §6.2.1, shortened: it is measured, not relied on).
const RTO: Duration = Duration::from_millis(250);

/// What a server said.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Answer {
    /// How it sees us.
    pub(crate) mapped: SocketAddr,
    /// Its second address (RFC 5780 §7.4).
    pub(crate) other: Option<SocketAddr>,
    /// From the request that was answered to the answer.
    pub(crate) round_trip: Duration,
}

/// Asks `server` how it sees `socket`; `change` wants the answer from another of its addresses. `None` if nothing comes within
/// `patience`, or the server declines.
pub(crate) fn binding(
    socket: &UdpSocket,
    server: SocketAddr,
    change: u32,
    patience: Duration,
) -> io::Result<Option<Answer>> {
    let begun = Instant::now();
    // A transaction for each sending: its answer is of that request and no other.
    let mut sent: Vec<(TransactionId, Instant)> = Vec::new();
    let mut pause = RTO;
    let mut bytes = [0; 1500];
    while begun.elapsed() < patience {
        let mut id = [0; 12];
        getrandom::fill(&mut id).map_err(io::Error::other)?;
        let id = TransactionId(id);
        let len = request(&mut bytes, id, change)?;
        sent.push((id, Instant::now()));
        match socket.send_to(&bytes[..len], server) {
            Ok(_) => {}
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
        let deadline = (Instant::now() + pause).min(begun + patience);
        pause *= 2;
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            match socket.recv(&mut bytes) {
                Ok(len) => {
                    let Ok(message) = Message::parse(&bytes[..len]) else { continue };
                    let Some((_, at)) = sent.iter().find(|(id, _)| *id == message.transaction_id()) else { continue };
                    match message.class() {
                        Class::Success => return Ok(read(&message, at.elapsed())),
                        _ => return Ok(None),
                    }
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(None)
}

fn request(bytes: &mut [u8], id: TransactionId, change: u32) -> io::Result<usize> {
    let mut writer = MessageWriter::new(bytes, Class::Request, Method::Binding, id);
    if change != 0 {
        writer.attribute(&ChangeRequest(change));
    }
    writer.finish().map_err(io::Error::other)
}

fn read(message: &Message<'_>, round_trip: Duration) -> Option<Answer> {
    let xor = message.attribute::<XorMappedAddress>().ok()?.map(|mapped| mapped.0);
    let mapped = xor.or(message.attribute::<MappedAddress>().ok()?.map(|mapped| mapped.0))?;
    let other = message.attribute::<OtherAddress>().ok()?.map(|other| other.0);
    Some(Answer { mapped, other, round_trip })
}

/// A refused port is told by ICMP at the next call; a way that is not there may be at the next try.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::WouldBlock
            | Kind::TimedOut
            | Kind::Interrupted
            | Kind::ConnectionRefused
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::PermissionDenied
    )
}
