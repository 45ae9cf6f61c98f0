"""Random small cases for the kernels, and what each must equal. A few run in the ordinary suite, thousands in the
endurance suite. The kernel itself is launched, never the public op: on a CPU that one runs the reference, and a wrong
kernel would pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fastlth_kernels import batch, kth_magnitude, masked_step
from fastlth_kernels.bitmask import pack, unpack
from hypothesis import strategies as st
from torch import Tensor

from fastlth.data.augment import AUGMENT
from fastlth.data.normalise import normalise
from fastlth.pruning.select import remove_lowest
from tests.helpers import bits

SEED = st.integers(0, 2**32 - 1)
# Sizes around the words of a mask. Small: a program of a kernel takes the interpreter milliseconds.
ROW = st.sampled_from([1, 2, 31, 32, 33, 64, 65, 96, 127])
SHAPE = st.one_of(
    st.tuples(ROW), st.tuples(st.integers(1, 4), ROW), st.tuples(st.integers(1, 2), st.just(3), st.just(2), ROW)
)
DENSITY = st.sampled_from([0.0, 0.02, 0.5, 1.0])
KEY = st.tuples(st.sampled_from([0, 1, 7, 2**31, 2**32 - 1]), SEED)


def random_mask(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < density


# bits


def check_bits(shape: tuple[int, ...], density: float, seed: int) -> None:
    mask = random_mask(shape, density, torch.Generator().manual_seed(seed))
    words = pack(mask)
    assert words.dtype == torch.int32 and words.shape == (*shape[:-1], -(-shape[-1] // 32))
    padded = np.zeros((*shape[:-1], 32 * words.shape[-1]), dtype=bool)
    padded[..., : shape[-1]] = mask.numpy()
    assert np.array_equal(words.numpy().view(np.uint8), np.packbits(padded, axis=-1, bitorder="little"))
    assert torch.equal(unpack(words, shape[-1]), mask)


# step


STEP = st.fixed_dictionaries(
    {
        "shapes": st.lists(SHAPE, min_size=1, max_size=3), "density": DENSITY, "seed": SEED,
        "optimizer": st.sampled_from(["sgd", "adam", "adamw"]), "momentum": st.sampled_from([0.0, 0.9]),
        "nesterov": st.booleans(), "weight_decay": st.sampled_from([0.0, 1e-2]), "lr": st.sampled_from([1e-3, 0.1]),
        "bf16_grads": st.booleans(), "copies": st.booleans(), "steps": st.integers(1, 3), "dense": st.booleans(),
    }
)  # fmt: skip


class Stepping:
    """Weights, masks and gradients of a case; ``kernel``, ``reference`` and ``torch_optim`` make its steps."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case["seed"])
        self.masks = [random_mask(s, case["density"], generator) for s in case["shapes"]]
        if case["dense"]:  # the last tensor is a bias: nothing is pruned
            self.masks[-1] = torch.ones(case["shapes"][-1], dtype=torch.bool)
        self.start = [torch.randn(m.shape, generator=generator) * m for m in self.masks]
        self.grads = []
        for _ in range(case["steps"]):
            grads = [torch.randn(m.shape, generator=generator) for m in self.masks]
            if case["bf16_grads"]:
                grads[0] = grads[0].bfloat16()  # and the others fp32, in the same launch
            for g, m in zip(grads, self.masks, strict=True):
                g[~m & (torch.rand(g.shape, generator=generator) < 0.5)] = float("nan")
                g[~m & (torch.rand(g.shape, generator=generator) < 0.2)] = float("-inf")
            self.grads.append(grads)

    def ours(self, kernel: bool) -> dict[str, list[Tensor]]:
        case, empty = self.case, torch.empty(0, dtype=torch.int32)
        w = [t.clone() for t in self.start]
        first = [torch.zeros_like(t) for t in w] if case["optimizer"] != "sgd" or case["momentum"] else []
        second = [torch.zeros_like(t) for t in w] if case["optimizer"] != "sgd" else []
        copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in w] if case["copies"] else []
        words = [pack(m) for m in self.masks]
        if case["dense"]:
            words[-1] = empty
        settings = masked_step.step_settings(case["lr"], weight_decay=case["weight_decay"], momentum=case["momentum"])
        for grads in self.grads:
            histogram = torch.zeros(2048, dtype=torch.int32)
            table = masked_step.step_table(w, grads, first, second, copies, words)
            if kernel:
                settings[masked_step.STEPS] += case["optimizer"] != "sgd"
                masked_step._launch(table, settings, histogram, case["optimizer"], case["nesterov"],
                                    momentum=bool(first), copy=bool(copies))  # fmt: skip
            else:
                masked_step.masked_step(w, grads, first, second, copies, words, settings, histogram, *table,
                                        case["optimizer"], case["nesterov"])  # fmt: skip
        return {"weights": w, "first": first, "second": second, "copies": copies, "histogram": [histogram]}

    def torch_optim(self) -> tuple[list[Tensor], list[dict[str, Tensor]], list[Tensor]]:
        """The same steps by torch.optim on masked gradients in float64: weights, state, and by how many learning rates
        one rounding of ``decay * w`` in fp32 can move each weight. Adam divides by the gradient's size, so that is
        anything up to 1 where decay and gradient nearly cancel."""
        case = self.case
        parameters = [torch.nn.Parameter(t.double()) for t in self.start]
        if case["optimizer"] == "sgd":
            nesterov = case["nesterov"] and case["momentum"] > 0
            optimizer: Any = torch.optim.SGD(parameters, case["lr"], case["momentum"], nesterov=nesterov,
                                             weight_decay=case["weight_decay"])  # fmt: skip
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[case["optimizer"]]
            optimizer = kind(parameters, case["lr"], weight_decay=case["weight_decay"])
        rounded = [torch.zeros_like(t, dtype=torch.float64) for t in self.start]
        moved = [torch.zeros_like(t) for t in rounded]
        for step, grads in enumerate(self.grads, start=1):
            for p, g, m, error in zip(parameters, grads, self.masks, rounded, strict=True):
                p.grad = torch.where(m, g.double(), 0.0)
                error += 2.0**-24 * case["weight_decay"] * p.detach().abs()
            optimizer.step()
            for p, error, move in zip(parameters, rounded, moved, strict=True):
                if case["optimizer"] == "adam":  # AdamW does not add the decay to the gradient, SGD does not divide
                    move += error / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)
        return [p.detach() for p in parameters], [optimizer.state[p] for p in parameters], moved

    def check(self, got: dict[str, list[Tensor]]) -> None:
        case = self.case
        exact, state, moved = self.torch_optim()
        for i, (w, mask) in enumerate(zip(got["weights"], self.masks, strict=True)):
            largest = max(float(torch.where(mask, g[i].double(), 0.0).abs().max()) for g in self.grads)
            reach = largest if case["optimizer"] == "sgd" else 1.0  # of one step, in learning rates
            scale = self.start[i].abs() + case["lr"] * (case["steps"] ** 2 * reach + self.start[i].abs())
            allowed = 2e-6 * scale.double() + 4 * case["lr"] * moved[i]
            assert bool(((w - exact[i]).abs() <= allowed).all()), f"weight {i} of {case}"
            if got["first"]:
                name = "momentum_buffer" if case["optimizer"] == "sgd" else "exp_avg"
                assert_near(got["first"][i], state[i][name], 2e-6 * (largest + 1e-2) * case["steps"])
            if got["second"]:
                assert_near(got["second"][i], state[i]["exp_avg_sq"], 2e-6 * (largest + 1e-2) ** 2 * 1e-3 * 4)
            for group in ("weights", "first", "second"):
                for t in got[group][i : i + 1]:
                    assert int((bits(t)[~mask] != 0).sum()) == 0, f"a pruned entry of {group} {i} is not +0.0: {case}"
            if got["copies"]:
                assert torch.equal(got["copies"][i].view(torch.int16), w.bfloat16().view(torch.int16)), f"copy {i}"
        kept = [w[m] for w, m in zip(got["weights"], self.masks, strict=True)]
        counted = torch.cat(kept[:-1] if case["dense"] else kept) if len(kept) > case["dense"] else torch.empty(0)
        digits = np.abs(counted.numpy()).view(np.uint32) >> 20
        assert np.array_equal(got["histogram"][0].numpy(), np.bincount(digits, minlength=2048)), f"histogram of {case}"


