"""Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv 1912.05671).

Three initialisations, three pairs of copies of each; LeNet trains for 24,000 iterations here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlth.experiments.control import Control
from fastlth.experiments.figures.declare import Against, Arm, Between, Branched, Copied, Figure, Follow, Instability

SOURCE = "Frankle et al. 2020, arXiv 1912.05671"
PAIRS = ((1, 2), (3, 4), (5, 6))
SPARSEST = {"lenet-300-100": 15, "resnet-20": 8, "vgg16": 19}
"""the round whose density the paper looks at: 3.5 %, 16.8 % and 1.5 %"""
RESIDUAL: Mapping[str, Any] = {
    "model.weight_init": "kaiming", "model.norm_init": "uniform", "train.iterations": 63_000, "train.lr": 0.1,
    "schedule.warmup": 0, "schedule.milestones": [32_000, 48_000], "prune.scale": {},
}  # fmt: skip
"""where it differs from Frankle & Carbin's ResNet-20: these prune all weights"""
NETS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "lenet-300-100": ("LeNet", "mnist", {"train.iterations": 24_000}),
    "resnet-20": ("ResNet-20", "cifar-10", RESIDUAL),
    "vgg16": ("VGG-16", "cifar-10", {"prune.rewind_to": 0}),
}
STEPS = {
    "lenet-300-100": (0, 100, 500, 1_000, 2_000, 5_000, 10_000),
    "resnet-20": (0, 500, 1_000, 2_000, 5_000, 10_000, 20_000),
    "vgg16": (0, 500, 1_000, 2_000, 5_000, 10_000, 20_000),
}


def net(model: str, *follow: Follow, rounds: int = 0, drawn: bool = False) -> Arm:
    """The search in a net's tickets; ``rounds`` 0: the dense net alone, of which copies are then trained."""
    panel, dataset, settings = NETS[model]
    return Arm(label="tickets", panel=panel, model=model, dataset=dataset, settings=settings, rounds=rounds,
               replicates=3, follow=follow, drawn=drawn, short_rounds=rounds)  # fmt: skip


def _random(model: str) -> tuple[Branched, ...]:
    rounds = (SPARSEST[model],)
    return (
        Branched(label="random pruning", control=Control(kind="random-prune"), rounds=rounds),
        Branched(label="random reinit", control=Control(kind="random-reinit"), rounds=rounds),
    )


FIGURES = (
    Figure(
        name="lmc-2", what="error between two copies that part at initialisation", source=f"{SOURCE}, figure 2",
        arms=tuple(net(m, Copied(label="dense", pairs=PAIRS)) for m in NETS), pictures=(Between(),),
        note="The paper: LeNet's error rises by less than a point, the other nets' to that of guessing.",
    ),
    Figure(
        name="lmc-3", what="instability against the iteration at which two copies part", source=f"{SOURCE}, figure 3",
        arms=tuple(net(m, Copied(label="dense", at=STEPS[m], pairs=PAIRS)) for m in NETS), pictures=(Instability(),),
        note="The paper: LeNet is stable from the start, ResNet-20 from iteration 2,000, VGG-16 from 1,000. The "
             "iterations are chosen here.",
    ),
    Figure(
        name="lmc-4", what="instability where the copies train for the whole schedule after they part",
        source=f"{SOURCE}, figure 4",
        arms=tuple(net(m, Copied(label="what is left of the schedule", at=STEPS[m], pairs=PAIRS),
                       Copied(label="the whole schedule", at=STEPS[m], pairs=PAIRS, whole=True)) for m in NETS),
        pictures=(Instability(),), note="The iterations are chosen here.",
    ),
    Figure(
        name="lmc-5", what="error between two copies of a sparse net that part at initialisation",
        source=f"{SOURCE}, figure 5",
        arms=tuple(net(m, Copied(label="net", rounds=(0, SPARSEST[m]), pairs=PAIRS), rounds=SPARSEST[m])
                   for m in NETS),
        pictures=(Between(),),
        note="The dense net and the ticket; the paper also has randomly pruned and reinitialised nets.",
    ),
    Figure(
        name="lmc-table-2", what="accuracy of the sparsest nets: tickets, random pruning, random reinitialisation",
        source=f"{SOURCE}, table 2",
        arms=tuple(net(m, *_random(m), rounds=SPARSEST[m], drawn=True) for m in NETS),
        pictures=(Against("test_accuracy"),),
        note="The paper: at these densities the tickets of LeNet match the dense net, those of ResNet-20 and VGG-16 "
             "do not.",
    ),
)  # fmt: skip
