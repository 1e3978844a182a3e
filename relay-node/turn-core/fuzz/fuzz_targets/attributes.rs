//! Any bytes as the value of each attribute: read or refused, and what is read is written back as bytes that are
//! written back the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turn_core::wire::attribute::{
    AccessToken, AdditionalAddressFamily, AlternateDomain, AlternateServer, ChangeRequest, ChannelNumber, ConnectionId,
    Data, DontFragment, EvenPort, Icmp, Lifetime, MappedAddress, MessageIntegrity, MessageIntegritySha256,
    MobilityTicket, Nonce, OtherAddress, Padding, PasswordAlgorithm, PasswordAlgorithms, Realm, RequestedAddressFamily,
    RequestedTransport, ReservationToken, ResponseOrigin, ResponsePort, Software, ThirdPartyAuthorization, Userhash,
    Username, XorMappedAddress, XorPeerAddress, XorRelayedAddress,
};
use turn_core::wire::error_code::AddressErrorCode;
use turn_core::wire::{Attribute, ErrorCode, TransactionId, UnknownAttributes};

const ROOM: usize = 1024;

/// The length of what was written, none if the value is malformed.
fn rewrite<'a, A: Attribute<'a>>(value: &'a [u8], id: &TransactionId, out: &mut [u8; ROOM]) -> Option<usize> {
    let read = A::decode(value, id)?;
    let len = read.value_len();
    read.encode(out.get_mut(..len)?, id);
    Some(len)
}

macro_rules! each {
    ($choice:expr, $value:expr, $id:expr, $($name:ty),* $(,)?) => {{
        let all: &[fn(&[u8], &TransactionId, &mut [u8; ROOM]) -> Option<usize>] =
            &[$(|value, id, out| rewrite::<$name>(value, id, out)),*];
        let rewrite = all[usize::from($choice) % all.len()];
        let (mut first, mut second) = ([0; ROOM], [0; ROOM]);
        if let Some(len) = rewrite($value, $id, &mut first) {
            assert_eq!(rewrite(&first[..len], $id, &mut second), Some(len));
            assert_eq!(first[..len], second[..len]);
        }
    }};
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&[choice, ref id @ ..], value)) = bytes.split_first_chunk::<13>() else { return };
    let id = TransactionId(*id);
    each!(
        choice,
        value,
        &id,
        AccessToken<'_>,
        AdditionalAddressFamily,
        AddressErrorCode,
        AlternateDomain<'_>,
        AlternateServer,
        ChangeRequest,
        ChannelNumber,
        ConnectionId,
        Data<'_>,
        DontFragment,
        ErrorCode,
        EvenPort,
        Icmp,
        Lifetime,
        MappedAddress,
        MessageIntegrity,
        MessageIntegritySha256<'_>,
        MobilityTicket<'_>,
        Nonce<'_>,
        OtherAddress,
        Padding<'_>,
        PasswordAlgorithm<'_>,
        PasswordAlgorithms<'_>,
        Realm<'_>,
        RequestedAddressFamily,
        RequestedTransport,
        ReservationToken,
        ResponseOrigin,
        ResponsePort,
        Software<'_>,
        ThirdPartyAuthorization<'_>,
        UnknownAttributes,
        Userhash,
        Username<'_>,
        XorMappedAddress,
        XorPeerAddress,
        XorRelayedAddress,
    );
});
