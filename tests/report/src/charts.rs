//! Draws bars, lines and pictures of memory.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::document::{significant, Bars, BlockKind, Lines, Maps, Scale, Series, Style};
use crate::stats::Summary;
use crate::svg::{number, Anchor, Fill, Pattern, Svg};

const WIDTH: f64 = 960.0;
/// Left of the axis: its labels and name.
const LEFT: f64 = 72.0;
const RIGHT: f64 = 16.0;
const TITLE: f64 = 18.0;
const LABEL: f64 = 13.0;
const LEGEND_LINE: f64 = 20.0;
const BLACK: &str = "#000";
const GREY: &str = "#ccc";

/// Height of the plain area of a row of bars, and of lines.
const PANEL: f64 = 190.0;
const LINES_PANEL: f64 = 320.0;
/// A bar that is narrower shows nothing of its pattern.
const NARROWEST_BAR: f64 = 14.0;
const WIDEST_BAR: f64 = 36.0;
const GAP: f64 = 22.0;

/// How each series looks: the order is that of the policies, and `gemini` stands out by having a
/// dark colour and no pattern.
const FILLS: [Fill; 9] = [
    Fill { colour: "#ffffff", pattern: Pattern::Solid },
    Fill { colour: "#d55e00", pattern: Pattern::Upright },
    Fill { colour: "#e69f00", pattern: Pattern::Rising },
    Fill { colour: "#56b4e9", pattern: Pattern::Dots },
    Fill { colour: "#009e73", pattern: Pattern::Level },
    Fill { colour: "#f0e442", pattern: Pattern::Crossed },
    Fill { colour: "#cc79a7", pattern: Pattern::Falling },
    Fill { colour: "#0072b2", pattern: Pattern::Solid },
    Fill { colour: "#999999", pattern: Pattern::Solid },
];

/// Colour, dash and marker of each line.
const STROKES: [(&str, &str, Marker); 4] = [
    ("#000000", "6 4", Marker::Circle),
    ("#d55e00", "2 3", Marker::Triangle),
    ("#009e73", "8 3 2 3", Marker::Diamond),
    ("#0072b2", "", Marker::Square),
];

#[derive(Clone, Copy)]
enum Marker {
    Circle,
    Triangle,
    Diamond,
    Square,
}

fn fill(style: Style) -> Fill {
    FILLS[style.0 % FILLS.len()]
}

fn block_fill(kind: BlockKind) -> Fill {
    let (colour, pattern) = match kind {
        BlockKind::Aligned => ("#0072b2", Pattern::Solid),
        BlockKind::Guest => ("#e69f00", Pattern::Rising),
        BlockKind::Host => ("#d55e00", Pattern::Upright),
        BlockKind::Free => ("#56b4e9", Pattern::Dots),
        BlockKind::Base => ("#bbbbbb", Pattern::Solid),
        BlockKind::Nothing => ("#ffffff", Pattern::Solid),
    };
    Fill { colour, pattern }
}

