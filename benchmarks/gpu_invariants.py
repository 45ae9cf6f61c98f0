"""What docs/architecture.md promises, on the device: each check counts what is wrong, or measures how far off it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Ledger
from benchmarks.gpu_subject import recipe, with_compute
from fastlth.bench.subject import masks_of_round, random_source
from fastlth.data.sources import Source
from fastlth.pruning import prune
from fastlth.recipe import Recipe, exact
from fastlth.search import RoundFinished, find_tickets
from fastlth.training import worth
from fastlth.training.engines import make
from fastlth.training.engines.arena import Arena
from fastlth.training.engines.base import Engine
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine
from fastlth.training.engines.streams import Streams

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"train.optimizer": "sgd", "train.lr": 0.05, "train.momentum": 0.9, "train.nesterov": True,
            "train.weight_decay": 1e-3},
    "adam": {"train.optimizer": "adam", "train.lr": 1e-3, "train.momentum": 0.0, "train.weight_decay": 1e-3},
    "adamw": {"train.optimizer": "adamw", "train.lr": 1e-3, "train.momentum": 0.0, "train.weight_decay": 1e-2},
}  # fmt: skip
BASE = {"train.iterations": 12, "train.batch_size": 48, "train.drop_last": False, "evaluate.every": 12,
        "schedule.warmup": 2, "schedule.milestones": [], "data.validation": 64, "prune.rounds": 3}  # fmt: skip
AUGMENTED = {"model.batch_norm": True, "data.augment": "flip-crop"}
IMAGES = 304  # five whole batches, since 64 are held out


def measure(ledger: Ledger) -> None:
    for name in OPTIMIZERS:
        for engine in ("dense", "graph"):
            for precision in ("fp32", "bf16"):
                ledger.attempt(f"{engine} {name} {precision}", partial(_pruned_stay, ledger, name, engine, precision))
    for check in (_nan, _counts, _pruning, _no_waiting, _same_bits, _streams, _loaders):
        ledger.attempt(check.__name__.removeprefix("_"), partial(check, ledger))
    with _whole_fp32():
        ledger.attempt("smaller", partial(_smaller, ledger))
        others = {"graph and dense": {"engine": "dense"}, "here and on a CPU": {"device": "cpu"}}
        if not ledger.dry:
            others |= {"torch and triton kernels": {"kernels": "triton"}, "eager and compiled": {"compile": "on"}}
        for name, change in others.items():
            ledger.attempt(name, partial(_against, ledger, name, change))
    if not ledger.dry:
        ledger.attempt("graphs", partial(_graphs, ledger))


def _conv(ledger: Ledger, optimizer: str = "sgd", **compute: Any) -> tuple[Recipe, Source]:
    dataset = "digits" if ledger.dry else "cifar-10"
    one = recipe(ledger, "conv-2", dataset, **{**BASE, **AUGMENTED, **OPTIMIZERS[optimizer]})
    return with_compute(one, **{"precision": "fp32", **compute}), random_source(dataset, images=IMAGES)


def _begun(one: Recipe, source: Source) -> tuple[Engine, dict[str, Tensor]]:
    engine = make_engine(one, source)
    masks = {n: m.to(one.compute.device) for n, m in masks_of_round(one, 4)[0].items()}
    start = {n: t.clone() for n, t in engine.weights().items()}
    engine.set_masks(masks)
    engine.rewind(start)
    return engine, masks


def _wrong_bits(engine: Engine, masks: Mapping[str, Tensor]) -> int:
    weights = engine.weights()
    return sum(int((weights[n].contiguous().view(torch.int32)[~m] != 0).sum()) for n, m in masks.items())


def _pruned_stay(ledger: Ledger, optimizer: str, kind: str, precision: str) -> None:
    engine, masks = _begun(*_conv(ledger, optimizer, engine=kind, precision=precision))
    before = {n: engine.weights()[n].clone() for n in masks}
    wrong = 0
    for i in range(3 if ledger.dry else 12):
        engine.run(i, i + 1)
        wrong += _wrong_bits(engine, masks)
    ledger.check(f"{kind} {optimizer} {precision}: pruned weights that are not +0.0", wrong, 0)
    still = sum(int(torch.equal(before[n], engine.weights()[n])) for n in masks)
    ledger.check(f"{kind} {optimizer} {precision}: layers that did not learn", still, 0)


def _nan(ledger: Ledger) -> None:
    results = []
    for poison in (0.0, float("nan")):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(5, 40, 3), torch.nn.Linear(7, 33)).to(ledger.device)
        arena = Arena(net, ["0.weight", "1.weight"], _conv(ledger)[0].train, "bf16")
        masks = {n: torch.rand(w.shape) < 0.5 for n, w in arena.weights.items() if w.dim() > 1}
        arena.set_masks(masks)
        for _ in range(3):
            gradients = [torch.full_like(w, 0.5) for w in arena._weights]
            for name, g in zip(arena.names, gradients, strict=True):
                if name in masks:
                    mask = masks[name].permute(0, 2, 3, 1) if masks[name].dim() == 4 else masks[name]
                    g[~mask.to(g.device)] = poison
            arena.step(gradients, arena.table(gradients))
        results.append(dict(arena.flat))
    ledger.check("values that a NaN gradient at a pruned weight changed", _different(*results), 0)


def _different(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> int:
    """Tensors whose bits differ."""
    return sum(not torch.equal(a[n].cpu().reshape(-1).view(torch.uint8), b[n].cpu().reshape(-1).view(torch.uint8))
               for n in a)  # fmt: skip


def _counts(ledger: Ledger) -> None:
    one, source = _conv(ledger, engine="graph")
    one = replace(one, prune=replace(one.prune, rate=0.2, scale={"conv*": 0.5, "output": 0.5}, scope="layer"))
    for event in find_tickets(one, source, one.compute):
        if isinstance(event, RoundFinished) and event.round:
            now, before = event.ticket.mask(event.round), event.ticket.mask(event.round - 1)
            ledger.check(f"round {event.round}: weights that came back",
                         sum(int((now[n] & ~before[n]).sum()) for n in now), 0)  # fmt: skip
            gone = {n: int(exact(0.2 if n.startswith("fc") else 0.1) * int(before[n].sum())) for n in now}  # floor
            wrong = sum(abs(int(before[n].sum()) - gone[n] - int(now[n].sum())) for n in now)
            ledger.check(f"round {event.round}: weights too many or too few", wrong, 0)


def _pruning(ledger: Ledger) -> None:
    """The kernel and the scores choose the same weights, most of which are tied."""
    one, source = _conv(ledger, engine="graph")
    engine, masks = _begun(one, source)
    final = {n: engine.weights()[n] for n in masks}
    for name, values in (("trained", final), ("rounded", {n: w.mul(8).round() / 8 for n, w in final.items()})):
        arguments: Any = {"numbers": {n: i for i, n in enumerate(engine.weight_names)}, "round": 3, "key": (7, 5)}
        section = replace(one.prune, scope="global", scale={}, rate=0.3)
        here = prune(section, masks, values, values, **arguments)
        there = [{n: t.cpu() for n, t in part.items()} for part in (masks, values)]
        expected = prune(section, *there, there[1], **arguments)
        wrong = sum(int((here[n].cpu() != m).sum()) for n, m in expected.items())
        ledger.check(f"{name} weights that the device prunes otherwise than a CPU", wrong, 0)


def _smaller(ledger: Ledger) -> None:
    """Five steps of the smaller net and of the whole one, by norm; graphs of the same widths serve other units."""
    one, source = _conv(ledger, engine="graph", compact=1.0)
    small, whole = (make_engine(r, source) for r in (one, with_compute(one, compact=0.0)))
    assert isinstance(small, GraphEngine) and isinstance(whole, GraphEngine)
    start = {n: t.clone() for n, t in small.weights().items()}
    masks = worth.half_of_the_units(small)
    for name, some in (("first half", masks), ("second half", {n: m.flip(0, 1) for n, m in masks.items()})):
        for engine in (small, whole):
            engine.set_masks(some)
            engine.rewind(start)
            engine.run(0, 5)
        ledger.check(f"smaller net, {name}: rounds that were whole", float(small.small is None), 0)
        a, b = (torch.cat([w.weights()[n].cpu().double().reshape(-1) for n in masks]) for w in (small, whole))
        ledger.check(f"smaller net, {name}: weights after five steps, relative error by norm",
                     float((a - b).norm() / b.norm()), 1e-4)  # fmt: skip


def _no_waiting(ledger: Ledger) -> None:
    """A replayed epoch under torch's own watch for anything that waits for the device."""
    one, source = _conv(ledger, engine="graph", precision="bf16")
    engine, _ = _begun(one, source)
    assert isinstance(engine, GraphEngine)
    waited = 0
    with engine.settings():
        engine._go_to(0, 0, 0, 0)
        try:
            if not ledger.dry:
                torch.cuda.set_sync_debug_mode("error")
            for _ in range(4):
                engine._play("train 48", engine.train_step, 48)
            engine._go_to(5, 1, 0, 4)
        except RuntimeError as error:
            print(error, flush=True)
            waited = 1
        finally:
            if not ledger.dry:
                torch.cuda.set_sync_debug_mode("default")
    ledger.check("steps that waited for the device", waited, 0)


