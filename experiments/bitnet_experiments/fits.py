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

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitnet_jax.names import check_name

Values = NDArray[np.float64]
HUBER_DELTA = 1e-3  # as in Hoffmann et al.: quadratic below, linear above
ITERATIONS = 100


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

    law: Law
    constants: dict[str, float]
    loss: float
    error: float

    def __call__(self, *x: ArrayLike) -> Values:
        return self.law.formula([np.asarray(v, float) for v in x], *self.constants.values())


def fit(law: str | Law, x: Sequence[ArrayLike], L: ArrayLike, *, starts: int = 50, seed: int = 0) -> Fit:
    """Fits the constants of a law to losses L [n] at x (one array [n] per variable).

    Args:
      law: a name in LAWS, or another law.
      starts: number of random starts within the law's boxes; the best fit is returned.

    Raises:
      ValueError: an unknown law, numbers that are not positive, or fewer points than constants.
    """
    law = _law(law)
    columns, losses = _checked(law, x, L)
    begins = _starts(law, (starts,), seed)
    ends, costs = _minimize(law, [column[None] for column in columns], np.log(losses)[None], begins)
    best = ends[int(np.argmin(costs))]
    constants = dict(zip(law.boxes, map(float, np.exp(best)), strict=True))
    found = Fit(law, constants, float(np.min(costs)) / losses.size, math.nan)
    return found._replace(error=float(np.abs(np.log(found(*columns)) - np.log(losses)).max()))


def bootstrap(
    law: str | Law, x: Sequence[ArrayLike], L: ArrayLike, *, draws: int = 200, starts: int = 4, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the constants: percentiles over fits to runs resampled with replacement at each point x.

    Resampling within the points keeps all sizes in every sample: it is the runs that vary, the sizes were chosen. The
    deviations of n runs from their mean are scaled by sqrt(n / (n - 1)), as their variance is too small by that. Every
    sample is fitted from the constants of the whole data and from `starts` random ones, since the best fit to a sample
    may be far from that to the data.
    """
    law = _law(law)
    columns, losses = _checked(law, x, L)
    best = np.log(list(fit(law, columns, losses, seed=seed).constants.values()))
    generator = np.random.default_rng(seed)
    _, point = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    targets = np.tile(np.log(losses), (draws, 1))
    for members in (np.flatnonzero(point.ravel() == i) for i in range(point.max() + 1)):
        n, mean = members.size, np.log(losses[members]).mean()
        deviations = np.log(losses[generator.choice(members, (draws, n))]) - mean
        targets[:, members] = mean + math.sqrt(n / max(n - 1, 1)) * deviations
    begins = np.concatenate(
        [_starts(law, (draws, starts), seed), np.broadcast_to(best, (draws, 1, best.size))], axis=1
    )
    ends, costs = _minimize(
        law,
        [column[None] for column in columns],
        np.repeat(targets, starts + 1, axis=0),
        begins.reshape(-1, best.size),
    )
    winners = np.argmin(costs.reshape(draws, starts + 1), axis=1)
    refits = np.exp(ends.reshape(draws, starts + 1, -1)[np.arange(draws), winners])
    low, high = np.percentile(refits, [2.5, 97.5], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(law.boxes)}


def _law(law: str | Law) -> Law:
    if isinstance(law, Law):
        return law
    check_name("law", law, LAWS)
    return LAWS[law]


def _checked(law: Law, x: Sequence[ArrayLike], L: ArrayLike) -> tuple[list[Values], Values]:
    columns, losses = [np.asarray(v, float) for v in x], np.asarray(L, float)
    if not all(np.all(np.isfinite(v) & (v > 0)) for v in (*columns, losses)):
        raise ValueError("law: got sizes or losses that are not positive numbers; exclude those runs")
    if losses.size < len(law.boxes):
        raise ValueError(f"law: got {losses.size} points for {len(law.boxes)} constants; measure more sizes")
    return columns, losses


def _starts(law: Law, shape: tuple[int, ...], seed: int) -> Values:
    """Logarithms of random constants within the law's boxes [*shape, constants]."""
    low, high = np.log(np.array(list(law.boxes.values()))).T
    return np.random.default_rng(seed).uniform(low, high, (*shape, low.size))


def _minimize(law: Law, x: Sequence[Values], target: Values, logs: Values) -> tuple[Values, Values]:
    """Levenberg-Marquardt from many starts at once, reweighted for the Huber loss of log residuals.

    Args:
      x: variables, each [starts, n] or [1, n]; target: log losses, likewise.
      logs: logarithms of the constants [starts, constants].

    Returns:
      Logarithms of the constants and the Huber losses, summed over the points [starts].
    """
    # Wide bounds keep logarithms finite if the data does not determine a constant (c = 0 is log c = -inf).
    low, high = -30.0, 60.0
    count = logs.shape[1]

    def residuals(logs: Values) -> Values:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            predicted = law.formula(x, *(np.exp(logs[:, i, None]) for i in range(count)))
            return np.nan_to_num(np.log(predicted) - target, nan=1e3, posinf=1e3, neginf=-1e3)

    def loss(r: Values) -> Values:
        size = np.abs(r)
        huber = np.where(size <= HUBER_DELTA, r**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
        return huber.sum(1)

    r = residuals(logs)
    cost, damping = loss(r), np.full(len(logs), 1e-2)
    step_size = 1e-6
    for _ in range(ITERATIONS):
        steps = step_size * np.eye(count)
        J = np.stack([(residuals(logs + step) - r) / step_size for step in steps], axis=2)
        weight = HUBER_DELTA / np.maximum(np.abs(r), HUBER_DELTA)
        JW = J * weight[:, :, None]
        H = np.einsum("bni,bnj->bij", JW, J)
        scale = np.maximum(np.einsum("bii->bi", H), 1e-12)
        H[:, np.arange(count), np.arange(count)] += damping[:, None] * scale
        move = np.linalg.solve(H, np.einsum("bni,bn->bi", JW, r)[:, :, None])[:, :, 0]
        tried = np.clip(logs - np.clip(move, -2, 2), low, high)
        new = residuals(tried)
        new_cost = loss(new)
        better = new_cost < cost
        settled = np.all(np.abs(tried - logs) < 1e-9) or not np.any(better | (damping < 1e8))
        logs = np.where(better[:, None], tried, logs)
        r, cost = np.where(better[:, None], new, r), np.where(better, new_cost, cost)
        damping = np.where(better, np.maximum(damping / 3, 1e-9), np.minimum(damping * 4, 1e10))
        if settled:
            break
    return logs, cost


def held_out_error(
    law: str | Law, x: Sequence[ArrayLike], L: ArrayLike, largest: float | None = None
) -> float:
    """Relative error of the mean loss at the largest N (x[0]), predicted by a fit to all smaller ones.

    Raises:
      ValueError: too few points remain to fit the law.
    """
    columns, losses = [np.asarray(v, float) for v in x], np.asarray(L, float)
    out = columns[0] >= (columns[0].max() if largest is None else largest)
    smaller = fit(law, [c[~out] for c in columns], losses[~out])
    predicted = float(np.mean(smaller(*[c[out] for c in columns])))
    return predicted / float(np.mean(losses[out])) - 1
