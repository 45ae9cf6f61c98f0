"""Linear mode connectivity: the line, its ends, where the copies start, and going on after a stop."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from fastlth import running
from fastlth.data.normalise import table
from fastlth.data.sources import data_root, load
from fastlth.errors import RecipeError, Stopped, TicketError
from fastlth.experiments.connectivity import Plan, connectivity, instability, line, norms, recomputed
from fastlth.experiments.trial import Trial
from fastlth.models import build
from fastlth.tickets import load_ticket
from fastlth.training import host
from fastlth.training.engines.make import make_engine, make_splits
from tests.helpers import assert_masked, assert_same_bits, bits, small_recipe


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search of two rounds, never written to by a test that does not copy it."""
    return running.run(small_recipe(), out=tmp_path_factory.mktemp("runs")).replicates[0].path


@pytest.fixture
def run(found, tmp_path):
    return shutil.copytree(found, tmp_path / "run" / "r0")


@pytest.fixture
def starts(monkeypatch):
    """What each training of a plan begins with: starts(run, plan) -> {folder below connectivity: (recipe, Start)}."""

    def collect(run, plan):
        seen, whole = {}, Trial.run

        def spy(self, recipe, engine, start, **more):
            seen[str(self.folder.relative_to(run / "connectivity"))] = (recipe, start())
            return whole(self, recipe, engine, start, **more)

        monkeypatch.setattr(Trial, "run", spy)
        connectivity(run, plan)
        monkeypatch.setattr(Trial, "run", whole)
        return seen

    return collect


def two_states():
    """Values that betray a careless formula at the ends: -0.0, subnormals, huge, and counts."""
    nasty = torch.tensor([-0.0, 0.0, 1e-45, 3e38, -3e38, 0.1, 1.0, -7.3])
    other = torch.tensor([0.0, -0.0, 0.3, -3e38, 3e38, 0.7, 3e-39, -7.3])
    return {"w": nasty, "n": torch.tensor(3)}, {"w": other, "n": torch.tensor(5)}


def test_the_ends_of_the_line_are_the_copies_bit_for_bit():
    a, b = two_states()
    points = list(line(a, b, 30))
    assert torch.equal(bits(points[0][1]["w"]), bits(a["w"])) and points[0][0] == 0.0
    assert torch.equal(bits(points[-1][1]["w"]), bits(b["w"])) and points[-1][0] == 1.0
    assert int(points[0][1]["n"]) == 3 and int(points[-1][1]["n"]) == 5


def test_the_line_is_straight_and_even():
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(1000, generator=generator)} for _ in range(2))
    points = list(line(a, b, 30))
    assert [alpha for alpha, _ in points] == [i / 29 for i in range(30)]
    for alpha, state in points:
        exact = (1 - alpha) * a["w"].double().numpy() + alpha * b["w"].double().numpy()
        assert np.allclose(state["w"].double().numpy(), exact, rtol=0, atol=1e-6)


def test_pruned_weights_are_plus_zero_all_along_the_line():
    mask = torch.arange(8) % 2 == 0
    a, b = ({"w": torch.randn(8).masked_fill(~mask, 0.0)} for _ in range(2))
    for _, state in line(a, b, 30):
        assert_masked(state, {"w": mask})


def test_instability_is_the_maximum_minus_the_mean_of_the_ends():
    assert instability([0.1, 0.5, 0.3]) == pytest.approx(0.3)
    assert instability([0.2, 0.1, 0.2]) == 0.0  # a valley is not unstable
    assert instability([0.1, 0.1, 0.3]) == pytest.approx(0.1)


def test_the_document_and_its_files(run):
    document = connectivity(run, Plan(rounds=(0, 2), points=5))
    assert [r["round"] for r in document["rounds"]] == [0, 2]
    ticket = load_ticket(run / "search.ticket")
    for r in document["rounds"]:
        assert r["alphas"] == [0.0, 0.25, 0.5, 0.75, 1.0] and len(r["train_error"]) == 5
        # the ends are what the copies score, measured when they had been trained
        ends = [1 - c["test_accuracy"] for c in r["copies"]]
        assert [r["test_error"][0], r["test_error"][-1]] == ends
        assert r["test_instability"] == max(r["test_error"]) - sum(ends) / 2
        assert r["stable"] == (r["test_instability"] < 0.02)
        assert r["density"] == ticket.file.density(r["round"])
        written = json.loads((run / "connectivity" / f"round-{r['round']}-it0-seeds1-2-points5.json").read_text())
        assert written == {**document, "rounds": [r]}


