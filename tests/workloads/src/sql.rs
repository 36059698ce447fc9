//! Databases with a load in the style of TPC-C, and not comparable with it:
//! tables and transactions have its shape, rows its size, and a warehouse a
//! tenth of its rows.

use std::fmt::Write;

use anyhow::{bail, Context};
use gemini_guest::workload::word;

use crate::lines::Lines;
use crate::load::Load;
use crate::rng::Rng;
use crate::Options;

/// Items that are sold: one table for all warehouses.
const ITEMS: u64 = 10_000;

/// Customers of a warehouse.
const CUSTOMERS: u64 = 3_000;

/// Districts of a warehouse.
const DISTRICTS: u64 = 10;

/// Bytes of a row of stock and of a customer that nothing is done with.
const STOCK_PADDING: usize = 270;
const CUSTOMER_PADDING: usize = 600;

/// Order lines that an order has at most: their keys are next to each other.
const LINES: u64 = 16;

/// What the databases differ in.
struct Dialect {
    /// What a warehouse takes in bytes.
    warehouse: u64,
    /// Before everything else.
    preamble: &'static str,
    /// `x` from 0 on, as a table: before and after the largest.
    series: (&'static str, &'static str),
    /// An expression that is the version.
    version: &'static str,
    /// What the version is of.
    name: &'static str,
}

const SQLITE: Dialect = Dialect {
    warehouse: 5_300_000,
    preamble: "",
    series: ("(SELECT value AS x FROM generate_series(0, ", "))"),
    version: "sqlite_version()",
    name: "sqlite",
};

const H2: Dialect = Dialect {
    warehouse: 8_000_000,
    preamble: "",
    series: ("(SELECT x FROM system_range(0, ", "))"),
    version: "h2version()",
    name: "h2",
};

/// A database's shell.
pub struct Sql {
    lines: Lines,
    version: String,
    warehouses: u64,
    orders: u64,
    statements: u64,
}

/// sqlite with all in its heap.
///
/// # Errors
/// If the shell fails.
pub fn sqlite_memory(options: Options) -> anyhow::Result<Sql> {
    Sql::start(
        Lines::start("/usr/bin/sqlite3", &["-batch", "-bail", ":memory:"])?,
        &SQLITE,
        options,
    )
}

/// sqlite on the guest's disk, with a cache of 2 MiB; every commit is on the
/// disk when it returns.
///
/// # Errors
/// If the shell fails.
pub fn sqlite_disk(options: Options) -> anyhow::Result<Sql> {
    const FILE: &str = "/scratch/sqlite";
    for suffix in ["", "-wal", "-shm"] {
        // Not there, unless this ran before.
        let _ = std::fs::remove_file(format!("{FILE}{suffix}"));
    }
    let dialect = Dialect {
        preamble: "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
                   PRAGMA cache_size = -2000;\n",
        ..SQLITE
    };
    Sql::start(Lines::start("/usr/bin/sqlite3", &["-batch", "-bail", FILE])?, &dialect, options)
}

/// H2 in a Java virtual machine.
///
/// # Errors
/// If the shell fails.
pub fn h2(options: Options) -> anyhow::Result<Sql> {
    // All of the heap becomes resident, and half of it is enough for the data:
    // so collections stay rare.
    let heap = format!("{}m", options.mib + 32);
    let options = Options { mib: options.mib / 2, ..options };
    let arguments = [
        &format!("-Xms{heap}"),
        &format!("-Xmx{heap}"),
        "-XX:+UseSerialGC",
        // The second compiler takes longer than it gains where it is emulated.
        "-XX:TieredStopAtLevel=1",
        "-cp",
        "/usr/share/java/h2.jar",
        "org.h2.tools.Shell",
        "-url",
        "jdbc:h2:mem:workload",
        "-user",
        "sa",
    ];
    let java = "/usr/lib/jvm/java-17-openjdk-amd64/bin/java";
    Sql::start(Lines::start(java, &arguments)?, &H2, options)
}

impl Sql {
    fn start(lines: Lines, dialect: &Dialect, options: Options) -> anyhow::Result<Self> {
        let warehouses = ((options.mib << 20) / dialect.warehouse).max(1);
        let mut sql = Sql { lines, version: String::new(), warehouses, orders: 0, statements: 0 };
        let mut version = String::new();
        sql.run(&format!("SELECT {};\n", dialect.version), |line| line.clone_into(&mut version))?;
        sql.version = format!("{} {version}", dialect.name);
        sql.run(&schema(dialect, warehouses, options.seed), |_| ())?;
        Ok(sql)
    }

    /// Has the shell do statements, and hands on every line that it answers
    /// with.
    fn run(&mut self, text: &str, mut answer: impl FnMut(&str)) -> anyhow::Result<()> {
        self.statements += 1;
        // The answer to this is the last one.
        let end = format!("end of {}", self.statements);
        self.lines.send(&format!("{text}SELECT '{end}';\n"))?;
        loop {
            let line = self.lines.hear()?;
            let mut line = line.trim();
            while let Some(rest) = line.strip_prefix("sql>") {
                line = rest.trim_start();
            }
            if line == end {
                return Ok(());
            }
            if line.starts_with("Error") {
                bail!("{line}");
            }
            // Times are told in brackets, and the last column has a name, too.
            if !line.starts_with('(') && line.trim_matches('\'') != end {
                answer(line);
            }
        }
    }

