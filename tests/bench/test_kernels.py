"""Bytes and operations by arithmetic, held against tensors that are really there and PyTorch's own counting."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fastlth_kernels.bitmask import pack
from fastlth_kernels.masked_conv import conv_bytes, conv_operations, masked_conv2d
from fastlth_kernels.masked_conv_kernels import weight_parts
from fastlth_kernels.masked_linear import linear_bytes, linear_operations, masked_linear
from fastlth_kernels.masked_step import step_operations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastlth.bench import kernels, peak
from fastlth.bench.subject import recipe_for

ROLES = {"fastlth.masked_linear.default": "forward", "fastlth.masked_linear_input_grad.default": "input_grad",
         "fastlth.masked_linear_weight_grad.default": "weight_grad", "fastlth.masked_conv2d.default": "forward",
         "fastlth.masked_conv2d_input_grad.default": "input_grad",
         "fastlth.masked_conv2d_weight_grad.default": "weight_grad"}  # fmt: skip


class Seen(TorchDispatchMode):
    """Bytes of the tensors that each of our ops takes and gives, by role. w has no part in its own gradient."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (role := ROLES.get(str(func))) is not None:
            given = [a for a in args if isinstance(a, torch.Tensor)]
            if role == "weight_grad":
                del given[-2]  # before the bits
            self.bytes[role] = sum(t.numel() * t.element_size() for t in [*given, *tree_leaves(out)])
        return out


