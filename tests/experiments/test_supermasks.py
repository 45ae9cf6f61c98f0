"""Supermasks: masks and gradients against ten-line definitions, counts, what stays untouched, and files."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastlth_kernels import philox

from fastlth.composition import compose
from fastlth.data.sources import data_root, load
from fastlth.errors import RecipeError, Stopped
from fastlth.experiments.supermasks import edge_popup, learned
from fastlth.experiments.supermasks.net import SupermaskNet, signed_constant, supermask_engine, supermask_net
from fastlth.experiments.supermasks.one_shot import best, one_shot_masks, removed
from fastlth.experiments.supermasks.plan import METHODS, Plan, settings
from fastlth.experiments.supermasks.run import supermask
from fastlth.experiments.trial import Trial
from fastlth.models import build
from tests.helpers import CPU, assert_same_bits, bits, random_source, small_recipe

KEY = (7, 5)
NUMBERS = {"fc1.weight": 0, "fc2.weight": 1, "output.weight": 2}
RATES = {"fc1.weight": Fraction(1, 5), "fc2.weight": Fraction(1, 5), "output.weight": Fraction(1, 10)}


def recipe_of(method="learned", model="lenet-300-100", dataset="digits", **changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    base = {"train.iterations": 40, "train.batch_size": 32, "train.lr": 1.0, "evaluate.every": 10,
            "data.validation": 64}  # fmt: skip
    return compose(model, dataset, settings={**settings(method, model), **base, **CPU, **given}).recipe


def number(value):
    return torch.tensor(value, dtype=torch.int64)


# --- learned -----------------------------------------------------------------------------------------------


def test_bernoulli_masks_against_numpy():
    rng = np.random.default_rng(0)
    scores = [torch.from_numpy(rng.normal(0, 3, shape).astype(np.float32)) for shape in ((5, 3), (7,), (2, 1, 3, 3))]
    scores[0][0, 0], scores[0][0, 1] = 200.0, -200.0  # certain to stay, certain to go
    masks = learned.bernoulli(scores, number(11), learned.TRAINING, KEY)
    words = philox.words(0, 15 + 7 + 18, KEY, c2=11, c3=learned.TRAINING) >> np.uint32(8)
    flat = np.concatenate([s.sigmoid().numpy().reshape(-1) for s in scores])
    expected = words.astype(np.float64) / 2**24 < flat
    assert np.array_equal(np.concatenate([m.numpy().reshape(-1) for m in masks]), expected.astype(np.float32))
    assert masks[0][0, 0] == 1 and masks[0][0, 1] == 0


def test_every_step_sample_and_purpose_draws_anew_and_the_same_again():
    scores = [torch.zeros(4000)]
    draw = {(n, p): learned.bernoulli(scores, number(n), p, KEY)[0]
            for n in (0, 1) for p in (learned.TRAINING, learned.EVALUATION)}  # fmt: skip
    again = learned.bernoulli(scores, number(1), learned.TRAINING, KEY)[0]
    assert torch.equal(draw[1, learned.TRAINING], again)
    for a in draw:
        assert abs(float(draw[a].mean()) - 0.5) < 0.04
        for b in draw:
            if a != b:
                assert abs(float((draw[a] == draw[b]).float().mean()) - 0.5) < 0.04


def test_the_probability_is_the_sigmoid_of_the_score():
    for score in (-2.0, 0.0, 1.5):
        mask = learned.bernoulli([torch.full((200_000,), score)], number(0), 0, KEY)[0]
        assert float(mask.mean()) == pytest.approx(float(torch.tensor(score).sigmoid()), abs=0.005)


def test_rounding_keeps_what_is_likelier_than_not():
    mask = learned.rounded([torch.tensor([-1.0, -1e-30, -0.0, 0.0, 2.0])])[0]
    assert mask.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_gradient_goes_straight_through(rescale, rounded):
    """Of a linear loss sum(g * w * m * scale) over one layer, written out in float64."""
    plan = Plan(method="learned", rescale=rescale, rounded=rounded)
    rng = np.random.default_rng(1)
    w, g, s = (rng.normal(0, 1, (6, 4)) for _ in range(3))
    net = torch.nn.Linear(4, 6, bias=False, device="meta")
    values = {"weight": torch.from_numpy(w).float()}
    made = SupermaskNet(net, values, ["weight"], plan, KEY)
    with torch.no_grad():
        made.scores[0].copy_(torch.from_numpy(s))
    logits = made(torch.eye(4))  # [4, 6]: the transposed effective weight
    (logits.T * torch.from_numpy(g)).sum().backward()

    p = 1 / (1 + np.exp(-s))
    u = (philox.words(0, 24, KEY, c2=0, c3=learned.TRAINING) >> np.uint32(8)).reshape(6, 4) / 2**24
    mask = (s >= 0 if rounded else u < p).astype(float)
    kept = mask.sum() if rescale else mask.size
    d_mask = g * w * (mask.size / kept)
    if rescale:
        d_mask = d_mask - (g * w * mask).sum() * mask.size / kept**2
    assert np.allclose(logits.detach().numpy().T, w * mask * (mask.size / kept), atol=1e-5)
    assert np.allclose(made.scores[0].grad.numpy(), d_mask * p * (1 - p), atol=1e-5)


def test_a_mask_that_keeps_nothing_is_not_divided_by():
    made = SupermaskNet(torch.nn.Linear(4, 6, bias=False, device="meta"), {"weight": torch.ones(6, 4)}, ["weight"],
                        Plan(method="learned", rescale=True, sigmoid_bias=-80.0), KEY)  # fmt: skip
    assert made(torch.ones(2, 4)).tolist() == [[0.0] * 6] * 2


# --- edge-popup ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.29, 0.5, 1.0, 1e-9])
def test_edge_popup_keeps_exactly_the_highest(keep):
    rng = np.random.default_rng(2)
    scores = [torch.from_numpy(rng.permutation(n).astype(np.float32)) for n in (99, 7, 1)]
    scores[0] = scores[0].view(9, 11)
    for s, mask in zip(scores, edge_popup.highest(scores, keep), strict=True):
        count = max(1, s.numel() - int((1 - Fraction(repr(keep))) * s.numel()))
        assert int(mask.sum()) == count == edge_popup.kept(s.numel(), keep)
        assert torch.equal(mask == 1, s >= s.numel() - count)


def test_edge_popup_counts_are_exact_where_floats_are_not():
    assert int((1 - 0.9) * 100) == 9 and edge_popup.kept(100, 0.9) == 90
    assert edge_popup.kept(90, 0.3) == 27


def test_edge_popup_counts_are_exact_among_ties_too():
    scores = [torch.tensor([0.0, -0.0] * 50), torch.ones(10)]
    assert [int(m.sum()) for m in edge_popup.highest(scores, 0.3)] == [30, 3]


def test_edge_popup_gradient_and_scale():
    made = SupermaskNet(torch.nn.Linear(4, 6, bias=False, device="meta"), {"weight": torch.full((6, 4), 2.0)},
                        ["weight"], Plan(method="edge-popup", keep=0.25, rescale=True), KEY)  # fmt: skip
    scores = made.scores[0].detach().clone()
    out = made(torch.eye(4))
    out.sum().backward()
    assert torch.allclose(made.scores[0].grad, torch.full((6, 4), 4.0))  # w * sqrt(1 / 0.25), wherever the mask is
    assert int((out == 4.0).sum()) == 6 and torch.equal((out.T != 0), scores >= scores.flatten().sort().values[-6])
    assert float(scores.abs().max()) < 0.5  # uniform in +-1/sqrt(4)


# --- the net and its training ----------------------------------------------------------------------------------


def test_signed_constants():
    w = torch.tensor([[3.0, -1.0], [0.0, -0.0]])
    std = float(np.std([3.0, -1.0, 0.0, 0.0]))
    assert torch.allclose(signed_constant(w, 1.0), torch.tensor([[std, -std], [0.0, 0.0]]))
    assert torch.equal(signed_constant(w, 3.0), 3 * signed_constant(w, 1.0))


@pytest.mark.parametrize("method", ["learned", "edge-popup"])
def test_training_moves_the_scores_and_nothing_else(method):
    recipe = recipe_of(method, "conv-2", "digits", model__batch_norm=True, train__iterations=8, evaluate__every=8)
    plan = Plan(method=method)
    engine, net = supermask_engine(recipe, random_source("digits"), plan)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    theta0 = build(recipe).state_dict()
    engine.run(0, 8)
    after = net.state_dict()
    for name, value in theta0.items():
        held = after[f"value/{name.replace('.', '/')}"]
        if "running" in name or "num_batches" in name:
            assert not torch.equal(held, value), name  # statistics follow the masked net
        else:
            assert torch.equal(bits(held), bits(value)), name
    assert all(not torch.equal(after[n], before[n]) for n in before if n.startswith("scores."))
    assert int(net.step) == 8


def test_one_step_of_the_engine_against_plain_torch():
    recipe = recipe_of(train__lr=100.0)
    plan = Plan(method="learned", signed_constant=True, signed_constant_multiplier=2.0)
    engine, net = supermask_engine(recipe, load("digits", data_root()), plan)
    loader = engine._loader
    batch = next(iter(loader.batches(0, 1)))
    x = batch.images.float() / 255
    theta = build(recipe).state_dict()
    weights = [signed_constant(theta[n], 2.0) for n in NUMBERS]
    sizes = [w.numel() for w in weights]
    words = philox.words(0, sum(sizes), recipe.seeds.key("prune"), c2=0, c3=learned.TRAINING) >> np.uint32(8)
    keep = torch.from_numpy(words / 2**24 < 0.5).float().split(sizes)
    effective = [(w * k.view(w.shape)).requires_grad_() for w, k in zip(weights, keep, strict=True)]
    h = x.flatten(1)
    for w in effective[:-1]:
        h = F.relu(h @ w.T)
    F.cross_entropy(h @ effective[-1].T, batch.labels).backward()
    engine.run(0, 1)
    for w, e, s in zip(weights, effective, net.scores, strict=True):
        expected = -100.0 * e.grad * w * 0.25
        assert torch.allclose(s.detach(), expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()) + 1e-9)


def test_evaluation_masks_do_not_depend_on_the_batch_and_differ_between_samples():
    recipe = recipe_of()
    net = supermask_net(recipe, Plan(method="learned")).eval()
    x = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        whole = net(x)
        assert torch.allclose(torch.cat([net(x[:2]), net(x[2:])]), whole, atol=1e-6)
        net.sample.fill_(1)
        assert not torch.allclose(net(x), whole, atol=1e-3)
    assert int(net.step) == 0


@pytest.mark.parametrize("plan", [
    Plan(method="learned", rescale=True, signed_constant=True), Plan(method="learned", rounded=True),
    Plan(method="edge-popup", keep=0.3),
])  # fmt: skip
def test_learning_the_mask_of_untrained_weights(tmp_path, plan):
    lr = {"learned": 100.0, "edge-popup": 1.0}[plan.method]
    recipe = recipe_of(plan.method, train__iterations=80, train__lr=lr)
    document = supermask(recipe, plan, out=tmp_path)
    assert document["test_accuracy"] > 0.5
    many = 1 if plan.rounded or plan.method == "edge-popup" else 10
    assert len(document["test_accuracies"]) == many
    assert many == 1 or len(set(document["test_accuracies"])) > 1  # ten masks, not one ten times
    assert document["test_accuracy"] == pytest.approx(sum(document["test_accuracies"]) / many)
    assert [layer["size"] for layer in document["layers"]] == [19200, 30000, 1000]
    if plan.method == "edge-popup":
        assert [layer["kept"] for layer in document["layers"]] == [5760, 9000, 300] and document["density"] == 0.3
    written = tmp_path / f"lenet-300-100-digits-{recipe.digest[:8]}" / "r0" / "supermask" / f"{plan.label}.json"
    assert json.loads(written.read_text()) == document
    assert supermask(recipe, plan, out=tmp_path) == document  # trains nothing: the seconds are the same


def test_a_stopped_training_goes_on_without_changing_a_bit(tmp_path, monkeypatch):
    recipe, plan = recipe_of(model="conv-2", model__batch_norm=True, train__iterations=20), Plan(method="learned")
    whole = supermask(recipe, plan, out=tmp_path / "whole")
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)
    asked = []

    def stop_at_13():
        asked.append(1)
        return 15 if len(asked) == 13 else None

    with pytest.raises(Stopped):
        supermask(recipe, plan, out=tmp_path / "parts", stopped=stop_at_13)
    torch.manual_seed(1)  # nothing may depend on torch's own generator
    rest = supermask(recipe, plan, out=tmp_path / "parts")
    for d in (whole, rest):
        del d["seconds"], d["folder"]
    assert rest == whole


# --- one-shot ----------------------------------------------------------------------------------------------------


def masks_of(criterion, powers=24, seed=4):
    rng = np.random.default_rng(seed)
    shapes = {"fc1.weight": (30, 20), "fc2.weight": (10, 30), "output.weight": (5, 2)}
    initial, final = ({n: torch.from_numpy(rng.normal(size=s).round(1)).float() for n, s in shapes.items()}
                      for _ in range(2))  # fmt: skip
    plan = Plan(method="one-shot", criterion=criterion, powers=powers)
    gradient = {n: torch.from_numpy(rng.normal(size=s)).float() for n, s in shapes.items()}
    prune = recipe_of("one-shot").prune
    return initial, final, gradient, dict(one_shot_masks(prune, plan, initial, final, NUMBERS, KEY, lambda: gradient))


def test_one_shot_counts_are_exact_at_every_power():
    initial, _, _, masks = masks_of("large_final")
    assert list(masks) == list(range(25))
    for power, found in masks.items():
        for name, mask in found.items():
            gone = int((1 - (1 - RATES[name]) ** power) * initial[name].numel())
            assert int((~mask).sum()) == gone == removed(initial[name].numel(), RATES[name], power)
    assert removed(1000, Fraction(1, 10), 3) == 271 and removed(300 * 784, Fraction(1, 5), 0) == 0


def test_one_shot_masks_keep_the_highest_scores():
    """large_final_same_sign with ties and zeros in the weights: kept scores are never below removed ones."""
    initial, final, _, masks = masks_of("large_final_same_sign")
    for found in masks.values():
        for name, mask in found.items():
            a, b = initial[name].numpy(), final[name].numpy()
            score = np.where(np.sign(a) == np.sign(b), np.abs(b), 0.0)
            if mask.any() and not mask.all():
                assert score[mask.numpy()].min() >= score[~mask.numpy()].max()


def test_one_shot_with_gradients_and_sign_tests():
    initial, _, gradient, masks = masks_of("snip", powers=3)
    score = (gradient["fc1.weight"] * initial["fc1.weight"]).abs()
    mask = masks[3]["fc1.weight"]
    assert score[mask].min() >= score[~mask].max()
    initial, final, _, masks = masks_of("large_final_same_sign_single")
    assert list(masks) == [1]
    assert torch.equal(masks[1]["fc2.weight"], initial["fc2.weight"].sign() == final["fc2.weight"].sign())


class Elsewhere:
    """A gradient on another device than the weights."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        assert device == torch.device("cpu")
        return self.tensor


