"""``masked_linear``: kernels by the interpreter against float64, the op against its own definition."""

import pytest
import torch
import torch.nn.functional as F
from fastlth_kernels import masked_linear as op
from fastlth_kernels import masked_linear_kernels as kernels
from fastlth_kernels.bitmask import pack
from fastlth_kernels.masked_linear import masked_linear, masked_linear_adam
from fastlth_kernels.masked_step import STEPS, step_settings
from torch import nn

from tests.helpers import assert_close_by_norm
from tests.kernels.masked_problems import SMALL_TILES, Linear, batched_lenet_step

SHAPES = [(2, 7, 37, 70), (1, 1, 1, 1), (1, 33, 65, 32), (3, 1, 5, 33), (1, 40, 10, 100)]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_against_float64(interpreted, sizes, dtype):
    Linear(sizes, dtype, dtype).judge_launchers()


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_empty_and_full_masks(interpreted, density):
    Linear((2, 3, 9, 45), density=density).judge_launchers()


@pytest.mark.parametrize(("bias", "relu"), [(False, False), (True, False), (False, True)])
def test_without_bias_or_relu(interpreted, bias, relu):
    Linear((2, 3, 9, 45), bias=bias, relu=relu).judge_launchers()


def test_fp32_weights_under_bf16_images(interpreted):
    """The weights are rounded in registers: no copy of them in bf16 is needed. Their gradient stays fp32."""
    Linear((2, 17, 37, 70), torch.bfloat16, torch.float32).judge_launchers()


def test_the_configurations_in_use(interpreted):
    for dtype in (torch.float32, torch.bfloat16):
        Linear((1, 5, 70, 100), dtype).judge_launchers(tiles=None)


def test_a_sum_over_nothing_is_zero(interpreted):
    p = Linear((1, 0, 9, 45))
    p.weight_grad(*kernels.weight_grad(p.dy, None, p.x, p.w, p.bits, True), torch.zeros(1, 0, 9))
    p = Linear((1, 3, 9, 0))
    p.forward(kernels.forward(p.x, p.w, p.bits, p.b, True))


def test_tensors_that_are_not_contiguous(interpreted):
    p = Linear((2, 5, 9, 45))
    x, w = (t.mT.contiguous().mT for t in (p.x, p.w))
    assert not x.is_contiguous() and not w.is_contiguous()
    p.forward(kernels.forward(x, w, p.bits, p.b, True, SMALL_TILES))
    dy, bits = p.dy.mT.contiguous().mT, p.bits.mT.contiguous().mT
    y = kernels.forward(x, w, bits, p.b, True, SMALL_TILES)
    p.input_grad(kernels.input_grad(dy, y, w, bits, SMALL_TILES), y)
    p.weight_grad(*kernels.weight_grad(dy, y, x, w, bits, True, SMALL_TILES), y)


def test_nan_passes_the_relu_as_torchs(interpreted):
    p = Linear((1, 2, 3, 4), density=1.0)
    p.x[0, 0, 0] = torch.nan
    y = kernels.forward(p.x, p.w, p.bits, p.b, True, SMALL_TILES)
    assert bool(y[0, 0].isnan().all()) and not bool(y[0, 1].isnan().any())
    dx = kernels.input_grad(p.dy, y, p.w, p.bits, SMALL_TILES)
    exact = p.dy[0, 0].double() @ p.masked[0]  # threshold_backward lets a gradient through where y is NaN
    assert torch.allclose(dx[0, 0].double(), exact, rtol=1e-5)


def adam_problem(decoupled, seed=0):
    p = Linear((2, 6, 9, 45), seed=seed)
    p.w = torch.where(p.mask, p.w, 0.0)
    betas, eps, decay = (0.9, 0.99), 1e-6, 0.1
    settings = step_settings(0.01, weight_decay=decay, betas=betas, eps=eps)
    theirs = [nn.Parameter(t.clone().double()) for t in (p.w, p.b)]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return p, settings, theirs, kind(theirs, lr=0.01, betas=betas, eps=eps, weight_decay=decay)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("run", ["kernel", "op"])
