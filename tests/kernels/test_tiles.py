"""Which configuration the masked kernels take, and that each was compiled: nothing that a net launches is left out of
``python -m benchmarks.aot``, which holds that none of it spills."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from fastlth_kernels import masked_conv, masked_linear
from fastlth_kernels import masked_linear_kernels as linear_kernels
from fastlth_kernels.launch import AotCase
from fastlth_kernels.tiles import FP32, LARGE, ODD, SMALL, choose

pytest.importorskip("triton")

from fastlth.bench.kernels import layers
from fastlth.models import make
from tests.kernels import launches
from tests.kernels.launches import Launch
from tests.kernels.masked_problems import Conv, Linear

CASES = [*masked_linear.aot_cases(), *masked_conv.aot_cases()]
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
         (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]  # fmt: skip
NETS = {"lenet-300-100": (1, 28, 28), "conv-2": (3, 32, 32), "conv-4": (3, 32, 32), "conv-6": (3, 32, 32),
        "vgg19": (3, 32, 32), "resnet-20": (3, 32, 32), "resnet-18": (3, 32, 32)}  # fmt: skip


def lengths(kernel: Any, aligned: Iterable[str]) -> set[str]:
    """Those of the operands' rows that divide by 16: they decide how wide the loads are."""
    rows = {"K", "IN"} if kernel.fn.__name__ == "_forward" else {"K", "N", "IN", "OUT", "n"}
    return rows & set(aligned)


def covers(case: AotCase, launch: Launch) -> bool:
    """The same kernel and tile for numbers of the same widths, and the same rows that divide by 16. A case in which
    none does stands for all launches in which not all do: more is loaded one by one in it than in any other."""
    if (case.kernel, case.num_warps, case.num_stages) != (launch.kernel, launch.warps, launch.stages):
        return False
    if any(case.constants[name] != value for name, value in launch.constants.items() if "BLOCK" in name):
        return False
    theirs, ours = ({n: t[-2:] for n, t in types.items() if "*" in t} for types in (case.signature, launch.types))
    known, found = lengths(case.kernel, case.aligned), lengths(launch.kernel, launch.aligned)
    everything = lengths(launch.kernel, launch.kernel.arg_names)
    return theirs == ours and (known == found or (not known and found != everything))


def never_compiled(found: Iterable[Launch]) -> list[Launch]:
    return [launch for launch in found if not any(covers(case, launch) for case in CASES)]


@pytest.mark.parametrize("dtypes", TYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_all_that_a_net_launches_was_compiled(name, dtypes):
    with torch.device("meta"):
        net = make(name, NETS[name], 10, batch_norm=False).eval()
    for batch in (60, 64, 128, 512):
        for layer in layers(net, batch, NETS[name]):
            replicates = (1, 5, 32) if name.startswith("lenet") else (1,)
            for count in replicates:
                found = launches.of_layer(layer.module, layer.images, *dtypes, replicates=count)
                assert not never_compiled(found), f"{layer}, {count} replicates"


SIZES = [1, 10, 16, 100, 128, 300, 512, 4096]


@pytest.mark.parametrize("dtypes", TYPES, ids=str)
def test_all_that_any_layer_launches_was_compiled(dtypes):
    for copies, rows, N, K in itertools.product((1, 32), (1, 60, 2048), SIZES, SIZES):
        assert not never_compiled(launches.linear((copies, rows, N, K), *dtypes)), (copies, rows, N, K)
    for batch, IN, OUT, stride in itertools.product((1, 512), SIZES[:-1], SIZES[:-1], (1, 2)):
        for taps in (1, 3):
            found = launches.conv((batch, IN, 8, 8), (OUT, IN, taps, taps), stride, taps // 2, *dtypes)
            assert not never_compiled(found), (batch, IN, OUT, stride, taps)


def test_a_configuration_that_was_never_compiled_is_found(monkeypatch):
    """Rows of 100 in the tiles for rows that divide by 16: they would spill."""
    monkeypatch.setattr(linear_kernels, "choose", lambda rows, columns, copies, dtype, *lengths: SMALL)
    assert never_compiled(launches.linear((1, 60, 100, 300), torch.bfloat16, torch.float32))
    assert not never_compiled(launches.linear((1, 60, 96, 304), torch.bfloat16, torch.float32))


def test_every_configuration_is_for_something():
    found = {
        choose(*sizes, copies, dtype, *lengths)
        for sizes in itertools.product((64, 65, 4096), repeat=2)
        for copies in (1, 128)
        for dtype in (torch.float32, torch.bfloat16)
        for lengths in ((), (48,), (48, 3))
    }
    assert found == {FP32, SMALL, LARGE, ODD}


def test_large_tiles_only_where_they_are_filled_and_many():
    assert choose(512, 4096, 1, torch.bfloat16, 512) == LARGE  # 4 x 32 of them
    assert choose(512, 4095 - 128, 1, torch.bfloat16, 512) == SMALL
    assert choose(64, 1 << 16, 1, torch.bfloat16, 64) == SMALL
    assert choose(512, 4096, 1, torch.bfloat16, 512, 300) == ODD


@pytest.mark.parametrize("tiles", [FP32, SMALL, LARGE, ODD], ids=str)
def test_each_configuration_is_right(interpreted, tiles):
    dtype = torch.float32 if tiles == FP32 else torch.bfloat16
    Linear((1, 5, 70, 100), dtype).judge_launchers(tiles)
    Conv((1, 3, 4, 3, 5), 1, 1, 0, dtype).judge_launchers(tiles)
