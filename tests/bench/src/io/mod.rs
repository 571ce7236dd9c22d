//! Disks, shared directories and networks: the same programs run in Caisson, under runc and in
//! QEMU's microvm machine (with virtiofsd and vhost-net), in turns.

mod container;
mod image;
mod machine;
mod net;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::TempDir;

use self::net::Link;
use crate::{
    child::quiet,
    error::BenchError,
    options::Options,
    report::{Measure, Series},
};

/// What is measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// A disk.
    Block,
    /// A directory of the host.
    Share,
    /// A network interface.
    Network,
}

/// One figure of a section.
struct Figure {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    /// From what the workload says to the unit.
    convert: fn(f64) -> f64,
}

const fn figure(
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    convert: fn(f64) -> f64,
) -> Figure {
    Figure {
        name,
        title,
        unit,
        convert,
    }
}

const BLOCK: [Figure; 5] = [
    figure(
        "random-read",
        "Disk: 4 KiB random reads, 16 at a time",
        "per s",
        |n| n,
    ),
    figure(
        "random-write",
        "Disk: 4 KiB random writes, 16 at a time",
        "per s",
        |n| n,
    ),
    figure(
        "sequential-read",
        "Disk: 1 MiB sequential reads",
        "MiB/s",
        |n| n / 1024.0,
    ),
    figure(
        "sequential-write",
        "Disk: 1 MiB sequential writes",
        "MiB/s",
        |n| n / 1024.0,
    ),
    figure("fsync", "Disk: a 4 KiB write with fsync", "ms", |n| {
        1000.0 / n
    }),
];

const SHARE: [Figure; 3] = [
    figure(
        "untar",
        "Shared directory: tar -x of 300 files of 4 KiB",
        "ms",
        |n| n,
    ),
    figure(
        "walk",
        "Shared directory: find and stat of them",
        "ms",
        |n| n,
    ),
    figure(
        "git-status",
        "Shared directory: git status of them",
        "ms",
        |n| n,
    ),
];

const NETWORK: [Figure; 5] = [
    figure(
        "tcp-out",
        "Network: TCP from the container",
        "Mbit/s",
        |n| n,
    ),
    figure("tcp-in", "Network: TCP to the container", "Mbit/s", |n| n),
    figure(
        "udp-out",
        "Network: UDP of 1400 bytes from the container, received",
        "Mbit/s",
        |n| n,
    ),
    figure(
        "udp-in",
        "Network: UDP of 1400 bytes to the container, received",
        "Mbit/s",
        |n| n,
    ),
    figure(
        "round-trips",
        "Network: a byte there and back by TCP",
        "ms",
        |n| n / 200.0,
    ),
];

impl Section {
    /// As the workload calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Share => "share",
            Self::Network => "network",
        }
    }

    fn figures(self) -> &'static [Figure] {
        match self {
            Self::Block => &BLOCK,
            Self::Share => &SHARE,
            Self::Network => &NETWORK,
        }
    }

    /// Who can run its workload on this host.
    fn contenders(self) -> Vec<Contender> {
        use Contender::{Caisson, CaissonVhost, Qemu, QemuRedirected, Runc};
        match self {
            Self::Block | Self::Share => vec![Caisson, Runc, Qemu],
            Self::Network if Path::new(VHOST_NET).exists() => {
                vec![Caisson, CaissonVhost, Runc, Qemu, QemuRedirected]
            }
            Self::Network => vec![Caisson, Runc, Qemu, QemuRedirected],
        }
    }

    fn definition(self, figure: &Figure) -> String {
        let how = match self {
            Self::Block => {
                "fio with O_DIRECT on a file of 64 MiB: Caisson's on the container's writable layer, runc's on the \
                 host's own ext4, QEMU's on an ext4 disk behind virtio-blk."
            }
            Self::Share => {
                "On a directory of the host: by virtio-fs from caisson-fs, as a bind mount of runc, by virtio-fs \
                 from virtiofsd under QEMU. Names that were remembered have expired."
            }
            Self::Network => {
                "iperf3, and bash for the bytes, against the host: Caisson's and runc's by the same veth pair, \
                 which Caisson's VMM or, with `vhost_net = true`, the host's kernel moves frames from and to, QEMU's \
                 by a tap with vhost-net, which is on the host itself or, redirected, behind such a pair as \
                 Caisson's is."
            }
        };
        let better = if matches!(figure.unit, "ms") {
            "Less"
        } else {
            "More"
        };
        format!("{how} {better} is better.")
    }
}

const VHOST_NET: &str = "/dev/vhost-net";

/// What all contenders use.
pub struct Ground {
    scratch: TempDir,
    rootfs: PathBuf,
    erofs: PathBuf,
    /// The directory of the host.
    share: PathBuf,
    caisson: PathBuf,
    kernel: PathBuf,
    memory_mib: u32,
    /// Of each of fio's and iperf3's runs.
    seconds: u32,
    /// Longest wait for a workload.
    limit: Duration,
}

