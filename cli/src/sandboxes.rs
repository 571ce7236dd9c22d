//! The sandboxes of this host, whoever manages them: `ps --sandboxes`, and figures for [`crate::metrics`].

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use caisson_sandbox::{Config, figures, figures::Figures, scaled, socket};
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::{Format, error::Error, output::say, ps};

/// For all sandboxes to answer: they are asked at the same time.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Largest answer.
const MAX_ANSWER: u64 = 4 << 20;

/// A sandbox's name, and what it told of itself, if it did.
pub type Told = (String, Option<Figures>);

/// Asks every sandbox.
///
/// # Errors
/// They cannot be listed.
pub async fn ask(config: &Config) -> Result<Vec<Told>, Error> {
    let sockets =
        figures::sockets(config).map_err(Error::file("list", config.run_dir.join("sandboxes")))?;
    let asked: Vec<_> = sockets
        .into_iter()
        .map(|(name, path)| (name, tokio::spawn(ask_one(path))))
        .collect();
    let mut told = Vec::with_capacity(asked.len());
    for (name, answer) in asked {
        told.push((name, answer.await.ok().flatten()));
    }
    Ok(told)
}

async fn ask_one(path: PathBuf) -> Option<Figures> {
    let answer = tokio::time::timeout(scaled(ANSWER_LIMIT), read(&path));
    serde_json::from_slice(&answer.await.ok()?.ok()?).ok()
}

async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let stream = socket::connect(path).await?;
    stream.take(MAX_ANSWER).read_to_end(&mut text).await?;
    Ok(text)
}

/// Runs `ps --sandboxes`.
///
/// # Errors
/// They cannot be listed.
pub fn list(format: Format) -> Result<u8, Error> {
    let config = Config::load(None)?;
    let told = crate::event_loop()?.block_on(ask(&config))?;
    if format == Format::Json {
        for (name, figures) in &told {
            say!("{}", document(name, figures.as_ref()));
        }
        return Ok(0);
    }
    let heads = [
        "SANDBOX",
        "MANAGER",
        "CONTAINERS",
        "VCPUS",
        "MEMORY",
        "VMM",
        "UP",
    ];
    let mut rows = vec![heads.map(str::to_owned)];
    rows.extend(
        told.iter()
            .map(|(name, figures)| row(name, figures.as_ref())),
    );
    ps::print_table(&rows);
    Ok(0)
}

fn row(name: &str, figures: Option<&Figures>) -> [String; 7] {
    let Some(figures) = figures else {
        return [name, "?", "", "", "", "", "does not answer"].map(str::to_owned);
    };
    [
        name.to_owned(),
        figures.manager.clone(),
        figures.containers.len().to_string(),
        figures.vcpus_online.to_string(),
        format!("{} MiB", memory_mib(figures)),
        vmm_pid(figures).map_or_else(|| "?".to_owned(), |pid| pid.to_string()),
        ps::duration(ps::since(booted(figures))),
    ]
}

fn document(name: &str, figures: Option<&Figures>) -> serde_json::Value {
    let Some(figures) = figures else {
        return json!({ "Sandbox": name, "Answers": false });
    };
    json!({
        "Sandbox": name,
        "Answers": true,
        "GuestAnswers": figures.guest_answers,
        "Manager": figures.manager,
        "Containers": figures.containers.iter().map(|one| one.id.as_str()).collect::<Vec<_>>(),
        "VCPUs": figures.vcpus_online,
        "MemoryMiB": memory_mib(figures),
        "VMMPid": vmm_pid(figures),
        "BootedAt": humantime::format_rfc3339_seconds(booted(figures)).to_string(),
    })
}

/// That the guest has now.
pub fn memory_mib(figures: &Figures) -> u32 {
    figures.vmm.memory.boot_mib + figures.vmm.hotplugged_mib
}

fn booted(figures: &Figures) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(figures.booted_at)
}

fn vmm_pid(figures: &Figures) -> Option<u32> {
    let vmm = figures.processes.iter().find(|one| one.role == "vmm");
    vmm.map(|process| process.pid)
}