@pytest.mark.parametrize("criterion", ["snip", "grad"])
def test_gradients_come_to_the_weights_device(criterion):
    initial, final, gradient, masks = masks_of(criterion, powers=2)
    plan = Plan(method="one-shot", criterion=criterion, powers=2)
    far = {n: Elsewhere(g) for n, g in gradient.items()}
    found = dict(one_shot_masks(recipe_of("one-shot").prune, plan, initial, final, NUMBERS, KEY, lambda: far))
    for power, same in masks.items():
        assert all(torch.equal(found[power][n], m) for n, m in same.items())


def test_labels_tell_close_values_apart():
    labels = [Plan(method="edge-popup", keep=k).label for k in (0.3, 0.3333333, 0.3333334)]
    assert labels == ["edge-popup-keep0.3", "edge-popup-keep0.3333333", "edge-popup-keep0.3333334"]
    assert Plan(method="learned", sigmoid_bias=2.0).label == "learned-sigmoid-bias2"


def test_the_best_power_is_chosen_on_validation_images():
    rows = [{"power": p, "density": 0.8**p, "init": {"validation_accuracy": v, "test_accuracy": t}}
            for p, (v, t) in enumerate([(0.1, 0.2), (0.7, 0.6), (0.5, 0.9)])]  # fmt: skip
    assert best(rows, "init") == {"power": 1, "density": 0.8, "validation_accuracy": 0.7, "test_accuracy": 0.6,
                                  "highest_test_accuracy": 0.9}  # fmt: skip


