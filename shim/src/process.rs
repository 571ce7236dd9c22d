//! One process of a task as containerd sees it.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use caisson_sandbox::Streams;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::Instant,
};

use crate::{
    hooks::HostHooks,
    stdio::{Host, Paths},
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Being created in the guest.
    Creating,
    /// Waits for `Start`.
    Created,
    /// Its `Start` is under way: what happens meanwhile is told after it.
    Starting,
    /// Runs.
    Running,
    /// Has ended and its output is written.
    Stopped,
}

/// A container's first process or an exec.
pub struct Process {
    /// Where it is in its life.
    pub stage: Stage,
    /// Of the request.
    pub paths: Paths,
    /// Directory of the container.
    pub bundle: PathBuf,
    /// For containerd; not 0 once it exists.
    pub pid: u32,
    /// Both ends of its streams until it starts.
    pub unstarted: Option<(Host, Streams)>,
    /// The container's, of its first process.
    pub hooks: Option<Arc<HostHooks>>,
    /// Told when its stdin shall end.
    pub close_stdin: Arc<Notify>,
    /// An end that came during `Create` or `Start`.
    pub early_exit: Option<Exit>,
    /// It was killed, and its end is watched for.
    pub dying: bool,
    /// Its `Delete` is under way.
    pub deleting: bool,
    /// Since when the guest has not deleted it.
    pub kept_since: Option<Instant>,
    /// Ends once the program that takes its output has ended, if there is one.
    pub logger: Option<JoinHandle<()>>,
    /// The container is frozen.
    pub paused: bool,
    /// When it was last told that the container's memory was not enough.
    pub oom_told: Option<Instant>,
    /// Its end in the guest, before its output has been written.
    end: watch::Sender<Option<Exit>>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A process that is being created.
    pub fn new(paths: Paths, bundle: PathBuf) -> Self {
        Self {
            stage: Stage::Creating,
            paths,
            bundle,
            pid: 0,
            unstarted: None,
            hooks: None,
            close_stdin: Arc::default(),
            early_exit: None,
            dying: false,
            deleting: false,
            kept_since: None,
            logger: None,
            paused: false,
            oom_told: None,
            end: watch::Sender::new(None),
            exit: watch::Sender::new(None),
        }
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Tells everybody who waits. The first end counts.
    pub fn set_exit(&mut self, exit: Exit) -> bool {
        self.stage = Stage::Stopped;
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(exit);
            first
        })
    }

    /// It has ended in the guest; its last output may still be on its way.
    pub fn end(&mut self, exit: Exit) {
        self.end.send_replace(Some(exit));
    }

    /// Whether the guest has told its end.
    pub fn has_ended(&self) -> bool {
        self.early_exit.is_some() || self.end.borrow().is_some() || self.exit().is_some()
    }

    /// To wait for its end in the guest.
    pub fn early_end(&self) -> watch::Receiver<Option<Exit>> {
        self.end.subscribe()
    }

    /// To wait for its end with all output written.
    pub fn watch(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }
}
