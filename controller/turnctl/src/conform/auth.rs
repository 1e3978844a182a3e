//! RFC 8489 §9.2.4, the long-term credential mechanism, in its order; RFC 8656 §5 on who may do what.

use turn_core::wire::AttributeType as A;

use super::check::{Check, Step, expect, fail, must, should};
use super::client::{Client, expect_code};
use super::craft::{ALLOCATE, CHANNEL_BIND, CREATE_PERMISSION, Craft, REFRESH};
use super::lab::{Lab, Login};
use super::reply::Reply;
use super::stun::unknown_types;

const UNKNOWN: A = A(0x7F19);

pub(super) const CHECKS: &[Check] = &[
    must("challenge-allocate", "RFC 8489 §9.2.4", "an unsigned Allocate is 401", |lab| unsigned(lab, ALLOCATE)),
    must("challenge-refresh", "RFC 8489 §9.2.4", "an unsigned Refresh is 401, not 437", |lab| unsigned(lab, REFRESH)),
    must("challenge-permission", "RFC 8489 §9.2.4", "an unsigned CreatePermission is 401, not 437", |lab| {
        unsigned(lab, CREATE_PERMISSION)
    }),
    must("challenge-channel", "RFC 8489 §9.2.4", "an unsigned ChannelBind is 401, not 437", |lab| {
        unsigned(lab, CHANNEL_BIND)
    }),
    must("challenge-contents", "RFC 8489 §9.2.4", "a 401 holds REALM and NONCE", contents),
    should("challenge-bare", "RFC 8489 §9.2.4", "a 401 holds no USERNAME and no integrity", bare),
    must("realm-length", "RFC 8489 §14.9", "REALM has at most 127 characters", realm_length),
    must("nonce-length", "RFC 8489 §14.10", "NONCE has at most 127 characters", nonce_length),
    must("nonce-cookie", "RFC 8656 §5", "NONCE starts with obMatJos2 and four characters of base64", nonce_cookie),
    must("nonce-own", "RFC 8489 §9.2.4", "two clients never get the same nonce", nonce_own),
    must("missing-username", "RFC 8489 §9.2.4", "integrity without USERNAME is 400", |lab| missing(lab, A::USERNAME)),
    must("missing-realm", "RFC 8489 §9.2.4", "integrity without REALM is 400", |lab| missing(lab, A::REALM)),
    must("missing-nonce", "RFC 8489 §9.2.4", "integrity without NONCE is 400", |lab| missing(lab, A::NONCE)),
    should("missing-bare", "RFC 8489 §9.2.4", "such a 400 holds no NONCE and no REALM", missing_bare),
    must("unknown-user", "RFC 8489 §9.2.4", "an unknown user is 401 with REALM and NONCE", unknown_user),
    must("wrong-password", "RFC 8489 §9.2.4", "a wrong password is 401 with REALM and NONCE", wrong_password),
    must("integrity-first", "RFC 8489 §9.2.4", "a wrong password with a stale nonce is 401, not 438", integrity_first),
    must("integrity-short", "RFC 8489 §14.5", "a MESSAGE-INTEGRITY of 16 bytes does not authenticate", integrity_short),
    must("integrity-covers", "RFC 8489 §14.5", "a changed attribute before MESSAGE-INTEGRITY is 401", covers),
    must("stale-nonce", "RFC 8489 §9.2.4", "a nonce nobody gave out is 438 with REALM and a NONCE", stale_nonce),
    must("stale-nonce-valid", "RFC 8489 §9.2.4", "the NONCE of a 438 is valid", stale_nonce_valid),
    must("nonce-other-address", "RFC 8489 §9.2.4", "the nonce of another client is 438", nonce_of_another),
    must("auth-before-unknown", "RFC 8489 §6.3", "authentication comes before unknown attributes", auth_first),
    must("signed-success", "RFC 8489 §9.2.4", "the answer to a signed request is signed", signed_success),
    must("signed-error", "RFC 8489 §9.2.4", "errors after authentication are signed too", signed_error),
    should("signed-bare", "RFC 8489 §9.2.4", "such an answer holds no REALM, NONCE or USERNAME", signed_bare),
    must("after-integrity-lifetime", "RFC 8489 §14.5", "a LIFETIME of 0 behind MESSAGE-INTEGRITY is ignored", |lab| {
        after_integrity(lab)
    }),
    must(
        "after-integrity-unknown",
        "RFC 8489 §14.5",
        "an unknown attribute behind MESSAGE-INTEGRITY is ignored",
        after_integrity_unknown,
    ),
    must(
        "after-integrity-peer",
        "RFC 8489 §14.5",
        "a peer behind MESSAGE-INTEGRITY gets no permission",
        after_integrity_peer,
    ),
    must("integrity-fingerprint", "RFC 8489 §14.7", "FINGERPRINT may follow MESSAGE-INTEGRITY", with_fingerprint),
    must("other-user", "RFC 8656 §5", "another user's request on an allocation is 441", other_user),
    must("other-user-delete", "RFC 8656 §5", "another user cannot delete an allocation", other_user_delete),
    must("no-allocation-refresh", "RFC 8656 §5", "a signed Refresh without an allocation is 437", |lab| {
        lab.client()?.expect(437, Craft::request(REFRESH)).map(drop)
    }),
    must("no-allocation-permission", "RFC 8656 §5", "a signed CreatePermission without an allocation is 437", |lab| {
        let peer = lab.peer()?;
        lab.client()?.expect(437, Craft::request(CREATE_PERMISSION).peer(peer.address)).map(drop)
    }),
    must("no-allocation-channel", "RFC 8656 §5", "a signed ChannelBind without an allocation is 437", |lab| {
        let peer = lab.peer()?;
        lab.client()?.expect(437, Craft::request(CHANNEL_BIND).channel(0x4000).peer(peer.address)).map(drop)
    }),
    must(
        "signed-unknown",
        "RFC 8489 §6.3.1",
        "a signed request with an unknown attribute is 420 with its list",
        |lab| {
            let mut client = lab.client()?;
            let reply = client.signed(lab.allocate().attr(UNKNOWN, b"?"))?;
            expect_code(&reply, 420)?;
            let types = unknown_types(&reply);
            expect(types == [UNKNOWN.0], || format!("UNKNOWN-ATTRIBUTES lists {types:#06x?}"))
        },
    ),
];

