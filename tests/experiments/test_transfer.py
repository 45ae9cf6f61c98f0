"""Transfer: what a ticket carries over, what is drawn fresh, the random ticket, and the recipe of the target."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from fastlth import running
from fastlth.catalogue import DATASETS, DatasetFacts
from fastlth.data.sources import Source
from fastlth.errors import RecipeError, Stopped
from fastlth.experiments import transfer as room
from fastlth.experiments.transfer import carried, random_start, shuffled, target, transfer
from fastlth.experiments.trial import Trial
from fastlth.metrics import TIMING_FIELDS
from fastlth.models import build
from fastlth.tickets import load_ticket
from tests.helpers import assert_same_bits, random_source, small_recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Searches on digits, never written to by a test that does not copy them: model -> run folder."""
    made = {}
    for model in ("lenet-300-100", "conv-2"):
        recipe = small_recipe(model, train__iterations=20, model__batch_norm=model == "conv-2", prune__rewind_to=5)
        made[model] = running.run(recipe, out=tmp_path_factory.mktemp("runs")).replicates[0].path
    return made


@pytest.fixture
def ticket(folders, tmp_path):
    return load_ticket(shutil.copytree(folders["lenet-300-100"], tmp_path / "r0") / "search.ticket")


def tickets_of(folders, model):
    return load_ticket(folders[model] / "search.ticket")


def test_on_the_same_shapes_the_whole_ticket_is_carried_over(ticket):
    start, fresh = carried(ticket, target(ticket.recipe, "digits", {}), 2)
    assert fresh == {} and start.first == 0  # the whole schedule, though the ticket rewinds to iteration 5
    assert_same_bits(start.values, ticket.rewind())
    assert_same_bits(start.masks, ticket.mask(2))


def test_a_fully_connected_first_layer_is_drawn_fresh_for_another_image_size(ticket):
    recipe = target(ticket.recipe, "mnist", {})
    start, fresh = carried(ticket, recipe, 2)
    assert fresh == {"fc1": ("300x64", "300x784")}
    rewind, theta0 = ticket.rewind(), build(recipe).state_dict()
    for name, value in start.values.items():
        assert value.shape == theta0[name].shape
        if not name.startswith("fc1."):
            assert torch.equal(value, rewind[name])
            if name.endswith(".weight"):
                assert torch.equal(start.masks[name], ticket.mask(2)[name])
    assert start.masks["fc1.weight"].all()
    w = start.values["fc1.weight"]
    assert float(w.std()) == pytest.approx((2 / (784 + 300)) ** 0.5, rel=0.01)
    assert not torch.equal(w, theta0["fc1.weight"])


def test_convolutions_are_carried_over_where_their_channels_fit(folders):
    ticket = tickets_of(folders, "conv-2")
    start, fresh = carried(ticket, target(ticket.recipe, "cifar-10", {"train.batch_size": 60}), 2)
    assert set(fresh) == {"conv1", "fc1"}  # 3 channels for 1, and 32x32 images
    rewind = ticket.rewind()
    assert torch.equal(start.values["conv2.weight"], rewind["conv2.weight"])
    assert torch.equal(start.values["bn1.running_mean"], rewind["bn1.running_mean"])
    assert int(start.values["bn1.num_batches_tracked"]) == 5
    assert not start.masks["conv2.weight"].all() and start.masks["conv1.weight"].all()


def test_a_milestone_that_is_not_reached_is_said(ticket):
    said, late = [], {"schedule.milestones": [99_999]}
    transfer(ticket, "digits", round=2, settings=late, show=lambda w: said.append(w) if isinstance(w, str) else None)
    assert said == [f"schedule.milestones [99999] are not reached in {ticket.recipe.train.iterations} iterations"]


