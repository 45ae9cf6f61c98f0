"""From plain tables, as TOML and JSON hold them, to sections, and never by a silent cast."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from fastlth.errors import RecipeError, unknown


def section(name: str, cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Section ``name`` from a table of its settings. Raises RecipeError for unknown, missing or mistyped ones."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise RecipeError(unknown("setting", f"{name}.{key}", [f"{name}.{k}" for k in hints]))
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"{name}.{f.name} is not set; give it with --set {name}.{f.name}=...")
    return cls(**{k: _typed(f"{name}.{k}", hints[k], v) for k, v in values.items()})


def defaults(cls: type[Any]) -> dict[str, Any]:
    """Setting -> default of a section, as a table holds it; MISSING where there is none."""
    values = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(cls)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _typed(name: str, hint: Any, value: Any) -> Any:
    """``value`` as the field's type; RecipeError if it is of another kind (never a silent cast)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _typed(name, args[0], value)
    if origin is dict:
        if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            value = {str(key): inner for key, inner in value}
        if isinstance(value, dict):
            return {str(k): _typed(f"{name}.{k}", args[1], v) for k, v in value.items()}
    elif origin is tuple:
        if isinstance(value, list | tuple) and (args[-1] is Ellipsis or len(value) == len(args)):
            return tuple(_typed(name, args[0], v) for v in value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    if origin is tuple and args[-1] is not Ellipsis:
        raise RecipeError(f"{name} must be a list of {len(args)}, got {value!r}")
    kind = {dict: "a table", tuple: "a list", float: "a number", int: "a whole number",
            bool: "true or false", str: "a word"}[origin or hint]  # fmt: skip
    raise RecipeError(f"{name} must be {kind}, got {value!r}")
