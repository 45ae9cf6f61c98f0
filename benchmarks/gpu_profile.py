"""Where the time of one VGG-19 step goes, kernel by kernel and by class, and what a graph saves over launching them."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import Ledger
from benchmarks.gpu_subject import recipe, wait
from fastlth.bench.subject import masks_of_round, random_source
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine

# The first that matches a kernel's name; on a CPU, an operation's.
CLASSES = [
    ("masked step", r"_step_kernel|masked_step"), ("batch", r"_batch_kernel|assemble_batch"),
    ("batch norm", r"batch_?norm|bn_(fw|bw)|welford"), ("pooling", r"pool"),
    ("weight gradients", r"wgrad|backward_filter|dgrad_weight"),
    ("input gradients", r"dgrad|backward_data|bwd_data"),
    ("convolutions", r"conv|fprop|implicit|xmma|cudnn|mkldnn"), ("products", r"gemm|cutlass|addmm|::mm|nvjet"),
    ("loss", r"softmax|nll|cross_entropy|argmax"), ("copies", r"copy|memcpy|memset|fill|zero_"),
    ("pointwise", r"elementwise|triton|relu|threshold|add|mul|where"),
]  # fmt: skip


def measure(ledger: Ledger) -> None:
    model = "conv-2" if ledger.dry else "vgg19"
    for batch in (8,) if ledger.dry else (64, 128, 512):
        for compiled in ("off",) if ledger.dry else ("off", "on"):
            if ledger.has(subject="profile", batch=batch, compile=compiled):
                continue
            if ledger.time_left() < (5 if compiled == "off" else 90):
                ledger.left_out.append(f"profile batch {batch} compile {compiled}")
                continue
            _profile(ledger, model, batch, compiled)


def _profile(ledger: Ledger, model: str, batch: int, compiled: str) -> None:
    one = recipe(ledger, model, "cifar-10", **{"train.batch_size": batch, "compute.compile": compiled})
    engine = make_engine(one, random_source("cifar-10", images=160 if ledger.dry else 20_000))
    assert isinstance(engine, GraphEngine)
    engine.set_masks({n: m.to(ledger.device) for n, m in masks_of_round(one, 5)[0].items()})
    steps = 2 if ledger.dry else 20
    engine.run(0, steps)
    activities = [ProfilerActivity.CPU] if ledger.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        engine.run(0, steps)
        wait(ledger.device)
    found: dict[str, float] = {}
    kernels: list[dict[str, Any]] = []
    for event in seen.key_averages():
        spent = event.self_cpu_time_total if ledger.dry else event.self_device_time_total
        if spent <= 0 or (not ledger.dry and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        name = _class(event.key)
        found[name] = found.get(name, 0.0) + spent / steps
        kernels.append({"kernel": event.key[:120], "class": name, "count": event.count / steps, "us": spent / steps})
    engine.interval()
    began = time.perf_counter()
    engine.run(0, steps)
    wait(ledger.device)
    whole = 1e6 * (time.perf_counter() - began) / steps
    kernels.sort(key=lambda k: -float(k["us"]))
    ledger.row(subject="profile", model=model, batch=batch, compile=compiled, microseconds=whole,
               kernels=sum(k["count"] for k in kernels), busy=sum(found.values()),
               classes=dict(sorted(found.items(), key=lambda item: -item[1])), longest=kernels[:40])  # fmt: skip


def _class(kernel: str) -> str:
    return next((name for name, pattern in CLASSES if re.search(pattern, kernel, re.IGNORECASE)), "other")