def test_the_copies_differ_in_order_and_augmentation_alone(run, starts):
    seen = starts(run, Plan(rounds=(2,), points=3))
    (first, a), (second, b) = seen["it0-order1/round-2/trial-0"], seen["it0-order2/round-2/trial-0"]
    ticket = load_ticket(run / "search.ticket")
    for start in (a, b):
        assert_same_bits(start.values, ticket.rewind())
        assert_same_bits(start.masks, ticket.mask(2))
        assert start.first == 0
    for recipe, seed in ((first, 1), (second, 2)):
        own = recipe.seeds
        assert (own.order, own.augment) == (seed, seed) and own.key("init") == ticket.recipe.seeds.key("init")
        assert own.key("split") == ticket.recipe.seeds.key("split")


def test_two_initialisations_have_nothing_in_common(run, starts):
    seen = starts(run, Plan(rounds=(0,), points=3, different_init=True))
    a, b = (start.values["fc1.weight"] for _, start in seen.values())
    theta0 = build(small_recipe()).state_dict()["fc1.weight"]
    assert torch.equal(a, theta0) and torch.equal(b, build(small_recipe(seeds__init=2)).state_dict()["fc1.weight"])


def test_theta_k_is_the_one_a_search_would_rewind_to(run, starts, tmp_path):
    late = running.run(small_recipe(prune__rewind_to=15, prune__rounds=1), out=tmp_path / "late")
    theta_15 = load_ticket(late.ticket).rewind()
    seen = starts(run, Plan(rounds=(1,), points=3, at_iteration=15))
    start = seen["it15-order1/round-1/trial-0"][1]
    assert_same_bits(start.values, theta_15)
    assert start.first == 15
    # from a late search back to theta0, and by default from where it rewinds to
    path = late.replicates[0].path
    assert_same_bits(starts(path, Plan(rounds=(0,), points=3, at_iteration=0))["it0-order1/round-0/trial-0"][1].values,
                     {n: t.detach() for n, t in build(small_recipe()).state_dict().items()})  # fmt: skip
    assert_same_bits(starts(path, Plan(rounds=(0,), points=3))["it15-order1/round-0/trial-0"][1].values, theta_15)


def test_copies_may_train_the_whole_schedule_after_they_part(run, starts):
    """From theta_k, but with step 0 of the schedule and of the data order: T steps and not T - k."""
    seen = starts(run, Plan(rounds=(1,), points=3, at_iteration=15, whole=True))
    rest = starts(run, Plan(rounds=(1,), points=3, at_iteration=15))
    assert set(rest) & set(seen) == set()  # theta-15 is there already, and nothing else is shared
    ticket = load_ticket(run / "search.ticket")
    for seed in (1, 2):
        recipe, start = seen[f"it15-whole-order{seed}/round-1/trial-0"]
        assert start.first == 0 and recipe.train.iterations == ticket.recipe.train.iterations
        assert_same_bits(start.values, rest[f"it15-order{seed}/round-1/trial-0"][1].values)
        assert_same_bits(start.masks, ticket.mask(1))
        folder = run / "connectivity" / f"it15-whole-order{seed}" / "round-1" / "trial-0"
        steps = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()
                 if '"iteration"' in line]  # fmt: skip
        assert steps[:4] == [10, 20, 30, 40]
    whole = json.loads((run / "connectivity" / "round-1-it15-seeds1-2-whole-points3.json").read_text())
    other = json.loads((run / "connectivity" / "round-1-it15-seeds1-2-points3.json").read_text())
    assert (whole["whole_schedule"], other["whole_schedule"]) == (True, False)


def test_at_step_0_the_whole_schedule_is_what_is_left_of_it(run, starts):
    connectivity(run, Plan(rounds=(0,), points=3))
    assert starts(run, Plan(rounds=(0,), points=3, whole=True)) == {}


def _without_seconds(document):
    return {**document, "rounds": [{k: v for k, v in r.items() if k != "seconds"} for r in document["rounds"]]}


