//! `-t`: a person at a terminal.

use caisson_tests::{Host, Terminal};

#[test]
fn run_it_gives_a_terminal_with_size_keys_and_exit_code() {
    let host = Host::claim();
    let mut terminal = host.terminal(["run", "--rm", "-it", host.busybox(), "sh"]);
    terminal.send("tty; stty size; echo $TERM | tr a-z A-Z\r");
    terminal.expect("/dev/pts/");
    terminal.expect("24 80");
    terminal.expect("XTERM");
    terminal.resize(50, 132);
    // The new size travels apart from the keys: asked for until it is there.
    terminal.send("until [ \"$(stty size)\" = '50 132' ]; do sleep 1; done; echo re''sized\r");
    terminal.expect("resized");
    terminal.send("exit 9\r");
    assert_eq!(terminal.finish(), 9);
}

#[test]
fn control_c_reaches_the_process_and_control_d_ends_the_shell() {
    let host = Host::claim();
    let mut terminal = host.terminal(["run", "--rm", "-it", host.busybox(), "sh"]);
    // The child that the signal ends is the one that says it is there: between two commands of its
    // own the shell would go on with the second.
    terminal.send("trap 'echo inter''rupted' INT; sh -c 'echo re\"\"ady; exec sleep 1000'\r");
    terminal.expect("ready");
    terminal.send([3]);
    terminal.expect("interrupted");
    terminal.send("echo still he''re\r");
    terminal.expect("still here");
    terminal.send("true\r");
    terminal.expect("true");
    terminal.send([4]);
    assert_eq!(terminal.finish(), 0);
}

#[test]
fn the_callers_terminal_is_restored() {
    let host = Host::claim();
    let run = format!(
        "{} run --rm -it {} true; stty -a | tr ';' '\\n' | grep -c -w -e '-echo' -e '-icanon'; echo do''ne",
        host.program().display(),
        host.busybox()
    );
    let mut terminal = Terminal::start(["sh", "-c", &run]);
    let screen = terminal.expect("done");
    assert!(screen.contains('0'), "{screen}");
    assert_eq!(terminal.finish(), 0);
}

#[test]
fn a_terminal_without_a_terminal_is_refused() {
    let host = Host::claim();
    host.caisson(["run", "--rm", "-it", host.busybox(), "true"])
        .expect_error(&["not a t"]);
}

#[test]
fn exec_it_gives_a_second_terminal() {
    let host = Host::claim();
    host.caisson([
        "run",
        "-d",
        "--name",
        "base",
        host.busybox(),
        "sleep",
        "1000",
    ])
    .ok();
    let mut terminal = host.terminal(["exec", "-it", "base", "sh"]);
    terminal.send("tty; ps | grep -c 'sleep 100[0]'; echo is-$TERM\r");
    terminal.expect("/dev/pts/");
    terminal.expect("1");
    terminal.expect("is-xterm");
    terminal.send("exit 5\r");
    assert_eq!(terminal.finish(), 5);
    host.caisson(["rm", "-f", "base"]).ok();
}