impl Ground {
    /// Makes images and loads Caisson's.
    ///
    /// # Errors
    /// A program is missing, the disk is full, or `caisson load` fails.
    pub fn make(options: &Options) -> Result<Self, BenchError> {
        // Not on a tmpfs, as /tmp may be: disks are measured.
        let scratch = tempfile::Builder::new()
            .prefix("caisson-bench-")
            .tempdir_in("/var/tmp")
            .map_err(BenchError::io("cannot make a directory in /var/tmp"))?;
        let rootfs = image::make_rootfs(scratch.path())?;
        let erofs = scratch.path().join("rootfs.erofs");
        image::make_erofs(&rootfs, &erofs)?;
        let share = scratch.path().join("share");
        std::fs::create_dir(&share).map_err(BenchError::io("cannot make a directory"))?;
        image::make_tree(&share.join("tree.tar"))?;
        let ground = Self {
            rootfs,
            erofs,
            share,
            caisson: options.file("bin/caisson"),
            kernel: options.guest.kernel.clone(),
            memory_mib: 512,
            seconds: options.seconds,
            limit: options.limit * 20,
            scratch,
        };
        let archive = ground.scratch.path().join("image.tar");
        crate::image::make_archive(&ground.rootfs, &archive, container::REFERENCE)?;
        quiet(
            Command::new(&ground.caisson)
                .args(["load", "-i"])
                .arg(&archive),
        )?;
        let _ = std::fs::remove_file(archive);
        if !Path::new(VHOST_NET).exists() {
            // A kernel without it leaves QEMU its own, and Caisson too.
            let _ = quiet(Command::new("modprobe").arg("vhost_net"));
        }
        Ok(ground)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // The store is the user's, who would find it there.
        let _ = quiet(Command::new(&self.caisson).args(["rmi", container::REFERENCE]));
    }
}

/// Who runs a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    Caisson,
    /// With `vhost_net = true`.
    CaissonVhost,
    Runc,
    Qemu,
    /// Its tap behind a veth pair, as in a pod.
    QemuRedirected,
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Caisson => "caisson",
            Self::CaissonVhost => "caisson, vhost-net",
            Self::Runc => "runc",
            Self::Qemu => "qemu microvm",
            Self::QemuRedirected => "qemu microvm, redirected",
        }
    }

    fn run(self, ground: &Ground, section: Section) -> Result<String, BenchError> {
        match self {
            Self::Caisson => container::caisson(ground, section),
            Self::CaissonVhost => container::caisson_with_vhost_net(ground),
            Self::Runc => container::runc(ground, section),
            Self::Qemu => machine::run(ground, section, Link::tap),
            Self::QemuRedirected => machine::run(ground, section, Link::redirected),
        }
    }
}

/// Runs the section's workload by each contender in turn.
///
/// # Errors
/// When one fails or does not say all figures.
pub fn measure(ground: &Ground, section: Section, runs: usize) -> Result<Vec<Measure>, BenchError> {
    let _server = match section {
        Section::Network => Some(net::serve()?),
        _ => None,
    };
    let figures = section.figures();
    let contenders = section.contenders();
    // By figure, then by contender.
    let mut values = vec![vec![Vec::new(); contenders.len()]; figures.len()];
    for run in 1..=runs {
        for (index, contender) in contenders.iter().enumerate() {
            let said = contender.run(ground, section)?;
            for (figure, values) in figures.iter().zip(&mut values) {
                let result = find_result(contender.name(), &said, figure.name)?;
                values[index].push((figure.convert)(result));
            }
        }
        eprintln!("caisson-bench: {}: {run} of {runs}", section.name());
    }
    Ok(figures
        .iter()
        .zip(values)
        .map(|(figure, values)| Measure {
            title: figure.title.into(),
            definition: section.definition(figure),
            unit: figure.unit,
            series: contenders
                .iter()
                .zip(values)
                .map(|(contender, values)| Series {
                    name: contender.name().into(),
                    values,
                })
                .collect(),
        })
        .collect())
}

/// The number in "RESULT name number".
fn find_result(contender: &str, said: &str, name: &str) -> Result<f64, BenchError> {
    let number = said.lines().find_map(|line| {
        let mut words = line.trim().split(' ');
        (words.next() == Some("RESULT") && words.next() == Some(name))
            .then(|| words.next()?.parse::<f64>().ok())
            .flatten()
    });
    number
        .filter(|number| *number > 0.0)
        .ok_or_else(|| BenchError::Program {
            program: format!("the workload under {contender}"),
            problem: format!("does not say {name}"),
            output: said
                .chars()
                .rev()
                .take(600)
                .collect::<Vec<_>>()
                .iter()
                .rev()
                .collect(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_and_their_absence_is_told() {
        let said = "x\r\nRESULT tcp-out 12.5\r\nRESULT tcp-in 0\nRESULT fsync null\nDONE\n";
        assert_eq!(find_result("caisson", said, "tcp-out").unwrap(), 12.5);
        for name in ["tcp-in", "fsync", "walk"] {
            let error = find_result("runc", said, name).unwrap_err().to_string();
            assert!(
                error.contains("under runc") && error.contains(name),
                "{error}"
            );
        }
    }
}
