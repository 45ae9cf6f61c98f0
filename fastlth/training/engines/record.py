"""What an engine notes of its steps since the last evaluation: a row each, summed in one go when they are read, so that
where a chunk of steps ends changes no bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlth.training.engines.base import Chunk
from fastlth.training.evaluate import Scores


@dataclass(frozen=True)
class Record:
    """The first ``rows`` rows count. Whoever makes steps writes them and then ``advance``s."""

    losses: Tensor
    """mean loss of each step, float32 [n], or [n, R] of R replicates at once"""
    hits: Tensor
    """int64, likewise"""
    images: Tensor
    """of each step's batch, int64 [n] on the CPU"""
    filled: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @staticmethod
    def of(rows: int, device: torch.device | str = "cpu", each: tuple[int, ...] = ()) -> Record:
        """An empty one; ``each`` is (R,) for R replicates."""
        losses = torch.zeros(rows, *each, dtype=torch.float32, device=device)
        return Record(losses, torch.zeros_like(losses, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))

    def replicate(self, r: int) -> Record:
        """A view of one replicate's rows; how many count is its own."""
        return Record(self.losses[:, r], self.hits[:, r], self.images)

    @property
    def rows(self) -> int:
        return int(self.filled)

    def advance(self, rows: int) -> None:
        """So many rows were written."""
        self.filled.add_(rows)

    def chunk(self, first: int, last: int, seconds: float | None = None) -> Chunk:
        """What it says of the steps [first, last), which are the latest. The one host read of a chunk."""
        latest = slice(self.rows - (last - first), self.rows)
        bad = (~self.losses[latest].isfinite()).nonzero()
        return Chunk(int(self.images[latest].sum()), first + int(bad[0]) if len(bad) else None, seconds)

    def read(self) -> Scores:
        """Loss and accuracy over all rows that count; the record begins anew."""
        rows = slice(self.rows)
        total = max(int(self.images[rows].sum()), 1)
        loss = float((self.losses[rows].cpu().double() * self.images[rows]).sum()) / total
        hits = int(self.hits[rows].sum())
        self.clear()
        return Scores(loss, hits / total)

    def clear(self) -> None:
        """No row counts."""
        self.filled.zero_()

    def state(self) -> dict[str, Tensor]:
        """For ``Engine.state``."""
        return {"interval/losses": self.losses, "interval/hits": self.hits, "interval/images": self.images,
                "interval/filled": self.filled}  # fmt: skip
