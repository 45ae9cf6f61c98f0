"""The nets against the papers: counts, names, and a forward pass written out a second time."""

import itertools
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlth.catalogue import MODEL_ALIASES, dataset_name, lenet_widths, model_name
from fastlth.catalogue import MODELS as MODEL_NAMES
from fastlth.composition import compose, preset_table
from fastlth.errors import RecipeError
from fastlth.models import MODELS, build, make, skeleton, weight_names
from fastlth.models.conv import CONV_2, conv_n
from fastlth.models.init import initialise_
from fastlth.models.lenet import lenet_5
from fastlth.models.resnet import Block
from fastlth.pruning import layer_rates
from fastlth.recipe import DataSection, ModelSection, PruneSection, Recipe, TrainSection


def recipe(model: str, dataset: str, *, batch_norm: bool = False) -> Recipe:
    return Recipe(
        model=ModelSection(name=model, batch_norm=batch_norm), data=DataSection(name=dataset),
        train=TrainSection(iterations=1, batch_size=1, lr=0.1), prune=PruneSection(),
    )  # fmt: skip


def random_net(model: str, dataset: str, *, batch_norm: bool = False) -> nn.Module:
    """The net in eval mode with torch's random numbers everywhere, batch norm's statistics and biases included."""
    net = skeleton(recipe(model, dataset, batch_norm=batch_norm)).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
                tensor.normal_(0, fan_in**-0.5, generator=generator)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return net


def images(channels: int, size: int) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


# Frankle & Carbin 2019, Figure 2 and appendix I, and the exact counts of the architectures: (trainable numbers,
# weights, pruned).
COUNTS = {
    "lenet-300-100 mnist": (266_610, 266_200, 266_200),
    "conv-2 cifar-10": (4_301_642, 4_300_992, 4_300_992),
    "conv-4 cifar-10": (2_425_930, 2_425_024, 2_425_024),
    "conv-6 cifar-10": (2_262_602, 2_261_184, 2_261_184),
    # VGG-19: 5,504 convolutions' outputs have a scale and a shift, ten logits a bias
    "vgg19 cifar-10": (20_024_000 + 2 * 5_504 + 10, 20_024_000, 20_018_880),
    # 2,560 of shortcuts and 640 of the classifier are never pruned; 784 convolutions' outputs, ten logits
    "resnet-20 cifar-10": (270_896 + 2 * 784 + 10, 270_896, 267_696),
    # VGG-16's 14.7 million, of which 5,120 are the classifier's
    "vgg16 cifar-10": (14_715_584 + 2 * 4_224 + 10, 14_715_584, 14_710_464),
}


@pytest.mark.parametrize("pair", COUNTS)
def test_parameter_counts_are_the_papers(pair):
    asked = compose(*pair.split(), preset="paper").recipe
    model = skeleton(asked)
    weights = {n: model.get_parameter(n).numel() for n in weight_names(model)}
    total = sum(p.numel() for p in model.parameters())
    pruned = sum(weights[n] for n in layer_rates(weights, asked.prune))
    assert (total, sum(weights.values()), pruned) == COUNTS[pair]


def test_resnet_20_prunes_its_3x3_convolutions_alone():
    """Frankle & Carbin 2019, I.3: not the 2,560 parameters that downsample, nor the 640 of the output layer."""
    asked = compose("resnet-20", "cifar-10").recipe
    model = skeleton(asked)
    weights = {n: model.get_parameter(n) for n in weight_names(model)}
    pruned = layer_rates(weights, asked.prune)
    kept = {n: weights[n].numel() for n in weights if n not in pruned}
    assert kept == {"block4.shortcut.weight": 512, "block7.shortcut.weight": 2_048, "output.weight": 640}
    assert len(pruned) == 19 and {tuple(weights[n].shape[2:]) for n in pruned} == {(3, 3)}


