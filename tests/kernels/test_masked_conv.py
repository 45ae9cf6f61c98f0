"""``masked_conv2d``: kernels by the interpreter against float64, the op against its own definition."""

import pytest
import torch
from fastlth_kernels import masked_conv as op
from fastlth_kernels import masked_conv_kernels as kernels
from fastlth_kernels.masked_conv import masked_conv2d

from tests.kernels.masked_problems import SMALL_TILES, Conv

# (sizes B IN H W OUT, taps, stride, padding): what VGG and ResNet use, on odd sizes, and what else is allowed
SHAPES = [
    ((2, 3, 5, 4, 33), 3, 1, 1),
    ((2, 35, 5, 6, 4), 3, 2, 1),
    ((2, 3, 4, 5, 33), 1, 1, 0),
    ((2, 33, 5, 6, 3), 1, 2, 0),
    ((1, 2, 5, 4, 34), 3, 2, 1),  # taps of a class and blocks of channels with a common divisor
    ((1, 1, 1, 1, 1), 3, 1, 1),
    ((1, 2, 4, 5, 3), (2, 3), 3, 1),
]


@pytest.mark.parametrize(("sizes", "taps", "stride", "padding"), SHAPES)
def test_kernels_against_float64(interpreted, sizes, taps, stride, padding):
    Conv(sizes, taps, stride, padding).judge_launchers()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision(interpreted, dtype, stride):
    Conv((1, 35, 4, 5, 6), 1, stride, 1, dtype, dtype).judge_launchers()


def test_fp32_weights_under_bf16_images(interpreted):
    Conv((1, 35, 3, 3, 6), 3, 2, 1, torch.bfloat16, torch.float32, bias=False).judge_launchers()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(interpreted, density):
    Conv((1, 3, 4, 3, 5), 1, 1, 0, density=density).judge_launchers()


def test_an_empty_batch(interpreted):
    p = Conv((0, 3, 4, 3, 5), 1, 1, 0)
    for deterministic in (True, False):
        p.weight_grad(kernels.weight_grad(p.dy, p.x, p.w, p.bits, 1, 0, deterministic=deterministic))


def test_a_class_of_pixels_may_be_empty(interpreted):
    Conv((1, 2, 1, 1, 3), 3, 2, 1).judge_launchers()


def test_the_configurations_in_use(interpreted):
    for dtype in (torch.float32, torch.bfloat16):
        Conv((1, 3, 4, 3, 5), 1, 1, 0, dtype).judge_launchers(tiles=None, parts=None)


def test_any_memory_layout_goes_in(interpreted):
    p = Conv((2, 5, 4, 3, 6), 1, 1, 0)
    p.x, p.w, p.dy = (t.contiguous(memory_format=torch.channels_last) for t in (p.x, p.w, p.dy))
    p.judge_launchers()
    p.x, p.w, p.dy = (t.mT.contiguous().mT for t in (p.x, p.w, p.dy))
    p.judge_launchers()


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_in_order_give_the_same_bits_again(interpreted, parts):
    """Sixteen of 108 pixels at a time: the last part may be shorter than the others, and none is lost."""
    p = Conv((9, 3, 4, 3, 5), 1, 1, 0)
    tiles = SMALL_TILES._replace(inner=16)
    first, second = (kernels.weight_grad(p.dy, p.x, p.w, p.bits, 1, 0, parts=parts, config=tiles) for _ in range(2))
    p.weight_grad(first)
    assert torch.equal(first, second)


def test_the_op_launches_the_kernels_where_there_is_a_gpu(interpreted, monkeypatch):
    monkeypatch.setattr(op, "on_gpu", lambda tensor: True)
    for name in ("reference", "reference_input_grad", "reference_weight_grad"):
        monkeypatch.setattr(op, name, None)
    p = Conv((2, 5, 4, 3, 6), 1, 2, 0)
    x, w, b = (t.clone().requires_grad_() for t in (p.x, p.w, p.b))
    y = masked_conv2d(x, w, p.bits, b, 2)
    p.forward(y.detach())
    dx, dw, db = torch.autograd.grad(y, (x, w, b), p.dy)
    p.input_grad(dx)
    p.weight_grad(dw)
    assert torch.allclose(db, p.dy.sum((0, 2, 3)))


