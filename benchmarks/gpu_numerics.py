"""What ``benchmarks.gpu kernels`` checks before it times anything: every public op on the device, against float64, or
against the same op on the CPU where bits must agree."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from fastlth_kernels import batch, kth_magnitude, masked_conv, masked_linear, masked_step
from fastlth_kernels.bitmask import pack, unpack
from torch import Tensor

from benchmarks.gpu import Ledger

EPS32 = torch.finfo(torch.float32).eps


def randn(ledger: Ledger, *shape: int, seed: int = 0) -> Tensor:
    """Drawn on the CPU, so that every machine sees the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(ledger.device)


def random_mask(ledger: Ledger, *shape: int, density: float = 0.2) -> Tensor:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (drawn < density).to(ledger.device)


def numerics(ledger: Ledger) -> None:
    """All checks; one that cannot be made (a kernel that does not compile, say) is one that failed."""
    ledger.attempt("bits", partial(_check_bits, ledger))
    for optimizer in ("sgd", "adam", "adamw"):
        ledger.attempt(f"masked_step {optimizer}", partial(_check_step, ledger, optimizer))
    for values in ("normal", "ties", "denormal"):
        ledger.attempt(f"prune_lowest {values}", partial(_check_selection, ledger, values))
    ledger.attempt("prune_lowest in two threads", partial(_check_threads, ledger))
    for augment in batch.AUGMENTS:
        ledger.attempt(f"assemble_batch {augment}", partial(_check_batch, ledger, augment))
    sizes, images = [(1, 5, 33, 65)], [(2, 20, 9, 40)]
    if not ledger.dry:  # rows that divide by 16 and others, and enough of both for the large tiles
        sizes += [(2, 60, 300, 784), (1, 512, 512, 512), (8, 512, 512, 512)]
        images = [(16, 96, 15, 130), (16, 3, 15, 64), (32, 256, 16, 256)]
    # torch's own fp16 convolution on a CPU is further off than any kernel may be
    for dtype in (torch.float32, torch.bfloat16) if ledger.dry else (torch.float32, torch.bfloat16, torch.float16):
        for size in sizes:
            ledger.attempt(f"masked_linear {size} {dtype}", partial(_check_linear, ledger, size, dtype))
        size = sizes[0] if ledger.dry else sizes[1]
        for decoupled in (False, True):
            ledger.attempt(f"masked_linear_adam {size} {dtype}", partial(_check_adam, ledger, size, dtype, decoupled))
        for taps, stride in ((3, 1), (3, 2), (1, 1), (1, 2)):
            for image in images:
                ledger.attempt(f"masked_conv2d {image} {taps}x{taps} stride {stride} {dtype}",
                               partial(_check_conv, ledger, image, taps, stride, dtype))  # fmt: skip


def _check_bits(ledger: Ledger) -> None:
    mask = random_mask(ledger, 7, 100)
    ledger.check("bits", float((unpack(pack(mask), 100) != mask).sum()), 0)


def _check_step(ledger: Ledger, optimizer: str) -> None:
    lr, steps = 0.1, 3
    shapes = [(300, 784), (64, 3, 3, 64), (10,)]
    masks = [random_mask(ledger, *s, density=0.5) for s in shapes[:2]] + [torch.ones(10, device=ledger.device) > 0]
    w = [randn(ledger, *m.shape) * m for m in masks]
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
        grads = [torch.where(m, randn(ledger, *m.shape, seed=step), torch.nan) for m in masks]
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
    weights = [randn(ledger, 300, 784), randn(ledger, 32, 3, 3, 48)]
    if values == "ties":
        weights = [(4 * w).round() / 4 for w in weights]
    elif values == "denormal":
        weights = [w * 1e-40 for w in weights]
    ours = [pack(random_mask(ledger, *w.shape, density=0.7)) for w in weights]
    theirs = [b.cpu() for b in ours]
    rest = (50_000, [3, 0], 7, (2**32 - 1, 5))
    on_cpu = [w.cpu() for w in weights]
    found, wanted = (kth_magnitude.kth_magnitude(w, b, rest[0]) for w, b in ((weights, ours), (on_cpu, theirs)))
    ledger.check(f"kth_magnitude {values}: unlike the CPU's", float(found.cpu() != wanted), 0)
    kth_magnitude.prune_lowest(weights, ours, *rest)
    kth_magnitude.prune_lowest(on_cpu, theirs, *rest)
    different = sum(int((a.cpu() != b).sum()) for a, b in zip(ours, theirs, strict=True))
    ledger.check(f"prune_lowest {values}: words unlike the CPU's", different, 0)


