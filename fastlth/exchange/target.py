"""Where an export goes: never over something else, and whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlth.errors import OutputError
from fastlth.store import atomic


def check(out: Path, *, source: Path, force: bool, folder: Collection[str] = ()) -> None:
    """Raise OutputError unless ``out`` may be written: it is new, or ``force`` may replace it.

    ``folder`` names the files of an exported folder: no other kind of folder is ever replaced.
    """
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder {out.parent}; make it or choose another OUT")
    if not os.path.lexists(out):
        return
    if out.exists() and source.exists() and out.samefile(source):
        raise OutputError(f"{out} is what is being read; choose another OUT")
    if not folder and out.is_dir():
        raise OutputError(f"{out} is a folder; give the path of a file as OUT")
    if not force:
        raise OutputError(f"{out} exists; choose another OUT or replace it with --force")
    if folder and (out.is_symlink() or not out.is_dir() or set(os.listdir(out)) - set(folder)):
        raise OutputError(f"{out} is not a folder of {', '.join(folder)} alone, so --force does not replace it; "
                          "choose another OUT")  # fmt: skip


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """The store's errors in the words of a command that has an OUT. Raises OutputError or EnvironmentFailure."""
    try:
        yield
    except OSError as error:
        raise _explained(error, out) from error
    except OutputError as error:
        cause = error.__cause__
        raise (_explained(cause, out) if isinstance(cause, OSError) else error) from cause


def _explained(error: OSError, out: Path) -> Exception:
    known = atomic.explain(error, out)
    if isinstance(known, OutputError):
        return OutputError(f"cannot write {out} ({error.strerror}); choose another OUT")
    return known


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder that becomes ``out`` at the end. After an error it is gone, and ``out`` is what it was."""
    out = Path(os.path.abspath(out))
    temporary, old = (out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    try:
        temporary.mkdir()
        yield temporary
        if out.exists():
            atomic.replace(out, old)  # a folder cannot be renamed onto one that is not empty
        try:
            atomic.replace(temporary, out)
        except BaseException:
            if old.exists():
                atomic.replace(old, out)
            raise
        atomic.sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
