"""Training a ticket again gives what its search gave."""

from __future__ import annotations

import dataclasses

import pytest

import fastlth
from fastlth.errors import TicketError
from fastlth.experiments import settled
from fastlth.experiments.retrain import retrain
from fastlth.metrics import TIMING_FIELDS
from fastlth.running import run
from tests.helpers import small_recipe


def test_what_auto_became_is_taken_from_the_ticket(tmp_path, monkeypatch):
    """Were it measured again, a break-even between two layers' densities could change the bits."""
    recipe = small_recipe(train__iterations=6, evaluate__every=3, prune__rounds=2, compute__engine="sparse",
                          compute__threads=0, compute__break_even=-1.0)  # fmt: skip
    [found] = run(recipe, out=tmp_path).replicates
    ticket = fastlth.load_ticket(found.ticket)
    assert ticket.recipe.compute.break_even == -1 and 0 <= ticket.file.resolved["break_even"] <= 1
    monkeypatch.setattr(settled, "resolve", lambda *_: pytest.fail("measured again"))
    for round, result in enumerate(found.rounds):
        again = retrain(ticket, round=round)
        assert {k: v for k, v in again.items() if k not in TIMING_FIELDS} == {
            k: v for k, v in result.items() if k not in TIMING_FIELDS
        }


def test_a_ticket_that_says_nothing_of_a_machine_is_resolved_here(tmp_path, monkeypatch):
    [found] = run(small_recipe(train__iterations=2, evaluate__every=2, prune__rounds=1), out=tmp_path).replicates
    ticket = fastlth.load_ticket(found.ticket)
    asked = []
    whole = settled.resolve
    monkeypatch.setattr(settled, "resolve", lambda recipe, make: asked.append(recipe) or whole(recipe, make))
    retrain(ticket, round=1, settings={"train.iterations": 3, "evaluate.every": 3})
    assert not asked  # the same machine settings: what the search found out
    retrain(ticket, round=1, settings={"compute.threads": ticket.recipe.compute.threads + 1})
    assert len(asked) == 1
    ticket.file.resolved.clear()
    retrain(ticket, round=1)
    assert len(asked) == 2


def test_the_dense_net_of_a_search_that_rewinds_late_starts_at_theta0(tmp_path):
    recipe = small_recipe(train__iterations=12, evaluate__every=4, prune__rounds=1, prune__rewind_to=8)
    [found] = run(recipe, out=tmp_path).replicates
    ticket = fastlth.load_ticket(found.ticket)
    for round, result in enumerate(found.rounds):
        again = retrain(ticket, round=round)
        assert again["early_stop_validation_loss"] == result["early_stop_validation_loss"]
        assert again["test_accuracy"] == result["test_accuracy"]
    nowhere = ({**ticket.rounds[0], "seconds": None}, *ticket.rounds[1:])  # as importing leaves it
    foreign = dataclasses.replace(ticket, file=dataclasses.replace(ticket.file, rounds=nowhere))
    with pytest.raises(TicketError, match=r"round 0 was trained from theta0.*of iteration 8 alone; give --round 1"):
        retrain(foreign, round=0)