def _same_bits(ledger: Ledger) -> None:
    one, source = _conv(ledger, engine="graph", precision="bf16", deterministic=True)
    whole, again, rest = (_begun(one, source)[0] for _ in range(3))
    whole.run(0, 12)
    again.run(0, 5)
    rest.load_state({n: t.clone() for n, t in again.state().items()})
    again.run(5, 12)
    rest.run(5, 12)
    ledger.check("tensors that differ when the same steps are made twice", _different(whole.state(), again.state()), 0)
    ledger.check("tensors that differ after a resume", _different(whole.state(), rest.state()), 0)
    scores = [engine.evaluate("validation") for engine in (whole, again)]
    ledger.check("scores that differ", float(scores[0] != scores[1]), 0)


def _streams(ledger: Ledger) -> None:
    """Three replicates on streams of one graph beside their single runs."""
    one, source = _conv(ledger, engine="graph", precision="bf16", deterministic=True)
    some = [replace(one, seeds=replace(one.seeds, base=r)) for r in range(3)]
    made = Streams(some, source)
    made.advance(0, 12)
    wrong = 0
    for each, member in zip(some, made.members, strict=True):
        single = make_engine(each, source)
        single.run(0, 12)
        wrong += _different(single.state(), member.state())
    ledger.check("tensors of replicates on streams that differ from their single runs'", wrong, 0)


