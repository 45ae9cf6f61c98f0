"""The graphs of a graph engine: warmed up, captured once, and everything put back as it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from fastlth_kernels.masked_step import StepTable

from fastlth.training import faults

if TYPE_CHECKING:
    from fastlth.training.engines.graph import GraphEngine

WARM_UP = 3  # calls before a capture: kernels are compiled and algorithms picked outside of it

Replay = Callable[[], object]


def capture(engine: GraphEngine) -> dict[str, Replay]:
    """Graphs by name: "train N" for each batch size, and "evaluate". Leaves the engine's tensors as it found them.

    Where memory is short the evaluation batch is halved until it fits, and ``engine.said`` tells so. Raises
    torch.OutOfMemoryError where a training step does not fit.
    """
    before = [tensor.clone() for tensor in engine.changing()]
    place = (torch.cuda.graph_pool_handle(), torch.cuda.Stream(engine.device))  # type: ignore[no-untyped-call]
    try:
        graphs = {f"train {size}": _training(engine, size, *place) for size in engine.batch_sizes}
        engine.net.eval()
        graphs["evaluate"] = fit_evaluation(engine, lambda: _evaluation(engine, *place))
    finally:
        engine.net.train()
        with torch.no_grad():
            for tensor, value in zip(engine.changing(), before, strict=True):
                tensor.copy_(value)
    torch.cuda.synchronize(engine.device)
    return graphs


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


def _training(engine: GraphEngine, size: int, pool: Any, stream: torch.cuda.Stream) -> Replay:
    gradients = _warmed(engine, lambda: engine.train_step(size), stream)
    # The step in the graph reads its gradients' addresses from a table, which is written once they are known.
    where = StepTable(*(tensor.clone() for tensor in engine.arena.table(gradients)))
    del gradients
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        gradients = engine.train_step(size, where)
    where.pointers.copy_(engine.arena.table(gradients).pointers)
    return _Graph(graph, gradients, where)


def _evaluation(engine: GraphEngine, pool: Any, stream: torch.cuda.Stream) -> Replay:
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
