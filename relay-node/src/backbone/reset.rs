//! How a relay that has restarted tells others so: what is for a connection it does not know it answers with a stateless
//! reset (RFC 9000 §10.3) under the same key as before, made from the key of its certificate. The others dial at once,
//! rather than find out by silence.

use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use quinn::EndpointConfig;
use quinn_proto::crypto::{CryptoError, HmacKey};
use quinn_proto::{ConnectionIdGenerator, RandomConnectionIdGenerator};
use sha2::Sha256;

use super::settings::Identity;

/// Tells the key from others that may be made of the same secret.
const LABEL: &[u8] = b"turnpike backbone reset";
/// Connections of an endpoint are told apart by so many random bytes.
const CONNECTION_ID: usize = 8;

/// The configuration of the endpoints of a relay.
pub(super) fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let secret = mac(&identity.key, LABEL).finalize().into_bytes().into();
    let mut config = EndpointConfig::new(Arc::new(ResetKey(secret)));
    // QUIC's own generator marks what it makes, and says nothing to what another process has made.
    config
        .cid_generator(|| Box::new(RandomConnectionIdGenerator::new(CONNECTION_ID)) as Box<dyn ConnectionIdGenerator>);
    config
}

struct ResetKey([u8; 32]);

fn mac(key: &[u8], data: &[u8]) -> Hmac<Sha256> {
    // Keys of any length are taken.
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap_or_else(|_| Hmac::new(&Default::default()));
    mac.update(data);
    mac
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature: &mut [u8]) {
        for (into, byte) in signature.iter_mut().zip(mac(&self.0, data).finalize().into_bytes()) {
            *into = byte;
        }
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        mac(&self.0, data).verify_slice(signature).map_err(|_| CryptoError)
    }
}
