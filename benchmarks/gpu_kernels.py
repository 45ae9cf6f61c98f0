"""What ``benchmarks.gpu kernels`` checks and times; ``ledger.compare`` times variants in turns.

Checks: every public op on the device against float64, or against the same op on the CPU where bits must agree.
Variants of a row: ours; library, cuDNN or cuBLAS on weights that are masked already; naive, the mask multiplied in
each time; compiled, ``torch.compile`` of our reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastlth_kernels import batch, kth_magnitude, masked_conv, masked_linear, masked_step
from fastlth_kernels.bitmask import pack, unpack
from torch import Tensor

from benchmarks.gpu import Call, Ledger

EPS32 = torch.finfo(torch.float32).eps
DENSITY = 0.2
# In channels, out channels, rows and columns of the image: VGG-19's different convolutions, and how often each occurs.
VGG19 = [
    (3, 64, 32, 1), (64, 64, 32, 1), (64, 128, 16, 1), (128, 128, 16, 1), (128, 256, 8, 1), (256, 256, 8, 3),
    (256, 512, 4, 1), (512, 512, 4, 3), (512, 512, 2, 4),
]  # fmt: skip
LENET = [(784, 300), (300, 100), (100, 10)]
BATCHES = (64, 128, 512)


def _randn(ledger: Ledger, *shape: int, seed: int = 0) -> Tensor:
    """Drawn on the CPU, so that every machine sees the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(ledger.device)


def _mask(ledger: Ledger, *shape: int, density: float = DENSITY) -> Tensor:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (drawn < density).to(ledger.device)


# Checks


def numerics(ledger: Ledger) -> None:
    _check_bits(ledger)
    for optimizer in ("sgd", "adam", "adamw"):
        _check_step(ledger, optimizer)
    for values in ("normal", "ties", "denormal"):
        _check_selection(ledger, values)
    for augment in batch.AUGMENTS:
        _check_batch(ledger, augment)
    sizes = [(1, 5, 33, 65)] if ledger.dry else [(1, 5, 33, 65), (2, 60, 300, 784), (1, 512, 512, 512)]
    # torch's own fp16 convolution on a CPU is further off than any kernel may be
    for dtype in (torch.float32, torch.bfloat16) if ledger.dry else (torch.float32, torch.bfloat16, torch.float16):
        for size in sizes:
            _check_linear(ledger, size, dtype)
        for taps, stride in ((3, 1), (3, 2), (1, 1), (1, 2)):
            _check_conv(ledger, (2, 20, 9, 40) if ledger.dry else (16, 96, 15, 130), taps, stride, dtype)


def _check_bits(ledger: Ledger) -> None:
    mask = _mask(ledger, 7, 100)
    ledger.check("bits", float((unpack(pack(mask), 100) != mask).sum()), 0)


