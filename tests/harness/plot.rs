//! Charts as SVG: lines of measured points over sizes with the bounds that were promised, and bars of things compared.

use std::fmt::Write;

/// What is drawn.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below the horizontal axis.
    pub across: String,
    /// Beside the vertical axis.
    pub up: String,
    /// Measured, each in a colour of its own.
    pub lines: Vec<Line>,
    /// Promised: (name, x, y), as crosses that a line must stay below.
    pub bounds: Vec<(String, f64, f64)>,
}

/// Points of one kind, from left to right.
#[derive(Clone, Debug)]
pub struct Line {
    /// In the legend.
    pub name: String,
    /// (x, y), neither below zero.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 440.0;
/// Left, top, right and bottom of the drawing.
const FRAME: [f64; 4] = [70.0, 40.0, 700.0, 380.0];
/// Told apart in every kind of colour blindness (Okabe and Ito).
const COLOURS: [&str; 9] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#882255", "#000000"];
/// Names in a row of the legend.
const ROW: usize = 5;
/// A bar that is narrower has no room for its value above it.
const LABELLED: f64 = 24.0;

impl Chart {
    /// The picture.
    #[must_use]
    pub fn svg(&self) -> String {
        let measured = self.lines.iter().flat_map(|line| line.points.iter().copied());
        let all: Vec<(f64, f64)> = measured.chain(self.bounds.iter().map(|(_, x, y)| (*x, *y))).collect();
        let most = |of: fn(&(f64, f64)) -> f64| round_up(all.iter().map(of).fold(0.0, f64::max));
        let (most_x, most_y) = (most(|point| point.0), most(|point| point.1));
        let [left, top, right, bottom] = FRAME;
        let x = |value: f64| left + (right - left) * value / most_x;
        let y = |value: f64| bottom - (bottom - top) * value / most_y;
        let mut svg = Drawing::begin();
        svg.text((left + right) / 2.0, 22.0, "middle", "black", &self.title);
        svg.text((left + right) / 2.0, HEIGHT - 12.0, "middle", "black", &self.across);
        svg.text(left, top - 10.0, "middle", "black", &self.up);
        for step in 0..=5 {
            let part = f64::from(step) / 5.0;
            svg.text(x(most_x * part), bottom + 18.0, "middle", "black", &short(most_x * part));
            svg.text(left - 8.0, y(most_y * part) + 4.0, "end", "black", &short(most_y * part));
            svg.rule(y(most_y * part), step == 0);
        }
        for (index, line) in self.lines.iter().enumerate() {
            let height = top + 16.0 * (index as f64 + 1.0);
            let colour = COLOURS[index % COLOURS.len()];
            svg.text(left + 14.0, height, "start", colour, &line.name);
            let points: Vec<_> = line.points.iter().map(|(a, b)| (x(*a), y(*b))).collect();
            svg.line(&points, colour);
        }
        for (name, at, most) in &self.bounds {
            svg.text(x(*at) + 8.0, y(*most) - 6.0, "start", "#555", name);
            svg.cross(x(*at), y(*most));
        }
        svg.end()
    }
}

/// What both are drawn with.
struct Drawing(String);

impl Drawing {
    fn begin() -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ))
    }

    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{element}");
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, fill: &str, text: &str) {
        let escaped = text.replace('&', "&amp;").replace('<', "&lt;");
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{escaped}</text>"
        ));
    }

    /// A horizontal one, from side to side of the frame.
    fn rule(&mut self, y: f64, is_axis: bool) {
        let ([left, _, right, _], colour) = (FRAME, if is_axis { "black" } else { "#ddd" });
        self.put(format_args!("<path d=\"M{left} {y:.1}H{right}\" stroke=\"{colour}\"/>"));
    }

    fn line(&mut self, points: &[(f64, f64)], colour: &str) {
        let text: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.put(format_args!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", text.join(" ")));
        for (x, y) in points {
            self.put(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
        }
    }

    fn cross(&mut self, x: f64, y: f64) {
        let (x, y) = (x - 5.0, y - 5.0);
        self.put(format_args!("<path d=\"M{x:.1} {y:.1}l10 10m0 -10l-10 10\" stroke=\"#555\"/>"));
    }

    fn bar(&mut self, [x, y, width, height]: [f64; 4], colour: &str) {
        self.put(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        ));
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// Groups of bars.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    /// Above it.
    pub title: String,
    /// Beside the vertical axis.
    pub up: String,
    /// In the legend: what the bars of a group are, in their order.
    pub names: Vec<String>,
    /// What is below each group, and its bars; nothing for one that was not measured.
    pub groups: Vec<(String, Vec<Option<f64>>)>,
}

impl Bars {
    /// The picture.
    #[must_use]
    pub fn svg(&self) -> String {
        let all = self.groups.iter().flat_map(|(_, values)| values.iter().flatten());
        let most = round_up(all.fold(0.0, |most, value| value.max(most)));
        let [left, top, right, bottom] = FRAME;
        let y = |value: f64| bottom - (bottom - top) * value / most;
        let mut svg = Drawing::begin();
        svg.text((left + right) / 2.0, 16.0, "middle", "black", &self.title);
        svg.text(left, top - 10.0, "middle", "black", &self.up);
        for step in 0..=5 {
            let value = most * f64::from(step) / 5.0;
            svg.text(left - 8.0, y(value) + 4.0, "end", "black", &short(value));
            svg.rule(y(value), step == 0);
        }
        for (index, name) in self.names.iter().enumerate() {
            let across = left + 14.0 + (right - left) * (index % ROW) as f64 / self.names.len().min(ROW) as f64;
            let down = bottom + 36.0 + 16.0 * (index / ROW) as f64;
            svg.text(across, down, "start", COLOURS[index % COLOURS.len()], name);
        }
        let group = (right - left) / self.groups.len().max(1) as f64;
        let wide = group * 0.8 / self.names.len().max(1) as f64;
        for (index, (name, values)) in self.groups.iter().enumerate() {
            let from = left + group * (index as f64 + 0.1);
            svg.text(from + group * 0.4, bottom + 18.0, "middle", "black", name);
            for (bar, value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                let (x, y) = (from + wide * bar as f64, y(*value));
                svg.bar([x, y, wide * 0.9, bottom - y], COLOURS[bar % COLOURS.len()]);
                if wide >= LABELLED {
                    svg.text(x + wide * 0.45, y - 4.0, "middle", "#555", &format!("{value:.1}"));
                }
            }
        }
        svg.end()
    }
}

/// The next of 1, 2, 5, 10, … that is not below.
fn round_up(value: f64) -> f64 {
    let mut unit = 1e-9;
    loop {
        if let Some(step) = [1.0, 2.0, 5.0].into_iter().map(|step| step * unit).find(|step| *step >= value) {
            return step;
        }
        unit *= 10.0;
    }
}

fn short(value: f64) -> String {
    if value >= 1000.0 { format!("{}k", value / 1000.0) } else { format!("{}", (value * 1000.0).round() / 1000.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_drawn_to_scale() {
        let points = vec![(0.0, 0.0), (10_000.0, 0.8)];
        let line = Line { name: "a < b".into(), points };
        let bounds = vec![("1 s".into(), 10_000.0, 1.0)];
        let svg = Chart { title: "t".into(), lines: vec![line], bounds, ..Chart::default() }.svg();
        assert!(svg.contains("points=\"70.0,380.0 700.0,108.0\""), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains(">10k</text>") && svg.contains(">0.2</text>"), "{svg}");
        let groups = vec![("up".into(), vec![Some(1.0), None]), ("down".into(), vec![Some(2.0), Some(0.5)])];
        let svg = Bars { names: vec!["a".into(), "b".into()], groups, ..Bars::default() }.svg();
        // Bars of 2 are as high as the frame, those of 0.5 a quarter.
        assert!(svg.contains("height=\"340.0\"") && svg.contains("height=\"85.0\""), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 4, "{svg}");
        for (value, expected) in [(0.3, 0.5), (1.0, 1.0), (1.01, 2.0), (60_000.0, 100_000.0)] {
            assert!((round_up(value) - expected).abs() < 1e-6, "{value}");
        }
    }
}
