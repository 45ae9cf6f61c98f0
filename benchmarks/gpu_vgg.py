"""Twenty rounds of VGG-19 on CIFAR-10 at a share of the paper's length, by the graph engine."""

from __future__ import annotations

from benchmarks.gpu import Ledger
from benchmarks.gpu_searches import search
from benchmarks.gpu_subject import recipe, source

ITERATIONS = 400  # of 112,000 in the paper


def measure(ledger: Ledger) -> None:
    settings = {"train.iterations": 4, "evaluate.every": 4, "prune.rounds": 3} if ledger.dry else {
        "train.iterations": ITERATIONS, "evaluate.every": ITERATIONS // 2, "prune.rounds": 20,
        "data.augment": "flip-crop"}  # fmt: skip
    images, kind = source(ledger, "cifar-10")
    one = recipe(ledger, "conv-2" if ledger.dry else "vgg19", "cifar-10", **settings)
    search(ledger, one, images, kind, iterations=one.train.iterations)