fn unsigned(lab: &Lab<'_>, method: u16) -> Step {
    let peer = lab.peer()?.address;
    let request = match method {
        ALLOCATE => lab.allocate(),
        REFRESH => Craft::request(REFRESH),
        CREATE_PERMISSION => Craft::request(method).peer(peer),
        _ => Craft::request(method).channel(0x4000).peer(peer),
    };
    expect_code(&lab.stranger()?.ask(&request)?, 401)
}

fn challenged(reply: &Reply, code: u16) -> Step {
    expect_code(reply, code)?;
    let filled = |attribute| reply.get(attribute).is_some_and(|value| !value.is_empty());
    expect(filled(A::REALM) && filled(A::NONCE), || format!("{reply} without REALM or NONCE"))
}

fn contents(lab: &Lab<'_>) -> Step {
    challenged(&lab.stranger()?.ask(&lab.allocate())?, 401)
}

fn bare(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&lab.allocate())?;
    let none = [A::USERNAME, A::USERHASH, A::MESSAGE_INTEGRITY, A::MESSAGE_INTEGRITY_SHA256];
    expect(!none.iter().any(|attribute| reply.has(*attribute)), || "it holds one of them".into())
}

fn realm_length(lab: &Lab<'_>) -> Step {
    length(&lab.client()?.credentials.realm)
}

fn nonce_length(lab: &Lab<'_>) -> Step {
    length(&lab.client()?.credentials.nonce)
}

