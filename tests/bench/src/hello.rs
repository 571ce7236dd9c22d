//! The signal that ends a cold start: the agent's answer to `Hello`.
//!
//! One ttrpc request and its response, written by hand over any byte stream, so
//! that every monitor is asked in the same way at the same cost. The frame is a
//! ten-byte header (length and stream id, big-endian 32 bits each; type; flags)
//! and a protobuf message, as in ttrpc's `PROTOCOL.md`.

use std::io::{self, Read, Write};

use caisson_protocol::{
    VERSION,
    agent::{HelloRequest, HelloResponse},
};
use protobuf::Message;

const TYPE_REQUEST: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
/// Longest answer that makes sense.
const MAX_ANSWER: usize = 64 * 1024;

/// Asks the agent at the other end of `stream` and waits for its answer. Time-outs are the stream's.
///
/// # Errors
/// Those of the stream; `InvalidData` when the answer is not one to this request or says that it failed.
pub fn hello(stream: &mut (impl Read + Write)) -> io::Result<HelloResponse> {
    stream.write_all(&request()?)?;
    let mut header = [0; 10];
    stream.read_exact(&mut header)?;
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    if header[8] != TYPE_RESPONSE || length > MAX_ANSWER {
        return Err(invalid(format!(
            "the agent answered with a frame of type {} and {length} bytes",
            header[8]
        )));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let response = ttrpc::proto::Response::parse_from_bytes(&body)?;
    if response.status().code() != ttrpc::Code::OK {
        return Err(invalid(format!(
            "the agent refused Hello: {}",
            response.status().message
        )));
    }
    Ok(HelloResponse::parse_from_bytes(&response.payload)?)
}

fn request() -> io::Result<Vec<u8>> {
    let hello = HelloRequest {
        protocol_version: VERSION,
        ..HelloRequest::default()
    };
    let request = ttrpc::proto::Request {
        service: "caisson.agent.v1.Agent".into(),
        method: "Hello".into(),
        payload: hello.write_to_bytes()?,
        ..ttrpc::proto::Request::default()
    };
    let body = request.write_to_bytes()?;
    let length = u32::try_from(body.len()).map_err(|_| invalid("request too long".into()))?;
    let mut frame = Vec::with_capacity(10 + body.len());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(&1u32.to_be_bytes());
    frame.extend_from_slice(&[TYPE_REQUEST, 0]);
    frame.extend_from_slice(&body);
    Ok(frame)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Answers one request on a thread with `response`.
    fn fake_agent(response: ttrpc::proto::Response, kind: u8) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut header = [0; 10];
            theirs.read_exact(&mut header).unwrap();
            let length = u32::from_be_bytes(header[..4].try_into().unwrap());
            let mut body = vec![0; length as usize];
            theirs.read_exact(&mut body).unwrap();
            let request = ttrpc::proto::Request::parse_from_bytes(&body).unwrap();
            assert_eq!(request.method, "Hello");
            let body = response.write_to_bytes().unwrap();
            let mut frame = (body.len() as u32).to_be_bytes().to_vec();
            frame.extend_from_slice(&header[4..8]);
            frame.extend_from_slice(&[kind, 0]);
            frame.extend_from_slice(&body);
            theirs.write_all(&frame).unwrap();
        });
        ours
    }

    #[test]
    fn an_answer_is_read() {
        let payload = HelloResponse {
            kernel_release: "6.12".into(),
            ..HelloResponse::default()
        };
        let response = ttrpc::proto::Response {
            payload: payload.write_to_bytes().unwrap(),
            ..ttrpc::proto::Response::default()
        };
        let answer = hello(&mut fake_agent(response, TYPE_RESPONSE)).unwrap();
        assert_eq!(answer.kernel_release, "6.12");
    }

    #[test]
    fn a_refusal_and_a_strange_frame_are_errors() {
        let mut refusal = ttrpc::proto::Response::default();
        refusal.mut_status().set_code(ttrpc::Code::UNIMPLEMENTED);
        assert!(hello(&mut fake_agent(refusal, TYPE_RESPONSE)).is_err());
        assert!(hello(&mut fake_agent(ttrpc::proto::Response::default(), 9)).is_err());
    }
}
