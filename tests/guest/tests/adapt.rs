//! The driver's adaptive booking timeout against Algorithm 1, written down a
//! second time as the loop that it is in the paper.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use gemini_guest::workload::word;

const MIN: u32 = 1000;
const MAX: u32 = 600_000;

/// What one period brought.
#[derive(Clone, Copy, Debug)]
struct Period {
    misses: u64,
    fmfi: u32,
}

/// Compiles the driver's own file with a program around it.
fn build(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let module = here.join("../../guest-driver/module");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let status = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-o"])
        .arg(&program)
        .arg("-I")
        .arg(&module)
        .arg(here.join("tests/adapt.c"))
        .arg(module.join("adapt.c"))
        .status()
        .expect("cc runs");
    assert!(status.success(), "the driver's adapt.c does not compile in user space");
    program
}

/// The timeout of each period as the driver has it: of the first one, and of
/// the one after each of `periods`.
fn driver(program: &Path, start: u32, periods: &[Period]) -> Vec<u32> {
    let mut input = format!("init {start}\n");
    for period in periods {
        input += &format!("next {} {}\n", period.misses, period.fmfi);
    }
    ask(program, input)
}

/// What the program answers to each line.
fn ask(program: &Path, input: String) -> Vec<u32> {
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut stdin = child.stdin.take().expect("piped above");
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("the program ends");
    writer.join().expect("no panic").expect("the program reads all");
    assert!(output.status.success(), "the program fails");
    String::from_utf8(output.stdout)
        .expect("numbers")
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect()
}

/// Algorithm 1 as a loop over the periods.
fn paper(start: u32, periods: &[Period]) -> Vec<u32> {
    let mut desired = if start == 0 { 60_000 } else { start.clamp(MIN, MAX) };
    let mut timeouts = Vec::new();
    let mut left = periods.iter();
    let better = |new: &Period, old: &Period| new.misses < old.misses && new.fmfi <= old.fmfi;
    // Runs one period; none is left at the end.
    let mut run = |timeout: u32| {
        timeouts.push(timeout);
        left.next().copied()
    };
    let mut forever = || -> Option<()> {
        loop {
            let before = run(desired)?;
            let longer = (desired * 11 / 10).clamp(MIN, MAX);
            if better(&run(longer)?, &before) {
                desired = longer;
                continue;
            }
            let before = run(desired)?;
            let shorter = (desired * 9 / 10).clamp(MIN, MAX);
            if better(&run(shorter)?, &before) {
                desired = shorter;
            }
        }
    };
    assert!(forever().is_none());
    timeouts
}

#[test]
fn driver_follows_algorithm_1() {
    let program = build("adapt-random");
    for seed in 1..=20_u64 {
        let mut numbers = (0..).map(|index| word(seed, index));
        let mut below = |limit: u32| {
            let number = numbers.next().expect("there is always another one");
            u32::try_from(number % u64::from(limit)).expect("below a u32")
        };
        let start = match seed % 4 {
            0 => 0,
            1 => 1,
            2 => u32::MAX,
            _ => below(700_000),
        };
        // Few different values, so that ties are common.
        let periods: Vec<Period> =
            (0..2000).map(|_| Period { misses: below(4).into(), fmfi: below(3) * 500 }).collect();
        assert_eq!(driver(&program, start, &periods), paper(start, &periods), "seed {seed}");
    }
}

#[test]
fn timeout_grows_or_shrinks_while_that_helps_and_stays_within_its_bounds() {
    let program = build("adapt-bounds");
    // Every trial is better than what was before it.
    let falling: Vec<Period> =
        (0..200).map(|i| Period { misses: 1_000_000 - i, fmfi: 100 }).collect();
    let timeouts = driver(&program, 60_000, &falling);
    assert_eq!(timeouts[..5], [60_000, 66_000, 66_000, 72_600, 72_600]);
    assert_eq!(timeouts.last(), Some(&MAX));

    // A longer one never helps, a shorter one always does.
    let shrinking: Vec<Period> =
        (0..400).map(|i| Period { misses: [5, 6, 5, 4][i % 4], fmfi: 100 }).collect();
    let timeouts = driver(&program, 60_000, &shrinking);
    assert_eq!(timeouts[..6], [60_000, 66_000, 60_000, 54_000, 54_000, 59_400]);
    assert_eq!(timeouts.iter().min(), Some(&MIN));
}

#[test]
fn more_fragmentation_or_no_fewer_misses_end_a_trial() {
    let program = build("adapt-trial");
    for (misses, fmfi) in [(100, 101), (100, 100), (99, 101)] {
        let as_ever = Period { misses: 100, fmfi: 100 };
        let trial = Period { misses, fmfi };
        let timeouts = driver(&program, 10_000, &[as_ever, trial, as_ever, trial]);
        assert_eq!(timeouts, [10_000, 11_000, 10_000, 9_000, 10_000], "{misses} {fmfi}");
    }
}

#[test]
fn pressure_of_either_side_shrinks_a_hold_in_proportion() {
    let program = build("adapt-hold");
    let holds = [
        // Free pages, of 8000, then blocks wanted, of 10 held, and what is left.
        (8000, 0, 1000),
        (1000, 0, 1000),
        (500, 0, 500),
        (0, 0, 0),
        (8000, 1, 900),
        (8000, 9, 100),
        (8000, 10, 0),
        (8000, u64::MAX, 0),
        (500, 5, 250),
    ];
    let lines = holds.map(|(free, wanted, _)| format!("hold 1000 {free} 8000 {wanted} 10\n"));
    assert_eq!(ask(&program, lines.concat()), holds.map(|(_, _, left)| left));
    // Nothing is held, and the guest is tiny.
    let lines = "hold 1000 0 7 0 0\nhold 1000 0 7 1 0\n".to_owned();
    assert_eq!(ask(&program, lines), [1000, 0]);
}