fn length(value: &[u8]) -> Step {
    let characters = String::from_utf8_lossy(value).chars().count();
    expect((1..128).contains(&characters), || format!("{characters} characters"))
}

fn nonce_cookie(lab: &Lab<'_>) -> Step {
    let nonce = lab.client()?.credentials.nonce.clone();
    let features = nonce.strip_prefix(b"obMatJos2").and_then(|rest| rest.get(..4));
    let base64 = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/".contains(byte);
    expect(features.is_some_and(|features| features.iter().all(base64)), || {
        format!("the nonce is {:?}", String::from_utf8_lossy(&nonce))
    })
}

fn nonce_own(lab: &Lab<'_>) -> Step {
    let (first, second) = (lab.client()?, lab.client()?);
    expect(first.credentials.nonce != second.credentials.nonce, || "both got the same".into())
}

/// A request with integrity, but without one of what belongs to it.
fn without(client: &mut Client, lab: &Lab<'_>, missing: A) -> Step<Reply> {
    let with = client.credentials.clone();
    let mut request = lab.allocate();
    for (attribute, value) in [(A::USERNAME, &with.username), (A::REALM, &with.realm), (A::NONCE, &with.nonce)] {
        if attribute != missing {
            request = request.attr(attribute, value);
        }
    }
    client.ask(&request.integrity(&with.key()))
}

fn missing(lab: &Lab<'_>, attribute: A) -> Step {
    let mut client = lab.client()?;
    expect_code(&without(&mut client, lab, attribute)?, 400)
}

fn missing_bare(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let reply = without(&mut client, lab, A::USERNAME)?;
    expect(!reply.has(A::NONCE) && !reply.has(A::REALM), || format!("{reply} holds them"))
}

fn unknown_user(lab: &Lab<'_>) -> Step {
    let nobody = Login { username: b"nobody-of-this-name".to_vec(), password: b"anything".to_vec() };
    let mut client = lab.client_of(nobody)?;
    challenged(&client.signed(lab.allocate())?, 401)
}

fn wrong_password(lab: &Lab<'_>) -> Step {
    let user = Login { password: b"not the password".to_vec(), ..lab.user() };
    let mut client = lab.client_of(user)?;
    challenged(&client.signed(lab.allocate())?, 401)
}

fn integrity_first(lab: &Lab<'_>) -> Step {
    let user = Login { password: b"not the password".to_vec(), ..lab.user() };
    let mut client = lab.client_of(user)?;
    client.credentials.nonce = b"a nonce nobody gave out".to_vec();
    let request = client.credentials.sign(lab.allocate());
    expect_code(&client.ask(&request)?, 401)
}

fn integrity_short(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.names(lab.allocate()).attr(A::MESSAGE_INTEGRITY, &[7; 16]);
    let reply = client.ask(&request)?;
    expect(matches!(reply.code(), 400 | 401), || format!("{reply}"))
}

fn covers(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let mut bytes = client.credentials.sign(lab.allocate().attr(A::SOFTWARE, b"abcd")).into_bytes();
    let at = bytes.windows(4).position(|window| window == b"abcd").unwrap_or(20);
    bytes[at] ^= 1;
    expect_code(&client.ask_bytes(&bytes)?, 401)
}

fn stale(lab: &Lab<'_>) -> Step<(Client, Reply)> {
    let mut client = lab.client()?;
    client.credentials.nonce = b"a nonce nobody gave out".to_vec();
    let request = client.credentials.sign(lab.allocate());
    let reply = client.ask(&request)?;
    Ok((client, reply))
}

fn stale_nonce(lab: &Lab<'_>) -> Step {
    challenged(&stale(lab)?.1, 438)
}

fn stale_nonce_valid(lab: &Lab<'_>) -> Step {
    let (mut client, reply) = stale(lab)?;
    expect_code(&reply, 438)?;
    client.credentials.nonce = reply.get(A::NONCE).unwrap_or_default().to_vec();
    let request = client.credentials.sign(lab.allocate());
    expect_code(&client.ask(&request)?, 0)
}

