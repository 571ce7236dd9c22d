//! `load`, `images`, `rmi`: images as they should be.

use caisson_tests::{Host, Image, Layer};
use serde_json::{Value, json};

fn tiny(name: &str) -> Image {
    Image::busybox(name)
}

#[test]
fn every_form_loads_and_runs() {
    let host = Host::claim();
    let file = host.scratch().join("archive");
    let path = file.to_str().unwrap();

    tiny("caisson.test/form:oci").write_oci_archive(&file);
    host.caisson(["load", "-i", path])
        .ok()
        .expect_in_stdout("caisson.test/form:oci");
    tiny("caisson.test/form:docker").write_docker_archive(&file);
    host.caisson(["load", "-i", path])
        .ok()
        .expect_in_stdout("caisson.test/form:docker");
    tiny("caisson.test/form:stdin").write_oci_archive(&file);
    host.command(["load"])
        .stdin(std::fs::read(&file).unwrap())
        .run()
        .ok()
        .expect_in_stdout("caisson.test/form:stdin");
    for tag in ["oci", "docker", "stdin"] {
        let name = format!("caisson.test/form:{tag}");
        host.caisson(["run", "--rm", &name, "echo", tag])
            .expect_stdout(&format!("{tag}\n"));
        host.caisson(["rmi", &name]).ok();
    }
}

#[test]
fn upper_layers_change_lower_ones() {
    let host = Host::claim();
    let image = tiny("caisson.test/layers:1")
        .layer(
            Layer::new()
                .dir("d", 0o755)
                .file("d/gone", 0o644, "1")
                .file("d/changed", 0o644, "1")
                .file("d/kept", 0o644, "1")
                .dir("opaque", 0o755)
                .file("opaque/below", 0o644, "1")
                .dir("replaced", 0o755)
                .file("replaced/inside", 0o644, "1"),
        )
        .layer(
            Layer::new()
                .whiteout("d", "gone")
                .file("d/changed", 0o600, "2")
                .dir("opaque", 0o700)
                .opaque("opaque")
                .file("opaque/above", 0o644, "2")
                .file("replaced", 0o644, "a file now"),
        );
    let image = host.load(&image);
    host.caisson([
        "run",
        "--rm",
        image,
        "sh",
        "-c",
        "ls /d /opaque; cat /d/changed /d/kept /replaced; stat -c ' %a' /opaque",
    ])
    .expect_stdout("/d:\nchanged\nkept\n\n/opaque:\nabove\n21a file now 700\n");
    host.caisson(["rmi", image]).ok();
}

#[test]
fn owners_modes_and_links_are_the_layers() {
    let host = Host::claim();
    let image = tiny("caisson.test/meta:1").layer(
        Layer::new()
            .file("setuid", 0o4755, "x")
            .owner(1000, 2000)
            .file("owned", 0o644, "same")
            .hard_link("twin", "owned")
            .symlink("soft", "owned")
            .symlink("dangling", "/no/where"),
    );
    let image = host.load(&image);
    host.caisson([
        "run", "--rm", image, "sh", "-c",
        "stat -c '%a %u %g' /setuid /owned; stat -c %h /twin; cat /soft; echo; readlink /dangling; [ /owned -ef /twin ] && echo same",
    ])
    .expect_stdout("4755 0 0\n644 1000 2000\n2\nsame\n/no/where\nsame\n");
    host.caisson(["rmi", image]).ok();
}

#[test]
fn names_below_a_link_stay_inside_the_image() {
    let host = Host::claim();
    let image = tiny("caisson.test/below:1").layer(
        Layer::new().dir("etc", 0o755).symlink("link", "/etc").file(
            "link/caisson-below",
            0o644,
            "inside\n",
        ),
    );
    let image = host.load(&image);
    host.caisson(["run", "--rm", image, "cat", "/etc/caisson-below"])
        .expect_stdout("inside\n");
    assert!(!std::path::Path::new("/etc/caisson-below").exists());
    host.caisson(["rmi", image]).ok();
}

#[test]
fn images_are_listed_and_removed() {
    let host = Host::claim();
    host.load(&tiny("caisson.test/listed:1"));
    let listed = host.caisson(["images"]).ok().stdout();
    assert!(listed.starts_with("REPOSITORY"), "{listed}");
    let line = listed
        .lines()
        .find(|l| l.contains("caisson.test/listed"))
        .unwrap_or_else(|| panic!("{listed}"));
    assert!(line.split_whitespace().nth(1) == Some("1"), "{listed}");
    let listed = host.caisson(["images", "--format", "json"]).ok().stdout();
    let found = listed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .any(|image| image["Repository"] == "caisson.test/listed" && image["Tag"] == "1");
    assert!(found, "{listed}");
    host.caisson(["rmi", "caisson.test/listed:1"])
        .ok()
        .expect_in_stdout("Untagged: caisson.test/listed:1");
    let listed = host.caisson(["images"]).ok().stdout();
    assert!(!listed.contains("caisson.test/listed"), "{listed}");
}

#[test]
fn an_image_in_use_is_not_removed() {
    let host = Host::claim();
    let image = Image::busybox("caisson.test/used:1").config("Labels", json!({ "only": "here" }));
    let image = host.load(&image);
    host.caisson(["run", "-d", "--name", "user", image, "sleep", "1000"])
        .ok();
    host.caisson(["rmi", image])
        .expect_error(&["in use"])
        .expect_code(1);
    host.caisson(["exec", "user", "true"]).ok();
    host.caisson(["rm", "-f", "user"]).ok();
    host.caisson(["rmi", image]).ok();
}

#[test]
fn short_names_are_dockers() {
    let host = Host::claim();
    host.load(&tiny("short"));
    host.caisson(["run", "--rm", "short", "echo", "1"])
        .expect_stdout("1\n");
    host.caisson(["run", "--rm", "docker.io/library/short:latest", "echo", "2"])
        .expect_stdout("2\n");
    let listed = host.caisson(["images"]).ok().stdout();
    assert!(
        listed.lines().any(|line| line.starts_with("short ")),
        "{listed}"
    );
    host.caisson(["rmi", "short:latest"]).ok();
}

#[test]
fn loading_twice_changes_nothing_and_a_new_image_takes_the_name() {
    let host = Host::claim();
    let image = tiny("caisson.test/again:1");
    host.load(&image);
    host.load(&image);
    let count = |listed: &str| {
        listed
            .lines()
            .filter(|l| l.contains("caisson.test/again"))
            .count()
    };
    assert_eq!(count(&host.caisson(["images"]).ok().stdout()), 1);
    host.load(&image.config("Cmd", json!(["echo", "new"])));
    host.caisson(["run", "--rm", "caisson.test/again:1"])
        .expect_stdout("new\n");
    host.caisson(["rmi", "caisson.test/again:1"]).ok();
}
