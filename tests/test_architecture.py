"""What import-linter (`make imports`) cannot say."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "fastlth_kernels"
ALLOWED = {"numpy", "numba", "llvmlite", "torch", "triton", *sys.stdlib_module_names}


def _imports(path: Path) -> Iterator[str]:
    """Top-level names of a file's absolute imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]


def test_kernels_import_only_what_a_leaf_may() -> None:
    """The package imports itself relatively, so that it can be published under another name."""
    files = sorted(KERNELS.rglob("*.py"))
    assert files
    found = {(path.name, name) for path in files for name in _imports(path) if name not in ALLOWED}
    assert not found
