"""A document as markdown, with the PNG pictures beside it: for a repository or an issue."""

from __future__ import annotations

from collections.abc import Sequence

from fastlth.report.document import Code, Document, Item, Table
from fastlth.report.figure import Curves, Matrices


def render(document: Document, pictures: Sequence[str], footer: str = "") -> str:
    """``pictures`` are the names of the figures that were drawn; others are left out."""
    parts = [f"# {document.title}", *document.lead]
    for section in document.sections:
        items = [text for item in section.items if (text := _item(item, pictures))]
        if items:
            parts += [f"## {section.title}", *([section.note] if section.note else []), *items]
    return "\n\n".join([*parts, *([footer] if footer else [])]) + "\n"


def _item(item: Item, pictures: Sequence[str]) -> str:
    match item:
        case Table():
            width = max(map(len, (item.header, *item.rows)))
            head = item.header or [" "] * width  # markdown has no table without a head
            lines = [_row(head), _row(["---"] * width), *(_row(row) for row in item.rows)]
            return (f"**{item.title}**\n\n" if item.title else "") + "\n".join(lines)
        case Code():
            return f"**{item.title}**\n\n```\n" + "\n".join(item.lines) + "\n```"
        case Curves() | Matrices():
            if item.name not in pictures:
                return ""
            below = f"{item.caption} Numbers: [{item.name}.csv]({item.name}.csv)".strip()
            return f"### {item.title}\n\n![{item.title}]({item.name}.png)\n\n{below}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
