//! Things that are missing, broken or too much: a clear error or exit code, and nothing left.

use std::fs;
use std::path::Path;

use caisson_tests::{Command, Finished, Host, Image, Layer, seconds};
use rustix::process::Signal;
use serde_json::json;

/// Runs `true` in the busybox image with a damaged copy of the installation.
fn run_with_damage(host: &Host, damage: impl FnOnce(&Path)) -> Finished {
    let image = host.busybox();
    let prefix = host.copy_of_prefix();
    damage(&prefix);
    let program = prefix.join("bin/caisson");
    let finished = Command::new([
        program.as_os_str(),
        "run".as_ref(),
        "--rm".as_ref(),
        image.as_ref(),
        "true".as_ref(),
    ])
    .run();
    assert_eq!(finished.code(), 125, "{finished}");
    finished.expect_error(&[])
}

#[test]
fn a_missing_kernel_is_named() {
    let host = Host::claim();
    run_with_damage(&host, |prefix| {
        fs::remove_file(prefix.join("share/caisson/vmlinux")).unwrap();
    })
    .expect_error(&["vmlinux"]);
}

#[test]
fn a_corrupt_kernel_is_named() {
    let host = Host::claim();
    run_with_damage(&host, |prefix| {
        fs::write(prefix.join("share/caisson/vmlinux"), vec![0x55; 1 << 20]).unwrap();
    })
    .expect_error(&["kernel"]);
}

#[test]
fn a_truncated_kernel_is_named() {
    let host = Host::claim();
    run_with_damage(&host, |prefix| {
        let kernel = prefix.join("share/caisson/vmlinux");
        let bytes = fs::read(&kernel).unwrap();
        fs::remove_file(&kernel).unwrap();
        fs::write(&kernel, &bytes[..bytes.len() / 2]).unwrap();
    })
    .expect_error(&["kernel"]);
}

#[test]
fn a_missing_guest_image_is_named() {
    let host = Host::claim();
    run_with_damage(&host, |prefix| {
        fs::remove_file(prefix.join("share/caisson/guest.erofs")).unwrap();
    })
    .expect_error(&["guest.erofs"]);
}

#[test]
fn a_corrupt_guest_image_fails_within_the_boot_deadline() {
    let host = Host::claim();
    run_with_damage(&host, |prefix| {
        let image = prefix.join("share/caisson/guest.erofs");
        let length = fs::metadata(&image).unwrap().len() as usize;
        fs::remove_file(&image).unwrap();
        fs::write(&image, vec![0xaa; length]).unwrap();
    });
}

#[test]
fn a_missing_vmm_is_named() {
    let host = Host::claim();
    run_with_damage(&host, |prefix| {
        fs::remove_file(prefix.join("libexec/caisson/caisson-vmm")).unwrap();
    })
    .expect_error(&["caisson-vmm"]);
}

#[test]
fn an_unknown_image_is_named() {
    let host = Host::claim();
    host.caisson(["run", "--rm", "caisson.test/nothing:1", "true"])
        .expect_error(&["caisson.test/nothing:1"])
        .expect_code(125);
    host.caisson(["run", "--rm", "Not An Image", "true"])
        .expect_error(&["not an image"])
        .expect_code(125);
}

#[test]
fn a_command_that_is_not_there_is_127() {
    let host = Host::claim();
    for command in ["no-such-program", "/no/such/program"] {
        host.caisson(["run", "--rm", host.busybox(), command])
            .expect_error(&[command])
            .expect_code(127);
    }
    host.caisson(["run", "--rm", "--entrypoint", "/nothing", host.busybox()])
        .expect_error(&["/nothing"])
        .expect_code(127);
}

#[test]
fn a_command_that_cannot_be_run_is_126() {
    let host = Host::claim();
    for command in ["/etc/passwd", "/etc"] {
        host.caisson(["run", "--rm", host.busybox(), command])
            .expect_error(&[command])
            .expect_code(126);
    }
}