/// A vertical axis between two values, and where its ticks are.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// An axis that holds `values`.
    fn new(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        match scale {
            Scale::Linear => Self::linear(&values),
            Scale::Logarithmic => Self::logarithmic(&values),
        }
    }

    fn linear(values: &[f64]) -> Self {
        let low = values.iter().copied().fold(0.0, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        let range = if high > low { high - low } else { 1.0 };
        let power = 10_f64.powf((range / 5.0).log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
        let step = steps.into_iter().find(|step| range / step <= 6.0).unwrap_or(steps[3]);
        let (first, mut last) = ((low / step).floor(), (high / step).ceil());
        if first == last {
            last += 1.0;
        }
        let mut ticks = Vec::new();
        let mut tick = first;
        while tick <= last {
            ticks.push(tick * step);
            tick += 1.0;
        }
        Axis { scale: Scale::Linear, low: first * step, high: last * step, ticks }
    }

    /// Always with 1, which is what ratios are seen against.
    fn logarithmic(values: &[f64]) -> Self {
        let positive = || values.iter().copied().filter(|&value| value > 0.0);
        let low = positive().fold(f64::INFINITY, f64::min).min(1.0).log10().floor();
        let high = positive().fold(0.0, f64::max).max(1.0).log10().ceil();
        let high = if high > low { high } else { low + 1.0 };
        let mut ticks = Vec::new();
        let mut power = low;
        while power <= high {
            ticks.push(10_f64.powf(power));
            power += 1.0;
        }
        let [low, high] = [low, high].map(|power| 10_f64.powf(power));
        Axis { scale: Scale::Logarithmic, low, high, ticks }
    }

    /// How high `value` is, from 0 (the bottom) to 1.
    fn at(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Logarithmic if value <= 0.0 => 0.0,
            Scale::Logarithmic => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        share.clamp(0.0, 1.0)
    }

    /// Draws the axis of an area whose upper left is at `left`, `top`.
    fn draw(&self, svg: &mut Svg, [left, top, width, height]: [f64; 4], name: &str) {
        for &tick in &self.ticks {
            let y = top + height * (1.0 - self.at(tick));
            svg.line((left, y), (left + width, y), GREY, 0.8, "");
            svg.text((left - 6.0, y + 4.0), Anchor::End, LABEL - 1.0, &tick_text(tick));
        }
        svg.line((left, top), (left, top + height), BLACK, 1.0, "");
        let middle = (16.0, top + height / 2.0);
        svg.turned_text(middle, Anchor::Middle, LABEL, -90.0, name);
    }
}

fn tick_text(tick: f64) -> String {
    // Steps like 0.1 add up to what is not quite a multiple.
    let rounded = (tick * 1e9).round() / 1e9;
    if (0.001..10_000.0).contains(&rounded.abs()) || rounded == 0.0 {
        format!("{rounded}")
    } else {
        significant(rounded)
    }
}

fn values(series: &[Series]) -> impl Iterator<Item = &Summary> {
    series.iter().flat_map(|series| series.values.iter().flatten())
}

/// Draws a legend of entries, each with something to show of `width` pixels, from `top` on, and
/// gives where it ends.
fn legend(
    svg: &mut Svg,
    top: f64,
    names: &[&str],
    mut show: impl FnMut(&mut Svg, usize, f64, f64),
) -> f64 {
    let (mut x, mut y) = (LEFT, top);
    for (place, name) in names.iter().enumerate() {
        let width = 40.0 + 7.3 * name.chars().count() as f64;
        if x + width > WIDTH && x > LEFT {
            x = LEFT;
            y += LEGEND_LINE;
        }
        show(svg, place, x, y);
        svg.text((x + 28.0, y + 11.0), Anchor::Start, LABEL, name);
        x += width;
    }
    y + LEGEND_LINE
}

/// How many lines [`legend`] takes at most.
fn legend_lines(names: &[&str]) -> f64 {
    let width: f64 = names.iter().map(|name| 40.0 + 7.3 * name.chars().count() as f64).sum();
    // A line may end early by as much as an entry.
    let widest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64;
    (width / (WIDTH - LEFT - 40.0 - 7.3 * widest).max(100.0)).ceil()
}

/// Groups in a row, so that bars are wide enough and rows are alike.
fn groups_a_row(groups: usize, series: usize) -> usize {
    let group = series as f64 * NARROWEST_BAR + GAP;
    let mut fit = 1;
    while (fit + 1) as f64 * group <= WIDTH - LEFT - RIGHT {
        fit += 1;
    }
    let rows = groups.div_ceil(fit).max(1);
    groups.div_ceil(rows).max(1)
}

/// Draws `bars` with an identifier that is the only one of its page.
#[must_use]
pub fn bars(bars: &Bars, id: &str) -> String {
    let fit = groups_a_row(bars.groups.len(), bars.series.len());
    let rows = bars.groups.len().div_ceil(fit);
    let missing = bars.series.iter().any(|series| series.values.iter().any(Option::is_none));
    let mut names: Vec<&str> = bars.series.iter().map(|series| series.name.as_str()).collect();
    let series = names.len();
    if let Some((_, meaning)) = &bars.line {
        names.push(meaning);
    }
    if missing {
        names.push("not measured");
    }
    let row_height = PANEL + 44.0;
    let height = 34.0 + legend_lines(&names) * LEGEND_LINE + 14.0 + rows as f64 * row_height;
    let description = format!(
        "Bars in {} groups ({}) of {series} series: {}. Vertical axis: {}.",
        bars.groups.len(),
        bars.group,
        names[..series].join(", "),
        bars.axis
    );
    let mut svg = Svg::new(id, WIDTH, height, &bars.title, &description);
    svg.text((LEFT, 22.0), Anchor::Start, TITLE, &bars.title);
    let top = legend(&mut svg, 34.0, &names, |svg, place, x, y| match bars.series.get(place) {
        Some(series) => svg.rectangle([x, y, 22.0, 13.0], fill(series.style), ""),
        None if place == series && bars.line.is_some() => {
            svg.line((x, y + 7.0), (x + 22.0, y + 7.0), BLACK, 1.5, "5 3");
        }
        None => svg.text((x + 11.0, y + 12.0), Anchor::Middle, LABEL + 2.0, "\u{d7}"),
    });
    let shown = values(&bars.series).flat_map(|value| [value.low, value.median, value.high]);
    let axis = Axis::new(bars.scale, shown.chain(bars.line.iter().map(|line| line.0)));
    for row in 0..rows {
        let area = [LEFT, top + 14.0 + row as f64 * row_height, WIDTH - LEFT - RIGHT, PANEL];
        let end = bars.groups.len().min((row + 1) * fit);
        bars_row(&mut svg, bars, &axis, area, row * fit..end, fit);
    }
    svg.finish()
}

fn bars_row(
    svg: &mut Svg,
    bars: &Bars,
    axis: &Axis,
    area: [f64; 4],
    groups: std::ops::Range<usize>,
    fit: usize,
) {
    let [left, top, width, height] = area;
    axis.draw(svg, area, &bars.axis);
    let y_of = |value| top + height * (1.0 - axis.at(value));
    let bottom = y_of(match axis.scale {
        Scale::Linear => 0.0,
        Scale::Logarithmic => axis.low,
    });
    let group_width = width / fit as f64;
    let bar = ((group_width - GAP) / bars.series.len() as f64).min(WIDEST_BAR);
    for (place, group) in groups.enumerate() {
        let middle = left + (place as f64 + 0.5) * group_width;
        let start = middle - bar * bars.series.len() as f64 / 2.0;
        for (number, series) in bars.series.iter().enumerate() {
            let x = start + number as f64 * bar;
            let Some(value) = series.values[group] else {
                svg.text((x + bar / 2.0, bottom - 2.0), Anchor::Middle, LABEL, "\u{d7}");
                continue;
            };
            let y = y_of(value.median);
            let tip =
                format!("{}, {}: {}", bars.groups[group], series.name, significant(value.median));
            let rectangle = [x, y.min(bottom), bar, (y - bottom).abs()];
            svg.rectangle(rectangle, fill(series.style), &tip);
            if value.low < value.high {
                whisker(svg, x + bar / 2.0, y_of(value.low), y_of(value.high));
            }
        }
        svg.text((middle, top + height + 17.0), Anchor::Middle, LABEL, &bars.groups[group]);
    }
    svg.line((left, bottom), (left + width, bottom), BLACK, 1.0, "");
    if let Some((value, _)) = bars.line {
        svg.line((left, y_of(value)), (left + width, y_of(value)), BLACK, 1.5, "5 3");
    }
}

/// From the smallest value to the greatest, with a light edge: it has to be seen on every fill.
fn whisker(svg: &mut Svg, x: f64, low: f64, high: f64) {
    let [x0, x1, low, high] = [x - 3.0, x + 3.0, low, high].map(number);
    let x = number(x);
    let d = format!("M{x} {low}V{high}M{x0} {low}H{x1}M{x0} {high}H{x1}");
    svg.path(&d, "#fff", 3.2, "");
    svg.path(&d, BLACK, 1.4, "");
}

/// Draws `lines` with an identifier that is the only one of its page.
#[must_use]
pub fn lines(lines: &Lines, id: &str) -> String {
    let names: Vec<&str> = lines.series.iter().map(|series| series.name.as_str()).collect();
    let height = 34.0 + legend_lines(&names) * LEGEND_LINE + 14.0 + LINES_PANEL + 56.0;
    let description = format!(
        "Lines: {}. Horizontal axis, logarithmic: {}. Vertical axis: {}.",
        names.join(", "),
        lines.across,
        lines.axis
    );
    let mut svg = Svg::new(id, WIDTH, height, &lines.title, &description);
    svg.text((LEFT, 22.0), Anchor::Start, TITLE, &lines.title);
    let top = legend(&mut svg, 34.0, &names, |svg, place, x, y| {
        let (colour, dash, shape) = stroke(lines.series[place].style);
        svg.line((x, y + 7.0), (x + 22.0, y + 7.0), colour, 2.0, dash);
        marker(svg, shape, colour, x + 11.0, y + 7.0);
    }) + 14.0;
    let shown = values(&lines.series).flat_map(|value| [value.low, value.high]);
    let axis = Axis::new(Scale::Linear, shown);
    let area = [LEFT, top, WIDTH - LEFT - RIGHT, LINES_PANEL];
    axis.draw(&mut svg, area, &lines.axis);
    let [left, top, width, height] = area;
    let bottom = top + height;
    svg.line((left, bottom), (left + width, bottom), BLACK, 1.0, "");
    let (first, last) = (lines.at.first().copied(), lines.at.last().copied());
    let range = (last.unwrap_or(1.0) / first.unwrap_or(1.0)).ln();
    let x_of = |at: f64| {
        let share = if range > 0.0 { (at / first.unwrap_or(1.0)).ln() / range } else { 0.5 };
        left + width * (0.04 + 0.92 * share)
    };
    for &at in &lines.at {
        svg.line((x_of(at), bottom), (x_of(at), bottom + 5.0), BLACK, 1.0, "");
        svg.text((x_of(at), bottom + 20.0), Anchor::Middle, LABEL, &tick_text(at));
    }
    svg.text((left + width / 2.0, bottom + 42.0), Anchor::Middle, LABEL, &lines.across);
    for series in &lines.series {
        let (colour, dash, shape) = stroke(series.style);
        let points: Vec<Option<(f64, f64)>> = (series.values.iter().zip(&lines.at))
            .map(|(value, &at)| Some((x_of(at), top + height * (1.0 - axis.at((*value)?.median)))))
            .collect();
        // A line has a gap where a value is missing.
        for pair in points.windows(2) {
            if let [Some(from), Some(to)] = *pair {
                svg.line(from, to, colour, 2.0, dash);
            }
        }
        for (x, y) in points.into_iter().flatten() {
            marker(&mut svg, shape, colour, x, y);
        }
    }
    svg.finish()
}

fn stroke(style: Style) -> (&'static str, &'static str, Marker) {
    STROKES[style.0 % STROKES.len()]
}

fn marker(svg: &mut Svg, marker: Marker, colour: &str, x: f64, y: f64) {
    let [left, right, top, bottom] = [x - 5.0, x + 5.0, y - 5.0, y + 5.0].map(number);
    let [x, y] = [x, y].map(number);
    let d = match marker {
        Marker::Circle => format!("M{left} {y}A5 5 0 1 1 {right} {y}A5 5 0 1 1 {left} {y}Z"),
        Marker::Triangle => format!("M{left} {bottom}L{x} {top}L{right} {bottom}Z"),
        Marker::Diamond => format!("M{left} {y}L{x} {top}L{right} {y}L{x} {bottom}Z"),
        Marker::Square => format!("M{left} {top}H{right}V{bottom}H{left}Z"),
    };
    svg.shape(&d, colour);
}

/// Blocks in a line of a picture of memory, and pixels of a block.
const MAP_LINE: usize = 64;
const CELL: f64 = 6.5;

/// Draws `maps`, two beside each other, with an identifier that is the only one of its page.
#[must_use]
pub fn maps(maps: &Maps, id: &str) -> String {
    let names: Vec<String> =
        BlockKind::ALL.iter().map(|(_, letter, meaning)| format!("{letter} {meaning}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let tallest = maps.pictures.iter().map(|(_, blocks)| blocks.len().div_ceil(MAP_LINE)).max();
    let picture = tallest.unwrap_or(0) as f64 * CELL + 34.0;
    let rows = maps.pictures.len().div_ceil(2) as f64;
    let height = 34.0 + legend_lines(&names) * LEGEND_LINE + 14.0 + rows * picture;
    let shown: Vec<_> = maps.pictures.iter().map(|(title, _)| title.as_str()).collect();
    let description = format!("A cell is a block of guest memory. {}.", shown.join("; "));
    let mut svg = Svg::new(id, WIDTH, height, &maps.title, &description);
    svg.text((LEFT, 22.0), Anchor::Start, TITLE, &maps.title);
    let top = legend(&mut svg, 34.0, &names, |svg, place, x, y| {
        svg.rectangle([x, y, 22.0, 13.0], block_fill(BlockKind::ALL[place].0), "");
    }) + 14.0;
    for (place, (title, blocks)) in maps.pictures.iter().enumerate() {
        let x = LEFT - 40.0 + (place % 2) as f64 * (MAP_LINE as f64 * CELL + 32.0);
        let y = top + (place / 2) as f64 * picture;
        svg.text((x, y + 12.0), Anchor::Start, LABEL, title);
        for (kind, outline) in outlines(blocks, (x, y + 18.0)) {
            svg.area(&outline, block_fill(kind));
        }
    }
    svg.finish()
}

/// Around neighbouring blocks of the same kind, as one path a kind: a picture of rectangles would
/// be many times as long.
fn outlines(blocks: &[BlockKind], (left, top): (f64, f64)) -> BTreeMap<BlockKind, String> {
    let mut outlines: BTreeMap<_, String> = BTreeMap::new();
    for (line, blocks) in blocks.chunks(MAP_LINE).enumerate() {
        let mut start = 0;
        for run in blocks.chunk_by(|one, other| one == other) {
            let end = start + run.len();
            let [from, to] = [start, end].map(|column| number(left + column as f64 * CELL));
            let [above, below] = [line, line + 1].map(|line| number(top + line as f64 * CELL));
            let _ =
                write!(outlines.entry(run[0]).or_default(), "M{from} {above}H{to}V{below}H{from}Z");
            start = end;
        }
    }
    outlines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(value: f64) -> Option<Summary> {
        Summary::of(vec![value])
    }

    fn example(scale: Scale) -> Bars {
        let series =
            |name: &str, style, values| Series { name: name.into(), style: Style(style), values };
        Bars {
            title: "Title <1>".into(),
            axis: "ratio".into(),
            scale,
            group: "workload".into(),
            groups: vec!["redis".into(), "cg".into()],
            series: vec![
                series("thp", 2, vec![one(0.5), None]),
                series("gemini", 7, vec![Summary::of(vec![0.1, 0.2]), one(1.5)]),
            ],
            line: Some((1.0, "base pages".into())),
            in_table: false,
        }
    }

    #[test]
    fn missing_values_are_shown_as_missing() -> anyhow::Result<()> {
        for scale in [Scale::Linear, Scale::Logarithmic] {
            let text = bars(&example(scale), "p1");
            roxmltree::Document::parse(&text)?;
            assert!(text.contains(">not measured</text>"));
            assert_eq!(text.matches("\u{d7}</text>").count(), 2, "one in the legend, one bar");
            assert!(text.contains("cg, gemini: 1.50"));
        }
        Ok(())
    }

    #[test]
    fn every_series_has_colour_and_pattern_of_its_own() {
        for (place, fill) in FILLS.iter().enumerate() {
            let others = &FILLS[place + 1..];
            assert!(others.iter().all(|other| fill.colour != other.colour));
            let patterned = fill.pattern != Pattern::Solid;
            assert!(!patterned || others.iter().all(|other| fill.pattern != other.pattern));
        }
    }

    #[test]
    fn axes_hold_all_values_and_have_even_ticks() {
        let axis = Axis::new(Scale::Linear, [0.2, 1.13].into_iter());
        assert!(axis.low == 0.0 && (axis.high - 1.2).abs() < 1e-9);
        assert_eq!(axis.ticks.len(), 7);
        assert_eq!(tick_text(axis.ticks[3]), "0.6");
        let axis = Axis::new(Scale::Linear, [-0.3, 1.0].into_iter());
        assert!(axis.low <= -0.3 && axis.high >= 1.0 && axis.ticks.contains(&0.0));
        let axis = Axis::new(Scale::Logarithmic, [0.004, 2.0, 0.0].into_iter());
        assert_eq!(axis.ticks.len(), 5);
        assert_eq!(axis.at(0.0), 0.0);
        let axis = Axis::new(Scale::Logarithmic, std::iter::empty());
        assert!(axis.high > axis.low);
        let axis = Axis::new(Scale::Linear, std::iter::empty());
        assert!(axis.high > axis.low);
    }

    #[test]
    fn many_groups_are_broken_into_even_rows() {
        assert_eq!(groups_a_row(11, 7), 6);
        assert_eq!(groups_a_row(2, 7), 2);
        assert_eq!(groups_a_row(0, 7), 1);
    }

    #[test]
    fn lines_with_a_gap_and_a_single_size_are_drawn() -> anyhow::Result<()> {
        let series = |values| Series { name: "both".into(), style: Style(3), values };
        let mut shown = Lines {
            title: "T".into(),
            across: "MiB".into(),
            axis: "ns".into(),
            at: vec![1.0, 4.0, 16.0],
            series: vec![series(vec![one(1.0), None, one(2.0)])],
        };
        roxmltree::Document::parse(&lines(&shown, "p"))?;
        shown.at.truncate(1);
        shown.series = vec![series(vec![one(1.0)])];
        let text = lines(&shown, "p");
        roxmltree::Document::parse(&text)?;
        assert!(!text.contains("NaN"));
        Ok(())
    }
}
