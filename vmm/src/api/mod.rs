//! The server of the control API: one thread, one packet after the other.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use caisson_vmm_api::{
    Call, Channel, ChannelError, Event, ExitReason, Failure, Message, Request, Response,
};
use rustix::event::{PollFd, PollFlags, poll};

use crate::machine::{Fds, Machine, MachineError, Notice, Notices, Stages};

/// Serves one parent until the microVM ends.
pub struct Server {
    channel: Channel,
    notices: Arc<Notices>,
    stages: Stages,
    machine: Option<Machine>,
}

/// Whether to go on after a packet.
enum Next {
    Continue,
    End(ExitReason),
}

impl Server {
    /// A server on the parent's channel. `stages` counts from the start of the process.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new(channel: Channel, stages: Stages) -> std::io::Result<Self> {
        Ok(Self {
            channel,
            notices: Arc::new(Notices::new()?),
            stages,
            machine: None,
        })
    }

    /// Serves until the guest or the parent ends it. The parent has been told.
    pub fn serve(mut self) -> ExitReason {
        let reason = self.serve_calls().unwrap_or_else(|error| match error {
            ChannelError::Closed => ExitReason::Stopped,
            error => ExitReason::Internal {
                message: error.to_string(),
            },
        });
        let console_tail = self
            .machine
            .as_ref()
            .map(Machine::console_tail)
            .unwrap_or_default();
        tell_end(&self.channel, &reason, console_tail);
        reason
    }

    fn serve_calls(&mut self) -> Result<ExitReason, ChannelError> {
        loop {
            let (call, noticed) = self.wait()?;
            if noticed && let Next::End(reason) = self.report_notices()? {
                return Ok(reason);
            }
            if call && let Next::End(reason) = self.serve_call()? {
                return Ok(reason);
            }
        }
    }

    /// Waits for a call or a notice.
    fn wait(&self) -> Result<(bool, bool), ChannelError> {
        let notices = self.notices.as_ref();
        // SAFETY: the descriptor belongs to `self.notices`, which outlives this borrow.
        let event = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(notices)) };
        let mut fds = [
            PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(event, PollFlags::IN),
        ];
        rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
        Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty()))
    }

    fn report_notices(&mut self) -> Result<Next, ChannelError> {
        for notice in self.notices.take() {
            match notice {
                Notice::Ended(reason) => return Ok(Next::End(reason)),
                Notice::DeviceFailed { slot, message } => {
                    let event = Event::DeviceFailed { slot, message };
                    self.channel.send(&Message::Event(event), &[])?;
                }
            }
        }
        Ok(Next::Continue)
    }

    fn serve_call(&mut self) -> Result<Next, ChannelError> {
        let (call, fds): (Call, Vec<OwnedFd>) = self.channel.receive()?;
        let stop = matches!(call.request, Request::Stop);
        let result = self.answer(call.request, fds.into()).map_err(Failure::from);
        let reply = Message::Reply {
            id: call.id,
            result,
        };
        self.channel.send(&reply, &[])?;
        Ok(if stop {
            Next::End(ExitReason::Stopped)
        } else {
            Next::Continue
        })
    }

    fn answer(&mut self, request: Request, fds: Fds) -> Result<Response, MachineError> {
        match request {
            Request::Boot(config) => {
                self.expect_empty()?;
                self.stages.reached("configuration read");
                let notices = self.notices.clone();
                let (machine, slots) = Machine::boot(*config, fds, notices, &mut self.stages)?;
                self.machine = Some(machine);
                return Ok(Response::Started { slots });
            }
            Request::Restore(config) => {
                self.expect_empty()?;
                self.stages.reached("configuration read");
                let notices = self.notices.clone();
                let (machine, slots) = Machine::restore(*config, fds, notices, &mut self.stages)?;
                self.machine = Some(machine);
                return Ok(Response::Started { slots });
            }
            Request::Attach(config) => {
                let slot = self.machine()?.attach(&config, fds)?;
                return Ok(Response::Attached { slot });
            }
            Request::Describe => {
                let stages = self.stages.list();
                let description = self.machine()?.describe(stages);
                return Ok(Response::Description(Box::new(description)));
            }
            Request::Detach { slot } => self.machine()?.detach(slot)?,
            Request::Pause => self.machine()?.pause()?,
            Request::Resume => self.machine()?.resume()?,
            Request::Save { state, memory } => self.machine()?.save(state, memory, fds)?,
            Request::SetHotplugMemory { mib } => self.machine()?.set_hotplug_memory(mib)?,
            Request::SetBalloon { mib } => self.machine()?.set_balloon(mib)?,
            Request::Stop => {}
        }
        Ok(Response::Done)
    }

    fn expect_empty(&self) -> Result<(), MachineError> {
        match self.machine {
            None => Ok(()),
            Some(_) => Err(MachineError::State(
                "the microVM exists already; one process runs one".into(),
            )),
        }
    }

    fn machine(&mut self) -> Result<&mut Machine, MachineError> {
        self.machine.as_mut().ok_or_else(|| {
            MachineError::State("there is no microVM yet: Boot or Restore comes first".into())
        })
    }
}

/// Tells why the microVM is over, which matters more than the guest's last words.
fn tell_end(channel: &Channel, reason: &ExitReason, console_tail: String) {
    let tell = |console_tail| {
        let event = Event::Exited {
            reason: reason.clone(),
            console_tail,
        };
        channel.send(&Message::Event(event), &[])
    };
    // A parent that is gone needs no news.
    if let Err(ChannelError::TooLarge { .. }) = tell(console_tail) {
        let _ = tell(String::new());
    }
}

/// The process' exit status for each reason, as [`ExitReason`] documents it.
pub fn exit_status(reason: &ExitReason) -> i32 {
    match reason {
        ExitReason::GuestShutdown | ExitReason::Stopped => 0,
        ExitReason::GuestPanic => 10,
        ExitReason::TripleFault => 11,
        ExitReason::VcpuFailed { .. } => 12,
        ExitReason::Internal { .. } => 13,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_told_whatever_the_last_words() {
        for (words, told) in [("bye".to_owned(), "bye"), ("\u{1}".repeat(16 << 10), "")] {
            let (ours, theirs) = Channel::pair().unwrap();
            tell_end(&ours, &ExitReason::GuestPanic, words);
            let (message, _) = theirs.receive::<Message>().unwrap();
            let expected = Event::Exited {
                reason: ExitReason::GuestPanic,
                console_tail: told.into(),
            };
            assert_eq!(message, Message::Event(expected));
        }
    }
}
