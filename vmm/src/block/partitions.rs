//! A GUID partition table made up in memory over several read-only files (UEFI 2.10, section 5).
//!
//! Every file becomes one partition, in order, aligned to 1 MiB; nothing is written to the files. The guest sees the
//! protective MBR, both headers and both copies of the entries with right checksums, so any driver accepts the disk
//! without a word in its log. Gaps, and the end of a file's last sector when its length is no multiple of 512, read as
//! zeros.

use super::disk::{Extent, SECTOR, Source};

/// Most files one disk takes; the table has 128 entries.
pub const MAX_PARTITIONS: usize = 120;

const ENTRIES: usize = 128;
const ENTRY_SIZE: usize = 128;
const ENTRIES_SECTORS: u64 = (ENTRIES * ENTRY_SIZE) as u64 / SECTOR;
const HEADER_SIZE: u32 = 92;
const ALIGNMENT: u64 = 1 << 20;

/// "Linux filesystem data", 0FC63DAF-8483-4772-8E79-3D69D8477DE4, in its on-disk (mixed-endian) form.
const LINUX_DATA: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];

/// The layout of a partitioned disk.
#[derive(Debug)]
pub struct Layout {
    /// Bytes that exist in memory only: MBR and first header, entries, second header.
    pub memory: Vec<u8>,
    /// What is where, in ascending order; uncovered ranges read as zeros.
    pub extents: Vec<Extent>,
    /// Length of the disk in bytes, a multiple of 512.
    pub length: u64,
}

