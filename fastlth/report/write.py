"""A document as files in one folder: the page, markdown, and for each figure its CSV, SVG and PNG."""

from __future__ import annotations

from pathlib import Path

from fastlth.report import draw, markdown, page
from fastlth.report.document import Document
from fastlth.report.figure import to_csv
from fastlth.store import atomic

PAGE, MARKDOWN = "index.html", "report.md"


def write(document: Document, folder: Path, footer: str = "") -> Path:
    """Write all files and return the page's path. Figures without a single value are left out.

    Files of an earlier report with the same names are replaced, others stay. Raises OutputError or EnvironmentFailure
    where the folder cannot be written, RecipeError without matplotlib.
    """
    figures = [f for f in document.figures if not f.empty]
    drawn = {f.name: draw.draw(f) for f in figures}
    pages = {
        **{f"{f.name}.csv": to_csv(f).encode() for f in figures},
        **{f"{name}.svg": svg.encode() for name, (svg, _) in drawn.items()},
        **{f"{name}.png": png for name, (_, png) in drawn.items()},
        MARKDOWN: markdown.render(document, list(drawn), footer).encode(),
        PAGE: page.render(document, {name: svg for name, (svg, _) in drawn.items()}, footer).encode(),
    }
    atomic.make_folders(folder)
    for name, content in pages.items():
        atomic.write(folder / name, content)
    return folder / PAGE
