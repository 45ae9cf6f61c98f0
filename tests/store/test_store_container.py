"""The safetensors container: any library reads it, no byte changes unnoticed, hostile files cost nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors import safe_open

from fastlth.errors import TicketError
from fastlth.store import container, strict_json

ROOT = Path(__file__).parents[2]
Arrays = dict[str, NDArray[Any]]


def small() -> tuple[Arrays, dict[str, str]]:
    return (
        {"w": np.array([[1.5, -0.0], [np.nan, 3]], np.float32), "n": np.array(7), "e": np.zeros((0, 3), np.float16),
         "mask": np.array([True, False]), "u": np.arange(5, dtype=np.uint8)},
        {"format": "test", "note": 'quote " and \u00e9 and \U0001f600'},
    )  # fmt: skip


def assert_equal(got: Arrays, wanted: Arrays) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
        assert got[name].tobytes() == array.tobytes()


def test_round_trip_and_what_safetensors_reads(tmp_path: Path) -> None:
    tensors, metadata = small()
    path = tmp_path / "a.safetensors"
    container.write(path, tensors, metadata)
    got, strings = container.read(path)
    assert_equal(got, tensors)
    assert strings == metadata
    with safe_open(path, "numpy") as file:
        assert_equal({name: file.get_tensor(name) for name in file.keys()}, tensors)
        assert metadata.items() <= file.metadata().items()


def test_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    tensors, metadata = small()
    container.write(tmp_path / "a", tensors, metadata)
    container.write(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_lie_by_size_then_name_so_that_all_are_aligned(tmp_path: Path) -> None:
    kinds = {"b": "F32", "a": "U8", "z": "F64", "c": "F32", "B": "F32"}
    container.write(tmp_path / "a", {n: np.zeros(3, container.DTYPES[d]) for n, d in kinds.items()}, {})
    header = container.read_header(tmp_path / "a")
    assert [(n, s.begin) for n, s in header.slots.items()] == [("z", 0), ("B", 24), ("b", 36), ("c", 48), ("a", 60)]
    assert (tmp_path / "a").read_bytes()[0] % 8 == 0


@settings(deadline=None, max_examples=60)
@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
        st.sampled_from(sorted(container.DTYPES)).flatmap(
            lambda d: hnp.arrays(container.DTYPES[d], hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        ),
        max_size=5,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=4),
)
def test_any_arrays_and_strings_come_back(
    tmp_path_factory: pytest.TempPathFactory, arrays: Arrays, metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("c") / "any.safetensors"
    container.write(path, arrays, metadata)
    got, strings = container.read(path)
    assert_equal(got, arrays)
    assert strings == metadata


def test_every_value_of_every_byte_matters(tmp_path: Path) -> None:
    path, changed = tmp_path / "a", tmp_path / "b"
    container.write(path, {"w": np.array([1, 2], np.int16)}, {"k": "v"})
    good = path.read_bytes()
    for position in range(len(good)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255, 0x20 ^ 0x0A):
            changed.write_bytes(good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :])
            with pytest.raises(TicketError):
                container.read(changed)


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    tensors, metadata = small()
    path, changed = tmp_path / "a", tmp_path / "b"
    container.write(path, tensors, metadata)
    good = path.read_bytes()
    for data in [*(good[:n] for n in range(len(good))), good + b"\0", good + b" ", good + good]:
        changed.write_bytes(data)
        with pytest.raises(TicketError):
            container.read(changed)


def forge(header: Any, data: bytes = b"", *, sign: bool = True) -> bytes:
    """A file with this header, honestly hashed where that is possible."""
    if sign:
        slots = {k: v for k, v in header.items() if k != "__metadata__"}
        hashes = {k: hashlib.sha256(data[slice(*v["data_offsets"])]).hexdigest() for k, v in slots.items()}
        header["__metadata__"] = {**header.get("__metadata__", {}), "sha256": strict_json.dumps(hashes)}
        digest = hashlib.sha256(strict_json.dumps(header).encode()).hexdigest()
        header["__metadata__"]["header_sha256"] = digest
    text = header if isinstance(header, bytes) else strict_json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def slot(begin: Any, end: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_the_forger_makes_good_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(forge({"a": slot(0, 4), "b": slot(4, 8)}, b"abcdefgh"))
    assert {k: v.tobytes() for k, v in container.read(path)[0].items()} == {"a": b"abcd", "b": b"efgh"}


def _twice() -> bytes:
    good = forge({"a": slot(0, 4)}, b"abcd")
    length = int.from_bytes(good[:8], "little")
    text = good[8 : 8 + length].rstrip()
    return forge(text[:-1] + b"," + text[1:], b"abcd", sign=False)


def _spaced() -> bytes:
    good = forge({"a": slot(0, 4)}, b"abcd")
    length = int.from_bytes(good[:8], "little")
    return forge(json.dumps(json.loads(good[8 : 8 + length])).encode(), b"abcd", sign=False)


def _hashes(hashes: Any) -> bytes:
    header: dict[str, Any] = {"a": slot(0, 4), "__metadata__": {"sha256": strict_json.dumps(hashes)}}
    header["__metadata__"]["header_sha256"] = hashlib.sha256(strict_json.dumps(header).encode()).hexdigest()
    return forge(strict_json.dumps(header).encode(), b"abcd", sign=False)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "no header": lambda: bytes(8),
    "header of 2**63 bytes": lambda: (1 << 63).to_bytes(8, "little") + b"{}",
    "header longer than the file": lambda: (100).to_bytes(8, "little") + b"{}",
    "header of 9 MB": lambda: forge(b"{}" + b" " * 9_000_000, sign=False),
    "deep lists": lambda: forge(b"[" * 4_000_000 + b"]" * 4_000_000, sign=False),
    "deep lists, never closed": lambda: forge(b"[" * 8_000_000, sign=False),
    "deep objects": lambda: forge(b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000, sign=False),
    "many empty lists": lambda: forge(b"[" + b"[]," * 2_600_000 + b"[]]", sign=False),
    "a number of a million digits": lambda: forge(b'{"a":' + b"9" * 1_000_000 + b"}", sign=False),
    "a list": lambda: forge(b"[]", sign=False),
    "null": lambda: forge(b"null", sign=False),
    "NaN": lambda: forge(b'{"__metadata__":{"a":NaN}}', sign=False),
    "not UTF-8": lambda: forge(b'{"\xff":1}', sign=False),
    "no metadata": lambda: forge(b"{}", sign=False),
    "metadata is a list": lambda: forge(b'{"__metadata__":[]}', sign=False),
    "metadata is a number": lambda: forge({"__metadata__": {"a": 1}}),
    "no hashes": lambda: forge(b'{"__metadata__":{}}', sign=False),
    "honest, but a header of 9 MB": lambda: forge({"__metadata__": {"long": "x" * 9_000_000}}),
    "a hash too few": lambda: _hashes({}),
    "a hash too many": lambda: _hashes({"a": hashlib.sha256(b"abcd").hexdigest(), "b": ""}),
    "hashes are a list": lambda: _hashes(["a"]),
    "hash of another array": lambda: _hashes({"a": hashlib.sha256(b"abce").hexdigest()}),
    "a key twice": _twice,
    "white space": _spaced,
    "overlap": lambda: forge({"a": slot(0, 4), "b": slot(2, 6)}, b"abcdef"),
    "all the same bytes": lambda: forge({f"{n:03}": slot(0, 4) for n in range(999)}, b"abcd"),
    "gap": lambda: forge({"a": slot(0, 4), "b": slot(5, 8)}, b"abcdefgh"),
    "gap at the start": lambda: forge({"a": slot(4, 8)}, b"abcdefgh"),
    "out of order": lambda: forge({"a": slot(4, 8), "b": slot(0, 4)}, b"abcdefgh"),
    "backwards": lambda: forge({"a": slot(4, 0, shape=[4])}, b"abcd"),
    "negative": lambda: forge({"a": slot(-4, 0)}, b"abcd"),
    "past the end": lambda: forge({"a": slot(0, 1 << 39)}, b"abcd"),
    "shape too small": lambda: forge({"a": slot(0, 4, shape=[3])}, b"abcd"),
    "shape too large": lambda: forge({"a": slot(0, 4, shape=[1 << 39])}, b"abcd"),
    "shape overflows": lambda: forge({"a": slot(0, 4, shape=[1 << 32, 1 << 32, 4])}, b"abcd"),
    "shape overflows beside a zero": lambda: forge({"a": slot(0, 0, shape=[0, 1 << 40, 1 << 40])}),
    "shape of floats": lambda: forge({"a": slot(0, 4, shape=[4.0])}, b"abcd"),
    "shape of booleans": lambda: forge({"a": slot(0, 1, shape=[True])}, b"a"),
    "shape of 10,000 dimensions": lambda: forge({"a": slot(0, 1, shape=[1] * 10_000)}, b"a"),
    "unknown dtype": lambda: forge({"a": slot(0, 4, dtype="BF16", shape=[2])}, b"abcd"),
    "dtype is a list": lambda: forge({"a": slot(0, 4, dtype=["U8"])}, b"abcd"),
    "entry is not an object": lambda: forge(b'{"__metadata__":{},"a":7}', sign=False),
    "entry has another key": lambda: forge({"a": {**slot(0, 4), "more": 1}}, b"abcd"),
    "a boolean of 2": lambda: forge({"a": slot(0, 1, dtype="BOOL")}, b"\x02"),
    "bytes behind the data": lambda: forge({"a": slot(0, 4)}, b"abcde"),
}

CHILD = """
import resource, sys
from pathlib import Path
from fastlth.errors import TicketError
from fastlth.store import container
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for name in sys.argv[1:]:
    try:
        container.read(Path(name))
        print("ACCEPTED", name)
    except TicketError as error:
        assert name in str(error), error
        print("refused")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory limit needs /proc")
