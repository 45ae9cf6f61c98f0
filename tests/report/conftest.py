"""A real, small search, and the report of it; and the numbers of a page read back."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastlth
from fastlth.report import searches, subject
from fastlth.report.write import write
from fastlth.results import Search
from tests.helpers import small_recipe

REINIT, LOSS = "random-reinit", 0.125
COMMAND = "fastlth report 'a run'"


@dataclass(frozen=True)
class Searched:
    parent: Path
    search: Search
    control: list[dict]
    """results of a made-up branch of seed 0, one per round from 1 on"""


@pytest.fixture(scope="session")
def searched(tmp_path_factory) -> Searched:
    out = tmp_path_factory.mktemp("runs")
    search = fastlth.run(small_recipe(prune__rounds=3, train__lr=3e-3), out=out, replicates=2)
    folder = search.replicates[0].path
    control = [
        {**r, "early_stop_test_accuracy": r["early_stop_test_accuracy"] - LOSS, "early_stop_iteration": 40}
        for r in search.replicates[0].rounds[1:]
    ]
    for result in control:
        place = folder / "branches" / f"{REINIT}-0123abcd" / f"round-{result['round']}"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(result))
    return Searched(folder.parent, search, control)


@pytest.fixture(scope="session")
def subjects(searched):
    return subject.read([searched.parent])


@pytest.fixture(scope="session")
def report(searched, subjects, tmp_path_factory) -> Path:
    """The folder of a report of the search."""
    folder = tmp_path_factory.mktemp("report")
    write(searches.document(subjects, COMMAND), folder)
    return folder


class Page(HTMLParser):
    """What tests want of a page: every tag with its attributes, and each figure's table of numbers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: dict[str, list[list[tuple[str, str]]]] = {}
        """figure -> rows of (value, what people see)"""
        self.text = ""
        self._figure = self._value = None
        self._table = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attrs = dict(attributes)
        self.tags.append((tag, attrs))
        if tag == "figure":
            self._figure = attrs["id"]
        elif tag == "table" and attrs.get("class") == "numbers":
            self._table = True
            self.numbers[self._figure] = []
        elif tag == "tr" and self._table:
            self.numbers[self._figure].append([])
        elif tag == "data":
            self._value = attrs["value"]
            self.numbers[self._figure][-1].append((self._value, ""))

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = False
        elif tag == "data":
            self._value = None

    def handle_data(self, data):
        self.text += data
        if self._value is not None:
            rows = self.numbers[self._figure]
            rows[-1][-1] = (self._value, data)


@pytest.fixture(scope="session")
def page(report) -> Page:
    return Page((report / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def table(report):
    """table("seconds") -> the rows of a CSV file as dicts."""

    def read(name):
        with (report / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return read


def renamed(recipe, **changes):
    """A recipe with some fields of its prune section changed."""
    return dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, **changes))
