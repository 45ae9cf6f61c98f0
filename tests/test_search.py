"""The lottery: masks, rewinding, results, and going on from any safe point without changing a bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlth.errors import DivergedError
from fastlth.models import build
from fastlth.search import InRound, RoundFinished, RoundStarted, find_tickets, over, winning_round
from fastlth.training.trainer import ChunkDone, Evaluated
from tests.helpers import compute, random_source, small_recipe


def search(recipe, source=None, **resume):
    return list(find_tickets(recipe, source or random_source("digits"), compute(recipe), **resume))


def finished(events):
    return [e for e in events if isinstance(e, RoundFinished)]


def test_twenty_rounds_keep_every_promise_about_masks():
    recipe = small_recipe(prune__rounds=20, train__iterations=6)
    rounds = finished(search(recipe))
    assert [r.round for r in rounds] == list(range(21))
    ticket = rounds[-1].ticket
    previous = ticket.mask(0)
    kept = {"fc1.weight": 64 * 300, "fc2.weight": 300 * 100, "output.weight": 1000}
    total = sum(kept.values())
    for k, event in enumerate(rounds):
        mask = ticket.mask(k)
        if k:
            kept = {n: c - c * (1 if n == "output.weight" else 2) // 10 for n, c in kept.items()}
            assert all((mask[n] <= previous[n]).all() for n in mask)
        assert {n: int(m.sum()) for n, m in mask.items()} == kept
        assert event.result["kept"] == sum(kept.values())
        assert event.result["density"] == sum(kept.values()) / total
        previous = mask


def test_pruning_removes_the_smallest_trained_weights():
    """The mask of round 1 against a full sort of the weights that round 0 ended with."""
    recipe = small_recipe(prune__rounds=0)
    weights = None
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, InRound) and event.event == ChunkDone(40):
            weights = {n.removeprefix("model/"): a for n, a in event.state().arrays.items() if n.startswith("model/")}
        if isinstance(event, RoundFinished):
            mask = event.ticket.mask(1)
    assert weights is not None
    for name, m in mask.items():
        flat = np.abs(weights[name].reshape(-1))
        order = np.argsort(flat, kind="stable")
        share = 0.1 if name == "output.weight" else 0.2
        expected = np.ones(flat.size, bool)
        expected[order[: int(np.floor(share * flat.size + 1e-9))]] = False
        assert (m.reshape(-1) == expected).all()


def start_of_round(recipe, round):
    """Parameters and buffers before the first step of a round, seen through the state after zero-length training."""
    seen = {}
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, RoundFinished):
            seen[event.round] = event.ticket
    return seen[round]


def test_rewinding_is_to_theta0():
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True)
    ticket = start_of_round(recipe, 2)
    theta0 = {n: t.detach().numpy() for n, t in build(recipe).state_dict().items()}
    assert ticket.rewind.keys() == theta0.keys() and ticket.rewind_iteration == 0
    for name, value in theta0.items():
        assert ticket.rewind[name].tobytes() == value.tobytes(), name


def test_late_rewinding_is_to_theta_k_batch_norm_included():
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, prune__rewind_to=15, prune__rounds=1)
    theta_15, firsts = None, {}
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, InRound) and event.event == ChunkDone(15) and event.round == 0:
            theta_15 = {n[6:]: a.copy() for n, a in event.state().arrays.items() if n.startswith("model/")}
        if isinstance(event, RoundStarted):
            firsts[event.round] = event.iteration
        if isinstance(event, RoundFinished):
            ticket = event.ticket
    assert theta_15 is not None and firsts == {0: 0, 1: 15}
    assert ticket.rewind_iteration == 15
    assert ticket.rewind["bn1.num_batches_tracked"] == 15
    for name, value in theta_15.items():
        assert ticket.rewind[name].tobytes() == value.tobytes(), name


def test_a_rewound_round_sees_the_schedule_and_the_data_of_the_steps_it_repeats():
    """With no pruning in between, training again from theta_k repeats the end of round 0 exactly.

    True only with an optimizer without state, since a rewound round starts with a fresh one.
    """
    recipe = small_recipe(
        prune__rounds=1, prune__rewind_to=15, prune__rate=1e-6, train__optimizer="sgd", train__lr=0.05,
        schedule__milestones=[30], data__augment="flip-crop",
    )  # fmt: skip
    losses: dict[int, list[float]] = {0: [], 1: []}
    for event in search(recipe):
        if isinstance(event, InRound) and isinstance(event.event, Evaluated):
            losses[event.round].append(event.event.validation.loss)
    assert losses[1] == losses[0][1:]  # evaluations at 20, 30, 40


def strip(event):
    from fastlth.metrics import TIMING_FIELDS, record

    return {k: v for k, v in (record(event) or {}).items() if k not in TIMING_FIELDS}


@pytest.mark.parametrize("rewind_to", [0, 15])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 6, 9, 12])
def test_going_on_from_any_safe_point_changes_no_bit(stop_after, rewind_to, monkeypatch):
    # two steps a chunk, so that stops fall between evaluations too
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, prune__rewind_to=rewind_to,
                          train__iterations=20, train__optimizer="sgd", train__momentum=0.9)  # fmt: skip
    whole = search(recipe)
    points = [e for e in whole if isinstance(e, InRound) and isinstance(e.event, ChunkDone)]
    at = (points[stop_after * len(points) // 13].round, points[stop_after * len(points) // 13].event)
    ticket, head = None, []
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        head.append(event)
        if isinstance(event, RoundFinished):
            ticket = event.ticket
        if isinstance(event, InRound) and (event.round, event.event) == at:
            state = event.state()
            break
    torch.manual_seed(123)  # nothing may depend on torch's own generator
    tail = search(recipe, ticket=ticket, state=state)
    assert [strip(e) for e in head + tail if strip(e)] == [strip(e) for e in whole if strip(e)]
    a, b = finished(tail)[-1].ticket, finished(whole)[-1].ticket
    for part in ("rewind", "pruned_at"):
        assert getattr(a, part).keys() == getattr(b, part).keys()
        for name, value in getattr(b, part).items():
            assert getattr(a, part)[name].tobytes() == value.tobytes(), (part, name)


@pytest.mark.parametrize("rewind_to", [5, 10, 15])
def test_a_state_taken_at_an_evaluation_changes_no_bit_either(rewind_to):
    """Those of the rewind point too, where the evaluation comes before the safe point."""
    recipe = small_recipe(prune__rewind_to=rewind_to, prune__rounds=1, train__iterations=20, evaluate__every=5)
    source = random_source("digits")
    whole = finished(search(recipe, source))[-1]
    for event in find_tickets(recipe, source, compute(recipe)):
        if isinstance(event, InRound) and isinstance(event.event, Evaluated) and event.event.iteration == rewind_to:
            state = event.state()
            break
    gone_on = finished(search(recipe, source, state=state))[-1]
    for part in ("rewind", "pruned_at"):
        for name, value in getattr(whole.ticket, part).items():
            assert getattr(gone_on.ticket, part)[name].tobytes() == value.tobytes(), (part, name)
    assert gone_on.result["early_stop_validation_loss"] == whole.result["early_stop_validation_loss"]


def test_the_last_round_that_a_ticket_can_hold_is_not_pruned(monkeypatch):
    """Round 255 is no round: one byte holds the rounds, and 255 is reserved."""
    monkeypatch.setattr("fastlth.search.LAST_ROUND", 2)
    for rounds in (1, 2):
        ticket = finished(search(small_recipe(prune__rounds=rounds, train__iterations=5)))[-1].ticket
        assert len(ticket.rounds) == rounds + 1
        assert max(int(at.max()) for at in ticket.pruned_at.values()) == 2


def test_more_rounds_later_equal_more_rounds_at_once():
    short, long = small_recipe(prune__rounds=1), small_recipe(prune__rounds=3)
    first = finished(search(short))
    rest = finished(search(long, ticket=first[-1].ticket))
    whole = finished(search(long))
    assert [strip(e) for e in first + rest] == [strip(e) for e in whole]
    for name, at in whole[-1].ticket.pruned_at.items():
        assert (rest[-1].ticket.pruned_at[name] == at).all()


def test_the_search_ends_at_the_target_density():
    recipe = small_recipe(prune__rounds=20, prune__to_density=0.6, train__iterations=4)
    densities = [e.result["density"] for e in finished(search(recipe))]
    assert densities[-1] <= 0.6 < densities[-2] and len(densities) == 4
    assert over(recipe, [{"density": d} for d in densities])
    assert not over(recipe, [{"density": d} for d in densities[:-1]])


def test_global_scope_ranks_all_layers_together():
    recipe = small_recipe(prune__scope="global", prune__scale={}, prune__rounds=1)
    ticket = finished(search(recipe))[-1].ticket
    removed = {n: int((~m).sum()) for n, m in ticket.mask(1).items()}
    assert sum(removed.values()) == 50_200 // 5
    assert removed["fc2.weight"] != 6_000


def test_a_diverging_round_is_named():
    recipe = small_recipe(train__optimizer="sgd", train__lr=1e30)
    with pytest.raises(DivergedError, match=r"round 0: the loss became NaN or infinite at iteration \d+"):
        search(recipe)


def rounds_of(*values):
    return [
        {"early_stop_validation_accuracy": a, "early_stop_iteration": i, "round": k} for k, (a, i) in enumerate(values)
    ]


def test_the_winning_ticket_is_the_sparsest_that_is_no_worse_and_no_later():
    assert winning_round([rounds_of((0.9, 100), (0.91, 90), (0.9, 100), (0.89, 50), (0.95, 110))]) == 2
    assert winning_round([rounds_of((0.9, 100), (0.89, 100), (0.91, 101))]) is None
    assert winning_round([rounds_of((0.9, 100))]) is None
    # over replicates the means count
    assert winning_round([rounds_of((0.9, 100), (0.95, 90)), rounds_of((0.9, 100), (0.86, 110))]) == 1
    assert winning_round([rounds_of((0.9, 100), (0.95, 90)), rounds_of((0.9, 100), (0.84, 110))]) is None


def test_a_recipe_alone_is_enough_and_nothing_is_written(tmp_path, monkeypatch):
    import fastlth

    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(prune__rounds=1, compute__threads=0)
    rounds = [e.round for e in fastlth.find_tickets(recipe) if isinstance(e, RoundFinished)]
    assert rounds == [0, 1] and list(tmp_path.iterdir()) == []