@pytest.mark.parametrize("change", [{"model.dropout": 0.5}, {"data.augment": "flip-crop"}])
def test_an_engine_that_cannot_train_the_changed_recipe_is_not_taken_over(tmp_path, change):
    """The sparse engine, which the search chose, has neither dropout nor augmentation."""
    recipe = small_recipe(train__iterations=20, prune__rounds=1, compute__engine="auto")
    [found] = running.run(recipe, out=tmp_path).replicates
    ticket = load_ticket(found.ticket)
    ticket.file.resolved.update(engine="sparse", break_even=1.0, channels_last="off")
    same, other = (transfer(ticket, "digits", round=1, settings=s)["rounds"][0] for s in ({}, change))
    assert (same["engine"], other["engine"]) == ("sparse", "dense")
    assert same["early_stop_validation_loss"] != other["early_stop_validation_loss"]
    asked = dataclasses.replace(ticket.recipe, compute=dataclasses.replace(ticket.recipe.compute, engine="sparse"))
    with pytest.raises(RecipeError, match="--engine sparse cannot train this: "):
        transfer(dataclasses.replace(ticket, file=dataclasses.replace(ticket.file, recipe=asked)), "digits", round=1,
                 settings=change)  # fmt: skip


def test_a_net_of_other_layers_cannot_take_the_ticket(ticket):
    rewind = ticket.rewind()
    file = dataclasses.replace(ticket.file, rewind={n: a for n, a in ticket.file.rewind.items() if "fc2" not in n})
    assert len(file.rewind) < len(rewind)
    with pytest.raises(RecipeError, match=r"has other layers than the ticket's \(fc2.bias\)"):
        carried(dataclasses.replace(ticket, file=file), target(ticket.recipe, "mnist", {}), 2)


@pytest.fixture
def five_classes(monkeypatch):
    """A data set like digits with five classes."""
    own = DATASETS["digits"]
    facts = DatasetFacts(shape=own.shape, classes=5, train=320, test=64, validation=64, mean=own.mean, std=own.std)
    monkeypatch.setitem(DATASETS, "five", facts)
    digits = random_source("digits")
    for images in (digits.train, digits.test):
        images.labels.setflags(write=True)
        np.remainder(images.labels, 5, out=images.labels)
    monkeypatch.setattr(room, "load_for", lambda *_: Source("five", digits.train, digits.test))


def test_other_classes_get_a_new_output_layer_that_is_stated(ticket, five_classes):
    said = []
    document = transfer(ticket, "five", round=2, show=lambda what: said.append(what) if isinstance(what, str) else None)
    assert said == ["output is drawn fresh and kept whole: its weights are 5x100 for five, not 10x100"]
    assert document["fresh_layers"] == ["output"] and document["dataset"] == "five"
    kept = {n: int(m.sum()) for n, m in ticket.mask(2).items()}
    (result,) = document["rounds"]
    assert result["kept"] == kept["fc1.weight"] + kept["fc2.weight"] + 500
    assert result["density"] == result["kept"] / (64 * 300 + 300 * 100 + 500)
    assert result["round"] == 2 and 0 <= result["test_accuracy"] <= 1


def test_a_random_ticket_keeps_as_many_weights_over_all_layers(ticket):
    recipe = target(ticket.recipe, "digits", {})
    start, _ = random_start(ticket, recipe, 2)
    masks = ticket.mask(2)
    kept = {n: int(m.sum()) for n, m in masks.items()}
    drawn = {n: int(m.sum()) for n, m in start.masks.items()}
    assert sum(drawn.values()) == sum(kept.values()) and drawn != kept
    density = sum(kept.values()) / sum(m.numel() for m in masks.values())
    for name, mask in start.masks.items():  # global: every layer has about the same density
        spread = (density * (1 - density) / mask.numel()) ** 0.5
        assert abs(float(mask.float().mean()) - density) < 5 * spread
        assert not torch.equal(start.values[name], ticket.rewind()[name])
        assert not torch.equal(start.values[name], build(ticket.recipe).state_dict()[name])
    again, _ = random_start(ticket, recipe, 2)
    assert_same_bits(start.masks, again.masks)
    assert_same_bits(start.values, again.values)
    other, _ = random_start(ticket, target(ticket.recipe, "digits", {"seeds.base": 9}), 2)
    assert not torch.equal(other.masks["fc2.weight"], start.masks["fc2.weight"])