def _check_threads(ledger: Ledger) -> None:
    """As replicates do it: two threads prune at once, at a width for which nothing is compiled yet, and each gets what
    one alone gets."""

    def pruned(seed: int) -> Tensor:
        w, bits = randn(ledger, 300, 99, seed=seed).round(), pack(random_mask(ledger, 300, 99, density=0.7))
        kth_magnitude.prune_lowest([w], [bits], 5_000, [0], 1, (1, 2))
        return bits

    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(pruned, (0, 1)))
    alone = [pruned(seed) for seed in (0, 1)]
    different = sum(int((a != b).sum()) for a, b in zip(alone, together, strict=True))
    ledger.check("prune_lowest in two threads: words unlike one's", different, 0)


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
    mask = random_mask(ledger, replicates, outputs, inputs)
    w = torch.where(mask, randn(ledger, replicates, outputs, inputs), torch.nan).requires_grad_()
    x = randn(ledger, replicates, images, inputs).to(dtype).requires_grad_()
    dy = randn(ledger, replicates, images, outputs).to(dtype)
    # the reference, which a dry run judges, rounds before and after it adds a bias
    bias = randn(ledger, replicates, outputs).requires_grad_() if dtype == torch.float32 else None
    y = masked_linear.masked_linear(x, w, pack(mask), bias, True)
    dx, dw, *db = torch.autograd.grad(y, (x, w) if bias is None else (x, w, bias), dy)
    b = w.new_zeros(replicates, 1, 1).double() if bias is None else bias.detach().double()[:, None]
    own, x64 = torch.where(mask, w.detach(), 0.0).to(dtype).double(), x.detach().double()
    g = torch.where(y > 0, dy, 0.0).double()
    worst = _largest(
        _excess(y, (x64 @ own.mT + b).relu(), x64.abs() @ own.abs().mT + b.abs(), inputs + 1),
        _excess(dx, g @ own, g.abs() @ own.abs(), outputs),
        _excess(dw, torch.where(mask, g.mT @ x64, 0.0), g.abs().mT @ x64.abs(), images),
        *(_excess(found, g.sum(1), g.abs().sum(1), images) for found in db),
    )  # fmt: skip
    name = f"masked_linear {'x'.join(map(str, size))} {dtype}"
    ledger.check(name, worst, 1.0)
    ledger.check(f"{name}: dw where pruned", float((dw[~mask] != 0).sum()), 0)


def _check_adam(ledger: Ledger, size: tuple[int, int, int, int], dtype: torch.dtype, decoupled: bool) -> None:
    """Three updates in the weight gradient's epilogue against torch.optim in float64; one pruned input is NaN."""
    replicates, images, outputs, inputs = size
    mask = random_mask(ledger, replicates, outputs, inputs)
    mask[:, :, 1] = False
    start = [randn(ledger, replicates, outputs, inputs) * mask, randn(ledger, replicates, outputs)]
    ours, exact = [t.clone() for t in start], [torch.nn.Parameter(t.double()) for t in start]
    moments = [torch.zeros_like(t) for t in (ours[0], ours[0], ours[1], ours[1])]
    # a large eps: without it what rounding leaves of a cancelled gradient would be a whole step
    settings = masked_step.step_settings(0.01, weight_decay=0.1, eps=0.1, device=ledger.device)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs: torch.optim.Optimizer = kind(exact, 0.01, eps=0.1, weight_decay=0.1)
    for step in range(3):
        x, dy, y = (randn(ledger, replicates, images, n, seed=10 * step + i).to(dtype)
                    for i, n in enumerate((inputs, outputs, outputs)))  # fmt: skip
        g = torch.where(y > 0, dy, 0.0).double()
        exact[0].grad, exact[1].grad = torch.where(mask, g.mT @ x.double(), 0.0), g.sum(1)
        theirs.step()
        x[:, :, 1] = torch.nan
        settings[masked_step.STEPS] += 1
        masked_linear.masked_linear_adam(dy, y.relu(), x, pack(mask), ours[0], *moments[:2], ours[1], *moments[2:],
                                         settings, decoupled)  # fmt: skip
    worst = _largest(*(float((a - b.detach()).norm() / (s - b.detach()).norm())
                       for a, b, s in zip(ours, exact, start, strict=True)))  # fmt: skip
    name = f"masked_linear_adam{' decoupled' if decoupled else ''} {dtype}"
    ledger.check(name, worst, 1e-5)
    left = sum(int((t.view(torch.int32)[~mask] != 0).sum()) for t in (ours[0], *moments[:2]))
    ledger.check(f"{name}: bits left at pruned weights", left, 0)


def _check_conv(ledger: Ledger, size: tuple[int, int, int, int], taps: int, stride: int, dtype: torch.dtype) -> None:
    images, inputs, pixels, outputs = size
    mask = random_mask(ledger, outputs, inputs, taps, taps)
    bits = pack(mask.permute(0, 2, 3, 1))
    raw = torch.where(mask, randn(ledger, outputs, inputs, taps, taps), torch.nan)
    w = raw.clone(memory_format=torch.channels_last).requires_grad_()
    x = randn(ledger, images, inputs, pixels, pixels).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    own, pad = torch.where(mask, raw, 0.0).to(dtype).double(), taps // 2

    def gradients(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        return torch.autograd.grad(F.conv2d(x, w, None, stride, pad), (x, w), dy)

    bias = randn(ledger, outputs) if dtype == torch.float32 else None  # as for masked_linear
    b = own.new_zeros(outputs, 1, 1) if bias is None else bias.double()[:, None, None]
    for deterministic in (True, False):
        y = masked_conv.masked_conv2d(x, w, bits, bias, stride, pad, deterministic)
        dy = randn(ledger, *y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        x64, d64 = x.detach().double(), dy.double()
        exact, large = gradients(x64, own, d64), gradients(x64.abs(), own.abs(), d64.abs())
        worst = _largest(
            _excess(y, F.conv2d(x64, own, None, stride, pad) + b,
                    F.conv2d(x64.abs(), own.abs(), None, stride, pad) + b.abs(), inputs * taps * taps + 1),
            _excess(dx, exact[0], large[0], outputs * taps * taps),
            _excess(dw, torch.where(mask, exact[1], 0.0), large[1], dy[:, 0].numel()),
        )  # fmt: skip
        how = "in order" if deterministic else "atomic"
        shape = "x".join(map(str, size))
        ledger.check(f"masked_conv2d {shape} {taps}x{taps} stride {stride} {how} {dtype}", worst, 1.0)
