//! What one store makes of one device: no replication, no network, one thread, the engine's own
//! reactor and the engine's own order of work. Prints one line of JSON for each call; which floor
//! stands beside it, and what is good enough, `python -m tercet_e2e bench --suite store` says.
//!
//! `cargo bench -p tercet-reactor --bench store -- COMMAND --device FILE|nguid:NGUID ...`:
//!
//! - `format --mib N`: a store, a volume of that size, written once over;
//! - `load --access read|write --blocks N --depth N [--random] (--seconds S | --operations N)`: a
//!   closed loop on that volume, then a checkpoint, all bytes counted;
//! - `raw --access read|write --depth N --seconds S --mib N`: random blocks of 4 KiB through the
//!   reactor alone; a store that was there is lost;
//! - `recovery --entries N`: a log of so many entries, opened as after a crash;
//! - `snapshot`: a volume of 1 TiB of which 100 GiB are mapped, on a sparse file; its data is not
//!   written, everything that the store writes of its own is;
//! - `chain --snapshots N`: a volume with so many snapshots beside one without any.

mod driver;
mod load;
mod raw;
mod scale;

use std::collections::HashMap;
use std::time::Duration;

use driver::{Driver, Setup};
use load::{Access, Load, Until};
use raw::Raw;
use tercet_reactor::Place;

/// What was told on the command line: `--name value`, and `--name` alone.
struct Args {
    command: String,
    values: HashMap<String, String>,
}

impl Args {
    fn read() -> Self {
        let mut words = std::env::args().skip(1).filter(|word| word != "--bench").peekable();
        let command = words.next().unwrap_or_default();
        let mut values = HashMap::new();
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").expect("an option begins with --").to_owned();
            let value = words.next_if(|next| !next.starts_with("--"));
            values.insert(name, value.unwrap_or_default());
        }
        Self { command, values }
    }

    fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    fn text(&self, name: &str) -> &str {
        self.values.get(name).unwrap_or_else(|| panic!("--{name} is missing"))
    }

    fn number(&self, name: &str) -> u64 {
        self.text(name).parse().unwrap_or_else(|_| panic!("--{name} is a number"))
    }

    fn device(&self) -> Place {
        let text = self.text("device");
        match text.strip_prefix("nguid:") {
            Some(nguid) => Place::Nguid(nguid.parse().expect("an NGUID")),
            None => Place::Path(text.into()),
        }
    }

    fn access(&self) -> Access {
        if self.text("access") == "read" { Access::Read } else { Access::Write }
    }

    fn seconds(&self) -> Duration {
        Duration::from_secs_f64(self.text("seconds").parse().expect("seconds"))
    }
}

/// One line of JSON: names and numbers.
fn print(figures: &[(&str, f64)]) {
    let fields: Vec<String> =
        figures.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
    println!("{{{}}}", fields.join(", "));
}

fn main() {
    let args = Args::read();
    match args.command.as_str() {
        "format" => format(&args),
        "load" => load(&args),
        "raw" => raw(&args),
        "recovery" => scale::recovery(args.device(), args.number("entries")),
        "snapshot" => scale::snapshot(args.device()),
        "chain" => scale::chain(args.device(), args.number("snapshots")),
        // `cargo test --benches` and `cargo bench` without arguments come here.
        "" => println!("store: nothing to do without a command"),
        other => panic!("{other:?} is no command"),
    }
}

fn format(args: &Args) {
    let mut driver = Driver::open(args.device(), Setup::format());
    let blocks = args.number("mib") << 20 >> 12;
    driver.make_volume(0, blocks);
    driver.fill(0, blocks);
    driver.settle();
    print(&[("checkpoints", driver.written.checkpoints as f64)]);
}

fn load(args: &Args) {
    let mut driver = Driver::open(args.device(), Setup::default());
    let opened_s = driver.opened.as_secs_f64();
    let load = Load {
        access: args.access(),
        volume: 0,
        blocks: args.number("blocks") as u32,
        depth: args.number("depth") as usize,
        random: args.has("random"),
        span: None,
        until: if args.has("operations") {
            Until::Operations(args.number("operations"))
        } else {
            Until::Elapsed(args.seconds())
        },
    };
    let figures = load.run(&mut driver);
    if load.access == Access::Write {
        driver.settle();
    }
    // What the checkpoint behind the loop writes belongs to the loop's operations.
    let written = &driver.written;
    let user = if load.access == Access::Write { figures.bytes as f64 } else { f64::NAN };
    let share = |bytes: u64| if user.is_nan() { 0.0 } else { bytes as f64 / user };
    print(&[
        ("operations", figures.operations as f64),
        ("seconds", figures.seconds),
        ("iops", figures.operations as f64 / figures.seconds),
        ("mib_per_s", figures.bytes as f64 / figures.seconds / f64::from(1 << 20)),
        ("p50_us", figures.at(50)),
        ("p99_us", figures.at(99)),
        ("max_us", figures.at(100)),
        ("cpu_us", figures.cpu_us),
        ("amplification", share(written.all())),
        ("log", share(written.log)),
        ("payload", share(written.payload)),
        ("leaves", share(written.leaves)),
        ("root", share(written.root + written.other)),
        ("records", written.records as f64),
        ("flushes", written.flushes as f64),
        ("checkpoints", written.checkpoints as f64),
        ("opened_s", opened_s),
    ]);
}

fn raw(args: &Args) {
    let loop_of = Raw {
        access: args.access(),
        depth: args.number("depth") as usize,
        time: args.seconds(),
        blocks: args.number("mib") << 20 >> 12,
    };
    let figures = loop_of.run(&driver::wanted(args.device()));
    print(&[
        ("operations", figures.operations as f64),
        ("iops", figures.operations as f64 / figures.seconds),
        ("p50_us", figures.p50_us),
    ]);
}
