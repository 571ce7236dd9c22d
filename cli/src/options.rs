//! Values of docker's flags.

use std::path::Path;

use crate::error::Error;

fn usage<T>(text: String) -> Result<T, Error> {
    Err(Error::Usage(text))
}

/// Bytes of "64m", "1.5g", "1024", "512k", "1tb".
///
/// # Errors
/// Not a size.
pub fn size(flag: &str, text: &str) -> Result<u64, Error> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match lower[digits.len()..]
        .trim_end_matches("ib")
        .trim_end_matches('b')
    {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        "p" => 1 << 50,
        _ => return usage(format!("{flag} {text}: not a size; such as 64m or 1g")),
    };
    match digits.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 && number * (factor as f64) < 9e18 => {
            Ok((number * factor as f64) as u64)
        }
        _ => usage(format!("{flag} {text}: not a size; such as 64m or 1g")),
    }
}

/// Bytes of --shm-size.
///
/// # Errors
/// Not a size; none at all, which would mean one without limit to the kernel.
pub fn shm_size(text: &str) -> Result<u64, Error> {
    match size("--shm-size", text)? {
        0 => usage(format!("--shm-size {text}: it must be more than nothing")),
        bytes => Ok(bytes),
    }
}

/// CPU quota in microseconds per 100 ms.
///
/// # Errors
/// Not a positive number.
pub fn cpus(text: &str) -> Result<i64, Error> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && (0.01..=100_000_000.0).contains(&number) => {
            Ok((number * 100_000.0).round() as i64)
        }
        _ => usage(format!(
            "--cpus {text}: not a number of processors, at least 0.01"
        )),
    }
}

/// Most processes; -1 and 0 mean no limit.
///
/// # Errors
/// Not a number.
pub fn pids(text: &str) -> Result<i64, Error> {
    text.parse::<i64>()
        .ok()
        .filter(|number| *number >= -1)
        .map(|number| if number == 0 { -1 } else { number })
        .ok_or_else(|| Error::Usage(format!("--pids-limit {text}: not a number of processes")))
}

/// "NAME=VALUE", or a name whose value is the caller's. None: the caller has no such variable.
///
/// # Errors
/// No name.
pub fn variable(text: &str) -> Result<Option<String>, Error> {
    let name = text.split('=').next().unwrap_or_default();
    if name.is_empty() || name.contains('\0') {
        return usage(format!(
            "-e {text}: a variable needs a name in front of \"=\""
        ));
    }
    if text.contains('=') {
        return Ok(Some(text.to_owned()));
    }
    Ok(std::env::var(name)
        .ok()
        .map(|value| format!("{name}={value}")))
}

/// A resource limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ulimit {
    /// "RLIMIT_NOFILE".
    pub name: String,
    /// What a process may raise to `hard`.
    pub soft: u64,
    /// The bound.
    pub hard: u64,
}

const ULIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// "NAME=SOFT[:HARD]"; -1 = unlimited.
///
/// # Errors
/// An unknown name, not numbers, soft above hard.
pub fn ulimit(text: &str) -> Result<Ulimit, Error> {
    let wrong = |why: &str| usage(format!("--ulimit {text}: {why}"));
    let Some((name, limits)) = text.split_once('=') else {
        return wrong("expected NAME=SOFT or NAME=SOFT:HARD");
    };
    if !ULIMITS.contains(&name) {
        return wrong(&format!(
            "unknown limit \"{name}\"; there are {}",
            ULIMITS.join(", ")
        ));
    }
    let number = |text: &str| match text {
        "-1" | "unlimited" => Some(u64::MAX),
        text => text.parse::<u64>().ok(),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (Some(soft), Some(hard)) = (number(soft), number(hard)) else {
        return wrong("limits are numbers, -1 = none");
    };
    if soft > hard {
        return wrong("the soft limit is above the hard one");
    }
    Ok(Ulimit {
        name: format!("RLIMIT_{}", name.to_ascii_uppercase()),
        soft,
        hard,
    })
}

/// A container's name, by docker's rule.
///
/// # Errors
/// Other characters.
pub fn container_name(text: &str) -> Result<(), Error> {
    let mut bytes = text.bytes();
    let first = bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    let mut rest = bytes.clone();
    if first
        && text.len() > 1
        && text.len() <= 128
        && rest.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
    {
        return Ok(());
    }
    usage(format!(
        "invalid container name ({text}): only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, two at least"
    ))
}

/// RFC 1123 labels, 63 bytes in all (Linux allows 64).
///
/// # Errors
/// Anything else.
pub fn hostname(text: &str) -> Result<(), Error> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if text.len() <= 63 && text.split('.').all(label) {
        return Ok(());
    }
    usage(format!(
        "invalid --hostname {text}: letters, digits, '-' and '.' only, at most 63 of them"
    ))
}

