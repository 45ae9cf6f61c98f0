"""Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning" (arXiv 2003.02389).

ResNet-20: 71,108 iterations of batch 128 (182 epochs of all 50,000 images), learning rate / 10 after 91 and 136.
"""

from __future__ import annotations

from fastlth.experiments.control import Control
from fastlth.experiments.figures.declare import Against, Arm, Branched, Figure, Follow, Stated
from fastlth.experiments.figures.frankle_carbin import lenet

DENSITIES = (0.8, 0.64, 0.512, 0.41, 0.328, 0.262, 0.21, 0.168, 0.134, 0.107)
MEDIANS = {
    "learning-rate rewinding": (92.11, 92.12, 92.29, 92.27, 92.12, 92.14, 91.89, 91.79, 91.47, 91.01),
    "rewound to epoch 12": (91.76, 91.76, 91.99, 91.83, 92.03, 91.64, 91.67, 91.31, 91.41, 91.00),
    "rewound to 0": (91.86, 91.31, 90.59, 90.53, 90.01, 89.60, 89.21, 88.56, 87.55, 86.67),
    "fine-tuning": (91.61, 91.81, 91.38, 91.44, 91.00, 90.64, 90.46, 89.99, 88.98, 89.33),
    "one-shot, reinit": (91.17, 90.64, 90.48, 90.26, 89.70, 89.06, 88.49, 87.91, 87.46, 86.88),
}
CONTROLS = (
    Branched(label="learning-rate rewinding", control=Control(kind="lr-rewind")),
    Branched(label="fine-tuning", control=Control(kind="finetune")),
    Branched(label="one-shot, reinit", control=Control(kind="one-shot", reinit=True)),
)


def resnet(label: str, rewind_to: int, *follow: Follow) -> Arm:
    """ResNet-20 on CIFAR-10, ten global prunings of 20 %, rewound to iteration ``rewind_to``."""
    return Arm(
        label=label, panel="ResNet-20", model="resnet-20", dataset="cifar-10", rounds=10, replicates=3, follow=follow,
        settings={
            "train.iterations": 71_108, "train.lr": 0.1, "train.weight_decay": 2e-4, "schedule.warmup": 0,
            "schedule.milestones": [35_581, 53_176], "prune.scale": {}, "prune.rewind_to": rewind_to,
        },
    )  # fmt: skip


FIGURES = (
    Figure(
        name="renda", what="rewinding weights, rewinding the learning rate, fine-tuning",
        source="Renda et al. 2020, arXiv 2003.02389", pictures=(Against("test_accuracy"),),
        arms=(
            resnet("rewound to 0", 0, *CONTROLS), resnet("rewound to epoch 12", 4_692),
            lenet(*CONTROLS, label="rewound to 0", rounds=18, replicates=3, published=False),
        ),
        stated=tuple(
            Stated(panel="ResNet-20", line=line, quantity="test_accuracy", density=density, value=value / 100)
            for line, values in MEDIANS.items() for density, value in zip(DENSITIES, values, strict=True)
        ),
        note="LeNet is not in the paper. The paper's numbers are medians of three runs, trained on all 50,000 images.",
    ),
)  # fmt: skip
