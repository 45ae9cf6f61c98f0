"""``fastlth data``: the data sets, and getting them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastlth.catalogue import DATASETS, dataset_name
from fastlth.cli.options import COMPLETE_DATASET, OWN_DATA, DataDir, Json
from fastlth.specs import is_own

app = typer.Typer(help="The data sets, and getting them.", no_args_is_help=True)


@app.command("list", epilog="Example: fastlth data list")
def list_(data_dir: DataDir = None, json: Json = False) -> None:
    """All data sets, their sizes, and whether they are there."""
    from rich.table import Table

    from fastlth.cli.show import console, json_document
    from fastlth.data.sources import data_root, state

    root = data_root(data_dir)
    rows = [
        {"name": name, "shape": list(f.shape), "classes": f.classes, "train": f.train, "test": f.test,
         "state": state(name, root)}
        for name, f in DATASETS.items()
    ]  # fmt: skip
    if json:
        json_document({"root": str(root), "datasets": rows})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("data set", "image", "classes", "training", "test", f"in {root}"):
        table.add_column(column)
    for (name, f), row in zip(DATASETS.items(), rows, strict=True):
        image = "x".join(str(n) for n in f.shape)
        table.add_row(name, image, str(f.classes), f"{f.train:,}", f"{f.test:,}", str(row["state"]))
    console().print(table)


@app.command("prepare", epilog="Example: fastlth data prepare cifar-10 --data-dir ~/data")
def prepare(
    dataset: Annotated[str, typer.Argument(help=f"{', '.join(DATASETS)}, {OWN_DATA}", autocompletion=COMPLETE_DATASET)],
    data_dir: DataDir = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side, of an image folder (default: 224)")] = None,
    photo_crop: Annotated[
        bool, typer.Option("--photo-crop", help="Prepare an image folder for data.augment=photo-crop")
    ] = False,
) -> None:
    """Download a data set where it is missing, check every file, and write FFCV's file where FFCV is installed."""
    from fastlth.cli.show import console
    from fastlth.data import ffcv, jpegs
    from fastlth.data.photos import Photos
    from fastlth.data.sources import data_root, load_for
    from fastlth.recipe import DataSection
    from fastlth.training.engines.make import beton_folder

    name, where = dataset_name(dataset), f", checked in {data_root(data_dir)}"
    facts: dict[str, Any] = {"name": name}
    if is_own(name):
        from fastlth.data import own

        facts, where = own.facts(name, image_size), ""
    elif image_size is not None:
        facts["image_size"] = image_size  # DataSection says what it is for
    if name == "digits":
        where = ", which come with scikit-learn"
    source = load_for(DataSection(**facts, augment="photo-crop" if photo_crop else "none"), data_dir)
    screen = console()
    screen.print(f"{name}: {len(source.train.labels):,} training and {len(source.test.labels):,} test images{where}",
                 highlight=False, soft_wrap=True)  # fmt: skip
    if reason := ffcv.available():
        screen.print(f"no FFCV file: {reason}", highlight=False, soft_wrap=True)
        return
    train, folder = source.train, beton_folder()
    if isinstance(photos := train.pixels, Photos):
        file = jpegs.beton(photos, train.labels, folder)
    else:
        file = ffcv.beton(train, folder)
    screen.print(f"FFCV file: {file}", highlight=False, soft_wrap=True)
