"""Nets and data of others: the documented example, what is refused, shared weights, resumed dropout."""

from __future__ import annotations

import dataclasses
import glob
import json
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastlth
from fastlth import specs
from fastlth.composition import adjust, compose
from fastlth.errors import DataError, FastlthError, RecipeError
from fastlth.masks import kept
from fastlth.models import build, draw, skeleton, state, weight_names
from fastlth.models.dropout import DroppedLinear, add_dropout_
from fastlth.running import resume, run
from fastlth.search import RoundFinished, find_tickets
from fastlth.store.run import parent_folder
from fastlth.tickets import load_ticket
from fastlth.training import resolve
from tests.helpers import CPU, assert_masked, assert_same_bits, bits

ROOT = Path(__file__).parent.parent
SHORT = {**CPU, "train.iterations": 20, "train.batch_size": 16, "train.lr": 1e-3, "evaluate.every": 10,
         "prune.rounds": 2}  # fmt: skip

NETS = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Sequential(nn.ReLU()))
        self.first = nn.Linear(4 * 64, 12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.third.weight = self.second.weight
        self.unused = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.randn(12))
        self.register_buffer("shift", torch.linspace(0, 1, 12).clone(), persistent=False)
        self.head = nn.Linear(12, classes)
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]  # fails on the meta device

    def forward(self, x):
        x = self.first(self.features(x).view(len(x), -1)).relu()
        x = self.third(self.second(x).relu()).relu()
        return self.head(self.drop(x) * self.scale + self.shift)

