"""Frankle & Carbin 2019, "The Lottery Ticket Hypothesis" (arXiv 1803.03635v5): the figures' searches and controls.

LeNet reads the test set at every evaluation in all figures, since figures 3 and 11 draw it: so all share its runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlth.experiments.control import Control
from fastlth.experiments.figures.declare import Against, Arm, Branched, Chosen, Figure, Follow, Over, Stated

SOURCE = "Frankle & Carbin 2019, arXiv 1803.03635v5"
STOP, ACCURACY = Against("early_stop_iteration"), Against("early_stop_test_accuracy")
END, TRAIN = Against("test_accuracy"), Against("train_accuracy")
VALIDATION = Against("early_stop_validation_accuracy")

REINIT = Branched(label="random reinit", control=Control(kind="random-reinit"), trials=3)
SPARSE = Branched(label="random sparse", control=Control(kind="random-prune", reinit=True), trials=2)
ONE_SHOT = Branched(label="one-shot", control=Control(kind="one-shot"))
ONE_SHOT_REINIT = Branched(label="one-shot, reinit", control=Control(kind="one-shot", reinit=True), trials=3)
CONTINUED = Branched(label="continued training", control=Control(kind="continued"))
AT_INIT = Branched(
    label="pruned at iteration 0", control=Control(kind="prune-at-init", method="magnitude", scope="layer")
)

NOISE = tuple(
    Branched(label=f"noise of {s:g} standard deviations", control=Control(kind="noise", sigma=s))
    for s in (0.5, 1.0, 2.0, 3.0)
)
STDS = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
"""of all initial weights"""
WIDTHS = {
    (25, 9): 12, (50, 17): 15, (100, 34): 19, (150, 50): 20, (200, 67): 22,
    (300, 100): 24, (400, 134): 25, (500, 167): 26, (700, 233): 28, (900, 300): 30,
}  # fmt: skip
"""units of the hidden layers -> rounds"""

CONV = ("conv-2", "conv-4", "conv-6")
CONV_ROUNDS = 21


def lenet(
    *follow: Follow, rounds: int = 26, label: str = "tickets", settings: Mapping[str, Any] | None = None,
    replicates: int = 5, published: bool = True, short_rounds: int | None = 18, model: str = "lenet-300-100",
) -> Arm:  # fmt: skip
    """LeNet-300-100 on MNIST, as in the paper's preset: ``rounds`` prunings, then what follows from the tickets."""
    return Arm(
        label=label, panel="LeNet", model=model, dataset="mnist", rounds=rounds, replicates=replicates,
        settings={"evaluate.test": "always", **(settings or {})}, follow=follow, published=published,
        short_rounds=short_rounds,
    )  # fmt: skip


def conv(model: str, *follow: Follow, label: str = "tickets", preset: str = "paper", replicates: int = 5,
         settings: Mapping[str, Any] | None = None, published: bool = True, small: bool = True) -> Arm:  # fmt: skip
    """Conv-2, -4 or -6 on CIFAR-10, 21 prunings at the rates of the preset."""
    return Arm(
        label=label, panel=model.capitalize(), model=model, dataset="cifar-10", preset=preset, rounds=CONV_ROUNDS,
        replicates=replicates, settings=settings or {}, follow=follow, published=published, small=small,
    )  # fmt: skip


def vgg(lr: float, warmup: int, *follow: Follow, panel: str, label: str = "tickets", replicates: int = 3,
        scope: str = "global") -> Arm:  # fmt: skip
    """VGG-19 on CIFAR-10, 32 prunings, at a learning rate with so many iterations of warm-up."""
    return Arm(
        label=label, panel=panel, model="vgg19", dataset="cifar-10", rounds=32, replicates=replicates, follow=follow,
        settings={"train.lr": lr, "schedule.warmup": warmup, "prune.scope": scope, "evaluate.test": "always"},
    )  # fmt: skip


def resnet(lr: float, warmup: int, *follow: Follow, panel: str, label: str = "tickets", replicates: int = 3,
           scope: str = "global") -> Arm:  # fmt: skip
    """The net that the paper calls ResNet-18."""
    return Arm(
        label=label, panel=panel, model="resnet-20", dataset="cifar-10", rounds=14, replicates=replicates,
        follow=follow,
        settings={"train.lr": lr, "schedule.warmup": warmup, "prune.scope": scope, "evaluate.test": "always"},
    )  # fmt: skip


