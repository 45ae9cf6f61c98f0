"""What the parts of ``benchmarks.gpu`` that train start from: recipes for a device, and images, real where they are."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import Ledger
from fastlth.bench.subject import random_source
from fastlth.composition import compose
from fastlth.data.sources import Source, load
from fastlth.errors import FastlthError
from fastlth.recipe import Recipe


def recipe(ledger: Ledger, model: str, dataset: str, **settings: Any) -> Recipe:
    """The pair's default preset on the ledger's device, nothing left to ``auto``; train__lr is train.lr."""
    convolutions = model != "lenet-300-100"
    base: dict[str, Any] = {
        "compute.device": str(ledger.device), "compute.precision": "bf16" if convolutions else "fp32",
        "compute.compile": "off", "compute.channels_last": "on" if convolutions else "off",
        "compute.loader": "resident", "compute.engine": "graph", "compute.kernels": "torch", "compute.threads": 1,
    }  # fmt: skip
    if ledger.dry:
        base |= {"data.validation": 64, "train.batch_size": 8}
    given = {name.replace("__", "."): value for name, value in settings.items()}
    return compose(model, dataset, settings={**base, **given}).recipe


def with_compute(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, **changes))


def source(ledger: Ledger, dataset: str) -> tuple[Source, str]:
    """The data set and "real", where $FASTLTH_DATA holds it, else random images and "random"."""
    if not ledger.dry and (folder := os.environ.get("FASTLTH_DATA")):
        try:
            return load(dataset, Path(folder), download=False), "real"
        except (FastlthError, ImportError) as error:
            print(f"random images: {error}", flush=True)
    return random_source(dataset, images=160 if ledger.dry else 60_000), "random"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
