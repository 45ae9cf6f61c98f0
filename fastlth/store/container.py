"""Named arrays in one safetensors file: deterministic bytes, and no byte that may change unnoticed.

    8 bytes   little-endian header length n, a multiple of 8
    n bytes   canonical JSON, then blanks: name -> dtype, shape, data_offsets, and __metadata__
    the rest  the arrays, C order, little-endian, largest element size first, then by name, no gaps

``__metadata__`` holds two hashes besides the caller's strings: ``sha256``, a JSON object with the hash
of each array's bytes, and ``header_sha256``, the hash of the canonical header without that one member.
Any safetensors library reads these files; ``read`` accepts only files ``write`` could have written.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.errors import TicketError
from fastlth.store import atomic, strict_json

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
MAX_HEADER = 8 << 20
"""bytes; the parsed JSON of a hostile header needs some thirty times as much memory"""
MAX_FILE = 1 << 35
_MAX_DIMENSIONS = 32  # numpy 1 allowed no more


@dataclass(frozen=True)
class Slot:
    """Where one array lies: bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Where each array lies in a file, and the file's metadata."""

    slots: dict[str, Slot]
    metadata: dict[str, str]
    file_bytes: int


def damaged(path: Path, why: object) -> TicketError:
    """The error for a file that is not as it was written."""
    return TicketError(f"{path} is damaged or not a fastlth file ({why}); "
                       "use another copy of it, or search again with --fresh")  # fmt: skip


def dtype_name(dtype: np.dtype[Any]) -> str:
    """safetensors' name of a numpy dtype of either byte order. Raises ValueError for unknown ones."""
    for name, known in DTYPES.items():
        if dtype.newbyteorder("<") == known:
            return name
    raise ValueError(f"arrays of {dtype} cannot be stored; use one of: {', '.join(DTYPES)}")


def raw(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array of any layout, C order and little-endian: shape [nbytes]."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8)


def from_raw(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of ``raw``, in native byte order. Raises ValueError for a bool that is neither 0 nor 1."""
    if dtype == "BOOL" and data.size and data.max() > 1:
        raise ValueError("a boolean is neither 0 nor 1")
    return data.view(DTYPES[dtype]).astype(DTYPES[dtype].newbyteorder("="), copy=False).reshape(shape)


def elements(dtype: Any, shape: Any) -> int:
    """How many elements a declared array has. Raises ValueError if dtype or shape is not allowed."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {str(dtype)[:20]!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a shape is not a short list")
    if any(type(n) is not int or not 0 <= n <= MAX_FILE for n in shape):
        raise ValueError("a shape is not of whole numbers")
    return math.prod(shape)


def write(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write arrays of the dtypes in ``DTYPES``, any shapes, atomically.

    Raises OutputError or EnvironmentFailure where the disk refuses, ValueError for what cannot be stored.
    """
    if "__metadata__" in tensors or {"sha256", "header_sha256"} & set(metadata):
        raise ValueError("__metadata__, sha256 and header_sha256 are the container's own names")
    kinds = {name: (dtype_name(a.dtype), tuple(a.shape)) for name, a in tensors.items()}
    buffers = {name: raw(a) for name, a in tensors.items()}
    slots = _layout(kinds)
    hashes = {name: hashlib.sha256(buffer.data).hexdigest() for name, buffer in buffers.items()}
    header = _header_bytes(slots, {**metadata, "sha256": strict_json.dumps(hashes)})
    if len(header) > MAX_HEADER:
        raise ValueError(f"the header would have {len(header)} bytes; at most {MAX_HEADER} are allowed")
    atomic.write(path, [len(header).to_bytes(8, "little"), header, *(buffers[name].data for name in slots)])


def read_header(path: Path, max_bytes: int = MAX_FILE) -> Header:
    """Names, shapes and metadata, checked but for the arrays' own hashes. Raises TicketError."""
    with _open(path) as file:
        return _parse(path, file, max_bytes)


def read(path: Path, max_bytes: int = MAX_FILE) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays and the caller's metadata, every byte checked. Raises TicketError for anything else.

    Needs about as much memory as the file is long, and touches no array before the header is proven.
    """
    with _open(path) as file:
        header = _parse(path, file, max_bytes)
        hashes = strict_json.loads(header.metadata["sha256"])
        tensors = {}
        for name, slot in header.slots.items():
            try:
                buffer = np.empty(slot.end - slot.begin, np.uint8)
                if file.readinto(buffer.data) != len(buffer):
                    raise ValueError("it became shorter while it was read")
                if hashlib.sha256(buffer.data).hexdigest() != hashes[name]:
                    raise ValueError(f"the sha256 of {name!r} differs")
                tensors[name] = from_raw(buffer, slot.dtype, slot.shape)
            except (ValueError, OSError) as error:
                raise damaged(path, error) from error
            except MemoryError as error:
                raise TicketError(f"{path} does not fit into memory ({header.file_bytes} bytes); "
                                  "read it on a larger machine") from error  # fmt: skip
    return tensors, {k: v for k, v in header.metadata.items() if k not in ("sha256", "header_sha256")}


def _layout(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Slot]:
    """The only order and offsets allowed; largest elements first keeps every array aligned."""
    slots, begin = {}, 0
    for name in sorted(kinds, key=lambda n: (-DTYPES[kinds[n][0]].itemsize, n)):
        dtype, shape = kinds[name]
        end = begin + math.prod(shape) * DTYPES[dtype].itemsize
        slots[name] = Slot(dtype, shape, begin, end)
        begin = end
    return slots


def _header_bytes(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    """The padded header; ``metadata`` has every string but ``header_sha256``."""
    header: dict[str, Any] = {
        name: {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [s.begin, s.end]} for name, s in slots.items()
    }
    header["__metadata__"] = dict(metadata)
    digest = hashlib.sha256(strict_json.dumps(header).encode()).hexdigest()
    header["__metadata__"]["header_sha256"] = digest
    text = strict_json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _open(path: Path) -> io.BufferedReader:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise TicketError(f"{path} is not a file; give the path of a .ticket or .safetensors file")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise TicketError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise TicketError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _parse(path: Path, file: io.BufferedReader, max_bytes: int) -> Header:
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise TicketError(f"{path} has {size} bytes, above the {max_bytes} allowed; check the path")
    try:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError("its header does not fit into it")
        text = file.read(length)
        header = strict_json.loads(text.rstrip(b" ").decode("ascii"))
        return _checked(text, header, size)
    except (ValueError, OSError) as error:
        raise damaged(path, error) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "its header has another structure") from error


def _checked(text: bytes, header: Any, size: int) -> Header:
    metadata = header.pop("__metadata__")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    kinds = {}
    for name, entry in header.items():
        elements(entry["dtype"], entry["shape"])
        kinds[name] = (entry["dtype"], tuple(entry["shape"]))
    slots = _layout(kinds)
    # One comparison proves offsets, order, keys, padding and header hash: the header must be the one
    # that ``write`` gives these arrays and metadata.
    if text != _header_bytes(slots, {k: v for k, v in metadata.items() if k != "header_sha256"}):
        raise ValueError("its header does not match its sha256, or its arrays overlap or leave gaps")
    if size != 8 + len(text) + max((s.end for s in slots.values()), default=0):
        raise ValueError("its length is not what its header says")
    hashes = strict_json.loads(metadata["sha256"])
    if hashes.keys() != slots.keys():
        raise ValueError("its list of hashes is not that of its arrays")
    return Header(slots, metadata, size)
