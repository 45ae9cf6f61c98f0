"""What can be reported on, and what is refused; where a run comes from."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

import fastlth
from fastlth import toml
from fastlth.composition import compose, parse_setting
from fastlth.errors import TicketError
from fastlth.report import controls, provenance, published, searches, subject
from fastlth.report.page import render
from fastlth.report.write import write
from fastlth.store import ticket as tickets
from tests.helpers import small_recipe
from tests.report.conftest import renamed


def test_a_parent_a_run_and_a_ticket_are_the_same_search(searched):
    first, second = searched.search.replicates
    [parent] = subject.read([searched.parent])
    [run] = subject.read([first.path])
    [ticket] = subject.read([first.ticket])
    assert [r.seed for r in parent.replicates] == [0, 1]
    assert [r.rounds for r in parent.replicates] == [first.rounds, second.rounds]
    assert run.replicates[0].rounds == ticket.replicates[0].rounds == first.rounds
    assert run.replicates[0].evaluations == ticket.replicates[0].evaluations
    assert len(run.replicates[0].evaluations) == 16
    assert list(run.replicates[0].pruned_at) == ["fc1.weight", "fc2.weight", "output.weight"]  # not alphabetical later
    assert parent.label == "lenet-300-100 on digits" and parent.winner == searched.search.winning_round


def test_the_newest_run_of_a_seed_counts(searched, tmp_path):
    parent = tmp_path / "runs"
    for name in ("r0", "r0.2", "r0.10"):
        shutil.copytree(searched.search.replicates[0].path, parent / name)
    [found] = subject.read([parent])
    assert [r.path.name for r in found.replicates] == ["r0.10"]


def test_a_ticket_away_from_its_run(searched, tmp_path):
    shutil.copy(searched.search.ticket, tmp_path / "mine.ticket")
    [found] = subject.read([tmp_path / "mine.ticket"])
    assert found.replicates[0].evaluations == () and found.rounds == 4
    html = write(searches.document([found], "fastlth report mine.ticket"), tmp_path / "out").read_text()
    assert "training-accuracy" not in html and "accuracy-early-stop" in html


def test_masks_without_measurements(searched, tmp_path):
    """An imported ticket: nothing was trained here, so results are null."""
    found = tickets.load(searched.search.ticket)
    unknown = tuple({k: (v if k in ("round", "density", "kept") else None) for k, v in r.items()} for r in found.rounds)
    tickets.save(tmp_path / "imported.ticket", dataclasses.replace(found, rounds=unknown, resolved={}))
    [one] = subject.read([tmp_path / "imported.ticket"])
    page = write(searches.document([one], "fastlth report imported.ticket"), tmp_path / "out")
    html = page.read_text()
    assert "nothing was trained or measured here" in html and "density-per-layer" in html
    assert {f.stem for f in page.parent.glob("*.csv")} == {"density-per-layer", "overlap-rounds"}
    both = subject.read([tmp_path / "imported.ticket", searched.parent])
    assert "accuracy-early-stop" in write(searches.document(both, "x"), tmp_path / "both").read_text()


def test_a_run_whose_first_round_is_not_done(searched, tmp_path):
    folder = tmp_path / "r0"
    shutil.copytree(searched.search.replicates[0].path, folder, ignore=shutil.ignore_patterns("branches", "*.ticket"))
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(whole[:3]) + whole[3][:20])
    [found] = subject.read([folder])
    assert found.rounds == 0 and len(found.replicates[0].evaluations) == 3
    html = write(searches.document([found], "x"), tmp_path / "out").read_text()
    assert "No round is finished yet (one run, 4 rounds asked for)" in html and "training-accuracy" in html
    (folder / "metrics.jsonl").unlink()
    html = write(searches.document(subject.read([folder]), "x"), tmp_path / "empty").read_text()
    assert "<svg" not in html


@pytest.mark.parametrize("name", ["nothing", "folder", "text"])
def test_what_is_no_run(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("hello")
    with pytest.raises(TicketError, match=name):
        subject.read([tmp_path / name])


def test_labels_tell_what_differs(searched):
    [one] = subject.read([searched.parent])

    def other(**changes):
        return dataclasses.replace(one, recipe=renamed(one.recipe, **changes))

    paths = [searched.parent] * 2
    assert subject._labels([one, other(rate=0.5)], paths) == ["rate 0.2", "rate 0.5"]
    assert subject._labels([one, other(rounds=9)], [paths[0] / "a" / "r0", paths[0] / "b" / "r0"]) == ["a/r0", "b/r0"]
    single = [dataclasses.replace(one, replicates=(r,)) for r in one.replicates]
    assert subject._labels(single, paths) == ["seed 0", "seed 1"]
    conv = dataclasses.replace(one, recipe=small_recipe("conv-2"))
    assert subject._labels([one, conv], paths) == ["lenet-300-100 on digits", "conv-2 on digits"]
    assert subject._labels([one, other(rate=0.5), conv], [*paths, paths[0]]) == [
        "lenet-300-100 on digits, rate 0.2", "lenet-300-100 on digits, rate 0.5", "conv-2 on digits",
    ]  # fmt: skip


@pytest.mark.parametrize("wrap", [
    lambda r: r, lambda r: {"result": r}, lambda r: {"rounds": [r]}, lambda r: [r, r],
    lambda r: {"seed": 3, "results": [{"result": r}]},
])  # fmt: skip
def test_branches_are_read_leniently(wrap, searched, tmp_path):
    result = dict(searched.search.replicates[0].rounds[2])
    place = tmp_path / "branches" / "random-prune-0123abcd" / "round-2"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(wrap(result)))
    (place / "half.json").write_text('{"density": 0.')
    (place / "other.json").write_text('{"density": 0.5, "curve": [1, 2]}')
    (tmp_path / "branches" / "lock").write_text("")
    found = controls.read(tmp_path, searched.search.recipe)
    assert set(found) == {"random-prune"}
    assert all(r["kept"] == result["kept"] and r["round"] == 2 for r in found["random-prune"])


def test_two_branches_of_one_kind_keep_their_digests(searched, tmp_path):
    for digest in ("0123abcd", "4567abcd"):
        place = tmp_path / "branches" / f"lr-rewind-{digest}" / "round-1"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(searched.search.replicates[0].rounds[1]))
    assert set(controls.read(tmp_path, searched.search.recipe)) == {"lr-rewind-0123abcd", "lr-rewind-4567abcd"}


def test_branches_are_told_apart_by_what_differs_and_other_data_are_left_out(searched, tmp_path):
    recipe = searched.search.recipe
    trained = {
        "random-reinit-0123abcd": recipe,
        "random-reinit-4567abcd": dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, lr=0.01)),
        "transfer-0123abcd": small_recipe(dataset="mnist"), "dense-0123abcd": recipe,
    }  # fmt: skip
    for name, theirs in trained.items():
        place = tmp_path / "branches" / name / "round-1"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(searched.search.replicates[0].rounds[1]))
        (place.parent / "recipe.toml").write_text(toml.dumps({**theirs.to_dict(), "resolved": {}}))
    assert set(controls.read(tmp_path, recipe)) == {"random-reinit", "random-reinit, lr 0.01"}


def test_controls_are_named_by_their_options_and_densities_are_points_of_one(searched, tmp_path):
    asked = {
        "prune-at-init-01234567": {"kind": "prune-at-init", "method": "snip", "density": 0.1},
        "prune-at-init-12345678": {"kind": "prune-at-init", "method": "snip", "density": 0.05},
        "prune-at-init-23456789": {"kind": "prune-at-init", "method": "snip", "scope": "layer", "density": 0.1},
        "finetune-01234567": {"kind": "finetune"}, "finetune-12345678": {"kind": "finetune", "density": 0.1},
        "one-shot-01234567": {"kind": "one-shot"}, "one-shot-12345678": {"kind": "one-shot", "density": 0.1},
        "continued-01234567": {"kind": "continued"}, "continued-12345678": {"kind": "continued"},
        "random-prune-01234567": {"kind": "random-prune", "strategy": "erk", "reinit": True},
        "random-prune-12345678": {"kind": "random-prune", "strategy": "of another time"},
    }  # fmt: skip
    folder = tmp_path / "r0"
    shutil.copytree(searched.search.replicates[0].path, folder, ignore=shutil.ignore_patterns("branches", "*.ticket"))
    one = searched.search.replicates[0].rounds[1]
    for name, options in asked.items():
        place = folder / "branches" / name / "round-1" / "trial-0"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps({**one, "density": options.get("density", one["density"])}))
        (place.parents[1] / "branch.toml").write_text(toml.dumps({"branch": options}))
    subjects = subject.read([folder])
    found = {n: [[r["density"] for r in same] for same in d] for n, d in subjects[0].controls().items()}
    assert found == {
        "continued-01234567": [[one["density"]]], "continued-12345678": [[one["density"]]],
        "finetune": [[one["density"]]], "finetune, in one step": [[0.1]], "one-shot": [[one["density"]], [0.1]],
        "prune-at-init, snip": [[0.1], [0.05]], "prune-at-init, snip, scope layer": [[0.1]],
        "random-prune": [[one["density"]]], "random-prune, strategy erk, reinit": [[one["density"]]],
    }  # fmt: skip

    document = searches.document(subjects, "fastlth report r0")  # no round of the search is there
    assert document.lead[0].startswith("Controls only (continued-01234567; continued-12345678; finetune; finetune, in")
    write(document, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    for line in ("| prune-at-init, snip | 1 | 10.00% |", "| prune-at-init, snip | 1 | 5.00% |"):
        assert line in text
    points = (tmp_path / "report" / "accuracy-early-stop.csv").read_text()
    assert points.count('"prune at init, snip"') == 2


def test_a_search_under_way_says_how_far_it_is(searched, tmp_path):
    found = tickets.load(searched.search.ticket)
    tickets.save(tmp_path / "part.ticket", dataclasses.replace(
        found, rounds=found.rounds[:2], pruned_at={n: np.where(at > 2, 0, at).astype(np.uint8)
                                                   for n, at in found.pruned_at.items()}))  # fmt: skip
    whole, part = subject.read([searched.search.ticket, tmp_path / "part.ticket"])
    assert "so far: 2 of 4 rounds finished" in searches.document([part], "x").lead[0]
    assert "so far" not in searches.document([whole], "x").lead[0]


# ---- where a run comes from

RECIPES = {
    "preset": lambda: compose("vgg19", "cifar-10").recipe,
    "fewer iterations": lambda: compose("vgg19", "cifar-10", settings={"train.iterations": 1000}).recipe,
    "unscaled": lambda: compose("vgg19", "cifar-10", settings={
        "train.iterations": 30000, "schedule.scale": False}).recipe,
    "own milestones": lambda: compose("vgg19", "cifar-10", settings={"schedule.milestones": [7, 9]}).recipe,
    "lecode": lambda: compose("conv-4", "cifar-10", preset="lecode", settings={"train.lr": 0.01}).recipe,
    "patterns": lambda: compose("conv-2", "cifar-10", settings={"prune.scale.output": 0.25}).recipe,
    "target": lambda: compose("lenet-300-100", "mnist", settings={"prune.to_density": 0.05}).recipe,
    "rewound": lambda: compose("lenet-300-100", "mnist", settings={"prune.rewind_to": "2ep"}).recipe,
    "small": lambda: small_recipe(seeds__init=7),
    "no preset": lambda: compose("vgg19", "mnist", settings={
        "train.iterations": 10, "train.batch_size": 5, "train.lr": 0.1, "schedule.warmup": 3}).recipe,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_makes_the_recipe_again(name, subjects):
    import shlex

    recipe = RECIPES[name]()
    one = dataclasses.replace(subjects[0], recipe=recipe, replicates=subjects[0].replicates[:1])
    [command] = provenance.commands(one)
    words = shlex.split(command)
    assert words[:2] == ["fastlth", "find-ticket"]
    given = list(zip(words[4::2], words[5::2], strict=True))
    settings = dict(parse_setting(value) for flag, value in given if flag == "--set")
    options = {flag: value for flag, value in given if flag != "--set"}
    keys = {flag: key for key, flag in provenance.FLAGS.items()}
    preset, _ = options.pop("--preset", None), options.pop("--seed")
    assert options.pop("--out") == str(one.replicates[0].path.parent.parent)
    by_ticket = dataclasses.replace(one.replicates[0], path=one.replicates[0].path / "search.ticket")
    assert provenance.commands(dataclasses.replace(one, replicates=(by_ticket,))) == [command]
    settings |= dict(parse_setting(f"{keys[flag]}={value}") for flag, value in options.items())
    made = compose(words[2], words[3], preset=preset, settings=settings).recipe
    assert made == recipe


def test_the_flags_of_a_command_exist():
    import typer

    from fastlth.cli.main import app

    command = typer.main.get_command(app).commands["find-ticket"]
    known = {option for p in command.params for option in p.opts}
    assert set(provenance.FLAGS.values()) | {"--preset", "--set", "--seed", "--replicates"} <= known


def test_a_preset_as_it_is_has_no_difference():
    assert provenance.nearest(compose("lenet-300-100", "mnist").recipe) == ("paper", ())
    name, differences = provenance.nearest(compose("conv-4", "cifar-10", preset="lecode").recipe)
    assert (name, differences) == ("lecode", ())
    name, [one] = provenance.nearest(compose("vgg19", "cifar-10", settings={"train.iterations": 1000}).recipe)
    assert (name, one.setting, one.preset, one.here) == ("paper", "train.iterations", 112480, 1000)


def test_consecutive_seeds_are_one_command():
    assert provenance._consecutive([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]
    assert provenance._consecutive([4]) == [(4, 1)]


def test_published_values_stand_relative_to_the_dense_net():
    values = published.values("conv-4", "cifar-10")
    gain = next(v for v in values if v.quantity == "early_stop_test_accuracy")
    sooner = next(v for v in values if v.quantity == "early_stop_iteration")
    assert (gain.density, gain.beside(0.75)) == (0.111, pytest.approx(0.785))
    assert (sooner.density, sooner.beside(7000)) == (0.092, pytest.approx(2000))
    assert published.values("lenet-300-100", "digits") == []
    assert {v.source for v in values} == {"Frankle & Carbin 2019, arXiv 1803.03635v5, section 3"}


def test_published_values_beyond_our_densities_are_not_drawn(subjects):
    from fastlth.report import curves

    paper = dataclasses.replace(subjects[0], recipe=compose("lenet-300-100", "mnist").recipe)
    stars = [s for c in curves.by_density([paper]) for s in c.panels[0].series if s.label == "published"]
    assert stars == []  # the search ends at 51 %, the paper's values begin at 21 %
    assert "38 % earlier at 21.1 %" in render(searches.document([paper], "x"), {})


def test_a_ticket_that_keeps_only_the_seed_of_theta0(tmp_path):
    search = fastlth.run(small_recipe(store__theta0="seed", prune__rounds=1), out=tmp_path)
    [one] = subject.read([search.ticket])
    masks = fastlth.load_ticket(search.ticket).mask(1)
    for name, at in one.replicates[0].pruned_at.items():
        assert np.array_equal((at == 0) | (at > 1), masks[name].numpy())