def test_one_shot_from_a_trained_net_that_is_trained_once(tmp_path, monkeypatch):
    recipe = recipe_of("one-shot", train__iterations=150, train__lr=1e-3)
    document = supermask(recipe, Plan(method="one-shot", powers=8), out=tmp_path)
    assert [row["power"] for row in document["rows"]] == list(range(9)) and document["rows"][0]["density"] == 1.0
    assert document["trained_test_accuracy"] > 0.9
    assert document["best"]["signed_constant"]["highest_test_accuracy"] > 0.6
    untrained = document["rows"][0]["init"]["test_accuracy"]
    assert document["best"]["init"]["test_accuracy"] > untrained + 0.2
    monkeypatch.setattr(Trial, "_train", lambda *_: pytest.fail("trained again"))
    other = supermask(recipe, Plan(method="one-shot", criterion="small_final", powers=8), out=tmp_path)
    best_small = other["best"]["signed_constant"]["highest_test_accuracy"]
    assert best_small < document["best"]["signed_constant"]["highest_test_accuracy"]


# --- what is refused ---------------------------------------------------------------------------------------------

BAD = {
    "method": (dict(method="learnt"), "did you mean 'learned'"),
    "criterion": (dict(method="one-shot", criterion="largest"), "unknown --criterion 'largest'"),
    "criterion of learned": (dict(method="learned", criterion="random"), "--criterion is an option of one-shot"),
    "both ways": (dict(method="one-shot", signed_constant=True), "which reports both"),
    "bias of edge-popup": (dict(method="edge-popup", sigmoid_bias=1.0), "--sigmoid-bias is an option of learned"),
    "rescale of one-shot": (dict(method="one-shot", rescale=True), "--rescale is an option of learned and edge-popup"),
    "powers": (dict(method="one-shot", powers=-1), "in 0 to 254, got -1"),
    "samples": (dict(method="learned", samples=0), "at least 1"),
    "samples of one mask": (dict(method="learned", rounded=True, samples=3), "rounding gives one mask"),
    "powers of a sign test": (
        dict(method="one-shot", criterion="large_final_same_sign_single", powers=7),
        "a sign test gives one mask",
    ),
    "multiplier": (dict(method="one-shot", signed_constant_multiplier=0.0), "must be greater than 0, got 0"),
    "multiplier of nothing": (
        dict(method="learned", signed_constant_multiplier=2.0),
        "goes with --signed-constant; give",
    ),
    "keep": (dict(method="edge-popup", keep=0.0), r"in \(0, 1\], got 0"),
    "bias": (dict(method="learned", sigmoid_bias=float("nan")), "in -80 to 80"),
}


