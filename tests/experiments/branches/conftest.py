"""A finished search, a copy of it to write to, and what a control would start from."""

from __future__ import annotations

import shutil

import pytest

from fastlth import running
from fastlth.experiments.branch import branch
from fastlth.experiments.trial import Trial
from tests.experiments.branches.by_hand import recipe_of


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search of three rounds, never written to by a test that does not copy it."""
    recipe = recipe_of()
    return running.run(recipe, out=tmp_path_factory.mktemp("runs")).replicates[0].path


@pytest.fixture
def run(found, tmp_path):
    copied = tmp_path / "run" / "r0"
    shutil.copytree(found, copied)
    return copied


@pytest.fixture
def starts(monkeypatch):
    """Every training's start instead of the training: starts(run, control, ...) -> [(round, trial, Start)]."""

    def collect(run, control, **options):
        seen = []
        whole = Trial.run

        def spy(self, recipe, engine, start, **more):
            if "dense" in self.branch.name or ("lr-rewind" in self.branch.name and control.kind == "continued"):
                return whole(self, recipe, engine, start, **more)
            seen.append((self.round, self.number, start()))
            return {"round": self.round, "trial": self.number}

        with monkeypatch.context() as patch:
            patch.setattr(Trial, "run", spy)
            branch(run, control, **options)
        return seen

    return collect
