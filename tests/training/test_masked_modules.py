"""``--kernels triton``: the same steps as the dense engine's, through the masked kernels (interpreted)."""

import dataclasses
from collections import OrderedDict

import pytest
import torch
from fastlth_kernels import masked_conv, masked_linear
from fastlth_kernels.bitmask import pack, unpack
from fastlth_kernels.masked_step import step_settings
from torch import nn

import fastlth
from fastlth.data.augment import AUGMENT
from fastlth.data.normalise import normalise, table
from fastlth.data.order import Order, split
from fastlth.data.resident import ResidentLoader
from fastlth.errors import DeviceError
from fastlth.models import build
from fastlth.training.available import kernels
from fastlth.training.engines.make import make_engine
from fastlth.training.masked_modules import MaskedConv2d, MaskedLinear, swap_, write_masks
from fastlth.training.resolve import resolve
from tests import helpers
from tests.helpers import assert_close_by_norm, assert_masked, assert_same_bits, compute, half_masks, small_recipe
from tests.kernels.masked_problems import batched_lenet_step


@pytest.fixture
def interpreted():
    from tests.kernels.interpreter import interpreter

    with interpreter():
        yield


@pytest.fixture
def launched(interpreted, monkeypatch):
    """The ops launch their kernels, on the CPU, by the interpreter; their references are gone."""
    for module in (masked_conv, masked_linear):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
        for name in ("reference", "reference_input_grad", "reference_weight_grad"):
            monkeypatch.setattr(module, name, None)


def tiny_conv_2():
    """Conv-2 with few channels: interpreted kernels take milliseconds per tile."""
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 5, 3, padding=1), relu1=nn.ReLU(), conv2=nn.Conv2d(5, 6, 3, padding=1, bias=False),
        relu2=nn.ReLU(), pool=nn.MaxPool2d(4), flatten=nn.Flatten(),
        fc1=nn.Linear(24, 9), relu3=nn.ReLU(), output=nn.Linear(9, 10),
    ))  # fmt: skip


def engines(monkeypatch, **settings):
    """The dense engine and the one with masked kernels, on the same recipe and half the weights."""
    recipe = small_recipe("conv-2", "digits", train__batch_size=2, **settings)

    def model(recipe):
        torch.manual_seed(0)
        return tiny_conv_2()

    monkeypatch.setattr("fastlth.training.engines.dense.build", model)
    source = helpers.random_source("digits")
    pair = [make_engine(dataclasses.replace(recipe, compute=compute(recipe, kernels=kind)), source)
            for kind in ("torch", "triton")]  # fmt: skip
    for engine in pair:
        engine.set_masks(half_masks({n: engine.weights()[n] for n in engine.weight_names}))
    return pair


def test_three_steps_of_a_tiny_conv_2_equal_the_dense_engines(launched, monkeypatch):
    dense, masked = engines(monkeypatch, train__optimizer="sgd", train__momentum=0.9, train__lr=0.05,
                            compute__channels_last="on")  # fmt: skip
    assert sum(isinstance(m, MaskedLinear | MaskedConv2d) for m in masked.model.modules()) == 4
    for engine in (dense, masked):
        engine.run(0, 3)
    assert dense.state().keys() == masked.state().keys()
    for name, tensor in dense.state().items():
        if tensor.is_floating_point():
            assert_close_by_norm(masked.state()[name], tensor, 2e-6)
    assert_masked(masked.weights(), half_masks({n: masked.weights()[n] for n in masked.weight_names}))


def test_three_steps_of_two_batched_lenets_equal_the_dense_engines(interpreted):
    """Each with its own theta0, masks and batches."""
    source, cpu = helpers.random_source("digits"), torch.device("cpu")
    recipes = [small_recipe(train__batch_size=4, seeds__base=seed) for seed in (0, 1)]
    nets = [make_engine(recipe, source) for recipe in recipes]
    names = nets[0].weight_names
    masks = [half_masks({n: net.weights()[n] for n in names}, seed=seed) for seed, net in enumerate(nets)]
    batches = []
    for net, mask, recipe in zip(nets, masks, recipes, strict=True):
        net.set_masks(mask)
        kept, _ = split(len(source.train.labels), recipe.data.validation, recipe.seeds.key("split"))
        order = Order(len(kept), 4, recipe.train.drop_last, recipe.seeds.key("order"))
        batches.append(ResidentLoader(source.train, kept, order, cpu).batches(0, 3))
    w = [torch.stack([net.weights()[n] for net in nets]) for n in names]
    b = [torch.stack([net.weights()[n.replace("weight", "bias")] for net in nets]) for n in names]
    bits = [pack(torch.stack([mask[n] for mask in masks])) for n in names]
    moments = [[torch.zeros_like(t) for t in (w[i], w[i], b[i], b[i])] for i in range(3)]
    adam = step_settings(recipes[0].train.lr)
    for pair in zip(*batches, strict=True):
        images = [AUGMENT["none"](batch.images, None, None, (0, 0)) for batch in pair]
        x = torch.stack([normalise(i, table("digits", "mean-std")).flatten(1) for i in images])
        batched_lenet_step(x, torch.stack([batch.labels for batch in pair]), w, b, bits, moments, adam)
    for r, net in enumerate(nets):
        net.run(0, 3)
        for i, name in enumerate(names):
            assert_close_by_norm(w[i][r], net.weights()[name], 1e-5)
            assert_close_by_norm(b[i][r], net.weights()[name.replace("weight", "bias")], 1e-5)


