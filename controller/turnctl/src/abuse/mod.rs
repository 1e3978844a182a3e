//! Hostile input, and what a TURN server has to do about it: the table behind `turnctl abuse`.
//!
//! Rows and tools are those of [`crate::conform`]; after each of them the server has to answer a newcomer.
//!
//! | module | what it tries |
//! |---|---|
//! | `peers` | A: ways to addresses that are none of a client's business |
//! | `grammar` | B: bytes that are no messages |
//! | `login` | C: getting in without the right |
//! | `strangers` | D: using the server against others |
//! | `resources` | E: taking more than one's share |

mod grammar;
mod login;
mod peers;
mod resources;
mod strangers;

use crate::conform::check::Check;

/// Every check of abuse.
pub(crate) fn checks() -> Vec<&'static Check> {
    [
        peers::FORBIDDEN,
        peers::OTHERS,
        grammar::CHECKS,
        login::CHECKS,
        strangers::AMPLIFIED,
        strangers::CHECKS,
        resources::CHECKS,
    ]
    .into_iter()
    .flatten()
    .collect()
}
