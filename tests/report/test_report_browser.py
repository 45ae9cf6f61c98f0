"""The page in a real browser: no console error, and not one request leaves it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


def visit(page, folder, *, dark=False):
    """(console messages, addresses the page asked for, bytes of a screenshot)

    Nothing gets out: the proxy is a closed port. Browsers ask for things of their own, with "not an origin" as the
    initiator in their log; what a page asks for has the page's.
    """
    shot, log = folder / "shot.png", folder / "net.json"
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>",
         "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
         "--window-size=1280,2400", f"--screenshot={shot}",
         *(["--blink-settings=preferredColorScheme=0"] if dark else []), page.absolute().as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.exists(), done.stderr[-2000:]
    events = [parameters(line) for line in log.read_text(errors="replace").splitlines()]
    asked = [e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked, shot.read_bytes()


def parameters(line):
    """Of one event of the log, which stand one a line."""
    try:
        return json.loads(line.rstrip(",")).get("params", {})
    except ValueError:
        return {}


def brightness(png: bytes) -> float:
    """Mean of all pixels, 0 black to 1 white."""
    import matplotlib.image

    return float(matplotlib.image.imread(io.BytesIO(png))[..., :3].mean())


def test_the_page_is_quiet_by_day_and_by_night(report, tmp_path):
    means = []
    for dark in (False, True):
        console, asked, shot = visit(report / "index.html", tmp_path, dark=dark)
        assert console == [] and asked == []
        means.append(brightness(shot))
    assert 0.8 < means[0] < 0.99 and 0.01 < means[1] < 0.3  # paper and night, each with something on it


def test_a_page_that_is_not_quiet_is_noticed(tmp_path):
    page = tmp_path / "loud.html"
    page.write_text("<script>console.error('ouch')</script><img src='http://example.org/a.png'>")
    console, asked, _ = visit(page, tmp_path)
    assert any("ouch" in line for line in console) and asked == ["http://example.org/a.png"]


def test_the_policy_stops_what_a_page_should_not_ask_for(report, tmp_path):
    text = (report / "index.html").read_text(encoding="utf-8")
    page = tmp_path / "with-a-picture.html"
    page.write_text(text.replace("<main>", "<main><img src='http://example.org/a.png'>"), encoding="utf-8")
    console, asked, _ = visit(page, tmp_path)
    assert asked == [] and any("Content Security Policy" in line for line in console)
