"""Settings of the machine, of which some may change low bits of a result, and of the disk, which change none."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import inf

from fastlth.recipe.checks import check, choice


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeSection:
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    precision: str = "auto"
    """auto, fp32 or bf16 (autocast; weights and updates stay fp32)"""
    compile: str = "auto"
    """auto, on or off: torch.compile of the forward and backward pass"""
    channels_last: str = "auto"
    """auto, on or off"""
    loader: str = "auto"
    """auto, resident (the set lives on the device) or ffcv (streamed); pillow decodes for augment photo-crop without
    FFCV"""
    engine: str = "auto"
    """auto, dense (any net, any device), sparse (fully connected nets on a CPU: cost falls with density) or graph (any
    net on CUDA: the whole step is one captured graph)"""
    kernels: str = "auto"
    """torch (PyTorch's layers), triton (masked kernels, CUDA only) or auto: torch until measured otherwise"""
    threads: int = 0
    """CPU threads; 0: as many as torch finds, or as measured fastest"""
    break_even: float = -1.0
    """density at or below which the sparse engine runs a layer from its kept weights alone; -1: measured"""
    deterministic: bool = False
    """on CUDA: only algorithms that give the same bits every time, which are slower (a CPU always gives them)"""
    shifted: tuple[str, ...] = ("auto",)
    """gradients of convolutions made by shifted matrix products on a CPU, such as conv13.weight and conv13.input;
    auto: those that measure faster"""
    compact: float = -1.0
    """share of a net's multiplications at or below which the graph engine trains a round as the smaller net without
    units that it does not need; 0: never; -1: measured on CUDA, else never"""
    together: str = "auto"
    """how the graph engine trains replicates: batched (as one net), streams (side by side in one graph), alone (one
    after the other; on a CPU of any engine) or auto: measured on CUDA, else batched where it can be"""
    kept: dict[str, float] = field(default_factory=dict, hash=False)
    """layer -> density at or below which the dense engine runs it from its kept weights alone on a CPU (fc1 = 0.3);
    empty with engine auto: measured"""

    def __post_init__(self) -> None:
        check("compute.device", re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None,
               "be auto, cpu, cuda, cuda:N or mps", self.device)  # fmt: skip
        choice("compute.precision", self.precision, ("auto", "fp32", "bf16"))
        choice("compute.compile", self.compile, ("auto", "on", "off"))
        choice("compute.channels_last", self.channels_last, ("auto", "on", "off"))
        choice("compute.loader", self.loader, ("auto", "resident", "ffcv", "pillow"))
        choice("compute.engine", self.engine, ("auto", "dense", "sparse", "graph"))
        check("compute.break_even", self.break_even == -1 or 0 <= self.break_even <= 1,
               "be in 0 to 1, or -1 to have it measured", self.break_even)  # fmt: skip
        check("compute.compact", self.compact == -1 or 0 <= self.compact <= 1,
               "be in 0 to 1, or -1 to have it measured", self.compact)  # fmt: skip
        choice("compute.together", self.together, ("auto", "alone", "batched", "streams"))
        choice("compute.kernels", self.kernels, ("auto", "torch", "triton"))
        check("compute.threads", 0 <= self.threads <= 4096, "be in 0 to 4096", self.threads)
        object.__setattr__(self, "shifted", tuple(self.shifted))  # read back as a list
        check("compute.shifted", "auto" not in self.shifted or self.shifted == ("auto",),
               "be auto alone or name gradients", list(self.shifted))  # fmt: skip
        for layer, limit in self.kept.items():
            check(f"compute.kept.{layer}", 0 <= limit <= 1, "be a density in 0 to 1", limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSection:
    """What is kept on disk; nothing here changes a result, so nothing here is in the digest."""

    save_every: float = 60.0
    """seconds between saves inside a round"""
    theta0: str = "stored"
    """stored, or seed: the ticket holds hashes of theta0, which is made again from the seed when it is read"""

    keep_weights: str = "none"
    """none, last or all: whether trained weights stay on disk (survivors only)"""

    def __post_init__(self) -> None:
        choice("store.keep_weights", self.keep_weights, ("none", "last", "all"))
        choice("store.theta0", self.theta0, ("stored", "seed"))
        check("store.save_every", 0 < self.save_every < inf, "be greater than 0", self.save_every)
