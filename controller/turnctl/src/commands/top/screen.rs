//! What the terminal shows, and what keys do.

use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Paragraph, Row, Table};

use super::board::{Board, HEAD, Relay, Sort, rate};
use crate::output::Tone;
use crate::units;

/// Lines that are not relays: summary, headings, keys.
const AROUND: u16 = 4;
/// Cells of the processor's bar.
const BAR: u32 = 6;
const KEYS: &str = "n p t a c r d order   i turn round   arrows scroll   q end";

/// What a key asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Command {
    Stay,
    Quit,
}

/// How the board is looked at.
#[derive(Debug)]
pub(super) struct Screen {
    controller: String,
    sort: Sort,
    turned: bool,
    /// The first relay shown.
    first: usize,
    coloured: bool,
    /// Why nothing new is heard.
    pub(super) problem: Option<String>,
}

impl Screen {
    pub(super) fn new(controller: String, sort: Sort, coloured: bool) -> Self {
        Self { controller, sort, turned: false, first: 0, coloured, problem: None }
    }

    /// A key was pressed on a terminal of `height` lines, with `relays` on the board.
    pub(super) fn press(&mut self, key: KeyEvent, height: u16, relays: usize) -> Command {
        let page = usize::from(height.saturating_sub(AROUND)).max(1);
        let last = relays.saturating_sub(page);
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Command::Quit,
            KeyCode::Char('q') | KeyCode::Esc => return Command::Quit,
            KeyCode::Char('n') => self.order(Sort::Node),
            KeyCode::Char('p') => self.order(Sort::Packets),
            KeyCode::Char('t') => self.order(Sort::Traffic),
            KeyCode::Char('a') => self.order(Sort::Allocations),
            KeyCode::Char('c') => self.order(Sort::Cpu),
            KeyCode::Char('r') => self.order(Sort::Rtt),
            KeyCode::Char('d') => self.order(Sort::Drops),
            KeyCode::Char('i') => self.turned = !self.turned,
            KeyCode::Up | KeyCode::Char('k') => self.first = self.first.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.first += 1,
            KeyCode::PageUp => self.first = self.first.saturating_sub(page),
            KeyCode::PageDown => self.first += page,
            KeyCode::Home => self.first = 0,
            KeyCode::End => self.first = last,
            _ => {}
        }
        self.first = self.first.min(last);
        Command::Stay
    }

    fn order(&mut self, sort: Sort) {
        (self.sort, self.turned, self.first) = (sort, false, 0);
    }

    /// Draws the board.
    pub(super) fn draw(&self, frame: &mut Frame<'_>, board: &Board) {
        let [top, middle, bottom] =
            Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
        frame.render_widget(Paragraph::new(self.summary(board)), top);
        frame.render_widget(self.table(board), middle);
        let keys = match &self.problem {
            Some(problem) => Line::styled(units::printable(problem), self.style(Tone::Bad)),
            None => Line::styled(KEYS, self.dim()),
        };
        frame.render_widget(Paragraph::new(keys), bottom);
    }

    fn summary(&self, board: &Board) -> Text<'static> {
        let relays = board.sorted(Sort::Node);
        let ready = relays.iter().filter(|relay| relay.state == "ready").count();
        let sum = |of: fn(&Relay) -> u64| relays.iter().map(|relay| of(relay)).fold(0, u64::saturating_add);
        let packets = sum(|relay| relay.packets_per_second.unwrap_or(0));
        let traffic = units::bit_rate(sum(|relay| relay.bytes_per_second));
        let allocations = sum(|relay| relay.allocations);
        let spans = vec![
            Span::styled(format!("{ready} of {} ready", relays.len()), Style::new().add_modifier(Modifier::BOLD)),
            Span::raw(format!("   {packets} packets/s   {traffic}   {allocations} allocations   ")),
            Span::styled(units::printable(&self.controller), self.dim()),
        ];
        Text::from(vec![Line::from(spans), Line::default()])
    }

    fn table(&self, board: &Board) -> Table<'static> {
        let mut relays = board.sorted(self.sort);
        if self.turned {
            relays.reverse();
        }
        let rows = relays.into_iter().skip(self.first).map(|relay| self.row(relay));
        let widths = [
            Constraint::Min(10),
            Constraint::Length(10),
            Constraint::Length(10),
            Constraint::Length(10),
            Constraint::Length(12),
            Constraint::Length(12),
            Constraint::Length(14),
            Constraint::Length(9),
            Constraint::Length(8),
            Constraint::Length(12),
        ];
        Table::new(rows, widths).header(self.head()).column_spacing(1)
    }

    fn head(&self) -> Row<'static> {
        let sorted = match self.sort {
            Sort::Node => 0,
            Sort::Packets => 3,
            Sort::Traffic => 4,
            Sort::Allocations => 5,
            Sort::Cpu => 6,
            Sort::Rtt => 7,
            Sort::Drops => 8,
        };
        let mark = if self.turned { '^' } else { 'v' };
        let cells = HEAD.iter().enumerate().map(|(column, name)| {
            let name = if column == sorted { format!("{name}{mark}") } else { (*name).to_owned() };
            let cell = Text::from(name);
            Cell::from(if is_number(column) { cell.alignment(Alignment::Right) } else { cell })
        });
        Row::new(cells).style(Style::new().add_modifier(Modifier::BOLD))
    }

    fn row(&self, relay: &Relay) -> Row<'static> {
        let full = (relay.cpu_permille.min(1000) * BAR).div_ceil(1000);
        let cpu_tone = match relay.cpu_permille {
            850.. => Tone::Bad,
            600.. => Tone::Attention,
            _ => Tone::Plain,
        };
        let bar = "#".repeat(full as usize) + &".".repeat((BAR - full) as usize);
        let drops = relay.dropped_per_second.is_some_and(|drops| drops > 0);
        let cells = [
            (units::printable(&relay.node_id), Tone::Plain),
            (units::printable(&relay.region), Tone::Plain),
            (relay.state.to_owned(), relay.tone()),
            (rate(relay.packets_per_second), Tone::Plain),
            (units::bit_rate(relay.bytes_per_second), Tone::Plain),
            (relay.allocations.to_string(), Tone::Plain),
            (format!("{:>6} {bar}", units::permille(relay.cpu_permille)), cpu_tone),
            (relay.rtt(), Tone::Plain),
            (rate(relay.dropped_per_second), if drops { Tone::Attention } else { Tone::Plain }),
            (relay.drain.clone(), if relay.drain == "overdue" { Tone::Bad } else { Tone::Attention }),
        ];
        let cells = cells.into_iter().enumerate().map(|(column, (text, tone))| {
            let text = Text::styled(text, self.style(tone));
            Cell::from(if is_number(column) { text.alignment(Alignment::Right) } else { text })
        });
        Row::new(cells)
    }

    fn style(&self, tone: Tone) -> Style {
        let style = Style::new();
        match tone {
            _ if !self.coloured => style,
            Tone::Good => style.fg(Color::Green),
            Tone::Attention => style.fg(Color::Yellow),
            Tone::Bad => style.fg(Color::Red),
            Tone::Plain | Tone::Heading => style,
        }
    }

    fn dim(&self) -> Style {
        if self.coloured { Style::new().fg(Color::DarkGray) } else { Style::new() }
    }
}

