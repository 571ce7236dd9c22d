//! Huge pages in the guest: of volumes on a hugetlbfs of the host, of a container's own hugetlbfs, and
//! by the limits of a specification.

use std::fs;

use caisson_tests::{Host, seconds, until};
use serde_json::{Value, json};

use crate::{cri::huge_pages::Volume, oci::Oci, storage::tools};

/// Maps huge pages, and more than there are.
const MAPS: &str = r#"
import errno, mmap, os
PAGE, MAP_HUGETLB = 2 << 20, 0x40000

def counted(what):
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"HugePages_{what}:"))

def refused(work):
    try:
        work()
    except OSError as error:
        return error.errno in (errno.ENOMEM, errno.ENOSPC)

assert (counted("Total"), counted("Free")) == (4, 4), (counted("Total"), counted("Free"))
with open("/huge/file", "wb+") as file:
    file.truncate(3 * PAGE)
    mapped = mmap.mmap(file.fileno(), 3 * PAGE)
    for page in range(3):
        mapped[page * PAGE : page * PAGE + 5] = b"page%d" % page
assert counted("Free") == 1, counted("Free")
with open("/huge/file", "rb") as file:
    assert file.read(5) == b"page0"
with open("/huge/more", "wb+") as file:
    file.truncate(2 * PAGE)
    assert refused(lambda: mmap.mmap(file.fileno(), 2 * PAGE)), "more than the volume's size"
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB
assert refused(lambda: mmap.mmap(-1, 2 * PAGE, flags=flags)), "more than there are"
anonymous = mmap.mmap(-1, PAGE, flags=flags)
anonymous[0] = 1
assert counted("Free") == 0, counted("Free")
os.mkdir("/huge/made")
print("mapped")
"#;

#[test]
fn a_volume_of_the_host_stands_for_pages_of_the_guest() {
    let host = Host::claim();
    let volume = Volume::mount(host.scratch().join("volume"), "pagesize=2M,size=8M");
    fs::create_dir(volume.0.join("below")).unwrap();
    let flag = format!("{}:/huge", volume.0.display());
    let run = |flag: &str, words: &[&str]| {
        let mut all = vec!["run", "--rm", "-m", "128m", "-v", flag, tools(&host)];
        all.extend(words);
        host.caisson(all)
    };
    run(&flag, &["python3", "-c", MAPS])
        .ok()
        .expect_stdout("mapped\n");
    let below = format!("{}/below:/huge:ro", volume.0.display());
    let script = "stat -f -c '%t %s' /huge; touch /huge/x 2>&1 | grep -o Read-only; ls /huge";
    run(&below, &["sh", "-c", script])
        .ok()
        .expect_stdout("958458f6 2097152\nRead-only\n");
    // Files of the host's pages cannot be there.
    let left: Vec<_> = fs::read_dir(&volume.0).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    fs::write(volume.0.join("file"), "").unwrap();
    let file = format!("{}/file:/file", volume.0.display());
    run(&file, &["true"]).expect_error(&["volume/file", "mount the directory instead"]);
}

fn with_hugetlbfs(config: &mut Value, options: &[&str], limits: &Value) {
    config["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/huge", "type": "hugetlbfs", "source": "none", "options": options,
    }));
    config["linux"]["resources"]["hugepageLimits"] = limits.clone();
}

#[test]
fn a_containers_own_hugetlbfs_and_its_limits() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let script = "cd /sys/fs/cgroup; cat hugetlb.2MB.max hugetlb.2MB.rsvd.max
        total() { awk '/^HugePages_Total:/ { print $2 }' /proc/meminfo; }
        total
        fallocate -l 4194304 /huge/x && echo four
        fallocate -l 2097152 /huge/y 2>/dev/null || echo full
        rm /huge/*
        until [ $(cat hugetlb.2MB.max) = 12582912 ]; do sleep 0.1; done
        total";
    let bundle = oci.bundle(script, |config| {
        let limits =
            json!([{ "pageSize": "2MB", "limit": 6 << 20 }, { "pageSize": "1GB", "limit": 0 }]);
        with_hugetlbfs(config, &["pagesize=2M", "size=4M"], &limits);
    });
    let running = oci.create("one", &bundle, "");
    oci.run(&["start", "one"]).ok();
    let used = until(seconds(20.0), || {
        running.stdout_so_far().contains("full").then_some(())
    });
    assert!(used.is_some(), "{}", running.finish());
    let more = host.scratch().join("more.json");
    let resources = json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 12 << 20 }] });
    fs::write(&more, resources.to_string()).unwrap();
    oci.run(&["update", "--resources", more.to_str().unwrap(), "one"])
        .ok();
    let finished = running.finish().ok();
    assert_eq!(
        finished.stdout(),
        "6291456\n6291456\n3\nfour\nfull\n6\n",
        "{finished}"
    );
    oci.run(&["delete", "one"]).ok();
}

#[test]
fn large_pages_and_sizes_that_are_none() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let script = "cat /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages
        fallocate -l 1073741824 /huge/x && echo one; fallocate -l 2147483648 /huge/y 2>/dev/null || echo full";
    let bundle = oci.bundle(script, |config| {
        with_hugetlbfs(config, &["pagesize=1G", "size=1G"], &json!([]));
    });
    let running = oci.create("one", &bundle, "");
    oci.run(&["start", "one"]).ok();
    let finished = running.finish().ok();
    assert_eq!(finished.stdout(), "1\none\nfull\n", "{finished}");
    oci.run(&["delete", "one"]).ok();

    let file = bundle.join("config.json");
    let text = fs::read_to_string(&file).unwrap();
    for (limit, told) in [
        (
            json!({ "pageSize": "4MB", "limit": 4 << 20 }),
            "no huge pages of 4 MiB",
        ),
        (
            json!({ "pageSize": "2 MB", "limit": 1 }),
            "\"2 MB\" is no size of huge pages",
        ),
    ] {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["linux"]["resources"]["hugepageLimits"] = json!([limit]);
        fs::write(&file, config.to_string()).unwrap();
        oci.run(&["create", "--bundle", bundle.to_str().unwrap(), "two"])
            .expect_error(&[told]);
    }
    oci.run(&["delete", "--force", "two"]).ok();
}
