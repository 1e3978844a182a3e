//! NAT behaviour discovery (RFC 5780), over four sockets on two addresses.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result};
use relay_node::dataplane::{DataplaneConfig, DiscoveryAddress, Listen};
use turn_core::Transport;
use turn_core::wire::attribute::{ChangeRequest, OtherAddress, ResponseOrigin, XorMappedAddress};
use turn_core::wire::{Class, Message, MessageWriter, Method, TransactionId};

use crate::client::{PATIENCE, config, start};

#[test]
fn answers_leave_from_the_socket_that_is_asked_for() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (one, other) = ("127.1.6.1", "127.1.6.2");
    // Ports of this process's own: the sockets on every address would be in the way of another one's.
    let port = 11_000 + 2 * (std::process::id() % 4000) as u16;
    for ips in [&[one, other][..], &["0.0.0.0"]] {
        let address = |ip: &str, port: u16| -> Result<DiscoveryAddress> {
            let bound = SocketAddr::new(ip.parse()?, port);
            // Behind a one-to-one NAT.
            let advertised = SocketAddr::new(ip.replace("127.1.6", "198.51.100").parse()?, port);
            Ok(DiscoveryAddress { bound, advertised })
        };
        let addresses =
            [address(one, port)?, address(one, port + 1)?, address(other, port)?, address(other, port + 1)?];
        let listen = ips.iter().flat_map(|ip| [(ip, port), (ip, port + 1)]);
        let listen =
            listen.map(|(ip, port)| Ok(Listen { transport: Transport::Udp, bind: SocketAddr::new(ip.parse()?, port) }));
        let config = DataplaneConfig {
            listen: listen.collect::<Result<_>>()?,
            nat_discovery: Some(addresses),
            ..config(one, 2, directory.path())
        };
        let (_dataplane, _changes) = start(&config)?;
        // Several clients, so that every worker answers.
        for _ in 0..8 {
            let client = UdpSocket::bind("127.0.0.1:0")?;
            client.set_read_timeout(Some(PATIENCE))?;
            for at in 0..4 {
                for (flags, change) in [(0, 0), (2, 1), (4, 2), (6, 3)] {
                    let (from, reply) = ask(&client, addresses[at].bound, flags)?;
                    assert_eq!(from, addresses[at ^ change].bound, "asked {at} for {flags}");
                    let message = Message::parse(&reply).context("an answer")?;
                    assert_eq!(message.class(), Class::Success);
                    assert_eq!(message.attribute(), Ok(Some(XorMappedAddress(client.local_addr()?))));
                    assert_eq!(message.attribute(), Ok(Some(ResponseOrigin(addresses[at ^ change].advertised))));
                    assert_eq!(message.attribute(), Ok(Some(OtherAddress(addresses[at ^ 3].advertised))));
                }
            }
        }
    }
    Ok(())
}

fn ask(client: &UdpSocket, to: SocketAddr, flags: u32) -> Result<(SocketAddr, Vec<u8>)> {
    let mut buffer = [0; 512];
    let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::Binding, TransactionId(*b"abcdefghijkl"));
    writer.attribute(&ChangeRequest(flags));
    let length = writer.finish().context("room")?;
    client.send_to(&buffer[..length], to)?;
    let (length, from) = client.recv_from(&mut buffer)?;
    Ok((from, buffer[..length].to_vec()))
}
