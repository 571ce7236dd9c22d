//! System calls on volumes.

use std::fs;

use caisson_tests::{Host, seconds, until};

use super::{descriptors, tools, volume};

#[test]
fn calls_do_what_their_pages_say() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    let words = [
        "run",
        "--rm",
        "-v",
        &flag,
        tools(&host),
        "python3",
        "-c",
        include_str!("calls.py"),
        "/data",
    ];
    let finished = host.caisson(words).ok();
    assert_eq!(finished.stdout().matches("ok ").count(), 9, "{finished}");
    let mapped = fs::read(directory.join("mapped")).unwrap();
    assert_eq!(&mapped[..8], b"by write");
    assert_eq!(&mapped[4096..4104], b"by store");
}

/// People have 50,000 files and open one 100,000 times: so does `make soak` (`CAISSON_SOAK_FILES`).
#[test]
fn many_files_come_and_go_and_keep_no_descriptors() {
    let files: usize = match std::env::var("CAISSON_SOAK_FILES") {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("CAISSON_SOAK_FILES={text:?} is not a number")),
        Err(_) => 300,
    };
    let opens = 2 * files;
    let patience = 20.0 + files as f64 / 100.0;
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    let script = format!(
        r#"
import os
def step(name):
    open("/data/at-" + name, "w").close()
    while os.path.exists("/data/at-" + name):
        pass
os.mkdir("/data/many")
step("begin")
for number in range({files}):
    with open(f"/data/many/{{number}}", "w") as file:
        file.write(str(number))
names = os.listdir("/data/many")
assert sorted(map(int, names)) == list(range({files})), len(names)
assert sum(os.stat("/data/many/" + name).st_size for name in names) == sum(len(str(n)) for n in range({files}))
step("made")
for name in names:
    os.unlink("/data/many/" + name)
assert os.listdir("/data/many") == []
os.rmdir("/data/many")
step("removed")
open("/data/one", "w").close()
for _ in range({opens}):
    os.close(os.open("/data/one", os.O_RDONLY))
step("opened")
"#
    );
    let words = [
        "run",
        "--rm",
        "-v",
        &flag,
        tools(&host),
        "python3",
        "-c",
        &script,
    ];
    let mut running = host.command(words).within(3.0 * patience).start();
    let mut counts = Vec::new();
    for step in ["begin", "made", "removed", "opened"] {
        let mark = directory.join(format!("at-{step}"));
        let seen = until(seconds(patience), || {
            (mark.exists() || !running.is_running()).then_some(())
        });
        if seen.is_none() || !mark.exists() {
            break;
        }
        if step == "made" {
            assert_eq!(fs::read_dir(directory.join("many")).unwrap().count(), files);
        }
        counts.push(descriptors(&host));
        fs::remove_file(&mark).unwrap();
    }
    let finished = running.finish().ok();
    assert_eq!(counts.len(), 4, "{finished}");
    // One for each file whose name the guest keeps, and none for what has gone or was closed.
    assert!(counts[2] <= counts[0] + 20, "{counts:?}");
    assert!(counts[3] <= counts[0] + 20, "{counts:?}");
}
