//! Writes tar archives, right and wrong ones.

/// One entry; every field can be set, whether it makes sense or not.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) mode: u64,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    /// The size in the header; that of `data` if `None`.
    pub(crate) size: Option<u64>,
    pub(crate) link: Vec<u8>,
    pub(crate) device: (u64, u64),
    pub(crate) data: Vec<u8>,
    /// Records of a PAX header before the entry.
    pub(crate) pax: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes 386..495, the sparse fields of the old GNU format.
    pub(crate) gnu_sparse: Option<Vec<u8>>,
}

impl Item {
    pub(crate) fn new(path: impl AsRef<[u8]>, kind: u8) -> Item {
        Item {
            path: path.as_ref().to_vec(),
            kind,
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
            size: None,
            link: Vec::new(),
            device: (0, 0),
            data: Vec::new(),
            pax: Vec::new(),
            gnu_sparse: None,
        }
    }

    pub(crate) fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Item {
        Item {
            data: data.as_ref().to_vec(),
            ..Item::new(path, b'0')
        }
    }

    pub(crate) fn dir(path: impl AsRef<[u8]>) -> Item {
        Item::new(path, b'5')
    }

    pub(crate) fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item {
            link: target.as_ref().to_vec(),
            ..Item::new(path, b'2')
        }
    }

    pub(crate) fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item {
            link: target.as_ref().to_vec(),
            ..Item::new(path, b'1')
        }
    }

    pub(crate) fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Item {
        self.pax
            .push((key.as_bytes().to_vec(), value.as_ref().to_vec()));
        self
    }

    fn header(&self, path: &[u8], kind: u8, size: u64) -> [u8; 512] {
        let mut block = [0; 512];
        let name = &path[..path.len().min(100)];
        block[..name.len()].copy_from_slice(name);
        number(&mut block[100..108], self.mode);
        number(&mut block[108..116], self.uid);
        number(&mut block[116..124], self.gid);
        number(&mut block[124..136], size);
        number(&mut block[136..148], self.mtime);
        block[156] = kind;
        let link = &self.link[..self.link.len().min(100)];
        block[157..157 + link.len()].copy_from_slice(link);
        if self.gnu_sparse.is_some() {
            block[257..265].copy_from_slice(b"ustar  \0");
        } else {
            block[257..265].copy_from_slice(b"ustar\x0000");
        }
        number(&mut block[329..337], self.device.0);
        number(&mut block[337..345], self.device.1);
        if let Some(sparse) = &self.gnu_sparse {
            block[386..386 + sparse.len()].copy_from_slice(sparse);
        }
        seal(&mut block);
        block
    }
}

/// Sets a header's checksum.
pub(crate) fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Octal if it fits, else base-256.
fn number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let octal = format!("{value:0digits$o}");
    if octal.len() == digits {
        field[..digits].copy_from_slice(octal.as_bytes());
    } else {
        let bytes = value.to_be_bytes();
        let length = field.len().min(8);
        let start = field.len() - length;
        field[start..].copy_from_slice(&bytes[8 - length..]);
        field[0] |= 0x80;
    }
}

/// An archive under construction.
#[derive(Debug, Default, Clone)]
pub(crate) struct TarBuilder(Vec<u8>);

impl TarBuilder {
    pub(crate) fn new() -> TarBuilder {
        TarBuilder::default()
    }

    pub(crate) fn of(items: impl IntoIterator<Item = Item>) -> Vec<u8> {
        let mut builder = TarBuilder::new();
        for item in items {
            builder.push(&item);
        }
        builder.finish()
    }

    pub(crate) fn push(&mut self, item: &Item) {
        let mut records = item.pax.clone();
        if item.path.len() > 100 {
            records.push((b"path".to_vec(), item.path.clone()));
        }
        if item.link.len() > 100 {
            records.push((b"linkpath".to_vec(), item.link.clone()));
        }
        if !records.is_empty() {
            let body: Vec<u8> = records
                .iter()
                .flat_map(|(key, value)| record(key, value))
                .collect();
            let header = Item {
                link: Vec::new(),
                gnu_sparse: None,
                ..item.clone()
            };
            self.0
                .extend(header.header(b"PaxHeaders/x", b'x', body.len() as u64));
            self.data(&body);
        }
        self.0.extend(item.header(
            &item.path,
            item.kind,
            item.size.unwrap_or(item.data.len() as u64),
        ));
        self.data(&item.data);
    }

    /// Adds bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn data(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }

    /// The archive without its end mark.
    pub(crate) fn unfinished(self) -> Vec<u8> {
        self.0
    }
}

/// A PAX record, whose length counts itself.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}
