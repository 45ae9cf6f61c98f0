"""One search per rewind point: each must be, bit for bit, the search that would have been made alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

import fastlth
from fastlth.catalogue import MASK_1
from fastlth.errors import RecipeError, Stopped
from fastlth.experiments import rewind_points
from fastlth.experiments.rewind_points import search_rewind_points
from fastlth.search import InRound, RoundStarted
from tests.endurance.searches import assert_equal_runs
from tests.helpers import small_recipe

POINTS = (0, 7, 20)


def recipes(model="lenet-300-100", points=POINTS, **settings):
    return [small_recipe(model, prune__rewind_to=k, **{"train__iterations": 30, **settings}) for k in points]


def dense_rounds(events):
    return sum(isinstance(e, RoundStarted) and e.round == 0 for e in events)


def assert_as_if_alone(asked, searches, out):
    for recipe, search in zip(asked, searches, strict=True):
        assert search.recipe == recipe
        for replicate in search.replicates:
            seeds = dataclasses.replace(recipe.seeds, base=replicate.seed)
            alone = fastlth.run(dataclasses.replace(recipe, seeds=seeds), out=out)
            assert_equal_runs(replicate.path, alone.replicates[0].path)


def test_every_search_has_the_bits_it_would_have_alone_and_the_dense_round_is_trained_once(tmp_path):
    asked, events = recipes(), []
    searches = search_rewind_points(asked, out=tmp_path / "sweep", replicates=2, show=events.append)
    assert dense_rounds(events) == 2  # of the first rewind point, one per seed
    assert_as_if_alone(asked, searches, tmp_path / "alone")
    assert len({r.path for s in searches for r in s.replicates}) == 6


def test_the_same_with_everything_that_theta_k_can_depend_on(tmp_path):
    """Batch norm, dropout, momentum, augmentation, a schedule; the first search is not the one of theta0."""
    asked = recipes("conv-2", (3, 6), model__batch_norm=True, model__dropout=0.2, train__optimizer="sgd",
                    train__momentum=0.9, train__lr=0.05, train__iterations=10, train__batch_size=8,
                    data__augment="flip-crop", schedule__warmup=4, prune__rounds=1, evaluate__every=4)  # fmt: skip
    events = []
    searches = search_rewind_points(asked, out=tmp_path / "sweep", show=events.append)
    assert dense_rounds(events) == 1
    assert_as_if_alone(asked, searches, tmp_path / "alone")


@pytest.mark.parametrize("settings", [
    {"prune__criterion": "magnitude_increase"}, {"prune__mask_1": MASK_1[1]},
    {"prune__early_bird": 0.2, "train__batch_size": 256}, {"store__keep_weights": "all"},
], ids=str)  # fmt: skip
def test_the_dense_round_is_not_shared_where_it_or_what_follows_depends_on_the_rewind_point(settings, tmp_path):
    asked, events = recipes(**settings), []
    search_rewind_points(asked, out=tmp_path / "sweep", show=events.append)
    assert dense_rounds(events) == 3


def test_it_is_not_shared_where_round_0_was_made_elsewhere(tmp_path, monkeypatch):
    asked, events = recipes(), []
    file = fastlth.run(asked[0], out=tmp_path).replicates[0].path / "recipe.toml"
    file.write_text(file.read_text().replace("[resolved]\n", '[resolved]\nmoved = ["it was on another machine"]\n'))
    search_rewind_points(asked, out=tmp_path, show=events.append)
    assert dense_rounds(events) == 2
    here = rewind_points.environment
    monkeypatch.setattr(rewind_points, "environment", lambda compute: {**here(compute), "torch": "another"})
    search_rewind_points(asked, out=tmp_path / "other", show=events.append)
    assert dense_rounds(events) == 2 + 3


def test_a_stopped_sweep_goes_on_with_the_same_call(tmp_path):
    asked = recipes(prune__rounds=1)
    seen = []

    def show(event):
        if isinstance(event, InRound):
            seen.append(event)

    with pytest.raises(Stopped, match=r"rewind point 2 of 3; the same command as before: all") as stop:
        search_rewind_points(asked, out=tmp_path / "sweep", show=show, stopped=lambda: 15 if len(seen) > 20 else None)
    assert stop.value.exit_code == 143
    searches = search_rewind_points(asked, out=tmp_path / "sweep")
    assert_as_if_alone(asked, searches, tmp_path / "alone")
    again = []
    assert [s.to_json() for s in search_rewind_points(asked, out=tmp_path / "sweep", show=again.append)] == [
        s.to_json() for s in searches
    ]
    assert again == []
    fresh = search_rewind_points(asked, out=tmp_path / "sweep", fresh=True)
    assert [s.replicates[0].path.name for s in fresh] == ["r0.2"] * 3
    assert_as_if_alone(asked, fresh, tmp_path / "alone")


def test_a_stop_while_theta_k_is_made_again_leaves_nothing_half_made(tmp_path):
    asked = recipes(prune__rounds=1)
    search_rewind_points(asked[:1], out=tmp_path / "sweep")
    with pytest.raises(Stopped, match=r"stopped \(SIGINT\) while making theta_7 again \(rewind point 2 of 3"):
        search_rewind_points(asked, out=tmp_path / "sweep", stopped=lambda: 2)
    assert_as_if_alone(asked, search_rewind_points(asked, out=tmp_path / "sweep"), tmp_path / "alone")


COMMAND = ["find-ticket", "lenet-300-100", "digits", "-i", 40, "-b", 32, "-l", 0.001, "--rounds", 1, "--device", "cpu",
           "--precision", "fp32", "--compile", "off", "--set", "compute.threads=1"]  # fmt: skip


def test_the_command_line(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*COMMAND, "--rewind-to", "0, 5it,0.5ep", "--json")
    assert code == 0, err
    document = json.loads(out)
    half = small_recipe(data__validation=600).train.iterations_per_epoch(837) / 2
    assert [x["rewind_to"] for x in document["rewind_points"]] == [0, 5, round(half)]
    assert "rewind points" in err and err.count("rewinding to iteration") == 2
    for found in document["rewind_points"]:
        alone = command(*COMMAND, "--rewind-to", found.pop("rewind_to"), "--json")
        assert json.loads(alone[1]) == found

    for points, said in (("0,0it", "iteration 0 more than once"), ("0,,5", "prune.rewind_to must be iterations"),
                         ("0,soon", "got 'soon'"), ("0,40", "below train.iterations")):  # fmt: skip
        code, _, err = command(*COMMAND, "--rewind-to", points)
        assert code == RecipeError.exit_code and said in err


def test_early_bird_has_a_flag(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*COMMAND, "--early-bird", "-b", 256, "--json")
    assert code == 0, err
    assert fastlth.load_ticket(json.loads(out)["ticket"]).recipe.prune.early_bird == 0.1
