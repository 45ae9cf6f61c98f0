"""Recipe: every setting of a search, frozen and validated; its digest names the run.

One section per dataclass, one field per setting, `section.field` is its name everywhere: in TOML
files, in ``--set`` and in error messages. ``fastlth/composition.py`` builds recipes from presets,
files and flags; nothing else in the project reads settings from anywhere but here.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from fractions import Fraction
from math import inf
from typing import Any

from fastlth import specs
from fastlth.catalogue import CRITERIA, DATASETS, MASK_0, MASK_1, DatasetFacts, dataset_name, model_name
from fastlth.errors import RecipeError, unknown

# Philox key word 1; never renumber
STREAMS = {"init": 1, "split": 2, "order": 3, "augment": 4, "prune": 5, "dropout": 6, "branch": 7}
FACTS = ("shape", "classes", "train", "test", "mean", "std", "content")  # of an own data set, measured
LAST_ROUND = 254  # pruned_at is one byte: 0 = alive, k = removed in round k, 255 reserved


def exact(value: float) -> Fraction:
    """The decimal a person wrote, exactly: 0.1 is 1/10, not the nearest binary fraction."""
    return Fraction(repr(value))


def _check(name: str, ok: bool, rule: str, value: object) -> None:
    if not ok:
        raise RecipeError(f"{name} must {rule}, got {value!r}")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(unknown(name, value, allowed))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    name: str
    batch_norm: bool = False
    """batch norm after every convolution of lenet-5 and conv-n (VGGs and ResNets always have it)"""
    bias_init: str = "zero"
    """zero (the papers) or uniform in +-1/sqrt(fan_in) (lecode)"""
    weight_init: str = "glorot"
    """standard deviation of the normal initial weights: glorot (Frankle & Carbin) or kaiming (open_lth)"""
    weight_std: float | None = None
    """that standard deviation itself, the same in all layers, in place of ``weight_init``"""
    norm_init: str = "one"
    """scales of batch norm: one, or uniform in [0, 1) (open_lth)"""
    dropout: float = 0.0
    """share of the outputs of hidden linear layers (VGG, ResNet: of the pooled features) that training sets to zero;
    of an own net, beside what its function puts into it"""
    init: str | None = None
    """of an own net: own, the values that its constructor draws (the default), or glorot, as fastlth's nets"""
    content: str | None = None
    """of an own net: a hash of its layers and shapes, measured by ``compose``"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", model_name(self.name))
        _choice("model.bias_init", self.bias_init, ("zero", "uniform"))
        _choice("model.weight_init", self.weight_init, ("glorot", "kaiming"))
        _check("model.weight_std", self.weight_std is None or 0 < self.weight_std < inf,
               "be greater than 0", self.weight_std)  # fmt: skip
        _check("model.weight_std", self.weight_std is None or self.weight_init == "glorot",
               f"be left out with model.weight_init {self.weight_init}; give one of them", self.weight_std)  # fmt: skip
        _choice("model.norm_init", self.norm_init, ("one", "uniform"))
        _check("model.dropout", 0 <= self.dropout < 1, "be in [0, 1), the share that is dropped", self.dropout)
        if not self.own:
            _check("model.init", self.init in (None, "glorot"), f"be glorot for {self.name}", self.init)
            _check("model.content", self.content is None, f"be left out for {self.name}", self.content)
            object.__setattr__(self, "init", None)
            return
        _check("model.init", self.init in (None, "own", "glorot"), "be own or glorot", self.init)
        object.__setattr__(self, "init", self.init if self.init != "own" else None)
        _check("model.batch_norm", not self.batch_norm,
               "be left out for an own net, which has what its function puts into it", self.batch_norm)  # fmt: skip
        plain = {"bias_init": "zero", "weight_init": "glorot", "weight_std": None, "norm_init": "one"}
        for setting, default in plain.items():
            _check(f"model.{setting}", getattr(self, setting) == default or self.init == "glorot",
                   "be left out for an own net without model.init=glorot", getattr(self, setting))  # fmt: skip

    @property
    def own(self) -> bool:
        """Whether the net is made by code outside of fastlth."""
        return specs.is_own(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    name: str
    validation: int = -1
    """training images held out, drawn by seed; -1: the data set's default"""
    normalise: str = "mean-std"
    """mean-std (per channel), unit (pixels / 255) or half (pixels / 127.5 - 1)"""
    augment: str = "none"
    """none, flip-crop (random flip, 4-pixel pad and crop), lecode (colour, flip), resized-crop (a random part of the
    image, scaled to the whole, and flip) or photo-crop (the same of the whole photograph of an image folder, which is
    decoded for every batch)"""
    image_size: int | None = None
    """of an image folder: height and width of the images that a net sees; 224 where not given"""
    shape: tuple[int, int, int] | None = None
    """this and what follows: the facts of an own data set, measured by ``compose``; (channels, height, width)"""
    classes: int | None = None
    train: int | None = None
    """training images, the held-out ones included"""
    test: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    content: str | None = None
    """a hash of the images and labels (of a folder: of the names and sizes of its files)"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", dataset_name(self.name))
        self._check_facts()
        facts = self.facts
        if self.validation == -1:
            object.__setattr__(self, "validation", facts.validation)
        _check("data.validation", 0 < self.validation < facts.train,
               f"leave images to train on and to validate on (1 to {facts.train - 1})",
               self.validation)  # fmt: skip
        _choice("data.normalise", self.normalise, ("mean-std", "unit", "half"))
        _choice("data.augment", self.augment, ("none", "flip-crop", "lecode", "resized-crop", "photo-crop"))
        _check("data.augment", self.augment != "photo-crop" or specs.folder(self.name) is not None,
               "be another one but for imagefolder:PATH; resized-crop does the same on images of one size",
               self.augment)  # fmt: skip
        _check("data.augment", self.augment != "lecode" or facts.shape[0] == 3,
               "be none or flip-crop for images without colour", self.augment)  # fmt: skip

    def _check_facts(self) -> None:
        for name in FACTS:
            value = getattr(self, name)
            if self.own and value is None:
                raise RecipeError(f"data.{name} is not set; fastlth.compose measures it for data set '{self.name}'")
            _check(f"data.{name}", self.own or value is None, f"be left out for {self.name}, whose facts are known",
                   value)  # fmt: skip
            if isinstance(value, list):  # read back
                object.__setattr__(self, name, tuple(value))
        _check("data.image_size", self.image_size is None or specs.folder(self.name) is not None,
               "be left out but for imagefolder:PATH", self.image_size)  # fmt: skip
        _check("data.image_size", self.image_size is None or 8 <= self.image_size <= 4096,
               "be in 8 to 4096 pixels", self.image_size)  # fmt: skip

    @property
    def own(self) -> bool:
        """Whether the images come from outside of fastlth's catalogue."""
        return specs.is_own(self.name)

    @property
    def facts(self) -> DatasetFacts:
        """Sizes, classes, mean and std, from the catalogue or as they were measured."""
        if not self.own:
            return DATASETS[self.name]
        assert self.shape and self.classes and self.train and self.test and self.mean and self.std
        return DatasetFacts(shape=self.shape, classes=self.classes, train=self.train, test=self.test,
                            validation=min(5_000, max(1, self.train // 10)), mean=self.mean, std=self.std)  # fmt: skip

    @property
    def train_images(self) -> int:
        """Images a net is trained on: all training images but the held-out ones."""
        return self.facts.train - self.validation


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    iterations: int
    batch_size: int
    lr: float
    optimizer: str = "adam"
    """adam, adamw or sgd"""
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    """added to the gradient (adam, sgd) or decoupled (adamw)"""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    drop_last: bool = True
    """leave out the last, smaller batch of an epoch"""

    def __post_init__(self) -> None:
        _check("train.iterations", self.iterations >= 1, "be at least 1", self.iterations)
        _check("train.batch_size", self.batch_size >= 1, "be at least 1", self.batch_size)
        _check("train.lr", 0 < self.lr < inf, "be greater than 0", self.lr)
        _choice("train.optimizer", self.optimizer, ("adam", "adamw", "sgd"))
        _check("train.momentum", 0 <= self.momentum < 1, "be in [0, 1)", self.momentum)
        _check("train.momentum", self.momentum == 0 or self.optimizer == "sgd",
               f"be 0 with optimizer {self.optimizer}, which has betas", self.momentum)  # fmt: skip
        _check("train.nesterov", not self.nesterov or self.momentum > 0,
               "be false without train.momentum", self.nesterov)  # fmt: skip
        _check("train.weight_decay", 0 <= self.weight_decay < inf,
               "be at least 0", self.weight_decay)  # fmt: skip
        _check("train.betas", all(0 <= b < 1 for b in self.betas), "be in [0, 1)", self.betas)
        _check("train.eps", 0 < self.eps < 1, "be in (0, 1)", self.eps)

    def iterations_per_epoch(self, images: int) -> int:
        """Batches in one pass over ``images`` training images."""
        full, rest = divmod(images, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSection:
    warmup: int = 0
    """iterations over which the learning rate rises linearly from 0: lr(i) = lr * i / warmup"""
    milestones: tuple[int, ...] = ()
    """iterations at which the learning rate is multiplied by gamma"""
    gamma: float = 0.1
    scale: bool = True
    """scale warm-up and milestones of a preset with --iterations"""

    def __post_init__(self) -> None:
        _check("schedule.warmup", self.warmup >= 0, "be at least 0", self.warmup)
        _check("schedule.milestones",
               list(self.milestones) == sorted(set(self.milestones)) and min((1, *self.milestones)) > 0,
               "be increasing and positive", list(self.milestones))  # fmt: skip
        _check("schedule.gamma", 0 < self.gamma <= 1, "be in (0, 1]", self.gamma)


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneSection:
    rounds: int = 20
    to_density: float | None = None
    """stop at the first round whose density is at or below this"""
    rate: float = 0.2
    """share of the kept weights removed per round"""
    scale: dict[str, float] = field(default_factory=dict)
    """layer pattern -> factor on rate, first match wins (output = 0.5: half the rate; 0: never)"""
    only: tuple[str, ...] | None = None
    """patterns of the layers that may be pruned, such as features.*; all Linear and Conv layers where not given"""
    never: tuple[str, ...] | None = None
    """patterns of layers that are never pruned, whatever ``only`` says"""
    scope: str = "layer"
    """layer (each layer loses its share) or global (one ranking over all)"""
    criterion: str = "large_final"
    """the score by which weights stay, by its name in docs/criteria.md; magnitude is large_final"""
    alpha: float = 1.0
    """weighs w_f against w_i in large_init_large_final and small_init_small_final"""
    formulas: str = "paper"
    """paper or code: which of them a criterion follows where Zhou et al.'s paper and program differ"""
    mask_1: str = "none"
    """what kept weights start a round with (docs/criteria.md); none: their rewind values"""
    mask_0: str = "mask"
    """what pruned weights are kept at (docs/criteria.md); mask: zero"""
    constant: float | None = None
    """size of the weights of the *_constant actions; standard deviation of the layer's rewind values if not given"""
    rewind_to: int = 0
    """the iteration whose weights the survivors return to"""
    early_bird: float = 0.0
    """end a round when the mask it is heading for changes less than this over five epochs (the paper: 0.1); 0: never"""

    def __post_init__(self) -> None:
        if self.criterion == "magnitude":
            object.__setattr__(self, "criterion", "large_final")
        _check("prune.rounds", 0 <= self.rounds <= LAST_ROUND, f"be in 0 to {LAST_ROUND}", self.rounds)
        _check("prune.to_density", self.to_density is None or 0 < self.to_density < 1,
               "be in (0, 1)", self.to_density)  # fmt: skip
        _check("prune.rate", 0 < self.rate < 1, "be in (0, 1), the share removed per round", self.rate)
        for name in ("only", "never"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, tuple(patterns) if patterns else None)
        for pattern, factor in self.scale.items():
            _check(f"prune.scale.{pattern}", 0 <= factor < inf and exact(factor) * exact(self.rate) < 1,
                   f"be at least 0 and, times prune.rate {self.rate}, below 1", factor)  # fmt: skip
        _choice("prune.scope", self.scope, ("layer", "global"))
        _choice("prune.criterion", self.criterion, CRITERIA)
        _choice("prune.formulas", self.formulas, ("paper", "code"))
        _choice("prune.mask_1", self.mask_1, MASK_1)
        _choice("prune.mask_0", self.mask_0, MASK_0)
        self._check_zhou()
        _check("prune.rewind_to", self.rewind_to >= 0, "be at least 0", self.rewind_to)
        _check("prune.early_bird", 0 <= self.early_bird < 1, "be in [0, 1), a share of the kept weights",
               self.early_bird)  # fmt: skip

    def _check_zhou(self) -> None:
        both = self.criterion in ("large_init_large_final", "small_init_small_final")
        differs = both or self.criterion in ("magnitude_increase_same_sign", "magnitude_increase_diff_sign")
        _check("prune.formulas", self.formulas == "paper" or differs,
               f"be paper with criterion {self.criterion}, of which paper and program say the same",
               self.formulas)  # fmt: skip
        _check("prune.scope", self.scope == "layer" or not (both and self.formulas == "code"),
               f"be layer with criterion {self.criterion} and formulas code, which rank each layer alone",
               self.scope)  # fmt: skip
        _check("prune.alpha", 0 < self.alpha < inf, "be greater than 0", self.alpha)
        _check("prune.alpha", self.alpha == 1.0 or (both and self.formulas == "paper"),
               f"be 1 with criterion {self.criterion}, whose formula has no alpha"
               if not both else "be 1 with formulas code, which compares rankings", self.alpha)  # fmt: skip
        _check("prune.constant", self.constant is None or 0 < self.constant < inf,
               "be greater than 0", self.constant)  # fmt: skip
        _check("prune.constant", self.constant is None or "constant" in self.mask_1,
               f"be left out with mask_1 {self.mask_1}; only the actions named constant use it",
               self.constant)  # fmt: skip
        _check("prune.mask_0", self.mask_1 != "mask_init" or self.mask_0 == "original",
               "be original with mask_1 mask_init, which trains the pruned weights from zero; "
               "every other action would freeze them", self.mask_0)  # fmt: skip

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion looks at dL/dw."""
        return self.criterion in ("snip", "grad")

    @property
    def rewinds(self) -> bool:
        """Whether every round starts with its rewind values times its mask: no mask-1 and no mask-0 action."""
        return (self.mask_1, self.mask_0) == ("none", "mask")

    @property
    def trains_pruned(self) -> bool:
        """Whether pruned weights are trained like all others."""
        return self.mask_0 == "original"

    @property
    def fills(self) -> bool:
        """Whether pruned weights may be frozen at another value than zero."""
        return self.mask_0 not in ("mask", "original")

    @property
    def zeroes(self) -> bool:
        """Whether the training decides which weights' initial values become zero."""
        return self.mask_0.startswith("freeze_init_zero_")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSection:
    every: int = 100
    """iterations between evaluations (and always one at the last iteration)"""
    test: str = "minimum"
    """when the test set is read: at a new minimum of the validation loss, or always"""

    def __post_init__(self) -> None:
        _check("evaluate.every", self.every >= 1, "be at least 1", self.every)
        _choice("evaluate.test", self.test, ("minimum", "always"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedsSection:
    base: int = 0
    """--seed: every stream below derives from it unless set singly"""
    init: int | None = None
    split: int | None = None
    order: int | None = None
    augment: int | None = None
    prune: int | None = None
    dropout: int | None = None
    branch: int | None = None
    """fresh initial values and random masks of control runs"""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            _check(f"seeds.{f.name}", value is None or 0 <= value < 2**32, "be in 0 to 2**32 - 1", value)

    def key(self, stream: str) -> tuple[int, int]:
        """The Philox key of one stream of ``STREAMS``: (its seed, its number)."""
        own = getattr(self, stream)
        return (self.base if own is None else int(own), STREAMS[stream])


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeSection:
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    precision: str = "auto"
    """auto, fp32 or bf16 (autocast; weights and updates stay fp32)"""
    compile: str = "auto"
    """auto, on or off: torch.compile of the forward and backward pass"""
    channels_last: str = "auto"
    """auto, on or off"""
    loader: str = "auto"
    """auto, resident (the set lives on the device) or ffcv (streamed); pillow decodes for augment photo-crop without
    FFCV"""
    engine: str = "auto"
    """auto, dense (any net, any device), sparse (fully connected nets on a CPU: cost falls with density) or graph (any
    net on CUDA: the whole step is one captured graph)"""
    kernels: str = "auto"
    """torch (PyTorch's layers), triton (masked kernels, CUDA only) or auto: torch until measured otherwise"""
    threads: int = 0
    """CPU threads; 0: as many as torch finds, or as measured fastest"""
    break_even: float = -1.0
    """density at or below which the sparse engine runs a layer from its kept weights alone; -1: measured"""
    deterministic: bool = False
    """on CUDA: only algorithms that give the same bits every time, which are slower (a CPU always gives them)"""
    shifted: tuple[str, ...] = ("auto",)
    """gradients of convolutions made by shifted matrix products on a CPU, such as conv13.weight and conv13.input;
    auto: those that measure faster"""
    compact: float = -1.0
    """share of a net's multiplications at or below which the graph engine trains a round as the smaller net without
    units that it does not need; 0: never; -1: measured on CUDA, else never"""
    kept: dict[str, float] = field(default_factory=dict, hash=False)
    """layer -> density at or below which the dense engine runs it from its kept weights alone on a CPU (fc1 = 0.3);
    empty with engine auto: measured"""

    def __post_init__(self) -> None:
        _check("compute.device", re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None,
               "be auto, cpu, cuda, cuda:N or mps", self.device)  # fmt: skip
        _choice("compute.precision", self.precision, ("auto", "fp32", "bf16"))
        _choice("compute.compile", self.compile, ("auto", "on", "off"))
        _choice("compute.channels_last", self.channels_last, ("auto", "on", "off"))
        _choice("compute.loader", self.loader, ("auto", "resident", "ffcv", "pillow"))
        _choice("compute.engine", self.engine, ("auto", "dense", "sparse", "graph"))
        _check("compute.break_even", self.break_even == -1 or 0 <= self.break_even <= 1,
               "be in 0 to 1, or -1 to have it measured", self.break_even)  # fmt: skip
        _check("compute.compact", self.compact == -1 or 0 <= self.compact <= 1,
               "be in 0 to 1, or -1 to have it measured", self.compact)  # fmt: skip
        _choice("compute.kernels", self.kernels, ("auto", "torch", "triton"))
        _check("compute.threads", 0 <= self.threads <= 4096, "be in 0 to 4096", self.threads)
        object.__setattr__(self, "shifted", tuple(self.shifted))  # read back as a list
        _check("compute.shifted", "auto" not in self.shifted or self.shifted == ("auto",),
               "be auto alone or name gradients", list(self.shifted))  # fmt: skip
        for layer, limit in self.kept.items():
            _check(f"compute.kept.{layer}", 0 <= limit <= 1, "be a density in 0 to 1", limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSection:
    """What is kept on disk; nothing here changes a result, so nothing here is in the digest."""

    save_every: float = 60.0
    """seconds between saves inside a round"""
    theta0: str = "stored"
    """stored, or seed: the ticket holds hashes of theta0, which is made again from the seed when it is read"""

    keep_weights: str = "none"
    """none, last or all: whether trained weights stay on disk (survivors only)"""

    def __post_init__(self) -> None:
        _choice("store.keep_weights", self.keep_weights, ("none", "last", "all"))
        _choice("store.theta0", self.theta0, ("stored", "seed"))
        _check("store.save_every", 0 < self.save_every < inf, "be greater than 0", self.save_every)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Every setting of a search. Raises RecipeError where settings contradict each other."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    prune: PruneSection = field(default_factory=PruneSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    seeds: SeedsSection = field(default_factory=SeedsSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    store: StoreSection = field(default_factory=StoreSection)

    def __post_init__(self) -> None:
        last, rewind = self.train.iterations, self.prune.rewind_to
        _check("prune.rewind_to", rewind < last, f"be below train.iterations ({last})", rewind)
        _check("store.theta0", self.store.theta0 == "stored" or not rewind,
               f"be stored with prune.rewind_to {rewind}, since a seed is theta0 only", self.store.theta0)  # fmt: skip
        _check("store.theta0", self.store.theta0 == "stored" or not self.model.own,
               "be stored for an own net, whose constructor need not draw the same bits everywhere",
               self.store.theta0)  # fmt: skip
        _check("compute.engine", self.compute.engine in ("auto", "dense") or not self.prune.fills,
               f"be auto or dense with prune.mask_0 {self.prune.mask_0}, since other engines keep pruned weights at 0",
               self.compute.engine)  # fmt: skip
        images = self.data.train_images
        _check("train.batch_size", self.train.batch_size <= images,
               f"be at most the {images} training images", self.train.batch_size)  # fmt: skip

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> field -> plain value, as TOML and JSON hold them (tuples become lists)."""
        plain = json.loads(json.dumps(asdict(self)))
        return {s: {k: v for k, v in values.items() if v is not None} for s, values in plain.items()}

    def to_unordered(self) -> dict[str, dict[str, Any]]:
        """``to_dict`` for a file that sorts keys: where another order has a meaning, a list of pairs is in place of
        the table. ``from_dict`` reads both."""
        sections, scale = self.to_dict(), self.prune.scale
        if list(scale) != sorted(scale):
            sections["prune"]["scale"] = [[pattern, factor] for pattern, factor in scale.items()]
        return sections

    @staticmethod
    def from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The inverse of ``to_dict``. Raises RecipeError for unknown, missing or mistyped settings."""
        for name in sections:
            if name not in SECTIONS:
                raise RecipeError(unknown("section", name, SECTIONS))
        return Recipe(**{name: _section(name, cls, sections.get(name, {})) for name, cls in SECTIONS.items()})

    @property
    def digest(self) -> str:
        """sha256 (hex) over the settings that differ from their defaults.

        Leaves out what is only a prefix or changes no result: number of rounds, target density,
        base seed and the store section. A new setting with a default moves no old digest.
        """
        asked = Recipe.from_dict(self.to_dict()).to_dict()  # 1 given from Python for 1.0 is the same recipe
        asked["prune"] = {k: v for k, v in asked["prune"].items() if k not in ("rounds", "to_density")}
        asked["seeds"].pop("base")
        asked["schedule"].pop("scale")
        del asked["store"]
        if asked["data"]["validation"] == self.data.facts.validation:
            del asked["data"]["validation"]
        if specs.folder(self.data.name) is not None:
            asked["data"]["name"] = specs.FOLDER  # content says which; a folder may move
        for name, values in asked.items():
            for key, default in _defaults(SECTIONS[name]).items():
                if values.get(key, MISSING) == default:
                    del values[key]
        # sections and fields sorted by name, but not the patterns of prune.scale: their order has a meaning
        named = {section: dict(sorted(values.items())) for section, values in sorted(asked.items()) if values}
        canonical = json.dumps(named, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


SECTIONS: dict[str, type[Any]] = typing.get_type_hints(Recipe)


def _defaults(cls: type[Any]) -> dict[str, Any]:
    values = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(cls)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _section(name: str, cls: type[Any], values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise RecipeError(unknown("setting", f"{name}.{key}", [f"{name}.{k}" for k in hints]))
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"{name}.{f.name} is not set; give it with --set {name}.{f.name}=...")
    return cls(**{k: _typed(f"{name}.{k}", hints[k], v) for k, v in values.items()})


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
