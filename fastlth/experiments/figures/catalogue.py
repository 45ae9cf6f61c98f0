"""All figures that can be asked for, by name."""

from __future__ import annotations

from fastlth.errors import RecipeError, unknown
from fastlth.experiments.figures import frankle_carbin, linear_mode, morcos, renda, zhou
from fastlth.experiments.figures.declare import Figure

_PAPERS = (frankle_carbin.FIGURES, zhou.FIGURES, linear_mode.FIGURES, morcos.FIGURES, renda.FIGURES)
FIGURES: dict[str, Figure] = {figure.name: figure for paper in _PAPERS for figure in paper}


def find(name: str) -> Figure:
    """The figure of that name. Raises RecipeError with all names."""
    if name not in FIGURES:
        raise RecipeError(f"{unknown('figure', name, FIGURES)} ('fastlth reproduce --list' says what they are)")
    return FIGURES[name]