def assert_near(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert float((got - exact).abs().max()) <= tolerance


def check_step(case: dict[str, Any]) -> None:
    stepping = Stepping(case)
    stepping.check(stepping.ours(kernel=True))


# selection


VALUES = st.sampled_from(["normal", "few", "denormal", "equal", "extreme"])
SELECTION = st.fixed_dictionaries(
    {
        "shapes": st.lists(SHAPE, min_size=1, max_size=3), "density": st.sampled_from([0.02, 0.5, 1.0]), "seed": SEED,
        "values": VALUES, "share": st.floats(0, 1), "round": st.integers(1, 254), "key": KEY,
        "first": st.integers(0, 50),
    }
)  # fmt: skip


def random_values(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if kind == "few":
        return (2 * normal).round() / 2  # ties, among them 0.0 and -0.0
    if kind == "denormal":
        return normal * 1e-40
    if kind == "equal":
        return torch.copysign(torch.tensor(0.25), normal)
    if kind == "extreme":
        choice = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, float("inf"), float("-inf")])
        return choice[torch.randint(len(choice), shape, generator=generator)]
    return normal


def check_selection(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = case["shapes"]
    weights = [random_values(s, case["values"], generator) for s in shapes]
    masks = [random_mask(s, case["density"], generator) for s in shapes]
    masks[0].view(-1)[0] = True
    for w, m in zip(weights, masks, strict=True):
        w[~m & (torch.rand(w.shape, generator=generator) < 0.1)] = float("nan")  # a pruned NaN is nobody's business
    names = [str(i) for i in range(len(shapes))]
    numbers = {name: case["first"] + 3 * i for i, name in enumerate(reversed(names))}
    kept = sum(int(m.sum()) for m in masks)
    count = max(1, min(kept, round(case["share"] * kept)))
    # What the search itself does, on tensors as a model has them: OIHW. Sorted as integers, which knows denormals.
    magnitude = {n: w.view(torch.int32) & 0x7FFFFFFF for n, w in zip(names, weights, strict=True)}
    scores = {n: logical(m).double() for n, m in magnitude.items()}
    wanted = remove_lowest(scores, {n: logical(m) for n, m in zip(names, masks, strict=True)}, names, count,
                           numbers=numbers, round=case["round"], key=case["key"])  # fmt: skip
    arguments = (count, [numbers[n] for n in names], case["round"], case["key"])
    ranked = torch.cat([magnitude[n][m] for n, m in zip(names, masks, strict=True)]).sort().values
    kth = int(ranked[count - 1])
    histogram = torch.bincount(ranked >> 20, minlength=2048).to(torch.int32) if case["first"] % 2 else None
    launched, public = ([pack(m) for m in masks] for _ in range(2))
    assert int(kth_magnitude._launch(weights, launched, *arguments, histogram, remove=True)) == kth, case
    assert int(kth_magnitude.kth_magnitude(weights, public, count).view(torch.int32)) == kth, case
    kth_magnitude.prune_lowest(weights, public, *arguments)
    for name, w, a, b in zip(names, weights, launched, public, strict=True):
        assert torch.equal(logical(unpack(a, w.shape[-1])), wanted[name]), f"kernel: {case}"
        assert torch.equal(logical(unpack(b, w.shape[-1])), wanted[name]), f"reference: {case}"


def logical(tensor: Tensor) -> Tensor:
    """OHWI -> OIHW, as a model numbers its weights."""
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


# batch


BATCH = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(32, 32, 3), (28, 28, 1), (8, 8, 1), (5, 7, 3)]), "images": st.integers(1, 20),
        "batch": st.integers(1, 6), "seed": SEED, "key": KEY, "epoch": st.integers(0, 2**20),
        "position": st.integers(0, 2**20), "augment": st.sampled_from(batch.AUGMENTS),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "rows": st.sampled_from([torch.int32, torch.int64]),
    }
).filter(lambda case: case["augment"] != "lecode" or case["shape"][2] == 3)  # fmt: skip


