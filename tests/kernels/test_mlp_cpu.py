"""Training and evaluation of whole nets by the CPU kernels, against plain PyTorch in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastlth_kernels.mlp_cpu import Images, MaskedMlp, Optimizer

SHAPES = [(30, 64), (14, 30), (10, 14)]  # odd against every tile, lane and group
SCALE, SHIFT = 1 / 100, -1.0
ADAM = Optimizer("adam")
OPTIMIZERS = {
    "adam": ADAM,
    "adam with decay": Optimizer("adam", weight_decay=0.01, betas=(0.8, 0.99), eps=1e-6),
    "adamw": Optimizer("adamw", weight_decay=0.1),
    "sgd": Optimizer("sgd"),
    "momentum": Optimizer("sgd", momentum=0.9, weight_decay=1e-3),
    "nesterov": Optimizer("sgd", momentum=0.9, nesterov=True, weight_decay=1e-3),
}
POOL = ThreadPoolExecutor(4)


class Case:
    """A net, its masks and weights, random images, and the same net in plain PyTorch."""

    def __init__(self, density=0.4, seed=0, images=600, shapes=SHAPES):
        rng = np.random.default_rng(seed)
        self.masks = [rng.random(s) < density for s in shapes]
        self.weights = [rng.normal(0, 0.2, s) * m for s, m in zip(shapes, self.masks, strict=True)]
        self.biases = [rng.normal(0, 0.2, s[0]) for s in shapes]
        self.pixels = rng.integers(0, 256, (images, shapes[0][1]), dtype=np.uint8)
        self.lit = rng.random(shapes[0][1]) ** 4  # most pixels are black in most images, some in all
        self.pixels *= rng.random(self.pixels.shape) < self.lit * (self.lit > 0.01)
        self.labels = rng.integers(0, shapes[-1][0], images)
        self.order = rng.permutation(images)

    def net(self, dense=False, threads=1, optimizer=ADAM, dtype=np.float64, batch=60, lit=True):
        kinds = [dense] * len(self.masks) if isinstance(dense, bool) else dense
        groups = self.masks[0].shape[1] // 16
        net = MaskedMlp(self.masks, kinds, optimizer, np.full(groups, SCALE), np.full(groups, SHIFT),
                        batch=batch, lit=self.lit if lit else None, threads=threads, pool=POOL,
                        dtype=dtype)  # fmt: skip
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            net.write(i, w, b)
        return net

    def images(self, chosen=None):
        return Images(self.pixels.reshape(-1), self.labels, self.order if chosen is None else chosen)

    def plain(self, bounds, rates, optimizer=ADAM):
        """Weights and biases after the steps, each step's loss and hits."""
        parameters = [torch.tensor(p, requires_grad=True) for pair in zip(self.weights, self.biases, strict=True)
                      for p in pair]  # fmt: skip
        o = optimizer
        if o.kind == "sgd":
            torch_optimizer = torch.optim.SGD(parameters, momentum=o.momentum, nesterov=o.nesterov,
                                              weight_decay=o.weight_decay)  # fmt: skip
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.kind]
            torch_optimizer = kind(parameters, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        losses, hits = [], []
        for begin, end, rate in zip(bounds[:-1], bounds[1:], rates, strict=True):
            chosen = self.order[begin:end]
            logits, labels = self.logits(chosen, parameters), torch.from_numpy(self.labels[chosen])
            loss = F.cross_entropy(logits, labels)
            losses.append(float(loss.detach()))
            hits.append(int((logits.argmax(1) == labels).sum()))
            torch_optimizer.zero_grad()
            loss.backward()
            for p, mask in zip(parameters[::2], self.masks, strict=True):
                p.grad *= torch.from_numpy(mask)
            torch_optimizer.param_groups[0]["lr"] = rate
            torch_optimizer.step()
        return [p.detach().numpy() for p in parameters], losses, hits

    def logits(self, chosen, parameters):
        h = torch.from_numpy(self.pixels[chosen] * SCALE + SHIFT)
        for i in range(len(self.masks)):
            h = F.linear(h if i == 0 else h.relu(), parameters[2 * i], parameters[2 * i + 1])
        return h


def weights_of(net):
    return [array for i in range(len(net.net.layers)) for array in net.read(i)]


def error(ours, theirs):
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True))


