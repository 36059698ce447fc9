//! The daemon's control socket, configuration file and metrics, and geminictl, as real processes.

#![allow(clippy::unwrap_used)] // a test that cannot go on must fail

use serde_json::{json, Value};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon that no VMM talks to. It ends with this.
struct Daemon {
    process: Child,
    directory: tempfile::TempDir,
}

fn command_in(directory: &Path, arguments: &[&str]) -> Command {
    let path = |name| directory.join(name);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-gemini"));
    command
        .arg("--socket-path")
        .arg(path("vm1.sock"))
        .arg("--control-socket")
        .arg(path("vm1-control.sock"))
        .args(arguments)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stderr(std::fs::File::create(path("log")).unwrap());
    command
}

fn daemon_in(directory: tempfile::TempDir, arguments: &[&str]) -> Daemon {
    let process = command_in(directory.path(), arguments).spawn().unwrap();
    let mut daemon = Daemon { process, directory };
    daemon.wait_for("listening", |daemon| UnixStream::connect(daemon.socket()).is_ok());
    daemon
}

fn daemon(arguments: &[&str]) -> Daemon {
    daemon_in(tempfile::tempdir().unwrap(), arguments)
}

impl Daemon {
    fn socket(&self) -> PathBuf {
        self.directory.path().join("vm1-control.sock")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    fn wait_for(&mut self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            let ended = self.process.try_wait().unwrap();
            assert!(ended.is_none(), "{what}: the daemon ended ({ended:?}): {}", self.log());
            assert!(start.elapsed() < PATIENCE, "the daemon is not {what}: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn ask(&self, request: &str) -> Value {
        let stream = UnixStream::connect(self.socket()).unwrap();
        ask(&mut BufReader::new(stream), request)
    }

    fn status(&self) -> Value {
        self.ask("{\"cmd\":\"status\"}")
    }

    fn hang_up(&self) {
        let kill = Command::new("kill").args(["-HUP", &self.process.id().to_string()]).status();
        assert!(kill.unwrap().success());
    }

    fn geminictl(&self, arguments: &[&str]) -> Output {
        geminictl().env("GEMINI_CONTROL_SOCKET", self.socket()).args(arguments).output().unwrap()
    }

    /// What geminictl prints, where it must succeed.
    fn told(&self, arguments: &[&str]) -> String {
        let output = self.geminictl(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && error.is_empty(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it says where it must not.
    fn refused(&self, arguments: &[&str]) -> String {
        failed(&self.geminictl(arguments))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn geminictl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_geminictl"));
    command.env_remove("GEMINI_CONTROL_SOCKET").env_remove("XDG_RUNTIME_DIR");
    command
}

fn failed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// One request on a connection that stays.
fn ask(connection: &mut BufReader<UnixStream>, request: &str) -> Value {
    connection.get_mut().set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(connection.get_mut(), "{request}").unwrap();
    let mut line = String::new();
    connection.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{request}: {error}: {line:?}"))
}

#[test]
fn a_file_is_loaded_at_the_start_and_at_sighup_whole_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gemini.toml");
    std::fs::write(&file, "copy-rate = \"100M\"\ncpu-share = 10\n").unwrap();
    let path = file.to_str().unwrap().to_owned();
    // The command line wins.
    let mut daemon = daemon_in(directory, &["--config", &path, "--cpu-share", "20"]);
    let status = daemon.status();
    assert_eq!((&status["copy_rate"], &status["cpu_share"]), (&json!(100 << 20), &json!(20)));
    assert_eq!(status["config"], json!(path));

    std::fs::write(&file, "copy-rate = \"50M\"\nhuge-max = \"1G\"\npolicy = \"none\"\n").unwrap();
    daemon.hang_up();
    daemon.wait_for("at the new rate", |daemon| daemon.status()["copy_rate"] == json!(50 << 20));
    let status = daemon.status();
    assert_eq!(status["huge_max"], json!(1 << 30));
    assert_eq!((&status["policy"], &status["cpu_share"]), (&json!("none"), &json!(20)));

    // Its first line is good; nothing of it is taken.
    std::fs::write(&file, "copy-rate = \"10M\"\n\nhuge-max = \"lots\"\n").unwrap();
    daemon.hang_up();
    daemon.wait_for("told", |daemon| daemon.status()["config_refused"].is_string());
    let refused = daemon.status()["config_refused"].as_str().unwrap().to_owned();
    assert!(refused.contains("gemini.toml:3: huge-max: \"lots\""), "{refused}");
    assert!(refused.contains("4G"), "it says what would be right: {refused}");
    assert!(daemon.log().contains(&refused), "{}", daemon.log());
    assert_eq!(daemon.status()["copy_rate"], json!(50 << 20));
    assert!(daemon.told(&["metrics"]).contains("_last_reload_successful{vm=\"vm1\"} 0\n"));
    assert!(daemon.refused(&["reload"]).contains("gemini.toml:3"));

    // A name that is gone, and what the socket set, go back.
    assert_eq!(daemon.told(&["set", "huge-max", "2G"]), "huge-max       2G\n");
    std::fs::write(&file, "copy-rate = \"60M\"\n").unwrap();
    daemon.told(&["reload"]);
    let status = daemon.status();
    assert_eq!((&status["copy_rate"], &status["huge_max"]), (&json!(60 << 20), &Value::Null));
    assert_eq!((&status["policy"], &status["config_refused"]), (&json!("gemini"), &Value::Null));
}

#[test]
fn a_bad_file_ends_a_daemon_that_starts_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gemini.toml");
    std::fs::write(&file, "policy = \"gemini\"\nsocket-path = \"x\"\n").unwrap();
    let socket = directory.path().join("vm1.sock");
    let start = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_vhost-device-gemini"))
            .arg("--socket-path")
            .arg(&socket)
            .args(arguments)
            .output()
            .unwrap()
    };
    let output = start(&["--config", file.to_str().unwrap()]);
    let error = failed(&output);
    assert!(error.contains("gemini.toml:2: ") && error.contains("command line"), "{error}");
    assert!(!socket.exists());
    for arguments in
        [["--copy-rate", "1M"], ["--policy", "best"], ["--metrics-address", "0.0.0.0:1"]]
    {
        assert_eq!(start(&arguments).status.code(), Some(2), "{arguments:?}");
    }
}

/// A daemon that a service manager starts, and the manager's ear.
fn managed(arguments: &[&str]) -> (Daemon, UnixDatagram) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = command_in(directory.path(), arguments);
    let process = command.env("NOTIFY_SOCKET", path).spawn().unwrap();
    (Daemon { process, directory }, manager)
}

#[test]
fn the_service_manager_hears_of_a_daemon_when_it_serves_shut_in() {
    for (mode, filter) in [("on", 2), ("log", 2), ("off", 0)] {
        let shares = tempfile::tempdir().unwrap();
        let shares = shares.path().to_str().unwrap();
        let (daemon, manager) = managed(&["--share-dir", shares, "--sandbox", mode]);
        let mut heard = [0; 16];
        let length = manager.recv(&mut heard).unwrap_or_else(|error| {
            panic!("--sandbox {mode}: {error}: {}", daemon.log());
        });
        assert_eq!(&heard[..length], b"READY=1");
        let status = format!("/proc/{}/status", daemon.process.id());
        let status = std::fs::read_to_string(status).unwrap();
        assert!(status.contains(&format!("Seccomp:\t{filter}\n")), "--sandbox {mode}: {status}");
        // CAP_SYS_ADMIN, in every mode.
        for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
            let bits = status.lines().find_map(|line| line.strip_prefix(&format!("{set}:\t")));
            let bits = u64::from_str_radix(bits.unwrap(), 16).unwrap();
            assert_eq!(bits & 1 << 21, 0, "--sandbox {mode}: {status}");
        }
        assert_eq!(daemon.status()["connected"], json!(false));
    }
}

#[test]
fn the_service_manager_hears_nothing_of_a_daemon_that_cannot_serve() {
    // Its sockets are there when it finds that out: the one is none that can be shared, the other
    // would bring all files into the sandbox's view.
    for shares in ["/nonexistent", "/"] {
        let (mut daemon, manager) = managed(&["--share-dir", shares]);
        assert_eq!(daemon.process.wait().unwrap().code(), Some(1), "{}", daemon.log());
        manager.set_nonblocking(true).unwrap();
        let nothing = manager.recv(&mut [0; 16]).map_err(|error| error.kind());
        assert_eq!(nothing, Err(std::io::ErrorKind::WouldBlock), "{shares}");
    }
}

#[test]
fn without_a_file_there_is_nothing_to_load() {
    let mut daemon = daemon(&[]);
    assert!(daemon.refused(&["reload"]).contains("--config"));
    daemon.hang_up();
    daemon.wait_for("told", |daemon| daemon.log().contains("without --config"));
    assert_eq!(daemon.status()["name"], json!("vm1"));
}

#[test]
fn a_change_is_taken_whole_or_not_at_all_and_seen_whole_by_many_clients_at_once() {
    let daemon = daemon(&[]);
    let error = daemon.ask(r#"{"cmd":"set","copy_rate":4194304,"cpu_share":0}"#);
    assert!(error["error"].as_str().unwrap().contains("cpu_share"), "{error}");
    assert_eq!(daemon.status()["copy_rate"], json!(256 << 20));

    /// Ends the writers also where a reader failed.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for percent in [40, 80] {
            let (daemon, stop) = (&daemon, &stop);
            scope.spawn(move || {
                let stream = UnixStream::connect(daemon.socket()).unwrap();
                let mut connection = BufReader::new(stream);
                let pair = json!({"copy_rate": percent << 20, "cpu_share": percent});
                let mut request = pair.clone();
                request["cmd"] = json!("set");
                while !stop.load(Ordering::SeqCst) {
                    assert_eq!(ask(&mut connection, &request.to_string()), pair);
                }
            });
        }
        let readers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let stream = UnixStream::connect(daemon.socket()).unwrap();
                    let mut connection = BufReader::new(stream);
                    // At least so many times, and until each of the two was seen.
                    let (start, mut seen, mut asked) = (Instant::now(), [0; 2], 0);
                    while asked < 300 || seen.contains(&0) {
                        assert!(start.elapsed() < PATIENCE, "only one of the two is seen");
                        asked += 1;
                        let status = ask(&mut connection, "{\"cmd\":\"status\"}");
                        let percent = status["cpu_share"].as_u64().unwrap();
                        if percent != 25 {
                            assert_eq!(status["copy_rate"], json!(percent << 20));
                            seen[usize::from(percent == 80)] += 1;
                        }
                    }
                })
            })
            .collect();
        let mut connection = BufReader::new(UnixStream::connect(daemon.socket()).unwrap());
        for _ in 0..300 {
            ask(&mut connection, "{\"cmd\":\"metrics\"}");
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
}

