"""Peak memory is of the path alone, in a process that takes nothing over from this one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from fastlth.bench import memory, rounds, step
from fastlth.bench.rivals import Eager
from fastlth.bench.subject import Ours, masks_of_round, random_source, recipe_for
from fastlth.composition import compose
from fastlth.errors import EnvironmentFailure
from fastlth.training.engines.dense import DenseEngine
from tests.helpers import CPU

MB = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")


def small():
    compute = compose("lenet-300-100", "digits", settings=CPU).recipe.compute
    return dataclasses.replace(recipe_for("lenet-300-100", "digits"), compute=compute)


@linux
def test_a_peak_is_seen_after_it_is_over_and_the_parents_is_not():
    held = bytearray(300 * MB)  # in this process, every page touched
    held[::4096] = b"x" * len(held[::4096])
    script = (
        "from fastlth.bench.memory import resident_peak; before = resident_peak()\n"
        "taken = bytearray(200_000_000); taken[::4096] = b'x' * len(taken[::4096]); del taken\n"
        "print(before, resident_peak())"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert 195 * MB < after - before < 230 * MB
    assert before < memory.resident_peak() - 250 * MB and memory.resident_peak() > len(held)


@linux
def test_paths_are_measured_each_in_its_process():
    found = memory.peak_bytes(small(), "step", ["ours", "eager"], 3)
    assert list(found) == ["ours", "eager"] and all(100 * MB < n < 4000 * MB for n in found.values())
    assert found["ours"] != found["eager"]


def test_a_path_that_fails_is_named():
    with pytest.raises(EnvironmentFailure, match=r"memory of sideways failed: .*no path 'sideways'"):
        memory.peak_bytes(small(), "step", ["sideways"])


def weights_of(steps):
    """A copy of the weights that ``steps``, a path's work, trains."""
    trained = steps.__self__
    now = trained.engine.weights() if isinstance(trained, Ours) else trained.model.state_dict()
    return {name: tensor.clone() for name, tensor in now.items()}


@pytest.mark.parametrize("path", ["ours", step.OUR_DENSE, "eager", "plain"])
def test_every_path_of_a_step_alone_trains_the_kept_weights(path):
    recipe = small()
    masks, _ = masks_of_round(recipe, 2)
    steps = step.work(recipe, random_source("digits", images=recipe.data.validation + 100), path, masks)
    before = weights_of(steps)
    steps(2)
    after = weights_of(steps)
    for name, mask in masks.items():
        changed = after[name] != before[name]
        assert changed[mask].float().mean() > 0.5, name
        assert not after[name][~mask].any(), name


@pytest.mark.parametrize("path", ["ours", "eager"])
def test_every_path_of_a_round_alone_trains_and_evaluates_as_a_search(path, monkeypatch):
    recipe = rounds.with_validation(small())
    assert recipe.data.validation == 300
    source, _ = rounds.source(recipe)
    sizes = {300: "validation", len(source.test.labels): "test"}
    assert len(sizes) == 2
    done = []

    def told(owner, name, says):
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *given: done.append(says(*given)) or whole(self, *given))

    told(Ours, "steps", lambda count: count)
    told(Eager, "steps", lambda count: count)
    told(DenseEngine, "evaluate", lambda split: split)
    told(Eager, "evaluate", lambda images, labels: sizes[len(labels)])
    rounds.work(recipe, source, path, interval=2)(5)
    one = [2, "validation"]
    assert done == [*one, "test", *one, *one, *one, *one, "test"]  # the test set at every fourth evaluation
