//! A document as one HTML page: style and plots are in it, and nothing else is fetched or run.
//! It is well-formed XML, too.

use std::fmt::Write as _;

use crate::charts;
use crate::document::{pieces, Cell, Document, Part, Table};
use crate::markdown::bars_table;
use crate::svg::escape;

const STYLE: &str = "
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff;
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #999; }
.note { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: #fdf3ec; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; }
caption { text-align: left; padding: .3rem 0; font-weight: 600; }
th, td { border: 1px solid #bbb; padding: .2rem .5rem; text-align: left; vertical-align: top; }
th { background: #eee; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.nothing { text-align: right; color: #666; font-style: italic; }
td.met { font-weight: 600; color: #005a43; }
td.missed { font-weight: 700; color: #a03d00; }
figure { margin: 1.5rem 0; }
svg { max-width: 100%; height: auto; }
details { font-size: .9rem; margin-bottom: 1.5rem; }
code { font-size: .92em; background: #f2f2f2; white-space: nowrap; }
nav ol { columns: 2; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; }
  figure, tr { break-inside: avoid; } nav, details { display: none; } .scroll { overflow: visible; } }
";

/// Writes `document`.
#[must_use]
pub fn render(document: &Document) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n\
         <meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
        title = escape(&document.title)
    );
    page.push_str("<nav aria-label=\"Contents\"><ol>\n");
    for (place, section) in document.sections.iter().enumerate() {
        let _ = writeln!(page, "<li><a href=\"#s{place}\">{}</a></li>", inline(&section.title));
    }
    page.push_str("</ol></nav>\n");
    for (place, section) in document.sections.iter().enumerate() {
        let _ = writeln!(page, "<h2 id=\"s{place}\">{}</h2>", inline(&section.title));
        for (number, part) in section.parts.iter().enumerate() {
            // What refers to something within a plot has to be told from all others of the page.
            write_part(&mut page, part, &format!("p{place}-{number}"));
        }
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn write_part(page: &mut String, part: &Part, id: &str) {
    let _ = match part {
        Part::Text(text) => writeln!(page, "<p>{}</p>", inline(text)),
        Part::Warning(text) => writeln!(page, "<p class=\"note\">{}</p>", inline(text)),
        Part::List(items) => {
            page.push_str("<ul>\n");
            for item in items {
                let _ = writeln!(page, "<li>{}</li>", inline(item));
            }
            writeln!(page, "</ul>")
        }
        Part::Table(shown) => {
            table(page, shown);
            Ok(())
        }
        Part::Bars(bars) => {
            let _ = writeln!(page, "<figure>\n{}</figure>", charts::bars(bars, id));
            if !bars.in_table {
                page.push_str("<details><summary>The numbers</summary>\n");
                table(page, &bars_table(bars));
                page.push_str("</details>\n");
            }
            Ok(())
        }
        Part::Lines(lines) => {
            writeln!(page, "<figure>\n{}</figure>", charts::lines(lines, id))
        }
        Part::Maps(maps) => writeln!(page, "<figure>\n{}</figure>", charts::maps(maps, id)),
    };
}

fn table(page: &mut String, table: &Table) {
    let _ = writeln!(
        page,
        "<div class=\"scroll\"><table>\n<caption>{}</caption>",
        inline(&table.caption)
    );
    page.push_str("<thead><tr>");
    for name in &table.header {
        let _ = write!(page, "<th scope=\"col\">{}</th>", inline(name));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for cell in row {
            let class = match cell {
                Cell::Text(_) => "words",
                Cell::Number(_) => "number",
                Cell::NotMeasured | Cell::Failed => "nothing",
                Cell::Met => "met",
                Cell::Missed => "missed",
            };
            let _ = write!(page, "<td class=\"{class}\">{}</td>", inline(cell.words()));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
}

fn inline(text: &str) -> String {
    pieces(text)
        .map(|(piece, code)| match escape(piece) {
            piece if code => format!("<code>{piece}</code>"),
            piece => piece,
        })
        .collect()
}