#[test]
fn silent_slow_and_garbling_clients_lock_nobody_out() {
    let mut daemon = daemon(&[]);
    let connect = || UnixStream::connect(daemon.socket()).unwrap();
    // More than there are places; half of them have begun a request.
    let silent: Vec<_> = (0..20)
        .map(|number| {
            let mut stream = connect();
            if number % 2 == 0 {
                stream.write_all(b"{\"cmd\":").unwrap();
            }
            stream
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(daemon.status()["connected"], json!(false));
    }
    drop(silent);
    // One that takes no answers.
    let mut deaf = connect();
    deaf.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut sent = 0;
    while sent < 1 << 22 && deaf.write_all(&b"{\"cmd\":\"settings\"}\n".repeat(100)).is_ok() {
        sent += 1900;
    }
    assert_eq!(daemon.status()["connected"], json!(false));

    for garbage in [
        "",
        "{}",
        "7",
        "[]",
        "null",
        "\"status\"",
        "{\"cmd\":7}",
        "{\"cmd\":\"explode\"}",
        "{\"cmd\":\"status\",\"of\":1}",
        "{\"cmd\":\"set\"}",
        "{\"cmd\":\"set\",\"huge_max\":-1}",
        "{\"cmd\":\"set\",\"copyrate\":1}",
        "\u{1b}[2J\u{0}",
    ] {
        let answer = daemon.ask(garbage);
        assert!(answer["error"].is_string(), "{garbage:?}: {answer}");
    }
    // No end of a line in sight.
    let mut endless = connect();
    endless.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);
    let mut answer = Vec::new();
    // The rest of what it sent makes the end of the connection an abrupt one.
    let _ = endless.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.is_empty() || answer.contains("at most 4096 bytes"), "{answer}");
    // Nothing but what is no text at all.
    let mut noise = connect();
    noise.set_read_timeout(Some(PATIENCE)).unwrap();
    noise.write_all(&[0xff, 0xfe, 0x80, b'\n']).unwrap();
    let mut line = String::new();
    BufReader::new(noise).read_line(&mut line).unwrap();
    assert!(line.contains("not understood"), "{line}");
    daemon.wait_for("well", |daemon| daemon.status()["connected"] == json!(false));
    assert_eq!(daemon.status()["copy_rate"], json!(256 << 20));
}

