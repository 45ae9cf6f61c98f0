"""What the whole suite shares. Helpers are in ``tests/helpers.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest


def pytest_report_header() -> str:
    return f"FASTLTH_DATA: {os.environ.get('FASTLTH_DATA') or 'not set, tests of real data are skipped'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Run ``fastlth`` in this process: command("runs", "--json") -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[Any, str, str]:
        from fastlth.cli.main import main

        monkeypatch.setattr(sys, "argv", ["fastlth", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call
