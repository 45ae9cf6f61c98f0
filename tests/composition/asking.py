"""Asking for a recipe, as it is, as it is refused, and as a run writes it down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastlth import toml
from fastlth.composition import Composed, compose
from fastlth.errors import RecipeError
from fastlth.recipe import Recipe

HALF = {"output": 0.5}


def config(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(*pair: str, **arguments: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(*pair, **arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def of(recipe: Recipe, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(getattr(recipe, s), f) for s, f in (n.split(".") for n in names))


def written(composed: Composed, folder: Path) -> Path:
    resolved = {"device": "cpu", "compile": "off", "threads": 2, "environment": {"torch": "9"}, "images": {"a b": 1.5}}
    return config(folder, toml.dumps({**composed.recipe.to_dict(), "resolved": resolved}))
