"""Images/s and seconds per round against density, one line per path."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from fastlth.bench.subject import Row
from fastlth.composition import compose
from fastlth.errors import OutputError, RecipeError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")  # told apart by colour-blind people (Okabe & Ito)


def by_density(rows: Sequence[Row], file: Path) -> None:
    """Draw the step rows; the rivals do not get faster with density, and are drawn where they were timed.

    Raises RecipeError without matplotlib or for another ending, OutputError where ``file`` cannot be written.
    """
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise RecipeError(f"--plot draws .png, .svg or .pdf, got '{file}'")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise RecipeError("--plot needs matplotlib; install fastlth[report]") from None
    steps = compose(rows[0]["model"], rows[0]["dataset"]).recipe.train
    images = steps.iterations * steps.batch_size
    figure, (speed, cost) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for marker, color, (path, points) in zip("os^Dv", COLORS, sorted(_lines(rows).items()), strict=False):
        densities, rates = zip(*sorted(points.items()), strict=True)
        style = {"marker": marker, "color": color, "label": path, "markersize": 5}
        speed.plot(densities, rates, **style)
        cost.plot(densities, [images / rate for rate in rates], **style)
    speed.set(ylabel="images per second", title="training steps")
    cost.set(ylabel=f"seconds per round of {steps.iterations:,} iterations", title="without evaluations")
    for axes in (speed, cost):
        axes.set(xscale="log", yscale="log", xlabel="density (kept / all weights)")
        axes.invert_xaxis()
        axes.grid(alpha=0.3, which="both")
    speed.legend(loc="best")
    figure.suptitle(f"{rows[0]['model']} on {rows[0]['dataset']}, batch {steps.batch_size}")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write {file} ({error.strerror}); choose another file") from error
    finally:
        plt.close(figure)


def _lines(rows: Sequence[Row]) -> dict[str, dict[float, float]]:
    """Path -> density -> images/s, the median where it was timed against several; restless rows only if all are."""
    found: dict[str, dict[float, list[float]]] = {}
    for r in [r for r in rows if r["ratio"] is not None] or rows:
        found.setdefault(r["path"], {}).setdefault(r["density"], []).append(r["images_per_second"])
        found.setdefault(r["against"], {}).setdefault(r["density"], []).append(r["against_images_per_second"])
    return {path: {d: statistics.median(rates) for d, rates in points.items()} for path, points in found.items()}
