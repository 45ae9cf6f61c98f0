"""theta0: initial values whose bits depend on integers and exact float operations alone.

Random words come from Philox. A normal deviate is the inverse of the normal distribution (algorithm AS 241,
Wichura 1988) in float64, written with + - * / sqrt only: IEEE 754 rounds each of these correctly, so every
machine computes the same bits, unlike torch's own initialisers, which differ between CPU capabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from fastlth_kernels.philox import Key, words
from numpy.typing import NDArray
from torch import nn

INIT_VERSION = 1
"""Raised when any bit of any theta0 changes; tickets that store a seed name the version they need."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""the layers whose weights are pruned, counted and drawn here"""

_BLOCK = 1 << 15  # elements at a time: the temporaries stay in cache

# AS 241 (PPND16), numerator and denominator from the highest power down to the constant.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_LN2 = 0.6931471805599453
_BELOW_MINUS_2 = 0.022750131948179207  # of a standard normal distribution
_STD_WITHIN_2 = 0.8796256610342398  # its standard deviation when cut off at -2 and 2

Array = NDArray[np.floating]


def normal(tensor: int, count: int, key: Key, *, truncated: bool = False) -> Array:
    """``count`` standard normal deviates of stream ``tensor``, float64 [count].

    ``truncated`` ones are drawn from within two standard deviations and widened, so that theirs is 1 again.
    """
    below, widened = (_BELOW_MINUS_2, 1.0 / _STD_WITHIN_2) if truncated else (0.0, 1.0)
    out = np.empty(count)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        # the middle of one of 2^32 equal intervals: never 0 or 1, |deviate| below 6.4
        p = (words(start, size, key, c2=tensor) + 0.5) * 2.0**-32
        out[start : start + size] = widened * _inverse_normal(below + (1.0 - 2.0 * below) * p)
    return out


def uniform(tensor: int, count: int, key: Key) -> Array:
    """``count`` numbers of stream ``tensor`` in [-1, 1), float64 [count]; 24 bits each, so exact in float32."""
    return (words(0, count, key, c2=tensor) >> np.uint32(8)) * 2.0**-23 - 1.0


def _inverse_normal(p: Array) -> Array:
    q = p - 0.5
    z = _ratio(_CENTRE, 0.180625 - q * q) * q
    tail = np.abs(q) > 0.425
    side = q[tail]
    r = np.sqrt(-_log(np.where(side < 0, p[tail], 1.0 - p[tail])))
    # r stays below 4.8 for 32-bit words; AS 241's second tail begins at 5 and is not needed
    z[tail] = np.where(side < 0, -1.0, 1.0) * _ratio(_TAIL, r - 1.6)
    return z


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Array) -> Array:
    above, below = (_horner(c, x) for c in coefficients)
    return above / below


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c
    return total


def _log(x: Array) -> Array:
    """ln x by ln(m 2^e) = e ln 2 + 2 atanh((m-1)/(m+1)): libm's log is not the same everywhere."""
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2.0 * m, m), e - low
    s = (m - 1.0) / (m + 1.0)
    series = _horner(tuple(1.0 / (2 * k + 1) for k in range(11, -1, -1)), s * s)
    return e * _LN2 + 2.0 * s * series


def weight_std(shape: Sequence[int], scheme: str = "glorot") -> float:
    """Standard deviation of a weight's initial values, [outputs, inputs, ...]: sqrt(2 / (fan_in + fan_out)) of
    ``glorot`` and ``glorot-truncated`` (Glorot & Bengio 2010, Gaussian form), sqrt(2 / fan_in) of ``kaiming`` (He et
    al. 2015)."""
    outputs, inputs = shape[:2]
    field = math.prod(shape[2:])
    return math.sqrt(2.0 / ((inputs if scheme == "kaiming" else inputs + outputs) * field))


def initialise_(
    model: nn.Module, key: Key, bias: str = "zero", *,
    weights: str = "glorot", std: float | None = None, norm: str = "one",
) -> None:  # fmt: skip
    """Fill every parameter and buffer in place: normal weights with the ``std`` given, else that of ``weight_std``;
    cut off at two standard deviations with ``weights="glorot-truncated"``.

    Biases are zero, or with ``bias="uniform"`` uniform in +-1/sqrt(fan_in); batch norm starts at scale 1, or with
    ``norm="uniform"`` at scales uniform in [0, 1), and at shift 0, mean 0, variance 1. The stream of a tensor is its
    place among the parameters; one that layers share is drawn by the last of them.
    """
    numbers = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    for module in model.modules():
        if isinstance(module, LAYERS) and id(module.weight) in numbers:
            spread = weight_std(module.weight.shape, weights) if std is None else std
            number, truncated = numbers[id(module.weight)], weights == "glorot-truncated"
            _fill(module.weight, spread * normal(number, module.weight.numel(), key, truncated=truncated))
            if module.bias is not None and bias == "uniform":
                bound = 1.0 / math.sqrt(module.weight[0].numel())
                _fill(module.bias, bound * uniform(numbers[id(module.bias)], len(module.bias), key))
            elif module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            if norm == "uniform":
                _fill(module.weight, (uniform(numbers[id(module.weight)], len(module.weight), key) + 1.0) / 2.0)


def _fill(parameter: torch.Tensor, values: Array) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values.astype(np.float32)).view(parameter.shape))
