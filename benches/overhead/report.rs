//! The figures as a table, printed as they come, and as JSON.

use std::path::Path;
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::measure::{Laps, Times, median};

/// What a figure must reach.
#[derive(Clone, Copy)]
pub(crate) enum Bar {
    None,
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    fn met(self, value: f64) -> Option<bool> {
        match self {
            Self::None => None,
            Self::AtMost(bar) => Some(value <= bar),
            Self::AtLeast(bar) => Some(value >= bar),
        }
    }

    fn text(self) -> String {
        match self {
            Self::None => String::new(),
            Self::AtMost(bar) => format!("<= {bar}"),
            Self::AtLeast(bar) => format!(">= {bar}"),
        }
    }
}

pub(crate) struct Report {
    began: Instant,
    section: String,
    figures: Vec<Value>,
    remarks: Vec<String>,
    /// What was asked for, what came of it, and whether that will do.
    bars: Vec<(String, bool)>,
}

impl Report {
    pub(crate) fn new() -> Self {
        println!("Portolan {}: what it costs. Times in ms; ranges are those of the turns.", env!("CARGO_PKG_VERSION"));
        Self { began: Instant::now(), section: String::new(), figures: vec![], remarks: vec![], bars: vec![] }
    }

    pub(crate) fn section(&mut self, name: &str) {
        println!("\n{name}");
        self.section = name.to_owned();
    }

    /// Said at once, and again at the end.
    pub(crate) fn remark(&mut self, text: &str) {
        println!("\n{text}");
        self.remarks.push(text.to_owned());
    }

    pub(crate) fn value(&mut self, name: &str, value: f64, unit: &str, bar: Bar) {
        self.line(name, value, unit, bar, &[], "");
    }

    /// The median, and how far the laps lie apart.
    pub(crate) fn laps(&mut self, name: &str, laps: &Laps, unit: &str, bar: Bar) {
        let least = laps.0.iter().copied().fold(f64::INFINITY, f64::min);
        let most = laps.0.iter().copied().fold(0.0, f64::max);
        let range = format!("{} .. {}", number(least), number(most));
        self.line(name, median(laps.0.iter().copied()), unit, bar, &[("least", least), ("most", most)], &range);
    }

    /// The medians over the turns of p50 and p99.
    pub(crate) fn times<'a>(&mut self, name: &str, turns: impl IntoIterator<Item = &'a Times> + Clone) {
        let p99 = median(turns.clone().into_iter().map(Times::p99));
        let text = format!("p99 {}", number(p99));
        self.line(name, median(turns.into_iter().map(Times::p50)), "ms", Bar::None, &[("p99", p99)], &text);
    }

    fn line(&mut self, name: &str, value: f64, unit: &str, bar: Bar, more: &[(&str, f64)], text: &str) {
        let met = bar.met(value);
        let verdict = match met {
            None => "",
            Some(true) => "met",
            Some(false) => "MISSED",
        };
        let line = format!("  {name:44} {:>9} {unit:8} {text:20} {:>8} {verdict}", number(value), bar.text());
        println!("{}", line.trim_end());
        if let Some(met) = met {
            let place = format!("{}: {name}", self.section);
            let value = format!("{} {unit}", number(value));
            self.bars.push((format!("{place:84} {:>10} {:>8} {verdict}", value.trim_end(), bar.text()), met));
        }
        let mut figure = Map::new();
        figure.insert("section".into(), json!(self.section));
        figure.insert("name".into(), json!(name));
        figure.insert("value".into(), json!(value));
        figure.insert("unit".into(), json!(unit));
        figure.extend(more.iter().map(|(name, value)| ((*name).to_owned(), json!(value))));
        if let Some(met) = met {
            figure.insert("bar".into(), json!(bar.text()));
            figure.insert("met".into(), json!(met));
        }
        self.figures.push(figure.into());
    }

    fn missed(&self) -> usize {
        self.bars.iter().filter(|(_, met)| !met).count()
    }

    /// All that has a bar once more, together.
    pub(crate) fn finish(&self) {
        let (met, seconds) = (self.bars.len() - self.missed(), self.began.elapsed().as_secs());
        println!("\nBars: {met} met, {} missed; measured in {seconds} s", self.missed());
        for line in self.bars.iter().map(|(line, _)| line).chain(&self.remarks) {
            println!("  {line}");
        }
    }

    pub(crate) fn write_json(&self, file: &Path) {
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            "seconds": self.began.elapsed().as_secs(),
            "met": self.bars.len() - self.missed(),
            "missed": self.missed(),
            "remarks": self.remarks,
            "figures": self.figures,
        });
        std::fs::write(file, format!("{report:#}\n")).expect("the file given with --json can be written");
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
