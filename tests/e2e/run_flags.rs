//! `caisson run`: output, exit codes, and the flags that say what runs and as whom.

use caisson_tests::{Host, Image};
use serde_json::json;

#[test]
fn output_and_exit_code_are_the_commands() {
    let host = Host::claim();
    let finished = host
        .sh([], "echo out; echo err >&2; exit 42")
        .expect_code(42);
    assert_eq!(finished.stdout(), "out\n");
    assert_eq!(finished.stderr(), "err\n");
}

#[test]
fn devices_are_for_every_user() {
    let host = Host::claim();
    host.sh(
        ["-u", "1000:1000"],
        "cd /dev; stat -c '%a %n' full null random tty urandom zero; echo x >null && echo written",
    )
    .expect_stdout("666 full\n666 null\n666 random\n666 tty\n666 urandom\n666 zero\nwritten\n");
}

#[test]
fn it_runs_on_a_kernel_of_its_own() {
    let host = Host::claim();
    let ours = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let theirs = host.sh([], "uname -r").ok();
    assert_ne!(theirs.line(), ours.trim());
    assert!(theirs.line().starts_with(|c: char| c.is_ascii_digit()));
}

#[test]
fn the_command_is_process_1_and_sees_no_other() {
    let host = Host::claim();
    host.sh(
        [],
        "echo $$; set -- /proc/[0-9]*; echo $*; mount | grep -c cgroup2",
    )
    .expect_stdout("1\n/proc/1\n1\n");
}

#[test]
fn the_images_command_is_the_default_and_words_replace_it() {
    let host = Host::claim();
    let image = Image::busybox("caisson.test/cmd:1").config("Cmd", json!(["echo", "default"]));
    let image = host.load(&image);
    host.caisson(["run", "--rm", image])
        .expect_stdout("default\n");
    host.caisson(["run", "--rm", image, "echo", "other"])
        .expect_stdout("other\n");
    host.caisson(["rmi", image]).ok();
}

#[test]
fn the_entrypoint_comes_before_the_words_and_can_be_replaced() {
    let host = Host::claim();
    let image = Image::busybox("caisson.test/entry:1")
        .config("Entrypoint", json!(["echo", "entry"]))
        .config("Cmd", json!(["default"]));
    let image = host.load(&image);
    host.caisson(["run", "--rm", image])
        .expect_stdout("entry default\n");
    host.caisson(["run", "--rm", image, "word"])
        .expect_stdout("entry word\n");
    // Docker: a new entrypoint also drops the image's command.
    host.caisson(["run", "--rm", "--entrypoint", "basename", image, "/a/b"])
        .expect_stdout("b\n");
    host.caisson(["rmi", image]).ok();
}

#[test]
fn words_reach_the_command_unchanged() {
    let host = Host::claim();
    host.caisson([
        "run",
        "--rm",
        host.busybox(),
        "printf",
        "<%s>",
        "a b",
        "",
        "$HOME",
        "-x",
        "--rm",
        "é\n",
    ])
    .expect_stdout("<a b><><$HOME><-x><--rm><é\n>");
}

#[test]
fn environment_is_the_images_and_the_flags() {
    let host = Host::claim();
    let image = Image::busybox("caisson.test/env:1")
        .config("Env", json!(["PATH=/bin", "A=image", "B=image"]));
    let image = host.load(&image);
    host.command([
        "run",
        "--rm",
        "-e",
        "B=flag",
        "-e",
        "C=a=b c",
        "-e",
        "FROM_CLIENT",
        "-e",
        "NOT_SET",
        image,
        "sh",
        "-c",
        "echo $PATH,$A,$B,$C,$FROM_CLIENT,${NOT_SET-unset},$HOME",
    ])
    .env("FROM_CLIENT", "client")
    .run()
    .expect_stdout("/bin,image,flag,a=b c,client,unset,/root\n");
    host.caisson(["rmi", image]).ok();
}