def plain_count(name: str) -> int:
    """Weights of Linear and Conv layers on CIFAR-10, from the definitions of the architectures alone."""
    if name.startswith("resnet") and name != "resnet-18":  # He et al. 2016, section 4.2: 6n + 2 layers
        n = (int(name.removeprefix("resnet-")) - 2) // 6
        total, inputs = 3 * 16 * 9, 16
        for width in (16, 32, 64):
            total += (inputs * width + (2 * n - 1) * width * width) * 9 + (inputs * width if inputs != width else 0)
            inputs = width
        return total + 64 * 10
    plan = {
        "vgg11": "64 128 256 256 512 512 512 512", "vgg13": "64 64 128 128 256 256 512 512 512 512",
        "vgg16": "64 64 128 128 256 256 256 512 512 512 512 512 512",
        "vgg19": "64 64 128 128 256 256 256 256 512 512 512 512 512 512 512 512",
    }[name]  # fmt: skip
    widths = [3, *map(int, plan.split())]
    return sum(9 * a * b for a, b in pairwise(widths)) + 512 * 10


def test_the_page_about_models_names_all_and_counts_right():
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `") and "model." not in line]
    found = {}
    for _, names, _, counts, *_ in rows:
        names = [n.strip("` ") for n in names.split(",")]
        found |= dict(zip(names, map(str.strip, counts.split(";")), strict=True))
    assert found.pop("lenet-A-B") == "784 A + A B + 10 B"
    assert found.keys() == set(MODEL_NAMES)
    for name, count in found.items():
        model = skeleton(recipe(name, "mnist" if name.startswith("lenet") else "cifar-10"))
        assert f"{sum(model.get_parameter(n).numel() for n in weight_names(model)):,}" == count, name


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith(("vgg", "resnet")) and n != "resnet-18"])
def test_counts_follow_from_the_definition_of_the_family(name):
    model = skeleton(recipe(name, "cifar-10"))
    assert sum(model.get_parameter(n).numel() for n in weight_names(model)) == plain_count(name)


def test_resnet_18_has_the_well_known_number_of_parameters():
    """11,173,962 with the stem for CIFAR and ten classes, batch norm and the bias of the logits included."""
    model = skeleton(recipe("resnet-18", "cifar-10"))
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert len(weight_names(model)) == 18 + 3  # the three downsampling shortcuts have no layer's number
    assert sum(m.stride == (2, 2) for m in model.modules() if isinstance(m, nn.Conv2d)) == 2 * 3


def test_lenets_of_all_widths():
    """978,600 weights of the largest net in Frankle & Carbin's figure 31."""
    for name, count in (("lenet-900-300", 978_600), ("lenet-25-9", 19_915), ("lenet-300-100", 266_200)):
        model = skeleton(recipe(name, "mnist"))
        assert sum(model.get_parameter(n).numel() for n in weight_names(model)) == count
        assert lenet_widths(name) == tuple(len(model.get_parameter(f"fc{i}.weight")) for i in (1, 2))
    assert lenet_widths("lenet-5") is None
    other = recipe("lenet-300-100", "mnist").digest
    assert recipe("lenet-300-99", "mnist").digest != other


@pytest.mark.parametrize("name", [
    "lenet-0-100", "lenet-05-3", "lenet-300", "lenet-300-100-10", "lenet-10000-1", "lenet--1-5", "lenet-3e2-1",
    "lenet-300-100 ", "lenet_300_100", "resnet-50", "vgg", "lenet-\u0663-5", "",
])  # fmt: skip
def test_silly_names_are_refused_with_all_that_is_allowed(name):
    with pytest.raises(RecipeError) as caught:
        model_name(name)
    said = str(caught.value)
    assert said.startswith(f"unknown model '{name}'") and caught.value.exit_code == 2
    assert all(known in said for known in MODEL_NAMES)
    assert "or lenet-A-B with hidden layers of A and B units (1 to 9999)" in said
    assert said.endswith("or your own net: package.module:function, torchvision:NAME or timm:NAME")


