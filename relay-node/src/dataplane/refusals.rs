//! Connections that were closed before they were of any use, counted by reason.

/// Why a connection was closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Refusal {
    /// Its source prefix has as many connections without an allocation as it may.
    Prefix,
    /// It was the oldest of too many that had not shown what they are, or not ended their handshake.
    HalfOpen,
    /// It did not say what it is, or not end its handshake, in time.
    Slow,
    /// Its first bytes are not STUN, ChannelData, TLS or a PROXY header that is believed.
    Nonsense,
    /// Its PROXY header is malformed.
    ProxyHeader,
    /// Its TLS handshake failed.
    Handshake,
    /// It is for the web server, which has as many connections as it may.
    WebServerBusy,
}

/// Labels, in the order of [`Refusal`].
const LABELS: [&str; 7] =
    ["prefix_limit", "half_open_limit", "slow", "nonsense", "proxy_header", "tls_handshake", "web_server_busy"];

/// The counters of a worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals([u64; LABELS.len()]);

impl Refusals {
    pub(super) fn count(&mut self, refusal: Refusal) {
        self.0[refusal as usize] += 1;
    }

    /// Every label, those without a count too: alerts need a zero to start from.
    pub(super) fn snapshot(&self) -> Vec<(&'static str, u64)> {
        LABELS.into_iter().zip(self.0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_name_what_they_count() {
        let mut refusals = Refusals::default();
        refusals.count(Refusal::Prefix);
        refusals.count(Refusal::WebServerBusy);
        refusals.count(Refusal::WebServerBusy);
        let counted: Vec<_> = refusals.snapshot().into_iter().filter(|(_, count)| *count != 0).collect();
        assert_eq!(counted, [("prefix_limit", 1), ("web_server_busy", 2)]);
    }
}
