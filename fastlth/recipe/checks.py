"""What a setting may be, in one sentence that names it, its value and what is allowed."""

from __future__ import annotations

from fractions import Fraction

from fastlth.errors import RecipeError, unknown


def exact(value: float) -> Fraction:
    """The decimal a person wrote, exactly: 0.1 is 1/10, not the nearest binary fraction."""
    return Fraction(repr(value))


def check(name: str, ok: bool, rule: str, value: object) -> None:
    """Raise RecipeError unless ``ok``: the setting must ``rule``."""
    if not ok:
        raise RecipeError(f"{name} must {rule}, got {value!r}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise RecipeError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise RecipeError(unknown(name, value, allowed))
