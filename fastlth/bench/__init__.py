"""What fastlth costs, beside the obvious other ways. Each subject is one file that yields rows."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import fastlth


def document(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one document of ``fastlth bench ... --json``."""
    return {"machine": machine(), "versions": versions(), "rows": list(rows)}


def machine() -> dict[str, Any]:
    """What the numbers were measured on; ``cores`` are those this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    """Of fastlth, Python, torch and numpy."""
    return {
        "fastlth": fastlth.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