def test_adam_in_the_epilogue_is_torchs_adam(interpreted, decoupled, run):
    p, settings, theirs, optimizer = adam_problem(decoupled)
    p.mask[:, :, 3] = False  # every weight of one input is pruned, and the input is NaN: so are their gradients
    p.bits = pack(p.mask)
    p.w[:, :, 3], theirs[0].data[:, :, 3] = 0.0, 0.0
    ours = [t.clone() for t in (p.w, p.b)]
    moments = [torch.zeros_like(t) for t in (ours[0], ours[0], ours[1], ours[1])]
    for step in range(1, 5):
        p_ = Linear(p.sizes, seed=step)
        exact = p_.x.double()
        p_.x[:, :, 3] = torch.nan
        y = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(step)).relu()
        settings[STEPS] += 1
        mine = (ours[0], *moments[:2], ours[1], *moments[2:], settings, decoupled)
        if run == "kernel":
            kernels.adam_step(p_.dy, y, p_.x, p.bits, *mine, config=SMALL_TILES)
        else:
            masked_linear_adam(p_.dy, y, p_.x, p.bits, *mine)
        g = torch.where(y > 0, p_.dy, 0.0).double()
        theirs[0].grad, theirs[1].grad = torch.where(p.mask, g.mT @ exact, 0.0), g.sum(1)
        optimizer.step()
        for mine_, their in zip(ours, theirs, strict=True):
            assert_close_by_norm(mine_.double(), their.detach(), 2e-6)
        assert not bool(ours[0][~p.mask].any()) and not any(bool(m[~p.mask].any()) for m in moments[:2])


def lenets(count, seed=0):
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 10))
            for _ in range(count)]  # fmt: skip


def test_three_steps_of_two_lenets_equal_plain_torch(interpreted):
    nets, settings = lenets(2), step_settings(1e-3)
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in nets]
    linears = [[m for m in net if isinstance(m, nn.Linear)] for net in nets]
    masks = [torch.rand(2, *layer.weight.shape) < 0.5 for layer in linears[0]]
    for r, net in enumerate(linears):
        for layer, mask in zip(net, masks, strict=True):
            layer.weight.data.masked_fill_(~mask[r], 0.0)
    w, b = ([torch.stack([getattr(net[i], kind).data for net in linears]) for i in range(3)]
            for kind in ("weight", "bias"))  # fmt: skip
    moments = [[torch.zeros_like(t) for t in (w[i], w[i], b[i], b[i])] for i in range(3)]
    bits = [pack(mask) for mask in masks]
    for _ in range(3):
        x, labels = torch.randn(2, 6, 40), torch.randint(0, 10, (2, 6))
        for r, net in enumerate(nets):
            optimizers[r].zero_grad()
            F.cross_entropy(net(x[r]), labels[r]).backward()
            for layer, mask in zip(linears[r], masks, strict=True):
                layer.weight.grad.masked_fill_(~mask[r], 0.0)
            optimizers[r].step()
        batched_lenet_step(x, labels, w, b, bits, moments, settings)
    for r in range(2):
        for i in range(3):
            assert_close_by_norm(w[i][r], linears[r][i].weight.data, 1e-6)
            assert_close_by_norm(b[i][r], linears[r][i].bias.data, 1e-6)


def test_the_op_launches_the_kernels_where_there_is_a_gpu(interpreted, monkeypatch):
    monkeypatch.setattr(op, "on_gpu", lambda tensor: True)
    p = Linear((2, 7, 37, 70))
    x, w, b = (t.clone().requires_grad_() for t in (p.x, p.w, p.b))
    monkeypatch.setattr(op, "reference", None)
    y = masked_linear(x, w, p.bits, b, True)
    p.forward(y.detach())
    dx, dw, db = torch.autograd.grad(y, (x, w, b), p.dy)
    p.input_grad(dx, y.detach())
    p.weight_grad(dw, db, y.detach())


def test_the_reference_is_right_too():
    for dtype in (torch.float32, torch.bfloat16):
        p = Linear((2, 7, 37, 70), dtype)
        y = masked_linear(p.x, p.w, p.bits, p.b, True)
        p.input_grad(op.reference_input_grad(p.dy, y, p.w, p.bits), y)
        p.weight_grad(*op.reference_weight_grad(p.dy, y, p.x, p.w, p.bits, True), y)
        if dtype == torch.float32:
            p.forward(y)


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_by_finite_differences(relu):
    p = Linear((2, 3, 5, 40), relu=relu)
    x, w, b = (t.double().requires_grad_() for t in (p.x, p.w, p.b))
    assert torch.autograd.gradcheck(lambda x, w, b: masked_linear(x, torch.where(p.mask, w, 0.0), p.bits, b, relu),
                                    (x, w.detach().nan_to_num(2.0).requires_grad_(), b))  # fmt: skip


