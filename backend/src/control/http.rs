//! The metrics over HTTP, as far as a scrape needs it: one GET a connection. The address is a
//! loopback one: whoever can reach it may read the metrics, and can do nothing else.

use super::clients::{self, Client, Stream};
use super::{metrics, Subject};
use crate::budget::Bucket;
use crate::engine::lock;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Clients at a time.
const CLIENTS: usize = 4;
/// Connections a second: what they cost counts as the daemon's CPU time, and any user of this
/// machine can make them.
const RATE: f64 = 10.0;
/// Longest head of a request.
const HEAD_MAX: usize = 8192;
/// How long a scrape may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves the metrics on threads of its own.
///
/// # Errors
/// If a thread cannot be started.
pub fn serve(listener: TcpListener, subject: Arc<Subject>) -> io::Result<()> {
    let bucket = Mutex::new(Bucket::new(RATE, RATE, Instant::now()));
    let pace = move || {
        let mut bucket = lock(&bucket);
        let now = Instant::now();
        std::thread::sleep(bucket.wait_for(1.0, now).unwrap_or_default());
        bucket.spend(1.0, Instant::now());
    };
    clients::serve("metrics", listener, CLIENTS, pace, move |client| respond(client, &subject))
}

fn respond<S: Stream>(client: &mut Client<S>, subject: &Subject) -> io::Result<()> {
    client.allow(PATIENCE);
    let mut head = Vec::new();
    let mut part = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = client.read(&mut part)?;
        if length == 0 || head.len() + length > HEAD_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.extend_from_slice(&part[..length]);
    }
    let response = response(&head, || metrics::render(subject));
    client.write_all(response.as_bytes())
}

/// The response to a request with this head.
fn response(head: &[u8], metrics: impl FnOnce() -> String) -> String {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    let version_is_known = words.next().is_some_and(|version| version.starts_with(b"HTTP/1."));
    let plain = "text/plain; charset=utf-8";
    let (status, kind, body) = match (method, path) {
        _ if !version_is_known => ("400 Bad Request", plain, "this is no HTTP/1\n".into()),
        (b"GET" | b"HEAD", b"/metrics") => ("200 OK", metrics::CONTENT_TYPE, metrics()),
        (b"GET" | b"HEAD", _) => ("404 Not Found", plain, "the metrics are at /metrics\n".into()),
        _ => ("405 Method Not Allowed\r\nAllow: GET, HEAD", plain, String::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    if method == b"HEAD" {
        head
    } else {
        head + &body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_get_of_the_metrics_is_answered_with_them() {
        let ask = |head: &str| response(head.as_bytes(), || "gemini_x 1\n".into());
        let answer = ask("GET /metrics?x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("\r\nContent-Length: 11\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\ngemini_x 1\n"), "{answer}");
        assert!(ask("HEAD /metrics HTTP/1.0\r\n\r\n").ends_with("\r\n\r\n"));
        for (head, status) in [
            ("GET / HTTP/1.1\r\n\r\n", 404),
            ("POST /metrics HTTP/1.1\r\n\r\n", 405),
            ("GET /metrics\r\n\r\n", 400),
            ("GET /metrics HTTP/2\r\n\r\n", 400),
            ("\u{1}\u{2}\r\n\r\n", 400),
        ] {
            let answer = ask(head);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head}: {answer}");
            assert!(!answer.contains("gemini_x"), "{head}");
        }
    }
}
