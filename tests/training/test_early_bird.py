"""When a round may end early: the distance by its definition, the window, and going on without changing a bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlth
from fastlth.catalogue import UNTRAINED
from fastlth.composition import compose
from fastlth.errors import RecipeError
from fastlth.experiments.retrain import retrain
from fastlth.experiments.transfer import target
from fastlth.metrics import TIMING_FIELDS, record
from fastlth.pruning import prune
from fastlth.pruning.criteria import CRITERIA, Inputs
from fastlth.recipe import WINDOW
from fastlth.search import InRound, RoundFinished, find_tickets
from fastlth.training.early_bird import EarlyBird, MaskDrawn
from fastlth.training.trainer import ChunkDone
from tests.helpers import compute, random_source, small_recipe


def bird_of(drawn, masks, threshold=0.1, **options):
    """A bird that is shown these masks, one per epoch of ten iterations."""
    left = list(drawn)
    return EarlyBird(threshold, 10, masks, lambda *_: left.pop(0), **options)


def test_distances_by_their_definition():
    rng = np.random.default_rng(0)
    masks = {"a": torch.from_numpy(rng.random((7, 5)) < 0.6), "b": torch.from_numpy(rng.random((3, 2, 3, 3)) < 0.9)}
    drawn = [{n: m & torch.from_numpy(rng.random(m.shape) < 0.8) for n, m in masks.items()} for _ in range(9)]
    bird = bird_of(drawn, masks, threshold=0.3)
    kept = sum(int(m.sum()) for m in masks.values())
    for epoch, mask in enumerate(drawn, start=1):
        seen = bird.look(10 * epoch, {})
        before = drawn[max(0, epoch - 1 - WINDOW) : epoch - 1]
        expected = [sum(int((m[n] ^ mask[n]).sum()) for n in masks) / kept for m in before]
        assert (seen.iteration, seen.epoch) == (10 * epoch, epoch)
        assert seen.distance == (max(expected) if expected else None)
        assert seen.found == (epoch > 5 and max(expected) < 0.3)


def masks_with(*gone):
    """Masks of 100 weights, one per number: that many of them removed."""
    return [{"w": torch.arange(100) >= g} for g in gone]


def test_the_threshold_is_below_and_the_window_five_epochs():
    full = {"w": torch.ones(100, dtype=torch.bool)}

    def ends_at(drawn, **options):
        bird = bird_of(drawn, full, **options)
        return next((e for e in range(1, len(drawn) + 1) if bird.look(10 * e, {}).found), None)

    assert ends_at(masks_with(*[20] * 9)) == 6  # five epochs before it to compare with
    assert ends_at(masks_with(30, *[20] * 8)) == 7  # a tenth away is not below a tenth
    assert ends_at(masks_with(29, *[20] * 8)) == 6
    assert ends_at(masks_with(*[20, 31] * 10)) is None
    assert ends_at(masks_with(*[20] * 9), not_before=80) == 8


def test_nothing_kept():
    bird = bird_of([{"w": torch.zeros(3, dtype=torch.bool)}] * 7, {"w": torch.zeros(3, dtype=torch.bool)})
    assert [bird.look(10 * e, {}).distance for e in range(1, 8)] == [None, *[0.0] * 6]


RECIPE = {  # ten iterations an epoch
    "train__iterations": 200, "train__batch_size": 128, "evaluate__every": 45, "prune__rounds": 2, "train__lr": 2e-4,
}  # fmt: skip


def search(recipe, **resume):
    return list(find_tickets(recipe, random_source("digits"), compute(recipe), **resume))


def bird_recipe(**settings):
    return small_recipe(**{**RECIPE, "prune__early_bird": 0.1, **settings})


def strip(event):
    return {k: v for k, v in (record(event) or {}).items() if k not in TIMING_FIELDS}


def finished(events):
    return [e for e in events if isinstance(e, RoundFinished)]


def test_it_is_off_by_default_and_moves_no_digest():
    assert small_recipe(**RECIPE).digest == small_recipe(**RECIPE, prune__early_bird=0).digest
    assert bird_recipe().digest != small_recipe(**RECIPE).digest
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(RecipeError, match=r"prune.early_bird must be in \[0, 1\)"):
            compose("lenet-300-100", "mnist", settings={"prune.early_bird": wrong})


def test_criteria_that_do_not_look_at_trained_weights_are_refused():
    generator = torch.Generator().manual_seed(0)
    initial, gradient, one, other = torch.randn(4, 50, generator=generator)

    def score(name, final):
        kept = torch.ones(50, dtype=torch.bool)
        return CRITERIA[name](Inputs(initial=initial, final=final, kept=kept, gradient=lambda: gradient))

    assert {name for name in CRITERIA if torch.equal(score(name, one), score(name, other))} == set(UNTRAINED)
    for name in CRITERIA:
        if name not in UNTRAINED:
            bird_recipe(prune__criterion=name)
            continue
        with pytest.raises(RecipeError, match=f"prune.early_bird must be 0 with criterion {name}, whose mask stands"):
            bird_recipe(prune__criterion=name)


def test_schedules_too_short_to_compare_masks_are_refused():
    assert bird_recipe(train__iterations=60).train.iterations == 60
    with pytest.raises(
        RecipeError,
        match=r"must be 0 with 59 iterations, since it needs 6 epochs to compare masks: "
        r"60 iterations of batch size 128 on 1373 training images, got 0\.1",
    ):
        bird_recipe(train__iterations=59)
    with pytest.raises(RecipeError, match="must be 0 with 3000 iterations"):
        compose("lenet-300-100", "mnist", preset="fast", settings={"prune.early_bird": 0.1})
    short = target(bird_recipe(), "digits", {"train.iterations": 59})  # a transfer has no early bird
    assert short.prune.early_bird == 0


@pytest.mark.parametrize("criterion", ["large_final", "movement", "large_final_same_sign"])
@pytest.mark.parametrize("rewind_to", [0, 25])
def test_the_mask_drawn_at_the_last_iteration_is_the_one_that_pruning_makes(criterion, rewind_to):
    """w_i of round 0 is theta_k for both, also for criteria that look at it."""
    recipe = bird_recipe(
        prune__criterion=criterion, prune__rewind_to=rewind_to, prune__rounds=0, prune__early_bird=1e-9
    )
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, InRound) and event.event == ChunkDone(200):
            drawn = event.state().arrays["early_bird/masks"][-1]
        if isinstance(event, RoundFinished):
            made = np.concatenate([(at == 0).reshape(-1) for at in event.ticket.pruned_at.values()])
    assert (np.unpackbits(drawn, count=len(made)) == made).all()


def test_a_look_at_the_rewind_point_takes_theta_k():
    """Also where no evaluation falls there: no weight has moved since, so that the first ones of a layer go."""
    recipe = bird_recipe(
        prune__criterion="movement", prune__rewind_to=20, prune__rounds=0, prune__early_bird=1e-9, evaluate__every=45
    )
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, InRound) and event.event == ChunkDone(20):
            state = event.state()
        if isinstance(event, RoundFinished):
            theta_k, prunable = event.ticket.rewind, event.ticket.pruned_at
    assert all((state.arrays[f"model/{n}"] == w).all() for n, w in theta_k.items())
    masks = {n: torch.ones(at.shape, dtype=torch.bool) for n, at in prunable.items()}
    weights = {n: torch.from_numpy(theta_k[n].copy()) for n in prunable}
    made = prune(recipe.prune, masks, weights, weights, numbers={n: i for i, n in enumerate(weights)}, round=1,
                 key=recipe.seeds.key("prune"), gradients=dict)  # fmt: skip
    expected = torch.cat([m.reshape(-1) for m in made.values()])
    assert not expected.all()
    drawn = np.unpackbits(state.arrays["early_bird/masks"][-1], count=len(expected))
    assert (drawn == expected.numpy()).all()


@pytest.fixture(scope="module")
def whole():
    return search(bird_recipe())


def test_the_round_ends_with_an_evaluation_where_the_mask_stands(whole):
    for k, result in enumerate(r.result for r in finished(whole)):
        lines = [strip(e) for e in whole if isinstance(e, InRound) and e.round == k and strip(e)]
        drawn = [x for x in lines if x["event"] == "early_bird"]
        end = drawn[-1]["iteration"]
        assert [x["iteration"] for x in drawn] == list(range(10, end + 1, 10))
        assert [x["round_ends"] for x in drawn] == [False] * (len(drawn) - 1) + [True]
        assert drawn[-1]["mask_distance"] < 0.1 and end == result["iterations"] < 200
        assert end % 45  # so that the evaluation at the end is one of its own
        last = [x for x in lines if x["event"] == "evaluation"][-1]
        assert last["iteration"] == end and last["test_accuracy"] == result["test_accuracy"]


def test_the_drawn_mask_is_the_one_that_the_round_is_pruned_to(whole):
    """Drawn again, by a full sort, from the weights that each safe point had."""
    seen, drawn = [], []
    for event in find_tickets(bird_recipe(prune__rounds=0), random_source("digits"), compute(bird_recipe())):
        if isinstance(event, InRound) and isinstance(event.event, MaskDrawn):
            weights = {n[6:]: a for n, a in event.state().arrays.items() if n.startswith("model/") and "weight" in n}
            mask = []
            for name, w in weights.items():
                flat = np.abs(w.reshape(-1))
                gone = np.argsort(flat, kind="stable")[: flat.size // (10 if name == "output.weight" else 5)]
                mask.append(~np.isin(np.arange(flat.size), gone))
            seen.append(np.concatenate(mask))
            drawn.append(event.event)
        if isinstance(event, RoundFinished):
            final = np.concatenate([event.ticket.mask(1)[n].reshape(-1) for n in weights])
    assert len(drawn) >= 6 and (final == seen[-1]).all()
    for k, event in enumerate(drawn):
        expected = [np.mean(seen[k] != before) for before in seen[max(0, k - 5) : k]]
        assert event.distance == (max(expected) if expected else None)
    assert any(0 < e.distance < 1 for e in drawn[1:])


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.65, 0.99])
def test_going_on_from_any_safe_point_changes_no_bit(share, whole):
    recipe = bird_recipe()
    points = [e for e in whole if isinstance(e, InRound) and isinstance(e.event, ChunkDone)]
    at = points[int(share * len(points))]
    ticket, head = None, []
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        head.append(event)
        if isinstance(event, RoundFinished):
            ticket = event.ticket
        if isinstance(event, InRound) and (event.round, event.event) == (at.round, at.event):
            state = event.state()
            break
    tail = search(recipe, ticket=ticket, state=state)
    assert [strip(e) for e in head + tail if strip(e)] == [strip(e) for e in whole if strip(e)]
    a, b = finished(tail)[-1].ticket, finished(whole)[-1].ticket
    assert all(a.pruned_at[n].tobytes() == b.pruned_at[n].tobytes() for n in b.pruned_at)


def test_going_on_at_the_very_end_of_a_round_that_a_bird_has_ended(whole):
    """The state of that safe point says that the round is over; nothing more is trained."""
    recipe = bird_recipe()
    last = max(e.event.iteration for e in whole if isinstance(e, InRound) and e.round == 0)
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, InRound) and event.event == ChunkDone(last):
            state = event.state()
            break
    tail = search(recipe, state=state)
    assert isinstance(tail[1], RoundFinished) and tail[1].result["iterations"] == last
    assert [strip(e) for e in finished(tail)] == [strip(e) for e in finished(whole)]


def test_the_dense_round_is_not_ended_before_its_rewind_point():
    late = bird_recipe(prune__rewind_to=150, prune__rounds=1)
    first, second = finished(search(late))
    assert first.result["iterations"] >= 150 and first.ticket.rewind_iteration == 150
    assert second.result["iterations"] > 150


def test_a_run_records_it_and_its_ticket_can_be_trained_in_full(tmp_path):
    recipe = bird_recipe(prune__rounds=1)
    found = fastlth.run(recipe, out=tmp_path, replicates=2)
    lines = [json.loads(x) for x in (found.replicates[0].path / "metrics.jsonl").read_text().splitlines()]
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in text for x in lines if x["event"] == "early_bird" for name in x)
    assert {x["round"] for x in lines if x["event"] == "early_bird" and x["round_ends"]} == {0, 1}
    assert found.rounds[1]["iterations"] == np.mean([r.rounds[1]["iterations"] for r in found.replicates])
    full = retrain(fastlth.load_ticket(found.ticket), round=1)
    assert full["iterations"] == 200 > found.replicates[0].rounds[1]["iterations"]
    short = retrain(fastlth.load_ticket(found.ticket), round=1, settings={"train.iterations": 20})
    assert short["iterations"] == 20