def test_fresh_layers_of_a_random_ticket_take_no_part_in_the_permutation(ticket):
    start, fresh = random_start(ticket, target(ticket.recipe, "mnist", {}), 2)
    assert list(fresh) == ["fc1"] and start.masks["fc1.weight"].all()
    rest = ("fc2.weight", "output.weight")
    assert sum(int(start.masks[n].sum()) for n in rest) == sum(int(ticket.mask(2)[n].sum()) for n in rest)


def test_shuffling_is_a_permutation_of_all_masks_together():
    masks = {"a": torch.zeros(50, 4, dtype=torch.bool), "b": torch.ones(100, dtype=torch.bool)}
    mixed = shuffled(masks, (3, 7))
    assert sum(int(m.sum()) for m in mixed.values()) == 100
    assert 40 < int(mixed["a"].sum()) < 90
    assert shuffled({}, (3, 7)) == {}
    whole = {n: torch.ones_like(m) for n, m in masks.items()}
    assert_same_bits(shuffled(whole, (3, 7)), whole)


def test_the_target_recipe_is_the_tickets_but_for_the_data(ticket):
    own = ticket.recipe
    other = target(own, "mnist", {})
    for section in ("model", "train", "schedule", "evaluate"):
        assert getattr(other, section) == getattr(own, section)
    assert other.prune == dataclasses.replace(own.prune, rewind_to=0)
    assert other.data.name == "mnist" and other.data.validation == 5000
    same = target(own, "digits", {"seeds.base": 4})
    assert same.data == own.data and same.seeds.key("split") == own.seeds.key("split")  # its hold-out stays held out
    assert same.seeds.key("order") == (4, 3)


def test_another_optimizer_brings_the_papers_learning_rate(ticket):
    sgd = target(ticket.recipe, "digits", {"train.optimizer": "sgd"})
    assert (sgd.train.lr, sgd.train.momentum) == (0.1, 0.9)
    back = target(sgd, "digits", {"train.optimizer": "adam"})
    assert (back.train.lr, back.train.momentum) == (3e-4, 0.0)
    assert target(sgd, "digits", {"train.optimizer": "sgd"}).train == sgd.train
    own = target(ticket.recipe, "digits", {"train.betas": [0.8, 0.9], "train.eps": 1e-6})
    assert target(own, "digits", {"train.optimizer": "sgd"}).train == sgd.train


def test_another_optimizer_brings_its_own_momentum_where_none_is_given(ticket):
    def trained(recipe, **given):
        train = target(recipe, "digits", {f"train.{name}": value for name, value in given.items()}).train
        return train.lr, train.momentum, train.nesterov

    sgd = target(ticket.recipe, "digits", {"train.optimizer": "sgd", "train.nesterov": True})
    assert trained(ticket.recipe, optimizer="sgd", lr=0.05) == (0.05, 0.9, False)
    assert trained(ticket.recipe, optimizer="sgd", momentum=0.0) == (0.1, 0.0, False)
    assert sgd.train.momentum == 0.9 and sgd.train.nesterov
    for optimizer in ("adam", "adamw"):
        assert trained(sgd, optimizer=optimizer, lr=0.001) == (0.001, 0.0, False)
        assert trained(sgd, optimizer=optimizer) == (3e-4, 0.0, False)
    assert trained(sgd, optimizer="sgd", lr=0.05) == (0.05, 0.9, True)  # no other one: the ticket's own stay
    with pytest.raises(RecipeError, match=r"train\.momentum must be 0 with optimizer adam"):
        trained(ticket.recipe, optimizer="adam", momentum=0.5)


def test_a_transfer_is_made_once_and_goes_on_where_it_stopped(ticket, tmp_path, monkeypatch):
    settings = {"train.optimizer": "sgd", "train.lr": 0.05}
    whole = transfer(ticket, "digits", round=1, settings=settings)
    shutil.rmtree(ticket.folder / "branches")
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)
    asked = []

    def stop_at_7():
        asked.append(1)
        return 2 if len(asked) == 7 else None

    with pytest.raises(Stopped):
        transfer(ticket, "digits", round=1, settings=settings, stopped=stop_at_7)
    rest = transfer(ticket, "digits", round=1, settings=settings)
    for d in (whole, rest):
        d["rounds"] = [{k: v for k, v in r.items() if k not in TIMING_FIELDS} for r in d["rounds"]]
    assert rest == whole
    folder = ticket.folder / "branches"
    assert [str(f.relative_to(folder)) for f in folder.glob("*/*/*/result.json")] == [
        f"{rest['branch'].rsplit('/', 1)[1]}/round-1/trial-0/result.json"
    ]
    monkeypatch.setattr(Trial, "_train", lambda *_: pytest.fail("trained again"))
    transfer(ticket, "digits", round=1, settings=settings)


