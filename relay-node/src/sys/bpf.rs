//! bpf(2), as far as one program with a few maps needs it: an object is read, its maps are made, its program is loaded
//! and attached to the network namespace.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// Of linux/bpf.h: `enum bpf_cmd`.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
/// Of linux/bpf.h: `enum bpf_prog_type`, `enum bpf_attach_type`.
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Bytes of an instruction, and of a symbol, a relocation and a section header of ELF64.
const INSTRUCTION: usize = 8;
const SYMBOL: usize = 24;
const RELOCATION: usize = 16;
const SECTION: usize = 64;
/// First of the two instructions that load 64 bits; with this in the place of their source register they load a map.
const LOAD_64: u8 = 0x18;
const SOURCE_MAP: u8 = 1 << 4;

/// A map.
#[derive(Debug)]
pub(super) struct Map(OwnedFd);

impl Map {
    /// Sets the value of a key, which are as long as the map's.
    ///
    /// # Errors
    /// As bpf(2): E2BIG for a new key when the map is full.
    ///
    /// # Safety
    /// `K` and `V` are plain C types of the sizes of the map's keys and values.
    pub(super) unsafe fn update<K, V>(&self, key: &K, value: &V) -> io::Result<()> {
        let attributes = Element { map: self.number(), key: address(key), value: address(value), ..Element::default() };
        // SAFETY: the command takes an Element; key and value are alive and, says the caller, as long as the kernel reads.
        unsafe { bpf(MAP_UPDATE_ELEM, &attributes) }.map(drop)
    }

    /// Forgets a key.
    ///
    /// # Errors
    /// As bpf(2): ENOENT where there is no such key.
    ///
    /// # Safety
    /// `K` is a plain C type of the size of the map's keys.
    pub(super) unsafe fn delete<K>(&self, key: &K) -> io::Result<()> {
        let attributes = Element { map: self.number(), key: address(key), ..Element::default() };
        // SAFETY: as in `update`.
        unsafe { bpf(MAP_DELETE_ELEM, &attributes) }.map(drop)
    }

    fn number(&self) -> u32 {
        self.0.as_raw_fd().cast_unsigned()
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A map as an object wants it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub(super) struct Wanted {
    pub(super) kind: u32,
    pub(super) key: u32,
    pub(super) value: u32,
    pub(super) entries: u32,
    pub(super) flags: u32,
}

impl Wanted {
    /// Makes it.
    ///
    /// # Errors
    /// As bpf(2): EPERM without CAP_BPF.
    pub(super) fn create(self) -> io::Result<Map> {
        // SAFETY: the command takes five words, and whatever is not there is zero.
        unsafe { make(MAP_CREATE, &self) }.map(Map)
    }
}

/// An object file (ELF64, as clang's BPF target writes it) of ours.
pub(super) struct Object<'a> {
    program: &'a [u8],
    relocations: &'a [u8],
    symbols: &'a [u8],
    names: &'a [u8],
    maps: &'a [u8],
    licence: &'a CStr,
}

impl<'a> Object<'a> {
    /// Reads one that has a program in a section of this name. None for what is broken.
    pub(super) fn read(bytes: &'a [u8], section: &str) -> Option<Self> {
        let headers = usize::try_from(u64_at(bytes, 40)?).ok()?;
        let count = usize::from(u16_at(bytes, 60)?);
        let header = |index: usize| bytes.get(headers + index * SECTION..)?.get(..SECTION);
        let content = |header: &[u8]| {
            let (start, length) = (u64_at(header, 24)?, u64_at(header, 32)?);
            bytes.get(usize::try_from(start).ok()?..)?.get(..usize::try_from(length).ok()?)
        };
        // Names of sections and of symbols are in one table.
        let names = content(header(usize::from(u16_at(bytes, 62)?))?)?;
        let find = |name: &str| {
            let mut all = (0..count).filter_map(header);
            all.find(|header| u32_at(header, 0).and_then(|at| text(names, at)) == Some(name)).and_then(content)
        };
        Some(Self {
            program: find(section)?,
            relocations: find(&format!(".rel{section}"))?,
            symbols: find(".symtab")?,
            names,
            maps: find("maps")?,
            licence: CStr::from_bytes_until_nul(find("license")?).ok()?,
        })
    }