def test_other_spellings_of_a_name():
    assert all(model_name(alias) == name in MODEL_NAMES for alias, name in MODEL_ALIASES.items())
    assert ModelSection(name="vgg-16").name == "vgg16"
    assert (model_name("LeNet-300-100"), model_name("VGG19")) == ("lenet-300-100", "vgg19")
    assert dataset_name("CIFAR10") == "cifar-10"


def test_the_paper_preset_covers_exactly_the_pairs_counted_here():
    assert preset_table("paper").keys() == COUNTS.keys()


def test_convolutions_hold_the_share_of_the_weights_that_the_papers_give():
    """38,592 of Conv-2, 259,776 of Conv-4 and 1,144,512 of Conv-6."""
    counts = []
    for name in ("conv-2", "conv-4", "conv-6"):
        model = skeleton(recipe(name, "cifar-10"))
        counts.append(sum(model.get_parameter(n).numel() for n in weight_names(model) if n.startswith("conv")))
    assert counts == [38_592, 259_776, 1_144_512]


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Batch norm in eval mode by its definition; no batch norm where the net has none."""
    if f"{name}.running_mean" not in state:
        return x
    mean, var, scale, shift = (
        state[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def convolutions(state: dict[str, Tensor], x: Tensor, plan: str) -> Tensor:
    """3x3 convolutions with ReLU, "c", and 2x2 max pools, "p", in the order of ``plan``."""
    i = 0
    for step in plan:
        if step == "p":
            x = F.max_pool2d(x, 2)
            continue
        i += 1
        x = F.conv2d(x, state[f"conv{i}.weight"], state.get(f"conv{i}.bias"), padding=1)
        x = norm(state, f"bn{i}", x).clamp(min=0)
    return x


def dense(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Two hidden layers with ReLU, then logits without."""
    x = x.reshape(len(x), -1)
    for name in ("fc1", "fc2"):
        x = (x @ state[f"{name}.weight"].T + state[f"{name}.bias"]).clamp(min=0)
    return x @ state["output.weight"].T + state["output.bias"]


def lenet_5_forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
    for i, padding in ((1, 2), (2, 0)):
        x = F.conv2d(x, state[f"conv{i}.weight"], state.get(f"conv{i}.bias"), padding=padding)
        x = F.max_pool2d(norm(state, f"bn{i}", x).clamp(min=0), 2)
    return dense(state, x)


