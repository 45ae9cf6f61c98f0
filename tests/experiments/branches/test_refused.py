"""What a branch refuses, with the reason."""

from __future__ import annotations

import pytest

from fastlth import running
from fastlth.errors import RecipeError, TicketError
from fastlth.experiments.at_init import check_images
from fastlth.experiments.branch import branch
from fastlth.experiments.control import Control
from fastlth.experiments.trial import Trial
from tests.experiments.branches.by_hand import recipe_of
from tests.helpers import small_recipe

CONTRADICTIONS = [
    ({"kind": "reinit"}, "did you mean 'random-reinit'"),
    ({"kind": "random-reinit", "density": 0.1}, "--density goes with"),
    ({"kind": "random-reinit", "strategy": "even"}, "--strategy goes with random-prune"),
    ({"kind": "random-reinit", "reinit": True}, "--reinit goes with"),
    ({"kind": "continued", "density": 0.1}, "--density goes with"),
    ({"kind": "one-shot", "iterations": 5}, "--iterations goes with finetune, lr-rewind"),
    ({"kind": "one-shot", "method": "snip"}, "--method goes with prune-at-init"),
    ({"kind": "random-prune", "density": 1}, "in (0, 1)"),
    ({"kind": "one-shot", "density": 0.0}, "in (0, 1)"),
    ({"kind": "random-prune", "strategy": "evn"}, "did you mean 'even'"),
    ({"kind": "random-reinit", "sigma": 0.0}, "--sigma goes with noise"),
    ({"kind": "random-reinit", "images": 0}, "--images goes with prune-at-init"),
    ({"kind": "prune-at-init"}, "prune-at-init needs --method: "),
    ({"kind": "prune-at-init", "method": "erk", "scope": "layer"}, "has none"),
    ({"kind": "prune-at-init", "method": "snip", "scope": "net"}, "unknown scope"),
    ({"kind": "prune-at-init", "method": "synflow", "images": 5}, "looks at no image"),
    ({"kind": "prune-at-init", "method": "snip", "images": 0}, "at least 1"),
    ({"kind": "finetune", "iterations": 0}, "at least 1"),
]


@pytest.mark.parametrize(("options", "says"), CONTRADICTIONS)
def test_contradictions_are_refused_with_the_reason(options, says):
    with pytest.raises(RecipeError) as caught:
        Control(**options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_the_run_can_refuse(run, tmp_path):
    reinit = Control(kind="random-reinit")
    for rounds, says in (([0], "choose from 1 to 3"), ([4], "choose from 1 to 3"), ("some", "numbers or all")):
        with pytest.raises(RecipeError, match=says):
            branch(run, reinit, rounds=rounds)
    with pytest.raises(RecipeError, match="draws nothing"):
        branch(run, Control(kind="finetune"), trials=2)
    with pytest.raises(RecipeError, match="at least 1"):
        branch(run, reinit, trials=0)
    with pytest.raises(RecipeError, match="at most the schedule's 40"):
        branch(run, Control(kind="lr-rewind", iterations=41))
    with pytest.raises(TicketError, match="is not one run"):
        branch(tmp_path / "nothing", reinit)
    empty = running.prepare(recipe_of(train__lr=0.5), out=tmp_path / "out")
    with pytest.raises(TicketError, match="no finished round yet"):
        branch(empty, reinit)


def test_what_cannot_be_cut_or_made_again_is_refused(tmp_path):
    by_sign = recipe_of(prune__criterion="large_final_same_sign_single", prune__rounds=1)
    found = running.run(by_sign, out=tmp_path).replicates[0].path
    for options in ({"kind": "one-shot", "density": 0.3}, {"kind": "one-shot"}, {"kind": "finetune", "density": 0.3}):
        with pytest.raises(RecipeError, match="decides itself"):
            branch(found, Control(**options))
    assert not (found / "branches").exists()
    recipe = recipe_of(prune__early_bird=0.1, prune__rounds=1, train__batch_size=256)
    bird = running.run(recipe, out=tmp_path).replicates[0].path
    with pytest.raises(RecipeError, match="early bird"):
        branch(bird, Control(kind="one-shot", density=0.3))


@pytest.mark.parametrize("options", [
    {"kind": "one-shot"}, {"kind": "finetune"}, {"kind": "lr-rewind"}, {"kind": "random-prune"},
    {"kind": "prune-at-init", "method": "magnitude", "scope": "layer"},
])  # fmt: skip
def test_a_density_out_of_reach_is_refused_before_anything_is_trained_or_written(found, monkeypatch, options):
    monkeypatch.setattr(Trial, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RecipeError, match="cannot be reached in one step"):
        branch(found, Control(**options, density=0.0001))
    assert not (found / "branches").exists()


def test_scores_over_more_images_than_there_are_leave_nothing_behind(found):
    control = Control(kind="prune-at-init", method="snip", images=100_000)
    with pytest.raises(RecipeError, match="--images must be at most the 1373 training images, got 100000"):
        branch(found, control, rounds=[1])
    assert not (found / "branches").exists()


def test_scores_over_one_image_with_batch_norm_are_refused():
    for batch_norm in (False, True):
        recipe = small_recipe("conv-2", model__batch_norm=batch_norm)
        one, two = (Control(kind="prune-at-init", method="grasp", images=n) for n in (1, 2))
        check_images(recipe, two)
        if not batch_norm:
            check_images(recipe, one)
            continue
        with pytest.raises(RecipeError, match="--images must be at least 2 for a net with batch norm"):
            check_images(recipe, one)
