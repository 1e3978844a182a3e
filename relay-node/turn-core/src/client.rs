//! A TURN client as a value, for probes and tests: the same contract as [`crate::Server`], from the other side.
