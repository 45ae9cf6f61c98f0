"""A file is the old one or the new one, never half of each: write beside it, fsync, rename, fsync the folder.

Everything the store does to a disk goes through the five small functions below (``open_new``,
``write_all``, ``sync``, ``replace``, ``remove``), so that a test can make any single one of them fail.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from fastlth.errors import EnvironmentFailure, FastlthError, OutputError

Buffer = bytes | bytearray | memoryview

_OUTPUT = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP,
})  # fmt: skip
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on file sizes is reached",
}
_TEMPORARY = ".tmp"
BINARY: int = getattr(os, "O_BINARY", 0)
"""for os.open: Windows changes line ends otherwise. (No program we start inherits a file, on any system.)"""


def explain(error: OSError, path: Path) -> FastlthError:
    """What a failed write means to a user: OutputError (wrong place) or EnvironmentFailure (all else)."""
    if error.errno in _OUTPUT:
        return OutputError(f"cannot write {path} ({error.strerror}); make it writable or choose another folder")
    reason = _FULL.get(error.errno or 0, error.strerror or str(error))
    return EnvironmentFailure(
        f"{reason}: {path} could not be written; what was saved before is whole, "
        "so make room and start the same command again"
    )


def open_new(path: Path) -> int:
    """A file descriptor to write to a file that must not exist yet; these five raise OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)


def write_all(fd: int, data: Buffer) -> None:
    """Write every byte, however many calls that takes."""
    view = memoryview(data)  # of single bytes
    while view:
        view = view[os.write(fd, view) :]


def sync(fd: int) -> None:
    """Make what was written to a file survive a power cut."""
    os.fsync(fd)


def replace(source: Path, target: Path) -> None:
    """Rename over whatever ``target`` is, in one step."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file."""
    os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Make renames, creations and removals in ``folder`` survive a power cut, where folders can be opened."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        sync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def write(path: Path, data: Buffer | Iterable[Buffer]) -> None:
    """Replace ``path`` by ``data`` (one buffer, or several in order).

    Raises OutputError or EnvironmentFailure, after which ``path`` is whole (the old file, or the new
    one if only the folder's fsync failed) and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        try:
            fd = open_new(temporary)
            try:
                for buffer in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
                    write_all(fd, buffer)
                sync(fd)
            finally:
                os.close(fd)
            replace(temporary, path)
        except BaseException:  # also Ctrl-C: nothing may be left behind
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path) from error


def delete(path: Path) -> None:
    """Remove ``path`` for good; no error if it is not there."""
    try:
        remove(path)
        sync_folder(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise explain(error, path) from error


def make_folders(path: Path) -> None:
    """``mkdir -p`` that survives a power cut. Raises OutputError or EnvironmentFailure."""
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
    except OSError as error:
        raise explain(error, path) from error


def check_folder(folder: Path) -> None:
    """Whether files can be made in ``folder``, which is made where it is missing: asked before hours are spent. Raises
    OutputError or EnvironmentFailure."""
    make_folders(folder)
    probe = folder / f".{secrets.token_hex(4)}{_TEMPORARY}"
    write(probe, b"")
    delete(probe)


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed writer left in ``folder``; the caller holds its lock."""
    for leftover in folder.glob(f".*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)
