"""A document as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Its content security policy forbids every request, so that a page can be mailed and opened from disk anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from fastlth.report import draw
from fastlth.report.document import Code, Document, Item, Section, Table
from fastlth.report.figure import Curves, Figure, Matrices

MOST_ROWS = 400  # of a figure's numbers in the page; longer ones are in the CSV file alone

CSS = """
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:76rem;margin:0 auto;padding:2.5rem 1.5rem 5rem}
h1{font-size:1.9rem;font-weight:600;letter-spacing:-.01em;margin:0 0 .6rem}
h2{font-size:1.2rem;font-weight:600;margin:3rem 0 1rem;padding-bottom:.35rem;border-bottom:1px solid var(--grid)}
h3{font-size:1rem;font-weight:600;margin:0 0 .5rem}
p{max-width:48rem;margin:.3rem 0}
h2+.note{margin:-.3rem 0 1.2rem}
.note,figcaption,summary,footer{color:var(--muted);font-size:.87rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));
gap:2.4rem 2.2rem;align-items:start}
.grid>*{min-width:0;margin:0}
.wide{grid-column:1/-1}
figure svg{display:block;width:100%;height:auto}
figcaption{margin-top:.5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .9rem .28rem 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{font-weight:600;color:var(--muted)}
th:first-child,td:first-child{text-align:left}
.texts td,.texts th{text-align:left;white-space:normal}
tr.marked td{font-weight:600;color:var(--c0)}
pre{margin:0;padding:.9rem 1.1rem;border:1px solid var(--grid);border-radius:.4rem;overflow-x:auto;
font:.84rem/1.6 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
details{margin-top:.4rem}
details .scroll{max-height:24rem;overflow-y:auto;margin-top:.4rem}
summary{cursor:pointer}
a{color:inherit}
footer{margin-top:4rem}
@media print{main{padding:0}details{display:none}figure,pre,table{break-inside:avoid}}
"""


def render(document: Document, pictures: Mapping[str, str], footer: str = "") -> str:
    """The page. ``pictures`` are the figures' SVG files by name; a figure without one is left out."""
    body = "".join(_section(s, pictures) for s in document.sections)
    lead = "".join(f"<p>{escape(line)}</p>" for line in document.lead)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(document.title)}</title><style>{draw.css()}{CSS}</style></head>\n"
        f"<body><main><h1>{escape(document.title)}</h1>{lead}{body}"
        f"<footer><p>{escape(footer)}</p></footer></main></body></html>\n"
    )


def _section(section: Section, pictures: Mapping[str, str]) -> str:
    items = "\n".join(filter(None, (_item(item, pictures) for item in section.items)))
    if not items:
        return ""
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    return f'\n<section><h2>{escape(section.title)}</h2>{note}<div class="grid">\n{items}\n</div></section>'


def _item(item: Item, pictures: Mapping[str, str]) -> str:
    match item:
        case Table():
            return _table(item)
        case Code():
            lines = escape("\n".join(item.lines))
            return f'<div class="wide"><h3>{escape(item.title)}</h3><pre>{lines}</pre></div>'
        case Curves() | Matrices():
            return _figure(item, pictures[item.name]) if item.name in pictures else ""


def _figure(figure: Figure, svg: str) -> str:
    inline = draw.inline(svg)
    points = re.search(r'width="([\d.]+)pt"', inline)  # letters of all pictures are about as large as the page's
    style = f' style="max-width:{float(points[1]) / 11:.1f}rem"' if points else ""
    inline = inline.replace("<svg", f'<svg role="img" aria-label="{escape(figure.title)}"{style}', 1)
    wide = ' class="wide"' if len(figure.panels) > 1 else ""
    files = ", ".join(f'<a href="{figure.name}.{kind}">{kind.upper()}</a>' for kind in ("csv", "svg", "png"))
    return (f'<figure{wide} id="{figure.name}"><h3>{escape(figure.title)}</h3>{inline}'
            f"<figcaption>{escape(figure.caption)}</figcaption>{_numbers(figure, files)}</figure>")  # fmt: skip


def _numbers(figure: Figure, files: str) -> str:
    """What the picture shows, in full: each cell holds the CSV's value and shows it as people read it."""
    rows = list(zip(figure.rows(), figure.texts(), strict=True))
    if len(rows) > MOST_ROWS:
        return f'<details><summary>Numbers</summary><p class="note">{len(rows):,} rows: {files}</p></details>'
    head = "".join(f"<th>{escape(name)}</th>" for name in figure.header)
    body = "".join(
        "<tr>" + "".join(f'<td><data value="{escape(_plain(v))}">{escape(t)}</data></td>' for v, t in
                         zip(values, texts, strict=True)) + "</tr>"
        for values, texts in rows
    )  # fmt: skip
    return (f'<details><summary>Numbers</summary><p class="note">Files beside this page: {files}</p>'
            f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            "</div></details>")  # fmt: skip


def _plain(value: object) -> str:
    return "" if value is None else str(value)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "".join(_row(row, number == table.marked) for number, row in enumerate(table.rows))
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    numbers = any(cell[:1].isdigit() for row in table.rows for cell in row[1:])
    kind = "" if numbers and len(table.header) > 3 else ' class="texts"'
    wide = ' class="wide"' if len(table.header) > 5 else ""
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return (f'<div{wide}>{title}<div class="scroll"><table{kind}>{head}'
            f"<tbody>{body}</tbody></table></div></div>")  # fmt: skip


def _row(cells: tuple[str, ...], marked: bool) -> str:
    kind = ' class="marked"' if marked else ""
    return f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
