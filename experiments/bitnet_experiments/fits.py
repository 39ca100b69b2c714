"""Scaling laws and their uncertainty: multi-start fits, bootstrap intervals, extrapolation.

    power      L(N)    = a N^-b + c                          BitNet (2310.11453), Spectra (2407.12327)
    chinchilla L(N, D) = E + A / N^alpha + B / D^beta        Hoffmann et al. (2203.15556)
    precision  L(N, P) = E + A / N_eff^alpha                 Scaling Laws for Precision (2411.04330), at one D
               N_eff   = N (1 - exp(-P / gamma))             weight bits P; they found gamma = 2.6745

As in Hoffmann et al., fits minimize the Huber loss of log residuals, which is robust to outliers and to the range of
L. Constants are positive and fitted as logarithms. N, D and L only need to be positive; the fit is better conditioned
with sizes in millions than in units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
from numpy.typing import ArrayLike, NDArray

from bitnet_jax.names import check_name

Values = NDArray[np.float64]
HUBER_DELTA = 1e-3  # as in Hoffmann et al.: quadratic below, linear above


def power(x: Sequence[Values], a: float, b: float, c: float) -> Values:
    """`a N^-b + c`; x = (N,)."""
    return a * x[0] ** -b + c


def chinchilla(x: Sequence[Values], E: float, A: float, alpha: float, B: float, beta: float) -> Values:
    """`E + A / N^alpha + B / D^beta`; x = (N, D)."""
    return E + A / x[0] ** alpha + B / x[1] ** beta


def effective_size(N: ArrayLike, bits: ArrayLike, gamma: float) -> Values:
    """`N (1 - exp(-bits / gamma))` (2411.04330)."""
    return np.asarray(N, float) * -np.expm1(-np.asarray(bits, float) / gamma)


def precision(x: Sequence[Values], E: float, A: float, alpha: float, gamma: float) -> Values:
    """`E + A / N_eff^alpha`; x = (N, weight bits)."""
    return E + A / effective_size(x[0], x[1], gamma) ** alpha


class Law(NamedTuple):
    """A formula L(x, *constants), and the names of its constants with the ranges of their (log-uniform) starts."""

    formula: Callable[..., Values]
    boxes: Mapping[str, tuple[float, float]]


LAWS = {
    "power": Law(power, {"a": (1e-2, 1e3), "b": (0.05, 1.0), "c": (0.1, 3.0)}),
    "chinchilla": Law(
        chinchilla,
        {"E": (0.1, 3.0), "A": (1e-2, 1e3), "alpha": (0.05, 1.0), "B": (1e-2, 1e3), "beta": (0.05, 1.0)},
    ),
    "precision": Law(
        precision, {"E": (0.1, 3.0), "A": (1e-2, 1e3), "alpha": (0.05, 1.0), "gamma": (0.3, 10.0)}
    ),
}


class Fit(NamedTuple):
    """Constants by name; `loss` is the mean Huber loss of the log residuals, `error` the largest absolute one."""

    law: str
    constants: dict[str, float]
    loss: float
    error: float

    def __call__(self, *x: ArrayLike) -> Values:
        return LAWS[self.law].formula([np.asarray(v, float) for v in x], **self.constants)


def fit(
    law: str,
    x: Sequence[ArrayLike],
    L: ArrayLike,
    *,
    starts: int = 50,
    seed: int = 0,
    near: Fit | None = None,
) -> Fit:
    """Fits the constants of a law to losses L [n] at x (one array [n] per variable).

    Args:
      starts: number of random starts within the law's boxes; the best fit is returned.
      near: use these constants as the only start instead.

    Raises:
      ValueError: an unknown law, numbers that are not positive, or fewer points than constants.
    """
    check_name("law", law, LAWS)
    formula, boxes = LAWS[law]
    columns, losses = [np.asarray(v, float) for v in x], np.asarray(L, float)
    if not all(np.all(np.isfinite(v) & (v > 0)) for v in (*columns, losses)):
        raise ValueError(f"{law}: got sizes or losses that are not positive numbers; exclude those runs")
    if losses.size < len(boxes):
        raise ValueError(f"{law}: got {losses.size} points for {len(boxes)} constants; measure more sizes")
    target = np.log(losses)

    def residuals(logarithms: Values) -> Values:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            predicted = formula(columns, *np.exp(logarithms))
            return np.nan_to_num(np.log(predicted) - target, nan=1e3, posinf=1e3, neginf=-1e3)

    low, high = np.log(np.array(list(boxes.values()))).T
    if near is not None:
        begins = [np.log([near.constants[name] for name in boxes])]
    else:
        begins = list(np.random.default_rng(seed).uniform(low, high, (starts, len(boxes))))
    # Wide bounds keep logarithms finite if the data does not determine a constant (c = 0 is log c = -inf).
    bounds = (np.minimum(low, -30.0), np.maximum(high, 60.0))
    ends = [
        scipy.optimize.least_squares(
            residuals, begin, loss="huber", f_scale=HUBER_DELTA, x_scale="jac", bounds=bounds, max_nfev=2000
        )
        for begin in begins
    ]
    best = min(ends, key=lambda end: end.cost)
    constants = dict(zip(boxes, map(float, np.exp(best.x)), strict=True))
    return Fit(law, constants, float(best.cost / losses.size), float(np.abs(best.fun).max()))


def bootstrap(
    law: str, x: Sequence[ArrayLike], L: ArrayLike, *, draws: int = 200, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the constants: percentiles over refits to points resampled with replacement.

    Samples with fewer distinct points than constants are redrawn: the law cannot be fitted to them.
    """
    columns, losses = [np.asarray(v, float) for v in x], np.asarray(L, float)
    best, generator = fit(law, columns, losses, seed=seed), np.random.default_rng(seed)
    needed = len(LAWS[law].boxes)
    refits: list[dict[str, float]] = []
    while len(refits) < draws:
        chosen = generator.integers(0, losses.size, losses.size)
        sample = np.stack([column[chosen] for column in columns], 1)
        if len(np.unique(sample, axis=0)) >= min(needed, len(np.unique(np.stack(columns, 1), axis=0))):
            refits.append(fit(law, [c[chosen] for c in columns], losses[chosen], near=best).constants)
    return {
        name: (
            float(np.percentile([constants[name] for constants in refits], 2.5)),
            float(np.percentile([constants[name] for constants in refits], 97.5)),
        )
        for name in best.constants
    }


def held_out_error(law: str, x: Sequence[ArrayLike], L: ArrayLike, largest: float | None = None) -> float:
    """Relative error of the mean loss at the largest N (x[0]), predicted by a fit to all smaller ones.

    Raises:
      ValueError: too few points remain to fit the law.
    """
    columns, losses = [np.asarray(v, float) for v in x], np.asarray(L, float)
    out = columns[0] >= (columns[0].max() if largest is None else largest)
    smaller = fit(law, [c[~out] for c in columns], losses[~out])
    predicted = float(np.mean(smaller(*[c[out] for c in columns])))
    return predicted / float(np.mean(losses[out])) - 1
