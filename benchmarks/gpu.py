"""``python -m benchmarks.gpu PART --out DIR``: the kernels and the engines judged on a real GPU.

    kernels      every kernel against float64, then times per layer beside the library, the naive way, torch.compile
    invariants   what docs/architecture.md promises, on the device
    steps        images/s of every model at several batch sizes: eager, compiled, our engines; share of the peak
    profile      where the time of one VGG-19 step goes
    lenet        a search of twenty rounds on MNIST, and many replicates in one graph
    vgg          a search of twenty short rounds of VGG-19 on CIFAR-10
    together     replicates of every net at once: as one net and on streams, beside one alone

Needs this checkout, CUDA PyTorch 2.11 or newer and Triton; ``steps`` also Pillow and torchvision. Where the data are
not there, images are random. Writes ``DIR/PART.json`` after every row, so that what was measured survives; the same
command again goes on with what the time limit left out. Exit code 1 if something is wrong. ``--dry-run`` goes the same
way on the CPU, on tiny sizes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))  # from a bare checkout, nothing installed

import torch  # noqa: E402

Call = Callable[[], Any]


@dataclass
class Ledger:
    """Where results go, and how long we may take. ``device`` is cuda, or cpu in a dry run."""

    out: Path
    device: torch.device
    seconds: float
    part: str = "kernels"
    rounds: int = 15
    began: float = field(default_factory=time.monotonic)
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Go on from an earlier call of the same part. Checks are made again."""
        file = self.out / f"{self.part}.json"
        if self.part != "kernels" and file.exists():
            earlier = json.loads(file.read_text())
            if earlier["dry_run"] == self.dry and earlier["machine"] == machine(self.device):
                self.rows = earlier["rows"]

    def has(self, **what: Any) -> bool:
        """Whether an earlier call, or this one, has measured it."""
        return any(all(row.get(k) == v for k, v in what.items()) for row in self.rows)

    def row(self, **facts: Any) -> None:
        """A row that is no comparison."""
        self.rows.append(facts)
        short = {k: v for k, v in facts.items() if not isinstance(v, list)}
        print(" ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in short.items()), flush=True)
        self.write()

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    def time_left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def check(self, name: str, worst: float, allowed: float) -> None:
        """A number that must not exceed what is allowed; NaN fails."""
        passed = bool(worst <= allowed)
        self.checks.append({"check": name, "worst": worst, "allowed": allowed, "passed": passed})
        print(f"{'ok   ' if passed else 'WRONG'} {name}: {worst:.3g} of {allowed:.3g}", flush=True)

    def attempt(self, name: str, checks: Call) -> None:
        """Make checks; where they cannot be made, that is one that failed, and the others are still made."""
        try:
            checks()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            self.check(f"{name} cannot run: {type(error).__name__} {reason}", 1, 0)
        self.write()

    def right(self, *kernels: str) -> bool:
        """Whether no check of these kernels failed; says which are left out because one did."""
        failed = {c["check"].split()[0].rstrip(":") for c in self.checks if not c["passed"]}
        wrong = [k for k in kernels if any(name.startswith(k) for name in failed)]
        self.left_out += [f"{k}: wrong" for k in wrong if f"{k}: wrong" not in self.left_out]
        return not wrong

    def compare(
        self, what: Mapping[str, Any], variants: Mapping[str, Call], *, graph: bool = True, **facts: Any
    ) -> dict[str, float]:
        """Time the variants in turns; a row each, in microseconds per call. One that fails is named and left out.

        Without ``graph`` calls are launched one by one: for those that read something back to the host.
        """
        if self.time_left() < 0:
            self.left_out.append(" ".join(map(str, what.values())))
            return {}
        timers = {}
        for name, call in variants.items():
            try:
                timers[name] = _Timer(call, self.device, graph)
            except Exception as error:  # one variant that cannot run must not take the others' rows with it
                reason = str(error).splitlines()[0] if str(error) else ""
                self.left_out.append(f"{' '.join(map(str, what.values()))} {name}: {type(error).__name__} {reason}")
        times: dict[str, list[float]] = {name: [] for name in timers}
        for turn in range(self.rounds):
            for name in sorted(timers, reverse=turn % 2 == 1):
                times[name].append(timers[name].microseconds())
        medians = {}
        for name, values in times.items():
            low, median, high = quantiles(values)
            medians[name] = median
            self.rows.append({**what, "variant": name, "microseconds": median, "low": low, "high": high,
                              "repetitions": len(values), **facts})  # fmt: skip
        print(" ".join(map(str, what.values())), {n: round(m, 2) for n, m in medians.items()}, flush=True)
        self.write()
        return medians

    def write(self) -> None:
        document = {"machine": machine(self.device), "versions": versions(), "dry_run": self.dry,
                    "seconds": round(time.monotonic() - self.began, 1), "checks": self.checks, "rows": self.rows,
                    "left_out": self.left_out}  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.out / f"{self.part}.json.part"
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self.out / f"{self.part}.json")


