"""A batch made by the kernel has the bits that the loader's augmentation and normalisation give."""

import dataclasses

import pytest
import torch
from fastlth_kernels import batch
from hypothesis import given, settings

from tests.kernels.cases import BATCH, check_batch

CASE = {"shape": (32, 32, 3), "images": 20, "batch": 6, "seed": 4, "key": (2**32 - 1, 1), "epoch": 7,
        "position": 49_920, "augment": "flip-crop", "dtype": torch.float32, "rows": torch.int64}  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(BATCH)
def test_random_batches(case):
    pytest.importorskip("triton")
    from tests.kernels.interpreter import interpreter

    with interpreter():
        check_batch(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("augment", batch.AUGMENTS)
def test_cifar(interpreted, augment, dtype):
    check_batch({**CASE, "augment": augment, "dtype": dtype})


def arguments(**changes):
    generator = torch.Generator().manual_seed(0)
    given_ = {
        "pixels": torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(9),
        "rows": torch.tensor([3, 3, 8]), "table": torch.randn(3, 256, generator=generator), "epoch": torch.tensor(2),
        "position": torch.tensor(5), "key": [1, 2], "augment": "flip-crop", "dtype": torch.bfloat16,
    }  # fmt: skip
    return list({**given_, **changes}.values())


def test_opcheck_and_one_graph():
    torch.library.opcheck(batch.assemble_batch, arguments())
    compiled = torch.compile(lambda *a: batch.assemble_batch(*a), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*arguments()), batch.assemble_batch(*arguments()), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixels", torch.zeros(9, 8, 8, 3)), ("pixels", torch.zeros(9, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)),
        ("table", torch.zeros(1, 256)), ("labels", torch.zeros(8, dtype=torch.int64)), ("rows", torch.zeros(3)),
        ("augment", "crop"), ("dtype", torch.float64),
    ],
)  # fmt: skip
def test_refusals(name, value):
    with pytest.raises(ValueError):
        batch.assemble_batch(*arguments(**{name: value}))


def test_an_empty_batch(interpreted):
    for run in (batch._launch, batch.assemble_batch):
        images, labels = run(*arguments(rows=torch.empty(0, dtype=torch.int64)))
        assert images.shape == (0, 3, 8, 8) and labels.shape == (0,)


def test_bytes():
    assert batch.batch_bytes(2, (32, 32, 3), 2) == 2 * (3072 * 3 + 24)


def test_no_operation_on_colours_is_fused():
    """Which the interpreter would not see: a fused one is rounded once and may end at another level."""
    pytest.importorskip("triton")
    from benchmarks import aot

    [case] = [c for c in batch.aot_cases() if "colours" in c.name]
    assert "fma." not in aot._compile(case, 90).asm["ptx"]
    assert "fma." in aot._compile(dataclasses.replace(case, options={}), 90).asm["ptx"]