def _panels(quantity: str) -> Over:
    tickets, both = ("tickets",), ("tickets", "random reinit")
    return Over(quantity=quantity, panels=(
        Chosen(title="", rounds=(0, 3, 7), labels=tickets),
        Chosen(title="", rounds=(0, 7, 12, 15, 18), labels=tickets),
        Chosen(title="", rounds=(3, 7), labels=both),
    ))  # fmt: skip


TRAINING = (lenet(Branched(label="random reinit", control=REINIT.control, rounds=(3, 7), trials=3), rounds=18),)
ITERATIVE = (lenet(REINIT, ONE_SHOT, ONE_SHOT_REINIT),)
TRIED = tuple(conv(model, REINIT, small=model == "conv-2") for model in CONV)
REINIT_STATED = Stated(
    panel="LeNet", line="random reinit", quantity="early_stop_test_accuracy", density=0.2107, gain=0.0
)
LEARNING_RATES = ((0.1, 0, "learning rate 0.1"), (0.01, 0, "learning rate 0.01"))
VGG_RATES = (*LEARNING_RATES, (0.1, 10_000, "learning rate 0.1, warm-up"))
RESNET_RATES = (*LEARNING_RATES, (0.03, 20_000, "learning rate 0.03, warm-up"))
DENSITIES = "The paper prunes its one-shot nets to densities of their own; here to those of the iterative rounds."
UNKNOWN_TRIALS = "The paper does not state how often it trained; 3 replicates here."


def _figure(number: int, what: str, arms: tuple[Arm, ...], *pictures: Against | Over, note: str = "",
            stated: tuple[Stated, ...] = ()) -> Figure:  # fmt: skip
    return Figure(name=f"fc-{number}", what=what, source=f"{SOURCE}, figure {number}", arms=arms, pictures=pictures,
                  stated=stated, note=note)  # fmt: skip


