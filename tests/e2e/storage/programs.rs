//! Programs that are choosy about files, on volumes.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::sync::OnceLock;

use caisson_tests::{Command, Host, Image, Layer};

use super::{tools, volume};

#[test]
fn git_and_tar_keep_a_tree() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    // Busybox's shell takes its own tar unless it is named by its path.
    let script = r#"
        set -e
        export HOME=/root GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
        cd /data; git init -q -b main first; cd first
        for d in a b c; do mkdir -p $d/e/f; for n in $(seq 1 8); do echo $d $n >$d/e/f/$n; done; done
        ln -s a/e link; chmod 755 b/e/f/1; mkdir -m 700 private; echo x >private/x; chmod 600 private/x
        git add .; git commit -q -m one
        cd /data; git clone -q first second; cd second; git fsck --strict
        echo "status: $(git status --porcelain)"; echo changed >a/e/f/1; git status --porcelain
        git checkout -q .; git log --format=%s
        cd /data; listing() { (cd $1; find . | sort | xargs stat -c '%n %f %s %Y %u:%g %N'; find . -type f | sort | xargs md5sum); }
        listing first >/tmp/before; /usr/bin/tar -cf tree.tar first; mkdir back; /usr/bin/tar -C back -xpf tree.tar
        listing back/first >/tmp/after; cmp /tmp/before /tmp/after; wc -l </tmp/after
    "#;
    let words = ["run", "--rm", "-v", &flag, tools(&host), "sh", "-c", script];
    let finished = host.command(words).within(60.0).run().ok();
    let output = finished.stdout();
    let start = "status: \n M a/e/f/1\none\n";
    assert!(output.starts_with(start), "{finished}");
    let lines: usize = output[start.len()..].trim().parse().unwrap();
    assert!(lines > 100, "{finished}");
    assert_eq!(
        fs::read_to_string(directory.join("second/c/e/f/8")).unwrap(),
        "c 8\n"
    );
}

/// In both kinds of journal: rollback by POSIX locks, WAL also by shared memory.
#[test]
fn sqlite_takes_writers_at_a_time() {
    const EACH: usize = 8;
    let host = Host::claim();
    let (_directory, flag) = volume(&host);
    let script = format!(
        r#"
        set -e
        writer() {{
            for n in $(seq 1 {EACH}); do
                echo "insert into t values ('$1', $n);"
            done | sqlite3 -cmd '.timeout 300000' -bail $2
        }}
        for journal in delete wal; do
            db=/data/$journal.db
            sqlite3 $db "pragma journal_mode = $journal; create table t (who text, n integer); create index i on t (n);"
            writer one $db & one=$!; writer two $db & two=$!
            wait $one; wait $two
            sqlite3 $db "pragma integrity_check; select count(*), count(distinct who), sum(n) from t;"
        done"#
    );
    let words = [
        "run",
        "--rm",
        "-v",
        &flag,
        tools(&host),
        "sh",
        "-c",
        &script,
    ];
    let sum = EACH * (EACH + 1);
    let result = format!("ok\n{}|2|{sum}\n", 2 * EACH);
    let finished = host.command(words).within(60.0).run();
    finished.expect_stdout(&format!("delete\n{result}wal\n{result}"));
}

/// PostgreSQL 17 beside busybox.
fn postgres(host: &Host) -> &'static str {
    const NAME: &str = "caisson.test/postgres:17";
    const HOME: &str = "/usr/lib/postgresql/17";
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let programs =
            ["postgres", "initdb", "pg_ctl", "psql"].map(|name| format!("{HOME}/bin/{name}"));
        let programs: Vec<&str> = programs.iter().map(String::as_str).collect();
        let layer = ["dict_snowball.so", "plpgsql.so"]
            .iter()
            .fold(Layer::new().programs(&programs), |layer, name| {
                layer.host(&format!("{HOME}/lib/{name}"), &|_| true)
            })
            .host("/usr/share/postgresql/17", &|path| {
                !["man", "contrib"]
                    .iter()
                    .any(|part| path.components().any(|c| c.as_os_str() == *part))
            });
        host.load(&Image::busybox(NAME).layer(layer).uncompressed());
    });
    NAME
}

/// What was committed is there after the container was killed. The cluster is made on the host: that
/// is a thousand files, which take an emulated guest minutes.
#[test]
fn postgres_recovers_after_a_crash() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    // Debian's nobody and nogroup.
    let owner = 65534;
    chown(&directory, Some(owner), Some(owner)).unwrap();
    // Its maker on the host has to get there, and be a user that has a name.
    fs::set_permissions(host.scratch(), Permissions::from_mode(0o711)).unwrap();
    let make = format!(
        "setpriv --reuid=nobody --regid=nogroup --clear-groups \
         /usr/lib/postgresql/17/bin/initdb -A trust --locale=C -E UTF8 --no-sync -D {}/db",
        directory.display()
    );
    // The image has no zones but this one, which is built in.
    Command::new(make.split_whitespace())
        .env("TZ", "GMT")
        .within(60.0)
        .run()
        .ok();
    let path = "PATH=/usr/lib/postgresql/17/bin:/bin";
    let first = r#"
        set -e
        pg_ctl -w -t 300 -D /data/db -l /data/log -o '-k /tmp -h "" -c recovery_init_sync_method=syncfs' start >/dev/null
        psql -q -U nobody -h /tmp -d postgres -c 'create table t (n integer primary key, s text)'
        for n in $(seq 1 20); do echo "insert into t values ($n, repeat('x', 1000));"; done | psql -q -U nobody -h /tmp -d postgres
        echo committed
        sleep 1000"#;
    let image = postgres(&host);
    let run = |flags: &[&str], script: &str| {
        let words = ["run"].iter().chain(flags);
        let fixed = ["-e", path, "-u", "65534:65534", "-v", &flag, image];
        host.command(words.chain(&fixed).chain(&["sh", "-c", script]))
            .within(90.0)
    };
    let mut running = run(&["--name", "first"], first).start();
    running.wait_for_stdout("committed");
    host.caisson(["kill", "-s", "KILL", "first"]).ok();
    running.finish().expect_code(137);
    host.caisson(["rm", "first"]).ok();
    assert!(
        directory.join("db/postmaster.pid").exists(),
        "it was not crashed"
    );

    // Recovery syncs by one call: file by file takes an emulated guest half a minute.
    let second = r#"
        set -e
        pg_ctl -w -t 300 -D /data/db -l /data/log -o '-k /tmp -h "" -c recovery_init_sync_method=syncfs' start >/dev/null
        psql -At -U nobody -h /tmp -d postgres -c 'select count(*), sum(n), sum(length(s)) from t'
        pg_ctl -w -t 300 -D /data/db -m fast stop >/dev/null
        grep -c 'not properly shut down' /data/log"#;
    run(&["--rm"], second)
        .run()
        .expect_stdout("20|210|20000\n1\n");
}