def test_a_second_call_trains_nothing_and_a_stopped_one_goes_on(run, found, tmp_path, monkeypatch):
    plan = Plan(rounds=(1,), points=3)
    whole = connectivity(shutil.copytree(found, tmp_path / "whole" / "r0"), plan)
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)  # a safe point after every step
    asked = []

    def stop_in_the_second_copy():
        asked.append(1)
        return 15 if len(asked) > 60 else None

    with pytest.raises(Stopped):
        connectivity(run, plan, stopped=stop_in_the_second_copy)
    done = run / "connectivity" / "it0-order1" / "round-1" / "trial-0" / "result.json"
    stamp = done.stat().st_mtime_ns
    assert _without_seconds(connectivity(run, plan)) == {**_without_seconds(whole), "run": str(run)}
    assert done.stat().st_mtime_ns == stamp
    monkeypatch.setattr(Trial, "_train", lambda *_: pytest.fail("trained again"))
    assert _without_seconds(connectivity(run, plan)) == {**_without_seconds(whole), "run": str(run)}


def test_a_stop_on_the_line_is_heard_at_every_point_and_keeps_the_copies(run, monkeypatch):
    plan = Plan(rounds=(1,), points=5)
    connectivity(run, Plan(rounds=(1,), points=3))  # the copies are trained: nothing else asks from here on
    monkeypatch.setattr(Trial, "_train", lambda *_: pytest.fail("trained again"))
    asked = []
    whole = connectivity(run, plan, stopped=lambda: asked.append(1))
    assert len(asked) == 5
    for at in (1, 3, 5):
        left = [at]

        def stopped(left=left):
            left[0] -= 1
            return 15 if left[0] == 0 else None

        with pytest.raises(Stopped, match="the same command goes on") as caught:
            connectivity(run, plan, stopped=stopped)
        assert caught.value.exit_code == 143
    assert connectivity(run, plan) == whole


def test_a_stop_is_heard_between_the_batches_of_a_recomputation():
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, train__batch_size=100)
    pixels = make_splits(recipe, load("digits", data_root()))["train"].pixels[:250]
    asked = []
    recomputed(recipe, dict(build(recipe).state_dict()), pixels, lambda: asked.append(1))
    assert len(asked) == 3


def test_recomputed_statistics_against_their_definition():
    """With momentum None, torch's running mean is the plain mean of the batches' means."""
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, train__batch_size=100)
    pixels = make_splits(recipe, load("digits", data_root()))["train"].pixels[:250]
    state = dict(build(recipe).state_dict())
    state["bn1.running_mean"] = torch.full((64,), 9.0)
    found = recomputed(recipe, state, pixels)
    x = table("digits", "mean-std")[0][torch.from_numpy(pixels[..., 0]).long()][:, None]
    seen = torch.nn.functional.conv2d(x, state["conv1.weight"], padding=1)
    means = torch.stack([part.mean((0, 2, 3)) for part in seen.split(100)])
    assert torch.allclose(found["bn1.running_mean"], means.mean(0), atol=1e-5)
    assert int(found["bn1.num_batches_tracked"]) == 3
    assert torch.equal(found["conv1.weight"], state["conv1.weight"])


def test_batch_norm_of_one_dimension_is_recomputed_too():
    """A net that flattens its images and normalises every pixel: the mean of the batches' means, per pixel."""
    recipe = small_recipe("tests.training.ranks:own_of_one_dimension", train__batch_size=100)
    pixels = make_splits(recipe, load("digits", data_root()))["train"].pixels[:250]
    state = {**build(recipe).state_dict(), "1.running_mean": torch.full((64,), 9.0)}
    found = recomputed(recipe, state, pixels)
    x = table("digits", "mean-std")[0][torch.from_numpy(pixels.reshape(250, 64)).long()]
    means = torch.stack([part.mean(0) for part in x.split(100)])
    assert torch.allclose(found["1.running_mean"], means.mean(0), atol=1e-5)
    one_more = recomputed(recipe, state, pixels[:201])["1.running_mean"]  # torch makes no variance of one number
    assert torch.equal(one_more, recomputed(recipe, state, pixels[:200])["1.running_mean"])
    with_statistics = nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2)
    net = nn.Sequential(nn.Linear(2, 2), *with_statistics, nn.BatchNorm2d(2, track_running_stats=False))
    assert norms(net) == list(with_statistics)


def test_a_recomputation_runs_under_the_engines_settings_of_the_host():
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, train__batch_size=100)
    pixels = make_splits(recipe, load("digits", data_root()))["train"].pixels[:100]
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        recomputed(recipe, dict(build(recipe).state_dict()), pixels,
                   lambda: seen.append((torch.get_num_threads(), host.flushes_denormals())))  # fmt: skip
        assert torch.get_num_threads() == 2 and not host.flushes_denormals()
    finally:
        torch.set_num_threads(before)
    assert recipe.compute.threads == 1 and seen == [(1, True)]


