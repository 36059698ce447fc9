//! What a page says, without how it is written: both pages are made from one of these.
//!
//! Text is plain but for code between backticks. What comes from records has to pass [`plain`].

use crate::stats::Summary;

/// A page.
#[derive(Clone, Debug, Default)]
pub struct Document {
    /// Its heading.
    pub title: String,
    /// Its sections.
    pub sections: Vec<Section>,
}

/// A part of a page with a heading of its own.
#[derive(Clone, Debug)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// What it says.
    pub parts: Vec<Part>,
}

impl Section {
    /// A section that says nothing yet.
    #[must_use]
    pub fn new(title: impl Into<String>) -> Self {
        Section { title: title.into(), parts: Vec::new() }
    }

    /// Adds a paragraph.
    pub fn text(&mut self, text: impl Into<String>) {
        self.parts.push(Part::Text(text.into()));
    }

    /// Adds what a reader must not miss.
    pub fn warning(&mut self, text: impl Into<String>) {
        self.parts.push(Part::Warning(text.into()));
    }

    /// Adds a table, unless it has no rows.
    pub fn table(&mut self, table: Table) {
        if !table.rows.is_empty() {
            self.parts.push(Part::Table(table));
        }
    }

    /// Adds a plot, unless it shows nothing.
    pub fn bars(&mut self, bars: Bars) {
        if bars.has_values() {
            self.parts.push(Part::Bars(bars));
        }
    }
}

/// A part of a section.
#[derive(Clone, Debug)]
pub enum Part {
    /// A paragraph.
    Text(String),
    /// A paragraph that a reader must not miss.
    Warning(String),
    /// A list.
    List(Vec<String>),
    /// A table.
    Table(Table),
    /// Bars in groups.
    Bars(Bars),
    /// Lines over a logarithmic axis.
    Lines(Lines),
    /// Pictures of memory.
    Maps(Maps),
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    /// What it shows, units included.
    pub caption: String,
    /// One name a column.
    pub header: Vec<String>,
    /// As long as the header, each.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    #[must_use]
    pub fn new<S: Into<String>>(
        caption: impl Into<String>,
        header: impl IntoIterator<Item = S>,
    ) -> Self {
        let header = header.into_iter().map(Into::into).collect();
        Table { caption: caption.into(), header, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.header.len(), "{}", self.caption);
        self.rows.push(cells);
    }
}

/// A cell of a table.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A number, with what belongs to it.
    Number(String),
    /// There is no run that tells.
    NotMeasured,
    /// All runs failed that could tell.
    Failed,
    /// A bar that is met.
    Met,
    /// A bar that is missed.
    Missed,
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Self {
        Cell::Text(text.into())
    }

    /// A number, or that there is none.
    pub fn number(number: Option<impl Into<String>>) -> Self {
        number.map_or(Cell::NotMeasured, |number| Cell::Number(number.into()))
    }

    /// A median and, where repetitions differ in what is shown, the smallest and the greatest.
    #[must_use]
    pub fn summary(summary: Option<Summary>, show: fn(f64) -> String) -> Self {
        Self::number(summary.map(|summary| {
            let median = show(summary.median);
            let (low, high) = (show(summary.low), show(summary.high));
            if low == high {
                return median;
            }
            format!("{median} ({low}..{high})")
        }))
    }

    /// What it says.
    #[must_use]
    pub fn words(&self) -> &str {
        match self {
            Cell::Text(text) | Cell::Number(text) => text,
            Cell::NotMeasured => "n/m",
            Cell::Failed => "failed",
            Cell::Met => "met",
            Cell::Missed => "MISSED",
        }
    }
}

/// How to tell one series of a plot from the others, in colour and without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style(pub usize);

/// The scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From 0.
    Linear,
    /// In decades.
    Logarithmic,
}

/// Bars in groups.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Heading of the plot.
    pub title: String,
    /// What the vertical axis shows, with its unit.
    pub axis: String,
    /// Its scale.
    pub scale: Scale,
    /// What the groups are.
    pub group: String,
    /// Name of each group.
    pub groups: Vec<String>,
    /// The bars of each group.
    pub series: Vec<Series>,
    /// A line across at a value, and what it means.
    pub line: Option<(f64, String)>,
    /// Whether a table of the section has the same numbers.
    pub in_table: bool,
}

impl Bars {
    /// Whether there is anything to see.
    #[must_use]
    pub fn has_values(&self) -> bool {
        self.series.iter().any(|series| series.values.iter().any(Option::is_some))
    }
}

/// What has the same meaning in every group.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// How it looks.
    pub style: Style,
    /// One value a group; none is shown as missing.
    pub values: Vec<Option<Summary>>,
}

/// Lines over a logarithmic horizontal axis. A table of the section has the same numbers.
#[derive(Clone, Debug)]
pub struct Lines {
    /// Heading of the plot.
    pub title: String,
    /// What the horizontal axis shows, with its unit.
    pub across: String,
    /// What the vertical axis shows, with its unit.
    pub axis: String,
    /// Where values are, ascending and greater than 0.
    pub at: Vec<f64>,
    /// The lines.
    pub series: Vec<Series>,
}