fn nonce_of_another(lab: &Lab<'_>) -> Step {
    let first = lab.client()?;
    let mut second = lab.stranger()?;
    second.credentials = first.credentials.clone();
    let request = second.credentials.sign(lab.allocate());
    let reply = second.ask(&request)?;
    match reply.code() {
        // A nonce per client cannot be valid for another; the same for both would already be wrong.
        438 => Ok(()),
        0 => fail("it was accepted"),
        _ => fail(format!("{reply} instead of 438")),
    }
}

fn auth_first(lab: &Lab<'_>) -> Step {
    expect_code(&lab.stranger()?.ask(&lab.allocate().attr(UNKNOWN, b"?"))?, 401)
}

/// Signed the way the request was.
pub(super) fn signed(client: &Client, reply: &Reply) -> Step {
    expect(reply.signed_by(&client.credentials.key()), || match reply.has(A::MESSAGE_INTEGRITY) {
        true => format!("the MESSAGE-INTEGRITY of {reply} is wrong"),
        false => format!("{reply} without MESSAGE-INTEGRITY"),
    })
}

fn signed_success(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let reply = client.allocate(lab.allocate())?;
    signed(&client, &reply)?;
    let reply = client.expect(0, Craft::request(REFRESH))?;
    signed(&client, &reply)
}

fn signed_error(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let reply = client.signed(Craft::request(ALLOCATE))?;
    signed(&client, &reply)?;
    let reply = client.signed(Craft::request(REFRESH))?;
    signed(&client, &reply)?;
    let reply = client.signed(lab.allocate().attr(UNKNOWN, b"?"))?;
    signed(&client, &reply)
}

fn signed_bare(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let reply = client.allocate(lab.allocate())?;
    let none = [A::USERNAME, A::USERHASH, A::REALM, A::NONCE];
    expect(!none.iter().any(|attribute| reply.has(*attribute)), || "it holds one of them".into())
}

fn after_integrity(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let request = client.credentials.sign(Craft::request(REFRESH)).word(A::LIFETIME, 0);
    let reply = client.ask(&request)?;
    expect_code(&reply, 0)?;
    if reply.word(A::LIFETIME) == Some(0) {
        return fail("the allocation was deleted by an attribute that nobody signed");
    }
    client.expect(0, Craft::request(REFRESH)).map(drop)
}

fn after_integrity_unknown(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(lab.allocate()).attr(UNKNOWN, b"?");
    expect_code(&client.ask(&request)?, 0)
}

fn after_integrity_peer(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    let request = client.credentials.sign(Craft::request(CREATE_PERMISSION)).peer(peer.address);
    // Without the unsigned peer there is none.
    expect_code(&client.ask(&request)?, 400)
}

fn with_fingerprint(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(lab.allocate()).fingerprint();
    expect_code(&client.ask(&request)?, 0)
}

/// A client with an allocation, and a request of another user on it.
fn intruding(lab: &Lab<'_>, request: Craft) -> Step<(Client, Reply)> {
    let Login { username, password } = lab.other_user()?;
    let mut client = lab.allocation()?;
    let mut other = client.credentials.clone();
    (other.username, other.password) = (username, password);
    let request = other.sign(request);
    let reply = client.ask(&request)?;
    Ok((client, reply))
}

fn other_user(lab: &Lab<'_>) -> Step {
    let peer = lab.peer()?;
    expect_code(&intruding(lab, Craft::request(CREATE_PERMISSION).peer(peer.address))?.1, 441)
}

fn other_user_delete(lab: &Lab<'_>) -> Step {
    let (mut client, reply) = intruding(lab, Craft::request(REFRESH).word(A::LIFETIME, 0))?;
    expect_code(&reply, 441)?;
    client.expect(0, Craft::request(REFRESH)).map(drop)
}
