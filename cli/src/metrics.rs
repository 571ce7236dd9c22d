//! `metrics`: the figures of all sandboxes of this host, in Prometheus' text format (OpenMetrics 1.0).

use std::{convert::Infallible, fmt, net::SocketAddr};

use caisson_sandbox::{
    Config,
    figures::{BOUNDS, Figures},
};
use clap::ArgMatches;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    arguments::one,
    error::Error,
    output::say,
    sandboxes::{self, Told},
};

/// Of the format, for HTTP.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Connections that are served at the same time.
const MAX_CONNECTIONS: usize = 16;

/// Runs the verb: prints the figures, or serves them until it is ended.
///
/// # Errors
/// The sandboxes cannot be listed; the address cannot be listened on.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let config = Config::load(None)?;
    let address = one(matches, "listen").map(parse_address).transpose()?;
    crate::event_loop()?.block_on(async {
        match address {
            None => say!("{}", text_of(sandboxes::ask(&config).await?)?.trim_end()),
            Some(address) => serve(config, address).await?,
        }
        Ok(0)
    })
}

fn parse_address(text: &str) -> Result<SocketAddr, Error> {
    text.parse().map_err(|_| {
        Error::Usage(format!(
            "--listen {text}: an address and a port, such as 127.0.0.1:9560 or [::]:9560"
        ))
    })
}

async fn serve(config: Config, address: SocketAddr) -> Result<(), Error> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| Error::Usage(format!("cannot listen on {address}: {source}")))?;
    let bound = listener
        .local_addr()
        .map_err(Error::io("look at the socket"))?;
    say!("serving http://{bound}/metrics");
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(Error::io("watch for SIGTERM"))?;
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    log::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = tokio::signal::ctrl_c() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        };
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else {
            return Ok(());
        };
        let config = config.clone();
        tokio::spawn(async move {
            serve_one(config, stream).await;
            drop(place);
        });
    }
}

/// A connection has as long as a scrape may take, which is one by default (10 s) and some.
async fn serve_one(config: Config, stream: TcpStream) {
    let service = service_fn(|request| answer(&config, request));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.keep_alive(false);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    // What goes wrong here is the client's.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(15), connection).await;
}

async fn answer(
    config: &Config,
    request: Request<Incoming>,
) -> Result<Response<String>, Infallible> {
    let reply = |status: StatusCode, text: String| {
        let mut response = Response::new(text);
        *response.status_mut() = status;
        response
    };
    if request.method() != Method::GET {
        return Ok(reply(
            StatusCode::METHOD_NOT_ALLOWED,
            "GET only\n".to_owned(),
        ));
    }
    if request.uri().path() != "/metrics" {
        return Ok(reply(StatusCode::NOT_FOUND, "see /metrics\n".to_owned()));
    }
    let text = match sandboxes::ask(config).await {
        Ok(told) => text_of(told),
        Err(error) => Err(error),
    };
    Ok(match text {
        Ok(text) => {
            let mut response = reply(StatusCode::OK, text);
            let kind = header::HeaderValue::from_static(CONTENT_TYPE);
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    })
}

fn text_of(told: Vec<Told>) -> Result<String, Error> {
    let mut registry = Registry::with_prefix("caisson");
    registry.register_collector(Box::new(Sandboxes(told)));
    let mut text = String::new();
    text::encode(&mut text, &registry)
        .map_err(|error| Error::io("write the metrics")(std::io::Error::other(error)))?;
    Ok(text)
}

#[derive(Debug)]
struct Sandboxes(Vec<Told>);

/// The labels of one line.
type Labels<'a> = Vec<(&'static str, &'a str)>;

/// `more`, after those that all lines of a sandbox have.
fn labels<'a>(figures: &'a Figures, more: Labels<'a>) -> Labels<'a> {
    let mut labels = vec![
        ("sandbox", figures.sandbox.as_str()),
        ("manager", figures.manager.as_str()),
    ];
    labels.extend(more);
    labels
}

/// A line for each item, told apart by one label.
fn by<'a, T, M>(
    label: &'static str,
    items: &'a [T],
    tell: impl Fn(&'a T) -> (&'a String, M),
) -> Vec<(Labels<'a>, M)> {
    let lines = items.iter().map(tell);
    lines
        .map(|(name, value)| (vec![(label, name.as_str())], value))
        .collect()
}

fn mib(number: u32) -> ConstGauge<f64> {
    ConstGauge::new(f64::from(number) * 1024.0 * 1024.0)
}

impl Sandboxes {
    fn figures(&self) -> impl Iterator<Item = &Figures> {
        self.0.iter().filter_map(|(_, figures)| figures.as_ref())
    }