@pytest.mark.parametrize("sizes", [(1, 60, 300, 784), (3, 7, 10, 33), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_bytes_are_those_of_its_tensors(sizes, bias, relu, dtype):
    replicates, images, outputs, inputs = sizes
    w = torch.randn(replicates, outputs, inputs, requires_grad=True)
    x = torch.randn(replicates, images, inputs, dtype=dtype, requires_grad=True)
    b = torch.randn(replicates, outputs, requires_grad=True) if bias else None
    with Seen() as seen:
        y = masked_linear(x, w, pack(torch.ones_like(w, dtype=torch.bool)), b, relu)
        y.backward(torch.ones_like(y))
    given = dict(image=x.element_size(), bias=bias)
    assert seen.bytes == {
        "forward": linear_bytes("forward", *sizes, relu=relu, **given),
        "input_grad": linear_bytes("input_grad", *sizes, relu=relu, **given),
        "weight_grad": linear_bytes("weight_grad", *sizes, relu=relu, **given),
    }
    # instead of writing a gradient: weight and both moments read and written
    more = 20 * replicates * (outputs * inputs + bias * outputs)
    assert linear_bytes("adam_step", *sizes, relu=relu, **given) == seen.bytes["weight_grad"] + more


@pytest.mark.parametrize(("images", "filters", "stride", "padding"), [
    ((2, 64, 8, 8), (32, 64, 3, 3), 1, 1), ((3, 5, 9, 7), (4, 5, 3, 3), 2, 1), ((1, 33, 4, 4), (2, 33, 1, 1), 2, 0),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_bytes_and_operations_are_those_of_its_tensors(images, filters, stride, padding, bias, dtype):
    w = torch.randn(filters).contiguous(memory_format=torch.channels_last).requires_grad_()
    x = torch.randn(images, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    bits = pack(torch.ones_like(w, dtype=torch.bool).permute(0, 2, 3, 1))
    b = torch.randn(filters[0], requires_grad=True) if bias else None
    with Seen() as seen:
        y = masked_conv2d(x, w, bits, b, stride, padding)
        y.backward(torch.ones_like(y))
    assert seen.bytes == {
        role: conv_bytes(role, images, filters, stride, padding, image=x.element_size(), bias=bias)
        for role in ("forward", "input_grad", "weight_grad")
    }
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv2d(x.detach(), w.detach().to(dtype), None, stride, padding)
    assert conv_operations(images, filters, stride, padding) == counter.get_total_flops()


def test_parts_of_a_convolution_are_written_and_read_again():
    images, filters = (64, 128, 16, 16), (128, 128, 3, 3)
    whole, cut = (conv_bytes("weight_grad", images, filters, 1, 1, parts=parts) for parts in (1, 7))
    assert cut - whole == 7 * 2 * 4 * 128 * 128 * 9
    tiles, parts, share = weight_parts(128, 128, 9, 64 * 16 * 16, torch.bfloat16)
    assert parts > 1 and (parts - 1) * share < 64 * 16 * 16 <= parts * share and share % tiles.inner == 0
    with pytest.raises(ValueError, match="role 'sideways'"):
        conv_bytes("sideways", images, filters, 1, 1)
    with pytest.raises(ValueError, match="role 'sideways'"):
        linear_bytes("sideways", 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("model", "dataset"), [("vgg19", "cifar-10"), ("lenet-300-100", "mnist"), ("conv-2", "digits")]
)
def test_operations_of_a_step_are_those_that_torch_counts(model, dataset):
    recipe = recipe_for(model, dataset)
    found = [r for r in kernels.rows(model, dataset) if r["path"].startswith("masked_") and r["per"] == "step"]
    products = sum(r["calls"] * r["operations"] for r in found if r["path"] != "masked_step")
    assert products == pytest.approx(recipe.train.batch_size * peak.flops_per_image(recipe), rel=1e-12)


def test_vgg19_at_its_shapes():
    rows = list(kernels.rows("vgg19", "cifar-10", "h200"))
    assert {r["path"].split()[0] for r in rows} == {
        "assemble_batch", "masked_conv2d", "masked_linear", "masked_linear_adam", "masked_step", "prune_lowest"
    }  # fmt: skip
    calls = {role: sum(r["calls"] for r in rows if r["path"] == f"masked_conv2d {role}")
             for role in ("forward", "input_grad", "weight_grad")}  # fmt: skip
    assert calls == {"forward": 16, "input_grad": 15, "weight_grad": 16}  # images need no gradient
    (step,) = (r for r in rows if r["path"] == "masked_step")
    masked = 20_018_880 + 5_120
    assert step["bytes"] == round(20.125 * masked + 20 * (20_035_018 - masked))  # read w, g, m; write w, m; a mask bit
    assert step["seconds_at_roofline"] == pytest.approx(step["bytes"] / 4.8e12) and step["bound"] == "memory"
    (layer,) = (r for r in rows if r["what"] == "64->64 3x3 at 32x32" and r["path"].endswith("forward"))
    assert layer["operations"] == 2 * 64 * 32 * 32 * 64 * 64 * 9 and layer["bound"] == "arithmetic"
    assert layer["seconds_at_roofline"] == pytest.approx(layer["operations"] / 989e12)


def test_fp32_has_no_tensor_cores_and_larger_activations():
    def row(precision):
        rows = kernels.rows("vgg19", "cifar-10", "a100", batch=128, precision=precision)
        return next(r for r in rows if r["what"] == "512->512 3x3 at 4x4" and r["path"].endswith("input_grad"))

    half, single = row("bf16"), row("fp32")
    assert single["bytes"] - half["bytes"] == 2 * 2 * 128 * 512 * 16
    assert single["seconds_at_roofline"] / half["seconds_at_roofline"] == pytest.approx(312 / 19.5)


@pytest.mark.parametrize(("optimizer", "options", "each"), [
    ("sgd", {}, 4), ("sgd", {"momentum": True, "nesterov": True}, 8), ("adam", {}, 15), ("adamw", {}, 14),
])  # fmt: skip
def test_operations_of_an_update(optimizer, options, each):
    assert step_operations(1000, optimizer, **options) == 1000 * each


def test_linear_operations_are_a_matrix_products():
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.ones(3, 5, 7), torch.ones(3, 7, 11))
    assert linear_operations(3, 5, 11, 7) == counter.get_total_flops()


def test_the_command_prints_a_table_or_one_document(command):
    code, out, err = command("bench", "kernels", "--model", "lenet-300-100", "--dataset", "mnist", "--json")
    assert code == 0, err
    document = json.loads(out)
    fields = {"subject", "model", "dataset", "path", "density", "images_per_second", "against", "ratio", "ratio_low",
              "ratio_high", "bytes", "operations", "seconds_at_roofline"}  # fmt: skip
    assert document["rows"] and all(fields <= set(r) and r["measured"] is False for r in document["rows"])
    assert all(r["ratio"] is r["images_per_second"] is None for r in document["rows"])  # nothing was measured
    code, out, err = command("bench", "kernels")
    assert code == 0 and out == "" and "not measured" in err and "512->512 3x3 at 2x2" in err


@pytest.mark.parametrize(("options", "says"), [
    (["--gpu", "h20"], "did you mean 'h200'"), (["--precision", "fp8"], "fp32 or bf16"), (["--model", "vgg"], "vgg19"),
    (["--batch", "0"], "batch"),
])  # fmt: skip
def test_what_is_unknown_is_said(command, options, says):
    code, out, err = command("bench", "kernels", *options)
    assert code == 2 and out == "" and says in err


def test_layers_are_met_in_the_order_of_a_batch():
    from fastlth.models import skeleton

    recipe = recipe_for("lenet-300-100", "mnist")
    found = kernels.layers(skeleton(recipe), 5, (1, 28, 28))
    assert [(tuple(one.module.weight.shape), one.images, one.first) for one in found] == [
        ((300, 784), (5, 784), True), ((100, 300), (5, 300), False), ((10, 100), (5, 100), False),
    ]  # fmt: skip
    assert all(dataclasses.is_dataclass(one) for one in found)
