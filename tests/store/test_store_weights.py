"""Trained weights on disk: survivors only, and back as a whole net."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlth
from fastlth.errors import TicketError
from fastlth.search import RoundFinished
from fastlth.store import weights
from tests.helpers import assert_same_bits, small_recipe


def test_survivors_come_back_where_they_were(tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.random((7, 5)) < 0.3
    values = rng.standard_normal((7, 5)).astype(np.float32)
    full = {"w": np.where(mask, values, 0), "b": np.arange(3.0), "n": np.array(4)}
    weights.save(tmp_path, 2, full, {"w": mask}, "d")
    back = weights.load(tmp_path, 2, {"w": mask}, "d")
    assert back.keys() == full.keys()
    assert all(back[n].tobytes() == full[n].tobytes() and back[n].shape == full[n].shape for n in full)
    for wrong in ({"w": ~mask}, {"w": np.ones_like(mask)}):
        with pytest.raises(TicketError, match="does not fit"):
            weights.load(tmp_path, 2, wrong, "d")
    with pytest.raises(TicketError, match="does not hold"):
        weights.load(tmp_path, 2, {"w": mask}, "e")
    with pytest.raises(TicketError, match="--keep-weights"):
        weights.load(tmp_path, 1, {"w": mask}, "d")


@pytest.mark.parametrize(("keep", "rounds"), [("none", []), ("last", [2]), ("all", [0, 1, 2])])
def test_a_search_keeps_what_was_asked_for(tmp_path, keep, rounds):
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, store__keep_weights=keep, train__iterations=10)
    trained = {}

    def show(event):
        if isinstance(event, RoundFinished):
            trained[event.round] = {n: torch.from_numpy(a) for n, a in event.trained().items()}

    search = fastlth.run(recipe, out=tmp_path, show=show)
    folder = search.ticket.parent / "weights"
    names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    assert names == [f"round-{k}.safetensors" for k in rounds]
    ticket = fastlth.load_ticket(search.ticket)
    for k in rounds:
        assert_same_bits(ticket.trained(k).state_dict(), trained[k])
    if keep == "all":
        sizes = [(folder / n).stat().st_size for n in names]
        prunable = sum(m.numel() for m in ticket.mask(0).values())
        assert sizes[2] < sizes[0] - 4 * prunable * 0.15  # only survivors take room