#[test]
fn the_working_directory_is_the_flags_and_made_if_missing() {
    let host = Host::claim();
    host.sh([], "pwd").expect_stdout("/\n");
    host.sh(["-w", "/tmp"], "pwd").expect_stdout("/tmp\n");
    host.sh(["-w", "/new/below"], "pwd")
        .expect_stdout("/new/below\n");
}

#[test]
fn the_images_user_and_directory_are_the_defaults() {
    let host = Host::claim();
    let image = Image::busybox("caisson.test/user:1")
        .config("User", json!("app"))
        .config("WorkingDir", json!("/home/app"));
    let image = host.load(&image);
    host.caisson([
        "run",
        "--rm",
        image,
        "sh",
        "-c",
        "id -u; pwd; echo $HOME; touch mine",
    ])
    .expect_stdout("1000\n/home/app\n/home/app\n");
    host.caisson(["rmi", image]).ok();
}

#[test]
fn users_go_by_name_and_number_with_their_groups() {
    let host = Host::claim();
    let script = "echo $(id -u) $(id -g) $(id -G)";
    host.sh(["-u", "app"], script)
        .expect_stdout("1000 1000 1000 2000\n");
    host.sh(["-u", "app:extra"], script)
        .expect_stdout("1000 2000 2000\n");
    host.sh(["-u", "1234"], script).expect_stdout("1234 0 0\n");
    host.sh(["-u", "1234:5678"], script)
        .expect_stdout("1234 5678 5678\n");
}

#[test]
fn an_unknown_user_is_refused() {
    let host = Host::claim();
    let finished = host
        .sh(["-u", "nobody-here"], "true")
        .expect_error(&["user", "nobody-here"]);
    assert!([125, 126].contains(&finished.code()), "{finished}");
    let finished = host
        .sh(["-u", "app:no-group"], "true")
        .expect_error(&["group", "no-group"]);
    assert!([125, 126].contains(&finished.code()), "{finished}");
}

#[test]
fn the_host_name_is_the_flags_or_the_short_id() {
    let host = Host::claim();
    host.sh(["--hostname", "box"], "hostname; grep -c box /etc/hosts")
        .expect_stdout("box\n1\n");
    let id = host
        .caisson(["run", "-d", "--name", "named", host.busybox(), "hostname"])
        .ok()
        .line();
    host.caisson(["wait", "named"]).expect_stdout("0\n");
    host.caisson(["logs", "named"])
        .expect_stdout(&format!("{}\n", &id[..12]));
    host.caisson(["rm", "named"]).expect_stdout("named\n");
}

#[test]
fn a_read_only_root_refuses_writes_but_tmpfs_takes_them() {
    let host = Host::claim();
    host.sh(
        ["--read-only", "--tmpfs", "/scratch:size=1m"],
        "touch /file 2>/dev/null && echo root; touch /etc/file 2>/dev/null && echo etc
         touch /scratch/file && echo scratch; mount | grep -c 'tmpfs on /scratch type tmpfs.*size=1024k'
         dd if=/dev/zero of=/scratch/big bs=1M count=2 2>/dev/null || echo full",
    )
    .expect_stdout("scratch\n1\nfull\n");
}

#[test]
fn the_root_is_writable_and_new_for_each() {
    let host = Host::claim();
    let script = "ls /made 2>/dev/null; echo x >/made && rm /etc/group && ls /made";
    host.sh([], script).expect_stdout("/made\n");
    host.sh([], script).expect_stdout("/made\n");
}

#[test]
fn capabilities_are_dockers_and_can_be_added_and_dropped() {
    let host = Host::claim();
    let script = "grep CapEff /proc/self/status | tr -d '\\t' | sed 's/CapEff:0*//'";
    // Docker's default set of 14.
    host.sh([], script).expect_stdout("a80425fb\n");
    host.sh(["--cap-drop", "ALL"], script).expect_stdout("\n");
    host.sh(
        ["--cap-drop", "ALL", "--cap-add", "NET_BIND_SERVICE"],
        script,
    )
    .expect_stdout("400\n");
    host.sh(
        ["--cap-add", "SYS_ADMIN", "--cap-drop", "CAP_CHOWN"],
        script,
    )
    .expect_stdout("a82425fa\n");
}

