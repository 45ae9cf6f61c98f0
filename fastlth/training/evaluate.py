"""Loss and accuracy over a whole set, in large batches, read back once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlth.data.normalise import normalise
from fastlth.data.sources import Pixels


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy and share of images whose largest logit is the label's."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    model: nn.Module, pixels: Tensor | Pixels, labels: Tensor, table: Tensor, *, precision: str, batch: int
) -> Scores:
    """Scores of ``model`` in evaluation mode on pixels uint8 [N, H, W, C] and labels int64 [N], unaugmented.

    ``table`` is on the model's device; images that are not are copied there batch by batch. The model is left in
    training mode. One host read, at the end.
    """
    model.eval()
    device = table.device
    loss = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(labels), batch):
        target = labels[start : start + batch].to(device)
        part = pixels[start : start + len(target)]
        images = (part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part))).to(device)
        x = normalise(images.permute(0, 3, 1, 2), table, torch.float32)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        loss += F.cross_entropy(logits.float(), target, reduction="sum")
        hits += (logits.argmax(1) == target).sum()
    model.train()
    return Scores(float(loss) / len(labels), int(hits) / len(labels))
