"""Searches with the criteria and actions of Zhou et al.: what is frozen, what a ticket rebuilds, going on."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlth
from fastlth import catalogue, running
from fastlth.catalogue import SIGN_TESTS
from fastlth.errors import RecipeError, Stopped
from fastlth.experiments.retrain import retrain
from fastlth.metrics import TIMING_FIELDS
from fastlth.models import drawn
from fastlth.pruning import CRITERIA, actions
from fastlth.search import InRound, RoundFinished, find_tickets
from fastlth.store.inspect import verify
from fastlth.tickets import load_ticket, theta0
from fastlth.training.engines.make import make_engine
from tests.helpers import assert_same_bits, bits, compute, half_masks, random_source, small_recipe

ROOT = Path(__file__).parents[1]

# Every criterion, mask-1 and mask-0 action at least once; rewinding late, global scope, one-shot sign tests.
SEARCHES = {
    "zero_mask": {"prune__mask_0": "freeze_init_zero_mask", "prune__criterion": "movement"},
    "zero_all": {"prune__mask_0": "freeze_init_zero_all", "prune__mask_1": "signed_constant"},
    "zero_reshuffle": {"prune__mask_0": "freeze_init_zero_reshuffle", "prune__mask_1": "random_reinit"},
    "zero_rev": {"prune__mask_0": "freeze_init_zero_rev", "prune__rewind_to": 4},
    "freeze_init": {"prune__mask_0": "freeze_init", "prune__criterion": "snip"},
    "freeze_reinit": {"prune__mask_0": "freeze_reinit", "prune__mask_1": "signed_reshuffle"},
    "original": {"prune__mask_0": "original", "prune__criterion": "magnitude_increase"},
    "mask_init": {"prune__mask_0": "original", "prune__mask_1": "mask_init"},
    "single": {"prune__criterion": "large_final_same_sign_single", "prune__mask_1": "rand_signed_constant"},
    "global": {"prune__scope": "global", "prune__scale": {}, "prune__criterion": "grad",
               "prune__mask_1": "random_reshuffle"},
    "rescaling": {"prune__criterion": "large_init_large_final", "prune__formulas": "code",
                  "prune__mask_1": "signed_reinit_rescaling"},
    "piled": {"prune__mask_1": "random_reinit_rescaling", "prune__actions": "code", "prune__mask_0": "freeze_init",
              "prune__rewind_to": 4},
    "drawn": {"prune__mask_1": "signed_reinit", "prune__mask_0": "freeze_reinit", "prune__reinit": "draw"},
}  # fmt: skip


def recipe_of(name: str = "", **settings):
    chosen = {"train__iterations": 10, "evaluate__every": 5, "train__optimizer": "sgd", "train__lr": 0.05,
              "train__momentum": 0.9, "train__weight_decay": 0.01, **SEARCHES.get(name, {}), **settings}  # fmt: skip
    return small_recipe("lenet-300-100", "digits", **chosen)


def strip(result):
    return {k: v for k, v in result.items() if k not in TIMING_FIELDS}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SEARCHES)
def test_pruned_weights_stay_where_the_action_puts_them_and_the_ticket_says_where(name, device, tmp_path):
    """After every chunk of every round they have the bits that the finished ticket rebuilds."""
    recipe = recipe_of(name)
    seen, last = [], None
    for event in find_tickets(recipe, random_source("digits"), compute(recipe, device=device)):
        if isinstance(event, InRound):
            seen.append((event.round, event.state().arrays))
        if isinstance(event, RoundFinished):
            last = event
    assert last is not None
    fastlth.store.ticket.save(tmp_path / "search.ticket", last.ticket)
    assert verify(tmp_path / "search.ticket") == []
    ticket = load_ticket(tmp_path / "search.ticket")
    moved = 0
    for round, arrays in seen:
        start, masks = ticket.start(round), ticket.mask(round)
        for n, mask in masks.items():
            now = torch.from_numpy(arrays[f"model/{n}"])
            same = bits(now) == bits(start[n])
            if recipe.prune.trains_pruned:
                moved += int((~same[~mask]).sum())
            else:
                assert same[~mask].all(), (round, n)
                if not recipe.prune.fills:
                    assert (bits(now)[~mask] == 0).all()
            assert round == 0 or not mask.any() or (~same[mask]).any()
    assert (moved > 0) == recipe.prune.trains_pruned


@pytest.mark.parametrize("mask_0", ["mask", "freeze_init"])
def test_the_first_step_already_sees_frozen_weights_at_their_value(mask_0):
    """A rewound engine holds the start bit for bit, again after another rewind; or zeros, whatever the start says."""
    recipe = recipe_of(prune__mask_0=mask_0)
    engine = make_engine(recipe, random_source("digits"))
    masks = half_masks({n: engine.weights()[n] for n in engine.weight_names})
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        start = {n: torch.randn(t.shape, generator=generator) for n, t in engine.weights().items()}
        engine.set_masks(masks)
        engine.rewind(start)
        wanted = start
        if mask_0 == "mask":
            wanted = start | {n: start[n].masked_fill(~m, 0.0) for n, m in masks.items()}
        assert_same_bits(engine.weights(), wanted)
        engine.run(0, 3)
        for n, m in masks.items():
            assert torch.equal(bits(engine.weights()[n])[~m], bits(wanted[n])[~m])


@pytest.mark.parametrize("name", ["zero_mask", "zero_all", "zero_reshuffle", "zero_rev"])
def test_the_rule_of_the_action_holds_in_a_search(name):
    """|w_i| > |w_f| at the end of round 0, seen from outside."""
    recipe = recipe_of(name, prune__rounds=1)
    ends, ticket = {}, None
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, RoundFinished):
            ends[event.round] = event.trained()
            ticket = event.ticket
    assert ticket is not None
    for n, at in ticket.pruned_at.items():
        wi, wf = np.abs(ticket.rewind[n]), np.abs(ends[0][n])
        zero, gone = ticket.fill[n] == 1, at == 1
        if name == "zero_mask":
            assert (zero == (gone & (wi > wf))).all()
        elif name == "zero_all":
            assert (zero == (wi > wf)).all()
        elif name == "zero_rev":
            assert (zero == (gone & (wi < wf))).all()
        else:
            assert zero.sum() == (gone & (wi > wf)).sum() and not (zero & ~gone).any()
        assert 0 < zero.sum() < zero.size


@pytest.mark.parametrize("settings", [{"prune__mask_1": "random_reinit"}, {"prune__rewind_to": 4}], ids=str)
def test_what_a_round_started_with_is_w_i_and_theta_k_in_round_0(settings, tmp_path):
    recipe = recipe_of(prune__criterion="movement", **settings)
    ends = {}
    for event in find_tickets(recipe, random_source("digits"), compute(recipe)):
        if isinstance(event, RoundFinished):
            ends[event.round] = event.trained()
            fastlth.store.ticket.save(tmp_path / "search.ticket", event.ticket)
    ticket = load_ticket(tmp_path / "search.ticket")
    for round in (0, 1):
        start, before, after = ticket.start(round), ticket.mask(round), ticket.mask(round + 1)
        for n, mask in before.items():
            moved = np.abs(ends[round][n] - start[n].numpy())
            gone = (mask & ~after[n]).numpy()
            assert moved[gone].max() <= moved[after[n].numpy()].min(), (round, n)


@pytest.mark.parametrize("criterion", catalogue.CRITERIA)
def test_every_criterion_runs_and_counts_exactly(criterion):
    recipe = recipe_of(prune__criterion=criterion, train__iterations=4, prune__rounds=1)
    events = list(find_tickets(recipe, random_source("digits"), compute(recipe)))
    [_, done] = [e for e in events if isinstance(e, RoundFinished)]
    if criterion not in SIGN_TESTS:
        for n, mask in done.ticket.mask(1).items():
            assert mask.sum() == mask.size - mask.size * (1 if n == "output.weight" else 2) // 10


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The finished search of a name, run once: (recipe, search)."""

    @functools.cache
    def search(name):
        recipe = recipe_of(name, store__save_every=1e9, store__keep_weights="all", data__validation=1_100)
        return recipe, fastlth.run(recipe, out=tmp_path_factory.mktemp(name))

    return search