def tied(classes): return Tied(classes)
def tiny(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, classes))
def no_bias(classes): return nn.Sequential(nn.Conv2d(3, classes, 8, bias=False), nn.Flatten())
def asks(width): return tiny(None, 4)
def makes_nothing(): return 7
def no_layer(): return nn.Flatten()
def too_few(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
def one_channel(classes): return nn.Sequential(nn.Conv2d(1, classes, 8), nn.Flatten())
def raises(): raise OSError("no such weights")
def halves(classes): return tiny(None, classes).half()
instance = nn.Linear(2, 2)
number = 3
KEPT = tiny(None, 4)
def always_the_same(): return KEPT
"""

DATA = """
import numpy as np
import torch
from PIL import Image

def part(count, seed, shape=(8, 8, 3)):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    labels[:4] = range(4)
    images = rng.integers(0, 128, (count, *shape), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[2 * label : 2 * label + 2] += 100
    return images, labels

class Items:
    def __init__(self, images, labels, kind):
        self.images, self.labels, self.kind = images, labels, kind
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.kind(self.images[i]), int(self.labels[i])

def arrays(): return part(80, 0), part(40, 1)
def tensors(): return tuple(tuple(torch.from_numpy(x) for x in p) for p in arrays())
def pillow(): return tuple(Items(*p, Image.fromarray) for p in arrays())
def items(): return tuple(Items(*p, lambda x: torch.from_numpy(x).permute(2, 0, 1)) for p in arrays())
def grey(): return tuple((x[..., 0], y) for x, y in arrays())
def floats(): return tuple((x / 255, y) for x, y in arrays())
def first(): return tuple((np.moveaxis(np.repeat(x, 3, 2), -1, 1), y) for x, y in arrays())
def short(): return tuple((x, y[:-1]) for x, y in arrays())
def other_size(): return part(80, 0), part(40, 1, (9, 8, 3))
def one(): return arrays()[0]
def alone(): return (arrays()[0],)
def transformed(): return tuple(Items(*p, lambda x: torch.from_numpy(x / 255)) for p in arrays())
def broken(): raise ValueError("disk gone")
def one_class(): return tuple((x, y * 0) for x, y in arrays())
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package ``own_package`` with modules nets and data, in the current folder."""
    folder = tmp_path / "own_package"
    folder.mkdir()
    (folder / "nets.py").write_text(NETS)
    (folder / "data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] in ("own_package", "mine")]:
        del sys.modules[name]


def own(net: str = "tied", data: str = "arrays", **settings: object) -> fastlth.Recipe:
    given = {name.replace("__", "."): value for name, value in settings.items()}
    return compose(f"own_package.nets:{net}", f"own_package.data:{data}", settings={**SHORT, **given}).recipe


def test_the_documented_example_runs(package: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "MEASURE_SECONDS", 0.02)
    page = (ROOT / "docs" / "own-nets.md").read_text()
    done = 0
    for language, block in re.findall(r"```(python|console)\n(.*?)```", page, re.S):
        if (name := re.match(r"# (\S+\.py)\n", block)) is not None:
            Path(name[1]).parent.mkdir(exist_ok=True)
            Path(name[1]).write_text(block)
        elif language == "python":
            exec(compile(block, "own-nets.md", "exec"), {})
            done += 1
        else:
            for line in block.splitlines():
                words = [path for word in shlex.split(line)[1:] for path in glob.glob(word) or [word]]
                code, _, said = command(*words)
                assert code == 0, f"{line}: {said}"
                done += 1
    assert done == 5
    names = {p.name.rpartition("-")[0] for p in Path("runs").iterdir()}
    assert names == {"mine.nets-make_net-mine.data-stripes"}, "names and functions must be the same searches"


def test_data_may_come_in_any_of_its_forms(package: Path) -> None:
    facts = {name: own("tiny", name).data for name in ("arrays", "tensors", "pillow", "items")}
    assert len({d.content for d in facts.values()}) == 1
    data = facts["arrays"]
    assert (data.shape, data.classes, data.train, data.test, data.validation) == ((3, 8, 8), 4, 80, 40, 8)
    images = fastlth_images("arrays")[0].astype(np.float64) / 255
    assert np.allclose(data.mean, images.mean((0, 1, 2)), atol=5e-5)
    assert np.allclose(data.std, images.std((0, 1, 2)), atol=5e-5)
    grey = compose("lenet-300-100", "own_package.data:grey", settings=SHORT).recipe
    assert grey.data.shape == (1, 8, 8)
    assert grey.data.content != data.content


def fastlth_images(name: str) -> tuple[np.ndarray, np.ndarray]:
    return specs.find(f"own_package.data:{name}")()[0]


@pytest.mark.parametrize(("net", "says"), [
    ("own_package.nowhere:net", r"cannot import own_package.nowhere .*; install it, or run fastlth in the folder"),
    ("own_package.nets:nothing", "module own_package.nets has no 'nothing'"),
    ("own_package.nets:number", "number is of type int, not a function"),
    ("own_package.nets:instance", "instance is a net; give the name of a function"),
    ("own_package.nets:asks", "asks for width; it may ask for shape and classes"),
    ("own_package.nets:makes_nothing", "returns an object of type int; it must return a torch.nn.Module"),
    ("own_package.nets:no_layer", "no prunable layer"),
    ("own_package.nets:too_few", r"gives \[2, 3\] for two images of 3x8x8 and 4 classes; it must .* \[2, 4\]"),
    ("own_package.nets:one_channel", "cannot be trained on images of 3x8x8: "),
    ("own_package.nets:raises", r"failed \(OSError: no such weights\)"),
    ("own_package.nets:halves", "parameters of another type than float32"),
    ("own_package.nets/tied", "unknown model"),
    (":tied", "is not a name fastlth can follow"),
    ("torchvision:resnet17", "torchvision has no model 'resnet17'"),
    ("torchvision:", "is not a name fastlth can follow"),
])  # fmt: skip
def test_a_net_that_cannot_be_used_is_one_sentence(net: str, says: str, package: Path, command) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        compose(net, "own_package.data:arrays", settings=SHORT)
    assert "\n" not in str(caught.value)
    code, out, err = command("find-ticket", net, "own_package.data:arrays", "-i", 20, "-b", 16, "-l", 0.1)
    assert (code, out) == (2, "")
    assert err.startswith("fastlth: ") and err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(("data", "says"), [
    ("floats", r"training set of .*:floats has images of type float64 and shape \[80, 8, 8, 3\]; give uint8"),
    ("first", "24 channels; give uint8 of .N, H, W, C., channels last"),
    ("short", r"80 images and labels of type int64 and shape \[79\]"),
    ("other_size", "training images of 8x8x3 and test images of 9x8x3"),
    ("one", r"item 0 of the training set of own_package.data:one is not \(image, label\)"),
    ("alone", "returns tuple of length 1; it must return"),
    ("transformed", r"image 0 of the training set .* type float64 .*\(leave out transforms"),
    ("broken", r"failed \(ValueError: disk gone\)"),
    ("one_class", "has 1 classes"),
])  # fmt: skip
def test_data_that_cannot_be_used_is_one_sentence(data: str, says: str, package: Path, command) -> None:
    with pytest.raises(DataError, match=says):
        own("tiny", data)
    code, _, err = command("find-ticket", "lenet-300-100", f"own_package.data:{data}", "-i", 20, "-b", 16, "-l", 0.1)
    assert code == 4 and err.count("\n") == 1


def test_what_a_package_asks_for_is_said(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match="timm:resnet18 needs the timm package; install timm"):
        compose("timm:resnet18", "digits", settings=SHORT)


def test_timms_nets_are_made_for_the_data(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one function that this asks of timm, which need not be installed."""
    asked = []

    def create_model(name: str, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
        asked.append((name, pretrained, num_classes, in_chans))
        return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    search = run(compose("timm:convnext.tiny", "digits", settings=SHORT).recipe, out=package / "runs")
    assert set(asked) == {("convnext.tiny", False, 10, 1)}
    net = load_ticket(search.ticket).model(round=2)
    assert_masked(dict(net.named_parameters()), load_ticket(search.ticket).mask(2))
    assert search.rounds[0]["kept"] == 36 + 1440


def test_functions_that_cannot_be_found_again_are_refused(package: Path) -> None:
    def local(classes: int) -> nn.Module:
        return nn.Linear(1, classes)

    for function in (local, lambda: None, nn.Linear(2, 2)):
        with pytest.raises(RecipeError, match="cannot be found again by its name"):
            compose(function, "digits", settings=SHORT)
    assert specs.spec_of(nn.Linear) == "torch.nn.modules.linear:Linear"


def test_shared_weights_are_pruned_once_and_counted_once(package: Path) -> None:
    recipe = own(prune__never=["head"])
    names = weight_names(build(recipe))
    assert names == ["features.0.weight", "first.weight", "second.weight", "unused.weight", "head.weight"]
    found = run(recipe, out=package / "runs")
    ticket = load_ticket(found.ticket)
    sizes = {"features.0.weight": 108, "first.weight": 3072, "second.weight": 144, "unused.weight": 9}
    left = {n: s - int(s * 0.2) for n, s in sizes.items()}
    left = {n: s - int(s * 0.2) for n, s in left.items()}
    assert {n: int(m.sum()) for n, m in ticket.mask(2).items()} == left
    assert ticket.rounds[2]["kept"] == sum(left.values())
    assert ticket.rounds[2]["density"] == (sum(left.values()) + 48) / (sum(sizes.values()) + 48)
    net = ticket.model(round=2)
    assert net.third.weight is net.second.weight, "tied weights must stay one tensor"
    assert_masked(dict(net.named_parameters()), ticket.mask(2))
    assert "third.weight" not in ticket.file.rewind, "stored once"
    assert "shift" in dict(net.named_buffers()) and not net.shift.is_meta
    assert torch.equal(net.shift, torch.linspace(0, 1, 12))


@pytest.mark.parametrize("settings", [{}, {"train__optimizer": "sgd", "train__momentum": 0.9}])
def test_pruned_weights_of_an_own_net_stay_zero(settings: dict[str, object], package: Path) -> None:
    recipe = own(**settings)
    for event in find_tickets(recipe):
        if isinstance(event, RoundFinished) and event.round:
            trained = {n: torch.from_numpy(a) for n, a in event.trained().items()}
            masks = {n: torch.from_numpy(event.ticket.mask(event.round)[n]) for n in event.ticket.pruned_at}
            assert_masked(trained, masks)


def test_patterns_choose_the_layers(package: Path) -> None:
    def layers(**settings: object) -> list[str]:
        last = list(find_tickets(own(**{**settings, "prune__rounds": 0})))[-1]
        return [n.removesuffix(".weight") for n in last.ticket.pruned_at]

    assert layers(prune__only=["features.*", "f*rst"]) == ["features.0", "first"]
    assert layers(prune__only=["*"], prune__never=["s*d", "unused", "features.*"]) == ["first", "head"]
    for setting in ("only", "never"):
        with pytest.raises(RecipeError, match=rf"prune.{setting} pattern 'fc\*' matches no layer; there are: features"):
            run(own(**{f"prune__{setting}": ["fc*"]}))
    with pytest.raises(RecipeError, match=r"prune.never leaves no layer to prune"):
        run(own(prune__never=["*"]))
    with pytest.raises(RecipeError, match=r"prune.only and prune.never leave no layer to prune"):
        run(own(prune__only=["first"], prune__never=["first"]))
    assert own(prune__only=["first"]).digest != own().digest
    assert own(prune__only=[]).digest == own().digest


def test_initial_values_follow_the_seed_and_disturb_nothing(package: Path) -> None:
    recipe = own()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = state(build(recipe)), state(build(recipe))
    assert torch.equal(torch.rand(3), expected), "torch's own generator must go on as if nothing had been drawn"
    assert_same_bits(first, again)
    assert first["first.bias"].any(), "its own values, not fastlth's"
    other = state(build(adjust(recipe, {"seeds.base": 1})))
    assert not torch.equal(first["first.weight"], other["first.weight"])
    assert not torch.equal(first["first.weight"], state(draw(recipe, recipe.seeds.key("branch")))["first.weight"])
    glorot = state(build(adjust(recipe, {"model.init": "glorot"})))
    assert abs(float(glorot["first.weight"].std()) - (2 / (256 + 12)) ** 0.5) < 0.005
    assert not glorot["first.bias"].any()
    assert torch.equal(glorot["scale"], first["scale"]), "what is no Linear and no Conv keeps its own values"
    assert skeleton(recipe).first.weight.shape == (12, 256)


def test_a_function_that_keeps_its_net_is_not_trained_in_place(package: Path) -> None:
    kept_net = specs.find("own_package.nets:always_the_same")()
    before = kept_net[1].weight.clone()
    run(own("always_the_same"), out=package / "runs")
    assert torch.equal(kept_net[1].weight, before)


def test_dropout_is_resumed_bit_for_bit(package: Path) -> None:
    recipe = own(train__iterations=23, store__save_every=0.001)
    whole = load_ticket(run(recipe, out=package / "a", data_dir=None).ticket)
    stops = iter([None] * 2 + [15])
    with pytest.raises(FastlthError, match="stopped and saved"):
        run(recipe, out=package / "b", stopped=lambda: next(stops, None))
    torch.manual_seed(99)  # whatever happened in between
    torch.rand(7)
    again = load_ticket(resume(parent_folder(package / "b", recipe) / "r0").ticket)
    for k in range(3):
        assert_same_bits({n: m.float() for n, m in whole.mask(k).items()},
                         {n: m.float() for n, m in again.mask(k).items()})  # fmt: skip
    timing = {"seconds", "images_per_second"}
    for a, b in zip(whole.rounds, again.rounds, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def drops(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, DroppedLinear)]


def test_dropout_is_an_option_of_every_net(package: Path) -> None:
    """Of layers that are shared, too, and without touching names, values or what a net already drops."""
    plain, dropped = build(own()), build(own(model__dropout=0.5))
    assert drops(dropped) == ["second", "third", "unused", "head"]
    assert drops(build(own("tiny", model__dropout=0.5))) == ["3"]
    assert_same_bits(state(plain), state(dropped))
    assert list(plain.state_dict()) == list(dropped.state_dict())
    assert dropped.third.weight is dropped.second.weight
    x = torch.randn(6, 3, 8, 8)
    assert torch.equal(plain.eval()(x), dropped.eval()(x))
    inner, before = build(own("tiny", model__dropout=0.5)).train(), build(own("tiny")).train()
    torch.manual_seed(0)
    hidden = torch.nn.functional.dropout(before[:3](x), 0.5)
    torch.manual_seed(0)
    assert torch.equal(inner(x), before[3](hidden))
    assert own(model__dropout=0.5).digest != own().digest == own(model__dropout=0.0).digest
    library = compose("torchvision:resnet18", "digits", settings={**SHORT, "model.dropout": 0.5}).recipe
    assert drops(skeleton(library)) == ["fc"]
    with pytest.raises(RecipeError, match=r"model.dropout must be 0 for a net without linear layers, got 0.5"):
        skeleton(own("no_bias", model__dropout=0.5))


def test_layers_that_attention_calls_by_their_weights_alone_are_left_out() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 4))
    add_dropout_(net, 0.5, (0, 6))
    assert drops(net) == ["0.linear2", "1"]
    assert net.train()(torch.randn(3, 5, 8)).shape == (3, 5, 4)


@pytest.mark.parametrize("net", ["tied", "tiny"])
def test_a_search_with_dropout_as_an_option_repeats(net: str, package: Path) -> None:
    """The same bits from another state of torch's generator; others from another seed of dropout, or without it."""

    def trained(generator: int, **settings: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(generator)
        last = list(find_tickets(own(net, **settings)))[-1]
        return {n: torch.from_numpy(a) for n, a in last.trained().items()}

    first = trained(1, model__dropout=0.5)
    assert_same_bits(first, trained(2, model__dropout=0.5))
    name = "head.weight" if net == "tied" else "3.weight"
    for other in (trained(1, model__dropout=0.5, seeds__dropout=9), trained(1)):
        assert not torch.equal(first[name], other[name])


def test_a_changed_net_and_changed_data_are_refused(package: Path) -> None:
    recipe = own("tiny")
    # of another length, since bytecode counts as fresh where only the second of a change and the length say so
    (package / "nets.py").write_text(NETS.replace("nn.Linear(192, 10)", "nn.Linear(192, 110)")
                                     .replace("nn.Linear(10, classes)", "nn.Linear(110, classes)"))  # fmt: skip
    del sys.modules["own_package.nets"]
    with pytest.raises(RecipeError, match="tiny now makes a net of other layers or shapes than the recipe's"):
        run(recipe, out=package / "runs")
    assert own("tiny").digest != recipe.digest
    (package / "data.py").write_text(DATA.replace("+= 100", "+= 99"))
    del sys.modules["own_package.data"]
    with pytest.raises(DataError, match="arrays now gives other images or labels than the recipe's"):
        run(dataclasses.replace(own("tiny"), data=recipe.data), out=package / "runs")
    assert own("tiny").data.content != recipe.data.content


def test_a_ticket_whose_net_is_gone_can_be_read_and_verified(package: Path, command) -> None:
    found = run(own(), out=package / "runs")
    masks = load_ticket(found.ticket).mask(2)
    (package / "nets.py").unlink()
    del sys.modules["own_package.nets"], sys.modules["own_package"].nets
    ticket = load_ticket(found.ticket)
    assert {n: int(m.sum()) for n, m in ticket.mask(2).items()} == {n: int(m.sum()) for n, m in masks.items()}
    assert command("ticket", "verify", found.ticket)[0] == 0
    with pytest.raises(RecipeError, match=r"cannot import own_package\.nets"):
        ticket.model(round=2)
    assert command("train", found.ticket)[0] == 2


def test_own_parts_take_the_place_of_a_recipes(package: Path) -> None:
    base = compose("lenet-300-100", "digits", settings={**SHORT, "prune.scale": {}}).recipe
    net, data = specs.find("own_package.nets:tiny"), specs.find("own_package.data:arrays")
    search = run(base, out=package / "runs", model=net, data=data)
    assert (search.recipe.model.name, search.recipe.data.name) == ("own_package.nets:tiny", "own_package.data:arrays")
    assert search.recipe.train == base.train and search.recipe.data.validation == 8
    assert search.recipe.digest == own("tiny", prune__scale={}).digest
    last = list(find_tickets(base, model="own_package.nets:tiny", data=data))[-1]
    assert last.ticket.recipe == search.recipe


def test_entry_points_are_names(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "own_package-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fastlth.models]\nmynet = own_package.nets:tiny\n"
                                           "[fastlth.datasets]\nmydata = own_package.data:arrays\n")  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    recipe = compose("mynet", "mydata", settings=SHORT).recipe
    assert recipe.digest == own("tiny").digest, "a registered name is the function's"
    with pytest.raises(RecipeError, match=r"unknown model 'mynett' \(did you mean 'mynet'\?\)"):
        compose("mynett", "mydata", settings=SHORT)


def test_torchvisions_nets_fit_the_data(package: Path) -> None:
    recipe = compose("torchvision:resnet18", "digits", settings=SHORT).recipe
    net = skeleton(recipe)
    assert net.conv1.weight.shape == (64, 1, 7, 7)
    assert net.fc.weight.shape == (10, 512)
    assert len(weight_names(net)) == 21
    assert state(build(recipe))["conv1.weight"].std() > 0
    assert sorted(p.name for p in [parent_folder(Path("runs"), recipe)]) == [
        f"torchvision-resnet18-digits-{recipe.digest[:8]}"
    ]


def test_a_grouped_and_a_one_dimensional_convolution_are_counted(package: Path) -> None:
    (package / "more.py").write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Flatten(2), nn.Conv1d(6, 4, 3),\n"
        "                         nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(136, classes))\n"
    )
    recipe = compose("own_package.more:net", "own_package.data:arrays", settings=SHORT).recipe
    search = run(recipe, out=package / "runs")
    assert search.rounds[0]["kept"] == 54 + 72 + 544
    assert search.rounds[1]["kept"] == sum(n - int(n * 0.2) for n in (54, 72, 544))
    records = [json.loads(line) for line in (search.replicates[0].path / "metrics.jsonl").read_text().splitlines()]
    assert {r["dead_units"] for r in records if r["event"] == "layer"} == {None}, "nothing is said of paths"
    assert kept(load_ticket(search.ticket).mask(1)) == search.rounds[1]["kept"]
    assert bits(load_ticket(search.ticket).model(1)[0].weight).numel() == 54
