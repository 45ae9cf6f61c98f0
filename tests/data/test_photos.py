"""Photographs decoded for every batch: rectangles by seed, both decoders, resumes, odd files, refusals."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastlth_kernels.philox import philox
from PIL import Image

from fastlth.composition import adjust, compose
from fastlth.data import ffcv, jpegs
from fastlth.data.augment import AUGMENT, none
from fastlth.data.loader import Batch
from fastlth.data.order import Order
from fastlth.data.photo_loader import AHEAD, PhotoLoader
from fastlth.data.photos import Photos, box, crop
from fastlth.data.sources import load_for
from fastlth.errors import DataError, EnvironmentFailure, RecipeError, Stopped
from fastlth.models import state
from fastlth.recipe import Recipe
from fastlth.running import run
from fastlth.search import RoundFinished, find_tickets
from fastlth.tickets import load_ticket
from fastlth.training import available
from fastlth.training.engines import make
from tests.helpers import CPU, assert_same_bits

REASON = ffcv.available()
needs_ffcv = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LOADERS = ["pillow", pytest.param("ffcv", marks=needs_ffcv)]
SIZE = 16
SHORT = {**CPU, "train.iterations": 6, "train.batch_size": 4, "train.lr": 1e-3, "evaluate.every": 3, "prune.rounds": 1,
         "data.image_size": SIZE, "data.augment": "photo-crop", "compute.loader": "pillow"}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    gc.collect()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fastlth-decode")]


def a_photo(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth, as photographs are: waves of a few pixels' length would show a decoder's rounding most."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(x / rng.uniform(4, 20) + y / rng.uniform(4, 20)) for _ in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


@pytest.fixture
def holiday(tmp_path: Path) -> Path:
    """Two classes, photographs of many sizes and kinds; the first of each class are ordinary JPEGs."""
    rng, root = np.random.default_rng(0), tmp_path / "holiday"
    for split, count in (("train", 9), ("val", 3)):
        for name in ("beach", "hills"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = (int(n) for n in rng.integers(18, 60, 2))
                a_photo(rng, min(height, 32), width).save(root / split / name / f"{i}.jpg", quality=92)
    odd = root / "train" / "hills"
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me"
    a_photo(rng, 20, 31).save(odd / "turned.jpg", exif=exif)
    a_photo(rng, 24, 40).save(odd / "progressive.jpg", progressive=True)
    a_photo(rng, 25, 20).convert("L").save(odd / "grey.jpg")
    a_photo(rng, 25, 21).convert("CMYK").save(odd / "printed.jpg")
    a_photo(rng, 90, 70).save(odd / "large.jpg", quality=95)
    a_photo(rng, 30, 27).save(odd / "lossless.png")
    a_photo(rng, 30, 27).convert("RGBA").save(odd / "see-through.png")
    a_photo(rng, 12, 9).convert("P").save(odd / "small.gif")
    return root


VERBATIM = ["beach/0.jpg", "hills/3.jpg", "hills/turned.jpg", "hills/progressive.jpg", "hills/grey.jpg"]


def recipe_of(root: Path, **settings: object) -> Recipe:
    given = {name.replace("__", "."): value for name, value in settings.items()}
    return compose("lenet-5", f"imagefolder:{root}", settings={**SHORT, **given}).recipe


def photos_of(root: Path) -> Photos:
    photos = load_for(recipe_of(root).data).train.pixels
    assert isinstance(photos, Photos)
    return photos


def loader_of(recipe: Recipe) -> PhotoLoader:
    loader = make.make_loader(recipe, load_for(recipe.data))
    assert isinstance(loader, PhotoLoader)
    return loader


def test_rectangles_are_those_of_their_definition() -> None:
    areas, mirrored = [], 0
    for n in range(3000):
        words = philox(n, 0, 5, 0, (9, 4))
        width, height = ((500, 375), (90, 200), (64, 64))[n % 3]
        left, top, right, bottom = box(words, width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        area, ratio = 0.08 + 0.92 * words[0] / 2**32, np.exp(np.log(3 / 4) + words[1] / 2**32 * np.log(16 / 9))
        across, down = np.sqrt(area * width * height * ratio), np.sqrt(area * width * height / ratio)
        assert abs(right - left - min(across, width)) <= 0.5 and abs(bottom - top - min(down, height)) <= 0.5
        assert abs(left - words[2] / 2**32 * (width - (right - left))) <= 1
        assert abs(top - words[3] / 2**32 * (height - (bottom - top))) <= 1
        areas.append((right - left) * (bottom - top) / (width * height))
        mirrored += words[3] & 1
    assert min(areas) < 0.1 and max(areas) > 0.95 and 0.45 < np.mean(areas) < 0.55 and 1400 < mirrored < 1600


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3), (65535, 2)])
def test_rectangles_of_odd_photographs_lie_inside(word: int, size: tuple[int, int]) -> None:
    left, top, right, bottom = box((word,) * 4, *size)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("shape", [(100, 130), (16, 16), (9, 40)])
def test_a_crop_is_the_scaled_rectangle(shape: tuple[int, int]) -> None:
    image = a_photo(np.random.default_rng(3), *shape)
    for n in range(12):
        words = philox(n, 0, 0, 0, (1, 4))
        left, top, right, bottom = box(words, *image.size)
        part = torch.from_numpy(np.array(image)[top:bottom, left:right]).permute(2, 0, 1)[None].double()
        want = F.interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        got = crop(image, words, SIZE)
        assert got.shape == (SIZE, SIZE, 3) and got.dtype == np.uint8
        assert np.abs(got.astype(float) - (want[:, ::-1] if words[3] & 1 else want)).max() <= 1.01


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_are_crops_by_seed_epoch_and_place_from_anywhere(kind: str, holiday: Path) -> None:
    recipe = recipe_of(holiday, compute__loader=kind, train__drop_last=False, seeds__augment=7)
    loader = loader_of(recipe)
    order, decode = loader._order, loader._decode
    kept = loader._indices
    assert np.array_equal(loader._labels, load_for(recipe.data).train.labels)
    loader._labels = np.arange(len(loader._labels))  # of two classes the wrong photograph's label may be the right one
    assert loader.iterations_per_epoch == order.iterations_per_epoch == 6
    want = {}
    for iteration in range(13):
        epoch, position, chosen = order.batch(iteration)
        want[iteration] = [crop(decode(int(kept[i])), philox(position + j, 0, epoch, 0, (7, 4)), SIZE)
                           for j, i in enumerate(chosen)], kept[chosen]  # fmt: skip

    def check(batches: Iterator[Batch], first: int, last: int) -> None:
        for iteration, batch in zip(range(first, last), batches, strict=True):
            assert (batch.epoch, batch.position) == (iteration // 6, iteration % 6 * 4)
            assert batch.images.permute(0, 2, 3, 1).is_contiguous() and batch.images.dtype == torch.uint8
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), np.stack(want[iteration][0]))
            assert np.array_equal(batch.labels.numpy(), want[iteration][1])

    for first, last in ((0, 13), (3, 9), (9, 10), (1, 2), (5, 5)):
        check(loader.batches(first, last), first, last)
    loader.close()
    check(loader.batches(2, 4), 2, 4)  # and it can be used again
    resumed = loader_of(recipe)
    resumed._labels = loader._labels
    check(resumed.batches(4, 8), 4, 8)
    loader.close()
    resumed.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fastlth-decode") and t.is_alive()]
    assert not np.array_equal(np.stack(want[0][0]), np.stack(want[6][0]))


@needs_ffcv
def test_both_decoders_see_the_same_photographs(holiday: Path, cache: Path) -> None:
    photos = photos_of(holiday)
    labels = load_for(recipe_of(holiday).data).train.labels
    decoder = jpegs.Decoder(jpegs.beton(photos, labels, cache / "beton"))
    whole = next((cache / "beton").glob("*.beton")).read_bytes()
    names = [file.relative_to(holiday / "train").as_posix() for file in photos.files]
    assert {*VERBATIM, "hills/printed.jpg", "hills/large.jpg"} <= set(names)
    for i, name in enumerate(names):
        theirs, ours = decoder(i), photos.decode(i)
        assert theirs.size == ours.size, f"{name}: one size, so the same rectangles"
        assert min(ours.size) <= 2 * SIZE and (theirs.mode, ours.mode) == ("RGB", "RGB")
        difference = np.abs(np.asarray(theirs).astype(int) - np.asarray(ours))
        assert difference.mean() < 4 and difference.max() <= 40, (name, difference.mean(), difference.max())
        if name in VERBATIM:
            assert photos.files[i].read_bytes() in whole, f"{name} is stored byte for byte"
            assert difference.mean() < 1.8 and difference.max() <= 12, (name, difference.mean(), difference.max())
    assert decoder(names.index("hills/large.jpg")).size == (32, 41)
    assert decoder(names.index("hills/turned.jpg")).size == (31, 20), "EXIF turns nothing, as with squares"


@pytest.mark.parametrize("kind", LOADERS)
def test_a_search_stopped_in_the_middle_of_an_epoch_ends_the_same(kind: str, holiday: Path, tmp_path: Path) -> None:
    recipe = recipe_of(holiday, compute__loader=kind)
    *_, event = find_tickets(recipe)
    assert isinstance(event, RoundFinished) and event.round == 1
    want = {n: torch.from_numpy(a) for n, a in event.trained().items()}
    stops = iter([None, 15])
    with pytest.raises(Stopped):
        run(recipe, out=tmp_path / "runs", stopped=lambda: next(stops, None))
    again = run(adjust(recipe, {"store.keep_weights": "last"}), out=tmp_path / "runs")
    assert_same_bits(want, state(load_ticket(again.ticket).trained(round=1)))
    *_, other = find_tickets(adjust(recipe, {"seeds.augment": 1}))
    assert isinstance(other, RoundFinished)
    assert any(not np.array_equal(a, event.trained()[n]) for n, a in other.trained().items()), "the crops matter"


def test_held_out_and_test_images_are_the_squares(holiday: Path) -> None:
    recipe, plain = recipe_of(holiday), recipe_of(holiday, data__augment="none", compute__loader="resident")
    ours, theirs = (make.make_splits(r, load_for(r.data)) for r in (recipe, plain))
    for split in ("train", "validation", "test"):
        assert np.array_equal(np.asarray(ours[split].pixels), np.asarray(theirs[split].pixels)), split
        assert np.array_equal(ours[split].labels, theirs[split].labels)
    assert isinstance(ours["validation"].pixels, np.memmap), "decoded once, not at every evaluation"
    assert np.array_equal(ours["train"].pixels[3:7], np.asarray(theirs["train"].pixels)[3:7])
    assert AUGMENT["photo-crop"] is none, "nothing is cut or mirrored twice"


def test_photographs_are_decoded_ahead_and_jobs_of_no_use_dropped(holiday: Path) -> None:
    decode, asked = photos_of(holiday).decode, []

    def recorded(i: int) -> Image.Image:
        asked.append(i)
        return decode(i)

    order = Order(24, 4, True, (0, 3))
    labels = load_for(recipe_of(holiday).data).train.labels
    loader = PhotoLoader(recorded, labels, np.arange(24), order, size=SIZE, key=(0, 4), device=torch.device("cpu"))
    next(iter(loader.batches(0, 1)))
    assert sorted(loader._begun) == [1, 2, AHEAD]
    next(iter(loader.batches(1, 2)))
    assert sorted(loader._begun) == [2, 3, 4]
    next(iter(loader.batches(40, 41)))
    assert sorted(loader._begun) == [41, 42, 43]
    loader.close()
    assert not loader._begun and len(asked) <= 4 * 9


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) * 2 // 3], lambda whole: b"not a picture"])
def test_a_photograph_that_cannot_be_read_is_named(damage, kind: str, holiday: Path, cache: Path) -> None:
    file = holiday / "train" / "beach" / "0.jpg"
    file.write_bytes(damage(file.read_bytes()))
    recipe = recipe_of(holiday, compute__loader=kind, train__drop_last=False, data__validation=1)
    with pytest.raises(DataError, match=r"0.jpg is not an image that can be read"):
        list(loader_of(recipe).batches(0, 7))
    assert not list(cache.rglob("*.beton")), "nothing half-written stays"


@needs_ffcv
def test_a_beton_of_photographs_is_written_once_and_again_if_damaged(holiday: Path, cache: Path) -> None:
    photos, labels = photos_of(holiday), load_for(recipe_of(holiday).data).train.labels
    path = jpegs.beton(photos, labels, cache)
    before, whole = path.stat().st_mtime_ns, path.read_bytes()
    assert jpegs.beton(photos, labels, cache).stat().st_mtime_ns == before
    path.write_bytes(whole[:-50])
    assert jpegs.beton(photos, labels, cache).read_bytes() == whole
    decoder = jpegs.Decoder(path)
    decoder._bytes = np.zeros_like(decoder._bytes)
    with pytest.raises(EnvironmentFailure, match=r"photograph 3 of .* cannot be decoded; remove that file"):
        decoder(3)


def test_auto_decodes_with_what_is_there(holiday: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(holiday)
    monkeypatch.setattr(ffcv, "available", lambda: None)
    assert available.loader("auto", recipe) == "ffcv"
    monkeypatch.setattr(ffcv, "available", lambda: "FFCV is not here")
    assert available.loader("auto", recipe) == "pillow"
    with pytest.raises(RecipeError, match="FFCV is not here"):
        available.loader("ffcv", recipe)
    with pytest.raises(RecipeError, match=r"must be auto, ffcv or pillow with data.augment photo-crop, .*'resident'"):
        available.loader("resident", recipe)
    plain = recipe_of(holiday, data__augment="resized-crop", compute__loader="auto")
    with pytest.raises(RecipeError, match=r"must be auto, resident or ffcv but for photo-crop, got 'pillow'"):
        available.loader("pillow", plain)
    with pytest.raises(RecipeError, match=r"data.augment must be another one but for imagefolder:PATH"):
        compose("lenet-5", "cifar-10", settings={"data.augment": "photo-crop"})


@pytest.mark.parametrize("kind", LOADERS)
def test_photo_crop_from_the_command_line(kind: str, holiday: Path, tmp_path: Path, command) -> None:
    name = f"imagefolder:{holiday}"
    code, _, said = command("data", "prepare", name, "--image-size", SIZE, "--photo-crop")
    assert code == 0 and "26 training and 6 test images" in said
    assert REASON or "-jpegs.beton" in said
    search = ["find-ticket", "lenet-5", name, "--image-size", SIZE, "-i", 4, "-b", 4, "--lr", 0.01, "--rounds", 1,
              "--loader", kind, "--device", "cpu", "--precision", "fp32", "--compile", "off", "--set",
              "compute.threads=1", "--out", tmp_path / "runs"]  # fmt: skip
    code, _, said = command(*search, "--set", "data.augment=photo-crop", "--json")
    assert code == 0, said
    code, _, said = command(*search, "--set", "data.augment=photo-crop", "--loader", "resident")
    assert code == 2 and "must be auto, ffcv or pillow" in said
