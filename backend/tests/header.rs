//! Compiles `virtio_gemini.h` and compares every constant, size and offset with the Rust side.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use vhost_device_gemini::backing::HostState;
use vhost_device_gemini::protocol::*;

type Fields = &'static [(&'static str, usize, usize)];

/// C name, Rust size, Rust fields; `kind` is called `type` in C.
const STRUCTS: [(&str, usize, Fields); 8] = [
    ("config", Config::SIZE, Config::FIELDS),
    ("batch", Batch::SIZE, Batch::FIELDS),
    ("record", Record::SIZE, Record::FIELDS),
    ("advice", Advice::SIZE, Advice::FIELDS),
    ("req", Request::SIZE, Request::FIELDS),
    ("range", Range::SIZE, Range::FIELDS),
    ("resp", Response::SIZE, Response::FIELDS),
    ("stats", Stats::SIZE, Stats::FIELDS),
];

fn constants() -> BTreeMap<&'static str, u64> {
    let mut map = BTreeMap::from([
        ("VIRTIO_ID_GEMINI", u64::from(VIRTIO_ID)),
        ("VIRTIO_GEMINI_VERSION", u64::from(VERSION)),
        ("VIRTIO_GEMINI_F_PREPARE", u64::from(F_PREPARE)),
        ("VIRTIO_GEMINI_F_RELEASE", u64::from(F_RELEASE)),
        ("VIRTIO_GEMINI_F_STATS", u64::from(F_STATS)),
        ("VIRTIO_GEMINI_F_REACQUIRE", u64::from(F_REACQUIRE)),
        ("VIRTIO_GEMINI_F_TRIM", u64::from(F_TRIM)),
        ("VIRTIO_GEMINI_VQ_HINT", VQ_HINT as u64),
        ("VIRTIO_GEMINI_VQ_REPORT", VQ_REPORT as u64),
        ("VIRTIO_GEMINI_VQ_CTRL", VQ_CTRL as u64),
        ("VIRTIO_GEMINI_VQ_RELEASE", VQ_RELEASE as u64),
        ("VIRTIO_GEMINI_VQ_COUNT", VQ_COUNT as u64),
        ("VIRTIO_GEMINI_MAX_RECORDS", u64::from(MAX_RECORDS)),
        ("VIRTIO_GEMINI_MAX_RANGES", u64::from(MAX_RANGES)),
        ("VIRTIO_GEMINI_PAGE_SHIFT", u64::from(PAGE_SHIFT)),
        ("VIRTIO_GEMINI_AWAY", u64::from(AWAY)),
        ("VIRTIO_GEMINI_BATCH_STATE", u64::from(BATCH_STATE)),
        ("VIRTIO_GEMINI_BATCH_ADVICE", u64::from(BATCH_ADVICE)),
        ("VIRTIO_GEMINI_SYNC_START", u64::from(SYNC_START)),
        ("VIRTIO_GEMINI_SYNC_END", u64::from(SYNC_END)),
        ("VIRTIO_GEMINI_ADVICE_SCARCE", u64::from(ADVICE_SCARCE)),
        ("VIRTIO_GEMINI_ADVICE_RETURN", u64::from(ADVICE_RETURN)),
        ("VIRTIO_GEMINI_ADVICE_MOVE", u64::from(ADVICE_MOVE)),
        ("VIRTIO_GEMINI_REQ_PREPARE", u64::from(REQ_PREPARE)),
        ("VIRTIO_GEMINI_REQ_QUERY", u64::from(REQ_QUERY)),
        ("VIRTIO_GEMINI_REQ_STATS", u64::from(REQ_STATS)),
        ("VIRTIO_GEMINI_REQ_RELEASE", u64::from(REQ_RELEASE)),
        ("VIRTIO_GEMINI_REQ_RENEW", u64::from(REQ_RENEW)),
        ("VIRTIO_GEMINI_REQ_TRIM", u64::from(REQ_TRIM)),
        ("VIRTIO_GEMINI_S_OK", u64::from(S_OK)),
        ("VIRTIO_GEMINI_S_FAILED", u64::from(S_FAILED)),
        ("VIRTIO_GEMINI_S_VOID", u64::from(S_VOID)),
        ("VIRTIO_GEMINI_S_INVALID", u64::from(S_INVALID)),
        ("VIRTIO_GEMINI_S_UNSUPPORTED", u64::from(S_UNSUPPORTED)),
        ("VIRTIO_GEMINI_S_BUSY", u64::from(S_BUSY)),
    ]);
    let guest = [
        "VIRTIO_GEMINI_GUEST_UNKNOWN",
        "VIRTIO_GEMINI_GUEST_FREE",
        "VIRTIO_GEMINI_GUEST_BASE",
        "VIRTIO_GEMINI_GUEST_HUGE",
        "VIRTIO_GEMINI_GUEST_BOOKED",
        "VIRTIO_GEMINI_GUEST_PINNED",
    ];
    let host = [
        "VIRTIO_GEMINI_HOST_ABSENT",
        "VIRTIO_GEMINI_HOST_BASE",
        "VIRTIO_GEMINI_HOST_HUGE",
        "VIRTIO_GEMINI_HOST_HUGETLB",
    ];
    map.extend(guest.into_iter().zip(GuestState::ALL.iter().map(|s| *s as u64)));
    map.extend(host.into_iter().zip(HostState::ALL.iter().map(|s| *s as u64)));
    map
}