#[test]
fn an_image_without_a_command_needs_one() {
    let host = Host::claim();
    let image = Image::new("caisson.test/empty:1").layer(Layer::new().file("file", 0o644, "x"));
    let image = host.load(&image);
    host.caisson(["run", "--rm", image])
        .expect_error(&["command"])
        .expect_code(125);
    host.caisson(["rmi", image]).ok();
}

#[test]
fn an_unknown_user_in_the_image_is_named() {
    let host = Host::claim();
    let image = Image::busybox("caisson.test/ghost:1").config("User", json!("ghost"));
    let image = host.load(&image);
    // An empty one is none.
    for flags in [&[][..], &["-u", ""]] {
        let finished = host
            .caisson([&["run", "--rm"], flags, &[image, "true"]].concat())
            .expect_error(&["ghost"]);
        assert!([125, 126].contains(&finished.code()), "{finished}");
    }
    host.caisson(["rmi", image]).ok();
}

#[test]
fn too_little_memory_is_refused() {
    let host = Host::claim();
    host.sh(["-m", "1m"], "true")
        .expect_error(&["memory"])
        .expect_code(125);
    host.sh(["-m", "0.5k"], "true")
        .expect_error(&["memory"])
        .expect_code(125);
}

#[test]
fn more_than_the_host_has_is_refused() {
    let host = Host::claim();
    host.sh(["--cpus", "100000"], "true")
        .expect_error(&["cpu"])
        .expect_code(125);
    host.sh(["-m", "1000t"], "true")
        .expect_error(&["memory"])
        .expect_code(125);
}

#[test]
fn a_fork_bomb_ends_with_its_container() {
    let host = Host::claim();
    host.caisson([
        "run",
        "-d",
        "--name",
        "bomb",
        "--pids-limit",
        "100",
        host.busybox(),
        "sh",
        "-c",
        "bomb() { bomb | bomb & }; while :; do bomb; done",
    ])
    .ok();
    std::thread::sleep(seconds(1.0));
    // The container is still in our hands.
    host.caisson(["stop", "-t", "1", "bomb"]).ok();
    host.caisson(["rm", "bomb"]).ok();
}

#[test]
fn a_fork_bomb_without_a_limit_cannot_take_the_guest() {
    let host = Host::claim();
    host.caisson([
        "run",
        "-d",
        "--name",
        "bomb",
        "-m",
        "256m",
        host.busybox(),
        "sh",
        "-c",
        "bomb() { bomb | bomb & }; while :; do bomb; done",
    ])
    .ok();
    std::thread::sleep(seconds(1.0));
    host.caisson(["rm", "-f", "bomb"]).ok();
}

#[test]
fn a_full_disk_in_the_guest_is_an_error_there() {
    let host = Host::claim();
    host.sh(
        ["-m", "128m", "--tmpfs", "/scratch:size=4m"],
        "dd if=/dev/zero of=/scratch/big bs=1M count=8 2>&1 | grep -c 'No space'; echo alive",
    )
    .expect_stdout("1\nalive\n");
}

#[test]
fn a_full_root_does_not_end_the_container() {
    let host = Host::claim();
    // Whatever holds the root's writable layer, it has an end; the container outlives it.
    let script = "n=0; while [ $n -lt 4096 ] && fallocate -l 268435456 /big$n; do n=$((n+1)); done
        dd if=/dev/zero of=/rest bs=1M count=256; rm -f /big* /rest; echo x >/small && echo alive";
    let finished = host
        .command([
            "run",
            "--rm",
            "-m",
            "128m",
            host.busybox(),
            "sh",
            "-c",
            script,
        ])
        .within(60.0)
        .run();
    // Ended by the memory limit, if the layer is in memory; told as such.
    assert!(
        finished.code() == 137 || finished.stdout() == "alive\n",
        "{finished}"
    );
}