class _Timer:
    """Many calls in one CUDA graph, so that no launch is waited for; plain calls on a CPU."""

    def __init__(self, call: Call, device: torch.device, graph: bool) -> None:
        self._call, self._cuda = call, device.type == "cuda"
        self._calls = 1
        if not self._cuda:
            call()
            return
        self._replay: Call = call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, picks algorithms, and shows how long one call takes
            for _ in range(3):
                call()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                call()
            end.record()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not graph:
            return
        self._calls = max(1, min(200, int(1000 / max(start.elapsed_time(end) / 5 * 1000, 1))))  # about 1 ms
        self._replay = _captured(call, self._calls).replay
        self._replay()
        torch.cuda.synchronize()

    def microseconds(self) -> float:
        if not self._cuda:
            began = time.perf_counter()
            self._call()
            return 1e6 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end) / self._calls


def _captured(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # an old graph that is destroyed now would ruin the capture
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    finally:
        gc.enable()
    return graph


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Of 10, 50 and 90 %."""
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
    return float(low), float(median), float(high)


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "gpus": []}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found["gpus"] = [facts.name]
        found |= {"multiprocessors": facts.multi_processor_count, "memory": facts.total_memory}
    return found


def versions() -> dict[str, str | None]:
    from fastlth_kernels import launch

    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**found, "triton": launch.triton and launch.triton.__version__}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=["kernels", "invariants", "steps", "profile", "lenet", "vgg", "together"])
    parser.add_argument("--out", type=Path, required=True, help="folder for PART.json")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin nothing new after so long")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes: tries the script, no more")
    asked = parser.parse_args(arguments)
    if not asked.dry_run and not torch.cuda.is_available():
        print("no CUDA device: run it where there is one, or with --dry-run", file=sys.stderr)
        return 2
    ledger = Ledger(asked.out, torch.device("cpu" if asked.dry_run else "cuda:0"), 60 * asked.minutes, asked.part)
    if ledger.dry:
        ledger.rounds = 2
    if asked.part == "kernels":
        return _kernels(ledger)
    importlib.import_module(f"benchmarks.gpu_{asked.part}").measure(ledger)
    return _ended(ledger)


def _kernels(ledger: Ledger) -> int:
    from benchmarks import gpu_kernels, gpu_numerics

    if not ledger.dry:
        torch.backends.cudnn.benchmark = True
    gpu_numerics.numerics(ledger)
    gpu_kernels.times(ledger)
    return _ended(ledger)


def _ended(ledger: Ledger) -> int:
    ledger.write()
    file = ledger.out / f"{ledger.part}.json"
    print(f"{len(ledger.rows)} rows in {file}; left out: {ledger.left_out or 'nothing'}")
    return 0 if all(check["passed"] for check in ledger.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