def test_ticket_and_random_ticket_lie_apart_and_each_round_has_its_place(ticket):
    found = [transfer(ticket, "digits", round=1), transfer(ticket, "digits", round=2),
             transfer(ticket, "digits", round=1, random_ticket=True)]  # fmt: skip
    assert found[0]["branch"] == found[1]["branch"] != found[2]["branch"]
    assert [d["rounds"][0]["round"] for d in found] == [1, 2, 1]
    assert found[0]["rounds"][0]["kept"] == found[2]["rounds"][0]["kept"]


def test_what_does_not_fit_is_refused(ticket, folders, tmp_path):
    with pytest.raises(RecipeError, match="unknown dataset 'stl-10'"):
        transfer(ticket, "stl-10")
    with pytest.raises(RecipeError, match=r"unknown train\.optimizer 'rmsprop'"):
        transfer(ticket, "digits", settings={"train.optimizer": "rmsprop"})
    with pytest.raises(RecipeError, match=r"train\.optimizer must be"):
        transfer(ticket, "digits", settings={"train.optimizer": ["sgd"]})
    with pytest.raises(RecipeError, match="no round 9"):
        transfer(ticket, "digits", round=9)
    with pytest.raises(RecipeError, match=r"train\.batch_size must be at most the 1137"):
        transfer(ticket, "digits", settings={"data.validation": 300, "train.batch_size": 2000})
    assert not (ticket.folder / "branches").exists()
    frozen = running.run(small_recipe(prune__mask_0="freeze_init", prune__rounds=0), out=tmp_path / "frozen")
    with pytest.raises(RecipeError, match="mask_0 freeze_init"):
        transfer(load_ticket(frozen.ticket), "digits")


@pytest.mark.parametrize(("setting", "value"), [
    ("data.name", "mnist"), ("model.name", "conv-2"), ("model.batch_norm", True), ("prune.mask_0", "freeze_init"),
    ("prune.never", ["fc1"]), ("store.keep_weights", "all"), ("seeds.init", 5), ("seeds.prune", 9),
])  # fmt: skip
def test_settings_that_belong_to_the_ticket_are_refused(ticket, setting, value):
    says = "the data set is given as DATASET" if setting == "data.name" else f"{setting} belongs to the ticket"
    with pytest.raises(RecipeError, match=says):
        target(ticket.recipe, "digits", {setting: value})


def test_dropout_and_what_is_not_the_tickets_may_change(ticket):
    settings = {"model.dropout": 0.5, "data.normalise": "unit", "train.iterations": 10}
    dropped = target(ticket.recipe, "digits", settings)
    assert (dropped.model.dropout, dropped.data.normalise) == (0.5, "unit")
    (result,) = transfer(ticket, "digits", round=1, settings=settings)["rounds"]
    assert result["kept"] == ticket.rounds[1]["kept"]


def test_a_schedule_that_ends_before_the_rewind_point(ticket):
    """It is trained from iteration 0 to the end, whatever made the ticket."""
    made = dataclasses.replace(ticket.recipe.prune, early_bird=0.1)
    train = dataclasses.replace(ticket.recipe.train, iterations=10_000)
    recipe = dataclasses.replace(ticket.recipe, train=train, prune=made)
    for iterations in (5, 6):
        found = target(recipe, "digits", {"train.iterations": iterations}).prune
        assert found == dataclasses.replace(made, rewind_to=0, early_bird=0.0)
    (result,) = transfer(ticket, "digits", round=1, settings={"train.iterations": 5})["rounds"]
    assert result["kept"] == ticket.rounds[1]["kept"]
