"""fastlth finds lottery tickets: sparse sub-networks that, reset to their early weights, train as well as the
dense network (Frankle & Carbin 2019).

    recipe = fastlth.compose("lenet-300-100", "digits").recipe
    search = fastlth.run(recipe, out="runs")
    net = fastlth.load_ticket(search.ticket).model(round=7)

Names are imported when they are first used, so that ``import fastlth`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlth.composition import compose as compose
    from fastlth.recipe import Recipe as Recipe
    from fastlth.results import Search as Search
    from fastlth.running import resume as resume
    from fastlth.running import run as run
    from fastlth.search import find_tickets as find_tickets
    from fastlth.tickets import load_ticket as load_ticket

_HOMES = {
    "Recipe": "recipe",
    "Search": "results",
    "compose": "composition",
    "find_tickets": "search",
    "load_ticket": "tickets",
    "resume": "running",
    "run": "running",
}

__all__ = ["Recipe", "Search", "__version__", "compose", "find_tickets", "load_ticket", "resume", "run"]

try:
    __version__ = version("fastlth")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlth' has no attribute {name!r}")
    module = import_module(f"fastlth.{_HOMES[name]}")
    value = getattr(module, name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return __all__