/// Whether a column is of figures, which stand under one another by their last digit.
fn is_number(column: usize) -> bool {
    (3..=8).contains(&column)
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use turnpike_proto::v1::{NodeDrain, NodeState};

    use super::super::board::tests::node;
    use super::*;

    fn board() -> Board {
        let mut board = Board::default();
        for at in [1000, 2000] {
            let mut draining = node("us-1", NodeState::Draining, at, 40 * at);
            draining.drain = Some(NodeDrain { since: 1, deadline: 122_000, by: "admin/me".to_owned() });
            board.update(vec![node("eu-1", NodeState::Ready, at, 20 * at), draining], at);
        }
        board
    }

    fn drawn(screen: &Screen, board: &Board, width: u16, height: u16) -> (Vec<String>, Terminal<TestBackend>) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
        terminal.draw(|frame| screen.draw(frame, board)).expect("drawn");
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        ((0..height).map(line).collect(), terminal)
    }

    fn key(code: KeyCode) -> KeyEvent {
        KeyEvent::new(code, KeyModifiers::NONE)
    }

    #[test]
    fn a_line_for_each_relay_under_a_line_for_all() {
        let screen = Screen::new("https://ctl-1:9443".to_owned(), Sort::Traffic, false);
        let (lines, _) = drawn(&screen, &board(), 120, 7);
        let expected = [
            "1 of 2 ready   60000 packets/s   960.0 kbit/s   8 allocations   https://ctl-1:9443",
            "",
            "NODE           REGION     STATE       PACKETS/S     TRAFFICv  ALLOCATIONS            CPU       RTT  DROPS/S DRAIN",
            "us-1           us         draining        40000 640.0 kbit/s            4   41.2% ###...   84.0 ms      400 2m left",
            "eu-1           eu         ready           20000 320.0 kbit/s            4   41.2% ###...   84.0 ms      200",
            "",
            KEYS,
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn keys_order_turn_scroll_and_end() {
        let board = board();
        let mut screen = Screen::new(String::new(), Sort::Traffic, false);
        let first = |screen: &Screen| drawn(screen, &board, 120, 7).0[3].chars().take(4).collect::<String>();
        assert_eq!(first(&screen), "us-1");
        for (code, expected) in [
            (KeyCode::Char('n'), "eu-1"),
            (KeyCode::Char('i'), "us-1"),
            (KeyCode::Char('p'), "us-1"),
            (KeyCode::Char('x'), "us-1"),
            (KeyCode::Char('c'), "eu-1"),
        ] {
            assert_eq!(screen.press(key(code), 7, 2), Command::Stay);
            assert_eq!(first(&screen), expected, "{code:?}");
        }
        // Of two relays one fits: there is one line to scroll, and no more.
        for (code, at) in
            [(KeyCode::Down, 1), (KeyCode::PageDown, 1), (KeyCode::Up, 0), (KeyCode::End, 1), (KeyCode::Home, 0)]
        {
            screen.press(key(code), AROUND + 1, 2);
            assert_eq!(screen.first, at, "{code:?}");
        }
        assert_eq!(screen.press(key(KeyCode::Char('q')), 7, 2), Command::Quit);
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(screen.press(control_c, 7, 2), Command::Quit);
    }

    #[test]
    fn trouble_is_said_and_colours_are_for_who_wants_them() {
        let mut screen = Screen::new(String::new(), Sort::Node, true);
        screen.problem = Some("cannot reach a controller\u{1b}[2J".to_owned());
        let (lines, terminal) = drawn(&screen, &board(), 120, 7);
        assert_eq!(lines[6], "cannot reach a controller\u{fffd}[2J");
        let coloured = |terminal: &Terminal<TestBackend>| {
            terminal.backend().buffer().content().iter().filter(|cell| cell.fg == Color::Yellow).count()
        };
        assert!(coloured(&terminal) > 0);
        screen.coloured = false;
        assert_eq!(coloured(&drawn(&screen, &board(), 120, 7).1), 0);
        // A narrow terminal is no reason to panic.
        drawn(&screen, &board(), 3, 2);
        drawn(&screen, &Board::default(), 80, 1);
    }
}