def test_the_forward_pass_reads_the_bits_and_not_the_zeros(launched, monkeypatch):
    """Pruned weights that hold anything else, NaN included, change no logit."""
    _, masked = engines(monkeypatch)
    x = torch.rand(2, 1, 8, 8)
    before = masked.model(x)
    for name, mask in half_masks({n: masked.weights()[n] for n in masked.weight_names}).items():
        masked.weights()[name].masked_fill_(~mask, torch.nan)
    assert torch.equal(masked.model(x), before)


@pytest.mark.parametrize("batch_norm", [True, False])  # without, convolutions have a bias
def test_a_swapped_model_has_the_same_state_dict(batch_norm):
    recipe = small_recipe("conv-2", "digits", model__batch_norm=batch_norm, model__bias_init="uniform")
    plain, swapped = build(recipe), swap_(build(recipe))
    assert list(swapped.state_dict()) == list(plain.state_dict())
    assert_same_bits(dict(swapped.state_dict()), dict(plain.state_dict()))
    swapped.load_state_dict(plain.state_dict())
    plain.load_state_dict(swapped.state_dict())
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(swapped.eval()(x), plain.eval()(x))
    assert [n for n, _ in swapped.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_what_the_kernels_do_not_cover_stays_as_it_is():
    class OwnLinear(nn.Linear):
        pass

    kept = [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, stride=(1, 2)),
            nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            OwnLinear(4, 4), nn.BatchNorm2d(4)]  # fmt: skip
    model = swap_(nn.Sequential(*kept))
    assert list(model) == kept


def test_a_layer_in_two_places_stays_one_layer_and_a_shared_weight_one_weight():
    layer, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = layer.weight
    model = swap_(nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(other)))
    assert model[0] is model[2]
    mask = torch.rand(6, 6) < 0.5
    write_masks(model, {"0.weight": mask})
    assert torch.equal(unpack(model[3][0].bits, 6), mask) and torch.equal(model[0].bits, pack(mask))


@pytest.mark.parametrize(("taps", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (5, 1, 2), (3, 1, 0)])
def test_stride_padding_and_size_are_the_layers(taps, stride, padding):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, taps, stride, padding), torch.randn(2, 2, 6, 7)
    torch.testing.assert_close(MaskedConv2d(conv)(x), conv(x))


def test_a_single_layer_is_swapped_too():
    layer = nn.Linear(6, 5)
    assert isinstance(swap_(layer), MaskedLinear)


def test_linear_takes_any_leading_dimensions_and_autocast():
    torch.manual_seed(0)
    layer = nn.Linear(40, 5)
    masked, x = MaskedLinear(layer), torch.randn(2, 3, 40)
    torch.testing.assert_close(masked(x), layer(x))
    torch.testing.assert_close(masked(x[0, 0]), layer(x[0, 0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert masked(x).dtype == torch.bfloat16
        torch.testing.assert_close(masked(x), layer(x), rtol=2**-7, atol=2**-8)  # a unit of bf16
    masked(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_a_swapped_model_compiles_in_one_graph():
    torch.manual_seed(0)
    model = swap_(tiny_conv_2())
    write_masks(model, half_masks({"conv1.weight": model.conv1.weight, "fc1.weight": model.fc1.weight}))

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    x = torch.rand(2, 1, 8, 8)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), forward(x))
    compiled(x).float().sum().backward()


def test_kernels_are_chosen_once_and_refused_where_they_cannot_run():
    recipe = small_recipe()
    assert resolve(recipe, lambda r: make_engine(r, helpers.random_source("digits"))).compute.kernels == "torch"
    assert kernels("auto", "cuda:0") == "torch" and kernels("triton", "cuda:0") == "triton"
    asked = dataclasses.replace(recipe, compute=compute(recipe, kernels="triton"))
    with pytest.raises(DeviceError, match="--kernels triton needs a CUDA device, and this run is on cpu"):
        resolve(asked, lambda r: make_engine(r, helpers.random_source("digits")))


def test_the_command_refuses_them_in_one_sentence(command, tmp_path):
    code, _, err = command("find-ticket", "lenet-300-100", "digits", "--device", "cpu", "--kernels", "triton",
                           "--out", tmp_path)  # fmt: skip
    assert code == 2 and "--kernels triton needs a CUDA device" in err and "Traceback" not in err


def test_a_run_from_before_there_was_a_choice_goes_on(tmp_path):
    recipe = small_recipe(train__iterations=2, prune__rounds=0)
    file = fastlth.run(recipe, out=tmp_path).replicates[0].path / "recipe.toml"
    lines = file.read_text().splitlines()
    older = [line for line in lines if not line.startswith("kernels")]
    assert len(lines) - len(older) == 2  # as asked for, and resolved
    file.write_text("\n".join(older))
    longer = fastlth.run(small_recipe(train__iterations=2, prune__rounds=1), out=tmp_path)
    assert longer.replicates[0].path == file.parent and len(longer.replicates[0].rounds) == 2
