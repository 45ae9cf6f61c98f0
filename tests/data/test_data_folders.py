"""Folders of images: what is counted, how images become squares, random crops, both loaders, refusals."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastlth_kernels.philox import philox
from PIL import Image

from fastlth.composition import adjust, compose
from fastlth.data import ffcv, folders
from fastlth.data.augment import resized_crop
from fastlth.data.folders import square
from fastlth.data.photos import photo
from fastlth.data.sources import load_for
from fastlth.errors import DataError, RecipeError, Stopped
from fastlth.models import state
from fastlth.recipe import Recipe
from fastlth.running import run
from fastlth.search import RoundFinished, find_tickets
from fastlth.store.run import parent_folder
from fastlth.tickets import load_ticket
from fastlth.training import available
from fastlth.training.engines import make
from tests.helpers import CPU, assert_same_bits

SHORT = {**CPU, "train.iterations": 6, "train.batch_size": 4, "train.lr": 1e-3, "evaluate.every": 3,
         "prune.rounds": 1}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """Two classes; red and blue images of many sizes, JPEG and PNG, one of them in a deeper folder."""
    rng = np.random.default_rng(0)
    root = tmp_path / "flowers"
    for split, count in (("train", 10), ("val", 4)):
        for number, name in enumerate(("rose", "violet")):
            (root / split / name / "more").mkdir(parents=True)
            for i in range(count + number):
                height, width = rng.integers(9, 40, 2)
                pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
                pixels[..., 2 * number] += 180
                where = root / split / name / ("more" if i == 1 else "") / f"{i}.{'png' if i % 2 else 'JPG'}"
                Image.fromarray(pixels).save(where, format="png" if i % 2 else "jpeg")
            (root / split / name / "notes.txt").write_text("no image")
    return root


def recipe_of(root: Path, model: str = "lenet-5", **settings: object) -> Recipe:
    given = {"data.image_size": 16, **{name.replace("__", "."): value for name, value in settings.items()}}
    return compose(model, f"imagefolder:{root}", settings={**SHORT, **given}).recipe


def test_a_folder_is_counted_before_anything_is_read(flowers: Path, cache: Path) -> None:
    data = recipe_of(flowers).data
    assert (data.shape, data.classes, data.train, data.test, data.validation) == ((3, 16, 16), 2, 21, 9, 2)
    assert not cache.exists()
    default = compose("lenet-5", f"imagefolder:{flowers}", settings=SHORT).recipe.data
    assert default.shape == (3, 224, 224)
    assert default.content == data.content


def test_squares_are_the_middle_of_the_scaled_image(flowers: Path) -> None:
    source = load_for(recipe_of(flowers).data)
    assert source.train.pixels.shape == (21, 16, 16, 3) and source.test.pixels.shape == (9, 16, 16, 3)
    assert np.bincount(source.train.labels).tolist() == [10, 11]
    reddest = np.asarray(source.train.pixels).reshape(21, -1, 3).mean(1).argmax(1)
    assert (reddest == 2 * source.train.labels).all(), "every image has its label's colour"
    files = sorted((flowers / "train" / "rose").rglob("*.[pJ]*"), key=lambda p: p.relative_to(flowers).as_posix())
    roses = np.flatnonzero(source.train.labels == 0)
    for place, file in zip(roses, files, strict=True):
        if file.suffix == ".png":  # JPEG may be decoded at a smaller scale
            image = Image.open(file)
            scale = 16 / min(image.size)
            width, height = max(16, round(image.size[0] * scale)), max(16, round(image.size[1] * scale))
            scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
            top, left = (height - 16) // 2, (width - 16) // 2
            assert np.array_equal(source.train.pixels[place], scaled[top : top + 16, left : left + 16])


def test_the_first_images_are_of_every_class(flowers: Path) -> None:
    """They may be all that is measured (connectivity --train-images)."""
    labels = load_for(recipe_of(flowers).data).train.labels
    for count in range(1, 22):
        assert abs(int(labels[:count].sum()) - count * 11 / 21) <= 1


def test_a_moved_folder_is_the_same_set_and_a_changed_one_is_not(flowers: Path, tmp_path: Path) -> None:
    recipe = recipe_of(flowers)
    (tmp_path / "elsewhere").mkdir()
    moved = flowers.rename(tmp_path / "elsewhere" / "flowers")
    there = recipe_of(moved)
    assert there.digest == recipe.digest
    assert parent_folder(Path("runs"), there).name == f"lenet-5-flowers-{recipe.digest[:8]}"
    assert recipe_of(moved, data__image_size=20).digest != recipe.digest
    (moved / "train" / "rose" / "0.JPG").unlink()
    assert recipe_of(moved).digest != recipe.digest
    with pytest.raises(DataError, match="holds other files than the recipe's"):
        load_for(there.data)


def test_images_are_decoded_once(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe_of(flowers).data
    first = np.array(load_for(data).train.pixels)
    monkeypatch.setattr(folders, "square", None)
    again = load_for(data).train
    assert np.array_equal(again.pixels, first)
    assert isinstance(again.pixels, np.memmap)


def test_both_loaders_and_a_resume_of_the_crops_give_the_same_search(flowers: Path, tmp_path: Path) -> None:
    recipe = recipe_of(flowers, data__augment="resized-crop")
    last = {}
    for loader in ["resident"] if ffcv.available() else ["resident", "ffcv"]:
        one = recipe_of(flowers, data__augment="resized-crop", compute__loader=loader)
        *_, event = find_tickets(one)
        assert isinstance(event, RoundFinished) and event.round == 1
        last[loader] = {n: torch.from_numpy(a) for n, a in event.trained().items()}
    for values in last.values():
        assert_same_bits(last["resident"], values)
    stops = iter([None, 15])
    with pytest.raises(Stopped):
        run(recipe, out=tmp_path / "runs", stopped=lambda: next(stops, None))
    again = run(adjust(recipe, {"store.keep_weights": "last"}), out=tmp_path / "runs")
    assert_same_bits(last["resident"], state(load_ticket(again.ticket).trained(round=1)))


@pytest.mark.parametrize("loader", ["resident", "ffcv"])
def test_a_folder_from_the_command_line(loader: str, flowers: Path, tmp_path: Path, command) -> None:
    if loader == "ffcv" and (reason := ffcv.available()):
        pytest.skip(reason)
    name = f"imagefolder:{flowers}"
    code, _, said = command("data", "prepare", name, "--image-size", 16)
    assert code == 0 and "21 training and 9 test images" in said
    code, out, said = command(
        "find-ticket", "resnet-8", name, "--image-size", 16, "-i", 4, "-b", 4, "--lr", 0.01, "--rounds", 1,
        "--optimizer", "sgd", "--momentum", 0.9, "--loader", loader, "--device", "cpu", "--precision", "fp32",
        "--compile", "off", "--set", "data.augment=resized-crop", "--set", "compute.threads=1", "--set",
        "compute.shifted=[]", "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert code == 0, said
    found = json.loads(out)
    assert [r["round"] for r in found["rounds"]] == [0, 1]
    assert Path(found["run"]).parent.name.startswith("resnet-8-flowers-")
    written = tomllib.loads((Path(found["run"]) / "recipe.toml").read_text())
    assert written["data"]["image_size"] == 16  # and not 224
    assert command("ticket", "verify", found["ticket"])[0] == 0


def test_large_sets_are_streamed(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(flowers)
    bytes_ = recipe.data.train_images * 16 * 16 * 3
    monkeypatch.setattr(available, "_memory", lambda device: 2 * bytes_)
    assert available.loader("auto", recipe) == "resident"
    monkeypatch.setattr(available, "_memory", lambda device: 2 * bytes_ - 2)
    monkeypatch.setattr(ffcv, "available", lambda: None)
    assert available.loader("auto", recipe) == "ffcv"
    monkeypatch.setattr(ffcv, "available", lambda: "FFCV is not here")
    with pytest.raises(RecipeError, match=r"take 0.0 GiB, too much .*: FFCV is not here, or a smaller --image"):
        available.loader("auto", recipe)


def test_the_training_images_of_a_folder_are_not_copied(flowers: Path) -> None:
    recipe = recipe_of(flowers)
    source = load_for(recipe.data)
    splits = make.make_splits(recipe, source)
    every = np.concatenate([np.asarray(splits[s].pixels) for s in ("train", "validation")])
    assert not isinstance(splits["train"].pixels, np.ndarray)
    assert splits["train"].pixels.shape == (19, 16, 16, 3)
    order = [a.tobytes() for a in np.asarray(source.train.pixels)]
    assert sorted(a.tobytes() for a in every) == sorted(order)
    assert np.array_equal(splits["train"].pixels[3:5], np.asarray(splits["train"].pixels)[3:5])


def test_random_crops_are_bilinear_rectangles() -> None:
    """Against the definition in float64, pixel by pixel."""
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (40, 3, 12, 12), dtype=np.uint8))
    got = resized_crop(images, 3, 100, (7, 4))
    assert got.shape == images.shape and got.dtype == torch.uint8
    mirrored, areas = 0, []
    for j in range(40):
        words = philox(100 + j, 0, 3, 0, (7, 4))
        u = [(w >> 8) / 2**24 for w in words]
        area, ratio = 0.08 + 0.92 * u[0], 0.75 * (16 / 9) ** u[1]
        width, height = min(1, (area * ratio) ** 0.5), min(1, (area / ratio) ** 0.5)
        left, top = u[2] * (1 - width), u[3] * (1 - height)
        flip = bool(words[3] & 1)
        mirrored += flip
        areas.append(width * height)
        x = (np.arange(12) + 0.5) / 12
        xs = np.clip(12 * (left + width * (1 - x if flip else x)) - 0.5, 0, 11)
        ys = np.clip(12 * (top + height * x) - 0.5, 0, 11)
        x0, y0 = np.minimum(xs.astype(int), 10), np.minimum(ys.astype(int), 10)
        fx, fy = (xs - x0)[None, None], (ys - y0)[None, :, None]
        p = images[j].numpy().astype(np.float64)
        rows = p[:, y0] * (1 - fy) + p[:, y0 + 1] * fy
        want = rows[:, :, x0] * (1 - fx) + rows[:, :, x0 + 1] * fx
        assert np.abs(got[j].numpy() - want).max() <= 0.51
    assert 10 < mirrored < 30 and 0.08 <= min(areas) and max(areas) <= 1
    parts = torch.cat([resized_crop(images[:9], 3, 100, (7, 4)), resized_crop(images[9:], 3, 109, (7, 4))])
    assert torch.equal(parts, got), "a crop depends on the image's place alone"


@pytest.mark.parametrize(("break_it", "says"), [
    (lambda root: (root / "val").rename(root / "valid"), "must hold the folders train and val"),
    (lambda root: (root / "val" / "violet").rename(root / "val" / "tulip"), "the same classes.*: tulip, violet"),
    (lambda root: (root / "train" / "empty").mkdir(), "holds no image"),
])  # fmt: skip
def test_a_folder_laid_out_otherwise_is_one_sentence(break_it, says: str, flowers: Path) -> None:
    break_it(flowers)
    with pytest.raises(DataError, match=says):
        recipe_of(flowers)


def test_a_file_that_is_no_image_is_named(flowers: Path, cache: Path) -> None:
    (flowers / "train" / "rose" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"broken.png is not an image that can be read"):
        load_for(recipe_of(flowers).data)
    assert not list(cache.rglob("*.npy")), "nothing half-written stays"


@pytest.mark.parametrize("read", [lambda file: square(file, 8), lambda file: photo(file, 8)])
def test_an_image_of_too_many_pixels_is_named(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "huge.png"
    Image.new("RGB", (40, 40)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(DataError, match=r"huge.png is not an image that can be read \(Image size"):
        read(file)


def test_a_folders_recipe_can_be_adjusted(flowers: Path) -> None:
    recipe = recipe_of(flowers)
    assert adjust(recipe, {"train.lr": 0.5}).data == recipe.data
    assert adjust(recipe, {"data.name": recipe.data.name, "data.validation": 2}).data == recipe.data
    assert adjust(recipe, {"data.image_size": 20}).data.shape == (3, 20, 20)
    digits = adjust(recipe, {"data.name": "digits", "data.validation": -1, "model.name": "lenet-300-100"})
    assert (digits.data.image_size, digits.data.facts.shape) == (None, (1, 8, 8))
    back = adjust(digits, {"data.name": f"imagefolder:{flowers}", "data.validation": -1, "data.image_size": 16})
    assert back.data == recipe.data


def test_the_image_size_is_for_folders(flowers: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.image_size must be left out but for imagefolder:PATH, got 32"):
        compose("lenet-5", "mnist", settings={**SHORT, "data.image_size": 32})
    with pytest.raises(RecipeError, match="be in 8 to 4096 pixels, got 4"):
        recipe_of(flowers, data__image_size=4)
