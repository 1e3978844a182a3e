//! What an idle allocation costs in memory.

use anyhow::Result;
use serde::Serialize;
use turn_core::Transport;
use turnctl::bench::Caller;

use crate::machine;
use crate::servers::Server;
use crate::site::Site;

/// Times that all allocations are made and ended.
const FILLS: usize = 3;

/// What was measured, in bytes an allocation.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) server: &'static str,
    pub(crate) allocations: usize,
    /// Resident memory of the process over that of the empty one.
    pub(crate) resident: f64,
    /// Memory of the kernel: sockets and what belongs to them. The clients' own are not in it.
    pub(crate) kernel: f64,
    /// What the process has grown from the first time that it held all of them to the last.
    pub(crate) growth: f64,
}

impl Memory {
    pub(crate) fn line(&self) -> String {
        format!(
            "{:11} {} allocations: {:.0} bytes each, {:.0} in the kernel, growth {:.0}",
            self.server, self.allocations, self.resident, self.kernel, self.growth
        )
    }
}

/// Fills a fresh server with `allocations`, without a permission or a channel.
pub(crate) fn measure(site: &Site, server: &Server, allocations: usize) -> Result<Memory> {
    // It has served one, so that what it makes once is made.
    let mut first = Caller::new(server.address, Transport::Udp, site.clients.address, &server.account)?;
    first.allocate()?;
    first.release()?;
    let mut held = Vec::new();
    for fill in 0..FILLS {
        // A port of their own each time: some servers remember a client whose allocation has ended.
        let from = if fill % 2 == 0 { site.clients.address } else { site.peers.address };
        let callers = (0..allocations).map(|_| Caller::new(server.address, Transport::Udp, from, &server.account));
        let mut callers = callers.collect::<Result<Vec<Caller>, _>>()?;
        let before = (machine::resident(server.pid)?, machine::kernel_memory()?);
        for caller in &mut callers {
            caller.allocate()?;
        }
        held.push((before, (machine::resident(server.pid)?, machine::kernel_memory()?)));
        for caller in &mut callers {
            caller.release()?;
        }
    }
    let each = |after: u64, before: u64| (after as f64 - before as f64) / allocations as f64;
    let ((resident, kernel), (full, kernel_full)) = held[0];
    let (_, (full_at_last, _)) = held[FILLS - 1];
    Ok(Memory {
        server: server.name,
        allocations,
        resident: each(full, resident),
        kernel: each(kernel_full, kernel),
        growth: each(full_at_last, full),
    })
}
