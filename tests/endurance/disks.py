"""A disk under one folder that fails when told to: at any single call that changes something."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REAL_OPEN, REAL_CLOSE = os.open, os.close
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Death(BaseException):
    """The process is gone; nothing catches this, and whatever is done on the way out reaches no disk."""


class Disk:
    """Counts the calls to the system that change files below ``root``, and fails the one at ``fail_at``.

    ``how``: "full" and "broken" (ENOSPC, EIO; half of a failing write arrives) fail that one call; "killed" ends
    the process there; "power" too, and what was not synced is lost: contents go back to the last fsync of the
    file, renames, creations and removals to the last fsync of the folder.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self.how, self.fail_at = str(root), "", -1
        self.calls: list[tuple[str, str]] = []
        """(call, file name without its random part)"""
        self.dead = False
        self._open: dict[int, str] = {}
        self._synced: dict[str, bytes] = {}
        self._undo: dict[str, list[Callable[[], None]]] = {}
        monkeypatch.setattr(os, "open", self._opened)
        monkeypatch.setattr(os, "close", self._closed)
        for name in ("write", "fsync", "ftruncate", "replace", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def fail(self, at: int, how: str) -> None:
        self.calls, self.fail_at, self.how = [], at, how

    def heal(self) -> None:
        """A new process, on what the old one left."""
        lost = self.dead and self.how == "power"
        self.dead = False
        self.fail(-1, "")
        for fd in list(self._open):
            os.close(fd)
        synced, self._synced = self._synced, {}
        folders, self._undo = self._undo, {}
        if lost:
            for path, content in synced.items():
                if os.path.exists(path):
                    Path(path).write_bytes(content)
            for folder in folders.values():
                for undo in reversed(folder):
                    undo()
            self._undo = {}

    def _opened(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        name = os.fspath(path)
        if not isinstance(name, str) or not name.startswith(self.root):
            return REAL_OPEN(path, flags, *args, **kwargs)
        new = bool(flags & os.O_CREAT) and not os.path.exists(name)
        if flags & WRITING:
            self._count("open", name)
        fd = REAL_OPEN(path, flags, *args, **kwargs)
        self._open[fd] = name
        if new:
            self._synced[name] = b""
            self._later(name, lambda: Path(name).unlink(missing_ok=True))
        elif flags & WRITING:
            self._synced.setdefault(name, Path(name).read_bytes())
        return fd

    def _closed(self, fd: int) -> None:
        self._open.pop(fd, None)
        REAL_CLOSE(fd)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._open.get(target, "") if isinstance(target, int) else os.fspath(target)
            if not path.startswith(self.root):
                return call(target, *args, **kwargs)
            half = (lambda: call(target, memoryview(args[0])[: len(args[0]) // 2])) if name == "write" else None
            self._count(name, path, half)
            if name == "replace":
                self._before_replace(path, os.fspath(args[0]))
            elif name == "unlink":
                content = Path(path).read_bytes() if os.path.exists(path) else b""
                self._later(path, lambda: Path(path).write_bytes(content))
            result = call(target, *args, **kwargs)
            if name == "fsync":
                self._undo.pop(path, None)
                if os.path.isfile(path):
                    self._synced[path] = Path(path).read_bytes()
            return result

        return wrapped

    def _before_replace(self, source: str, target: str) -> None:
        new, old = Path(source).read_bytes(), Path(target).read_bytes() if os.path.exists(target) else None
        assert self._synced[source] == new, f"{source} was renamed before it was synced"
        self._synced[target] = self._synced.pop(source)

        def undo() -> None:
            Path(target).unlink() if old is None else Path(target).write_bytes(old)
            Path(source).write_bytes(new)

        self._later(target, undo)

    def _later(self, path: str, undo: Callable[[], Any]) -> None:
        self._undo.setdefault(os.path.dirname(path), []).append(undo)

    def _count(self, call: str, path: str, half: Callable[[], Any] | None = None) -> None:
        if self.dead:
            raise Death
        name = os.path.basename(path)
        self.calls.append((call, name.split(".")[1] + " (temporary)" if name.endswith(".tmp") else name))
        if len(self.calls) - 1 != self.fail_at:
            return
        if half is not None:
            half()
        if self.how in ("killed", "power"):
            self.dead = True
            raise Death
        raise OSError({"full": errno.ENOSPC, "broken": errno.EIO}[self.how], "injected", path)
