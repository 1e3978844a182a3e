//! What came of the checks: a view of one run, and of several beside each other.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use turn_core::Transport;

use super::check::{Check, Level, Outcome};
use super::lab::Target;
use crate::output::{Block, Cell, Tone, View};

/// All that a run found out.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    /// How the server is called.
    pub(crate) server: String,
    /// Transports that were checked.
    pub(crate) transports: Vec<String>,
    pub(crate) summary: Summary,
    pub(crate) checks: Vec<Row>,
}

/// A check, and what came of it over each transport.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) section: String,
    pub(crate) level: Level,
    pub(crate) says: String,
    /// By transport.
    pub(crate) results: BTreeMap<String, Found>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Found {
    pub(crate) outcome: Outcome,
    /// What was seen instead, or why not.
    pub(crate) seen: String,
}

/// Checks by outcome: one that fails over any transport has failed.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Summary {
    pub(crate) passed: usize,
    pub(crate) failed_must: usize,
    pub(crate) failed_should: usize,
    pub(crate) not_offered: usize,
    pub(crate) not_applicable: usize,
}

/// The name of a transport.
pub(crate) fn name_of(transport: Transport) -> &'static str {
    match transport {
        Transport::Udp => "udp",
        Transport::Tcp => "tcp",
        Transport::Tls => "tls",
        Transport::Dtls => "dtls",
    }
}

impl Report {
    pub(super) fn new(target: &Target, checks: &[&'static Check], transports: &[Transport]) -> Self {
        let row = |check: &&'static Check| Row {
            id: check.id.into(),
            section: check.section.into(),
            level: check.level,
            says: check.says.into(),
            results: BTreeMap::new(),
        };
        Self {
            server: target.host.clone(),
            transports: transports.iter().map(|transport| name_of(*transport).to_owned()).collect(),
            summary: Summary::default(),
            checks: checks.iter().map(row).collect(),
        }
    }

    pub(super) fn note(&mut self, row: usize, transport: Transport, outcome: Outcome, seen: String) {
        self.checks[row].results.insert(name_of(transport).into(), Found { outcome, seen });
    }

    /// Counts, and leaves out what applies to none of the transports.
    pub(crate) fn close(&mut self) {
        self.checks.retain(|row| !row.results.is_empty());
        let mut summary = Summary::default();
        for row in &self.checks {
            match (row.outcome(), row.level) {
                (Outcome::Pass, _) => summary.passed += 1,
                (Outcome::Fail, Level::Must) => summary.failed_must += 1,
                (Outcome::Fail, Level::Should) => summary.failed_should += 1,
                (Outcome::NotOffered, _) => summary.not_offered += 1,
                (Outcome::NotApplicable, _) => summary.not_applicable += 1,
            }
        }
        self.summary = summary;
    }
}

impl Row {
    /// The worst of all transports.
    pub(crate) fn outcome(&self) -> Outcome {
        let found = |wanted| self.results.values().any(|found| found.outcome == wanted);
        [Outcome::Fail, Outcome::Pass, Outcome::NotOffered]
            .into_iter()
            .find(|wanted| found(*wanted))
            .unwrap_or(Outcome::NotApplicable)
    }

    fn cell(&self, transport: &str) -> Cell {
        self.results.get(transport).map_or_else(|| Cell::from(""), |found| cell(found.outcome, self.level))
    }

    /// What was seen where it did not pass, each thing once with the transports it was seen on.
    fn remarks(&self, wanted: Outcome) -> Vec<String> {
        let mut remarks: Vec<(&str, Vec<&str>)> = Vec::new();
        for (transport, found) in self.results.iter().filter(|(_, found)| found.outcome == wanted) {
            match remarks.iter_mut().find(|(seen, _)| *seen == found.seen) {
                Some((_, transports)) => transports.push(transport),
                None => remarks.push((&found.seen, vec![transport])),
            }
        }
        remarks.into_iter().map(|(seen, transports)| format!("{} ({})", seen, transports.join(", "))).collect()
    }
}

fn cell(outcome: Outcome, level: Level) -> Cell {
    let tone = match (outcome, level) {
        (Outcome::Pass, _) => Tone::Good,
        (Outcome::Fail, Level::Must) => Tone::Bad,
        (Outcome::Fail, Level::Should) => Tone::Attention,
        (Outcome::NotOffered | Outcome::NotApplicable, _) => Tone::Plain,
    };
    Cell::toned(outcome.name(), tone)
}