#[test]
fn output_that_nobody_reads_does_not_grow_without_end() {
    let host = Host::claim();
    let mut reader_never_reads = std::process::Command::new(host.program())
        .args(["run", "--rm", "--name", "flood", host.busybox()])
        .args(["dd", "if=/dev/zero", "bs=64k", "count=100000"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    host.wait_for_status("flood", "running");
    std::thread::sleep(seconds(1.0));
    for program in ["caisson", "caisson-vmm", "containerd-shim-caisson-v2"] {
        for pid in host.processes_of(program) {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let anonymous: u64 = status
                .lines()
                .find_map(|line| line.strip_prefix("RssAnon:"))
                .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
                .unwrap_or(0);
            assert!(anonymous < 64 * 1024, "{program} holds {anonymous} KiB");
        }
    }
    host.caisson(["rm", "-f", "flood"]).ok();
    // What has been written is the reader's, as long as it is there.
    drop(reader_never_reads.stdout.take());
    reader_never_reads.wait().unwrap();
}

#[test]
fn a_slow_reader_gets_everything() {
    let host = Host::claim();
    // More than a pipe holds, and less than it takes to hold up the program.
    let script = format!(
        "'{}' run --rm {} seq 20000 | (sleep {}; md5sum)",
        host.program().display(),
        host.busybox(),
        seconds(2.0).as_secs_f64()
    );
    let expected = Command::new(["sh", "-c", "seq 20000 | md5sum"]).run().ok();
    Command::new(["sh", "-c", &script])
        .within(60.0)
        .run()
        .expect_stdout(&expected.stdout());
}

#[test]
fn a_reader_that_leaves_does_not_block_the_end() {
    let host = Host::claim();
    let script = format!(
        "'{}' run --rm {} yes | head -n 1",
        host.program().display(),
        host.busybox()
    );
    let mut running = Command::new(["sh", "-c", &script]).start();
    running.wait_for_stdout("y");
    let finished = running.finish().ok();
    assert_eq!(finished.stdout(), "y\n");
    // So with programs and copies of one that runs.
    host.caisson([
        "run",
        "-d",
        "--name",
        "one",
        host.busybox(),
        "sleep",
        "1000",
    ])
    .ok();
    let of = |words: &str| {
        let program = host.program();
        let script = format!("'{}' {words}; echo code $? >&2", program.display());
        Command::new(["sh", "-c", &format!("({script}) | head -c 2")]).run()
    };
    let finished = of("exec one yes").expect_stdout("y\n");
    assert!(finished.stderr().ends_with("code 137\n"), "{finished}");
    let finished = of("cp one:/bin/busybox -").ok();
    let said = finished.stderr();
    assert!(
        said.contains("standard output") && said.ends_with("code 1\n"),
        "{finished}"
    );
    // And with what verbs print.
    let gone = format!(
        "(sleep 1; '{}' version; echo code $? >&2) | true",
        host.program().display()
    );
    let finished = Command::new(["sh", "-c", &gone]).run().ok();
    assert_eq!(finished.stderr(), "code 0\n");
    let full = format!("'{}' images >/dev/full", host.program().display());
    Command::new(["sh", "-c", &full])
        .run()
        .expect_error(&["standard output", "No space left"])
        .expect_code(1);
    // Nothing of them runs on.
    let left = host.caisson(["exec", "one", "ps"]).ok().stdout();
    assert!(!left.contains("yes"), "{left}");
    host.caisson(["rm", "-f", "one"]).ok();
}

#[test]
fn interrupt_and_terminate_are_passed_on() {
    let host = Host::claim();
    for (signal, code) in [(Signal::INT, 40), (Signal::TERM, 41)] {
        let mut running = host
            .command([
                "run",
                "--rm",
                host.busybox(),
                "sh",
                "-c",
                "trap 'exit 40' INT; trap 'exit 41' TERM; echo ready; while :; do sleep 0.2; done",
            ])
            .start();
        running.wait_for_stdout("ready");
        running.signal(signal);
        running.finish().expect_code(code);
    }
}

#[test]
fn a_signal_during_the_start_leaves_nothing() {
    let host = Host::claim();
    let image = host.busybox();
    for delay in [20, 100, 300, 1000] {
        let running = host.command(["run", "--rm", image, "sleep", "2"]).start();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        running.signal_group(Signal::TERM);
        running.finish();
    }
}
