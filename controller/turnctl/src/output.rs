//! What a command shows: the only place that writes to standard output.
//!
//! A [`View`] is data first: JSON and YAML are its serialised form, whose keys are an interface. The table is the
//! same data for people and may change.

use std::io::{self, IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{Color, Table, presets};
use serde::Serialize;

use crate::failure::{Exit, Failure, Result};
use crate::units;

/// Form of the output. The variants carry no help of their own: it would make every `--help` twice as long.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    Wide,
    Json,
    Yaml,
    Markdown,
}

impl Format {
    pub(crate) fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::Wide | Self::Markdown)
    }
}

/// What a cell is about, said by colour where there is colour.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Attention,
    Bad,
    Heading,
}

/// A piece of text for people.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn toned(text: impl AsRef<str>, tone: Tone) -> Self {
        Self { text: units::printable(text.as_ref()), tone }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        let text = text.as_ref();
        Self::toned(if text.is_empty() { "-" } else { text }, Tone::Plain)
    }
}

/// A part of a table output.
pub(crate) enum Block {
    /// Columns under headings, or without when there are none.
    Table { head: Vec<&'static str>, rows: Vec<Vec<Cell>> },
    /// The same under headings that the data give.
    Named { head: Vec<String>, rows: Vec<Vec<Cell>> },
    /// A name and a value a line.
    Fields(Vec<(&'static str, Cell)>),
    /// Lines as they are.
    Lines(Vec<Cell>),
}

/// Something a command shows.
pub(crate) trait View: Serialize {
    /// The table form; `now_ms` is what ages are counted from.
    fn blocks(&self, wide: bool, now_ms: u64) -> Vec<Block>;
    /// Said to people instead of a table of nothing.
    fn empty(&self) -> Option<&'static str> {
        None
    }
}

/// Where and how to show things.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) format: Format,
    color: bool,
    terminal: bool,
}

impl Output {
    pub(crate) fn new(format: Format, no_color: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        // https://no-color.org: set and not empty.
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { format, color: terminal && !no_color && !unwanted, terminal }
    }

    /// Whether people see it as it comes.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Whether there is colour.
    pub(crate) fn is_coloured(&self) -> bool {
        self.color
    }

    /// Shows a view once.
    pub(crate) fn show(&self, view: &impl View) -> Result {
        if self.format.is_table()
            && let Some(nothing) = view.empty()
        {
            self.note(nothing);
            return Ok(());
        }
        self.write(&render(view, self.format, self.color, units::now_ms())?)
    }

    /// Shows a view as one of many: a table replaces the one before on a terminal, JSON takes one line, YAML one
    /// document.
    pub(crate) fn show_again(&self, view: &impl View) -> Result {
        let text = match self.format {
            Format::Json => one_line(view)?,
            Format::Yaml => format!("---\n{}", render(view, self.format, false, 0)?),
            Format::Table | Format::Wide | Format::Markdown => {
                let text = match view.empty() {
                    Some(nothing) => format!("{nothing}\n"),
                    None => render(view, self.format, self.color, units::now_ms())?,
                };
                if self.terminal { format!("\x1b[H\x1b[2J{text}") } else { text + "\n" }
            }
        };
        self.write(&text)
    }

    /// Shows one of a stream of things: a line for people, a line of JSON or a document of YAML for programs.
    pub(crate) fn show_line(&self, view: &impl View) -> Result {
        match self.format {
            Format::Json => self.write(&one_line(view)?),
            Format::Yaml => self.write(&format!("---\n{}", render(view, self.format, false, 0)?)),
            Format::Table | Format::Wide | Format::Markdown => {
                self.write(&render(view, self.format, self.color, units::now_ms())?)
            }
        }
    }

    /// Writes bytes that are nobody's view: completions.
    pub(crate) fn raw(&self, text: &[u8]) -> Result {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                Err(Failure::new(Exit::Closed, "nobody reads standard output"))
            }
            Err(error) => Err(Failure::failed(format!("cannot write to standard output: {error}"))),
            Ok(()) => Ok(()),
        }
    }

    fn write(&self, text: &str) -> Result {
        self.raw(text.as_bytes())
    }

    /// Tells people something that is not data.
    pub(crate) fn note(&self, message: &str) {
        say(message);
    }
}

/// One line on standard error; nothing is left to do when that is closed.
pub(crate) fn say(message: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", units::printable(message));
}

fn one_line(view: &impl Serialize) -> Result<String> {
    let mut text = serde_json::to_string(view).map_err(unwritable)?;
    text.push('\n');
    Ok(text)
}

fn unwritable(error: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("cannot encode the output: {error}"))
}

