//! Chaos: a whole cluster under traffic while its parts are killed, frozen, cut off, filled up and set to other times by
//! a plan that a seed makes; during and after it the promises are checked one by one (plan.rs, faults.rs,
//! invariants.rs).
//!
//! A failure prints its seed and what was done when. To play it again:
//!
//! ```sh
//! TURNPIKE_CHAOS_SEED=7 TURNPIKE_CHAOS_SECONDS=60 tests/run -E 'test(calls_outlive_chaos)'
//! ```

mod evidence;
mod faults;
mod history;
mod invariants;
mod observe;
mod plan;
mod run;
mod site;
mod tools;
mod traffic;
