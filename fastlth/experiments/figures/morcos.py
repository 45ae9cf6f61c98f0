"""Morcos et al. 2019, "One ticket to win them all" (arXiv 1906.02773): VGG-19's tickets on other data and optimizers.

Global scope, 30 rounds, rewound to the end of the first epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlth.experiments.figures.declare import Against, Arm, Carried, Figure, Follow, Stated

SGD: Mapping[str, Any] = {"schedule.warmup": 0, "prune.rewind_to": "1ep"}
CIFAR_100: Mapping[str, Any] = {  # the paper's preset for CIFAR-10, which ours covers alone
    **SGD,
    "data.augment": "flip-crop",
    "train.iterations": 112_480,
    "train.batch_size": 64,
    "train.optimizer": "sgd",
    "train.lr": 0.1,
    "train.momentum": 0.9,
    "train.weight_decay": 1e-4,
    "schedule.milestones": [56_240, 84_360],
    "prune.rate": 0.2,
    "prune.scope": "global",
    "prune.scale": {"output": 0.0},
}
ADAM: Mapping[str, Any] = {**SGD, "train.optimizer": "adam", "train.lr": 3e-4, "train.momentum": 0.0}
DENSITIES = {0: 1.0, 7: 0.21, 10: 0.107, 14: 0.044, 18: 0.018, 21: 0.0092, 24: 0.0047, 30: 0.0012}
"""round -> density"""
CARRIED = tuple(DENSITIES)
REPLICATION = {0: 0.9258, 7: 0.9286, 10: 0.9267, 14: 0.9307, 18: 0.9288, 21: 0.9246, 24: 0.9173, 30: 0.8060}


def vgg(panel: str, dataset: str, settings: Mapping[str, Any], *follow: Follow) -> Arm:
    """VGG-19's search on a data set: 30 rounds, then what is trained with its tickets elsewhere."""
    return Arm(label="own tickets", panel=panel, model="vgg19", dataset=dataset, settings=settings, rounds=30,
               replicates=6, follow=follow)  # fmt: skip


def _stated(panel: str, line: str, round: int, value: float) -> Stated:
    return Stated(panel=panel, line=line, quantity="test_accuracy", density=DENSITIES[round], value=value)


FIGURES = (
    Figure(
        name="morcos-transfer", what="VGG-19: tickets carried over to other data and to another optimizer",
        source="Morcos et al. 2019, arXiv 1906.02773; numbers of the replication in ReScience C",
        arms=(
            vgg("found by SGD", "cifar-10", SGD,
                Carried(label="trained by Adam", dataset="cifar-10", rounds=CARRIED,
                        settings={"train.optimizer": "adam"}),
                Carried(label="random tickets", dataset="cifar-10", rounds=CARRIED, random_ticket=True)),
            vgg("found by Adam", "cifar-10", ADAM,
                Carried(label="trained by SGD", dataset="cifar-10", rounds=CARRIED,
                        settings={"train.optimizer": "sgd"})),
            vgg("found on CIFAR-100", "cifar-100", CIFAR_100,
                Carried(label="trained on CIFAR-10", dataset="cifar-10", rounds=CARRIED)),
        ),
        pictures=(Against("test_accuracy"),),
        stated=(
            *(_stated("found by SGD", "own tickets", k, value) for k, value in REPLICATION.items()),
            _stated("found by SGD", "trained by Adam", 18, 0.9045),
            _stated("found by Adam", "trained by SGD", 18, 0.9232),
            _stated("found by Adam", "own tickets", 18, 0.9075),
            _stated("found on CIFAR-100", "trained on CIFAR-10", 10, 0.9293),
            _stated("found on CIFAR-100", "trained on CIFAR-10", 18, 0.9032),
        ),
        note="The replication's numbers are of single runs.",
    ),
)  # fmt: skip
