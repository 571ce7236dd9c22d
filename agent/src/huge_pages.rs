//! Huge pages that the guest keeps for containers, and the pod's hugetlbfs over them
//! (Linux: admin-guide/mm/hugetlbpage.rst).

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_protocol::agent::{HugeDirectory, HugePagePool};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use tokio::time::Instant;

use crate::{
    boot,
    container::{
        mounts::{attach, new_mount},
        paths::{self, Missing},
    },
    failure::{During, Failure, Kind, Result},
};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// How long the guest may go without a page more before it is known to have no more: memory that
/// was just plugged comes online a little later.
const PATIENCE: Duration = Duration::from_secs(3);

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// The kernel's pool of pages of one size.
#[derive(Debug)]
struct Pool {
    directory: PathBuf,
    page: u64,
}

impl Pool {
    /// Those of all sizes that the processor has.
    fn all() -> Result<Vec<Self>> {
        // A processor without any has no directory of them.
        let entries = match fs::read_dir(POOLS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.during(|| format!("list {POOLS}"))?,
        };
        Ok(entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let page = page_of(entry.file_name().to_str()?)?;
                Some(Self {
                    directory: entry.path(),
                    page,
                })
            })
            .collect())
    }

    fn write(&self, file: &str, value: u64) -> Result<()> {
        let path = self.directory.join(file);
        fs::write(&path, value.to_string())
            .during(|| format!("write \"{value}\" to {}", path.display()))
    }

    fn read(&self, file: &str) -> Result<u64> {
        let path = self.directory.join(file);
        let text = fs::read_to_string(&path).during(|| format!("read {}", path.display()))?;
        text.trim()
            .parse()
            .map_err(|_| Failure::internal(format!("{} holds no number: {text:?}", path.display())))
    }

    /// Pages that stay whether they are used or not.
    fn kept(&self) -> Result<u64> {
        let all = self.read("nr_hugepages")?;
        Ok(all.saturating_sub(self.read("surplus_hugepages")?))
    }

    /// Asks for `pages` once; how many are kept then.
    fn resize(&self, pages: u64) -> Result<u64> {
        self.write("nr_hugepages", pages)?;
        self.kept()
    }
}

/// Bytes of a page by the name of its pool: "hugepages-2048kB".
fn page_of(name: &str) -> Option<u64> {
    let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
    kib.parse::<u64>().ok()?.checked_mul(1024)
}

/// Has the kernel keep the pages of `wanted`, and of other sizes none.
///
/// # Errors
/// A size that the guest's processor does not have, more pages than its memory has room for.
pub async fn keep(wanted: &[HugePagePool]) -> Result<()> {
    let pools = Pool::all()?;
    for one in wanted {
        if !pools.iter().any(|pool| pool.page == one.page_bytes) {
            return Err(Failure::invalid(absent(one.page_bytes, &pools)));
        }
    }
    for pool in &pools {
        let one = wanted.iter().find(|one| one.page_bytes == pool.page);
        let (pages, on_demand) = one.map_or((0, false), |one| (one.pages, one.on_demand));
        allow_on_demand(pool, on_demand)?;
        fill(pool, pages).await?;
    }
    Ok(())
}

fn allow_on_demand(pool: &Pool, allowed: bool) -> Result<()> {
    const FILE: &str = "nr_overcommit_hugepages";
    // The memory itself is the limit.
    let beyond = if allowed { u64::MAX / pool.page } else { 0 };
    // The file refuses every value for sizes that the kernel cannot make on demand.
    if pool.read(FILE)? == beyond {
        return Ok(());
    }
    pool.write(FILE, beyond).map_err(|failure| {
        Failure::new(
            failure.kind,
            format!(
                "huge pages of {} are not made on demand, so give the container a limit of them, \
                 or the volume a size: {failure}",
                size(pool.page)
            ),
        )
    })
}

async fn fill(pool: &Pool, pages: u64) -> Result<()> {
    let mut kept = pool.resize(pages)?;
    let mut deadline = Instant::now() + PATIENCE;
    while kept < pages {
        if Instant::now() >= deadline {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                format!(
                    "the guest's memory has room for {kept} of {pages} huge pages of {}: the rest \
                     of it is in use, or free only in smaller pieces; give the container a larger \
                     memory limit, or smaller or fewer huge pages (those larger than 2 MiB are \
                     found only in a microVM that boots for the container that asks for them)",
                    size(pool.page)
                ),
            ));
        }
        gather();
        tokio::time::sleep(LOOK).await;
        let now = pool.resize(pages)?;
        if now > kept {
            deadline = Instant::now() + PATIENCE;
        }
        kept = now;
    }
    Ok(())
}

