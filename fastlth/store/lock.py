"""One writer per run: a lock of the system's on the file ``lock``, in which the holder says who it is.

The system lets go of the lock when its holder ends, however it ends, so there is no stale lock to
recognise: what a dead holder wrote into the file is simply overwritten. The file itself is never
removed, since a lock on a removed file guards nothing. (The filelock package would empty the file while
another process holds it, and with it the name.)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from fastlth.errors import RunLockedError
from fastlth.store import atomic

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    def _take(fd: int) -> None:
        """One byte far behind the name, since locked bytes cannot be read by others."""
        os.lseek(fd, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except PermissionError as error:
            raise BlockingIOError from error
else:

    def _take(fd: int) -> None:
        """Hold the file's lock until it is closed. Raises BlockingIOError if somebody else does."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """Held from construction to ``release``.

    Raises RunLockedError if another process, or another Lock of this one, holds it; OutputError or
    EnvironmentFailure where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | atomic.BINARY, 0o666)
        except OSError as error:
            raise atomic.explain(error, path) from error
        try:
            _take(self._fd)
        except BlockingIOError as error:
            holder = _describe(self._fd)
            os.close(self._fd)
            message = f"{path.parent} is in use by {holder}; wait for it to end, or stop it"
            raise RunLockedError(message) from error
        except OSError as error:
            os.close(self._fd)
            raise atomic.explain(error, path) from error
        with contextlib.suppress(OSError):  # a courtesy: on a full disk the lock holds without a name in it
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            atomic.write_all(self._fd, _name())

    def release(self) -> None:
        """Let go, once; nothing happens the second time."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # closing is what lets go; the name is a courtesy
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def held(path: Path) -> bool:
    """Whether somebody holds the lock of this file now."""
    try:
        fd = os.open(path, os.O_RDWR | atomic.BINARY)
    except OSError:
        return False
    try:
        _take(fd)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _name() -> bytes:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}).encode()


def _describe(fd: int) -> str:
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        holder = json.loads(os.read(fd, 4096))
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError, OSError):  # it has not written its name yet
        return "another process"
