//! Client address -> shard -> worker: the same function for the kernel (a classic BPF program on the SO_REUSEPORT
//! group) and for userspace (restore, and packets that land wrong all the same).
//!
//! The kernel's own reuseport hash has a secret per boot and renumbers when a socket closes; this one is the same on
//! every machine, so that a restarted relay finds each client at the worker that took over its allocation.

use std::net::{IpAddr, SocketAddr};

use turn_core::WorkerId;

use crate::sys::socket::Instruction;

/// Shards: many times the workers of a machine, so that each gets about as many.
pub const SHARDS: u32 = 256;

/// Odd factors without structure that consecutive ports could meet (2^32/phi; C. Wellons' lowbias32).
const FOLD: u32 = 0x9e37_79b1;
const MIX: [u32; 2] = [0x7feb_352d, 0x846c_a68b];

/// The shard of a client, below [`SHARDS`].
pub fn shard(client: SocketAddr) -> u32 {
    let hash = match client.ip() {
        IpAddr::V4(ip) => fold(0, ip.to_bits()),
        IpAddr::V6(ip) => {
            let bits = ip.to_bits();
            [96, 64, 32, 0].into_iter().fold(0, |hash, shift| fold(hash, (bits >> shift) as u32))
        }
    };
    let mut hash = fold(hash, u32::from(client.port()));
    for factor in MIX {
        hash = (hash ^ hash >> 15).wrapping_mul(factor);
    }
    (hash ^ hash >> 15) % SHARDS
}

fn fold(hash: u32, word: u32) -> u32 {
    let hash = (hash ^ word).wrapping_mul(FOLD);
    hash ^ hash >> 15
}

/// The worker of a client, of `workers` (at least 1).
pub fn worker(client: SocketAddr, workers: u16) -> WorkerId {
    WorkerId((shard(client) % u32::from(workers)) as u16)
}

/// The program that computes [`worker`] from the headers of a UDP datagram. A datagram with IPv6 extension headers
/// gets a wrong answer, and one whose headers are not in reach gets 0; they cross to their worker by a ring.
pub fn program(workers: u16) -> Vec<Instruction> {
    // Scratch memory: the hash so far, and the port.
    const HASH: u32 = 0;
    const PORT: u32 = 1;

    // A ^= A >> 15
    let shift = [bpf::a_to_x(), bpf::shift_right(15), bpf::xor_x()];
    // A = fold(M[HASH], A); M[HASH] = A
    let fold =
        || [bpf::load_x(HASH), bpf::xor_x(), bpf::multiply(FOLD)].into_iter().chain(shift).chain([bpf::store(HASH)]);

    let mut v4 = vec![bpf::header_length_to_x(), bpf::half_behind_header(0), bpf::store(PORT), bpf::word(12)];
    v4.extend(fold());
    let mut v6 = vec![bpf::half(40), bpf::store(PORT)];
    for offset in [8, 12, 16, 20] {
        v6.push(bpf::word(offset));
        v6.extend(fold());
    }

    let mut program = vec![bpf::zero_x(), bpf::store_x(HASH), bpf::byte(0), bpf::and(0xf0)];
    program.push(bpf::skip_unless_equal(0x60, v6.len() as u8 + 1));
    program.append(&mut v6);
    program.push(bpf::skip(v4.len() as u32));
    program.append(&mut v4);
    program.push(bpf::load(PORT));
    program.extend(fold());
    for factor in MIX {
        program.extend(shift);
        program.push(bpf::multiply(factor));
    }
    program.extend(shift);
    program.extend([bpf::modulo(SHARDS), bpf::modulo(u32::from(workers)), bpf::answer_a()]);
    program
}

/// The instructions used, by what they do (linux/filter.h, linux/bpf_common.h). Offsets count from the IP header: in a
/// reuseport program the data pointer stands at the UDP payload, so packets are read through SKF_NET_OFF.
mod bpf {
    use super::Instruction;

    const NET_OFF: u32 = 0xfff0_0000;

    const fn plain(code: u16, operand: u32) -> Instruction {
        Instruction { code, jump_true: 0, jump_false: 0, operand }
    }