/// Gives up what files have cached and moves pages together. It only helps: what it does not do shows
/// in the number of pages.
fn gather() {
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
    let _ = fs::write("/proc/sys/vm/compact_memory", "1");
}

fn absent(page: u64, pools: &[Pool]) -> String {
    let mut there: Vec<u64> = pools.iter().map(|pool| pool.page).collect();
    there.sort_unstable();
    let there: Vec<String> = there.into_iter().map(size).collect();
    let there = if there.is_empty() {
        "none".to_owned()
    } else {
        there.join(", ")
    };
    format!(
        "a microVM on this host has no huge pages of {}, as the processor (or the hypervisor above) \
         does not offer them; it has: {there}",
        size(page)
    )
}

/// "2 MiB".
fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let fits = |(_, shift): &&(&str, u32)| bytes >= 1 << shift && bytes.trailing_zeros() >= *shift;
    units.iter().find(fits).map_or_else(
        || format!("{bytes} bytes"),
        |(unit, shift)| format!("{} {unit}", bytes >> shift),
    )
}

/// Makes the directories that a container's mounts name, and the hugetlbfs they are on where no
/// container has had it before.
///
/// # Errors
/// Those of the mounts.
pub fn make(directories: &[HugeDirectory]) -> Result<()> {
    for directory in directories {
        make_one(directory).map_err(|failure| {
            Failure::new(
                failure.kind,
                format!(
                    "huge pages of volume {}: {}",
                    directory.volume, failure.message
                ),
            )
        })?;
    }
    Ok(())
}

fn make_one(wanted: &HugeDirectory) -> Result<()> {
    let root = Path::new(boot::HUGE_DIR).join(wanted.volume.to_string());
    let fresh = !root.exists();
    if fresh {
        mount(wanted, &root)?;
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&root, flags, Mode::empty())
        .during(|| format!("open {}", root.display()))?;
    let path = Path::new(&wanted.directory);
    let is_root = wanted.directory.is_empty();
    let there = if is_root {
        !fresh
    } else {
        paths::open(root.as_fd(), path, OFlags::PATH).is_ok()
    };
    let directory = paths::open_or_create(root.as_fd(), path, Missing::Directory)?;
    if there {
        return Ok(());
    }
    // As on the host, where a kubelet gives the volume to the pod's group.
    let path = paths::proc_path(directory.as_fd());
    let owner = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
    rustix::fs::chown(&path, Some(owner.0), Some(owner.1))
        .and_then(|()| rustix::fs::chmod(&path, Mode::from_raw_mode(wanted.mode)))
        .during(|| "set its owner and mode".to_owned())
}

fn mount(wanted: &HugeDirectory, root: &Path) -> Result<()> {
    let (page, limit) = (wanted.page_bytes.to_string(), wanted.size_bytes.to_string());
    let mut data = vec![("pagesize", page.as_str())];
    if wanted.size_bytes != 0 {
        data.push(("size", &limit));
    }
    let made = new_mount("hugetlbfs", Some("none"), &[], &data, 0)?;
    fs::create_dir_all(root).during(|| format!("create {}", root.display()))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mounted = rustix::fs::open(root, flags, Mode::empty())
        .and_then(|target| attach(made.as_fd(), target.as_fd()));
    if mounted.is_err() {
        // The next container tries again.
        let _ = fs::remove_dir(root);
    }
    mounted.during(|| format!("mount on {}", root.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_named_by_their_pages() {
        assert_eq!(page_of("hugepages-2048kB"), Some(2 << 20));
        assert_eq!(page_of("hugepages-1048576kB"), Some(1 << 30));
        assert_eq!(page_of("hugepages-x"), None);
        assert_eq!(page_of("hugepages-18446744073709551615kB"), None);
    }

    #[test]
    fn an_absent_size_is_told_with_those_that_are_there() {
        let pool = |page| Pool {
            directory: PathBuf::new(),
            page,
        };
        let message = absent(1 << 30, &[pool(2 << 20)]);
        assert!(
            message.contains("no huge pages of 1 GiB") && message.ends_with("it has: 2 MiB"),
            "{message}"
        );
        assert!(absent(2 << 20, &[]).ends_with("it has: none"));
        assert_eq!(size(64 << 10), "64 KiB");
        assert_eq!(size(3), "3 bytes");
    }
}
