"""Normalisation: the table against exact arithmetic, the lookup against the table, pixel by pixel."""

from fractions import Fraction

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlth.catalogue import DATASETS
from fastlth.data.normalise import normalise, table
from fastlth.errors import RecipeError


def pixels(*shape: int) -> torch.Tensor:
    count, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator).permute(
        0, 3, 1, 2
    )


@pytest.mark.parametrize("name", list(DATASETS))
@pytest.mark.parametrize("mode", ["mean-std", "unit", "half"])
def test_the_table_is_the_formula(name: str, mode: str) -> None:
    facts = DATASETS[name]
    values = table(name, mode)
    assert values.dtype == torch.float32
    assert values.shape == (facts.shape[0], 256)
    for channel in range(facts.shape[0]):
        for level in (0, 1, 127, 128, 254, 255):
            exact = {
                "mean-std": (Fraction(level, 255) - Fraction(facts.mean[channel])) / Fraction(facts.std[channel]),
                "unit": Fraction(level, 255),
                "half": Fraction(2 * level, 255) - 1,
            }[mode]
            # Half a unit in the last place of float32, and a little for the roundings in float64 before.
            assert abs(Fraction(values[channel, level].item()) - exact) <= abs(exact) / 2**24 + Fraction(1, 10**14)


def test_the_ends_of_the_range_are_exact() -> None:
    assert table("mnist", "unit")[0, [0, 255]].tolist() == [0.0, 1.0]
    assert table("mnist", "half")[0, [0, 255]].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("name", "mode"), [("mnist", "other"), ("stl-10", "unit")])
def test_unknown_names_are_refused(name: str, mode: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown (data\.normalise 'other'|dataset 'stl-10')"):
        table(name, mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_pixel_is_looked_up_in_its_channel(channels: int, dtype: torch.dtype) -> None:
    values = torch.randn(channels, 256, generator=torch.Generator().manual_seed(1))
    images = pixels(3, channels, 5, 4)
    out = normalise(images, values, dtype)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    for b in range(3):
        for c in range(channels):
            expected = [[values[c, int(v)].to(dtype).item() for v in row] for row in images[b, c]]
            assert out[b, c].tolist() == expected
    assert torch.equal(normalise(images.contiguous(), values, dtype), out)  # whatever the strides that come in


def test_it_compiles_as_one_graph_with_the_same_bits() -> None:
    values = table("cifar-10", "mean-std")
    images = pixels(4, 3, 8, 8)
    compiled = torch.compile(normalise, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, values, torch.float32), normalise(images, values, torch.float32))


def test_it_reads_nothing_back_to_the_host() -> None:
    with FakeTensorMode():
        out = normalise(torch.empty(4, 3, 8, 8, dtype=torch.uint8), torch.empty(3, 256), torch.float32)
    assert out.shape == (4, 3, 8, 8)
