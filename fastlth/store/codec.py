"""An array as byte planes, each Huffman coded where that saves something.

All first bytes, then all second bytes, and so on. Of a float32 the last plane holds sign and exponent,
which are far from uniform, while mantissa bytes are noise and stay as they are. Huffman codes alone
(zlib's Z_HUFFMAN_ONLY) fit both these planes and ``pruned_at``: neither has repeats to find, so looking
for matches costs time and size (VGG-19's masks: 8.97 MB, zstd level 3 10.24). And since such a code
spends at least one bit on a byte, no honest plane grows more than eightfold when read.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.store.container import DTYPES, dtype_name, elements, from_raw, raw

Info = dict[str, Any]
"""{"dtype", "shape", "sha256" of the decoded bytes, "planes": [["huffman" or "raw", bytes], ...]}"""

_SAMPLE = 1 << 16
_WORTH = 0.99  # of the plane's size: a gain below 1 % is not worth coding 20 MB at some 60 MB/s


def describe(array: NDArray[Any]) -> Info:
    """What identifies an array without holding it: dtype, shape and sha256 of its bytes."""
    return {
        "dtype": dtype_name(array.dtype),
        "shape": list(array.shape),
        "sha256": hashlib.sha256(raw(array).data).hexdigest(),
    }


def encode(array: NDArray[Any]) -> tuple[bytes, Info]:
    """The planes, least significant first, one after the other, and what ``decode`` must know.

    Any shape, any dtype of ``container.DTYPES``; every bit is kept, NaN payloads and -0.0 too.
    """
    interleaved = raw(array).reshape(-1, array.dtype.itemsize)
    parts, planes = [], []
    for column in interleaved.T:
        kind, data = _encode_plane(np.ascontiguousarray(column))
        parts.append(data)
        planes.append([kind, len(data)])
    return b"".join(parts), {**describe(array), "planes": planes}


def decode(data: NDArray[np.uint8], info: Info) -> NDArray[Any]:
    """The array ``encode`` was given. Raises ValueError for anything else.

    Allocates at most eight times ``data`` per plane, whatever the declared shape or the stream say.
    """
    dtype, shape, planes = info["dtype"], info["shape"], info["planes"]
    count = elements(dtype, shape)
    if len(planes) != DTYPES[dtype].itemsize or sum(length for _, length in planes) != data.size:
        raise ValueError("its byte planes do not fit its dtype and size")
    if any(type(length) is not int or not 0 <= count <= 8 * length for _, length in planes):
        raise ValueError("it declares more data than it can hold")
    interleaved = np.empty((count, len(planes)), np.uint8)
    start = 0
    for column, (kind, length) in zip(interleaved.T, planes, strict=True):
        column[:] = _decode_plane(kind, data[start : start + length], count)
        start += length
    decoded = interleaved.reshape(-1)
    if hashlib.sha256(decoded.data).hexdigest() != info["sha256"]:
        raise ValueError("its sha256 differs")
    return from_raw(decoded, dtype, tuple(shape))


def _encode_plane(plane: NDArray[np.uint8]) -> tuple[str, bytes]:
    # Huffman codes depend on frequencies alone, so a sample tells whether the whole will shrink.
    sample = np.ascontiguousarray(plane[:: max(1, plane.size // _SAMPLE)])
    if len(_huffman(sample)) < _WORTH * sample.size:
        coded = _huffman(plane)
        if len(coded) < plane.size:
            return "huffman", coded
    return "raw", plane.tobytes()


def _huffman(data: NDArray[np.uint8]) -> bytes:
    # wbits 15 is zlib's window, memLevel 9 its largest blocks: one code table per 32 Ki bytes
    coder = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data.data) + coder.flush()


def _decode_plane(kind: str, data: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    if kind == "raw":
        plane = data
    elif kind == "huffman":
        coder = zlib.decompressobj()
        try:
            decoded = coder.decompress(data.data, count + 1)  # + 1: room to meet the end mark
        except zlib.error as error:
            raise ValueError(f"its zlib stream is broken ({error})") from error
        if not coder.eof or coder.unused_data:
            raise ValueError("its zlib stream is longer or shorter than declared")
        plane = np.frombuffer(decoded, np.uint8)
    else:
        raise ValueError(f"unknown coding {str(kind)[:20]!r} of a byte plane")
    if plane.size != count:
        raise ValueError("a byte plane is longer or shorter than declared")
    return plane