def _check_step(ledger: Ledger, optimizer: str) -> None:
    lr, steps = 0.1, 3
    shapes = [(300, 784), (64, 3, 3, 64), (10,)]
    masks = [_mask(ledger, *s, density=0.5) for s in shapes[:2]] + [torch.ones(10, device=ledger.device) > 0]
    w = [_randn(ledger, *m.shape) * m for m in masks]
    exact = [torch.nn.Parameter(t.double()) for t in w]
    start = [t.clone() for t in w]
    first, second = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in w] if optimizer != "sgd" else []
    copies = [t.bfloat16() for t in w]
    bits = [pack(masks[0]), pack(masks[1]), torch.empty(0, dtype=torch.int32, device=ledger.device)]
    settings = masked_step.step_settings(lr, weight_decay=1e-2, momentum=0.9, device=ledger.device)
    theirs: torch.optim.Optimizer = torch.optim.SGD(exact, lr, 0.9, weight_decay=1e-2, nesterov=True)
    if optimizer != "sgd":
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
        theirs = kind(exact, lr, weight_decay=1e-2)
    histogram = torch.zeros(2048, dtype=torch.int32, device=ledger.device)
    for step in range(steps):
        grads = [torch.where(m, _randn(ledger, *m.shape, seed=step), torch.nan) for m in masks]
        for p, g, m in zip(exact, grads, masks, strict=True):
            p.grad = torch.where(m, g.double(), 0.0)
        theirs.step()
        histogram.zero_()
        table = masked_step.step_table(w, grads, first, second, copies, bits)
        masked_step.masked_step(w, grads, first, second, copies, bits, settings, histogram, *table, optimizer, True)
    # where SGD's gradients go up to 5, one step moves a weight by 0.5
    errors = [(a - b.detach()).abs() / (s.abs() + 5 * lr) for a, b, s in zip(w, exact, start, strict=True)]
    worst = _largest(*(float(e.max()) for e in errors))
    ledger.check(f"masked_step {optimizer}", worst, 4e-6)
    kept = [t.view(torch.int32)[~m] for group in (w, first, second) for t, m in zip(group, masks, strict=False)]
    ledger.check(f"masked_step {optimizer}: bits left at pruned weights", float(sum((t != 0).sum() for t in kept)), 0)
    wrong = sum(int((c != t.bfloat16()).sum()) for c, t in zip(copies, w, strict=True))
    digits = torch.cat([kth_magnitude.first_digit(t.view(torch.int32)[m]) for t, m in zip(w[:2], masks, strict=False)])
    wrong += int((torch.bincount(digits, minlength=2048) != histogram).sum())
    ledger.check(f"masked_step {optimizer}: wrong copies and counts", wrong, 0)


def _check_selection(ledger: Ledger, values: str) -> None:
    weights = [_randn(ledger, 300, 784), _randn(ledger, 32, 3, 3, 48)]
    if values == "ties":
        weights = [(4 * w).round() / 4 for w in weights]
    elif values == "denormal":
        weights = [w * 1e-40 for w in weights]
    ours = [pack(_mask(ledger, *w.shape, density=0.7)) for w in weights]
    theirs = [b.cpu() for b in ours]
    rest = (50_000, [3, 0], 7, (2**32 - 1, 5))
    kth_magnitude.prune_lowest(weights, ours, *rest)
    kth_magnitude.prune_lowest([w.cpu() for w in weights], theirs, *rest)
    different = sum(int((a.cpu() != b).sum()) for a, b in zip(ours, theirs, strict=True))
    ledger.check(f"prune_lowest {values}: words unlike the CPU's", different, 0)


def _check_batch(ledger: Ledger, augment: str) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8, generator=generator)
    rows, labels = torch.randint(0, 500, (128,), generator=generator), torch.arange(500)
    tensors = (pixels, labels, rows, torch.randn(3, 256, generator=generator), torch.tensor(9), torch.tensor(49_920))
    there = [t.to(ledger.device) for t in tensors]
    for dtype in (torch.float32, torch.bfloat16):
        rest = ((2**32 - 1, 5), augment, dtype)
        (a, la), (b, lb) = batch.assemble_batch(*there, *rest), batch.assemble_batch(*tensors, *rest)
        different = float((a.cpu() != b).sum() + (la.cpu() != lb).sum())
        ledger.check(f"assemble_batch {augment} {dtype}: values unlike the CPU's", different, 0)


def _excess(found: Tensor, exact: Tensor, size: Tensor, terms: int) -> float:
    """Largest error in units of what ``terms`` fp32 additions and one rounding may do (Higham 2002, section 3.1)."""
    found = found.detach()
    half_unit = torch.finfo(found.dtype).eps / 2 if found.dtype != torch.float32 else 0.0
    bound = 1.01 * half_unit * exact.abs() + 2 * (terms + 2) * EPS32 * size + torch.finfo(found.dtype).smallest_normal
    return float(((found.double() - exact).abs() / bound).max())


