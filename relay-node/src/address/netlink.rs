//! The kernel's addresses and interfaces.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, CacheInfo};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::RouteType;
use rtnetlink::{AddressMessageBuilder, Handle, MulticastGroup, RouteMessageBuilder, new_multicast_connection};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::frame::Mac;

/// A conversation with the kernel; ends with this value.
pub struct Netlink {
    handle: Handle,
    changed: Arc<Notify>,
    talking: [JoinHandle<()>; 2],
}

/// An interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its hardware address; zeros where it has none.
    pub mac: Mac,
    /// Whether it is up and connected.
    pub carrier: bool,
}

impl Netlink {
    /// Begins to follow addresses and interfaces.
    ///
    /// # Errors
    /// As socket(2) and bind(2).
    pub fn open() -> io::Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, handle, mut messages) = new_multicast_connection(&groups)?;
        let changed = Arc::new(Notify::new());
        let tell = Arc::clone(&changed);
        // Taken at once, so that nothing heaps up while nobody waits.
        let listening = tokio::spawn(async move {
            while messages.next().await.is_some() {
                tell.notify_one();
            }
        });
        Ok(Self { handle, changed, talking: [tokio::spawn(connection), listening] })
    }

    /// Something about an address or interface has changed. May be dropped and called again.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Whether this machine has the address, whatever the interface: what the kernel would deliver to a socket here.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn is_local(&self, address: IpAddr) -> Result<bool, rtnetlink::Error> {
        let message = match address {
            IpAddr::V4(ip) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(ip, 32).build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(ip, 128).build(),
        };
        match self.handle.route().get(message).execute().try_next().await {
            Ok(route) => Ok(route.is_some_and(|route| route.header.kind == RouteType::Local)),
            // There is no way to it at all.
            Err(rtnetlink::Error::NetlinkError(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// An interface by its name.
    ///
    /// # Errors
    /// There is none, or the kernel does not answer.
    pub async fn link(&self, name: &str) -> Result<Link, rtnetlink::Error> {
        let message = self.handle.link().get().match_name(name.into()).execute().try_next().await?;
        let message = message.ok_or(rtnetlink::Error::RequestFailed)?;
        let carrier = message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp);
        Ok(Link { index: message.header.index, mac: mac_of(&message).unwrap_or(Mac([0; 6])), carrier })
    }

    /// Hardware addresses of all interfaces: a machine with two in one network answers on either.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn macs(&self) -> Result<HashSet<Mac>, rtnetlink::Error> {
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await?;
        Ok(links.iter().filter_map(mac_of).collect())
    }

    /// Puts an address on an interface for `lifetime` (whole seconds), or renews it.
    ///
    /// # Errors
    /// No CAP_NET_ADMIN, or no such interface.
    pub async fn raise(
        &self,
        index: u32,
        address: IpAddr,
        prefix: u8,
        lifetime: Duration,
    ) -> Result<(), rtnetlink::Error> {
        let mut request = self.handle.address().add(index, address, prefix).replace();
        let valid = u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX);
        // Of IPv6 a preferred life of zero: nobody on this machine takes it for the source of anything else.
        let preferred = if address.is_ipv6() { 0 } else { valid };
        let mut life = CacheInfo::default();
        (life.ifa_preferred, life.ifa_valid) = (preferred, valid);
        let attributes = &mut request.message_mut().attributes;
        attributes.push(AddressAttribute::CacheInfo(life));
        // Whose it is has been settled: duplicate address detection would cost a second.
        attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        request.execute().await
    }

    /// Takes an address off an interface; taking off none is fine.
    ///
    /// # Errors
    /// No CAP_NET_ADMIN.
    pub async fn lower(&self, index: u32, address: IpAddr, prefix: u8) -> Result<(), rtnetlink::Error> {
        let message = match address {
            IpAddr::V4(ip) => {
                AddressMessageBuilder::<std::net::Ipv4Addr>::new().index(index).address(ip, prefix).build()
            }
            IpAddr::V6(ip) => {
                AddressMessageBuilder::<std::net::Ipv6Addr>::new().index(index).address(ip, prefix).build()
            }
        };
        match self.handle.address().del(message).execute().await {
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::EADDRNOTAVAIL => Ok(()),
            other => other,
        }
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.talking.iter().for_each(JoinHandle::abort);
    }
}

fn mac_of(link: &LinkMessage) -> Option<Mac> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_tells_what_is_local() -> Result<(), Box<dyn std::error::Error>> {
        let netlink = Netlink::open()?;
        for (address, local) in [("127.0.0.1", true), ("127.9.8.7", true), ("::1", true), ("192.0.2.77", false)] {
            assert_eq!(netlink.is_local(address.parse()?).await?, local, "{address}");
        }
        assert_eq!(netlink.link("lo").await?.mac, Mac([0; 6]));
        assert!(netlink.link("no-such-link").await.is_err());
        assert!(netlink.macs().await?.contains(&Mac([0; 6])));
        Ok(())
    }
}