impl View for Report {
    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let mut head = vec!["CHECK", "LEVEL", "SECTION"];
        let columns = [("udp", "UDP"), ("tcp", "TCP"), ("tls", "TLS"), ("dtls", "DTLS")];
        let columns: Vec<_> =
            columns.into_iter().filter(|(name, _)| self.transports.iter().any(|t| t == name)).collect();
        head.extend(columns.iter().map(|(_, title)| *title));
        if wide {
            head.push("REQUIREMENT");
        }
        let row = |row: &Row| {
            let mut cells = vec![Cell::from(&row.id), Cell::from(row.level.name()), Cell::from(&row.section)];
            cells.extend(columns.iter().map(|(transport, _)| row.cell(transport)));
            if wide {
                cells.push(Cell::from(&row.says));
            }
            cells
        };
        let mut blocks = vec![Block::Table { head, rows: self.checks.iter().map(row).collect() }];
        let failed: Vec<Vec<Cell>> = self
            .checks
            .iter()
            .flat_map(|row| row.remarks(Outcome::Fail).into_iter().map(move |remark| (row, remark)))
            .map(|(row, remark)| vec![Cell::from(&row.id), Cell::from(&row.says), Cell::from(remark)])
            .collect();
        if !failed.is_empty() {
            blocks.push(Block::Table { head: vec!["FAILED", "REQUIREMENT", "SEEN"], rows: failed });
        }
        if wide {
            let rows: Vec<Vec<Cell>> = [Outcome::NotOffered, Outcome::NotApplicable]
                .into_iter()
                .flat_map(|outcome| self.checks.iter().map(move |row| (row, outcome)))
                .flat_map(|(row, outcome)| row.remarks(outcome).into_iter().map(move |remark| (row, remark)))
                .map(|(row, remark)| vec![Cell::from(&row.id), Cell::from(remark)])
                .collect();
            if !rows.is_empty() {
                blocks.push(Block::Table { head: vec!["NOT CHECKED", "WHY"], rows });
            }
        }
        let Summary { passed, failed_must, failed_should, not_offered, not_applicable } = self.summary;
        let tone = if failed_must > 0 { Tone::Bad } else { Tone::Good };
        blocks.push(Block::Lines(vec![Cell::toned(
            format!(
                "{}: {passed} passed, {failed_must} MUST and {failed_should} SHOULD failed, {not_offered} not offered, \
                 {not_applicable} not applicable, over {}",
                self.server,
                self.transports.join(", ")
            ),
            tone,
        )]));
        blocks
    }

    fn empty(&self) -> Option<&'static str> {
        self.checks.is_empty().then_some("no check has this name or section, or none is for these transports")
    }
}

/// Runs of several servers beside each other.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison(pub(crate) Vec<Report>);

impl Comparison {
    /// What a server did, over all transports: the table is about what differs.
    fn cell(&self, report: &Report, id: &str) -> Cell {
        match report.checks.iter().find(|row| row.id == id) {
            None => Cell::from(""),
            Some(row) => match row.outcome() {
                Outcome::Fail => {
                    let seen = row.remarks(Outcome::Fail).join("; ");
                    Cell::toned(format!("{}: {seen}", Outcome::Fail.name()), Tone::Bad)
                }
                outcome => cell(outcome, row.level),
            },
        }
    }
}

impl View for Comparison {
    /// First the counts, then every check that somebody failed.
    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let head = vec!["SERVER", "TRANSPORTS", "PASSED", "MUST FAILED", "SHOULD FAILED", "NOT OFFERED", "N/A"];
        let counts = |report: &Report| {
            let Summary { passed, failed_must, failed_should, not_offered, not_applicable } = report.summary;
            let mut cells = vec![Cell::from(&report.server), Cell::from(report.transports.join(", "))];
            let numbers = [passed, failed_must, failed_should, not_offered, not_applicable];
            cells.extend(numbers.iter().map(|number| Cell::from(number.to_string())));
            cells
        };
        let mut blocks = vec![Block::Table { head, rows: self.0.iter().map(counts).collect() }];
        let mut rows: Vec<&Row> = Vec::new();
        for row in self.0.iter().flat_map(|report| &report.checks) {
            if !rows.iter().any(|known| known.id == row.id) {
                rows.push(row);
            }
        }
        let failed = |row: &&Row| {
            let of = |report: &Report| report.checks.iter().any(|r| r.id == row.id && r.outcome() == Outcome::Fail);
            wide || self.0.iter().any(of)
        };
        let lines = rows.into_iter().filter(failed).map(|row| {
            let mut cells = vec![Cell::from(&row.section), Cell::from(row.level.name()), Cell::from(&row.says)];
            cells.extend(self.0.iter().map(|report| self.cell(report, &row.id)));
            cells
        });
        let mut head = vec!["SECTION".to_owned(), "LEVEL".to_owned(), "REQUIREMENT".to_owned()];
        head.extend(self.0.iter().map(|report| report.server.to_uppercase()));
        blocks.push(Block::Named { head, rows: lines.collect() });
        blocks
    }
}