def _largest(*values: float) -> float:
    """Unlike max(), NaN if one of them is."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _check_linear(ledger: Ledger, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    replicates, images, outputs, inputs = size
    mask = _mask(ledger, replicates, outputs, inputs)
    w = torch.where(mask, _randn(ledger, replicates, outputs, inputs), torch.nan).requires_grad_()
    x = _randn(ledger, replicates, images, inputs).to(dtype).requires_grad_()
    dy = _randn(ledger, replicates, images, outputs).to(dtype)
    y = masked_linear.masked_linear(x, w, pack(mask), None, True)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    own, x64 = torch.where(mask, w.detach(), 0.0).to(dtype).double(), x.detach().double()
    g = torch.where(y > 0, dy, 0.0).double()
    worst = _largest(
        _excess(y, (x64 @ own.mT).relu(), x64.abs() @ own.abs().mT, inputs),
        _excess(dx, g @ own, g.abs() @ own.abs(), outputs),
        _excess(dw, torch.where(mask, g.mT @ x64, 0.0), g.abs().mT @ x64.abs(), images),
    )  # fmt: skip
    name = f"masked_linear {'x'.join(map(str, size))} {dtype}"
    ledger.check(name, worst, 1.0)
    ledger.check(f"{name}: dw where pruned", float((dw[~mask] != 0).sum()), 0)


def _check_conv(ledger: Ledger, size: tuple[int, int, int, int], taps: int, stride: int, dtype: torch.dtype) -> None:
    images, inputs, pixels, outputs = size
    mask = _mask(ledger, outputs, inputs, taps, taps)
    bits = pack(mask.permute(0, 2, 3, 1))
    raw = torch.where(mask, _randn(ledger, outputs, inputs, taps, taps), torch.nan)
    w = raw.clone(memory_format=torch.channels_last).requires_grad_()
    x = _randn(ledger, images, inputs, pixels, pixels).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    own, pad = torch.where(mask, raw, 0.0).to(dtype).double(), taps // 2

    def gradients(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        return torch.autograd.grad(F.conv2d(x, w, None, stride, pad), (x, w), dy)

    for deterministic in (True, False):
        y = masked_conv.masked_conv2d(x, w, bits, None, stride, pad, deterministic)
        dy = _randn(ledger, *y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        x64, d64 = x.detach().double(), dy.double()
        exact, large = gradients(x64, own, d64), gradients(x64.abs(), own.abs(), d64.abs())
        worst = _largest(
            _excess(y, F.conv2d(x64, own, None, stride, pad), F.conv2d(x64.abs(), own.abs(), None, stride, pad),
                    inputs * taps * taps),
            _excess(dx, exact[0], large[0], outputs * taps * taps),
            _excess(dw, torch.where(mask, exact[1], 0.0), large[1], dy[:, 0].numel()),
        )  # fmt: skip
        how = "in order" if deterministic else "atomic"
        ledger.check(f"masked_conv2d {taps}x{taps} stride {stride} {how} {dtype}", worst, 1.0)


# Times


def times(ledger: Ledger) -> None:
    """The short subjects first, then layer by layer, then what has to be compiled."""
    bandwidth = _copy(ledger)
    for optimizer in ("sgd", "adam"):
        _step(ledger, optimizer, bandwidth)
    _selection(ledger)
    _batches(ledger)
    _replicates(ledger)
    for compiled in (False, True):
        for size in (4,) if ledger.dry else BATCHES:
            _layers(ledger, size, compiled)


def _copy(ledger: Ledger) -> float:
    """GB/s of a large copy, read and written: what the bytes of the others are held against."""
    source = torch.empty(1 << (12 if ledger.dry else 28), dtype=torch.uint8, device=ledger.device)
    target = torch.empty_like(source)
    took = ledger.compare({"subject": "copy"}, {"library": lambda: target.copy_(source)}, bytes=2 * source.numel())
    return 2 * source.numel() / took["library"] / 1000 if took else 0.0


def _vgg_shapes(dry: bool) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for inputs, outputs, _, times_ in VGG19:
        shapes += [(outputs, 3, 3, inputs)] * times_
    shapes.append((10, 512))
    return shapes[:2] if dry else shapes


def _step(ledger: Ledger, optimizer: str, bandwidth: float) -> None:
    w = [_randn(ledger, *shape) for shape in _vgg_shapes(ledger.dry)]
    masks = [_mask(ledger, *t.shape) for t in w]
    bits, grads = [pack(m) for m in masks], [torch.randn_like(t) for t in w]
    first, second = ([torch.zeros_like(t) for t in w] for _ in range(2))
    copies = [t.bfloat16() for t in w]
    settings = masked_step.step_settings(1e-3, momentum=0.9, weight_decay=1e-4, device=ledger.device)
    group = (w, grads, first, second if optimizer != "sgd" else [], copies, bits)
    table = masked_step.step_table(*group)
    theirs = _Eager(w, grads, masks, optimizer)
    variants: dict[str, Call] = {
        "ours": lambda: masked_step.masked_step(*group, settings, None, *table, optimizer),
        "naive": lambda: theirs.step(fused=False), "library": lambda: theirs.step(fused=True),
    }  # fmt: skip
    moved = masked_step.step_bytes(sum(t.numel() for t in w), optimizer, momentum=True, copy=True)
    floor = moved / bandwidth / 1000 if bandwidth else None
    ledger.compare({"subject": "masked_step", "layer": f"vgg19 {optimizer}"}, variants,
                    bytes=moved, microseconds_at_copy_bandwidth=floor)  # fmt: skip


class _Eager:
    """The usual way: mask the gradients, torch.optim, mask the weights, copy to bf16."""

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], masks: Sequence[Tensor], kind: str) -> None:
        self.weights = [torch.nn.Parameter(t.clone()) for t in weights]
        self.masks, self.grads = masks, grads
        self.copies = [t.bfloat16() for t in weights]
        make: Any = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
        rest = {"momentum": 0.9} if kind == "sgd" else {"capturable": weights[0].is_cuda}
        self.plain = make(self.weights, 1e-3, weight_decay=1e-4, foreach=False, **rest)
        self.fused = make(self.weights, 1e-3, weight_decay=1e-4, fused=True, **rest)

    @torch.no_grad()
    def step(self, fused: bool) -> None:
        for p, g, m in zip(self.weights, self.grads, self.masks, strict=True):
            p.grad = g * m
        (self.fused if fused else self.plain).step()
        for p, m, c in zip(self.weights, self.masks, self.copies, strict=True):
            if not fused:
                p.mul_(m)
            c.copy_(p)


def _selection(ledger: Ledger) -> None:
    weights = [_randn(ledger, *s) for s in _vgg_shapes(ledger.dry)]
    bits = [pack(_mask(ledger, *w.shape, density=0.8)) for w in weights]
    masks = [unpack(b, w.shape[-1]) for w, b in zip(weights, bits, strict=True)]
    numbers = list(range(len(weights)))
    kept = sum(int(m.sum()) for m in masks)

    def library() -> list[Tensor]:
        values = torch.cat([w[m].abs() for w, m in zip(weights, masks, strict=True)])
        threshold = values.kthvalue(kept // 5).values
        return [m & (w.abs() > threshold) for w, m in zip(weights, masks, strict=True)]

    def ours() -> None:
        kth_magnitude.prune_lowest(weights, [b.clone() for b in bits], kept // 5, numbers, 1, (1, 2))

    moved = kth_magnitude.prune_bytes(sum(w.numel() for w in weights))
    ledger.compare({"subject": "prune_lowest", "layer": "vgg19"}, {"ours": ours, "library": library}, graph=False,
                    bytes=moved)  # fmt: skip


def _batches(ledger: Ledger) -> None:
    images = 100 if ledger.dry else 50_000
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8).to(ledger.device)
    labels, table = torch.arange(images, device=ledger.device), _randn(ledger, 3, 256)
    zero = torch.zeros((), dtype=torch.int64, device=ledger.device)
    for size in (4,) if ledger.dry else BATCHES:
        rows = torch.randperm(images)[:size].to(ledger.device)
        given = (pixels, labels, rows, table, zero, zero, (1, 2), "flip-crop", torch.bfloat16)
        variants: dict[str, Call] = {
            "ours": lambda given=given: batch.assemble_batch(*given),
            "naive": lambda given=given: batch._reference(*given),
        }
        ledger.compare({"subject": "assemble_batch", "layer": "cifar-10", "batch": size}, variants,
                        bytes=batch.batch_bytes(size, (32, 32, 3), 2))  # fmt: skip


def _layers(ledger: Ledger, size: int, compiled: bool) -> None:
    """Forward, and forward with both gradients, of every different layer; bf16."""
    for name, x, w, mask, library, ours, reference in _problems(ledger, size):
        premasked = (w * mask).detach().requires_grad_()
        weight = w.detach().requires_grad_()
        images = x.detach().requires_grad_()
        calls = {
            "ours": (ours, weight), "library": (library, premasked),
            "naive": (lambda x, w, m=mask, f=library: f(x, w * m), weight),
        }  # fmt: skip
        if compiled:
            if ledger.dry or ledger.time_left() < 20:
                ledger.left_out.append(f"{name} batch {size} compiled")
                continue
            torch._dynamo.reset()
            calls = {"ours": (ours, weight), "compiled": (torch.compile(reference, dynamic=False), weight)}
        dy = torch.randn_like(library(x, premasked))
        where = {"subject": "layer", "layer": name, "batch": size}
        ledger.compare({**where, "role": "forward"}, {n: _forward(f, x, v) for n, (f, v) in calls.items()})
        ledger.compare({**where, "role": "forward and backward"},
                        {n: _both(f, images, v, dy) for n, (f, v) in calls.items()})  # fmt: skip


def _forward(f: Any, x: Tensor, w: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return f(x, w)

    return call


def _both(f: Any, x: Tensor, w: Tensor, dy: Tensor) -> Call:
    return lambda: torch.autograd.grad(f(x, w), (x, w), dy)


def _problems(ledger: Ledger, size: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Any, Any, Any]]:
    """Name, x, w and its mask as tensors of the op, and three ways: f(x, w)."""
    for inputs, outputs, pixels, _ in VGG19[:1] if ledger.dry else VGG19:
        mask = _mask(ledger, outputs, inputs, 3, 3).contiguous(memory_format=torch.channels_last)
        bits = pack(mask.permute(0, 2, 3, 1))
        x, w = (
            _randn(ledger, *shape).bfloat16().contiguous(memory_format=torch.channels_last)
            for shape in ((size, inputs, pixels, pixels), (outputs, inputs, 3, 3))
        )
        yield (
            f"vgg19 {inputs}->{outputs} at {pixels}x{pixels}", x, w, mask, lambda x, w: F.conv2d(x, w, None, 1, 1),
            lambda x, w, b=bits: masked_conv.masked_conv2d(x, w, b, None, 1, 1),
            lambda x, w, b=bits: masked_conv.reference(x, w, b, None, 1, 1),
        )  # fmt: skip
    for inputs, outputs in LENET[:1] if ledger.dry else LENET:
        mask = _mask(ledger, 1, outputs, inputs)
        bits = pack(mask)
        yield (
            f"lenet {inputs}->{outputs}", _randn(ledger, 1, size, inputs).bfloat16(),
            _randn(ledger, 1, outputs, inputs).bfloat16(), mask, lambda x, w: F.linear(x[0], w[0])[None],
            lambda x, w, b=bits: masked_linear.masked_linear(x, w, b),
            lambda x, w, b=bits: masked_linear.reference(x, w, b),
        )  # fmt: skip


def _replicates(ledger: Ledger) -> None:
    """A training step of R LeNets at batch 60 in bf16: all in one call, against one dense LeNet's step R times."""
    from benchmarks.gpu_replicates import Dense, Replicates

    for count in (2,) if ledger.dry else (1, 8, 32, 128):
        ours, dense = Replicates(ledger.device, count), Dense(ledger.device)
        took = ledger.compare({"subject": "replicates", "layer": f"lenet x{count}"},
                               {"ours": ours.step, "one alone": dense.step}, replicates=count)  # fmt: skip
        if len(took) == 2:
            ledger.rows[-1]["throughput_ratio"] = count * took["one alone"] / took["ours"]
