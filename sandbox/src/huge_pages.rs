//! Huge pages: what containers may use of them, and the volumes on the host that stand for them.
//!
//! A hugetlbfs of the host is none in the guest, whose memory is its own. The guest gets one in its
//! place, over huge pages of its own memory, of which so many are kept as the containers may use.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use caisson_protocol::{
    HUGE_PREFIX,
    agent::{HugeDirectory, HugePagePool},
};
use oci_spec::runtime::{LinuxResources, Mount, Spec};

use crate::{
    error::Error,
    mount_table,
    spec::{host_binds, mounts_of_type},
};

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS: u64 = 0x9584_58F6;

/// Page size of a hugetlbfs that names none: the default of x86-64.
const DEFAULT_PAGE: u64 = 2 << 20;

const UNITS: [(&str, u64); 3] = [("KB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30)];

/// Bytes of a page of the size that OCI writes as "2MB" and the kernel in names of cgroup files.
fn page_size(text: &str) -> Result<u64, Error> {
    UNITS
        .iter()
        .find_map(|(unit, bytes)| {
            let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
            number.checked_mul(*bytes).filter(|size| *size > 0)
        })
        .ok_or_else(|| {
            Error::Invalid(format!(
                "\"{text}\" is no size of huge pages, such as 2MB or 1GB"
            ))
        })
}

fn name_of_size(bytes: u64) -> String {
    let fits = |(_, unit): &&(&str, u64)| bytes >= *unit && bytes.is_multiple_of(*unit);
    UNITS.iter().rev().find(fits).map_or_else(
        || format!("{bytes}B"),
        |(name, unit)| format!("{}{name}", bytes / unit),
    )
}

/// A number of bytes as options of hugetlbfs have it: with K, M or G behind it.
fn option_bytes(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.bytes().next().map(|unit| unit.to_ascii_uppercase()) {
        None => 0,
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(_) => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Who may use pages together: one limit counts once for all who share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    /// The container alone.
    Container,
    /// Whoever has this hugetlbfs of the host.
    Volume(u64),
    /// All of the pod.
    Pod,
}

/// What a container's hugetlbfs may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Claim {
    page: u64,
    holder: Holder,
    /// None: no limit.
    bytes: Option<u64>,
}

/// What one container may use of huge pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HugePages {
    /// Its limits, bytes, by the size of a page.
    limits: BTreeMap<u64, u64>,
    /// Of its hugetlbfs. They count for sizes without a limit.
    mounts: Vec<Claim>,
}

impl HugePages {
    /// What the mounts of this specification may hold.
    ///
    /// # Errors
    /// See [`Volume::at`].
    pub fn of_mounts(spec: &Spec) -> Result<Self, Error> {
        let mut mounts = Vec::new();
        for bind in host_binds(spec) {
            if let Some(volume) = Volume::at(&bind.source)? {
                mounts.push(volume.claim());
            }
        }
        mounts.extend(mounts_of_type(spec, "hugetlbfs").map(claim_of_mount));
        Ok(Self {
            limits: BTreeMap::new(),
            mounts,
        })
    }

    /// With what `resources` says changed; what it leaves out stays.
    ///
    /// # Errors
    /// A size of pages that is none.
    pub fn updated(&self, resources: &LinuxResources) -> Result<Self, Error> {
        let mut updated = self.clone();
        for limit in resources.hugepage_limits().iter().flatten() {
            let page = page_size(limit.page_size())?;
            match u64::try_from(limit.limit()) {
                Ok(bytes) => updated.limits.insert(page, bytes),
                Err(_) => updated.limits.remove(&page),
            };
        }
        Ok(updated)
    }

    /// What is enough for a container with either.
    pub fn either(&self, other: &Self) -> Self {
        let mut both = self.clone();
        for (page, bytes) in &other.limits {
            let limit = both.limits.entry(*page).or_default();
            *limit = (*limit).max(*bytes);
        }
        both
    }

    /// Bounds what has no limit of its own by that of the pod, whose cgroup on the host is `pod`:
    /// a kubelet sets it there, and containerd as it comes does not pass the containers' on.
    pub fn within_pod(mut self, pod: &Path) -> Self {
        for claim in &mut self.mounts {
            if claim.bytes.is_some() {
                continue;
            }
            let file = pod.join(format!("hugetlb.{}.max", name_of_size(claim.page)));
            let limit = fs::read_to_string(file).unwrap_or_default();
            if let Ok(bytes) = limit.trim().parse() {
                claim.holder = Holder::Pod;
                claim.bytes = Some(bytes);
            }
        }
        self
    }

    fn claims(&self) -> impl Iterator<Item = Claim> {
        let limits = self.limits.iter().map(|(page, bytes)| Claim {
            page: *page,
            holder: Holder::Container,
            bytes: Some(*bytes),
        });
        let mounts = self.mounts.iter();
        limits.chain(
            mounts
                .filter(|claim| !self.limits.contains_key(&claim.page))
                .cloned(),
        )
    }
}

/// Huge pages of one size that a guest keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pool {
    /// So many.
    pub pages: u64,
    /// And more, of memory that is free when they are asked for.
    pub on_demand: bool,
}