def test_a_frozen_input_or_weight_gets_no_gradient(monkeypatch):
    p = Linear((1, 3, 5, 40))
    w = p.w.clone().requires_grad_()
    monkeypatch.setattr(op, "reference_input_grad", None)  # would raise
    masked_linear(p.x, w, p.bits, p.b, True).sum().backward()
    assert w.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own check reads it
def test_opcheck():
    p = Linear((2, 3, 5, 40))
    x, w, b = (t.clone().requires_grad_() for t in (p.x, p.masked.float(), p.b))
    y = torch.rand(2, 3, 5)
    settings = step_settings(1e-3)
    settings[STEPS] = 1
    zero = [torch.zeros_like(t) for t in (p.w, p.w, p.b, p.b)]
    frozen = p.masked.float()
    for function, arguments in [
        (masked_linear, (x, w, p.bits, b, True)), (masked_linear, (x, w, p.bits)),
        (op.masked_linear_input_grad, (p.dy, y, frozen, p.bits)),
        (op._weight_grad, (p.dy, y, p.x, frozen, p.bits, True)),
        (op._weight_grad, (p.dy, None, p.x, frozen, p.bits, False)),
        (masked_linear_adam, (p.dy, y, p.x, p.bits, frozen, *zero[:2], p.b, *zero[2:], settings)),
        (masked_linear_adam, (p.dy, None, p.x, p.bits, frozen, *zero[:2], None, None, None, settings, True)),
    ]:  # fmt: skip
        torch.library.opcheck(function, arguments)


def test_compiles_in_one_graph():
    p = Linear((2, 3, 5, 40))

    def loss(x, w, b):
        return masked_linear(x, w, p.bits, b, True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        x, w, b = (t.clone().requires_grad_() for t in (p.x, p.w, p.b))
        results.append(torch.autograd.grad(function(x, w, b), (x, w, b)))
    assert all(torch.equal(a, c) for a, c in zip(*results, strict=True))


def test_adam_and_the_input_gradient_compile_in_one_graph():
    p, settings, _, _ = adam_problem(False)
    y = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(1))
    settings[STEPS] += 1

    def update(w, m, v, b, bias_m, bias_v):
        dx = op.masked_linear_input_grad(p.dy, y, w, p.bits)
        masked_linear_adam(p.dy, y, p.x, p.bits, w, m, v, b, bias_m, bias_v, settings)
        return dx

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    results = []
    for function in (update, compiled):
        state = [t.clone() for t in (p.w, p.w, p.w.abs(), p.b, p.b, p.b.abs())]
        results.append([function(*state), *state])
    assert all(torch.equal(a, c) for a, c in zip(*results, strict=True)) and not torch.equal(results[1][1], p.w)


@pytest.mark.parametrize(("name", "shape"), [("w", (2, 5, 41)), ("bits", (2, 5, 1)), ("bias", (2, 6))])
def test_shapes_that_do_not_fit_are_refused(name, shape):
    p = Linear((2, 3, 5, 40))
    given = {"x": p.x, "w": p.w, "bits": p.bits, "bias": p.b}
    given[name] = given[name].new_zeros(shape)
    with pytest.raises(ValueError, match=rf"{name} has the shape \({', '.join(map(str, shape))}\)"):
        masked_linear(**given)


def test_adam_refuses_a_layout_it_would_misread():
    p, settings, _, _ = adam_problem(False)
    settings[STEPS] += 1
    w, m = p.w, torch.zeros_like(p.w)
    for wrong in (w.mT.contiguous().mT, w.double()):
        with pytest.raises(ValueError, match="contiguous float32"):
            masked_linear_adam(p.dy, None, p.x, p.bits, wrong, m, m.clone(), None, None, None, settings)


def test_float64_never_meets_the_kernels(monkeypatch):
    """They would sum it in fp32."""
    monkeypatch.setattr(op, "on_gpu", lambda tensor: True)
    p = Linear((1, 3, 9, 45))
    x, w = p.x.double(), p.masked
    assert torch.equal(masked_linear(x, w, p.bits), torch.bmm(x, w.mT))
