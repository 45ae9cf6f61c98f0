"""The words in which a figure of a paper is described. Needs no torch.

A figure has arms (searches, and what follows each), pictures of what they give, and what the paper states. All numbers
in it are the paper's: rounds, replicates, draws, iterations. ``scale.py`` makes them smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlth.catalogue import DATASET_ALIASES, DATASETS, MODELS, lenet_widths
from fastlth.experiments.control import Control
from fastlth.experiments.supermasks.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Branched:
    """Control runs on the search's masks: a line."""

    label: str
    control: Control
    rounds: tuple[int, ...] = ()
    """whose masks; all pruned rounds where empty"""
    trials: int = 1
    """draws per round and replicate"""


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Pairs of copies with other data orders, and the straight line between them: linear mode connectivity."""

    label: str
    rounds: tuple[int, ...] = (0,)
    at: tuple[int, ...] = (0,)
    """the iterations at which a pair parts"""
    pairs: tuple[tuple[int, int], ...] = ((1, 2),)
    """seeds of the copies' data orders"""
    points: int = 30
    whole: bool = False
    """the copies train the whole schedule after they part, not its rest"""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Tickets of the search trained on other data or with another optimizer: a line."""

    label: str
    dataset: str
    rounds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    random_ticket: bool = False


Follow = Branched | Copied | Carried


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One search and what follows it, or, with ``supermask``, a net that is never trained."""

    label: str
    """of the search's own line; what follows has labels of its own"""
    panel: str = ""
    model: str
    dataset: str
    preset: str = "paper"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """``section.field`` -> value, over the preset; all settings where no preset covers the pair"""
    rounds: int = 0
    replicates: int = 1
    follow: tuple[Follow, ...] = ()
    supermask: Plan | None = None
    drawn: bool = True
    """whether the search has a line of its own"""
    published: bool = False
    """whether the values of report/published.toml are about this arm"""
    small: bool = True
    """whether it is part of the short and smoke scales"""
    short_rounds: int | None = None
    """rounds at short scale; those of preset fast where not given"""

    @property
    def missing(self) -> str:
        """What has to be there before this arm can be trained; empty if nothing."""
        if self.model not in MODELS and lenet_widths(self.model) is None:
            return f"the model {self.model}"
        follow = [f.dataset for f in self.follow if isinstance(f, Carried)]
        for name in (self.dataset, *follow):
            if DATASET_ALIASES.get(name, name) not in DATASETS:
                return f"the data set {name}"
        return ""


@dataclass(frozen=True)
class Against:
    """A number of each round against density, a panel for each of the arms' panels."""

    quantity: str
    """a field of a round's result"""
    at: int | None = None
    """with quantity test_accuracy: at this iteration of training (of the paper's schedule), not at its end"""
    counted: bool = False
    """against the number of weights kept in place of density"""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A panel of training curves: lines ``labels`` in rounds ``rounds``."""

    title: str
    rounds: tuple[int, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Over:
    """A number of each evaluation against iterations."""

    quantity: str
    panels: tuple[Chosen, ...]


@dataclass(frozen=True)
class Between:
    """Error on the line between two copies, against alpha."""


@dataclass(frozen=True)
class Instability:
    """The highest error between two copies above that of the copies, against the iteration at which they part."""


@dataclass(frozen=True)
class Table:
    """One accuracy per line and panel: supermasks, and single rounds."""

    quantity: str


Picture = Against | Over | Between | Instability | Table


@dataclass(frozen=True, kw_only=True)
class Stated:
    """A number that the paper states about a line: ``value`` itself, or a ``gain`` over the panel's dense net, or how
    many times ``earlier`` than that net."""

    panel: str = ""
    line: str
    quantity: str
    density: float | None = None
    """the round at about this density; None: the line has one number"""
    value: float | None = None
    gain: float | None = None
    earlier: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a paper: what is trained for it, what is drawn of that, and what the paper states."""

    name: str
    what: str
    """one line for the list"""
    source: str
    arms: tuple[Arm, ...]
    pictures: tuple[Picture, ...]
    stated: tuple[Stated, ...] = ()
    note: str = ""
    """how it differs from the paper's"""

    @property
    def ready(self) -> tuple[Arm, ...]:
        """The arms for which everything is there."""
        return tuple(arm for arm in self.arms if not arm.missing)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the other arms wait for, each once."""
        return tuple(dict.fromkeys(arm.missing for arm in self.arms if arm.missing))