@pytest.mark.parametrize("name", BAD)
def test_contradictions_are_refused(name):
    options, says = BAD[name]
    with pytest.raises(RecipeError, match=says):
        Plan(**options)


@pytest.mark.parametrize("changes", [
    {"prune__mask_0": "freeze_init"}, {"prune__mask_1": "signed_constant"}, {"model__dropout": 0.5},
    {"compute__compile": "on"}, {"prune__criterion": "movement"}, {"prune__rewind_to": 5},
    {"prune__early_bird": 0.1, "train__batch_size": 200},
])  # fmt: skip
def test_settings_that_mean_nothing_here_are_refused(tmp_path, changes):
    with pytest.raises(RecipeError, match="supermasks"):
        supermask(recipe_of(**changes), Plan(method="learned"), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "refused", "taken"), [
    ("one-shot", ["prune.rounds=3", "prune.scope=global", "prune.to_density=0.1", "store.keep_weights=all"],
     ["prune.rate=0.3", "prune.scale.output=1", "prune.never=['output']"]),
    ("learned", ["prune.rate=0.3", "prune.rounds=3", "prune.scale.output=1", "store.theta0=seed"], []),
])  # fmt: skip
def test_settings_that_a_method_does_not_look_at_are_refused(command, monkeypatch, tmp_path, method, refused, taken):
    monkeypatch.chdir(tmp_path)
    arguments = ["supermask", "lenet-300-100", "digits", "--method", method]
    for setting in refused:
        code, out, err = command(*arguments, "--set", setting)
        assert (code, out, list(tmp_path.iterdir())) == (2, "", []), err
        assert err.startswith(f"fastlth: {setting.partition('=')[0]} is for searches and changes nothing here"), err
    for setting in taken:
        code, _, err = command(*arguments, "-i", "10", "--powers", "1", "--set", setting)
        assert code == 0, err


