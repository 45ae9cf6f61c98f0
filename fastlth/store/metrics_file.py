"""metrics.jsonl: one record per line, only ever appended to, cut to a saved length on resume.

A ticket or state says how long the file was when it was saved; whatever stands behind that (lines of
work that will be repeated, half a line after a crash) is cut off first. So no line comes twice and
none is missing, if the file is synced before its length is saved elsewhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlth.errors import TicketError
from fastlth.store import atomic


class MetricsFile:
    """Append to ``path``, which is created where it is not there.

    Every method raises OutputError or EnvironmentFailure where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | atomic.BINARY, 0o666)
            self._bytes = os.fstat(self._fd).st_size
        except OSError as error:
            raise atomic.explain(error, path) from error

    @property
    def bytes(self) -> int:
        """Length of the file; what a save stores, after ``sync``."""
        return self._bytes

    def write(self, record: Mapping[str, Any]) -> None:
        """One line of strict JSON, handed to the system at once; NaN and infinities become null.

        A line that could not be written whole is taken back.
        """
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        try:
            atomic.write_all(self._fd, line)
        except OSError as error:
            os.ftruncate(self._fd, self._bytes)
            raise atomic.explain(error, self.path) from error
        self._bytes += len(line)

    def sync(self) -> None:
        """Everything written so far survives a power cut from here on."""
        try:
            atomic.sync(self._fd)
        except OSError as error:
            raise atomic.explain(error, self.path) from error

    def cut(self, length: int) -> None:
        """Keep the first ``length`` bytes. Raises TicketError if there are fewer."""
        if length > self._bytes:
            raise TicketError(
                f"{self.path} has {self._bytes} bytes but the saved search has written {length}; "
                "put the missing lines back, or start again with --fresh"
            )
        try:
            os.ftruncate(self._fd, length)
        except OSError as error:
            raise atomic.explain(error, self.path) from error
        self._bytes = length

    def close(self) -> None:
        """Nothing happens the second time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
