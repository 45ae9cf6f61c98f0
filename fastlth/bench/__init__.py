"""What fastlth costs, beside the obvious other ways. Each subject is one file that yields rows."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastlth


def document(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one document of ``fastlth bench ... --json``."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"when": when, "commit": commit(), "machine": machine(), "versions": versions(), "rows": list(rows)}


def commit() -> str | None:
    """The commit of the checkout that this code lies in, "-dirty" where files differ from it; None in no checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # another project's may lie further up
        return None
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"],
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
        return done.stdout.strip() or None
    return None


def machine() -> dict[str, Any]:
    """What the numbers were measured on; ``cores`` are those this process may use, ``mhz`` how fast each of the
    machine's runs now, ``load`` how many processes wanted to run in the last minute (None or empty: not told)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": _cpuinfo("model name")[:1],
        "cores": cores,
        "mhz": [round(float(f)) for f in _cpuinfo("cpu MHz")],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpuinfo(field: str) -> list[str]:
    with contextlib.suppress(OSError):
        return re.findall(rf"^{field}\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return []


def versions() -> dict[str, str]:
    """Of fastlth, Python, torch and numpy."""
    return {
        "fastlth": fastlth.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
