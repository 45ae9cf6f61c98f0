"""The nets against the papers: counts, names, and a forward pass written out a second time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlth.catalogue import MODELS as MODEL_NAMES
from fastlth.composition import compose, preset_table
from fastlth.errors import RecipeError
from fastlth.models import MODELS, build, skeleton, weight_names
from fastlth.models.conv import CONV_2, conv_n
from fastlth.models.init import initialise_
from fastlth.models.lenet import lenet_5
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


# Frankle & Carbin 2019, Figure 2, and the exact counts of its architectures: (trainable numbers, weights, pruned).
COUNTS = {
    "lenet-300-100 mnist": (266_610, 266_200, 266_200),
    "conv-2 cifar-10": (4_301_642, 4_300_992, 4_300_992),
    "conv-4 cifar-10": (2_425_930, 2_425_024, 2_425_024),
    "conv-6 cifar-10": (2_262_602, 2_261_184, 2_261_184),
    # VGG-19: 5,504 convolutions' outputs have a scale and a shift, ten logits a bias
    "vgg19 cifar-10": (20_024_000 + 2 * 5_504 + 10, 20_024_000, 20_018_880),
}


@pytest.mark.parametrize("pair", COUNTS)
def test_parameter_counts_are_the_papers(pair):
    asked = compose(*pair.split(), preset="paper").recipe
    model = skeleton(asked)
    weights = {n: model.get_parameter(n).numel() for n in weight_names(model)}
    unpruned = weights["output.weight"] if asked.prune.scale["output"] == 0 else 0
    total = sum(p.numel() for p in model.parameters())
    assert (total, sum(weights.values()), sum(weights.values()) - unpruned) == COUNTS[pair]


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


def vgg19_forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = convolutions(state, x, "ccpccpccccpccccpcccc")
    return x.mean((2, 3)) @ state["output.weight"].T + state["output.bias"]


FORWARD = {
    "lenet-300-100": dense,
    "lenet-5": lenet_5_forward,
    "conv-2": lambda state, x: dense(state, convolutions(state, x, "ccp")),
    "conv-4": lambda state, x: dense(state, convolutions(state, x, "ccpccp")),
    "conv-6": lambda state, x: dense(state, convolutions(state, x, "ccpccpccp")),
    "vgg19": vgg19_forward,
}
WIDTHS = {
    "lenet-300-100": [300, 100, 10],
    "lenet-5": [6, 16, 120, 84, 10],
    "conv-2": [64, 64, 256, 256, 10],
    "conv-4": [64, 64, 128, 128, 256, 256, 10],
    "conv-6": [64, 64, 128, 128, 256, 256, 256, 256, 10],
    "vgg19": [64, 64, 128, 128, *[256] * 4, *[512] * 8, 10],
}


# lenet-300-100 has no convolution to normalise, vgg19 has batch norm in any case
NORMED = ("lenet-5", "conv-2", "conv-4", "conv-6")


@pytest.mark.parametrize("dataset", ["mnist", "cifar-10"])
@pytest.mark.parametrize(("model", "batch_norm"), [*((m, False) for m in FORWARD), *((m, True) for m in NORMED)])
def test_logits_are_those_of_the_net_in_the_paper(model, dataset, batch_norm):
    net = random_net(model, dataset, batch_norm=batch_norm)
    x = images(*{"mnist": (1, 28), "cifar-10": (3, 32)}[dataset])
    with torch.no_grad():
        logits, expected = net(x), FORWARD[model](net.state_dict(), x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.01
    assert (logits < 0).any()  # no ReLU on the logits
    assert [len(net.get_parameter(n)) for n in weight_names(net)] == WIDTHS[model]


def test_every_name_of_the_catalogue_is_built():
    assert tuple(MODELS) == MODEL_NAMES
    assert tuple(FORWARD) == MODEL_NAMES


def test_paper_nets_have_no_batch_norm_but_vgg19():
    for pair in COUNTS:
        kinds = [type(m) for m in skeleton(compose(*pair.split(), preset="paper").recipe).modules()]
        convolutions = kinds.count(nn.Conv2d)
        assert kinds.count(nn.BatchNorm2d) == (convolutions if pair.startswith("vgg19") else 0)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["conv-2", "conv-4", "conv-6", "vgg19"])
def test_a_convolution_has_a_bias_exactly_where_no_batch_norm_follows(name, batch_norm):
    layers = list(skeleton(recipe(name, "cifar-10", batch_norm=batch_norm)).children())
    found = [(a.bias is None, isinstance(b, nn.BatchNorm2d)) for a, b in pairwise(layers) if isinstance(a, nn.Conv2d)]
    normed = batch_norm or name == "vgg19"
    assert found == [(normed, normed)] * (len(WIDTHS[name]) - (1 if name == "vgg19" else 3))


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 11, 12, 15, 16])
def test_a_model_is_refused_exactly_where_its_last_feature_map_would_vanish(name, size):
    smallest = {"lenet-300-100": 1, "lenet-5": 12, "conv-2": 2, "conv-4": 4, "conv-6": 8, "vgg19": 16}[name]
    if size < smallest:
        with pytest.raises(RecipeError, match=f"{name} .*got {size}x{size}; choose"):
            MODELS[name]((1, size, size), 10, False)
    else:
        with torch.device("meta"):
            model = MODELS[name]((1, size, size), 10, False).eval()
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