def _loaders(ledger: Ledger) -> None:
    one, source = _conv(ledger, engine="dense", deterministic=True)
    resident, streamed = make_engine(one, source), make._streamed(one, source)
    for engine in (resident, streamed):
        engine.run(0, 12)
    ledger.check("tensors that differ between loaders", _different(resident.state(), streamed.state()), 0)


@contextmanager
def _whole_fp32() -> Iterator[None]:
    """Products of fp32 and not TF32, or two right ways would differ by a thousandth."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _against(ledger: Ledger, name: str, change: Mapping[str, Any]) -> None:
    """Five steps of Conv-2 in fp32, by norm; after more a last bit moves a maximum to another pixel."""
    one, source = _conv(ledger, engine="graph")
    ways = [_begun(r, source)[0] for r in (one, with_compute(one, **change))]
    for engine in ways:
        engine.run(0, 5)
    a, b = (torch.cat([t.cpu().double().reshape(-1) for n, t in w.weights().items() if n.endswith("weight")])
            for w in ways)  # fmt: skip
    ledger.check(f"{name}: weights after five steps, relative error by norm", float((a - b).norm() / b.norm()), 1e-4)


def _graphs(ledger: Ledger) -> None:
    """Compiled graphs and captures in a search of four rounds: all of them are made before the first ends."""
    from torch._dynamo.utils import counters

    one, source = _conv(ledger, engine="graph", compile="on")
    torch._dynamo.reset()
    counters.clear()
    graphs = [counters["stats"]["unique_graphs"] for event in find_tickets(one, source, one.compute)
              if isinstance(event, RoundFinished)]  # fmt: skip
    ledger.check("graphs compiled after round 0", graphs[-1] - graphs[0], 0)
    # one for each batch size of a step, of which these images need one, and evaluation's
    ledger.check("graphs compiled, of whole batch and evaluation", abs(graphs[0] - 2), 0)
