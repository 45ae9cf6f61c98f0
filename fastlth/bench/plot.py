"""Images/s against density, one line per path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastlth.bench.subject import Row
from fastlth.errors import OutputError, RecipeError


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
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        lines.setdefault(r["path"], []).append((r["density"], r["images_per_second"]))
        lines.setdefault(r["against"], []).append((r["density"], r["against_images_per_second"]))
    for marker, (path, points) in zip("os^Dv", sorted(lines.items()), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=path)
    axes.set(xscale="log", yscale="log", xlabel="density (kept / all weights)", ylabel="images per second",
             title=f"{rows[0]['model']} on {rows[0]['dataset']}, training steps")  # fmt: skip
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write {file} ({error.strerror}); choose another file") from error
    finally:
        plt.close(figure)
