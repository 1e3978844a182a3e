//! C: getting in without the right.

use turn_core::wire::AttributeType as A;

use crate::conform::check::{Check, Step, expect, fail, must, not_applicable};
use crate::conform::client::expect_code;
use crate::conform::craft::{ALLOCATE, CREATE_PERMISSION, Craft, REFRESH};
use crate::conform::lab::{Lab, Login, Users, rest_login, rest_login_named};

const SECTION: &str = "abuse C, RFC 8489 §9.2.4";

pub(super) const CHECKS: &[Check] = &[
    must("login-look-alike", SECTION, "unknown user and wrong password get answers of one form", look_alike),
    must("login-empty-key", SECTION, "a signature under an empty key does not authenticate", empty_key),
    must("login-empty-password", SECTION, "an empty password does not authenticate", |lab| {
        refused(lab, |login| login.password.clear())
    }),
    must("login-suffix", SECTION, "a name with a NUL behind it is another name", |lab| {
        refused(lab, |login| login.username.push(0))
    }),
    must("login-prefix", SECTION, "the first half of a name is another name", |lab| {
        refused(lab, |login| login.username.truncate(login.username.len() / 2))
    }),
    must("login-zero-mac", SECTION, "a MAC of zeros does not authenticate", |lab| mac(lab, &[0; 20])),
    must("login-empty-mac", SECTION, "an empty MAC does not authenticate", |lab| mac(lab, &[])),
    must("login-long-mac", SECTION, "a right MAC with bytes behind it does not authenticate", long_mac),
    must("login-two-macs", SECTION, "a right MAC behind a wrong one does not authenticate", two_macs),
    must("login-replay", SECTION, "a signed request sent again from another address is refused", replay),
    must("login-replay-delete", SECTION, "nor does it end the allocation it was made for", replay_delete),
    must("login-unsigned-later", SECTION, "what was authenticated once is not believed unsigned later", unsigned_later),
    must("login-signed-refusals", SECTION, "403, 400 and 443 on an allocation are signed", signed_refusals),
    must("login-expired", "abuse C", "a TURN REST name of the past is 401", |lab| {
        rest(lab, |secret| rest_login(secret, "late", -60))
    }),
    must("login-negative", "abuse C", "a negative time is 401", |lab| {
        rest(lab, |secret| rest_login_named(secret, b"-4102444800:x".to_vec()))
    }),
    must("login-overflow", "abuse C", "a time that overflows is 401", |lab| {
        rest(lab, |secret| rest_login_named(secret, b"99999999999999999999999:x".to_vec()))
    }),
    must("login-no-time", "abuse C", "a name without time is 401", |lab| {
        rest(lab, |secret| rest_login_named(secret, b"no-time-at-all".to_vec()))
    }),
    must("login-empty-time", "abuse C", "a name with an empty time is 401", |lab| {
        rest(lab, |secret| rest_login_named(secret, b":x".to_vec()))
    }),
    must("login-strange-time", "abuse C", "hexadecimal, signs and blanks are no time: 401", |lab| {
        for name in [&b"0x7fffffff:x"[..], b"+4102444800:x", b" 4102444800:x", b"4e9:x"] {
            let Users::Rest(secret) = &lab.target.users else { return not_applicable("needs --secret") };
            let mut client = lab.client_of(rest_login_named(secret, name.to_vec()))?;
            expect_code(&client.signed(lab.allocate())?, 401)?;
        }
        Ok(())
    }),
];

fn look_alike(lab: &Lab<'_>) -> Step {
    let name = lab.user().username;
    let mut unknown = name.clone();
    if let Some(last) = unknown.last_mut() {
        *last ^= 1;
    }
    let mut forms = Vec::new();
    for username in [name, unknown] {
        let mut client = lab.client_of(Login { username, password: b"not the password".to_vec() })?;
        let reply = client.signed(lab.allocate())?;
        forms.push((reply.code(), reply.bytes().len(), reply.types().collect::<Vec<_>>()));
    }
    expect(forms[0] == forms[1], || {
        format!("{} of {} bytes, {} of {} bytes", forms[0].0, forms[0].1, forms[1].0, forms[1].1)
    })
}

fn empty_key(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.names(lab.allocate()).integrity(&[]);
    expect_code(&client.ask(&request)?, 401)
}

fn refused(lab: &Lab<'_>, change: fn(&mut Login)) -> Step {
    let mut login = lab.user();
    change(&mut login);
    let mut client = lab.client_of(login)?;
    expect_code(&client.signed(lab.allocate())?, 401)
}

fn mac(lab: &Lab<'_>, mac: &[u8]) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.names(lab.allocate()).attr(A::MESSAGE_INTEGRITY, mac);
    let reply = client.ask(&request)?;
    expect(matches!(reply.code(), 400 | 401), || format!("{reply}"))
}

fn long_mac(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let mut bytes = client.credentials.sign(lab.allocate()).into_bytes();
    // The attribute's length 24 instead of 20, four bytes behind it.
    let at = bytes.len() - 24;
    bytes[at + 3] = 24;
    bytes.extend([0; 4]);
    let len = u16::try_from(bytes.len() - 20).unwrap_or_default();
    bytes[2..4].copy_from_slice(&len.to_be_bytes());
    let reply = client.ask_bytes(&bytes)?;
    expect(matches!(reply.code(), 400 | 401), || format!("{reply}"))
}

fn two_macs(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.names(lab.allocate()).attr(A::MESSAGE_INTEGRITY, &[9; 20]);
    let request = request.integrity(&client.credentials.key());
    let reply = client.ask(&request)?;
    expect(matches!(reply.code(), 400 | 401), || format!("{reply}"))
}

fn replay(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(lab.allocate());
    expect_code(&client.ask(&request)?, 0)?;
    let reply = lab.stranger()?.ask(&request)?;
    match reply.code() {
        0 => fail("it made an allocation"),
        _ => Ok(()),
    }
}

fn replay_delete(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let request = client.credentials.sign(Craft::request(REFRESH).word(A::LIFETIME, 0));
    let reply = lab.stranger()?.ask(&request)?;
    expect(reply.code() != 0, || "success".into())?;
    client.expect(0, Craft::request(REFRESH)).map(drop)
}

fn unsigned_later(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    for request in [
        Craft::request(REFRESH).word(A::LIFETIME, 0),
        Craft::request(CREATE_PERMISSION).peer(peer.address),
        Craft::request(ALLOCATE),
    ] {
        expect_code(&client.ask(&request)?, 401)?;
    }
    client.expect(0, Craft::request(REFRESH)).map(drop)
}

fn signed_refusals(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let key = client.credentials.key();
    for request in [
        Craft::request(CREATE_PERMISSION),
        Craft::request(CREATE_PERMISSION).peer(lab.other_family()),
        Craft::request(CREATE_PERMISSION).peer(([240, 0, 0, 1], 9).into()),
    ] {
        let reply = client.signed(request)?;
        expect(reply.code() == 0 || reply.signed_by(&key), || format!("{reply} without its signature"))?;
    }
    Ok(())
}

fn rest(lab: &Lab<'_>, login: fn(&[u8]) -> Login) -> Step {
    let Users::Rest(secret) = &lab.target.users else { return not_applicable("needs --secret") };
    let mut client = lab.client_of(login(secret))?;
    expect_code(&client.signed(lab.allocate())?, 401)
}