#[test]
fn the_control_socket_is_its_users_alone() {
    let daemon = daemon(&[]);
    let mode = daemon.socket().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
}

#[test]
fn geminictl_shows_and_changes() {
    let daemon = daemon(&["--copy-rate", "100M", "--name", "db 1"]);
    let status = daemon.told(&["status"]);
    for line in [
        "vm             db 1",
        "state          no VMM is connected",
        "policy         gemini",
        "copy_rate      100 MiB a second; copied 0 B in 0 collapses, 0 attempts failed",
    ] {
        assert!(status.lines().any(|l| l == line), "no {line:?} in\n{status}");
    }
    assert_eq!(
        daemon.told(&["set", "copy-rate", "50M", "huge_max", "1G"]),
        "copy-rate      50M\nhuge-max       1G\n"
    );
    assert!(daemon.told(&["budgets"]).contains("huge_max       1 GiB; the guest has 0 B"));
    let error = daemon.refused(&["set", "copy-rate", "60M", "cpu-share", "200"]);
    assert!(error.contains("cpu_share") && error.contains("1 to 100"), "{error}");
    assert_eq!(daemon.status()["copy_rate"], json!(50 << 20));
    assert!(daemon.refused(&["set", "speed", "1"]).contains("copy-rate, cpu-share"));
    assert_eq!(daemon.told(&["policy", "always"]), "policy         always\n");
    assert_eq!(daemon.told(&["policy"]), "always\n");
    let error = daemon.refused(&["policy", "best"]);
    assert!(error.contains("best") && error.contains("none, always, gemini"), "{error}");
    assert!(daemon.told(&["settings"]).contains("copy-rate      50M        default 256M"));
    assert!(daemon.told(&["map"]).contains("no VMM is connected"));
    assert!(daemon.told(&["pause"]).starts_with("paused"));
    assert!(daemon.told(&["status"]).contains("state          paused: "));
    assert_eq!(daemon.told(&["resume"]), "resumed\n");
    let json: Value = serde_json::from_str(&daemon.told(&["status", "--json"])).unwrap();
    assert_eq!((&json["paused"], &json["name"]), (&json!(false), &json!("db 1")));
    let quiet = "set log-level error".split(' ').collect::<Vec<_>>();
    daemon.told(&quiet);
    let before = daemon.log();
    daemon.told(&["set", "cpu-share", "7"]);
    assert_eq!(daemon.log(), before, "a message that is less important than an error");
}

