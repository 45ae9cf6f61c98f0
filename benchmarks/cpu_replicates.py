"""``python -m benchmarks.cpu_replicates``: several LeNets at once, one thread each, against one after the other.

One after the other, each has all cores; the ratio is of trained images per second. The result is printed and, with
``--out FILE``, appended there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROUNDS = (0, 3, 7, 13, 20)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each density")
    parser.add_argument("--out", type=Path, help="append the document to this file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command sets it, before torch is loaded
    from fastlth.bench import document

    found = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **document(rows(options.seconds))}
    for r in found["rows"]:
        print(f"density {r['density']:7.2%}  {r['images_per_second']:>11,.0f} images/s at once  "
              f"{r['against_images_per_second']:>11,.0f} in turn  {r['ratio'] or float('nan'):.2f} "
              f"({r['ratio_low']:.2f}-{r['ratio_high']:.2f}, n={r['n']})", flush=True)  # fmt: skip
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return 0


def rows(seconds: float) -> list[dict[str, Any]]:
    """One per density: as many nets as there are cores, a thread each, against one net on all cores."""
    from fastlth.bench.paired import paired
    from fastlth.bench.subject import Ours, masks_of_round, recipe_for, row, source_for
    from fastlth.side_by_side import cores

    count, (source, images), found = cores(), source_for("mnist"), []
    whole = recipe_for("lenet-300-100", "mnist")

    def net(threads: int, break_even: float) -> Ours:
        compute = dataclasses.replace(whole.compute, device="cpu", precision="fp32", engine="sparse", threads=threads,
                                      compile="off", channels_last="off", loader="resident", kernels="torch",
                                      shifted=(), break_even=break_even)  # fmt: skip
        return Ours(dataclasses.replace(whole, compute=compute), source)

    with ThreadPoolExecutor(count) as pool:
        for round in ROUNDS:
            masks, density = masks_of_round(whole, round)
            together, alone = [net(1, 0.6) for _ in range(count)], net(count, 0.6)
            for one in (*together, alone):
                one.prune(masks)

            def at_once(steps: int, nets: Sequence[Ours] = together) -> None:
                list(pool.map(lambda n: n.steps(steps), nets))

            def in_turn(steps: int, one: Ours = alone) -> None:
                for _ in range(count):
                    one.steps(steps)

            result = paired(at_once, in_turn, budget=seconds, seed=round, block=0.2)
            one = row("replicates", whole, f"{count} at once", "in turn", density, result,
                      count * whole.train.batch_size)  # fmt: skip
            found.append({**one, "images": images})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
