"""A search run and gone on with from Python."""

from __future__ import annotations

import dataclasses

import pytest

import fastlth
from fastlth.errors import Stopped
from fastlth.running import run
from fastlth.search import RoundStarted
from fastlth.store.cleaning import find
from fastlth.store.listing import list_runs
from tests.helpers import CPU, small_recipe


def test_resume_takes_a_path_or_its_text_of_the_run_or_of_its_folder(tmp_path):
    recipe = small_recipe(train__iterations=6, evaluate__every=3, prune__rounds=1)
    with pytest.raises(Stopped):
        run(recipe, out=str(tmp_path), stopped=lambda: 2)
    [folder] = tmp_path.glob("*/r0")
    found = fastlth.resume(str(folder))
    assert len(found.rounds) == 2 and found.ticket == folder / "search.ticket"
    for path in (folder, folder.parent, str(folder.parent)):
        assert fastlth.resume(path).to_json() == found.to_json()


def test_a_target_density_gives_the_same_rounds_before_and_after_a_longer_search(tmp_path):
    long = small_recipe(train__iterations=4, evaluate__every=4, prune__rounds=3)
    short = dataclasses.replace(long, prune=dataclasses.replace(long.prune, to_density=0.7))
    fresh = run(short, out=tmp_path / "fresh")
    assert [r["round"] for r in fresh.rounds] == [0, 1, 2]
    run(long, out=tmp_path)
    later = run(short, out=tmp_path)
    assert [r["kept"] for r in later.rounds] == [r["kept"] for r in fresh.rounds]
    assert len(fastlth.load_ticket(later.ticket).rounds) == 4  # nothing is lost
    assert len(run(long, out=tmp_path).rounds) == 4


def test_a_search_that_came_to_its_target_density_is_finished(tmp_path):
    recipe = small_recipe(train__iterations=4, evaluate__every=4, prune__rounds=9, prune__to_density=0.7)
    [found] = run(recipe, out=tmp_path).replicates
    [info] = list_runs(tmp_path)
    assert (info.rounds_done, info.rounds_asked) == (3, 3)
    (found.path / "state.safetensors").write_bytes(b"left by a kill")
    assert [waste.path.name for waste in find(tmp_path)] == ["state.safetensors"]


def test_what_compose_returns_can_be_run_as_it_is(tmp_path):
    settings = {"prune.rounds": 0, "train.iterations": 2, "evaluate.every": 2, **CPU}
    composed = fastlth.compose("lenet-300-100", "digits", settings=settings)
    assert fastlth.run(composed, out=tmp_path).recipe == composed.recipe


def test_a_ticket_and_the_package_show_themselves_in_a_line(tmp_path):
    search = run(small_recipe(train__iterations=2, evaluate__every=2, prune__rounds=1), out=tmp_path)
    text = repr(fastlth.load_ticket(search.ticket))
    assert text.startswith("<ticket of lenet-300-100 on digits, seed 0: rounds 0 to 1, density 80.20%, in /")
    assert {"run", "compose", "load_ticket"} <= set(dir(fastlth)) and "PackageNotFoundError" not in dir(fastlth)


def test_a_search_without_a_target_goes_on_where_nothing_is_left(tmp_path):
    recipe = small_recipe(train__iterations=2, evaluate__every=2, prune__rounds=2, train__lr=1e-7,
                          prune__criterion="large_final_diff_sign_single")  # fmt: skip
    assert [r["density"] for r in run(recipe, out=tmp_path).rounds] == [1.0, 0.0, 0.0]
    assert len(run(recipe, out=tmp_path).rounds) == 3


def test_the_state_of_a_round_that_another_call_asked_for_is_kept(tmp_path):
    """Stopped inside round 2, then asked for round 1 alone: the longer search can still go on from its state."""
    recipe = small_recipe(train__iterations=4, evaluate__every=4, prune__rounds=2)
    asked = iter(range(100))
    seen = []

    def stopped():
        return 15 if seen and seen[-1] == 2 and next(asked) == 0 else None

    with pytest.raises(Stopped):
        run(recipe, out=tmp_path, stopped=stopped,
            show=lambda event: seen.append(event.round) if isinstance(event, RoundStarted) else None)  # fmt: skip
    short = dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, to_density=0.9))
    [found] = run(short, out=tmp_path).replicates
    assert (found.path / "state.safetensors").exists() and find(tmp_path) == []
    assert len(run(recipe, out=tmp_path).rounds) == 3
