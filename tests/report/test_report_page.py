"""The page: its numbers are those of the CSV files, and it asks nobody for anything."""

from __future__ import annotations

import re
import shlex

import pytest

import fastlth
from fastlth.report import draw, markdown
from fastlth.report.document import Code, Document, Section, Table
from fastlth.report.figure import Axis, Curves, Look, Panel, Point, Series
from fastlth.report.page import MOST_ROWS, render
from tests.report.conftest import COMMAND, Page

FETCHING = {"script", "link", "iframe", "object", "embed", "img", "image", "base"}
LOADS = {"src", "srcset", "data", "poster", "background", "action", "formaction", "ping", "manifest"}


def external(found: Page, text: str) -> list[str]:
    """Everything in a page that could make a browser fetch something."""
    wrong = [f"{tag} {key}={value}" for tag, attrs in found.tags for key, value in attrs.items()
             if key in LOADS or (key.endswith("href") and tag != "a" and not str(value).startswith("#"))]  # fmt: skip
    wrong += [tag for tag, _ in found.tags if tag in FETCHING]
    wrong += [key for _, attrs in found.tags for key in attrs if key.startswith("on")]
    return wrong + re.findall(r"https?:|//[a-z]|@import|url\((?!#)", text)


def test_nothing_is_fetched(report, page):
    assert external(page, (report / "index.html").read_text()) == []
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links and all((report / link).exists() for link in links)


@pytest.mark.parametrize("text", [
    "<img src=a.png>", "<script>1</script>", "<link rel=stylesheet href=a.css>", "<style>@import 'a.css'</style>",
    "<style>p{background:url(a.png)}</style>", "<p onclick=go()>", "<svg><image href=b.png></svg>",
    "<svg><use href=c.svg#d></svg>", "<a href='https://example.org'>",
])  # fmt: skip
def test_the_search_for_requests_finds_them(text):
    assert external(Page(text), text)


def test_numbers_of_the_page_are_those_of_the_csv(report, page, table):
    files = {f.stem for f in report.glob("*.csv")}
    assert set(page.numbers) == files and len(files) == 11
    for name in files:
        rows = [list(r.values()) for r in table(name)]
        shown = [row for row in page.numbers[name] if row]
        assert [[value for value, _ in row] for row in shown] == rows, name
        for row in shown:
            for value, text in row:
                assert says(text, value), (name, value, text)


def says(text: str, value: str) -> bool:
    """Whether what people read is the value, rounded."""
    try:
        number = float(value)
    except ValueError:
        return text == value
    plain = text.replace(",", "").removesuffix(" %")
    shown = float(plain) / (100 if text.endswith("%") else 1)
    digits = plain.partition(".")[2]
    last = 10.0 ** -(len(digits) + (2 if text.endswith("%") else 0))
    return abs(shown - number) <= max(0.5000001 * last, 5e-4 * abs(number))


def test_says_notices_another_number():
    assert says("97.12 %", "0.97123") and not says("97.22 %", "0.97123")
    assert says("12,345", "12345.2") and not says("12,445", "12345.2")


def test_pictures_lie_beside_the_page(report):
    names = {f.stem for f in report.glob("*.csv")}
    assert {f.stem for f in report.glob("*.svg")} == names == {f.stem for f in report.glob("*.png")}
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in report.glob("*.png"))
    text = (report / "report.md").read_text()
    assert set(re.findall(r"!\[[^]]*\]\(([^)]+)\.png\)", text)) == names
    assert COMMAND in text and "fastlth find-ticket lenet-300-100 digits --preset fast" in text


def test_page_says_recipe_environment_and_commands(page, searched):
    assert searched.search.recipe.digest[:8] in page.text and fastlth.__version__ in page.text
    assert COMMAND in page.text
    assert "as preset fast, except" in page.text and "train.iterations" in page.text
    commands = [line for line in page.text.splitlines() if "fastlth find-ticket" in line]
    assert commands and all("--replicates 2" in line and shlex.split(line) for line in commands)


