//! What QUIC is told about a link: its transport parameters, and its congestion control.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::congestion::{INITIAL_WINDOW, PrivateLink};

/// A connection without a sign of life ends; the link has been left long before.
const IDLE: VarInt = VarInt::from_u32(10_000);
/// Short: what is kept waiting is kept in the fair queue. QUIC drops the oldest.
const SEND_BUFFER: usize = 16 << 10;
/// Path MTU discovery takes the loss of an overload for a black hole at times, and packets that do not fit are cut in two.
const BLACK_HOLE: Duration = Duration::from_secs(2);
/// Long: a burst waits here while the thread is busy.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Every path carries it (RFC 9000 §14); more is found by trying.
const INITIAL_MTU: u16 = 1200;
/// A guess; the handshake measures it.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Packets that one acknowledgement answers for: each costs both ends about as much as a packet.
const ACKNOWLEDGED_TOGETHER: VarInt = VarInt::from_u32(8);

/// What a connection goes over.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// What it shares with others.
    Internet,
    /// What is its own.
    Private {
        /// Bits per second, where it is known.
        capacity: Option<u64>,
    },
    /// A third member.
    Detour,
}

/// Of a connection.
pub(super) fn transport(kind: Kind) -> Arc<TransportConfig> {
    let mut acknowledgements = AckFrequencyConfig::default();
    acknowledgements.ack_eliciting_threshold(ACKNOWLEDGED_TOGETHER);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.black_hole_cooldown(BLACK_HOLE);
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(IdleTimeout::from(IDLE)))
        .datagram_send_buffer_size(SEND_BUFFER)
        .datagram_receive_buffer_size(Some(RECEIVE_BUFFER))
        .initial_mtu(INITIAL_MTU)
        .mtu_discovery_config(Some(mtu))
        .initial_rtt(INITIAL_RTT)
        .ack_frequency_config(Some(acknowledgements))
        // Frames are datagrams: nobody opens a stream.
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0));
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW);
    match kind {
        Kind::Internet => config.congestion_controller_factory(Arc::new(cubic)),
        Kind::Private { capacity } => {
            let capacity = capacity.map(|bits| bits / 8);
            config.congestion_controller_factory(Arc::new(PrivateLink { capacity }))
        }
        // What is longer is cut in two on the way.
        Kind::Detour => {
            config.congestion_controller_factory(Arc::new(cubic)).mtu_discovery_config(None::<MtuDiscoveryConfig>)
        }
    };
    Arc::new(config)
}
