//! How much an image may ask of the host that loads it.

/// Bounds on what one image may contain. All of them are inclusive.
///
/// The defaults let every image through that is known to be in use, and stop decompression bombs before
/// they hurt; the disk filling up is a bound of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Layers in one image.
    pub layers: usize,
    /// Bytes of an uncompressed layer tar.
    pub layer_bytes: u64,
    /// Bytes of all uncompressed layer tars of one image.
    pub image_bytes: u64,
    /// Uncompressed bytes per compressed byte, once a layer is longer than `ratio_from` uncompressed bytes.
    pub ratio: u64,
    /// Uncompressed bytes from which on `ratio` is enforced.
    pub ratio_from: u64,
    /// Entries in one layer, implied parent directories included.
    pub entries: usize,
    /// Bytes of names, link targets and extended attributes of one layer, which are held in memory.
    pub metadata_bytes: usize,
    /// Bytes of one path in a layer.
    pub path_bytes: usize,
    /// Components of one path in a layer.
    pub depth: usize,
    /// Logical bytes of one file (a sparse file can be far longer than its tar).
    pub file_bytes: u64,
    /// Data segments of one sparse file.
    pub sparse_segments: usize,
    /// Bytes of names and values of the extended attributes of one entry.
    pub xattr_bytes: usize,
    /// Bytes of one PAX or GNU long-name header.
    pub extended_header_bytes: usize,
    /// Bytes of an index, manifest or `manifest.json`.
    pub manifest_bytes: u64,
    /// Bytes of an image configuration.
    pub config_bytes: u64,
    /// Bytes of an image archive once decompressed.
    pub archive_bytes: u64,
    /// Members of an image archive.
    pub archive_members: usize,
}

impl Default for Limits {
    fn default() -> Self {
        const KIB: usize = 1 << 10;
        const MIB: usize = 1 << 20;
        const GIB: u64 = 1 << 30;
        Limits {
            layers: 500,
            layer_bytes: 64 * GIB,
            image_bytes: 128 * GIB,
            ratio: 200,
            ratio_from: 4 * GIB,
            entries: 1_000_000,
            metadata_bytes: 256 * MIB,
            path_bytes: 4095,
            depth: 256,
            file_bytes: 1024 * GIB,
            sparse_segments: 256 * KIB,
            xattr_bytes: 64 * KIB,
            extended_header_bytes: MIB,
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            archive_bytes: 128 * GIB,
            archive_members: 10_000,
        }
    }
}