def batches(size, steps, images=600):
    return np.minimum(np.arange(steps + 1) * size, images)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dense", [False, True, (True, False, True), (False, True, False)])
def test_hundred_steps_equal_plain_pytorch(name, dense):
    case, optimizer = Case(), OPTIMIZERS[name]
    bounds, rates = np.arange(101) * 6, np.linspace(1e-3, 5e-3, 100)
    net = case.net(dense, threads=2, optimizer=optimizer, batch=6)
    losses, hits = net.train(case.images(), bounds, rates, 0)
    weights, their_losses, their_hits = case.plain(bounds, rates, optimizer)
    assert error(weights_of(net), weights) < 1e-10
    assert np.abs(losses - their_losses).max() < 1e-10
    assert hits.tolist() == their_hits


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 64, 130])
def test_every_batch_size_on_any_number_of_threads(batch, dense, threads):
    """600 images: the last batch is smaller, or the steps stop before the images do."""
    case = Case(density=0.7)
    bounds = batches(batch, min(20, -(-600 // batch)))
    rates = np.full(len(bounds) - 1, 1e-2)
    net = case.net(dense, threads, batch=batch)
    losses, hits = net.train(case.images(), bounds, rates, 0)
    weights, their_losses, their_hits = case.plain(bounds, rates)
    assert error(weights_of(net), weights) < 1e-10
    assert np.abs(losses - their_losses).max() < 1e-10
    assert hits.tolist() == their_hits


@pytest.mark.parametrize("density", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("dense", [False, True])
def test_ten_steps_in_float32(dense, density):
    case = Case(density, shapes=[(300, 784), (100, 300), (10, 100)])
    bounds, rates = batches(60, 10), np.full(10, 1.2e-3)
    net = case.net(dense, threads=2, dtype=np.float32)
    losses, _ = net.train(case.images(), bounds, rates, 0)
    weights, their_losses, _ = case.plain(bounds, rates)
    assert error(weights_of(net), weights) < 1e-4
    assert np.abs(losses - their_losses).max() < 1e-4


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_any_number_of_layers(layers, dense):
    shapes = {1: [(10, 64)], 2: [(17, 64), (10, 17)], 4: [(30, 64), (20, 30), (14, 20), (10, 14)]}[layers]
    case = Case(shapes=shapes)
    bounds, rates = batches(30, 20), np.full(20, 1e-2)
    net = case.net(dense, threads=2, batch=30)
    net.train(case.images(), bounds, rates, 0)
    assert error(weights_of(net), case.plain(bounds, rates)[0]) < 1e-10


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("masks", ["none kept", "one kept", "all kept", "one row", "one column"])
def test_masks_at_the_edge(masks, dense):
    case = Case()
    for i, (outputs, inputs) in enumerate(SHAPES):
        mask = np.full((outputs, inputs), masks == "all kept")
        if masks in ("one kept", "one row"):
            mask[outputs // 2, 0 if masks == "one kept" else slice(None)] = True
        if masks in ("one kept", "one column"):
            mask[outputs // 2 if masks == "one kept" else slice(None), inputs - 1] = True
        case.masks[i], case.weights[i] = mask, case.weights[i] * mask
    bounds, rates = batches(60, 10), np.full(10, 1e-2)
    net = case.net(dense, threads=3)
    net.train(case.images(), bounds, rates, 0)
    ours, theirs = weights_of(net), case.plain(bounds, rates)[0]
    assert max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) < 1e-10


@pytest.mark.parametrize("dense", [False, True])
def test_pruned_weights_stay_at_zero_even_beside_nan(dense):
    case = Case(density=0.5)
    net = case.net(dense, threads=2, optimizer=Optimizer("sgd", momentum=0.9), dtype=np.float32)
    with np.errstate(all="ignore"):
        losses, _ = net.train(case.images(), batches(60, 10), np.full(10, 1e30), 0)
    assert not np.isfinite(losses[-1])  # divergence is seen, not flushed away
    for i, mask in enumerate(case.masks):
        weight, _ = net.read(i)
        assert np.isnan(weight[mask]).any()
        layer = net.net.layers[i]
        if dense:
            held = net.net.memory[layer.w :][: layer.outputs * layer.pitch].reshape(layer.outputs, layer.pitch)
            weight = held[:, net.net.ranks] if i == 0 else held[:, : layer.inputs]
        assert (weight[~mask].view(np.int32) == 0).all()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dense", [False, True])
def test_scores_equal_plain_pytorch(dense, count):
    case = Case()
    chosen = case.order[:count]
    parameters = [torch.from_numpy(p) for pair in zip(case.weights, case.biases, strict=True) for p in pair]
    logits, labels = case.logits(chosen, parameters), torch.from_numpy(case.labels[chosen])
    for threads in (1, 3):
        loss, hits = case.net(dense, threads).scores(case.images(chosen))
        assert loss == pytest.approx(float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-12)
        assert hits == int((logits.argmax(1) == labels).sum())


def test_of_equal_logits_the_first_one_is_the_answer():
    case = Case()
    case.weights, case.biases = [w * 0 for w in case.weights], [b * 0 for b in case.biases]
    loss, hits = case.net().scores(case.images())
    assert hits == (case.labels == 0).sum()
    assert loss == pytest.approx(600 * np.log(10))


def test_large_logits_overflow_nowhere():
    case = Case()
    case.biases[-1] = np.array([1000.0, -1000.0] * 5)
    for dtype in (np.float32, np.float64):
        loss, _ = case.net(dtype=dtype).scores(case.images())
        losing = (case.labels % 2 == 1).sum()
        assert loss == pytest.approx(losing * 2000 + 600 * np.log(5), rel=0.01)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_where_a_call_ends_changes_no_bit(dense, dtype):
    case = Case()
    bounds, rates = batches(25, 24), np.full(24, 1e-3)
    whole, parts = case.net(dense, 2, dtype=dtype, batch=25), case.net(dense, 2, dtype=dtype, batch=25)
    losses, _ = whole.train(case.images(), bounds, rates, 0)
    pieces = [parts.train(case.images(), bounds[a : b + 1], rates[a:b], a)[0] for a, b in ((0, 1), (1, 8), (8, 24))]
    assert np.array_equal(losses, np.concatenate(pieces))
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(whole), weights_of(parts), strict=True))


def test_moments_are_read_written_and_cleared():
    case = Case()
    bounds, rates = batches(30, 20), np.full(20, 1e-3)
    first = case.net((True, False, True), 2, batch=30)
    first.train(case.images(), bounds[:11], rates[:10], 0)
    second = case.net((False, True, False), 1, batch=30)  # another layout: moments do not depend on it
    for what in ("w", "m", "v"):
        for i in range(3):
            second.write(i, *first.read(i, what), what)
    for net in (first, second):
        net.train(case.images(), bounds[10:], rates[10:], 10)
    assert error(weights_of(first), weights_of(second)) < 1e-12
    first.clear("m")
    assert not any(array.any() for i in range(3) for array in first.read(i, "m"))
    assert any(array.any() for i in range(3) for array in first.read(i, "v"))


def test_the_calling_thread_keeps_its_denormals():
    case = Case()
    case.net().train(case.images(), batches(60, 2), np.full(2, 1e-3), 0)
    assert np.float64(2.0) ** -1060 * 0.5 > 0


def test_a_first_layer_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        Case(shapes=[(10, 50)]).net()