@pytest.mark.parametrize("method", ["learned", "edge-popup"])
def test_scores_are_trained_by_the_dense_engine_alone(tmp_path, method):
    with pytest.raises(RecipeError, match=r"compute\.engine must be auto or dense"):
        supermask(recipe_of(compute__engine="sparse"), Plan(method=method), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["prune.rate=0.5", "prune.scale.fc1=0.5", "prune.scale={fc1=0.5}"])
def test_a_sign_test_is_asked_for_no_rate(command, monkeypatch, tmp_path, setting):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("supermask", "lenet-300-100", "digits", "--criterion", "large_final_same_sign_single",
                           "--set", setting)  # fmt: skip
    assert code == 2 and err.startswith("fastlth: prune.") and list(tmp_path.iterdir()) == []


def test_methods_start_from_the_papers_settings():
    train = compose("lenet-300-100", "mnist", settings=settings("learned", "lenet-300-100")).recipe.train
    assert (train.optimizer, train.lr, train.momentum, train.batch_size) == ("sgd", 100.0, 0.9, 250)
    assert train.iterations == 20 * 220 and train.weight_decay == 0.0
    assert settings("learned", "CONV-4")["train.lr"] == 50.0 and settings("learned", "conv-6")["train.lr"] == 20.0
    assert compose("vgg16", "cifar-10", settings=settings("one-shot", "vgg16")).recipe.prune.rewind_to == 0
    vgg = compose("vgg19", "cifar-10", settings=settings("edge-popup", "vgg19")).recipe
    assert vgg.schedule.warmup == 0 and vgg.schedule.milestones == () and vgg.train.weight_decay == 1e-4
    assert len({Plan(method=m).label for m in METHODS}) == 3
    assert Plan(method="learned", rescale=True, samples=3).label == "learned-rescale"
    assert small_recipe().data.normalise == "mean-std" and recipe_of("one-shot").data.normalise == "unit"
    assert dataclasses.replace(Plan(method="edge-popup"), keep=0.3).label == "edge-popup-keep0.3"
    assert_same_bits(dict(build(recipe_of()).state_dict()), dict(build(recipe_of("one-shot")).state_dict()))
