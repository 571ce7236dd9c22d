//! `caisson-vmm` alone, driven by its control API, with Linux as its guest: what no command of
//! Caisson asks of it yet, and what must hold whoever asks.

mod machine;

use std::fs;

use caisson_tests::Host;
use caisson_vmm_api::{
    BlockConfig, BlockContents, DeviceConfig, ExitReason, Fd, Request, Response, RunState,
};
use machine::{Machine, Plan, root_image};

/// Prints a line a second for everything that the devices do.
const EVERYTHING: &str = r#"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
# What is added comes online by itself.
echo online > /sys/devices/system/memory/auto_online_blocks
# Nothing of it may be answered from memory.
echo 1 > /proc/sys/vm/drop_caches
n=0
while :; do
    n=$((n + 1))
    echo "tick $n"
    echo "kib $(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)"
    printf '%-512s' "block $n" | dd of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null
    echo 3 > /proc/sys/vm/drop_caches
    dd if=/dev/vdb bs=512 count=1 2>/dev/null | sed 's/ *$//'
    echo
    echo "random $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c)"
    sleep 1
done
"#;

fn scratch_disk(plan: &mut Plan, path: &std::path::Path) -> DeviceConfig {
    let file = plan.open_for_writing(path);
    DeviceConfig::Block(BlockConfig {
        serial: "scratch".into(),
        contents: BlockContents::File(file),
        read_only: false,
        rate_limit: None,
    })
}

/// The number after `word` in the last line that starts with it.
fn last(output: &str, word: &str) -> u64 {
    output
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix(word)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no line with {word:?} in the console's output:\n{output}"))
}

#[test]
fn a_guest_goes_on_after_save_and_restore_with_its_devices() {
    let host = Host::claim();
    let root = root_image(&host, EVERYTHING);
    let disk = host.scratch().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let vsock = host.scratch().join("vsock");

    let plan = || {
        let mut plan = Plan::new(&host);
        plan.root(&root);
        let disk = scratch_disk(&mut plan, &disk);
        plan.device(disk);
        plan.device(DeviceConfig::Rng);
        plan.device(DeviceConfig::Balloon);
        plan.device(DeviceConfig::Mem);
        plan.vsock(&vsock);
        plan.hotplug_mib(256);
        plan
    };
    let mut first = Machine::boot(&host, plan());
    first.wait_for("random 16");
    first.call(Request::SetHotplugMemory { mib: 128 });
    let start = last(&first.output(), "kib ");
    first.wait_until("128 MiB more", |output| {
        last(output, "kib ") == start + (128 << 10)
    });
    first.call(Request::Pause);
    let saved = first.save(host.scratch());
    let ticks = last(&first.output(), "tick ");
    first.stop();

    fs::remove_file(&vsock).unwrap();
    let mut second = Machine::restore(&host, plan(), &saved);
    assert_eq!(second.describe().state, RunState::Paused);
    assert_eq!(second.output(), "", "a paused guest is silent");
    second.call(Request::Resume);
    second.wait_until("three more ticks", |output| {
        output
            .lines()
            .filter(|line| line.starts_with("tick "))
            .count()
            >= 3
    });
    let output = second.output();
    let ticked: Vec<u64> = output
        .lines()
        .filter_map(|line| line.strip_prefix("tick ")?.parse().ok())
        .collect();
    assert!(
        ticked[0] == ticks + 1 || ticked[0] == ticks + 2,
        "it went on where it was, at {ticks}: {ticked:?}"
    );
    second.wait_until("disk and entropy", |output| {
        last(output, "block ") > ticks && output.contains("random 16")
    });
    second.call(Request::SetHotplugMemory { mib: 192 });
    second.wait_until("64 MiB more", |output| {
        last(output, "kib ") == start + (192 << 10)
    });
    second.call(Request::SetBalloon { mib: 32 });
    second.wait_until_described("a balloon of 32 MiB", |now| now.balloon_mib == 32);
    assert!(second.describe().slots.iter().all(|slot| slot.active));
    second.stop();
}

#[test]
fn one_saved_guest_becomes_two() {
    let host = Host::claim();
    let root = root_image(
        &host,
        "n=0; while :; do n=$((n + 1)); echo \"tick $n\"; sleep 1; done",
    );
    let plan = || {
        let mut plan = Plan::new(&host);
        plan.root(&root);
        plan
    };
    let mut first = Machine::boot(&host, plan());
    first.wait_for("tick 2");
    first.call(Request::Pause);
    let saved = first.save(host.scratch());
    first.stop();
    let mut twins = [
        Machine::restore(&host, plan(), &saved),
        Machine::restore(&host, plan(), &saved),
    ];
    for twin in &mut twins {
        twin.call(Request::Resume);
    }
    for twin in &mut twins {
        twin.wait_for("tick 5");
        assert!(!twin.output().contains("tick 2\n"));
    }
    for twin in twins {
        twin.stop();
    }
}

