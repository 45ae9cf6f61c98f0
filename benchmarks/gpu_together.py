"""Replicates at once, as the command would measure them: images/s of all together, alone, as one net, on streams."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.gpu import Ledger
from benchmarks.gpu_subject import recipe, source
from fastlth import together

MODELS = (("vgg19", "cifar-10"), ("conv-2", "cifar-10"), ("conv-4", "cifar-10"), ("conv-6", "cifar-10"),
          ("resnet-20", "cifar-10"), ("lenet-300-100", "mnist"))  # fmt: skip
COUNTS = (2, 4, 8)
SECONDS = 45.0  # that the three ways of one row take at most, most of them for captures


def measure(ledger: Ledger) -> None:
    for model, dataset in (("conv-2", "digits"),) if ledger.dry else MODELS:
        for count in (2,) if ledger.dry else COUNTS:
            _row(ledger, model, dataset, count)


def _row(ledger: Ledger, model: str, dataset: str, count: int) -> None:
    if ledger.has(subject="together", model=model, replicates=count):
        return
    if ledger.time_left() < (1 if ledger.dry else SECONDS):
        ledger.left_out.append(f"{model} {count} replicates")
        return
    settings: dict[str, Any] = {"train.iterations": 4, "evaluate.every": 4} if ledger.dry else {}
    one = recipe(ledger, model, dataset, **settings)
    some = [dataclasses.replace(one, seeds=dataclasses.replace(one.seeds, base=r)) for r in range(count)]
    images, kind = source(ledger, dataset)
    ways = [way for way, unsupported in together.UNSUPPORTED.items() if not unsupported(one)]
    try:
        rates = together.measured(some, images, ways)
    except Exception as error:  # one net that cannot run must not take the others' rows with it
        ledger.left_out.append(f"{model} {count} replicates: {type(error).__name__} {str(error)[:200]}")
        return
    ledger.row(subject="together", model=model, replicates=count, batch=one.train.batch_size, images=kind,
               precision=one.compute.precision, **rates)  # fmt: skip
