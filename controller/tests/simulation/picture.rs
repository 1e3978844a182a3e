//! The comparison as a picture: mean round trip against the fullest relay, and the fullest relay over time.

use std::fmt::Write as _;

use crate::run::{FAILURE, LENGTH, Outcome};

const COLOURS: [&str; 7] = ["#0b6e4f", "#6bbf59", "#c8553d", "#f28f3b", "#7d7d7d", "#8fb3e0", "#1f4e8c"];
/// Width and height of each of the two plots.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 40.0;
const GAP: f64 = 110.0;

/// An SVG.
pub(crate) fn draw(outcomes: &[Outcome]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        LEFT + 2.0 * WIDTH + GAP + 40.0,
        TOP + HEIGHT + 70.0 + 18.0 * outcomes.len().div_ceil(3) as f64
    );
    let most_load = outcomes.iter().map(|it| it.highest).fold(1.2, f64::max).min(3.0);
    // What is farther is drawn at the edge: the legend has the numbers.
    let least_rtt = outcomes.iter().map(|it| it.mean_rtt).fold(f64::MAX, f64::min);
    let most_rtt = (least_rtt * 2.5 / 10.0).ceil() * 10.0;

    frame(&mut svg, LEFT, "mean round trip, ms", "fullest relay at any time, % of what it carries");
    scale(&mut svg, LEFT, most_rtt, 1.0, most_load);
    for (it, colour) in outcomes.iter().zip(COLOURS) {
        let (x, y) = (
            LEFT + it.mean_rtt.min(most_rtt) / most_rtt * WIDTH,
            TOP + HEIGHT * (1.0 - it.highest.min(most_load) / most_load),
        );
        let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"6\" fill=\"{colour}\"/>");
    }

    let left = LEFT + WIDTH + GAP;
    frame(&mut svg, left, "minutes", "fullest relay, % of what it carries");
    let length = LENGTH as f64 / 60.0;
    scale(&mut svg, left, length, 1.0, most_load);
    for (it, colour) in outcomes.iter().zip(COLOURS) {
        let points: Vec<String> = it
            .minutes
            .iter()
            .enumerate()
            .map(|(minute, (_, highest))| {
                let x = left + minute as f64 / length * WIDTH;
                format!("{x:.1},{:.1}", TOP + HEIGHT * (1.0 - highest.min(most_load) / most_load))
            })
            .collect();
        let points = points.join(" ");
        let _ = writeln!(svg, "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
    }
    let x = left + FAILURE as f64 / 60.0 / length * WIDTH;
    let _ = writeln!(
        svg,
        "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#999\" stroke-dasharray=\"4 3\"/>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" fill=\"#666\">a region fails</text>",
        TOP + HEIGHT,
        x + 4.0,
        TOP + 12.0
    );
    for (i, (it, colour)) in outcomes.iter().zip(COLOURS).enumerate() {
        let (x, y) = (LEFT + 310.0 * (i % 3) as f64, TOP + HEIGHT + 62.0 + 18.0 * (i / 3) as f64);
        let _ = writeln!(
            svg,
            "<circle cx=\"{x}\" cy=\"{:.1}\" r=\"5\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{y}\">{}: {:.1} ms, {:.0} %</text>",
            y - 4.0,
            x + 10.0,
            it.name,
            it.mean_rtt,
            it.highest * 100.0
        );
    }
    svg + "</svg>\n"
}

fn frame(svg: &mut String, left: f64, across: &str, up: &str) {
    let _ = writeln!(
        svg,
        "<rect x=\"{left}\" y=\"{TOP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#444\"/>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{across}</text>\n<text x=\"{left}\" y=\"{:.1}\">{up}</text>",
        left + WIDTH / 2.0,
        TOP + HEIGHT + 36.0,
        TOP - 10.0
    );
}

/// Numbers at the axes, and a line at what a relay carries.
fn scale(svg: &mut String, left: f64, most_across: f64, full: f64, most_up: f64) {
    for i in 0..=5 {
        let share = f64::from(i) / 5.0;
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0}</text>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0}</text>",
            left + WIDTH * share,
            TOP + HEIGHT + 18.0,
            most_across * share,
            left - 6.0,
            TOP + HEIGHT * (1.0 - share) + 4.0,
            most_up * share * 100.0
        );
    }
    let y = TOP + HEIGHT * (1.0 - full / most_up);
    let _ = writeln!(
        svg,
        "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#c00\" stroke-dasharray=\"2 3\"/>",
        left + WIDTH
    );
}
