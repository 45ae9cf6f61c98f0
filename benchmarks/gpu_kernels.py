"""What ``benchmarks.gpu kernels`` times; ``ledger.compare`` times variants in turns.

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
from benchmarks.gpu_numerics import randn, random_mask

# In channels, out channels, rows and columns of the image: VGG-19's different convolutions, and how often each occurs.
VGG19 = [
    (3, 64, 32, 1), (64, 64, 32, 1), (64, 128, 16, 1), (128, 128, 16, 1), (128, 256, 8, 1), (256, 256, 8, 3),
    (256, 512, 4, 1), (512, 512, 4, 3), (512, 512, 2, 4),
]  # fmt: skip
LENET = [(784, 300), (300, 100), (100, 10)]
BATCHES = (64, 128, 512)


def times(ledger: Ledger) -> None:
    """The short subjects first, then layer by layer, then what has to be compiled. Wrong kernels are not timed."""
    bandwidth = _copy(ledger)
    if ledger.right("masked_step"):
        for optimizer in ("sgd", "adam"):
            _step(ledger, optimizer, bandwidth)
    if ledger.right("kth_magnitude", "prune_lowest"):
        _selection(ledger)
    if ledger.right("assemble_batch"):
        _batches(ledger)
    if ledger.right("masked_linear"):
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
    w = [randn(ledger, *shape) for shape in _vgg_shapes(ledger.dry)]
    masks = [random_mask(ledger, *t.shape) for t in w]
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
    weights = [randn(ledger, *s) for s in _vgg_shapes(ledger.dry)]
    bits = [pack(random_mask(ledger, *w.shape, density=0.8)) for w in weights]
    masks = [unpack(b, w.shape[-1]) for w, b in zip(weights, bits, strict=True)]
    numbers = list(range(len(weights)))
    kept = sum(int(m.sum()) for m in masks)

    def library(sort: bool) -> list[Tensor]:
        values = torch.cat([w[m].abs() for w, m in zip(weights, masks, strict=True)])
        threshold = values.sort().values[kept // 5 - 1] if sort else values.kthvalue(kept // 5).values
        return [m & (w.abs() > threshold) for w, m in zip(weights, masks, strict=True)]

    def ours() -> None:
        kth_magnitude.prune_lowest(weights, [b.clone() for b in bits], kept // 5, numbers, 1, (1, 2))

    moved = kth_magnitude.prune_bytes(sum(w.numel() for w in weights))
    variants = {"ours": ours, "library": lambda: library(sort=False), "sort": lambda: library(sort=True)}
    ledger.compare({"subject": "prune_lowest", "layer": "vgg19"}, variants, graph=False, bytes=moved)


def _batches(ledger: Ledger) -> None:
    images = 100 if ledger.dry else 50_000
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8).to(ledger.device)
    labels, table = torch.arange(images, device=ledger.device), randn(ledger, 3, 256)
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
    layers = VGG19[:1] if ledger.dry else VGG19
    for inputs, outputs, pixels, _ in layers if ledger.right("masked_conv2d") else ():
        mask = random_mask(ledger, outputs, inputs, 3, 3).contiguous(memory_format=torch.channels_last)
        bits = pack(mask.permute(0, 2, 3, 1))
        x, w = (
            randn(ledger, *shape).bfloat16().contiguous(memory_format=torch.channels_last)
            for shape in ((size, inputs, pixels, pixels), (outputs, inputs, 3, 3))
        )
        yield (
            f"vgg19 {inputs}->{outputs} at {pixels}x{pixels}", x, w, mask, lambda x, w: F.conv2d(x, w, None, 1, 1),
            lambda x, w, b=bits: masked_conv.masked_conv2d(x, w, b, None, 1, 1),
            lambda x, w, b=bits: masked_conv.reference(x, w, b, None, 1, 1),
        )  # fmt: skip
    fully_connected = LENET[:1] if ledger.dry else LENET
    for inputs, outputs in fully_connected if ledger.right("masked_linear") else ():
        mask = random_mask(ledger, 1, outputs, inputs)
        bits = pack(mask)
        yield (
            f"lenet {inputs}->{outputs}", randn(ledger, 1, size, inputs).bfloat16(),
            randn(ledger, 1, outputs, inputs).bfloat16(), mask,
            lambda x, w: F.linear(x.squeeze(0), w.squeeze(0)).unsqueeze(0),
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
