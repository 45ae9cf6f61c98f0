"""What there is on this machine, and what of it can train a recipe: device, engine, loader, kernels. Nothing is
timed."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch

import fastlth
from fastlth.data import ffcv
from fastlth.errors import DeviceError, RecipeError
from fastlth.recipe import ComputeSection, Recipe
from fastlth.training.engines import graph, sparse

RESIDENT_SHARE = 0.5
"""of the device's memory that the training images may take with --loader auto"""


def device(name: str) -> str:
    """The device that ``auto`` means here, or ``name`` itself. Raises DeviceError if it is not there."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = ["cpu", *(f"cuda:{i}" for i in range(cuda)), *(["mps"] if mps else [])]
    if name == "auto":
        return "cuda:0" if cuda else "mps" if mps else "cpu"
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise DeviceError(f"--device {name} is not there; this machine has {', '.join(there)}")
    return wanted


def environment(compute: ComputeSection) -> dict[str, str]:
    """What, beside the resolved recipe, the bits of a result depend on."""
    on_cuda = compute.device.startswith("cuda")
    compiler = {"numba": version("numba")} if compute.engine == "sparse" or compute.kept else {}
    return {
        **compiler,
        "device": torch.cuda.get_device_name(compute.device) if on_cuda else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "fastlth": fastlth.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def engine(recipe: Recipe) -> str:
    """The engine asked for, or "auto" where more than one could train the recipe. Raises RecipeError if the one
    asked for cannot, DeviceError where the device is not there."""
    asked, where = recipe.compute.engine, device(recipe.compute.device)
    if asked == "dense":
        return asked
    if asked == "graph" or (asked == "auto" and where.startswith("cuda")):
        reason = graph.unsupported(recipe)
    else:
        reason = f"the device is {where}" if where != "cpu" else sparse.unsupported(recipe)
    if asked != "auto" and reason:
        raise RecipeError(f"--engine {asked} cannot train this: {reason}; use --engine auto or dense")
    return "dense" if reason else asked


def loader(asked: str, recipe: Recipe) -> str:
    """The loader that ``auto`` means here, or ``asked`` itself. Raises RecipeError if it is not installed, or if
    ``auto`` has to stream a set that is too large for the device and cannot."""
    if asked == "ffcv" and (reason := ffcv.available()):
        raise RecipeError(reason)
    photos = recipe.data.augment == "photo-crop"
    if asked == ("resident" if photos else "pillow"):
        ways = "ffcv or pillow with data.augment photo-crop, which decodes photographs for every batch"
        raise RecipeError(f"--loader must be auto, {ways if photos else 'resident or ffcv but for photo-crop'}, "
                          f"got '{asked}'")  # fmt: skip
    if asked != "auto":
        return asked
    if photos:
        return "pillow" if ffcv.available() else "ffcv"
    facts, memory = recipe.data.facts, _memory(device(recipe.compute.device))
    needs = recipe.data.train_images * math.prod(facts.shape)
    if needs <= RESIDENT_SHARE * memory:
        return "resident"
    if reason := ffcv.available():
        raise RecipeError(f"the training images take {needs / 2**30:.1f} GiB, too much for the "
                          f"{memory / 2**30:.1f} GiB of the device, and cannot be streamed: {reason}, or a smaller "
                          "--image-size")  # fmt: skip
    return "ffcv"


def _memory(device: str) -> int:
    """Bytes of memory, in all; 8 GiB where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 8 * 2**30


def kernels(asked: str, device: str) -> str:
    """The kernels that ``auto`` means on a device, or ``asked`` itself. Raises DeviceError if they cannot run there.

    ``auto`` is torch: no measurement yet says that the masked kernels win.
    """
    if asked == "triton" and not device.startswith("cuda"):
        raise DeviceError(f"--kernels triton needs a CUDA device, and this run is on {device}; use --kernels torch")
    if asked == "triton" and find_spec("triton") is None:
        raise DeviceError("--kernels triton needs Triton, which is not installed; install it or use --kernels torch")
    return "torch" if asked == "auto" else asked