def test_colours_follow_the_reader():
    """Every colour of an inline picture is a variable with a light and a dark value, but for those of matrix cells."""
    looks = [Look(colour=i, dash=i, marker=i) for i in range(-1, 8)]
    looks += [Look(depth=i / 10) for i in range(11)] + [Look(ring=True), Look(marker=-1), Look(bars=True)]
    points = (Point(1.0, 1.0, 0.5, 2.0), Point(2.0, 1.0, 0.5, 2.0))
    series = tuple(Series(f"s{i}", points, look) for i, look in enumerate(looks))
    figure = Curves("f", "t", "c", Axis("x", "x"), Axis("y", "y"), (Panel("", series),))
    inline = draw.inline(draw.draw(figure)[0])
    assert not re.findall(r"#[0-9a-f]{6}", inline)
    used = set(re.findall(r"var\((--\w+)\)", inline))
    light, dark = re.findall(r":root\{(.*?)\}", draw.css())[:2]
    assert {"--ink", "--c0", "--c6", "--s0", "--s7"} <= used
    for name in used:
        assert f"{name}:" in light and f"{name}:" in dark


def test_two_pictures_share_no_id():
    def one(name, y):
        series = Series("s", (Point(1.0, 1.0), Point(2.0, y)))
        figure = Curves(name, "t", "c", Axis("x", "x"), Axis("y", "y"), (Panel("", (series,)),))
        return draw.inline(draw.draw(figure)[0])

    a, b = one("a", 2.0), one("b", 3.0)
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (a, b)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in ((a, ids[0]), (b, ids[1])):
        assert set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg)) <= own


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = Curves("f", "t", "c", Axis("x", "x"), Axis("y", "y"), (Panel("", (Series("s", (Point(1.0, 1.0),)),)),))
    draw.draw(figure)
    assert dict(matplotlib.rcParams) == before


def test_no_two_of_many_series_look_alike():
    looks = [draw._style(Series("s", (), Look(colour=i, marker=i))) | {"color": draw._colour(Look(colour=i))}
             for i in range(20)]  # fmt: skip
    assert len({(str(s["color"]), str(s["marker"]), str(s["linestyle"])) for s in looks}) == 20
    assert len({(s["color"], s["marker"]) for s in looks}) == 20, "those without a line, too"


def test_same_figure_same_bytes():
    figure = Curves("f", "t", "c", Axis("x", "x"), Axis("y", "y"), (Panel("", (Series("s", (Point(1.0, 1.0),)),)),))
    assert draw.draw(figure) == draw.draw(figure)


def test_hostile_names_stay_text():
    nasty = r'<script>alert("1")</script>$\frac$|&--> #ffffff'
    series = Series(nasty, (Point(1.0, 1.0), Point(2.0, 1.0)))
    figure = Curves("f", nasty, nasty, Axis(nasty, nasty), Axis("y", "y"), (Panel(nasty, (series,)),))
    items = (figure, Table(nasty, (nasty,), ((nasty,),)), Code("c", (nasty,)))
    document = Document(nasty, (nasty,), (Section(nasty, items),))
    html = render(document, {"f": draw.draw(figure)[0]}, nasty)
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert "\\|&" in markdown.render(document, ["f"])


def test_long_tables_stay_out_of_the_page():
    series = Series("s", tuple(Point(float(i), float(i)) for i in range(MOST_ROWS + 1)))
    figure = Curves("f", "t", "c", Axis("x", "x"), Axis("y", "y"), (Panel("", (series,)),))
    html = render(Document("d", (), (Section("s", (figure,)),)), {"f": draw.draw(figure)[0]})
    assert Page(html).numbers == {} and "401 rows" in html


RANGES = [(0.999, 0.999), (0.9985, 0.9996), (0.95, 0.985), (0.1, 0.95), (0.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("low, high", RANGES)
def test_labels_of_an_axis_differ(low, high, monkeypatch):
    """Ticks that are rounded to the same text say nothing; and no accuracy is above 100 %."""
    from matplotlib.figure import Figure as Canvas

    kept = []
    original = Canvas.savefig
    monkeypatch.setattr(Canvas, "savefig", lambda self, *a, **k: (kept.append(self), original(self, *a, **k))[1])
    axis = Axis("y", "y", percent=True)
    series = Series("s", (Point(1.0, low), Point(2.0, high)))
    draw.draw(Curves("f", "t", "c", Axis("x", "x"), axis, (Panel("", (series,)),)))
    kept[0].draw_without_rendering()
    bottom, top = kept[0].axes[0].get_ylim()
    ticks = [t for t in kept[0].axes[0].yaxis.get_major_ticks() if bottom <= t.get_loc() <= top]
    labels = [t.label1.get_text() for t in ticks]
    assert len(labels) >= 3 and len(set(labels)) == len(labels)
    assert [float(text) for text in labels] == [pytest.approx(100 * t.get_loc(), abs=1e-9) for t in ticks]