#[test]
fn an_unknown_capability_is_refused() {
    let host = Host::claim();
    host.sh(["--cap-add", "FLY"], "true")
        .expect_error(&["fly"])
        .expect_code(125);
}

#[test]
fn the_network_has_only_loopback() {
    let host = Host::claim();
    host.sh(
        ["--network", "none"],
        "ls /sys/class/net; ping -c 1 -W 5 127.0.0.1 >/dev/null && echo loop",
    )
    .expect_stdout("lo\nloop\n");
    host.sh(["--network", "elsewhere"], "true")
        .expect_error(&["elsewhere"])
        .expect_code(125);
}

#[test]
fn standard_input_is_passed_with_i_and_empty_without() {
    let host = Host::claim();
    let image = host.busybox();
    host.command(["run", "--rm", "-i", image, "cat"])
        .stdin("typed\n")
        .run()
        .expect_stdout("typed\n");
    host.command(["run", "--rm", image, "cat"])
        .stdin("typed\n")
        .run()
        .expect_stdout("");
}

#[test]
fn a_megabyte_goes_through_unchanged() {
    let host = Host::claim();
    let data: Vec<u8> = (0..1_000_000u32).map(|n| (n * 31 % 251) as u8).collect();
    let finished = host
        .command(["run", "--rm", "-i", host.busybox(), "cat"])
        .stdin(data.clone())
        .run()
        .ok();
    assert!(
        finished.stdout_bytes() == data,
        "{} bytes came back",
        finished.stdout_bytes().len()
    );
}

#[test]
fn a_name_is_taken_until_its_container_is_removed() {
    let host = Host::claim();
    let image = host.busybox();
    host.caisson(["run", "--name", "one", image, "true"]).ok();
    host.caisson(["run", "--name", "one", image, "true"])
        .expect_error(&["one", "in use"])
        .expect_code(125);
    host.caisson(["rm", "one"]).expect_stdout("one\n");
    host.caisson(["run", "--rm", "--name", "one", image, "true"])
        .ok();
}

#[test]
fn with_rm_nothing_is_listed_and_without_it_the_exit_is() {
    let host = Host::claim();
    host.sh(["--name", "gone"], "exit 3").expect_code(3);
    let listed = host.caisson(["ps", "-a"]).ok().stdout();
    assert!(!listed.contains("gone"), "{listed}");
    host.caisson([
        "run",
        "--name",
        "kept",
        host.busybox(),
        "sh",
        "-c",
        "exit 3",
    ])
    .expect_code(3);
    let listed = host.caisson(["ps", "-a"]).ok().stdout();
    assert!(
        listed.contains("kept") && listed.contains("Exited (3)"),
        "{listed}"
    );
    host.caisson(["rm", "kept"]).ok();
}

#[test]
fn wrong_usage_is_refused_before_anything_starts() {
    let host = Host::claim();
    let image = host.busybox();
    for (flags, word) in [
        (vec!["--no-such-flag"], "no-such-flag"),
        (vec!["--name", "not/a name"], "name"),
        (vec!["-e", "=value"], "="),
        (vec!["-v", "rela/tive:/there"], "rela/tive"),
        (vec!["-v", "/tmp:not-absolute"], "not-absolute"),
        (vec!["-w", "not-absolute"], "not-absolute"),
        (vec!["--cpus", "many"], "many"),
        (vec!["--cpus", "-1"], "cpus"),
        (vec!["-m", "lots"], "lots"),
        (vec!["--ulimit", "nofile"], "nofile"),
        (vec!["--ulimit", "nofile=2:1"], "nofile"),
        (vec!["--pids-limit", "x"], "x"),
        (vec!["--hostname", "-bad-"], "-bad-"),
    ] {
        let mut words = vec!["run", "--rm"];
        words.extend(&flags);
        words.extend([image, "true"]);
        let finished = host.caisson(words).expect_error(&[word]);
        assert_eq!(finished.code(), 125, "{flags:?}\n{finished}");
    }
    host.caisson(["run"]).expect_error(&[]).expect_code(125);
}
