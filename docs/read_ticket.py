"""A second reader of search.ticket: `python docs/read_ticket.py search.ticket` prints all densities."""

import hashlib
import json
import struct
import sys
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}  # fmt: skip


def check(good: bool, what: str) -> None:
    if not good:
        sys.exit(f"damaged ticket: {what}")


def decode(data: bytes, info: dict[str, Any]) -> NDArray[Any]:
    """The array behind byte planes."""
    planes, start = [], 0
    for kind, length in info["planes"]:
        part = data[start : start + length]
        planes.append(np.frombuffer(zlib.decompress(part) if kind == "huffman" else part, np.uint8))
        start += length
    raw = np.stack(planes, axis=1).tobytes()
    check(hashlib.sha256(raw).hexdigest() == info["sha256"], "an array's sha256 differs")
    return np.frombuffer(raw, DTYPES[info["dtype"]]).reshape(info["shape"])


def read(path: str) -> tuple[dict[str, Any], dict[str, dict[str, NDArray[Any]]]]:
    """(description, arrays of "rewind", "pruned_at" and "fill"); a ticket that keeps a seed has no rewind values."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text, data = file.read(length).decode().rstrip(" "), file.read()
    header = json.loads(text)
    meta = header.pop("__metadata__")
    without = text.replace(f'"header_sha256":"{meta["header_sha256"]}",', "")
    check(hashlib.sha256(without.encode()).hexdigest() == meta["header_sha256"], "header's sha256 differs")
    check((meta["format"], meta["schema"]) == ("fastlth ticket", "1"), "not a ticket of schema 1")
    part = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    for name, digest in json.loads(meta["sha256"]).items():
        check(hashlib.sha256(part[name]).hexdigest() == digest, f"the sha256 of {name} differs")
    ticket = json.loads(meta["ticket"])
    kinds = {kind: ticket.get(kind, {}) for kind in ("rewind", "pruned_at", "fill")}
    stored = {**kinds, "rewind": {}} if "theta0_seed" in ticket else kinds
    return ticket, {k: {n: decode(part[f"{k}/{n}"], info) for n, info in a.items()} for k, a in stored.items()}


if __name__ == "__main__":
    ticket, arrays = read(sys.argv[1])
    for number in range(len(ticket["rounds"])):
        removed = sum(int(((at > 0) & (at <= number)).sum()) for at in arrays["pruned_at"].values())
        print(number, 1 - removed / ticket["all_weights"])