def pooled(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of the mean over all pixels."""
    return x.mean((2, 3)) @ state["output.weight"].T + state["output.bias"]


def resnet_forward(state: dict[str, Tensor], x: Tensor, plan: str) -> Tensor:
    """Blocks of ``plan``: "i" with the identity around it, "2" of stride 2 with a 1x1 convolution around it."""
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)).clamp(min=0)
    for i, kind in enumerate(plan, start=1):
        block = {n.removeprefix(f"block{i}."): t for n, t in state.items() if n.startswith(f"block{i}.")}
        stride = 2 if kind == "2" else 1
        y = norm(block, "bn1", F.conv2d(x, block["conv1.weight"], stride=stride, padding=1)).clamp(min=0)
        y = norm(block, "bn2", F.conv2d(y, block["conv2.weight"], padding=1))
        if kind == "2":
            x = norm(block, "shortcut_bn", F.conv2d(x, block["shortcut.weight"], stride=2))
        else:
            assert not any(n.startswith("shortcut") for n in block)
        x = (y + x).clamp(min=0)
    return pooled(state, x)


FORWARD = {
    "lenet-300-100": dense,
    "lenet-5": lenet_5_forward,
    "conv-2": lambda state, x: dense(state, convolutions(state, x, "ccp")),
    "conv-4": lambda state, x: dense(state, convolutions(state, x, "ccpccp")),
    "conv-6": lambda state, x: dense(state, convolutions(state, x, "ccpccpccp")),
    "vgg11": lambda state, x: pooled(state, convolutions(state, x, "cpcpccpccpcc")),
    "vgg13": lambda state, x: pooled(state, convolutions(state, x, "ccpccpccpccpcc")),
    "vgg16": lambda state, x: pooled(state, convolutions(state, x, "ccpccpcccpcccpccc")),
    "vgg19": lambda state, x: pooled(state, convolutions(state, x, "ccpccpccccpccccpcccc")),
    "resnet-8": lambda state, x: resnet_forward(state, x, "i22"),
    "resnet-20": lambda state, x: resnet_forward(state, x, "iii2ii2ii"),
    "resnet-32": lambda state, x: resnet_forward(state, x, "iiiii2iiii2iiii"),
    "resnet-56": lambda state, x: resnet_forward(state, x, "iiiiiiiii2iiiiiiii2iiiiiiii"),
    "resnet-18": lambda state, x: resnet_forward(state, x, "ii2i2i2i"),
}
WIDTHS = {
    "lenet-300-100": [300, 100, 10],
    "lenet-5": [6, 16, 120, 84, 10],
    "conv-2": [64, 64, 256, 256, 10],
    "conv-4": [64, 64, 128, 128, 256, 256, 10],
    "conv-6": [64, 64, 128, 128, 256, 256, 256, 256, 10],
    "vgg11": [64, 128, 256, 256, *[512] * 4, 10],
    "vgg13": [64, 64, 128, 128, 256, 256, *[512] * 4, 10],
    "vgg16": [64, 64, 128, 128, *[256] * 3, *[512] * 6, 10],
    "vgg19": [64, 64, 128, 128, *[256] * 4, *[512] * 8, 10],
    # a stage that changes the shape has one weight more, of its shortcut
    "resnet-8": [*[16] * 3, *[32] * 3, *[64] * 3, 10],
    "resnet-20": [*[16] * 7, *[32] * 7, *[64] * 7, 10],
    "resnet-32": [*[16] * 11, *[32] * 11, *[64] * 11, 10],
    "resnet-56": [*[16] * 19, *[32] * 19, *[64] * 19, 10],
    "resnet-18": [*[64] * 5, *[128] * 5, *[256] * 5, *[512] * 5, 10],
}


# lenet-300-100 has no convolution to normalise, VGGs and ResNets have batch norm in any case
NORMED = ("lenet-5", "conv-2", "conv-4", "conv-6")


# of a family those whose arithmetic is quick; the others have the same parts
SMALL = [m for m in FORWARD if m not in ("vgg11", "vgg13", "vgg16", "resnet-32", "resnet-56", "resnet-18")]
TRIED = [*((m, d) for m in SMALL for d in ("mnist", "cifar-10")), ("vgg16", "cifar-10")]


@pytest.mark.parametrize(("model", "dataset", "batch_norm"), [
    *((m, d, False) for m, d in TRIED), *((m, d, True) for m in NORMED for d in ("mnist", "cifar-10")),
])  # fmt: skip
def test_logits_are_those_of_the_net_in_the_paper(model, dataset, batch_norm):
    net = random_net(model, dataset, batch_norm=batch_norm)
    x = images(*{"mnist": (1, 28), "cifar-10": (3, 32)}[dataset])
    with torch.no_grad():
        logits, expected = net(x), FORWARD[model](net.state_dict(), x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.01
    assert (logits < 0).any()  # no ReLU on the logits


@pytest.mark.parametrize("model", FORWARD)
def test_shapes_are_those_of_the_net_in_the_paper(model):
    """Of all weights and of the maps between them, on the meta device, where nothing is computed."""
    net = skeleton(recipe(model, "cifar-10")).eval()
    assert [len(net.get_parameter(n)) for n in weight_names(net)] == WIDTHS[model]
    x = torch.empty(2, 3, 32, 32, device="meta")
    assert net(x).shape == FORWARD[model](net.state_dict(), x).shape == (2, 10)


def test_every_name_of_the_catalogue_is_built():
    assert ("lenet-300-100", *MODELS) == MODEL_NAMES
    assert tuple(FORWARD) == MODEL_NAMES


def test_paper_nets_have_no_batch_norm_but_vggs_and_resnets():
    for pair in COUNTS:
        kinds = [type(m) for m in skeleton(compose(*pair.split(), preset="paper").recipe).modules()]
        convolutions = kinds.count(nn.Conv2d)
        assert kinds.count(nn.BatchNorm2d) == (convolutions if pair.startswith(("vgg", "resnet")) else 0)


def test_no_convolution_of_a_resnet_has_a_bias():
    for name in ("resnet-20", "resnet-18"):
        assert not any(
            m.bias is not None for m in skeleton(recipe(name, "mnist")).modules() if isinstance(m, nn.Conv2d)
        )


def test_a_block_without_its_convolutions_is_the_input():
    """What makes a net residual: with all weights at zero a block hands on what it gets."""
    block = Block(4, 4, stride=1).eval()
    for weight in (block.conv1.weight, block.conv2.weight):
        nn.init.zeros_(weight)
    x = images(4, 8).abs()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("name", "batch_norm"), [
    *itertools.product(["conv-2", "conv-4", "conv-6"], [False, True]), ("vgg16", False), ("vgg19", False),
])  # fmt: skip
def test_a_convolution_has_a_bias_exactly_where_no_batch_norm_follows(name, batch_norm):
    layers = list(skeleton(recipe(name, "cifar-10", batch_norm=batch_norm)).children())
    found = [(a.bias is None, isinstance(b, nn.BatchNorm2d)) for a, b in pairwise(layers) if isinstance(a, nn.Conv2d)]
    vgg = name.startswith("vgg")
    normed = batch_norm or vgg
    assert found == [(normed, normed)] * (len(WIDTHS[name]) - (1 if vgg else 3))


def test_a_skeleton_costs_no_memory_and_a_built_net_has_none_left_over():
    asked = recipe("conv-2", "digits")
    assert all(t.is_meta for t in skeleton(asked).state_dict().values())
    built = build(asked)
    expected = conv_n(CONV_2, (1, 8, 8), 10)
    initialise_(expected, asked.seeds.key("init"))
    assert built.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [
        ("lenet-5", "digits", "lenet-5 needs images of at least 12x12 pixels, got 8x8; choose lenet-300-100"),
        ("vgg19", "digits", "vgg19 halves the image 4 times and needs at least 16x16 pixels, got 8x8; "
                            "choose a smaller model"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_the_images_says_what_it_needs(model, dataset, message):
    with pytest.raises(RecipeError) as caught:
        skeleton(recipe(model, dataset))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 11, 12, 15, 16])
def test_a_model_is_refused_exactly_where_its_last_feature_map_would_vanish(name, size):
    smallest = {"lenet-5": 12, "conv-2": 2, "conv-4": 4, "conv-6": 8}.get(name, 16 if name.startswith("vgg") else 1)
    if size < smallest:
        with pytest.raises(RecipeError, match=f"{name} .*got {size}x{size}; choose"):
            make(name, (1, size, size), 10, False)
    else:
        with torch.device("meta"):
            model = make(name, (1, size, size), 10, False).eval()
            assert model(torch.empty(1, 1, size, size)).shape == (1, 10)


def test_batch_norm_is_refused_where_there_is_nothing_to_normalise():
    with pytest.raises(RecipeError, match=r"model\.batch_norm must be false for lenet-300-100"):
        skeleton(recipe("lenet-300-100", "mnist", batch_norm=True))


def test_weights_of_linear_and_convolution_are_named_in_order_and_shared_ones_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.first = nn.Conv2d(3, 3, 1)
            self.scale = nn.Parameter(torch.ones(4, 4))
            self.again = nn.Conv2d(3, 3, 1)
            self.again.weight = self.first.weight
            self.last = nn.Linear(2, 2)

    assert weight_names(Tied()) == ["first.weight", "last.weight"]


def test_lenet_5_is_lecuns_on_28_by_28_images():
    """150 + 2,400 + 48,000 + 10,080 + 840 weights."""
    model = lenet_5((1, 28, 28), 10)
    assert [model.get_parameter(n).numel() for n in weight_names(model)] == [150, 2_400, 48_000, 10_080, 840]