#[test]
fn a_broken_snapshot_is_refused() {
    let host = Host::claim();
    let root = root_image(&host, "echo up; sleep 1000");
    let plan = || {
        let mut plan = Plan::new(&host);
        plan.root(&root);
        plan
    };
    let mut first = Machine::boot(&host, plan());
    first.wait_for("up");
    let early = first.try_save(host.scratch()).unwrap_err();
    assert!(early.contains("pause"), "{early}");
    first.call(Request::Pause);
    let saved = first.save(host.scratch());
    first.stop();

    let state = fs::read(&saved.state).unwrap();
    fs::write(&saved.state, &state[..state.len() / 2]).unwrap();
    Machine::expect_no_restore(&host, plan(), &saved, "state");
    fs::write(&saved.state, &state).unwrap();
    let memory = fs::File::options().write(true).open(&saved.memory).unwrap();
    memory.set_len(4096).unwrap();
    Machine::expect_no_restore(&host, plan(), &saved, "memory");
}

#[test]
fn linux_runs_from_persistent_memory_and_writes_to_it() {
    let host = Host::claim();
    let root = root_image(
        &host,
        r#"
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
grep ' / ' /proc/mounts
printf written | dd of=/dev/pmem1 conv=fsync 2>/dev/null && echo stored
dd if=/dev/zero of=/dev/pmem0 count=1 conv=fsync 2>/dev/null || echo "read-only"
sleep 1000
"#,
    );
    let written = host.scratch().join("written");
    // virtio-pmem maps in units of 2 MiB.
    fs::write(&written, vec![0; 16 << 20]).unwrap();
    let mut plan = Plan::new(&host);
    plan.root_on_pmem(&root);
    let file = plan.open_for_writing(&written);
    plan.device(DeviceConfig::Pmem {
        file,
        read_only: false,
    });
    let mut machine = Machine::boot(&host, plan);
    machine.wait_for("stored");
    machine.wait_for("read-only");
    assert!(
        machine.output().contains("/dev/root / erofs ro"),
        "{}",
        machine.output()
    );
    assert_eq!(&fs::read(&written).unwrap()[..7], b"written");
    machine.stop();
}

#[test]
fn a_disk_that_comes_late_is_found_and_leaves_again() {
    let host = Host::claim();
    let root = root_image(
        &host,
        r#"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
cd /sys/bus/platform/drivers/virtio-mmio
until [ -e /dev/vdb ]; do
    for slot in /sys/bus/platform/devices/virtio-mmio.*; do
        name=${slot##*/}
        [ -e $name ] || echo $name 2>/dev/null > bind
    done
    sleep 1
done
echo "found $(head -c 5 /dev/vdb)"
slot=$(basename $(readlink -f /sys/block/vdb/device/..))
echo $slot
echo $slot > unbind
echo gone
sleep 1000
"#,
    );
    let disk = host.scratch().join("late");
    fs::write(&disk, {
        let mut bytes = b"hello".to_vec();
        bytes.resize(1 << 20, 0);
        bytes
    })
    .unwrap();
    let mut plan = Plan::new(&host);
    plan.root(&root);
    let mut machine = Machine::boot(&host, plan);
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&disk)
        .unwrap();
    let late = DeviceConfig::Block(BlockConfig {
        serial: "late".into(),
        contents: BlockContents::File(Fd(0)),
        read_only: false,
        rate_limit: None,
    });
    let Response::Attached { slot } = machine.call_with(Request::Attach(late), &[file.into()])
    else {
        panic!("attach has another answer");
    };
    machine.wait_for("found hello");
    machine.wait_for("gone");
    assert!(machine.output().contains(&format!("virtio-mmio.{slot}")));
    machine.call(Request::Detach { slot });
    assert!(
        machine
            .describe()
            .slots
            .iter()
            .all(|filled| filled.slot != slot)
    );
    machine.stop();
}

#[test]
fn a_closed_control_socket_ends_the_guest() {
    let host = Host::claim();
    let root = root_image(&host, "echo up; sleep 1000");
    let mut plan = Plan::new(&host);
    plan.root(&root);
    let mut machine = Machine::boot(&host, plan);
    machine.wait_for("up");
    machine.abandon();
}

#[test]
fn a_guest_that_ends_says_how() {
    let host = Host::claim();
    for (script, expected) in [
        ("exit 3", ExitReason::GuestPanic),
        ("reboot -f", ExitReason::GuestShutdown),
    ] {
        let root = root_image(&host, script);
        let mut plan = Plan::new(&host);
        plan.root(&root);
        let (reason, tail) = Machine::boot(&host, plan).wait_for_exit();
        assert_eq!(reason, expected, "{tail}");
        if expected == ExitReason::GuestPanic {
            assert!(tail.contains("Attempted to kill init"), "{tail}");
        }
    }
}
