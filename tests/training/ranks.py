"""What each process of a team does in test_parallel.py: ``python -m tests.training.ranks OUT``, as torchrun starts it.

Rank 0 trains by LeadingEngine, the other follows; both leave their tensors in OUT/<case>-<rank>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlth.models import build
from fastlth.recipe import Recipe
from fastlth.training.engines import dense
from fastlth.training.engines.base import Engine
from fastlth.training.parallel import lead
from fastlth.training.parallel.team import join
from tests.helpers import half_masks, random_source, small_recipe

STEPS = 100
CASES: dict[str, dict[str, Any]] = {
    "adam": {"train__batch_size": 31, "train__weight_decay": 0.01, "model__dropout": 0.25},
    "batch-norm": {
        "model": "conv-2", "model__batch_norm": True, "train__optimizer": "sgd", "train__momentum": 0.9,
        "train__lr": 0.01, "train__batch_size": 25, "train__drop_last": False, "data__augment": "flip-crop",
    },
    "own": {
        "model": "tests.training.ranks:own_net", "train__optimizer": "sgd", "train__lr": 0.01, "train__batch_size": 33,
    },
}  # fmt: skip


def own_net(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """One's own net: a batch norm in two places, and one that looks at each image alone."""
    channels, height, width = shape
    norm = nn.BatchNorm2d(16)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), norm,
        nn.InstanceNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * height * width, classes),
    )  # fmt: skip


def own_dropping(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(own_net(shape, classes), nn.Dropout(0.1))


def own_of_one_dimension(shape: tuple[int, int, int], classes: int) -> nn.Module:
    inputs = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(inputs), nn.Linear(inputs, classes))


def recipe(case: str) -> Recipe:
    return small_recipe(**{"train__iterations": 2 * STEPS, "evaluate__every": STEPS, **CASES[case]})


def in_float64() -> None:
    """From here on this process builds its nets in float64, where two orders of a sum differ by 1e-16 only."""
    dense.build = lambda recipe: build(recipe).double()  # type: ignore[attr-defined]


def trained(engine: Engine) -> None:
    """Half of the steps, a state that is loaded again, a detour, and the other half."""
    weights = {n: t.clone() for n, t in engine.weights().items()}
    engine.set_masks(half_masks({n: weights[n] for n in engine.prunable}))
    engine.rewind(weights)
    engine.run(0, STEPS // 2)
    engine.interval()
    state = {n: t.clone() for n, t in engine.state().items()}
    engine.run(0, 3)
    engine.interval()
    engine.load_state(state)
    engine.run(STEPS // 2, STEPS)


def main(out: Path) -> None:
    in_float64()
    engines: list[Engine] = []
    make = lead._engine
    lead._engine = lambda *given: engines.append(make(*given)) or engines[-1]  # type: ignore[func-returns-value]
    with join() as team:
        assert team is not None
        if team.rank == 0:
            with lead.leading(team):
                for case in CASES:
                    engines.append(lead.LeadingEngine(team, recipe(case), random_source("digits", 331)))
                    trained(engines[-1])
        else:
            lead.follow(team, lambda data: random_source(data.name, 331))
        for case, engine in zip(CASES, engines, strict=True):
            torch.save({n: t.clone() for n, t in engine.state().items()}, out / f"{case}-{team.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
