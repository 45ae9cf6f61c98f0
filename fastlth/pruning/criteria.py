"""Criteria: a score per weight from its value before (w_i) and after (w_f) a round's training.

The weights with the lowest scores are removed (Zhou et al. 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "large_final": lambda initial, final: final.abs(),
}