def test_batch_norm_is_recomputed_between_the_ends_only(tmp_path):
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, prune__rounds=0, train__iterations=10)
    path = running.run(recipe, out=tmp_path).replicates[0].path
    plain, fresh = (connectivity(path, Plan(points=3, batch_norm=b))["rounds"][0] for b in ("interpolate", "recompute"))
    assert plain["test_error"][::2] == fresh["test_error"][::2]
    assert plain["train_error"][1] != fresh["train_error"][1]


def test_fewer_training_images(run):
    document = connectivity(run, Plan(rounds=(0,), points=3, train_images=50))
    assert all(round(e * 50, 9) == round(e * 50) for e in document["rounds"][0]["train_error"])
    engine = make_engine(small_recipe(), load("digits", data_root()))
    assert engine.evaluate("train", 50).accuracy != engine.evaluate("train").accuracy


def test_results_of_other_points_and_images_have_files_of_their_own(run):
    plans = {
        "": Plan(rounds=(0,)), "-points3": Plan(rounds=(0,), points=3), "-points4": Plan(rounds=(0,), points=4),
        "-points3-images50": Plan(rounds=(0,), points=3, train_images=50),
    }  # fmt: skip
    documents = {name: connectivity(run, plan) for name, plan in plans.items()}
    for name, document in documents.items():  # read when all are there
        assert json.loads((run / "connectivity" / f"round-0-it0-seeds1-2{name}.json").read_text()) == document
        assert len(document["rounds"][0]["alphas"]) == plans[name].points


BAD = {
    "equal copies": (dict(seeds=(3, 3)), "two that differ"),
    "too few points": (dict(points=2), "at least 3, so that one lies between the ends, got 2"),
    "unknown batch norm": (dict(batch_norm="reset"), "interpolate or recompute, got 'reset'"),
    "a seed that is none": (dict(seeds=(1, -5)), r"--seeds must be in 0 to 2\*\*32 - 1, got -5"),
    "too large a seed": (dict(seeds=(99999999999, 11)), r"--seeds must be in 0 to 2\*\*32 - 1, got 99999999999"),
    "no images": (dict(train_images=0), "at least 1, got 0"),
    "more images than there are": (dict(train_images=1374), "at most the 1,373 training images, got 1374"),
    "a late start of two initialisations": (dict(at_iteration=5, different_init=True), "no common theta_k"),
    "a late start written so": (dict(at_iteration="5it", different_init=True), "--at-iteration 5it and --from-init d"),
    "no batch norm": (dict(batch_norm="recompute"), "lenet-300-100 has no batch norm whose running statistics"),
    "past the end": (dict(at_iteration=40), "in 0 to 39"),
    "the run's own initialisation": (dict(seeds=(1, 0), different_init=True), "must not be the run's own, 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_contradictions_are_refused(found, name):
    options, says = BAD[name]
    with pytest.raises(RecipeError, match=says):
        connectivity(found, Plan(**options))
    assert not (found / "connectivity").exists()


@pytest.mark.parametrize("start", [0, "0", "0it", "0ep"])
def test_the_first_iteration_may_be_written_in_any_way(run, start):
    document = connectivity(run, Plan(rounds=(0,), points=3, different_init=True, at_iteration=start))
    assert (document["iteration"], document["from_init"]) == (0, "different")


def test_what_a_run_does_not_have_is_refused(found, tmp_path):
    with pytest.raises(RecipeError, match="no round 7; choose from 0 to 2"):
        connectivity(found, Plan(rounds=(7,)))
    with pytest.raises(TicketError, match="not one run"):
        connectivity(tmp_path, Plan())
    late = running.run(small_recipe(prune__rewind_to=15, prune__rounds=0), out=tmp_path / "late").replicates[0].path
    with pytest.raises(RecipeError, match="needs --at-iteration 0: this run rewinds to iteration 15"):
        connectivity(late, Plan(different_init=True))
    frozen = running.run(small_recipe(prune__mask_0="freeze_init", prune__rounds=0), out=tmp_path / "frozen")
    with pytest.raises(RecipeError, match="mask_0 freeze_init"):
        connectivity(frozen.replicates[0].path, Plan())