/// Lays out files of these lengths (bytes, none of them 0, at most [`MAX_PARTITIONS`]) as the partitions of a disk.
/// `identity` flows into the GUIDs, which are otherwise the same every time: a restored microVM finds what it knew.
///
/// None when the lengths make no disk: a file is empty, there are too many or none, or their sum overflows.
pub fn lay_out(lengths: &[u64], identity: &str) -> Option<Layout> {
    if lengths.is_empty() || lengths.len() > MAX_PARTITIONS || lengths.contains(&0) {
        return None;
    }
    let entries_bytes = (lengths.len() * ENTRY_SIZE).next_multiple_of(SECTOR as usize);
    let mut entries = vec![0u8; entries_bytes];
    let mut files = Vec::with_capacity(lengths.len());
    let mut next = ALIGNMENT;
    for (index, (&length, entry)) in lengths
        .iter()
        .zip(entries.chunks_exact_mut(ENTRY_SIZE))
        .enumerate()
    {
        let end = next.checked_add(length)?.checked_next_multiple_of(SECTOR)?;
        files.push(Extent {
            start: next,
            length,
            source: Source::File {
                index: index as u16,
            },
        });
        entry[0..16].copy_from_slice(&LINUX_DATA);
        entry[16..32].copy_from_slice(&guid(identity, index as u32 + 1));
        entry[32..40].copy_from_slice(&(next / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&(end / SECTOR - 1).to_le_bytes());
        next = end.checked_next_multiple_of(ALIGNMENT)?;
    }
    let backup_entries = next;
    let backup_header = backup_entries + ENTRIES_SECTORS * SECTOR;
    let length = backup_header
        .checked_add(SECTOR)
        .filter(|length| i64::try_from(*length).is_ok())?;

    let mut checksum = Crc32::new();
    checksum.update(&entries);
    checksum.zeros(ENTRIES * ENTRY_SIZE - entries_bytes);
    let table = Table {
        disk_sectors: length / SECTOR,
        last_usable: backup_entries / SECTOR - 1,
        entries_checksum: checksum.finish(),
        disk_guid: guid(identity, 0),
    };
    let mut memory = vec![0u8; 2 * SECTOR as usize];
    protective_mbr(&mut memory[..SECTOR as usize], table.disk_sectors);
    table.header(1, &mut memory[SECTOR as usize..]);
    memory.extend_from_slice(&entries);
    memory.resize(memory.len() + SECTOR as usize, 0);
    let at = memory.len() - SECTOR as usize;
    table.header(table.disk_sectors - 1, &mut memory[at..]);

    let in_memory = |start, offset: usize, length: usize| Extent {
        start,
        length: length as u64,
        source: Source::Memory {
            offset: offset as u32,
        },
    };
    let front = 2 * SECTOR as usize;
    let mut extents = Vec::with_capacity(files.len() + 3);
    extents.push(in_memory(0, 0, front + entries_bytes));
    extents.append(&mut files);
    extents.push(in_memory(backup_entries, front, entries_bytes));
    extents.push(in_memory(backup_header, at, SECTOR as usize));
    Some(Layout {
        memory,
        extents,
        length,
    })
}

/// One record of type 0xEE over the whole disk (UEFI 2.10, 5.2.3).
fn protective_mbr(sector: &mut [u8], disk_sectors: u64) {
    let record = &mut sector[446..462];
    record[1..4].copy_from_slice(&[0x00, 0x02, 0x00]);
    record[4] = 0xee;
    record[5..8].copy_from_slice(&[0xff, 0xff, 0xff]);
    record[8..12].copy_from_slice(&1u32.to_le_bytes());
    let size = u32::try_from(disk_sectors - 1).unwrap_or(u32::MAX);
    record[12..16].copy_from_slice(&size.to_le_bytes());
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
}

struct Table {
    disk_sectors: u64,
    last_usable: u64,
    entries_checksum: u32,
    disk_guid: [u8; 16],
}

impl Table {
    /// Writes the header that lies at sector `own` (UEFI 2.10, 5.3.2).
    fn header(&self, own: u64, sector: &mut [u8]) {
        let last = self.disk_sectors - 1;
        let (other, entries) = if own == 1 {
            (last, 2)
        } else {
            (1, last - ENTRIES_SECTORS)
        };
        sector[0..8].copy_from_slice(b"EFI PART");
        sector[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        sector[12..16].copy_from_slice(&HEADER_SIZE.to_le_bytes());
        sector[24..32].copy_from_slice(&own.to_le_bytes());
        sector[32..40].copy_from_slice(&other.to_le_bytes());
        sector[40..48].copy_from_slice(&(2 + ENTRIES_SECTORS).to_le_bytes());
        sector[48..56].copy_from_slice(&self.last_usable.to_le_bytes());
        sector[56..72].copy_from_slice(&self.disk_guid);
        sector[72..80].copy_from_slice(&entries.to_le_bytes());
        sector[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        sector[84..88].copy_from_slice(&(ENTRY_SIZE as u32).to_le_bytes());
        sector[88..92].copy_from_slice(&self.entries_checksum.to_le_bytes());
        let mut checksum = Crc32::new();
        checksum.update(&sector[..HEADER_SIZE as usize]);
        sector[16..20].copy_from_slice(&checksum.finish().to_le_bytes());
    }
}

/// A GUID of version 8 (RFC 9562, 5.8: contents up to us) from the disk's identity and a number.
fn guid(identity: &str, number: u32) -> [u8; 16] {
    let mut checksum = Crc32::new();
    checksum.update(identity.as_bytes());
    let mut guid = *b"CaissonDisk\0\0\0\0\0";
    guid[0..4].copy_from_slice(&checksum.finish().to_le_bytes());
    guid[7] = 0x80 | (guid[7] & 0x0f);
    guid[8] = 0x80 | (guid[8] & 0x3f);
    guid[12..16].copy_from_slice(&number.to_be_bytes());
    guid
}

/// CRC-32 as UEFI wants it (ISO 3309, reflected polynomial 0xEDB88320).
struct Crc32(u32);

impl Crc32 {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut value = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 {
                    0xedb8_8320 ^ (value >> 1)
                } else {
                    value >> 1
                };
                bit += 1;
            }
            table[byte] = value;
            byte += 1;
        }
        table
    };

    const fn new() -> Self {
        Self(!0)
    }

    const fn step(&mut self, byte: u8) {
        self.0 = Self::TABLE[((self.0 ^ byte as u32) & 0xff) as usize] ^ (self.0 >> 8);
    }

    fn update(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.step(*byte));
    }

    fn zeros(&mut self, count: usize) {
        (0..count).for_each(|_| self.step(0));
    }

    const fn finish(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn crc(bytes: &[u8]) -> u32 {
        let mut checksum = Crc32::new();
        checksum.update(bytes);
        checksum.finish()
    }

    /// The disk's bytes with every file's byte being its number from 1 on.
    fn render(layout: &Layout) -> Vec<u8> {
        let mut disk = vec![0u8; layout.length as usize];
        for extent in &layout.extents {
            let target = &mut disk[extent.start as usize..][..extent.length as usize];
            match extent.source {
                Source::Memory { offset } => {
                    target.copy_from_slice(
                        &layout.memory[offset as usize..][..extent.length as usize],
                    );
                }
                Source::File { index } => target.fill(index as u8 + 1),
            }
        }
        disk
    }

    #[test]
    fn crc_has_the_published_check_value() {
        assert_eq!(crc(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn both_headers_and_tables_agree() {
        let layout = lay_out(&[1, 512, 5_000_000], "layers").unwrap();
        let disk = render(&layout);
        let last = layout.length / SECTOR - 1;
        assert_eq!(&disk[510..512], &[0x55, 0xaa]);
        assert_eq!(disk[450], 0xee);
        assert_eq!(u64::from(u32_at(&disk, 458)), last);
        for (own, other) in [(1, last), (last, 1)] {
            let header = &disk[(own * SECTOR) as usize..][..512];
            assert_eq!(&header[..8], b"EFI PART");
            let mut cleared = header[..92].to_vec();
            cleared[16..20].fill(0);
            assert_eq!(u32_at(header, 16), crc(&cleared));
            assert_eq!(u64_at(header, 24), own);
            assert_eq!(u64_at(header, 32), other);
            let table = &disk[(u64_at(header, 72) * SECTOR) as usize..][..ENTRIES * ENTRY_SIZE];
            assert_eq!(u32_at(header, 88), crc(table));
            for (index, length) in [1u64, 512, 5_000_000].into_iter().enumerate() {
                let entry = &table[index * ENTRY_SIZE..];
                let (first, end) = (u64_at(entry, 32) * SECTOR, (u64_at(entry, 40) + 1) * SECTOR);
                assert_eq!(first % ALIGNMENT, 0);
                assert_eq!(end - first, length.next_multiple_of(SECTOR));
                assert!(
                    u64_at(header, 40) * SECTOR <= first
                        && end <= (u64_at(header, 48) + 1) * SECTOR
                );
                let bytes = &disk[first as usize..end as usize];
                assert!(
                    bytes[..length as usize]
                        .iter()
                        .all(|byte| *byte == index as u8 + 1)
                );
                assert!(bytes[length as usize..].iter().all(|byte| *byte == 0));
            }
            assert!(table[3 * ENTRY_SIZE..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn extents_ascend_without_overlap() {
        let layout = lay_out(&[4096; MAX_PARTITIONS], "x").unwrap();
        for pair in layout.extents.windows(2) {
            assert!(pair[0].start + pair[0].length <= pair[1].start);
        }
    }

    #[test]
    fn guids_differ_and_stay_the_same() {
        let guids: std::collections::HashSet<_> =
            (0..=120).map(|number| guid("a", number)).collect();
        assert_eq!(guids.len(), 121);
        assert_eq!(guid("a", 7), guid("a", 7));
        assert_ne!(guid("a", 7), guid("b", 7));
    }

    #[test]
    fn impossible_disks_are_none() {
        assert!(lay_out(&[], "x").is_none());
        assert!(lay_out(&[512, 0], "x").is_none());
        assert!(lay_out(&[512; MAX_PARTITIONS + 1], "x").is_none());
        assert!(lay_out(&[u64::MAX - 5], "x").is_none());
        assert!(lay_out(&[1 << 62, 1 << 62, 1 << 62, 1 << 62], "x").is_none());
    }

    /// What the guest's own tools say: sfdisk when the machine has it.
    #[test]
    fn sfdisk_accepts_the_table() {
        use std::io::Write;
        let layout = lay_out(&[300_000, 4096, 1], "sfdisk").unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&render(&layout)).unwrap();
        let Ok(output) = std::process::Command::new("sfdisk")
            .arg("--verify")
            .arg(file.path())
            .output()
        else {
            eprintln!("sfdisk is not installed: not checked");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && text.contains("No errors detected"),
            "{text}"
        );
    }
}
