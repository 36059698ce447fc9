//! Reading and writing descriptor chains. Whatever the driver put there is checked here: a chain
//! that is not what it should be is an error of the driver, never of the daemon.

use super::dirty_log::DirtyPages;
use super::vring::GuestMemory;
use crate::engine::{HintBatch, HintBody};
use crate::protocol::{
    Advice, Batch, Range, Record, Request, Response, Stats, MAX_RANGES, MAX_RECORDS,
};
use std::io::{Read, Write};
use virtio_queue::{DescriptorChain, Reader};
use vm_memory::GuestAddressSpace;

/// A chain taken from a ring.
pub type Chain = DescriptorChain<<GuestMemory as GuestAddressSpace>::T>;

/// Why a chain cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its descriptors are broken.
    #[error("broken descriptor chain: {0}")]
    Chain(#[from] virtio_queue::Error),
    /// It is shorter than what it claims to hold.
    #[error("chain too short: {0}")]
    Short(#[from] std::io::Error),
    /// It claims to hold more than is allowed.
    #[error("{0} elements in one buffer, more than the {1} allowed")]
    TooMany(u32, u32),
}

fn read<const N: usize>(reader: &mut impl Read) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads the elements behind a header, all in one go: to begin a read costs more than an element.
/// The caller has bounded their number.
fn read_elements<const N: usize, T>(
    reader: &mut Reader<'_, DirtyPages>,
    count: u32,
    decode: impl Fn(&[u8; N]) -> T,
) -> Result<Vec<T>, Error> {
    // For what is merely claimed there is no memory.
    let there = reader.available_bytes() / N;
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > there {
        return Err(Error::Short(std::io::ErrorKind::UnexpectedEof.into()));
    }
    let mut elements = vec![[0; N]; count];
    reader.read_exact(elements.as_flattened_mut())?;
    Ok(elements.iter().map(decode).collect())
}

/// Reads a report.
pub fn read_report(chain: &Chain) -> Result<(Batch, Vec<Record>), Error> {
    let mut reader = chain.clone().reader(chain.memory())?;
    let batch = Batch::decode(&read(&mut reader)?);
    if batch.count > MAX_RECORDS {
        return Err(Error::TooMany(batch.count, MAX_RECORDS));
    }
    let records = read_elements(&mut reader, batch.count, Record::decode)?;
    Ok((batch, records))
}

/// Reads a request and its ranges (first block, number of blocks).
pub fn read_request(chain: &Chain) -> Result<(Request, Vec<(u64, u32)>), Error> {
    let mut reader = chain.clone().reader(chain.memory())?;
    let request = Request::decode(&read(&mut reader)?);
    if request.count > MAX_RANGES {
        return Err(Error::TooMany(request.count, MAX_RANGES));
    }
    let ranges = read_elements(&mut reader, request.count, |bytes| {
        let range = Range::decode(bytes);
        (range.first, range.count)
    })?;
    Ok((request, ranges))
}

/// How many records fit the chain's writable part, after a header of `header` bytes; `None` if
/// not even that fits.
pub fn room(chain: &Chain, header: usize) -> Result<Option<usize>, Error> {
    let writer = chain.clone().writer(chain.memory())?;
    let room = writer.available_bytes().checked_sub(header).map(|n| n / Record::SIZE);
    Ok(room.map(|n| n.min(MAX_RECORDS as usize)))
}

/// Writes a hint; returns the number of bytes.
pub fn write_hint(chain: &Chain, generation: u64, hint: &HintBatch) -> Result<u32, Error> {
    let mut bytes = Vec::new();
    let count = match &hint.body {
        HintBody::States(records) => {
            records.iter().for_each(|r| bytes.extend(r.encode()));
            records.len()
        }
        HintBody::Advice(advice) => {
            bytes.extend::<[u8; Advice::SIZE]>(advice.encode());
            1
        }
    };
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    let batch = Batch { generation, count, kind: hint.kind(), flags: hint.flags };
    write(chain, &batch.encode(), &bytes)
}

/// Writes an answer, with as many records as fit; returns the number of bytes.
pub fn write_answer(
    chain: &Chain,
    status: u32,
    generation: u64,
    records: &[Record],
) -> Result<u32, Error> {
    let room = room(chain, Response::SIZE)?.unwrap_or(0);
    let records = &records[..records.len().min(room)];
    let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
    write(chain, &Response { status, count, generation }.encode(), &bytes)
}

/// Writes the answer of STATS; returns the number of bytes.
pub fn write_stats(chain: &Chain, generation: u64, stats: &Stats) -> Result<u32, Error> {
    let response = Response { status: crate::protocol::S_OK, count: 1, generation };
    write(chain, &response.encode(), &stats.encode())
}

fn write(chain: &Chain, header: &[u8], body: &[u8]) -> Result<u32, Error> {
    let mut writer = chain.clone().writer(chain.memory())?;
    writer.write_all(header)?;
    writer.write_all(body)?;
    Ok(u32::try_from(header.len() + body.len()).unwrap_or(u32::MAX))
}