    /// A = 32 bits of the packet, in host order.
    pub(super) const fn word(offset: u32) -> Instruction {
        plain(0x20, NET_OFF + offset)
    }
    /// A = 16 bits of the packet, in host order.
    pub(super) const fn half(offset: u32) -> Instruction {
        plain(0x28, NET_OFF + offset)
    }
    /// A = 8 bits of the packet.
    pub(super) const fn byte(offset: u32) -> Instruction {
        plain(0x30, NET_OFF + offset)
    }
    /// A = 16 bits of the packet, X further.
    pub(super) const fn half_behind_header(offset: u32) -> Instruction {
        plain(0x48, NET_OFF + offset)
    }
    /// X = length of the IPv4 header (four times the lower half of its first octet).
    pub(super) const fn header_length_to_x() -> Instruction {
        plain(0xb1, NET_OFF)
    }
    /// A = scratch memory.
    pub(super) const fn load(index: u32) -> Instruction {
        plain(0x60, index)
    }
    /// X = scratch memory.
    pub(super) const fn load_x(index: u32) -> Instruction {
        plain(0x61, index)
    }
    /// X = 0.
    pub(super) const fn zero_x() -> Instruction {
        plain(0x01, 0)
    }
    /// Scratch memory = A.
    pub(super) const fn store(index: u32) -> Instruction {
        plain(0x02, index)
    }
    /// Scratch memory = X.
    pub(super) const fn store_x(index: u32) -> Instruction {
        plain(0x03, index)
    }
    /// A *= factor, modulo 2^32.
    pub(super) const fn multiply(factor: u32) -> Instruction {
        plain(0x24, factor)
    }
    /// A &= mask.
    pub(super) const fn and(mask: u32) -> Instruction {
        plain(0x54, mask)
    }
    /// A >>= bits.
    pub(super) const fn shift_right(bits: u32) -> Instruction {
        plain(0x74, bits)
    }
    /// A %= divisor.
    pub(super) const fn modulo(divisor: u32) -> Instruction {
        plain(0x94, divisor)
    }
    /// A ^= X.
    pub(super) const fn xor_x() -> Instruction {
        plain(0xac, 0)
    }
    /// X = A.
    pub(super) const fn a_to_x() -> Instruction {
        plain(0x07, 0)
    }
    /// Goes on `count` instructions further.
    pub(super) const fn skip(count: u32) -> Instruction {
        plain(0x05, count)
    }
    /// Goes on `count` instructions further unless A is `value`.
    pub(super) const fn skip_unless_equal(value: u32, count: u8) -> Instruction {
        Instruction { code: 0x15, jump_true: 0, jump_false: count, operand: value }
    }
    /// The answer is A.
    pub(super) const fn answer_a() -> Instruction {
        plain(0x16, 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{Ipv6Addr, UdpSocket};
    use std::os::fd::AsFd;

    use proptest::prelude::*;
    use socket2::{Domain, Socket, Type};

    use super::*;
    use crate::sys::socket::attach_reuseport_program;

    /// Runs a program as the kernel would, over the headers of a datagram.
    fn interpret(program: &[Instruction], headers: &[u8]) -> u32 {
        let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0);
        let read = |offset: u32, size: usize| {
            let offset = offset.wrapping_sub(0xfff0_0000) as usize;
            headers[offset..offset + size].iter().fold(0, |value, octet| value << 8 | u32::from(*octet))
        };
        loop {
            let Instruction { code, jump_true, jump_false, operand: k } = program[at];
            at += 1;
            match code {
                0x20 => a = read(k, 4),
                0x28 => a = read(k, 2),
                0x30 => a = read(k, 1),
                0x48 => a = read(k.wrapping_add(x), 2),
                0xb1 => x = (read(k, 1) & 0xf) * 4,
                0x60 => a = memory[k as usize],
                0x61 => x = memory[k as usize],
                0x01 => x = k,
                0x02 => memory[k as usize] = a,
                0x03 => memory[k as usize] = x,
                0x24 => a = a.wrapping_mul(k),
                0x54 => a &= k,
                0x74 => a >>= k,
                0x94 => a %= k,
                0xac => a ^= x,
                0x07 => x = a,
                0x05 => at += k as usize,
                0x15 => at += usize::from(if a == k { jump_true } else { jump_false }),
                0x16 => return a,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    /// IP and UDP headers as far as a client's address is concerned; `options` are words of IPv4 options.
    fn headers(client: SocketAddr, options: u8) -> Vec<u8> {
        let mut headers = Vec::new();
        match client.ip() {
            IpAddr::V4(ip) => {
                headers.push(0x45 + options);
                headers.resize(12, 0xaa);
                headers.extend(ip.octets());
                headers.resize(20 + usize::from(options) * 4, 0xbb);
            }
            IpAddr::V6(ip) => {
                headers.push(0x60);
                headers.resize(8, 0xaa);
                headers.extend(ip.octets());
                headers.resize(40, 0xbb);
            }
        }
        headers.extend(client.port().to_be_bytes());
        headers.resize(headers.len() + 6, 0xcc);
        headers
    }

    proptest! {
        #[test]
        fn the_program_computes_what_userspace_does(ip: IpAddr, port: u16, workers in 1u16..=64, options in 0u8..=10) {
            let client = SocketAddr::new(ip, port);
            prop_assert_eq!(
                interpret(&program(workers), &headers(client, options)),
                u32::from(worker(client, workers).0)
            );
        }
    }

    #[test]
    fn sequential_ports_spread_over_shards_and_workers() {
        for ip in ["192.0.2.1", "2001:db8::1"] {
            let ip: IpAddr = ip.parse().expect("literal");
            let mut shards = [0u32; SHARDS as usize];
            for port in 32_768..32_768 + 256 * 64 {
                shards[shard(SocketAddr::new(ip, port)) as usize] += 1;
            }
            // 64 expected; a Poisson distribution leaves these bounds once in a billion.
            assert!(shards.iter().all(|count| (20..=120).contains(count)), "{ip}: {shards:?}");
        }
    }

    /// Frozen: relays of two versions, or the two ends of a rolling restart, must agree.
    #[test]
    fn the_function_stays_what_it_is() {
        let shards: Vec<u32> = ["192.0.2.1:1", "192.0.2.1:2", "10.0.0.1:65535", "[2001:db8::1]:1", "[::1]:50000"]
            .into_iter()
            .map(|client| shard(client.parse().expect("literal")))
            .collect();
        assert_eq!(shards, [25, 112, 91, 215, 204]);
    }

    fn group(ip: IpAddr, workers: u16) -> io::Result<Vec<UdpSocket>> {
        let mut address = SocketAddr::new(ip, 0);
        let mut sockets = Vec::new();
        for _ in 0..workers {
            let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
            socket.set_reuse_port(true)?;
            socket.set_nonblocking(true)?;
            if sockets.is_empty() {
                attach_reuseport_program(socket.as_fd(), &program(workers))?;
            }
            socket.bind(&address.into())?;
            let socket = UdpSocket::from(socket);
            address = socket.local_addr()?;
            sockets.push(socket);
        }
        Ok(sockets)
    }

    #[test]
    fn the_kernel_delivers_to_the_worker_that_userspace_computes() -> io::Result<()> {
        for (ip, workers) in [("127.0.0.1", 3), ("127.0.0.1", 2), ("::1", 3), ("::1", 5)] {
            let ip: IpAddr = ip.parse().expect("literal");
            let sockets = group(ip, workers)?;
            let to = sockets[0].local_addr()?;
            let mut seen = vec![0; usize::from(workers)];
            for _ in 0..300 {
                let client = UdpSocket::bind(SocketAddr::new(ip, 0))?;
                client.send_to(b"x", to)?;
                let expected = usize::from(worker(client.local_addr()?, workers).0);
                // Loopback delivers within the send, so the packet is in one of the queues.
                for (index, socket) in sockets.iter().enumerate() {
                    let arrived = socket.recv_from(&mut [0; 8]);
                    match arrived {
                        Ok((_, source)) => assert_eq!((index, source), (expected, client.local_addr()?)),
                        Err(error) => {
                            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                            assert_ne!(index, expected, "the packet of {client:?} is elsewhere");
                        }
                    }
                }
                seen[expected] += 1;
            }
            assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
        }
        Ok(())
    }

    #[test]
    fn ipv6_clients_differ_in_every_word() {
        let shards: std::collections::HashSet<u32> =
            (0..128).map(|bit| shard(SocketAddr::new(Ipv6Addr::from_bits(1 << bit).into(), 1))).collect();
        assert!(shards.len() > 80, "{} shards of 128 addresses", shards.len());
    }
}
