"""The search that all tests of branches stand on, and training and pruning it by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import torch

from fastlth.data.sources import data_root, load
from fastlth.metrics import TIMING_FIELDS
from fastlth.models import build
from fastlth.training.engines.make import make_engine
from tests.helpers import small_recipe

T = 40
LAYERS = {"fc1.weight": 0.2, "fc2.weight": 0.2, "output.weight": 0.1}


def recipe_of(**settings):
    return small_recipe(**{"prune__rounds": 3, "schedule__milestones": [30], **settings})


def dense_by_hand(recipe, first=0, last=T, start=None, masks=None):
    """Plain steps of an engine: parameters and buffers after training."""
    engine = make_engine(recipe, load("digits", data_root()))
    engine.set_masks(masks or {n: torch.ones_like(engine.weights()[n], dtype=torch.bool) for n in LAYERS})
    engine.rewind(start or {n: t.clone() for n, t in build(recipe).state_dict().items()})
    for i in range(first, last):
        if i % 10 == 0:
            engine.interval()
        engine.run(i, i + 1)
    return {n: t.clone() for n, t in engine.weights().items()}


def pruned_by_hand(weights, masks, rates):
    """Sort magnitudes, remove floor(rate * kept): numpy, and no ties in trained weights."""
    new = {}
    for name, rate in rates.items():
        w, m = np.abs(weights[name].numpy()).reshape(-1), masks[name].numpy().reshape(-1).copy()
        kept = np.flatnonzero(m)
        gone = kept[np.argsort(w[kept], kind="stable")][: math.floor(rate * len(kept) + 1e-9)]
        m[gone] = False
        new[name] = torch.from_numpy(m.reshape(masks[name].shape))
    return new


def full():
    return {n: torch.ones(s, dtype=torch.bool) for n, s in zip(LAYERS, [(300, 64), (100, 300), (10, 100)], strict=True)}


def assert_same_masks(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def untimed(result):
    return {k: v for k, v in result.items() if k not in (*TIMING_FIELDS, "trial")}


def lines(folder):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMING_FIELDS} for x in text]
