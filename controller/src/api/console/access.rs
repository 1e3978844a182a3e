//! Who is at the console, and so what may be done there.

use std::sync::Arc;

use axum::http::StatusCode;
use subtle::ConstantTimeEq as _;

use crate::api::params::Params;
use crate::api::rest::{ApiError, admit, too_often};
use crate::config::{ConsoleKey, ConsoleRole};
use crate::health::Health;
use crate::identity::{Identity, Role};
use crate::replica::Replica;

/// Name of those who have no console key, in the audit log.
const STRANGER: &str = "console";

/// The replica and who asks it: the holder of a console key, else a viewer without a name where an API key is given or none is
/// needed.
pub(super) fn visitor<'a>(health: &'a Health, params: &Params) -> Result<(&'a Arc<Replica>, Identity), ApiError> {
    let Some(replica) = health.replica() else {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, health.waiting_for()));
    };
    let given: Vec<&[u8]> = params.header_keys().collect();
    if let Some(person) = given.iter().find_map(|key| holder(&replica.console_keys, key)) {
        replica.limiter.answer(params.connected(&replica.trusted_proxies), None).map_err(too_often)?;
        let role = match person.role {
            ConsoleRole::Viewer => Role::Viewer,
            ConsoleRole::Operator => Role::Operator,
            ConsoleRole::Admin => Role::Admin,
        };
        return Ok((replica, Identity { role, name: person.name.clone() }));
    }
    let replica = admit(health, params)?;
    // Where everybody may look, a key that nobody has is still a mistake to be told of.
    if !given.is_empty() && replica.api_keys.is_empty() {
        return Err(ApiError::new(StatusCode::UNAUTHORIZED, "nobody has this console key"));
    }
    Ok((replica, Identity { role: Role::Viewer, name: STRANGER.to_owned() }))
}

/// Whose key it is. Every key is compared: the time says nothing about which one was close.
fn holder<'a>(keys: &'a [ConsoleKey], given: &[u8]) -> Option<&'a ConsoleKey> {
    keys.iter().fold(None, |found, key| if bool::from(key.key.as_bytes().ct_eq(given)) { Some(key) } else { found })
}