/// Those of all sizes, by bytes of a page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pools(BTreeMap<u64, Pool>);

impl Pools {
    /// What these containers may use together.
    pub fn of<'a>(containers: impl Iterator<Item = &'a HugePages>) -> Self {
        let mut pools = BTreeMap::<u64, Pool>::new();
        let mut shared = BTreeMap::new();
        for claim in containers.flat_map(HugePages::claims) {
            let pool = pools.entry(claim.page).or_default();
            let Some(bytes) = claim.bytes else {
                pool.on_demand = true;
                continue;
            };
            let pages = bytes.div_ceil(claim.page);
            if claim.holder == Holder::Container {
                pool.pages = pool.pages.saturating_add(pages);
            } else {
                let most = shared.entry((claim.page, claim.holder)).or_insert(0);
                *most = pages.max(*most);
            }
        }
        for ((page, _), pages) in shared {
            let pool = pools.entry(page).or_default();
            pool.pages = pool.pages.saturating_add(pages);
        }
        pools.retain(|_, pool| *pool != Pool::default());
        Self(pools)
    }

    /// Memory of the pages that are kept, bytes.
    pub fn bytes(&self) -> u64 {
        let bytes = self.0.iter().map(|(page, pool)| {
            // A page is found only where one begins. Of a size that is not small beside the
            // guest's memory, that takes up to one more.
            let beside = u64::from(*page > DEFAULT_PAGE && pool.pages > 0);
            page.saturating_mul(pool.pages.saturating_add(beside))
        });
        bytes.fold(0, u64::saturating_add)
    }

    /// As messages of the protocol.
    pub fn to_proto(&self) -> Vec<HugePagePool> {
        let pools = self.0.iter();
        pools
            .map(|(page, pool)| HugePagePool {
                page_bytes: *page,
                pages: pool.pages,
                on_demand: pool.on_demand,
                ..Default::default()
            })
            .collect()
    }
}

/// A container's own hugetlbfs.
fn claim_of_mount(mount: &Mount) -> Claim {
    let options = mount.options().as_deref().unwrap_or_default();
    let value = |name: &str| {
        let mut named = options.iter().filter_map(|option| option.split_once('='));
        named.rfind(|(key, _)| *key == name).map(|(_, value)| value)
    };
    // What is no number is refused by the guest's kernel, which mounts it. A share of the pool in
    // per cent is no limit from which to size the pool.
    let bytes = |name| option_bytes(value(name)?);
    Claim {
        page: bytes("pagesize")
            .filter(|page| *page > 0)
            .unwrap_or(DEFAULT_PAGE),
        holder: Holder::Container,
        bytes: bytes("size").max(bytes("min_size")),
    }
}

