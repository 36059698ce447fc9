//! Writes SVG: shapes, text, and fills that differ in print and for the colour-blind, too.

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// How an area is filled: a colour of Okabe and Ito's palette, and a pattern on it, so that
/// neither has to be seen to tell areas apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fill {
    /// As `#rrggbb`.
    pub colour: &'static str,
    /// What is drawn on it, in black.
    pub pattern: Pattern,
}

/// What is drawn on a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pattern {
    /// Nothing.
    Solid,
    /// Lines that rise.
    Rising,
    /// Lines that fall.
    Falling,
    /// Lines that lie.
    Level,
    /// Lines that stand.
    Upright,
    /// Lines that rise, and lines that fall.
    Crossed,
    /// Dots.
    Dots,
}

impl Pattern {
    fn shapes(self) -> &'static str {
        match self {
            Pattern::Solid => "",
            Pattern::Rising => "<path d=\"M-1 1L1 -1M0 6L6 0M5 7L7 5\" stroke=\"#000\"/>",
            Pattern::Falling => "<path d=\"M-1 5L1 7M0 0L6 6M5 -1L7 1\" stroke=\"#000\"/>",
            Pattern::Level => "<path d=\"M0 3H6\" stroke=\"#000\"/>",
            Pattern::Upright => "<path d=\"M3 0V6\" stroke=\"#000\"/>",
            Pattern::Crossed => {
                "<path d=\"M0 6L6 0M0 0L6 6M-1 1L1 -1M5 7L7 5M-1 5L1 7M5 -1L7 1\" stroke=\"#000\"/>"
            }
            Pattern::Dots => {
                "<circle cx=\"1.5\" cy=\"1.5\" r=\"1\"/><circle cx=\"4.5\" cy=\"4.5\" r=\"1\"/>"
            }
        }
    }
}

/// Where text stands against its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// Its middle is there.
    Middle,
    /// It ends there.
    End,
}

/// A picture that is being drawn. Coordinates are pixels from the upper left.
#[derive(Clone, Debug)]
pub struct Svg {
    id: String,
    width: f64,
    height: f64,
    title: String,
    description: String,
    fills: BTreeSet<Fill>,
    body: String,
}

impl Svg {
    /// An empty picture. `id` has to be the only one of its page; `title` and `description` are
    /// for those who do not see it.
    #[must_use]
    pub fn new(id: &str, width: f64, height: f64, title: &str, description: &str) -> Self {
        Svg {
            id: id.into(),
            width,
            height,
            title: title.into(),
            description: description.into(),
            fills: BTreeSet::new(),
            body: String::new(),
        }
    }

    /// A rectangle with an outline. What `tip` says is shown to who points at it.
    pub fn rectangle(&mut self, [x, y, width, height]: [f64; 4], fill: Fill, tip: &str) {
        let fill = self.fill(fill);
        let _ = write!(
            self.body,
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{fill}\" \
             stroke=\"#000\" stroke-width=\"0.6\"",
            number(x),
            number(y),
            number(width),
            number(height)
        );
        if tip.is_empty() {
            self.body.push_str("/>\n");
        } else {
            let _ = writeln!(self.body, "><title>{}</title></rect>", escape(tip));
        }
    }

    /// Areas with outlines: `d` as SVG has it.
    pub fn area(&mut self, d: &str, fill: Fill) {
        let fill = self.fill(fill);
        let _ = writeln!(
            self.body,
            "<path d=\"{d}\" fill=\"{fill}\" stroke=\"#000\" stroke-width=\"0.4\"/>"
        );
    }

