"""How the CPU kernels are compiled: by numba, without the interpreter's lock, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

HERE = Path(__file__).parent


def compiled(function: F) -> F:
    """``function``, compiled when first called: 3 seconds once per machine, 0.2 from the cache after that.

    Sums may be reassociated and multiplications contracted; NaN and infinity keep their meaning.
    """
    result: F = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})(
        function
    )
    return result


def drop_stale(folder: Path = HERE) -> None:
    """Remove compiled code that is older than any source file here.

    numba looks only at the file in which a function stands, not at the files whose functions it calls.
    """
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for index in (folder / "__pycache__").glob("*.nbi"):
        if index.stat().st_mtime < newest:
            index.unlink(missing_ok=True)


drop_stale()