    /// The map of a name: `struct bpf_map_def`.
    pub(super) fn map(&self, name: &str) -> Option<Wanted> {
        let mut symbols = self.symbols.chunks_exact(SYMBOL);
        let symbol = symbols.find(|symbol| u32_at(symbol, 0).and_then(|at| text(self.names, at)) == Some(name))?;
        let definition = self.maps.get(usize::try_from(u64_at(symbol, 8)?).ok()?..)?;
        let word = |index: usize| u32_at(definition, index * 4);
        Some(Wanted { kind: word(0)?, key: word(1)?, value: word(2)?, entries: word(3)?, flags: word(4)? })
    }

    /// Loads the program, which asks for these maps by their names.
    ///
    /// # Errors
    /// As bpf(2): EPERM without CAP_BPF and CAP_NET_ADMIN, InvalidData for an object that asks for another map.
    pub(super) fn load(&self, maps: &[(&str, &Map)]) -> io::Result<Program> {
        let instructions = self.linked(maps).ok_or(io::ErrorKind::InvalidData)?;
        let mut name = [0; 16];
        name[..7].copy_from_slice(b"relayed");
        let attributes = Load {
            kind: PROG_TYPE_SK_LOOKUP,
            count: u32::try_from(instructions.len() / INSTRUCTION).unwrap_or(u32::MAX),
            instructions: instructions.as_ptr() as u64,
            licence: self.licence.as_ptr() as u64,
            name,
            attach_type: ATTACH_SK_LOOKUP,
            ..Load::default()
        };
        // SAFETY: the command takes a Load; instructions and licence are alive, as long as it says, and end with a zero.
        unsafe { make(PROG_LOAD, &attributes) }.map(Program)
    }

    /// The instructions, with maps where they are asked for.
    fn linked(&self, maps: &[(&str, &Map)]) -> Option<Vec<u8>> {
        let mut instructions = self.program.to_vec();
        for relocation in self.relocations.chunks_exact(RELOCATION) {
            let at = usize::try_from(u64_at(relocation, 0)?).ok()?;
            let symbol = usize::try_from(u64_at(relocation, 8)? >> 32).ok()?;
            let symbol = self.symbols.chunks_exact(SYMBOL).nth(symbol)?;
            let name = text(self.names, u32_at(symbol, 0)?)?;
            let (_, map) = maps.iter().find(|(known, _)| *known == name)?;
            let instruction = instructions.get_mut(at..at + INSTRUCTION).filter(|found| found[0] == LOAD_64)?;
            instruction[1] = instruction[1] & 0xF | SOURCE_MAP;
            instruction[4..].copy_from_slice(&map.number().to_ne_bytes());
        }
        Some(instructions)
    }
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

impl Program {
    /// Attaches it to the network namespace of this thread, until what this returns is closed.
    ///
    /// # Errors
    /// As bpf(2): EPERM without CAP_NET_ADMIN, EINVAL before Linux 5.9.
    pub(super) fn attach(&self) -> io::Result<OwnedFd> {
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let link = [self.0.as_raw_fd().cast_unsigned(), namespace.as_raw_fd().cast_unsigned(), ATTACH_SK_LOOKUP, 0];
        // SAFETY: the command takes four words.
        unsafe { make(LINK_CREATE, &link) }
    }
}

/// Attributes of the commands on elements.
#[derive(Default)]
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Attributes of PROG_LOAD.
#[derive(Default)]
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

/// A command that makes something: its descriptor.
///
/// # Safety
/// As [`bpf`]; and the command returns a new descriptor.
unsafe fn make<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for command and attributes; the descriptor is new and nobody else's.
    unsafe { bpf(command, attributes).map(|descriptor| OwnedFd::from_raw_fd(descriptor)) }
}

/// A command.
///
/// # Safety
/// `T` is what the command takes, made of words without gaps, and the pointers in it are good for it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the caller vouches for the attributes, which are alive for the call and `size_of::<T>()` long.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    // A descriptor, 0 or -1.
    check(result as libc::c_int)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn text(names: &[u8], at: u32) -> Option<&str> {
    CStr::from_bytes_until_nul(names.get(usize::try_from(at).ok()?..)?).ok()?.to_str().ok()
}