    /// A path: `d` as SVG has it, without a fill. `dash` as SVG has it, nothing for a whole line.
    pub fn path(&mut self, d: &str, colour: &str, width: f64, dash: &str) {
        let dash =
            if dash.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dash}\"") };
        let _ = writeln!(
            self.body,
            "<path d=\"{d}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{}\"{dash}/>",
            number(width)
        );
    }

    /// A straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64, dash: &str) {
        let d = format!("M{} {}L{} {}", number(from.0), number(from.1), number(to.0), number(to.1));
        self.path(&d, colour, width, dash);
    }

    /// A filled shape with a black outline: `d` as SVG has it.
    pub fn shape(&mut self, d: &str, colour: &str) {
        let _ = writeln!(self.body, "<path d=\"{d}\" fill=\"{colour}\" stroke=\"#000\"/>");
    }

    /// Text of `size` pixels.
    pub fn text(&mut self, at: (f64, f64), anchor: Anchor, size: f64, text: &str) {
        self.turned_text(at, anchor, size, 0.0, text);
    }

    /// Text that is turned clockwise by `degrees`.
    pub fn turned_text(
        &mut self,
        (x, y): (f64, f64),
        anchor: Anchor,
        size: f64,
        degrees: f64,
        text: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let turn = if degrees == 0.0 {
            String::new()
        } else {
            format!(" transform=\"rotate({} {} {})\"", number(degrees), number(x), number(y))
        };
        let _ = writeln!(
            self.body,
            "<text x=\"{}\" y=\"{}\" font-size=\"{}\" text-anchor=\"{anchor}\"{turn}>{}</text>",
            number(x),
            number(y),
            number(size),
            escape(text)
        );
    }

    /// The picture as text, alone or within a page.
    #[must_use]
    pub fn finish(self) -> String {
        let (id, width, height) = (&self.id, number(self.width), number(self.height));
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" role=\"img\" \
             aria-labelledby=\"{id}-t {id}-d\">\n<title id=\"{id}-t\">{}</title>\n\
             <desc id=\"{id}-d\">{}</desc>\n<defs>\n",
            escape(&self.title),
            escape(&self.description)
        );
        for fill in self.fills.iter().filter(|fill| fill.pattern != Pattern::Solid) {
            let _ = writeln!(
                text,
                "<pattern id=\"{}\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\">\
                 <rect width=\"6\" height=\"6\" fill=\"{}\"/>{}</pattern>",
                self.pattern_id(*fill),
                fill.colour,
                fill.pattern.shapes()
            );
        }
        let _ =
            write!(text, "</defs>\n<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n");
        text.push_str(&self.body);
        text.push_str("</svg>\n");
        text
    }

    /// What the attribute `fill` has for `fill`.
    fn fill(&mut self, fill: Fill) -> String {
        self.fills.insert(fill);
        match fill.pattern {
            Pattern::Solid => fill.colour.to_owned(),
            _ => format!("url(#{})", self.pattern_id(fill)),
        }
    }

    fn pattern_id(&self, fill: Fill) -> String {
        format!("{}-{}-{:?}", self.id, &fill.colour[1..], fill.pattern)
    }
}

/// A coordinate: short, and the same on every machine.
#[must_use]
pub fn number(value: f64) -> String {
    let text = format!("{value:.1}");
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text == "-0" {
        "0".into()
    } else {
        text.into()
    }
}

/// `text` where XML has text or the value of an attribute.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no way to say these.
            letter if letter.is_control() && letter != '\n' && letter != '\t' => escaped.push('?'),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_well_formed_and_names_itself() -> anyhow::Result<()> {
        let mut svg = Svg::new("x", 100.0, 50.0, "a < b", "c & \"d\"");
        let fill = Fill { colour: "#0072b2", pattern: Pattern::Rising };
        svg.rectangle([1.0, 2.0, 3.25, 4.0], fill, "tip \u{1}");
        svg.turned_text((5.0, 6.0), Anchor::End, 12.0, -90.0, "<text>");
        let text = svg.finish();
        let document = roxmltree::Document::parse(&text)?;
        let named = |name: &str| {
            document
                .descendants()
                .find(|node| node.has_tag_name(("http://www.w3.org/2000/svg", name)))
        };
        assert_eq!(named("title").and_then(|node| node.text()), Some("a < b"));
        assert_eq!(named("desc").and_then(|node| node.text()), Some("c & \"d\""));
        let pattern = named("pattern").and_then(|node| node.attribute("id"));
        assert!(text.contains(&format!("url(#{})", pattern.unwrap_or_default())));
        Ok(())
    }

    #[test]
    fn coordinates_are_short() {
        assert_eq!(["1", "1.3", "0"].map(String::from), [number(1.0), number(1.26), number(-0.01)]);
    }
}