    /// One metric of many lines.
    fn family<'a, M: EncodeMetric>(
        &'a self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, help, unit, kind): (&str, &str, Option<&Unit>, MetricType),
        lines: impl Fn(&'a Figures) -> Vec<(Labels<'a>, M)>,
    ) -> fmt::Result {
        let mut family = encoder.encode_descriptor(name, help, unit, kind)?;
        for figures in self.figures() {
            for (more, value) in lines(figures) {
                let labels = labels(figures, more);
                value.encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn of_the_host(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let answers = (
            "answers",
            "Whether the sandbox's shim answers",
            None,
            MetricType::Gauge,
        );
        let mut family = encoder.encode_descriptor(answers.0, answers.1, answers.2, answers.3)?;
        for (name, figures) in &self.0 {
            let labels = [("sandbox", name.as_str())];
            let gauge = ConstGauge::new(i64::from(figures.is_some()));
            gauge.encode(family.encode_family(&labels)?)?;
        }
        let unit = Unit::Bytes;
        let pss = (
            "process_pss",
            "Proportional set size of a process of the host; the VMM's has the guest's memory in it",
            Some(&unit),
            MetricType::Gauge,
        );
        self.family(encoder, pss, |figures| {
            by("role", &figures.processes, |one| {
                (&one.role, ConstGauge::new(one.pss_bytes as f64))
            })
        })?;
        let unit = Unit::Seconds;
        let cpu = (
            "process_cpu",
            "Processor time of a process of the host; the VMM's has the guest's in it",
            Some(&unit),
            MetricType::Counter,
        );
        self.family(encoder, cpu, |figures| {
            by("role", &figures.processes, |one| {
                (&one.role, ConstCounter::new(one.cpu_seconds))
            })
        })
    }

    fn of_the_machine(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let unit = Unit::Seconds;
        let boot = (
            "boot_stage",
            "Time to a stage of the boot, by the clock that starts with the VMM (host, vmm) or the guest",
            Some(&unit),
            MetricType::Gauge,
        );
        self.family(encoder, boot, |figures| {
            let stages = figures.boot.iter().map(|stage| {
                let labels = vec![
                    ("clock", stage.clock.as_str()),
                    ("stage", stage.name.as_str()),
                ];
                (labels, ConstGauge::new(stage.seconds))
            });
            stages.collect()
        })?;
        let exits = (
            "vm_exits",
            "KVM exits of all vCPUs",
            None,
            MetricType::Counter,
        );
        self.family(encoder, exits, |figures| {
            vec![(vec![], ConstCounter::new(figures.vmm.vm_exits))]
        })?;
        let requests = (
            "device_requests",
            "Requests that a device has completed",
            None,
            MetricType::Counter,
        );
        self.family(encoder, requests, |figures| {
            // Devices of one kind, such as a container's disks, are one line.
            let mut kinds: Vec<(&str, u64)> = Vec::new();
            for slot in &figures.vmm.slots {
                match kinds.iter_mut().find(|(kind, _)| *kind == slot.device) {
                    Some((_, sum)) => *sum += slot.requests,
                    None => kinds.push((&slot.device, slot.requests)),
                }
            }
            let lines = kinds.into_iter();
            lines
                .map(|(kind, sum)| (vec![("device", kind)], ConstCounter::new(sum)))
                .collect()
        })?;
        let vcpus = (
            "vcpus_online",
            "vCPUs that the guest uses",
            None,
            MetricType::Gauge,
        );
        self.family(encoder, vcpus, |figures| {
            vec![(vec![], ConstGauge::new(i64::from(figures.vcpus_online)))]
        })?;
        let unit = Unit::Bytes;
        let memory = (
            "memory_size",
            "Memory that the guest has",
            Some(&unit),
            MetricType::Gauge,
        );
        self.family(encoder, memory, |figures| {
            vec![(vec![], mib(sandboxes::memory_mib(figures)))]
        })?;
        let balloon = (
            "balloon",
            "Memory that the guest gave to the balloon",
            Some(&unit),
            MetricType::Gauge,
        );
        self.family(encoder, balloon, |figures| {
            vec![(vec![], mib(figures.vmm.balloon_mib))]
        })
    }

    fn of_the_guest(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let answers = (
            "guest_answers",
            "Whether the guest's agent answered in time",
            None,
            MetricType::Gauge,
        );
        self.family(encoder, answers, |figures| {
            vec![(vec![], ConstGauge::new(i64::from(figures.guest_answers)))]
        })?;
        let unit = Unit::Seconds;
        let cpu = (
            "container_cpu",
            "Processor time of a container, as the guest counts",
            Some(&unit),
            MetricType::Counter,
        );
        self.family(encoder, cpu, |figures| {
            by("container", &figures.containers, |one| {
                (&one.id, ConstCounter::new(one.cpu_usec as f64 / 1e6))
            })
        })?;
        let unit = Unit::Bytes;
        let memory = (
            "container_memory",
            "Memory of a container, as the guest counts",
            Some(&unit),
            MetricType::Gauge,
        );
        self.family(encoder, memory, |figures| {
            by("container", &figures.containers, |one| {
                (&one.id, ConstGauge::new(one.memory_bytes as f64))
            })
        })?;
        let pids = (
            "container_processes",
            "Processes of a container",
            None,
            MetricType::Gauge,
        );
        self.family(encoder, pids, |figures| {
            by("container", &figures.containers, |one| {
                (&one.id, ConstGauge::new(one.pids as f64))
            })
        })?;
        let kills = (
            "container_oom_kills",
            "Processes of a container that were killed for want of memory",
            None,
            MetricType::Counter,
        );
        self.family(encoder, kills, |figures| {
            by("container", &figures.containers, |one| {
                (&one.id, ConstCounter::new(one.oom_kills))
            })
        })
    }

    fn of_the_agent(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let failed = (
            "agent_requests_failed",
            "Requests that the guest's agent refused or did not answer",
            None,
            MetricType::Counter,
        );
        self.family(encoder, failed, |figures| {
            by("request", &figures.requests, |one| {
                (&one.request, ConstCounter::new(one.failed))
            })
        })?;
        let unit = Unit::Seconds;
        let mut family = encoder.encode_descriptor(
            "agent_request_duration",
            "How long the guest's agent took to answer",
            Some(&unit),
            MetricType::Histogram,
        )?;
        for figures in self.figures() {
            for latency in &figures.requests {
                let longer = latency.count - latency.buckets.iter().sum::<u64>().min(latency.count);
                let buckets: Vec<(f64, u64)> = BOUNDS
                    .into_iter()
                    .zip(latency.buckets)
                    .chain([(f64::INFINITY, longer)])
                    .collect();
                let labels = labels(figures, vec![("request", &latency.request)]);
                family
                    .encode_family(&labels)?
                    .encode_histogram::<NoLabelSet>(latency.sum, latency.count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

impl Collector for Sandboxes {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        self.of_the_host(&mut encoder)?;
        self.of_the_machine(&mut encoder)?;
        self.of_the_guest(&mut encoder)?;
        self.of_the_agent(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_told_in_the_text_format() {
        let figures = serde_json::json!({
            "sandbox": "k8s.io.a", "manager": "k8s.io", "booted_at": 7,
            "boot": [{ "clock": "guest", "name": "say \"hi\"", "seconds": 0.25 }],
            "vmm": {
                "version": "1", "state": "running", "vcpus": { "boot": 1, "max": 4 },
                "memory": { "boot_mib": 128, "hotplug_mib": 64, "shared": false },
                "slots": [
                    { "slot": 0, "device": "block", "active": true, "requests": 5 },
                    { "slot": 3, "device": "block", "active": true, "requests": 2 },
                ],
                "slot_count": 8, "balloon_mib": 1, "hotplugged_mib": 2, "vm_exits": 99, "stages": [],
            },
            "vcpus_online": 2, "guest_answers": true,
            "containers": [{ "id": "c", "cpu_usec": 1_500_000, "memory_bytes": 4096, "pids": 3, "oom_kills": 1 }],
            "requests": [{
                "request": "create", "buckets": [1, 0, 0, 0, 2, 0, 0, 0, 0], "count": 4, "failed": 1, "sum": 20.5,
            }],
            "processes": [{ "role": "vmm", "pid": 9, "pss_bytes": 1024, "cpu_seconds": 0.5 }],
        });
        let figures: Figures = serde_json::from_value(figures).unwrap();
        let told = vec![
            ("k8s.io.a".to_owned(), Some(figures)),
            ("lost".to_owned(), None),
        ];
        let text = text_of(told).unwrap();
        let own = r#"sandbox="k8s.io.a",manager="k8s.io""#;
        for line in [
            r#"caisson_answers{sandbox="lost"} 0"#.to_owned(),
            format!(r#"caisson_vm_exits_total{{{own}}} 99"#),
            format!(r#"caisson_device_requests_total{{{own},device="block"}} 7"#),
            format!(r#"caisson_boot_stage_seconds{{{own},clock="guest",stage="say \"hi\""}} 0.25"#),
            format!(r#"caisson_memory_size_bytes{{{own}}} 136314880.0"#),
            format!(r#"caisson_container_cpu_seconds_total{{{own},container="c"}} 1.5"#),
            format!(
                r#"caisson_agent_request_duration_seconds_bucket{{le="0.1",{own},request="create"}} 3"#
            ),
            format!(
                r#"caisson_agent_request_duration_seconds_bucket{{le="+Inf",{own},request="create"}} 4"#
            ),
            format!(r#"caisson_agent_request_duration_seconds_count{{{own},request="create"}} 4"#),
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
