"""Augmentation: each image against a plain loop or torchvision, and its draws against their definition."""

import pytest
import torch
import torchvision.transforms.functional as tv
from fastlth_kernels.philox import philox
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlth.data.augment import AUGMENT, flip_crop, lecode

KEY = (5, 4)
LEVELS = 2**32


def pixels(count: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator).permute(
        0, 3, 1, 2
    )


def smooth(count: int) -> Tensor:
    """Images of a few colours each, greys, black and white among them, so that every hue branch is taken."""
    images = pixels(count, 3, 6, 6)
    images[:, :, 0] = images[:, :1, 0]
    images[:, :, 1, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    return images


def words(place: int, epoch: int) -> tuple[int, int, int, int]:
    return philox(place, 0, epoch, 0, KEY)


def test_flip_crop_is_the_plain_loop() -> None:
    images = pixels(40, 3, 9, 7)
    out = flip_crop(images, 3, 120, KEY, pad=2)
    seen = set()
    for j in range(40):
        first, second, third, _ = words(120 + j, 3)
        dy, dx, mirrored = first * 5 // LEVELS, second * 5 // LEVELS, third >= LEVELS // 2
        seen.add((dy, dx, mirrored))
        for c in range(3):
            for y in range(9):
                for x in range(7):
                    sy, sx = y + dy - 2, (6 - x if mirrored else x) + dx - 2
                    inside = 0 <= sy < 9 and 0 <= sx < 7
                    assert out[j, c, y, x] == (images[j, c, sy, sx] if inside else 0)
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(5))
    assert {s[2] for s in seen} == {False, True}


def test_flip_crop_is_torchvisions_pad_crop_and_flip() -> None:
    images = pixels(20, 1, 28, 28)
    out = flip_crop(images, 0, 0, KEY)
    for j in range(20):
        first, second, third, _ = words(j, 0)
        one = tv.crop(tv.pad(images[j], [4]), first * 9 // LEVELS, second * 9 // LEVELS, 28, 28)
        assert torch.equal(out[j], tv.hflip(one) if third >> 31 else one)


def lecode_of(image: Tensor, place: int, epoch: int) -> tuple[Tensor, bool]:
    """One image [3, H, W] by torchvision, in float so that it does not cut off in between."""
    first, second, third, fourth = words(place, epoch)
    hue, saturation = (first / LEVELS - 0.5) * 0.1, 0.95 + second / LEVELS * 0.1
    x = image.contiguous().float() / 255
    if third & 1:
        x = tv.adjust_hue(tv.adjust_saturation(x, saturation), hue)
    else:
        x = tv.adjust_saturation(tv.adjust_hue(x, hue), saturation)
    if third >> 31:
        x = tv.hflip(x)
    grey = fourth < 0.1 * LEVELS
    return (tv.rgb_to_grayscale(x, 3) if grey else x) * 255, grey


def test_lecode_is_torchvision_in_float() -> None:
    images = smooth(200)
    out = lecode(images, 2, 400, KEY)
    grey = 0
    for j in range(200):
        expected, is_grey = lecode_of(images[j], 400 + j, 2)
        grey += is_grey
        # Half a level is our rounding at the end; the rest is float32's.
        assert (out[j].float() - expected).abs().max() <= 0.51
    assert 5 < grey < 40


def test_lecode_is_within_two_levels_of_torchvision_in_bytes() -> None:
    # torchvision cuts off after hue and after saturation: up to one level each, and half a level is our rounding,
    # so whole levels differ by at most two. Greys are left out, a third cut.
    images = smooth(100)
    out = lecode(images, 0, 0, KEY)
    for j in range(100):
        first, second, third, fourth = words(j, 0)
        if fourth < 0.1 * LEVELS:
            continue
        hue, saturation = (first / LEVELS - 0.5) * 0.1, 0.95 + second / LEVELS * 0.1
        x = images[j].contiguous()
        if third & 1:
            x = tv.adjust_hue(tv.adjust_saturation(x, saturation), hue)
        else:
            x = tv.adjust_saturation(tv.adjust_hue(x, hue), saturation)
        x = tv.hflip(x) if third >> 31 else x
        assert (out[j].int() - x.int()).abs().max() <= 2


@pytest.mark.parametrize("name", list(AUGMENT))
def test_what_happens_to_an_image_depends_on_its_place_alone(name: str) -> None:
    images = smooth(24)
    whole = AUGMENT[name](images, 1, 60, KEY)
    assert whole.dtype == torch.uint8
    assert whole.is_contiguous(memory_format=torch.channels_last)
    parts = [AUGMENT[name](images[i : i + 8], 1, 60 + i, KEY) for i in (0, 8, 16)]
    assert torch.equal(torch.cat(parts), whole)
    tensors = AUGMENT[name](images, torch.tensor(1), torch.tensor(60), KEY)
    assert torch.equal(tensors, whole)


@pytest.mark.parametrize("name", ["flip-crop", "lecode"])
def test_epoch_place_and_seed_each_change_the_draw(name: str) -> None:
    images = smooth(24)
    outs = [AUGMENT[name](images, *where) for where in ((0, 0, KEY), (1, 0, KEY), (0, 24, KEY), (0, 0, (6, 4)))]
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
    assert all(not torch.equal(out, images) for out in outs)


@pytest.mark.parametrize("name", list(AUGMENT))
def test_it_compiles_as_one_graph_with_the_same_bits(name: str) -> None:
    images = smooth(8)
    compiled = torch.compile(AUGMENT[name], fullgraph=True, backend="aot_eager")
    for epoch in range(3):
        where = (torch.tensor(epoch), torch.tensor(8 * epoch), KEY)
        assert torch.equal(compiled(images, *where), AUGMENT[name](images, *where))


@pytest.mark.parametrize("name", list(AUGMENT))
def test_it_reads_nothing_back_to_the_host(name: str) -> None:
    with FakeTensorMode():
        where = (torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64), KEY)
        out = AUGMENT[name](torch.empty(4, 3, 8, 8, dtype=torch.uint8), *where)
    assert out.shape == (4, 3, 8, 8)
    assert out.dtype == torch.uint8