/// A view as text, ending in a newline.
pub(crate) fn render(view: &impl View, format: Format, color: bool, now_ms: u64) -> Result<String> {
    match format {
        Format::Json => Ok(serde_json::to_string_pretty(view).map_err(unwritable)? + "\n"),
        Format::Yaml => serde_yaml_ng::to_string(view).map_err(unwritable),
        Format::Table | Format::Wide => {
            let blocks = view.blocks(format == Format::Wide, now_ms);
            let blocks: Vec<_> = blocks.into_iter().map(|block| block_text(block, color)).collect();
            Ok(blocks.join("\n"))
        }
        Format::Markdown => {
            let blocks: Vec<_> = view.blocks(false, now_ms).into_iter().map(markdown).collect();
            Ok(blocks.join("\n"))
        }
    }
}

/// A block as Markdown, for documents.
fn markdown(block: Block) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let row = |cells: Vec<Cell>| line(cells.into_iter().map(|cell| cell.text.replace('|', "\\|")).collect());
    let rows = |head: Vec<String>, rows: Vec<Vec<Cell>>| {
        let rule = line(vec!["---".into(); head.len()]);
        [line(head), rule].into_iter().chain(rows.into_iter().map(row)).collect()
    };
    match block {
        Block::Table { head, rows: cells } => rows(head.into_iter().map(str::to_lowercase).collect(), cells),
        Block::Named { head, rows: cells } => rows(head.into_iter().map(|name| name.to_lowercase()).collect(), cells),
        Block::Fields(fields) => {
            fields.into_iter().map(|(name, value)| format!("- {name}: {}\n", value.text)).collect()
        }
        Block::Lines(lines) => lines.into_iter().map(|line| format!("{}\n", line.text)).collect(),
    }
}

fn block_text(block: Block, color: bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if color {
        table.enforce_styling();
        // Padding stays plain, so that it is trimmed at the end of a line.
        table.style_text_only();
    } else {
        table.force_no_tty();
    }
    match block {
        Block::Table { head, rows } => {
            if !head.is_empty() {
                table.set_header(head.into_iter().map(|name| cell(Cell::toned(name, Tone::Heading))));
            }
            table.add_rows(rows.into_iter().map(|row| row.into_iter().map(cell).collect::<Vec<_>>()));
        }
        Block::Named { head, rows } => {
            table.set_header(head.into_iter().map(|name| cell(Cell::toned(name, Tone::Heading))));
            table.add_rows(rows.into_iter().map(|row| row.into_iter().map(cell).collect::<Vec<_>>()));
        }
        Block::Fields(fields) => {
            let row = |(name, value)| [cell(Cell::toned(name, Tone::Heading)), cell(value)];
            table.add_rows(fields.into_iter().map(row));
        }
        Block::Lines(lines) => {
            table.add_rows(lines.into_iter().map(|line| [cell(line)]));
        }
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

fn cell(cell: Cell) -> comfy_table::Cell {
    let (text, tone) = (cell.text, cell.tone);
    let cell = comfy_table::Cell::new_owned(text);
    match tone {
        Tone::Plain => cell,
        Tone::Good => cell.fg(Color::Green),
        Tone::Attention => cell.fg(Color::Yellow),
        Tone::Bad => cell.fg(Color::Red),
        Tone::Heading => cell.add_attribute(comfy_table::Attribute::Bold),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Sample {
        name: String,
        bytes: Option<u64>,
    }

    impl View for Sample {
        fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
            let mut head = vec!["NAME", "STATE"];
            let mut row = vec![Cell::from(&self.name), Cell::toned("ready", Tone::Good)];
            if wide {
                head.push("BYTES");
                row.push(Cell::from(""));
            }
            vec![Block::Table { head, rows: vec![row] }, Block::Fields(vec![("Name", Cell::from(&self.name))])]
        }
    }

    fn rendered(format: Format, color: bool) -> String {
        let sample = Sample { name: "eu-1\u{1b}[2J".into(), bytes: None };
        render(&sample, format, color, 0).expect("renders")
    }

    #[test]
    fn tables_are_columns_of_text_and_obey_no_escape_in_the_data() {
        assert_eq!(
            rendered(Format::Table, false),
            "NAME       STATE\neu-1\u{fffd}[2J   ready\n\nName   eu-1\u{fffd}[2J\n"
        );
        assert_eq!(
            rendered(Format::Wide, false),
            "NAME       STATE   BYTES\neu-1\u{fffd}[2J   ready   -\n\nName   eu-1\u{fffd}[2J\n"
        );
    }

    #[test]
    fn colour_is_only_where_it_is_wanted() {
        let coloured = rendered(Format::Table, true);
        assert!(coloured.contains("\u{1b}["), "{coloured:?}");
        assert!(coloured.lines().all(|line| !line.ends_with(' ')), "{coloured:?}");
        let first = coloured.lines().next().unwrap_or_default();
        assert!(!first.contains(" \u{1b}[0m"), "{first:?}");
        assert!(!rendered(Format::Table, false).contains('\u{1b}'));
    }

    #[test]
    fn programs_get_every_key() {
        assert_eq!(rendered(Format::Json, true), "{\n  \"name\": \"eu-1\\u001b[2J\",\n  \"bytes\": null\n}\n");
        assert_eq!(rendered(Format::Yaml, true), "name: \"eu-1\\e[2J\"\nbytes: null\n");
    }
}