def check_batch(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    height, width, channels = case["shape"]
    pixels = torch.randint(0, 256, (case["images"], height, width, channels), dtype=torch.uint8, generator=generator)
    equal = torch.rand(pixels.shape, generator=generator) < 0.2  # to red: greys, and hues between two sectors
    pixels = torch.where(equal, pixels[..., :1], pixels)
    pixels[:, 0] = 255 * (pixels[:, 0] // 128)
    labels = torch.randint(0, 10, (case["images"],), generator=generator)
    rows = torch.randint(0, case["images"], (case["batch"],), generator=generator).to(case["rows"])
    values = torch.randn(channels, 256, generator=generator)
    epoch, position = torch.tensor(case["epoch"]), torch.tensor(case["position"])
    images = AUGMENT[case["augment"]](pixels[rows].permute(0, 3, 1, 2), epoch, position, case["key"])
    wanted = normalise(images, values, case["dtype"])
    arguments = (pixels, labels, rows, values, epoch, position, case["key"], case["augment"], case["dtype"])
    for run in (batch._launch, batch.assemble_batch):
        out, out_labels = run(*arguments)
        assert out.dtype == wanted.dtype and out.stride() == wanted.stride()
        assert torch.equal(out, wanted), case
        assert torch.equal(out_labels, labels[rows]), case
