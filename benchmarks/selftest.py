"""``python -m benchmarks.selftest``: does ``fastlth bench compare`` find what it should, here and now?

Training that was made 10 % slower must be found each time, and equal code must never be called slower. The result is
printed and appended to ``results/selftest.jsonl``, whatever it is. Takes up to ten minutes; exit code 1 if it failed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "selftest.jsonl"
BUDGET = 10.0  # seconds of timing per run
PLANTED, EQUAL = 2, 20
LIMIT = 570.0  # seconds after which no further comparison is begun

# What makes the copy slower: after each stretch of training steps it idles for a tenth of its time. It goes into the
# engine that the comparison trains with.
SLOWER = """

def _planted(run):
    import time

    def slower(self, *arguments):
        began = time.perf_counter()
        result = run(self, *arguments)
        now = time.perf_counter()
        while time.perf_counter() < now + 0.1 * (now - began):
            pass
        return result

    return slower


SparseEngine.run = _planted(SparseEngine.run)
"""


def main() -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command sets it, before torch is loaded
    from fastlth.bench import document
    from fastlth.bench.compare import SLOWER as FOUND
    from fastlth.bench.compare import Tree, compare_trees, looks_slower

    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastlth-selftest-") as folder:
        same, slower = (_copy(Path(folder) / name) for name in ("same", "slower"))
        with (slower / "fastlth" / "training" / "engines" / "sparse.py").open("a", encoding="utf-8") as file:
            file.write(SLOWER)
        for seed in range(PLANTED + EQUAL):
            if time.monotonic() - began > LIMIT:
                break
            kind = "planted 10 %" if seed < PLANTED else "equal"
            head = slower if seed < PLANTED else same
            result = compare_trees(Tree("base", same), Tree(kind, head), budget=BUDGET, seed=100 * seed)
            [subject] = result.subjects
            rows.append({**subject.row, "first_run_slower": looks_slower(subject.runs[0])})
            print(f"{time.monotonic() - began:4.0f} s  {subject.sentence}", flush=True)
    planted = [row for row in rows if row["head"] != "equal"]
    equal = [row for row in rows if row["head"] == "equal"]
    counts = {
        "planted": len(planted), "found": sum(r["verdict"] == FOUND for r in planted),
        "equal": len(equal), "false_alarms": sum(r["verdict"] == FOUND for r in equal),
        "first_run_alarms": sum(r["first_run_slower"] for r in equal),
        "undecided": sum(r["verdict"] == "undecided" for r in rows),
    }  # fmt: skip
    passed = counts["found"] == PLANTED and counts["equal"] == EQUAL and not counts["false_alarms"]
    record = {
        "passed": passed, **counts, "seconds": round(time.monotonic() - began), "budget": BUDGET, "load": _load(),
        **document(rows),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(json.dumps(_rounded(record)) + "\n")
    print(f"{'passed' if passed else 'FAILED'}: {counts}; appended to {RESULTS.relative_to(ROOT)}")
    return 0 if passed else 1


def _copy(folder: Path) -> Path:
    """The code as it is now, out of reach of edits while the test runs."""
    for name in ("fastlth", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _load() -> float | None:
    """Processes that wanted to run, on average over the last 15 minutes: how noisy it was."""
    return os.getloadavg()[2] if hasattr(os, "getloadavg") else None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
