"""The graphs of one graph engine, or of several side by side: warmed up, captured once, and everything put back as it
was before.

Several engines share the graph of a step: it forks into a stream for each of them and joins again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fastlth_kernels.masked_step import StepTable

from fastlth.training import faults

if TYPE_CHECKING:
    from fastlth.training.engines.graph import GraphEngine

WARM_UP = 3  # calls before a capture: kernels are compiled and algorithms picked outside of it

Replay = Callable[[], object]


@dataclass(frozen=True)
class Captured:
    """What was captured of some engines."""

    steps: dict[int, Replay]
    """batch size -> a step of all of them"""
    evaluations: list[Replay]
    """of each, a step of its evaluation"""


def capture(engines: Sequence[GraphEngine]) -> Captured:
    """Leaves the tensors of ``engines``, which are on one device and of one recipe but for seeds, as it found them.

    Where memory is short the evaluation batch is halved until it fits, and ``engine.said`` tells so. Raises
    torch.OutOfMemoryError where a training step does not fit.
    """
    device, pool = engines[0].device, torch.cuda.graph_pool_handle()
    with _no_collection(), _as_before(engines):
        steps = {size: _training(engines, size, pool) for size in engines[0].batch_sizes}
        for engine in engines:
            engine.net.eval()
        evaluations = [fit_evaluation(e, lambda e=e: _evaluation(e, pool)) for e in engines]  # type: ignore[misc]
    torch.cuda.synchronize(device)
    return Captured(steps, evaluations)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Engines that nobody has any more are collected now: a graph that is destroyed while another is captured ruins the
    capture (pytorch#161037)."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _as_before(engines: Sequence[GraphEngine]) -> Iterator[None]:
    before = [(tensor, tensor.clone()) for engine in engines for tensor in engine.changing()]
    try:
        yield
    finally:
        for engine in engines:
            engine.net.train()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def fit_evaluation(engine: GraphEngine, attempt: Callable[[], Replay]) -> Replay:
    """What ``attempt`` makes, with the evaluation batch halved until it finds memory for it."""
    asked = engine.evaluation_batch
    while True:
        try:
            made = attempt()
        except torch.OutOfMemoryError:
            if engine.evaluation_batch == 1:
                raise
        else:
            if engine.evaluation_batch < asked:
                engine.said.append(faults.smaller_evaluation(engine.device, asked, engine.evaluation_batch))
            return made
        engine.evaluation_batch = -(-engine.evaluation_batch // 2)
        torch.cuda.empty_cache()


def _training(engines: Sequence[GraphEngine], size: int, pool: Any) -> Replay:
    stream = engines[0].lane("train" if len(engines) == 1 else "fork")
    lanes = [engine.lane("train") for engine in engines]
    # The step in the graph reads its gradients' addresses from a table, which is written once they are known.
    tables, gradients = [], []
    for engine, lane in zip(engines, lanes, strict=True):
        warm = _warmed(engine, lambda engine=engine: engine.train_step(size), lane)  # type: ignore[misc]
        tables.append(StepTable(*(tensor.clone() for tensor in engine.arena.table(warm))))
        del warm
    graph, beside = torch.cuda.CUDAGraph(), [lane for lane in lanes if lane is not stream]
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        for lane in beside:
            lane.wait_stream(stream)  # the fork
        try:
            for engine, lane, table in zip(engines, lanes, tables, strict=True):
                with torch.cuda.stream(lane):
                    gradients.append(engine.train_step(size, table))
        finally:  # a capture whose streams have not come back cannot be ended, also where memory was short
            for lane in beside:
                stream.wait_stream(lane)
    for engine, found, table in zip(engines, gradients, tables, strict=True):
        table.pointers.copy_(engine.arena.table(found).pointers)
    return _Graph(graph, gradients, tables)


def _evaluation(engine: GraphEngine, pool: Any) -> Replay:
    stream = engine.lane("evaluate")
    _warmed(engine, lambda: engine.evaluation_step(engine.evaluation_batch), stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        engine.evaluation_step(engine.evaluation_batch)
    return _Graph(graph)


def _warmed(engine: GraphEngine, call: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
    stream.wait_stream(torch.cuda.current_stream(engine.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            engine.to_begin()
            last = call()
    torch.cuda.current_stream(engine.device).wait_stream(stream)
    return last


class _Graph:
    """A captured graph and what has to live as long as it does."""

    def __init__(self, graph: torch.cuda.CUDAGraph, *kept: object) -> None:
        self._graph, self._kept = graph, kept

    def __call__(self) -> None:
        self._graph.replay()