@pytest.mark.parametrize("name", ["zero_all", "zero_reshuffle", "zero_rev", "freeze_reinit", "mask_init"])
def test_stopped_and_resumed_through_the_run_directory_it_is_the_same_search(name, searched, tmp_path, monkeypatch):
    recipe, whole = searched(name)
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)
    for stop_after in (13, 20):  # chunks: in rounds 1 and 2
        calls = iter(range(1, stop_after + 1))
        out = tmp_path / f"stopped-{stop_after}"
        with pytest.raises(Stopped):
            fastlth.run(recipe, out=out, stopped=lambda calls=calls: None if next(calls, None) else 15)
        [folder] = out.glob("*/r0")
        resumed = running.resume(folder)
        assert [strip(r) for r in resumed.rounds] == [strip(r) for r in whole.rounds]
        one, other = load_ticket(whole.ticket), load_ticket(resumed.ticket)
        for part in ("rewind", "pruned_at", "fill"):
            a, b = getattr(one.file, part), getattr(other.file, part)
            assert {n: x.tobytes() for n, x in a.items()} == {n: x.tobytes() for n, x in b.items()}
        for round in range(3):
            for a, b in ((one.trained(round), other.trained(round)), (one.model(round), other.model(round))):
                assert all(torch.equal(bits(x), bits(y)) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", SEARCHES)
def test_training_a_ticket_again_gives_the_result_of_the_search(name, searched):
    recipe, search = searched(name)
    ticket = load_ticket(search.ticket)
    for round in (0, 1, 2):
        assert strip(retrain(ticket, round=round)) == strip(ticket.rounds[round])
        start, masks, net = ticket.start(round), ticket.mask(round), ticket.trained(round).state_dict()
        for n, mask in masks.items():
            frozen = torch.zeros_like(mask) if recipe.prune.trains_pruned else ~mask
            assert torch.equal(bits(net[n])[frozen], bits(start[n])[frozen])
            assert (bits(net[n])[~frozen] != bits(start[n])[~frozen]).any() or frozen.all()


def test_a_seed_can_stand_for_theta0_under_any_action(tmp_path):
    recipe = recipe_of("zero_all", data__validation=1_100)
    seed = dataclasses.replace(recipe, store=dataclasses.replace(recipe.store, theta0="seed"))
    stored, small = fastlth.run(recipe, out=tmp_path / "a").ticket, fastlth.run(seed, out=tmp_path / "b").ticket
    one, other = load_ticket(stored), load_ticket(small)
    assert other.file.theta0_seed and not one.file.theta0_seed
    assert_same_bits(one.start(2), other.start(2))
    assert verify(small, theta0) == []


def test_batch_norm_and_convolutions_lie_in_any_memory_format():
    """channels_last weights are frozen and permuted in logical order."""
    base = {"model__batch_norm": True, "prune__mask_0": "freeze_reinit", "prune__mask_1": "random_reshuffle",
            "train__iterations": 3, "prune__rounds": 1}  # fmt: skip
    recipe = small_recipe("conv-2", "digits", **base)
    starts = []
    for layout in ("off", "on"):
        for event in find_tickets(recipe, random_source("digits"), compute(recipe, channels_last=layout)):
            if isinstance(event, InRound) and event.round == 1 and event.event.iteration == 3:
                arrays = event.state().arrays
            if isinstance(event, RoundFinished):
                ticket = event.ticket
        masks = ticket.mask(1)
        numbers = {n: i for i, n in enumerate(masks)}
        start = actions.start(recipe.prune, {n: torch.from_numpy(a) for n, a in ticket.rewind.items()},
                              {n: torch.from_numpy(at) for n, at in ticket.pruned_at.items()}, {}, numbers=numbers,
                              round=1, key=recipe.seeds.key("prune"),
                              draw=functools.partial(drawn, recipe))  # fmt: skip
        assert all((arrays[f"model/{n}"][~m] == start[n].numpy()[~m]).all() for n, m in masks.items())
        starts.append(arrays)
    assert len(starts) == 2


# docs/criteria.md is the truth


def documented() -> dict[str, list[str]]:
    """The names in the first columns of the three tables, in order."""
    text = (ROOT / "docs" / "criteria.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    found = {}
    for part in parts[1:]:
        title = part.splitlines()[0]
        names = re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE)
        if names:
            found[title] = names
    return found


def test_the_tables_of_the_documentation_are_what_the_code_knows():
    tables = documented()
    assert {k: len(v) for k, v in tables.items()} == {"Criteria": 17, "Mask-1 actions": 12, "Mask-0 actions": 8}
    assert tables["Criteria"] == list(catalogue.CRITERIA) == list(CRITERIA)
    assert tables["Mask-1 actions"] == list(catalogue.MASK_1) == list(actions.MASK_1)
    assert tables["Mask-0 actions"] == list(catalogue.MASK_0) == list(actions.MASK_0)


def test_help_lists_exactly_the_documented_names(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("TERMINAL_WIDTH", "240")
    code, out, err = command("find-ticket", "--help")
    assert code == 0
    text = re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|[│┃|]", " ", out + err))
    tables = documented()
    for flag, title in (("criterion", "Criteria"), ("mask-1", "Mask-1 actions"), ("mask-0", "Mask-0 actions")):
        [listed] = re.findall(rf"--{flag} <?\w+>? [^:]*: ([\w, ]+?) \(default", text)
        assert listed.split(", ") == tables[title]


def test_the_flags_reach_the_recipe_and_the_result(command, tmp_path):
    flags = ["--criterion", "movement", "--mask-1", "signed_reinit", "--mask-0", "freeze_init_zero_rev"]
    base = ["find-ticket", "lenet-300-100", "digits", "-i", "4", "-b", "32", "-l", "0.01", "--rounds", "1",
            "--device", "cpu", "--precision", "fp32", "--out", tmp_path, "--json"]  # fmt: skip
    code, out, err = command(*base, *flags)
    assert code == 0, err
    path = json.loads(out)["ticket"]
    code, out, err = command("ticket", "inspect", path, "--json")
    document = json.loads(out)
    assert [document[k] for k in ("criterion", "mask_1", "mask_0")] == flags[1::2]
    assert len(document["zeroed"]) == 2 and document["zeroed"][0] == 0 < document["zeroed"][1]
    code, out, err = command("ticket", "inspect", path)
    assert "criterion movement, mask-1 action signed_reinit, mask-0 action freeze_init_zero_rev; " in err
    assert command("ticket", "verify", path)[0] == 0
    assert json.loads(command("ticket", "diff", path, path, "--json")[1])["identical"] is True
    code, out, err = command("ticket", "export", path, tmp_path / "x.pt", "--format", "torch-prune")
    assert code == 2 and "torch-prune cannot hold a ticket of mask-0 action freeze_init_zero_rev" in err
    assert command("ticket", "export", path, tmp_path / "x.safetensors", "--round", "1")[0] == 0
    code, out, err = command("ticket", "import", tmp_path / "x.safetensors", tmp_path / "y.ticket",
                             "--format", "safetensors")  # fmt: skip
    assert code == 2 and "give --set prune.mask_1=none" in err
    code, out, err = command("ticket", "import", tmp_path / "x.safetensors", tmp_path / "y.ticket", "--format",
                             "safetensors", "--set", "prune.mask_1=none", "--set", "prune.mask_0=mask")  # fmt: skip
    assert code == 0, err
    for flag in (["--rate", "0.3"], ["--set", "prune.rate=0.3"]):
        code, out, err = command(*base, "--criterion", "large_final_same_sign_single", *flag)
        assert code == 2 and "prunes by signs alone, whatever the rate; leave out --rate" in err
    code, out, err = command(*base, "--mask-1", "mask_init")
    assert code == 2 and "must be original with mask_1 mask_init" in err


def test_two_searches_that_differ_in_their_actions_alone_are_not_identical(tmp_path):
    from fastlth.exchange.diff import diff

    files = []
    for mask_1 in ("signed_constant", "signed_reinit"):
        recipe = recipe_of(prune__mask_1=mask_1, prune__rounds=0, data__validation=1_100)
        files.append(load_ticket(fastlth.run(recipe, out=tmp_path).ticket).file)
    document = diff(*files)
    assert not document["identical"] and not document["actions_identical"] and document["theta0_identical"]


def test_contradictions_name_their_reason():
    with pytest.raises(RecipeError, match=r"prune\.constant must be left out with mask_1 signed_reinit"):
        recipe_of(prune__mask_1="signed_reinit", prune__constant=0.1)
