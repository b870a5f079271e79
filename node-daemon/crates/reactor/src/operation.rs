//! What is in flight, and the memory that goes with it.

use std::net::SocketAddr;

use tercet_store::arena::Buf;
use tercet_store::disk::{Data, DiskToken};

use crate::nvme::NvmeOperation;

/// An operation that the kernel has. Its place in the table is the completion's user data.
pub(crate) enum Operation {
    Disk(DiskOperation),
    /// Not the kernel's: its commands are, each in a place of its own.
    Nvme(Box<NvmeOperation>),
    /// Command `index` of the operation in that place.
    Command {
        operation: u32,
        index: u64,
        fixed_buffer: bool,
    },
    Accept {
        listener: u32,
    },
    Receive {
        stream: u32,
    },
    Send {
        stream: u32,
    },
    /// The address is what the kernel reads; kept for as long as it may.
    Connect {
        stream: u32,
        _address: Box<SocketAddress>,
    },
    /// Where the eventfd's counter is read to.
    Wake {
        counter: Box<u64>,
    },
    Cancel,
}

/// A device operation; short reads and writes go on from `done_bytes`.
pub(crate) struct DiskOperation {
    pub(crate) disk: u32,
    pub(crate) token: DiskToken,
    pub(crate) kind: DiskKind,
    pub(crate) memory: Memory,
    pub(crate) done_bytes: usize,
}

/// What an operation reads into or writes from. It does not move while the kernel has it.
pub(crate) enum Memory {
    None,
    Into(Buf),
    From(Data),
}

impl Memory {
    pub(crate) fn len(&self) -> usize {
        self.bytes().len()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Into(buf) => buf,
            Self::From(data) => data,
        }
    }

    /// Where a read goes.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Into(buf) => buf,
            Self::None | Self::From(_) => panic!("a read has a buffer"),
        }
    }

    /// The buffer that goes back to who asked.
    pub(crate) fn into_buf(self) -> Option<Buf> {
        match self {
            Self::None => None,
            Self::Into(buf) => Some(buf),
            Self::From(data) => data.into_buf(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskKind {
    Read { offset: u64 },
    Write { offset: u64, fua: bool },
    Flush,
    Deallocate { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64 },
}

impl DiskKind {
    /// Where an operation begins, and how long it is, in bytes.
    pub(crate) fn range(self, memory: &Memory) -> (u64, u64) {
        let moved = memory.len() as u64;
        match self {
            Self::Read { offset } | Self::Write { offset, .. } => (offset, moved),
            Self::Deallocate { offset, len } | Self::WriteZeroes { offset, len } => (offset, len),
            Self::Flush => (0, 0),
        }
    }
}

/// Operations by number; a slot is used again when its completion has been seen.
#[derive(Default)]
pub(crate) struct Operations {
    slots: Vec<Option<Operation>>,
    free: Vec<u32>,
}

impl Operations {
    pub(crate) fn insert(&mut self, operation: Operation) -> u32 {
        if let Some(index) = self.free.pop() {
            let old = self.slots[index as usize].replace(operation);
            assert!(old.is_none(), "a free slot is empty");
            return index;
        }
        self.slots.push(Some(operation));
        u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 operations in flight")
    }

    pub(crate) fn get_mut(&mut self, index: u32) -> &mut Operation {
        self.slots[index as usize].as_mut().expect("an operation in flight")
    }

    pub(crate) fn remove(&mut self, index: u32) -> Operation {
        let operation = self.slots[index as usize].take().expect("an operation in flight");
        self.free.push(index);
        operation
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// A socket address as the kernel reads it.
#[repr(C)]
pub(crate) union SocketAddress {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl SocketAddress {
    pub(crate) fn new(address: SocketAddr) -> (Box<Self>, libc::socklen_t) {
        match address {
            SocketAddr::V4(v4) => {
                let raw = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                (Box::new(Self { v4: raw }), size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(v6) => {
                let raw = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                (Box::new(Self { v6: raw }), size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    pub(crate) fn pointer(&self) -> *const libc::sockaddr {
        std::ptr::from_ref(self).cast()
    }
}