@pytest.mark.parametrize(("sizes", "taps", "stride", "padding"), SHAPES)
def test_the_reference_is_right_too(sizes, taps, stride, padding):
    p = Conv(sizes, taps, stride, padding)
    p.forward(masked_conv2d(p.x, p.w, p.bits, p.b, stride, padding))
    p.input_grad(op._input_grad(p.dy, p.w, p.bits, *p.x.shape[2:], stride, padding))
    p.weight_grad(op._weight_grad(p.dy, p.x, p.w, p.bits, stride, padding, True))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_by_finite_differences(stride):
    p = Conv((1, 2, 4, 3, 2), 3, stride, 1)
    x, w, b = (t.double().nan_to_num(2.0).requires_grad_() for t in (p.x, p.w, p.b))

    def masked(x, w, b):
        return masked_conv2d(x, torch.where(p.mask, w, 0.0), p.bits, b, stride, 1)

    assert torch.autograd.gradcheck(masked, (x, w, b))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own check reads it
@pytest.mark.parametrize("sizes", [(2, 5, 4, 3, 6), (1, 1, 3, 3, 1)])
def test_opcheck(sizes):
    p = Conv(sizes)
    x, w, b = (t.float().clone().requires_grad_() for t in (p.x, p.masked, p.b))
    frozen = p.masked.float()
    for function, arguments in [
        (masked_conv2d, (x, w, p.bits, b, 1, 1)), (masked_conv2d, (x, w, p.bits)),
        (op._input_grad, (p.dy, frozen, p.bits, *p.x.shape[2:], 1, 1)),
        (op._weight_grad, (p.dy, p.x, frozen, p.bits, 1, 1, True)),
    ]:  # fmt: skip
        torch.library.opcheck(function, arguments)


def test_compiles_in_one_graph():
    p = Conv((2, 5, 4, 3, 6))

    def loss(x, w, b):
        return masked_conv2d(x, w, p.bits, b, 1, 1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        x, w, b = (t.clone().requires_grad_() for t in (p.x, p.w, p.b))
        results.append(torch.autograd.grad(function(x, w, b), (x, w, b)))
    for eager, traced in zip(*results, strict=True):
        assert torch.allclose(eager, traced, rtol=1e-6)


@pytest.mark.parametrize(("name", "shape"), [("w", (6, 4, 3, 3)), ("bits", (6, 3, 3, 2)), ("bias", (5,))])
def test_shapes_that_do_not_fit_are_refused(name, shape):
    p = Conv((2, 5, 4, 3, 6))
    given = {"x": p.x, "w": p.w, "bits": p.bits, "bias": p.b}
    given[name] = given[name].new_zeros(shape)
    with pytest.raises(ValueError, match=rf"{name} has the shape \({', '.join(map(str, shape))},?\)"):
        masked_conv2d(**given, padding=1)


@pytest.mark.parametrize("shape", [(4_100, 1, 32, 32), (2**15, 700, 10, 10)])
def test_batches_beyond_the_kernels_offsets_are_refused(shape):
    x, w = torch.empty(shape, device="meta"), torch.empty(2, shape[1], 1, 1, device="meta")
    with pytest.raises(ValueError, match="use smaller batches"):
        masked_conv2d(x, w, torch.empty(2, 1, 1, -(-shape[1] // 32), dtype=torch.int32, device="meta"))


def test_a_filter_larger_than_the_image_is_refused():
    p = Conv((2, 5, 4, 3, 6), 5, 1, 2)
    with pytest.raises(ValueError, match="5x5 filter with stride 1 and padding 0 does not fit images of 4x3"):
        masked_conv2d(p.x, p.w, p.bits, p.b)
