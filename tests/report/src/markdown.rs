//! A document as Markdown. Plots become tables of what they show, if no other table has it, and
//! memory one letter a block.

use std::fmt::Write as _;

use crate::document::{pieces, significant, Bars, BlockKind, Cell, Document, Maps, Part, Table};

/// Letters in a line of a picture of memory.
const LETTERS: usize = 64;

/// Writes `document`.
#[must_use]
pub fn render(document: &Document) -> String {
    let mut text = format!("# {}\n", inline(&document.title));
    for section in &document.sections {
        let _ = write!(text, "\n## {}\n", inline(&section.title));
        let has_words = |part: &&Part| match part {
            Part::Bars(bars) => !bars.in_table,
            Part::Lines(_) => false,
            _ => true,
        };
        for part in section.parts.iter().filter(has_words) {
            text.push('\n');
            match part {
                Part::Text(words) => {
                    let _ = writeln!(text, "{}", inline(words));
                }
                Part::Warning(words) => {
                    let _ = writeln!(text, "> **Note:** {}", inline(words));
                }
                Part::List(items) => {
                    for item in items {
                        let _ = writeln!(text, "* {}", inline(item));
                    }
                }
                Part::Table(shown) => table(&mut text, shown),
                Part::Bars(bars) => table(&mut text, &bars_table(bars)),
                Part::Lines(_) => {}
                Part::Maps(shown) => maps(&mut text, shown),
            }
        }
    }
    text
}

/// What bars show, as a table.
#[must_use]
pub fn bars_table(bars: &Bars) -> Table {
    let names = bars.series.iter().map(|series| series.name.as_str());
    let header = std::iter::once(bars.group.as_str()).chain(names);
    let mut table = Table::new(format!("{}: {}", bars.title, bars.axis), header);
    for (place, name) in bars.groups.iter().enumerate() {
        let values = bars.series.iter().map(|series| series.values[place]);
        let cells = values.map(|value| Cell::summary(value, significant));
        table.row(std::iter::once(Cell::text(name)).chain(cells).collect());
    }
    table
}

fn table(text: &mut String, table: &Table) {
    let _ = writeln!(text, "{}\n", inline(&table.caption));
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let cell = |words: &str| inline(words).replace('|', "\\|");
    text.push_str(&line(table.header.iter().map(|name| cell(name)).collect()));
    let number = |column: usize| {
        !table.rows.iter().any(|row| matches!(row.get(column), Some(Cell::Text(_))))
    };
    let rules = (0..table.header.len()).map(|column| if number(column) { "--:" } else { "---" });
    text.push_str(&format!("|{}|\n", rules.collect::<Vec<_>>().join("|")));
    for row in &table.rows {
        text.push_str(&line(
            row.iter()
                .map(|shown| match shown {
                    Cell::Missed => "**MISSED**".into(),
                    shown => cell(shown.words()),
                })
                .collect(),
        ));
    }
}

fn maps(text: &mut String, maps: &Maps) {
    let _ = writeln!(text, "{}\n", inline(&maps.title));
    let legend = BlockKind::ALL.map(|(_, letter, meaning)| format!("`{letter}` {meaning}"));
    let _ = writeln!(text, "{}.", legend.join(", "));
    for (title, blocks) in &maps.pictures {
        let _ = writeln!(text, "\n{}:\n\n```text", inline(title));
        for line in blocks.chunks(LETTERS) {
            let line: String = line.iter().map(|block| block.letter()).collect();
            let _ = writeln!(text, "{line}");
        }
        text.push_str("```\n");
    }
}

/// Outside of code, nothing is taken for markup.
fn inline(text: &str) -> String {
    let mut written = String::new();
    for (piece, code) in pieces(text) {
        if code {
            let _ = write!(written, "`{piece}`");
            continue;
        }
        for letter in piece.chars() {
            if matches!(letter, '\\' | '<' | '*' | '[' | ']') {
                written.push('\\');
            }
            written.push(letter);
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Section;

    #[test]
    fn a_table_aligns_numbers_and_escapes_what_is_markup() {
        let mut section = Section::new("One <two>");
        let mut table = Table::new("Caption", ["name", "a|b"]);
        table.row(vec![Cell::text("x|y *z*"), Cell::NotMeasured]);
        table.row(vec![Cell::text("`a*`"), Cell::Number("1".into())]);
        section.table(table);
        let document = Document { title: "Title".into(), sections: vec![section] };
        assert_eq!(
            render(&document),
            "# Title\n\n## One \\<two>\n\nCaption\n\n| name | a\\|b |\n|---|--:|\n\
             | x\\|y \\*z\\* | n/m |\n| `a*` | 1 |\n"
        );
    }

    #[test]
    fn memory_is_one_letter_a_block() {
        let mut section = Section::new("Maps");
        let blocks = "Agb.".repeat(20).chars().map(BlockKind::of).collect();
        section.parts.push(Part::Maps(Maps {
            title: "Memory".into(),
            pictures: vec![("gemini, after".into(), blocks)],
        }));
        let text = render(&Document { title: "T".into(), sections: vec![section] });
        assert!(text.contains(&format!(
            "```text\n{}\n{}\n```",
            "Agb.".repeat(16),
            "Agb.".repeat(4)
        )));
    }
}
