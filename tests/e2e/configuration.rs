//! `caisson config`, and what the configuration does.

use std::fs;

use caisson_tests::{Command, Finished, Host};

/// Runs `caisson` where /etc/caisson holds these files.
pub fn with_files(host: &Host, files: &[(&str, &str)], words: &str) -> Finished {
    let directory = host.scratch().join("etc");
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(directory.join("config.d")).unwrap();
    for (name, text) in files {
        fs::write(directory.join(name), text).unwrap();
    }
    let script = format!(
        "mkdir -p /etc/caisson && mount --bind '{}' /etc/caisson && exec '{}' {words}",
        directory.display(),
        host.program().display()
    );
    Command::new(["unshare", "-m", "sh", "-c", &script]).run()
}

#[test]
fn the_effective_configuration_tells_where_it_comes_from() {
    let host = Host::claim();
    let files = [
        ("config.toml", "default_vcpus = 1\nmax_vcpus = 4\n"),
        ("config.d/50-more.toml", "# more\ndefault_vcpus = 2\n"),
    ];
    let finished = with_files(&host, &files, "config --effective").ok();
    let text = finished.stdout();
    for line in [
        "default_vcpus = 2 # /etc/caisson/config.d/50-more.toml:2\n",
        "max_vcpus = 4 # /etc/caisson/config.toml:2\n",
        "run_dir = \"/run/caisson\" # default\n",
    ] {
        assert!(text.contains(line), "{line}{finished}");
    }
    let again = with_files(&host, &[("config.toml", &text)], "config").ok();
    again.expect_stdout("/etc/caisson/config.toml\n");
}

#[test]
fn a_wrong_configuration_stops_everything_and_names_the_key() {
    let host = Host::claim();
    for (text, words) in [
        (
            "\nkernle = \"/k\"",
            ["/etc/caisson/config.toml:2", "kernle"],
        ),
        (
            "max_vcpus = \"many\"",
            ["/etc/caisson/config.toml:1", "max_vcpus"],
        ),
        (
            "default_memory_mib = 1",
            ["/etc/caisson/config.toml:1", "default_memory_mib"],
        ),
        ("max_vcpus = = 1", ["/etc/caisson/config.toml:1", "TOML"]),
    ] {
        let run = format!("run --rm {} true", host.busybox());
        for verb in ["config", "version", &run] {
            let finished = with_files(&host, &[("config.toml", text)], verb);
            assert_ne!(finished.code(), 0, "{finished}");
            finished.expect_error(&words);
        }
    }
}

#[test]
fn defaults_of_the_configuration_size_a_microvm() {
    let host = Host::claim();
    let files = [(
        "config.d/size.toml",
        "default_memory_mib = 200\ndefault_vcpus = 2\n",
    )];
    let show = "nproc; awk '/MemTotal/ { print ($2 < 200 * 1024) }' /proc/meminfo";
    let words = format!(
        "run --rm {} sh -c \"{}\"",
        host.busybox(),
        show.replace('$', "\\$")
    );
    with_files(&host, &files, &words)
        .ok()
        .expect_stdout("2\n1\n");
    let files = [("config.toml", "max_memory_mib = 600\n")];
    let words = format!("run --rm -m 1g {} true", host.busybox());
    with_files(&host, &files, &words).expect_error(&["600 MiB"]);
}