/// A directory of a hugetlbfs of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Device number of the hugetlbfs.
    device: u64,
    /// Size of its pages, bytes.
    page: u64,
    /// Most that its files may have, bytes.
    size: Option<u64>,
    /// Beneath its root.
    directory: PathBuf,
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Volume {
    /// The hugetlbfs that a bind mount's source is on, if it is on one.
    ///
    /// # Errors
    /// It is no directory, or its place on the file system cannot be found.
    pub fn at(source: &Path) -> Result<Option<Self>, Error> {
        // What is not there is told when it is shared.
        let Ok(system) = rustix::fs::statfs(source) else {
            return Ok(None);
        };
        if u64::try_from(system.f_type).ok() != Some(HUGETLBFS) {
            return Ok(None);
        }
        let shown = source.display();
        let failed = || Error::io(format!("look at {shown}"));
        let path = source.canonicalize().map_err(failed())?;
        let about = fs::metadata(&path).map_err(failed())?;
        if !about.is_dir() {
            return Err(Error::Unsupported(format!(
                "{shown} is a file in huge pages of the host, which a microVM does not see: mount the \
                 directory instead, in whose place the guest gets one with huge pages of its own"
            )));
        }
        let place = mount_table::place(about.dev(), &path).map_err(failed())?;
        let directory = place.ok_or_else(|| {
            Error::Invalid(format!(
                "{shown} is on no hugetlbfs that this host has mounted"
            ))
        })?;
        let page = u64::try_from(system.f_bsize).unwrap_or(DEFAULT_PAGE);
        Ok(Some(Self {
            device: about.dev(),
            page,
            // One without a limit tells none, or that of a signed -1.
            size: i64::try_from(system.f_blocks)
                .ok()
                .and_then(|blocks| u64::try_from(blocks).ok())
                .filter(|blocks| *blocks > 0)
                .map(|blocks| blocks.saturating_mul(page)),
            directory,
            uid: about.uid(),
            gid: about.gid(),
            mode: about.mode() & 0o7777,
        }))
    }

    fn claim(&self) -> Claim {
        Claim {
            page: self.page,
            holder: Holder::Volume(self.device),
            bytes: self.size,
        }
    }

    /// What a mount's source is in the guest.
    pub fn guest_source(&self) -> String {
        format!("{HUGE_PREFIX}{}/{}", self.device, self.directory.display())
    }

    /// As a message of the protocol.
    pub fn to_proto(&self) -> HugeDirectory {
        HugeDirectory {
            volume: self.device,
            page_bytes: self.page,
            size_bytes: self.size.unwrap_or(0),
            directory: self.directory.display().to_string(),
            uid: self.uid,
            gid: self.gid,
            mode: self.mode,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn spec(mounts: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.2.0","mounts":{mounts}}}"#)).unwrap()
    }

    fn limited(json: &str) -> HugePages {
        let resources = serde_json::from_str(&format!(r#"{{"hugepageLimits":{json}}}"#)).unwrap();
        HugePages::default().updated(&resources).unwrap()
    }

    fn with_volume(device: u64, bytes: Option<u64>) -> HugePages {
        HugePages {
            mounts: vec![Claim {
                page: 2 * MIB,
                holder: Holder::Volume(device),
                bytes,
            }],
            ..HugePages::default()
        }
    }

    fn pages(containers: &[HugePages]) -> Vec<(u64, u64, bool)> {
        let pools = Pools::of(containers.iter()).0;
        pools
            .into_iter()
            .map(|(page, pool)| (page / MIB, pool.pages, pool.on_demand))
            .collect()
    }

    #[test]
    fn sizes_have_names() {
        for (name, bytes) in [("2MB", 2 << 20), ("1GB", 1 << 30), ("64KB", 64 << 10)] {
            assert_eq!(page_size(name).unwrap(), bytes);
            assert_eq!(name_of_size(bytes), name);
        }
        for wrong in ["", "MB", "0MB", "2M", "2Mi", "-2MB", "99999999999999999GB"] {
            let error = page_size(wrong).unwrap_err().to_string();
            assert!(
                error.contains("is no size of huge pages"),
                "{wrong}: {error}"
            );
        }
    }

    #[test]
    fn limits_add_up_and_a_volume_counts_once() {
        let limit = limited(r#"[{"pageSize":"2MB","limit":6291456},{"pageSize":"1GB","limit":0}]"#);
        assert_eq!(pages(&[limit.clone(), limit.clone()]), [(2, 6, false)]);
        let (one, other) = (with_volume(7, Some(8 * MIB)), with_volume(8, Some(2 * MIB)));
        assert_eq!(pages(&[one.clone(), one.clone()]), [(2, 4, false)]);
        assert_eq!(pages(&[one.clone(), limit, other.clone()]), [(2, 8, false)]);
        assert_eq!(
            pages(&[one, with_volume(9, None), other]),
            [(2, 5, true)],
            "one has no limit"
        );
        assert_eq!(pages(&[HugePages::default()]), []);
    }

    #[test]
    fn a_containers_limit_goes_before_what_its_volumes_hold() {
        let resources = |limit: i64| {
            let text = format!(r#"{{"hugepageLimits":[{{"pageSize":"2MB","limit":{limit}}}]}}"#);
            serde_json::from_str::<LinuxResources>(&text).unwrap()
        };
        let volume = with_volume(7, Some(8 * MIB));
        let limited = volume.updated(&resources(2 << 20)).unwrap();
        assert_eq!(pages(std::slice::from_ref(&limited)), [(2, 1, false)]);
        assert_eq!(pages(&[volume.updated(&resources(0)).unwrap()]), []);
        assert_eq!(limited.updated(&resources(-1)).unwrap(), volume);
        let larger = limited.updated(&resources(4 << 20)).unwrap();
        assert_eq!(pages(&[limited.either(&larger)]), [(2, 2, false)]);
    }

    #[test]
    fn volumes_without_a_limit_have_the_pods() {
        let pod = std::env::temp_dir().join(format!("caisson-huge-{}", std::process::id()));
        fs::create_dir_all(&pod).unwrap();
        fs::write(pod.join("hugetlb.2MB.max"), "8388608\n").unwrap();
        let volume = |device| with_volume(device, None).within_pod(&pod);
        assert_eq!(pages(&[volume(7), volume(8)]), [(2, 4, false)]);
        let own = with_volume(9, Some(2 * MIB)).within_pod(&pod);
        assert_eq!(pages(&[volume(7), own]), [(2, 5, false)]);
        fs::write(pod.join("hugetlb.2MB.max"), "max\n").unwrap();
        assert_eq!(pages(&[volume(7)]), [(2, 0, true)]);
        fs::remove_dir_all(pod).unwrap();
    }

    #[test]
    fn a_containers_own_hugetlbfs_is_found() {
        let of = |options: &str| {
            let mount = format!(
                r#"[{{"destination":"/h","type":"hugetlbfs","source":"none","options":[{options}]}},
                   {{"destination":"/t","type":"tmpfs","options":["size=4M"]}}]"#
            );
            pages(&[HugePages::of_mounts(&spec(&mount)).unwrap()])
        };
        assert_eq!(of(""), [(2, 0, true)]);
        assert_eq!(of(r#""nosuid","size=5m""#), [(2, 3, false)]);
        assert_eq!(of(r#""size=50%""#), [(2, 0, true)]);
        assert_eq!(of(r#""pagesize=1G","size=1G""#), [(1024, 1, false)]);
        assert_eq!(of(r#""size=2M","min_size=4194304""#), [(2, 2, false)]);
    }

    #[test]
    fn large_pages_need_room_to_begin() {
        let small = limited(r#"[{"pageSize":"2MB","limit":4194304}]"#);
        assert_eq!(Pools::of([small].iter()).bytes(), 4 * MIB);
        let large = limited(r#"[{"pageSize":"1GB","limit":1073741824}]"#);
        assert_eq!(Pools::of([large].iter()).bytes(), 2 << 30);
    }

    #[test]
    fn other_directories_are_no_volumes() {
        assert_eq!(Volume::at(Path::new("/proc")).unwrap(), None);
        assert_eq!(Volume::at(Path::new("/nothing/here")).unwrap(), None);
    }
}
