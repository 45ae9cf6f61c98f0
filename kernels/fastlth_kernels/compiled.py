"""How the CPU kernels are compiled: by numba, without the interpreter's lock, kept on disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit, typeof
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])


def sources(folder: Path = Path(__file__).parent) -> str:
    """sha256 (hex) over all source files of this package."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


SOURCES = sources()
_ONE_AT_A_TIME = threading.Lock()


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache looks at the file in which a function stands, not at the files whose functions it calls."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), SOURCES)


def compiled(function: F) -> F:
    """``function``, compiled when first called: ten seconds once per machine for a net's interval, a tenth of one
    from the cache after that.

    Sums may be reassociated and multiplications contracted; NaN and infinity keep their meaning.
    """
    result = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})(function)
    result._cache = _Cache(function)
    typed: F = result
    return typed


def compile_for(function: Any, args: tuple[Any, ...]) -> None:
    """Compile ``function`` for arguments of these types, if it is not compiled yet, while no other thread does.

    Threads that call a function for the first time at once would each compile it, ten seconds of work.
    """
    with _ONE_AT_A_TIME:
        function.compile(tuple(typeof(arg) for arg in args))