    /// A customer buys some items.
    fn new_order(&mut self, rng: &mut Rng) -> String {
        let warehouse = rng.below(self.warehouses);
        let district = warehouse * DISTRICTS + rng.below(DISTRICTS);
        let customer = self.customer(rng);
        let order = self.orders;
        self.orders += 1;
        let mut text = format!(
            "BEGIN;\n\
             UPDATE district SET orders = orders + 1 WHERE id = {district};\n\
             SELECT discount, balance FROM customer WHERE id = {customer};\n\
             INSERT INTO orders VALUES ({order}, {customer}, {district});\n"
        );
        for line in 0..5 + rng.below(LINES - 5) {
            let (item, count) = (rng.below(ITEMS), 1 + rng.below(10));
            let stock = warehouse * ITEMS + item;
            let key = order * LINES + line;
            // A text takes everything.
            let _ = write!(
                text,
                "SELECT price FROM item WHERE id = {item};\n\
                 UPDATE stock SET quantity = CASE WHEN quantity >= {count} + 10 \
                 THEN quantity - {count} ELSE quantity - {count} + 91 END, \
                 sold = sold + {count} WHERE id = {stock};\n\
                 INSERT INTO order_line VALUES ({key}, {item}, {count});\n"
            );
        }
        text.push_str("COMMIT;\n");
        text
    }

    /// A customer pays.
    fn payment(&self, rng: &mut Rng) -> String {
        let customer = self.customer(rng);
        let warehouse = customer / CUSTOMERS;
        let district = warehouse * DISTRICTS + rng.below(DISTRICTS);
        let amount = 1 + rng.below(5000);
        format!(
            "BEGIN;\n\
             UPDATE warehouse SET paid = paid + {amount} WHERE id = {warehouse};\n\
             UPDATE district SET paid = paid + {amount} WHERE id = {district};\n\
             UPDATE customer SET balance = balance - {amount} WHERE id = {customer};\n\
             SELECT balance FROM customer WHERE id = {customer};\n\
             COMMIT;\n"
        )
    }

    /// What is in an order?
    fn order_status(&self, rng: &mut Rng) -> String {
        let order = rng.below(self.orders.max(1));
        let (first, last) = (order * LINES, order * LINES + LINES - 1);
        format!(
            "SELECT c.balance FROM orders o JOIN customer c ON c.id = o.customer \
             WHERE o.id = {order};\n\
             SELECT item, quantity FROM order_line WHERE id BETWEEN {first} AND {last} \
             ORDER BY id;\n"
        )
    }

    fn customer(&self, rng: &mut Rng) -> u64 {
        rng.below(self.warehouses * CUSTOMERS)
    }
}

/// The statements that make all tables and their first rows.
fn schema(dialect: &Dialect, warehouses: u64, seed: u64) -> String {
    let series = |count: u64| format!("{}{}{}", dialect.series.0, count - 1, dialect.series.1);
    let (stock_padding, customer_padding) =
        ("s".repeat(STOCK_PADDING), "c".repeat(CUSTOMER_PADDING));
    // Numbers that differ by seed.
    let (factor, offset) = (word(seed, 1) % 1000 * 2 + 1, word(seed, 2) % 1000);
    let mut text = dialect.preamble.to_owned();
    for (table, columns, count, row) in [
        ("warehouse", "paid INTEGER", warehouses, "x, 0".to_owned()),
        ("district", "orders INTEGER, paid INTEGER", warehouses * DISTRICTS, "x, 0, 0".to_owned()),
        (
            "customer",
            "discount INTEGER, balance INTEGER, padding VARCHAR(700)",
            warehouses * CUSTOMERS,
            format!("x, (x * {factor} + {offset}) % 50, -10, x || '{customer_padding}'"),
        ),
        (
            "item",
            "price INTEGER, name VARCHAR(30)",
            ITEMS,
            format!("x, (x * {factor} + {offset}) % 9900 + 100, 'item ' || x"),
        ),
        (
            "stock",
            "quantity INTEGER, sold INTEGER, padding VARCHAR(300)",
            warehouses * ITEMS,
            format!("x, (x * {factor} + {offset}) % 91 + 10, 0, x || '{stock_padding}'"),
        ),
    ] {
        // A text takes everything.
        let _ = write!(
            text,
            "CREATE TABLE {table} (id INTEGER PRIMARY KEY, {columns});\n\
             INSERT INTO {table} SELECT {row} FROM {} AS numbers;\n",
            series(count)
        );
    }
    text.push_str(
        "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER, district INTEGER);\n\
         CREATE TABLE order_line (id INTEGER PRIMARY KEY, item INTEGER, quantity INTEGER);\n",
    );
    text
}

impl Load for Sql {
    fn unit(&self) -> &'static str {
        "transactions"
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn server(&self) -> Option<u32> {
        Some(self.lines.pid())
    }

    fn operate(&mut self, rng: &mut Rng) -> anyhow::Result<u64> {
        let text = match rng.below(100) {
            0..45 => self.new_order(rng),
            45..88 => self.payment(rng),
            _ => self.order_status(rng),
        };
        let mut digest = 0;
        self.run(&text, |line| {
            digest = line.bytes().fold(digest, |digest, byte| word(digest, byte.into()));
        })
        .context("a transaction")?;
        Ok(digest)
    }
}
