"""Nets and data of other people, by name: ``package.module:function``, entry points, libraries, image folders.

    mypkg.nets:make_net        a function, imported when it is needed; the current folder is searched too
    mynet                      the same, registered by an installed package under the entry points ``fastlth.models``
                               (a net) or ``fastlth.datasets`` (data); becomes the function's own name in a recipe
    torchvision:resnet18       a net of torchvision.models
    timm:resnet18              a net of timm
    imagefolder:PATH           a folder of images

Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from fastlth.errors import RecipeError

LIBRARIES = ("torchvision", "timm")
FOLDER = "imagefolder:"
MODELS_GROUP, DATASETS_GROUP = "fastlth.models", "fastlth.datasets"

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_own(name: str) -> bool:
    """Whether a name in a recipe is of something outside of fastlth."""
    return ":" in name


def library(name: str) -> tuple[str, str] | None:
    """("timm", "resnet18") of ``timm:resnet18``, None for any other name."""
    first, _, rest = name.partition(":")
    return (first, rest) if first in LIBRARIES else None


def folder(name: str) -> str | None:
    """PATH of ``imagefolder:PATH``, None for any other name."""
    return name.removeprefix(FOLDER) if name.startswith(FOLDER) else None


def canonical(name: str, group: str) -> str | None:
    """The name that a recipe holds: ``name`` itself if it is of one of the forms above, what it is registered for if
    it is an entry point of ``group``, else None. Raises RecipeError for a name with a colon that is none of them."""
    if is_own(name):
        prefix = f"({'|'.join(LIBRARIES)}):" if group == MODELS_GROUP else FOLDER
        if re.fullmatch(rf"{prefix}.+", name) or _FUNCTION.fullmatch(name):
            return name
        others = "timm:NAME or torchvision:NAME" if group == MODELS_GROUP else "imagefolder:PATH"
        raise RecipeError(f"'{name}' is not a name fastlth can follow; write package.module:function, or {others}")
    return registered(group).get(name)


def registered(group: str) -> dict[str, str]:
    """Entry point -> ``package.module:function``, of all installed packages."""
    return {point.name: point.value.partition("[")[0].strip() for point in entry_points(group=group)}


def spec_of(function: Callable[..., Any]) -> str:
    """``module:function`` of a function or class, by which it can be found again. Raises RecipeError if it cannot."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    spec = f"{module}:{name}"
    if not module or not name or not _FUNCTION.fullmatch(spec):
        raise RecipeError(f"{function!r} cannot be found again by its name; give a function or class that stands at "
                          "the top level of a module")  # fmt: skip
    if find(spec) is not function:
        raise RecipeError(f"{spec} is another object than the one given; give a function that its module still holds "
                          "under its name")  # fmt: skip
    return spec


def find(spec: str) -> Any:
    """The object that ``package.module:function`` names; the current folder is searched as well.

    Raises RecipeError, in one sentence, if it cannot be imported or is not callable.
    """
    module_name, _, path = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # a console script's path begins with its own folder
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise RecipeError(f"cannot import {module_name} of {spec} ({type(error).__name__}: {error}); install it, or "
                          "run fastlth in the folder that holds it") from error  # fmt: skip
    for part in path.split("."):
        if not hasattr(found, part):
            raise RecipeError(f"module {module_name} has no '{path}'; check the name in {spec}")
        found = getattr(found, part)
    if not callable(found):
        raise RecipeError(f"{spec} is of type {type(found).__name__}, not a function; give the name of a function")
    return found
