"""At which density each layer of a net is faster from its kept weights alone: measured on this machine, once per run.

Each distinct layer makes whole training steps of its own, forward, backward and update, on random numbers of its real
shapes: dense, and from kept weights at two densities. What kept weights take is linear in the density, so two points
say where it crosses what the dense layer takes.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastlth.recipe import TrainSection
from fastlth.training.kept import KeptLayers, Layer, candidates
from fastlth.training.optim import MaskedOptimizer
from fastlth.training.shifted import can, swap

GAIN = 1.1
"""by which kept weights must be faster at the break-even"""
SPARSE, SPARSER = 0.2, 0.05
"""densities at which they are timed"""
MOST = 0.5
"""the line is not followed further; a machine with other work bends it"""
TIMES, SECONDS = 3, 0.5
"""of one layer's ways, timed alternately: at least so many, and for about so long"""
LEAST = 0.002
"""a break-even below this density is none"""

Time = Callable[[Sequence[Callable[[], None]]], list[float]]


def break_evens(
    model: nn.Module, image: tuple[int, int, int], train: TrainSection, precision: str, *, channels_last: bool,
    threads: int, shifted: Sequence[str] = (), time_all: Time | None = None,
) -> dict[str, float]:  # fmt: skip
    """Layer name -> the density at or below which its kept weights alone are faster, for ``ComputeSection.kept``.

    ``model`` is on the meta device, ``image`` [C, H, W]; ``shifted`` as in the compute section. Layers for which kept
    weights never win are left out.
    """
    found: dict[tuple[object, ...], float] = {}
    limits = {}
    for name, (layer, shape, needs_input) in _inputs(model, image, train.batch_size).items():
        products = tuple(which for which in ("weight", "input") if f"{name}.{which}" in shifted)
        key = (type(layer), layer.weight.shape, shape, needs_input, products)
        if key not in found:
            steps = [
                _step(layer, shape, needs_input, train, precision, density, channels_last, threads, products)
                for density in (None, SPARSE, SPARSER)
            ]
            found[key] = crossing(*(time_all or _seconds)(steps))
        if found[key] >= LEAST:
            limits[name] = round(found[key], 3)
    return limits


def crossing(dense: float, sparse: float, sparser: float) -> float:
    """The density in 0 to MOST at which the line through the seconds at SPARSE and SPARSER reaches dense / GAIN."""
    slope = (sparse - sparser) / (SPARSE - SPARSER)
    if slope <= 0:  # other work on the machine hides the difference: no further than was timed
        return SPARSE if sparse < dense / GAIN else 0.0
    return min(max(SPARSER + (dense / GAIN - sparser) / slope, 0.0), MOST)


def _inputs(
    model: nn.Module, image: tuple[int, int, int], batch: int
) -> dict[str, tuple[Layer, tuple[int, ...], bool]]:
    """Each candidate with its input's shape, and whether that needs a gradient."""
    found: dict[str, tuple[Layer, tuple[int, ...], bool]] = {}
    hooks = []
    for name, layer in candidates(model).items():

        def note(_: nn.Module, inputs: tuple[Tensor], __: Tensor, name: str = name, layer: Layer = layer) -> None:
            found[name] = (layer, tuple(inputs[0].shape), inputs[0].requires_grad)

        hooks.append(layer.register_forward_hook(note))
    model(torch.empty(batch, *image, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def _step(
    layer: Layer, shape: tuple[int, ...], needs_input: bool, train: TrainSection, precision: str,
    density: float | None, channels_last: bool, threads: int, products: Sequence[str],
) -> Callable[[], None]:  # fmt: skip
    """A training step of a net of this layer alone, dense where ``density`` is None."""
    generator = torch.Generator().manual_seed(0)

    def numbers(size: Sequence[int]) -> Tensor:
        return torch.randn(*size, generator=generator)

    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    net = nn.Sequential(copy.deepcopy(layer).to_empty(device="cpu"))
    for parameter in net.parameters():
        parameter.data.copy_(0.01 * numbers(parameter.shape))
    if len(shape) == 4:
        net.to(memory_format=layout)
    if isinstance(layer, nn.Conv2d) and can(layer):
        swap(net, [f"0.{which}" for which in products])
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32
    x = numbers(shape).to(narrow).contiguous(memory_format=layout).requires_grad_(needs_input)
    optimizer = MaskedOptimizer(dict(net.named_parameters()), train)
    mask = torch.rand(layer.weight.shape, generator=generator) < (1.0 if density is None else density)
    kept = KeptLayers(net, {"0": 0.0 if density is None else 1.0}, batch=shape[0], threads=threads)
    if kept.choose({"0.weight": mask}):
        optimizer.move(kept.values)
    pruned = {"0.weight": ~mask}
    optimizer.hold(pruned)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        dy = torch.randn_like(net(x))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = net(x)
        y.backward(dy)
        optimizer.step(pruned)
        x.grad = None

    return step


def _seconds(steps: Sequence[Callable[[], None]]) -> list[float]:
    """Of each step, the fastest fifth of alternated calls: what it takes when it is left alone."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()  # the library prepares itself
    began = time.perf_counter()
    while len(times[0]) < TIMES or time.perf_counter() - began < SECONDS:
        for step, taken in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
    return [statistics.quantiles(t, n=5)[0] if len(t) > 4 else min(t) for t in times]