/// Pictures of memory, one a row.
#[derive(Clone, Debug)]
pub struct Maps {
    /// Heading of the pictures.
    pub title: String,
    /// What a picture shows, and one letter a block.
    pub pictures: Vec<(String, Vec<BlockKind>)>,
}

/// What a block of guest memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockKind {
    /// None of the others.
    Nothing,
    /// In use, as base pages at both layers.
    Base,
    /// Huge in the guest alone.
    Guest,
    /// In use or held, and huge in the host alone.
    Host,
    /// Huge at both layers.
    Aligned,
    /// Free in the guest, huge in the host.
    Free,
}

impl BlockKind {
    /// All of them, with their letters and meaning.
    pub const ALL: [(BlockKind, char, &'static str); 6] = [
        (BlockKind::Aligned, 'A', "huge at both layers"),
        (BlockKind::Guest, 'g', "huge in the guest alone"),
        (BlockKind::Host, 'h', "in use or held, huge in the host alone"),
        (BlockKind::Free, 'f', "free, huge in the host"),
        (BlockKind::Base, 'b', "in use, base pages at both layers"),
        (BlockKind::Nothing, '.', "none of these"),
    ];

    /// What `letter` means; unknown ones mean nothing.
    #[must_use]
    pub fn of(letter: char) -> Self {
        let known = Self::ALL.into_iter().find(|(_, known, _)| *known == letter);
        known.map_or(BlockKind::Nothing, |(kind, ..)| kind)
    }

    /// Its letter.
    #[must_use]
    pub fn letter(self) -> char {
        Self::ALL.into_iter().find(|(kind, ..)| *kind == self).map_or('.', |(_, letter, _)| letter)
    }
}

/// Text from outside, as text of a page: without backticks and on one line.
#[must_use]
pub fn plain(text: &str) -> String {
    text.replace('`', "'").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Text of a page as pieces, each with whether it is code.
pub fn pieces(text: &str) -> impl Iterator<Item = (&str, bool)> {
    text.split('`').enumerate().map(|(place, piece)| (piece, place % 2 == 1))
}

/// Three digits behind the point, for shares.
#[must_use]
pub fn share(value: f64) -> String {
    format!("{value:.3}")
}

/// Percent of one.
#[must_use]
pub fn percent(value: f64) -> String {
    let text = format!("{:.1} %", value * 100.0);
    // The sign of a negative nothing says nothing.
    if text == "-0.0 %" {
        "0.0 %".into()
    } else {
        text
    }
}

/// Three significant digits, or all before the point.
#[must_use]
pub fn significant(value: f64) -> String {
    let magnitude = value.abs();
    let digits = match magnitude {
        0.0 => 0,
        magnitude if magnitude >= 100.0 => 0,
        magnitude if magnitude >= 10.0 => 1,
        magnitude if magnitude >= 1.0 => 2,
        magnitude if magnitude >= 0.1 => 3,
        magnitude if magnitude >= 0.01 => 4,
        magnitude if magnitude >= 0.001 => 5,
        _ => return format!("{value:.2e}"),
    };
    grouped(&format!("{value:.digits$}"))
}

/// Commas between thousands.
fn grouped(number: &str) -> String {
    let (whole, fraction) = number.split_once('.').map_or((number, None), |(w, f)| (w, Some(f)));
    let (sign, digits) = whole.strip_prefix('-').map_or(("", whole), |digits| ("-", digits));
    let mut text = String::from(sign);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if let Some(fraction) = fraction {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_significant_digits_and_thousands() {
        for (value, text) in [
            (0.0, "0"),
            (1234567.0, "1,234,567"),
            (-1234.0, "-1,234"),
            (12.345, "12.3"),
            (0.01234, "0.0123"),
            (0.00001, "1.00e-5"),
        ] {
            assert_eq!(significant(value), text);
        }
        assert_eq!(percent(-0.0001), "0.0 %");
    }

    #[test]
    fn a_spread_needs_repetitions() {
        let one = Summary { median: 0.5, low: 0.5, high: 0.5, count: 1 };
        assert_eq!(Cell::summary(Some(one), share).words(), "0.500");
        let two = Summary { median: 0.5, low: 0.25, high: 0.75, count: 2 };
        assert_eq!(Cell::summary(Some(two), share).words(), "0.500 (0.250..0.750)");
        assert_eq!(Cell::summary(None, share), Cell::NotMeasured);
    }

    #[test]
    fn text_from_outside_cannot_become_code() {
        assert_eq!(plain("a `b`\n  c"), "a 'b' c");
        let parts: Vec<_> = pieces("a `b` c").collect();
        assert_eq!(parts, [("a ", false), ("b", true), (" c", false)]);
    }
}