FIGURES = (
    _figure(1, "early stop and test accuracy there: tickets against randomly sampled sparse nets",
            (lenet(SPARSE, rounds=28), *(conv(m, SPARSE, small=False) for m in CONV)), STOP, ACCURACY),
    _figure(3, "LeNet's test accuracy over training at six densities, and of reinitialised tickets", TRAINING,
            _panels("test_accuracy")),
    _figure(4, "LeNet: iterative and one-shot tickets, and both reinitialised", ITERATIVE, STOP, ACCURACY, END,
            note=f"{DENSITIES} Training accuracy at early stop is not drawn.", stated=(REINIT_STATED,)),
    _figure(5, "Conv-2, -4 and -6: tickets and reinitialised tickets", TRIED, STOP, ACCURACY, END,
            note="Training accuracy at early stop is not drawn."),
    _figure(6, "Conv-2, -4 and -6 with dropout and without",
            tuple(arm for m in CONV for arm in (
                conv(m, label="no dropout", small=m == "conv-2"),
                conv(m, label="dropout", preset="paper-dropout", published=False, small=m == "conv-2"))),
            STOP, ACCURACY),
    _figure(7, "VGG-19 at two learning rates and with warm-up: tickets and reinitialised tickets",
            tuple(vgg(lr, warmup, REINIT, panel=panel) for lr, warmup, panel in VGG_RATES),
            Against("test_accuracy", at=30_000), Against("test_accuracy", at=60_000), END, note=UNKNOWN_TRIALS,
            stated=(Stated(panel="learning rate 0.1, warm-up", line="tickets", quantity="test_accuracy",
                           density=0.0147, gain=0.0),)),
    _figure(8, "ResNet-20 at two learning rates and with warm-up: tickets and reinitialised tickets",
            tuple(resnet(lr, warmup, REINIT, panel=panel) for lr, warmup, panel in RESNET_RATES),
            Against("test_accuracy", at=10_000), Against("test_accuracy", at=20_000), END, note=UNKNOWN_TRIALS,
            stated=tuple(
                Stated(panel=panel, line="tickets", quantity="test_accuracy", density=density, value=value)
                for panel, density, value in (
                    ("learning rate 0.1", 1.0, 0.905), ("learning rate 0.01", 0.417, 0.895),
                    ("learning rate 0.01", 0.219, 0.895), ("learning rate 0.03, warm-up", 0.271, 0.905)))),
    _figure(9, "LeNet: weights reset every round against training on", (lenet(CONTINUED, replicates=3),),
            STOP, VALIDATION),
    _figure(10, "Conv-2, -4 and -6: weights reset every round against training on",
            tuple(conv(m, CONTINUED, replicates=3, small=m == "conv-2") for m in CONV), STOP, VALIDATION),
    _figure(11, "LeNet's validation loss over training, for the nets of figure 3", TRAINING,
            _panels("validation_loss")),
    _figure(12, "figure 4 with training accuracy at the end", ITERATIVE, STOP, ACCURACY, END, TRAIN, note=DENSITIES),
    _figure(13, "figure 5 with training accuracy at the end", TRIED, STOP, ACCURACY, END, TRAIN),
    _figure(14, "test accuracy at the end: tickets, reinitialised tickets, random sparse nets",
            (lenet(REINIT, SPARSE), *(conv(m, REINIT, SPARSE, small=False) for m in CONV),
             *(vgg(lr, w, REINIT, SPARSE, panel=f"VGG-19, {name}") for lr, w, name in VGG_RATES),
             *(resnet(lr, w, REINIT, SPARSE, panel=f"ResNet-20, {name}") for lr, w, name in RESNET_RATES)), END),
    _figure(18, "LeNet: tickets, reinitialised tickets, nets pruned by the size of their initial values",
            (lenet(REINIT, AT_INIT),), STOP, ACCURACY),
    _figure(25, "LeNet: tickets with noise on their initial values",
            (lenet(REINIT, *NOISE),), STOP, ACCURACY,
            note="One draw of noise per replicate and round; the paper does not say how many it made."),
    _figure(29, "LeNet at five pruning rates",
            tuple(lenet(label=f"rate {rate:g}", rounds=rounds, short_rounds=short, replicates=3, published=False,
                        settings={"prune.rate": rate})
                  for rate, rounds, short in ((0.1, 54, 19), (0.2, 26, 9), (0.4, 11, 4), (0.6, 6, 2), (0.8, 3, 1))),
            STOP, VALIDATION),
    _figure(30, "LeNet with other sizes of initial values",
            tuple(lenet(label=label, settings=settings, short_rounds=9, replicates=3, published=False)
                  for label, settings in (*((f"{std:g}", {"model.weight_std": std}) for std in STDS), ("Glorot", {}))),
            STOP, VALIDATION),
    _figure(31, "LeNets of ten widths",
            tuple(lenet(label=f"{a}, {b}", model=f"lenet-{a}-{b}", rounds=rounds, short_rounds=9, replicates=3,
                        published=False) for (a, b), rounds in WIDTHS.items()),
            Against("early_stop_iteration", counted=True), Against("early_stop_validation_accuracy", counted=True),
            note="Every net is pruned until about 1,300 weights are left, where the paper's axis ends."),
    _figure(37, "Conv-2, -4 and -6: only convolutions pruned, only linear layers, or both",
            tuple(conv(m, label=label, settings={} if scale is None else {"prune.scale": scale}, replicates=3,
                       published=False, small=m == "conv-2")
                  for m in CONV for label, scale in (
                      ("both", None), ("linear layers", {"conv*": 0.0, "output": 0.5}),
                      ("convolutions", {"conv*": 0.75 if m == "conv-6" else 0.5, "fc*": 0.0, "output": 0.0}))),
            STOP, VALIDATION),
    _figure(38, "VGG-19: one ranking over all layers against one per layer",
            tuple(vgg(lr, w, panel=name, label=scope, scope=scope)
                  for lr, w, name in VGG_RATES for scope in ("global", "layer")), END),
    _figure(39, "ResNet-20: one ranking over all layers against one per layer",
            tuple(resnet(lr, w, panel=name, label=scope, scope=scope)
                  for lr, w, name in RESNET_RATES for scope in ("global", "layer")), END),
    _figure(44, "ResNet-20 at learning rate 0.03: lengths of the warm-up",
            tuple(resnet(0.03, k, panel="", label=f"warm-up {k:,}") for k in (0, 500, 1_000, 5_000, 10_000, 20_000)),
            VALIDATION),
    _figure(45, "VGG-19 at learning rate 0.1: lengths of the warm-up",
            tuple(vgg(0.1, k, panel="", label=f"warm-up {k:,}")
                  for k in (0, 1_000, 5_000, 10_000, 20_000, 50_000)), VALIDATION),
)  # fmt: skip
