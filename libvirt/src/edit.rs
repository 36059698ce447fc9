//! Changes to an XML text that leave every other byte of it as it is.

use std::ops::Range;

use roxmltree::Node;

/// Replacements of byte ranges of one text, collected and then done at once.
#[derive(Debug)]
pub struct Edits<'a> {
    text: &'a str,
    newline: &'static str,
    replacements: Vec<(Range<usize>, String)>,
}

impl<'a> Edits<'a> {
    /// No change yet.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
        Edits { text, newline, replacements: Vec::new() }
    }

    /// Replaces the bytes in `range`.
    pub fn replace(&mut self, range: Range<usize>, with: impl Into<String>) {
        self.replacements.push((range, with.into()));
    }

    /// Puts elements behind `node`, each line indented as `node` is.
    pub fn insert_after(&mut self, node: Node, lines: &[String]) {
        let at = node.range().end;
        self.insert(at, self.indent_of(node), lines);
    }

    /// Puts elements into `parent`, behind those that it has.
    pub fn append(&mut self, parent: Node, lines: &[String]) {
        if let Some(last) = parent.children().rfind(Node::is_element) {
            self.insert_after(last, lines);
            return;
        }
        // Nothing in it that could be stepped behind: written anew with its tag.
        let range = parent.range();
        let source = &self.text[range.clone()];
        let tag = opening_tag(source);
        let name = tag_name(source);
        let head = tag.trim_end_matches('>').trim_end_matches('/').trim_end();
        let mut element = format!("{head}>");
        let outer = self.indent_of(parent);
        for line in lines {
            if let Some(indent) = &outer {
                element.push_str(self.newline);
                element.push_str(indent);
                element.push_str("  ");
            }
            element.push_str(line);
        }
        if let Some(indent) = &outer {
            element.push_str(self.newline);
            element.push_str(indent);
        }
        element.push_str(&format!("</{name}>"));
        self.replace(range, element);
    }

    /// Takes `node` out, with the indentation before it: the reverse of
    /// [`Edits::insert_after`].
    pub fn remove(&mut self, node: Node) {
        let range = node.range();
        let start = match self.indent_of(node) {
            Some(indent) => {
                let start = range.start - indent.len();
                let before = &self.text[..start];
                let newline = ["\r\n", "\n"].iter().find(|end| before.ends_with(**end));
                start - newline.map_or(0, |end| end.len())
            }
            None => range.start,
        };
        self.replace(start..range.end, "");
    }

    /// The changed text.
    #[must_use]
    pub fn apply(mut self) -> String {
        self.replacements.sort_by_key(|(range, _)| range.start);
        let mut result = String::with_capacity(self.text.len() + 1024);
        let mut done = 0;
        for (range, with) in &self.replacements {
            result.push_str(&self.text[done..range.start]);
            result.push_str(with);
            done = range.end;
        }
        result.push_str(&self.text[done..]);
        result
    }

    fn insert(&mut self, at: usize, indent: Option<String>, lines: &[String]) {
        let mut text = String::new();
        for line in lines {
            if let Some(indent) = &indent {
                text.push_str(self.newline);
                text.push_str(indent);
            }
            text.push_str(line);
        }
        self.replace(at..at, text);
    }

    /// The blanks before `node` if nothing else is before it on its line.
    fn indent_of(&self, node: Node) -> Option<String> {
        let before = &self.text[..node.range().start];
        let indent = &before[before.trim_end_matches([' ', '\t']).len()..];
        let rest = &before[..before.len() - indent.len()];
        rest.ends_with('\n').then(|| indent.to_owned())
    }
}

/// The opening tag that an element's source begins with. A `>` may stand in an
/// attribute's value.
#[must_use]
pub fn opening_tag(source: &str) -> &str {
    let mut quote = None;
    for (index, byte) in source.bytes().enumerate() {
        match (quote, byte) {
            (None, b'\'' | b'"') => quote = Some(byte),
            (Some(open), _) if open == byte => quote = None,
            (None, b'>') => return &source[..=index],
            _ => {}
        }
    }
    source
}

/// The name, with its prefix, in an element's source.
#[must_use]
pub fn tag_name(source: &str) -> &str {
    let name = source.trim_start_matches('<');
    let end = name.find(|c: char| c.is_whitespace() || c == '/' || c == '>');
    &name[..end.unwrap_or(name.len())]
}

/// `text` as it may stand in an attribute's value or in an element.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}
