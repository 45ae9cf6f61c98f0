"""Counts: what a step and a start do, as whole numbers that are the same on every machine and never noisy.

They run on fake tensors, so a VGG-19 step costs milliseconds, a host read anywhere in the step raises, and a GPU's step
can be looked at without one.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from fastlth_kernels.masked_step import StepTable
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastlth.bench import ticket
from fastlth.bench.subject import masks_of_round, random_source
from fastlth.composition import compose
from fastlth.data.loader import Batch
from fastlth.models import make
from fastlth.recipe import Recipe
from fastlth.search import RoundFinished, find_tickets
from fastlth.store import codec
from fastlth.store.ticket import EncodedTheta, removed_per_round
from fastlth.training.engines.arena import Arena, stored
from fastlth.training.engines.base import Engine
from fastlth.training.engines.dense import DenseEngine
from fastlth.training.engines.graph import GraphEngine, Graphs
from fastlth.training.engines.make import make_engine, make_order, make_splits

FIXED = {"compute.device": "cpu", "compute.compile": "off", "compute.precision": "fp32", "compute.loader": "resident",
         "compute.channels_last": "off", "compute.engine": "dense", "compute.threads": 1}  # fmt: skip
STEPS = (("lenet-300-100", "mnist"), ("conv-4", "cifar-10"), ("vgg19", "cifar-10"))


def measure() -> dict[str, int]:
    """Every count, by name: "step lenet-300-100 operations" and so on."""
    found: dict[str, int] = {}
    for model, dataset in STEPS:
        recipe = compose(model, dataset, settings={**FIXED, "data.validation": 64}).recipe
        found |= {f"step {model} {name}": n for name, n in step(recipe).items()}
        compute = dataclasses.replace(recipe.compute, engine="graph", precision="bf16", channels_last="on")
        graph = dataclasses.replace(recipe, compute=compute)
        found |= {f"graph step {model} {name}": n for name, n in step(graph).items()}
        found |= {f"graph step {model} on CUDA {name}": n for name, n in on_paper(graph).items()}
    found |= {f"twenty rounds {name}": n for name, n in twenty_rounds().items()}
    found |= {f"ticket {name}": n for name, n in ticket_bytes().items()}
    found["modules imported by --help"] = help_modules()
    return found


def step(recipe: Recipe) -> dict[str, int]:
    """Of one training step with masks: dispatched operations, optimizer launches, host reads, FLOPs, bytes touched."""
    source = random_source(recipe.data.name, images=recipe.data.validation + recipe.train.batch_size)
    engine = make_engine(recipe, source)
    engine.set_masks(masks_of_round(recipe, 1)[0])
    call = _step_of(engine, recipe.train.batch_size)
    host_reads = 0
    seen = _Seen()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as flops, seen:
        try:
            call()
        except DataDependentOutputException:
            host_reads = 1
    launches = sum(n for name, n in seen.operations.items() if "_fused_" in name or "masked_step" in name)
    return {"operations": seen.operations.total(), "optimizer launches": launches, "host reads": host_reads,
            "FLOPs": int(flops.get_total_flops()), "bytes": seen.bytes}  # fmt: skip


def _step_of(engine: Engine, size: int) -> Callable[[], object]:
    if isinstance(engine, GraphEngine):
        return lambda: engine.train_step(size)
    assert isinstance(engine, DenseEngine)
    batch = next(iter(engine._loader.batches(0, 1)))
    return lambda: engine._step(Batch(batch.images, batch.labels, batch.epoch, batch.position))


class OnPaper(GraphEngine):
    """The graph engine of a GPU that need not be there: made under FakeTensorMode, without values and graphs."""

    def _build(self, dtype: torch.dtype) -> nn.Module:
        recipe = self._recipe
        facts = recipe.data.facts
        with torch.device(self.device):
            return make(recipe.model.name, facts.shape, facts.classes, recipe.model.batch_norm)

    def _captured(self) -> Graphs:
        return {}


class NoBackward:
    """Gradients without a backward pass, which autograd cannot make for a device that is not there; the counts of a
    step on a CPU have it. In the place of a smaller net."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def gradients(self, _loss: torch.Tensor) -> list[torch.Tensor]:
        return [torch.zeros_like(stored(p)) for p in self._arena.leaves]

    def gather(self) -> None:
        """Nothing."""


def on_paper(recipe: Recipe) -> dict[str, int]:
    """What a step on a CPU cannot show of one on CUDA, but for its backward pass: host reads of a step and an
    evaluation, operations that take or give a tensor that is not on the device; and the graphs of a search."""
    source = random_source(recipe.data.name, images=recipe.data.validation + recipe.train.batch_size)
    recipe = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, device="cuda:0"))
    splits, host_reads, seen = make_splits(recipe, source), 0, _Seen()
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = OnPaper(recipe, make_order(recipe, len(splits["train"].labels)), splits)
        engine.small = NoBackward(engine.arena)  # type: ignore[assignment]
        nowhere = StepTable(engine.arena.settings, engine.arena.settings)  # addresses, which fake tensors have not
        try:
            with seen:
                engine.train_step(recipe.train.batch_size, nowhere)
                engine.net.eval()
                engine.evaluation_step(engine.evaluation_batch)
        except DataDependentOutputException:
            host_reads = 1
    return {"host reads": host_reads, "operations elsewhere": seen.elsewhere, "graphs": len(engine.batch_sizes) + 1}


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that touch memory, and the bytes of the tensors they take and give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()
        self.bytes = self.elsewhere = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("aten", "fastlth") and not func.is_view and "aten.detach" not in str(func):
            self.operations[str(func)] += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            self.elsewhere += any(t.device.type == "cpu" for t in tensors)
        return out


def twenty_rounds() -> dict[str, int]:
    """Graphs compiled for a whole search of a small net, graph breaks, and graphs added after round 0."""
    settings = {**FIXED, "compute.compile": "on", "train.iterations": 4, "train.batch_size": 32, "prune.rounds": 20,
                "evaluate.every": 4, "data.validation": 64}  # fmt: skip
    recipe = compose("conv-2", "digits", settings=settings).recipe
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for event in find_tickets(recipe, random_source("digits", images=192), recipe.compute):
        if isinstance(event, RoundFinished):
            graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs[0], "graph breaks": sum(counters["graph_break"].values()),
            "graphs after round 0": graphs[-1] - graphs[0]}  # fmt: skip


def ticket_bytes() -> dict[str, int]:
    """Per thousand of the order-0 entropy bound: what LeNet's masks of twenty rounds take in a ticket."""
    recipe = compose("lenet-300-100", "mnist", settings={**FIXED, "prune.scope": "global", "prune.scale": {}}).recipe
    search = ticket.synthetic(dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, rounds=20)))
    stored = sum(len(codec.encode(at)[0]) for at in search.pruned_at.values())
    bound = ticket.entropy(removed_per_round(search.pruned_at))
    theta = EncodedTheta.of(search.rewind)
    return {"masks per thousand of entropy": round(1000 * stored / bound),
            "theta0 bytes": sum(int(p.nbytes) for p in theta.payloads.values())}  # fmt: skip


def help_modules() -> int:
    """Modules in a process that has printed ``fastlth --help``."""
    script = (
        "import sys, io; sys.argv = ['fastlth', '--help']; out, sys.stdout = sys.stdout, io.StringIO()\n"
        "from fastlth.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(len(sys.modules), file=out)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(done.stdout)