#[test]
fn geminictl_says_what_is_wrong_and_what_to_do() {
    let mut daemon = daemon(&[]);
    let at = |path: PathBuf| {
        let output = geminictl().arg("status").arg("--control-socket").arg(path).output();
        failed(&output.unwrap())
    };
    let missing = at(daemon.directory.path().join("none"));
    assert!(missing.contains("does not run"), "{missing}");
    let wrong = at(daemon.directory.path().join("vm1.sock"));
    assert!(wrong.contains("--socket-path"), "{wrong}");
    let file = at(daemon.directory.path().join("log"));
    assert!(file.contains("start the daemon again"), "{file}");
    daemon.process.kill().unwrap();
    daemon.process.wait().unwrap();
    let dead = at(daemon.socket());
    assert!(dead.contains("has died"), "{dead}");
    let empty = tempfile::tempdir().unwrap();
    let output = geminictl().arg("status").env("XDG_RUNTIME_DIR", empty.path()).output().unwrap();
    // Daemons may run on this machine: then there is one, or several.
    if !Path::new("/run/virtio-gemini").exists() {
        let none = failed(&output);
        assert!(none.contains("GEMINI_CONTROL_SOCKET") && none.contains("/run/"), "{none}");
    }
}

fn get(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

#[test]
fn prometheus_can_scrape_the_metrics() {
    let mut daemon = daemon(&["--metrics-address", "127.0.0.1:0", "--copy-rate", "100M"]);
    let mut address = None;
    daemon.wait_for("serving metrics", |daemon| {
        let log = daemon.log();
        let url = log.split("http://").nth(1).and_then(|rest| rest.split("/metrics").next());
        address = url.and_then(|address| address.parse::<SocketAddr>().ok());
        address.is_some()
    });
    let address = address.unwrap();
    let scrape = || {
        let response = get(address, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        let lines = body.lines().map(|line| Ok(line.to_owned()));
        let scrape = prometheus_parse::Scrape::parse(lines).unwrap();
        let lines = body.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(scrape.samples.len(), lines);
        let of = |name: &str| {
            let sample = scrape.samples.iter().find(|sample| sample.metric == name).unwrap();
            assert_eq!(sample.labels.get("vm"), Some("vm1"));
            match sample.value {
                prometheus_parse::Value::Gauge(value) => value,
                ref other => panic!("{name} is {other:?}"),
            }
        };
        (of("gemini_copy_rate_bytes_per_second"), of("gemini_paused"))
    };
    assert_eq!(scrape(), (104_857_600.0, 0.0));
    daemon.told(&["set", "copy-rate", "4M"]);
    daemon.told(&["pause"]);
    assert_eq!(scrape(), (4_194_304.0, 1.0));
    assert!(get(address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
    // Silent ones lock nobody out.
    let _silent: Vec<_> = (0..6).map(|_| TcpStream::connect(address).unwrap()).collect();
    assert_eq!(scrape(), (4_194_304.0, 1.0));
}