/// An absolute directory.
///
/// # Errors
/// A relative one.
pub fn workdir(text: &str) -> Result<(), Error> {
    if Path::new(text).is_absolute() {
        return Ok(());
    }
    usage(format!(
        "-w {text}: the working directory must be an absolute path"
    ))
}

/// Number of a signal: "KILL", "SIGKILL", "9", "RTMIN+1".
///
/// # Errors
/// No such signal.
pub fn signal(text: &str) -> Result<u32, Error> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let number = match name.parse::<u32>() {
        Ok(number) => Some(number),
        Err(_) => match name.strip_prefix("RTMIN") {
            Some("") => Some(34),
            Some(offset) => offset
                .strip_prefix('+')
                .and_then(|offset| offset.parse::<u32>().ok())
                .map(|offset| 34 + offset),
            None => NAMES
                .iter()
                .position(|known| *known == name)
                .and_then(|index| u32::try_from(index + 1).ok()),
        },
    };
    number
        .filter(|number| (1..=64).contains(number))
        .ok_or_else(|| Error::Exit {
            code: 1,
            message: format!("invalid signal: {text}"),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("-m", "64m").unwrap(), 64 << 20);
        assert_eq!(size("-m", "1.5G").unwrap(), 3 << 29);
        assert_eq!(size("-m", "0.5k").unwrap(), 512);
        assert_eq!(size("-m", "2MiB").unwrap(), 2 << 20);
        assert_eq!(size("-m", "100").unwrap(), 100);
        for wrong in ["", "lots", "-1m", "1x", "1e400g"] {
            assert!(size("-m", wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shared_memory_has_a_size() {
        assert_eq!(shm_size("1g").unwrap(), 1 << 30);
        for wrong in ["0", "-1", "much"] {
            assert!(shm_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn limits_signals_and_names() {
        assert_eq!(
            ulimit("nofile=1:2").unwrap(),
            Ulimit {
                name: "RLIMIT_NOFILE".to_owned(),
                soft: 1,
                hard: 2
            }
        );
        assert_eq!(ulimit("core=-1").unwrap().hard, u64::MAX);
        assert!(
            ulimit("nofile").is_err() && ulimit("nofile=2:1").is_err() && ulimit("x=1").is_err()
        );
        assert_eq!(
            (
                signal("kill").unwrap(),
                signal("SIGUSR1").unwrap(),
                signal("RTMIN+3").unwrap(),
                signal("15").unwrap()
            ),
            (9, 10, 37, 15)
        );
        assert!(signal("NOSUCH").is_err() && signal("0").is_err() && signal("65").is_err());
        assert!(
            container_name("a-1.b_c").is_ok()
                && container_name("a").is_err()
                && container_name("not/a name").is_err()
        );
        assert!(hostname("box.example").is_ok() && hostname("-bad-").is_err());
        assert_eq!(cpus("0.5").unwrap(), 50_000);
        assert!(cpus("-1").is_err() && cpus("many").is_err());
        assert!(variable("=x").is_err());
        assert_eq!(variable("A=b=c").unwrap().as_deref(), Some("A=b=c"));
    }
}
