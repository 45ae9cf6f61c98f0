"""Settings of the net and of the images."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from fastlth import specs
from fastlth.catalogue import DATASETS, DatasetFacts, dataset_name, has_batch_norm, model_name
from fastlth.errors import RecipeError
from fastlth.recipe.checks import check, choice

FACTS = ("shape", "classes", "train", "test", "mean", "std", "content")  # of an own data set, measured


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    name: str
    batch_norm: bool = False
    """batch norm after every convolution of lenet-5 and conv-n (VGGs and ResNets always have it)"""
    bias_init: str = "zero"
    """zero (the papers) or uniform in +-1/sqrt(fan_in) (lecode)"""
    weight_init: str = "glorot"
    """standard deviation of the normal initial weights: glorot (Frankle & Carbin), glorot-truncated (the same of a
    distribution without its tails, the program of Zhou et al.) or kaiming (open_lth)"""
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
        choice("model.bias_init", self.bias_init, ("zero", "uniform"))
        choice("model.weight_init", self.weight_init, ("glorot", "glorot-truncated", "kaiming"))
        check("model.weight_std", self.weight_std is None or 0 < self.weight_std < inf,
               "be greater than 0", self.weight_std)  # fmt: skip
        check("model.weight_std", self.weight_std is None or self.weight_init == "glorot",
               f"be left out with model.weight_init {self.weight_init}; give one of them", self.weight_std)  # fmt: skip
        choice("model.norm_init", self.norm_init, ("one", "uniform"))
        check("model.dropout", 0 <= self.dropout < 1, "be in [0, 1), the share that is dropped", self.dropout)
        if not self.own:
            self._check_norm()
            check("model.init", self.init in (None, "glorot"), f"be glorot for {self.name}", self.init)
            check("model.content", self.content is None, f"be left out for {self.name}", self.content)
            object.__setattr__(self, "init", None)
            return
        check("model.init", self.init in (None, "own", "glorot"), "be own or glorot", self.init)
        object.__setattr__(self, "init", self.init if self.init != "own" else None)
        check("model.batch_norm", not self.batch_norm,
               "be left out for an own net, which has what its function puts into it", self.batch_norm)  # fmt: skip
        plain = {"bias_init": "zero", "weight_init": "glorot", "weight_std": None, "norm_init": "one"}
        for setting, default in plain.items():
            check(f"model.{setting}", getattr(self, setting) == default or self.init == "glorot",
                   "be left out for an own net without model.init=glorot", getattr(self, setting))  # fmt: skip

    def _check_norm(self) -> None:
        always = has_batch_norm(self.name)
        check("model.batch_norm", not (self.batch_norm and always), f"be left out for {self.name}, which always has it",
               self.batch_norm)  # fmt: skip
        check("model.norm_init", self.norm_init == "one" or self.batch_norm or always,
               f"be left out for {self.name}, which has no batch norm here", self.norm_init)  # fmt: skip

    @property
    def own(self) -> bool:
        """Whether the net is made by code outside of fastlth."""
        return specs.is_own(self.name)

    @property
    def own_values(self) -> bool:
        """Whether its initial values are those that an own net's constructor draws."""
        return self.own and self.init is None


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
        check("data.validation", 0 < self.validation < facts.train,
               f"leave images to train on and to validate on (1 to {facts.train - 1})",
               self.validation)  # fmt: skip
        choice("data.normalise", self.normalise, ("mean-std", "unit", "half"))
        choice("data.augment", self.augment, ("none", "flip-crop", "lecode", "resized-crop", "photo-crop"))
        check("data.augment", self.augment != "photo-crop" or specs.folder(self.name) is not None,
               "be another one but for imagefolder:PATH; resized-crop does the same on images of one size",
               self.augment)  # fmt: skip
        check("data.augment", self.augment != "lecode" or facts.shape[0] == 3,
               "be none or flip-crop for images without colour", self.augment)  # fmt: skip

    def _check_facts(self) -> None:
        for name in FACTS:
            value = getattr(self, name)
            if self.own and value is None:
                raise RecipeError(f"data.{name} is not set; fastlth.compose measures it for data set '{self.name}'")
            check(f"data.{name}", self.own or value is None, f"be left out for {self.name}, whose facts are known",
                   value)  # fmt: skip
            if isinstance(value, list):  # read back
                object.__setattr__(self, name, tuple(value))
        check("data.image_size", self.image_size is None or specs.folder(self.name) is not None,
               "be left out but for imagefolder:PATH", self.image_size)  # fmt: skip
        check("data.image_size", self.image_size is None or 8 <= self.image_size <= 4096,
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
