//! Three members.

use super::{Etcd, Extra};

/// An etcd of three members.
pub(crate) struct Trio {
    pub(crate) members: Vec<Etcd>,
}

impl Trio {
    pub(crate) async fn start() -> Self {
        Self::start_with(Extra::default()).await
    }

    pub(crate) async fn start_with(extra: Extra) -> Self {
        // Ports are free when asked for; should another process be faster, take others.
        for _ in 0..5 {
            let mut members: Vec<Etcd> = ["a", "b", "c"].map(|name| Etcd::new(name, extra.clone())).into();
            let cluster: Vec<String> =
                members.iter().map(|member| format!("{}={}", member.name, member.peer_url())).collect();
            for member in &mut members {
                member.cluster = cluster.join(",");
                member.spawn();
            }
            let mut trio = Self { members };
            let mut answering = 0;
            for member in &mut trio.members {
                answering += usize::from(member.answers().await);
            }
            if answering == 3 {
                return trio;
            }
        }
        panic!("three members of etcd do not start; is the package etcd-server installed?");
    }

    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Etcd::endpoint).collect()
    }

    /// Which member leads.
    pub(crate) async fn leader(&self) -> usize {
        for (n, member) in self.members.iter().enumerate() {
            let status = member.client().await.status().await.expect("a member's status");
            if status.header().is_some_and(|header| header.member_id() == status.leader()) {
                return n;
            }
        }
        panic!("no member leads");
    }
}