def test_hostile_files_are_refused_within_a_memory_limit(tmp_path: Path) -> None:
    for number, make in enumerate(HOSTILE.values()):
        (tmp_path / f"{number:02}").write_bytes(make())
    huge = tmp_path / "98"  # honest header length, 64 GiB of nothing
    huge.write_bytes((16).to_bytes(8, "little") + b"{}              ")
    os.truncate(huge, 1 << 36)
    sparse = tmp_path / "99"  # all honest, but 16 GiB of zeros: more memory than there is
    sparse.write_bytes(forge({"a": slot(0, 1 << 34)}))
    os.truncate(sparse, sparse.stat().st_size + (1 << 34))
    names = sorted(str(p) for p in tmp_path.iterdir())
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *names],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
    assert child.stderr == ""
    assert child.stdout == "refused\n" * len(names)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[name]())
    with pytest.raises(TicketError, match="is damaged or not a fastlth file") as caught:
        container.read(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match=r"there is no file .*missing"):
        container.read(tmp_path / "missing")
    with pytest.raises(TicketError, match="is not a file"):
        container.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(TicketError, match="is not a file"):
        container.read(tmp_path / "pipe")


def test_max_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    container.write(path, *small())
    size = path.stat().st_size
    container.read(path, max_bytes=size)
    with pytest.raises(TicketError, match=f"{size} bytes, above the {size - 1} allowed"):
        container.read(path, max_bytes=size - 1)


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    cases: list[tuple[Arrays, dict[str, str]]] = [
        ({"__metadata__": np.zeros(1)}, {}),
        ({}, {"sha256": ""}),
        ({}, {"header_sha256": ""}),
        ({}, {"long": "x" * container.MAX_HEADER}),
        ({"c": np.zeros(1, np.complex128)}, {}),
    ]
    for tensors, metadata in cases:
        with pytest.raises(ValueError):
            container.write(path, tensors, metadata)
        assert list(tmp_path.iterdir()) == []