#[test]
fn header_and_rust_agree_on_every_constant_size_and_offset() {
    let header =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-driver/module/uapi/virtio_gemini.h");
    let text = std::fs::read_to_string(&header).expect("the header");
    let mut expected = BTreeMap::new();
    let mut program = format!(
        "#include \"{}\"\n#include <stdio.h>\n#include <stddef.h>\nint main(void) {{\n",
        header.display()
    );

    // Every constant that the header defines must be known here, and the other way round.
    let defined: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("#define VIRTIO_"))
        .filter_map(|rest| rest.split_whitespace().next())
        .collect();
    assert_eq!(defined.len(), constants().len(), "constants of header: {defined:?}");
    for (name, value) in constants() {
        writeln!(program, "printf(\"{name} %llu\\n\", (unsigned long long)({name}));").unwrap();
        expected.insert(name.to_owned(), value);
    }

    assert_eq!(text.matches("\nstruct virtio_gemini_").count(), STRUCTS.len());
    for (name, size, fields) in STRUCTS {
        let c = format!("struct virtio_gemini_{name}");
        writeln!(program, "printf(\"{name} %zu\\n\", sizeof({c}));").unwrap();
        expected.insert(name.to_owned(), size as u64);
        for (field, offset, length) in fields {
            let field = if *field == "kind" { "type" } else { field };
            writeln!(
                program,
                "printf(\"{name}.{field} %zu\\n{name}.{field}# %zu\\n\", \
                 offsetof({c}, {field}), sizeof((({c} *)0)->{field}));"
            )
            .unwrap();
            expected.insert(format!("{name}.{field}"), *offset as u64);
            expected.insert(format!("{name}.{field}#"), *length as u64);
        }
    }
    program.push_str("return 0; }\n");

    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("check.c");
    let binary = dir.path().join("check");
    std::fs::write(&source, program).unwrap();
    let compiled = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&binary)
        .arg(&source)
        .output()
        .expect("cc, from the package gcc");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(&binary).output().unwrap();
    let actual: BTreeMap<String, u64> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect();
    assert_eq!(actual, expected);
}

#[test]
fn encoding_puts_each_field_at_its_offset_in_little_endian() {
    let record = Record { first: 0x0102, count: 3, used: 4, state: 5, flags: 6 };
    let mut expected = [0; Record::SIZE];
    expected[0] = 2;
    expected[1] = 1;
    expected[8] = 3;
    expected[12] = 4;
    expected[16] = 5;
    expected[17] = 6;
    assert_eq!(record.encode(), expected);
}
