"""Loss as a function of size, tokens and bits per weight: forms of the law, and which of them data prefers.

N is the number of weights, D of tokens, P of bits; every form is L(N, D) = E + A / N^alpha + B / D^beta, changed by P:

    no bits    unchanged
    Kumar      N (1 - exp(-P / gamma)) in place of N             Scaling Laws for Precision (2411.04330)
    capacity   N rho_P in place of N, one factor for each P      as 2506.01863 has it for compressed weights
    both       and D sigma_P in place of D
    additive   + k_P D^delta / N^nu, one factor for each P       as 2505.14302 has it for the error of quantization
    separate   five separate constants for each P                as Spectra 1.1 (2506.23025) fits ternary models

The factors of the largest P are 1 (k: 0), so that its law is the one without bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitnet_experiments.fits import Law, Values, bootstrap, chinchilla, effective_size, fit
from bitnet_experiments.intervals import Range

_SHARED = {"E": (0.1, 3.0), "A": (1e-2, 1e2), "alpha": (0.05, 1.0), "B": (1e-2, 1e2), "beta": (0.05, 1.0)}
DECISIVE = 10.0  # difference of BIC: odds of e^5


def kumar(
    x: Sequence[Values], E: float, A: float, alpha: float, B: float, beta: float, gamma: float
) -> Values:
    """x = (N, D, P)."""
    return chinchilla([effective_size(x[0], x[2], gamma), x[1]], E, A, alpha, B, beta)


KUMAR = Law(kumar, _SHARED | {"gamma": (0.3, 10.0)})


def forms(bits: Sequence[float]) -> dict[str, Law]:
    """Name -> the law, whose constants depend on which P there are; x = (N, D, P).

    Args:
      bits: the values of P, ascending.
    """
    few = bits[:-1]

    def of(P: Values, factors: Sequence[Values], last: float) -> Values:
        """For every point the factor of its P. The factors may have a leading axis of several fits."""
        shape = np.broadcast_shapes(P.shape, *(np.shape(factor) for factor in factors))
        chosen = np.full(shape, last)
        for one, factor in zip(few, factors, strict=True):
            chosen = np.where(one == P, factor, chosen)
        return chosen

    def capacity(x: Sequence[Values], *constants: Values) -> Values:
        shared, rho = constants[:5], constants[5:]
        return chinchilla([x[0] * of(x[2], rho, 1.0), x[1]], *shared)

    def both(x: Sequence[Values], *constants: Values) -> Values:
        shared, rho, sigma = constants[:5], constants[5 : 5 + len(few)], constants[5 + len(few) :]
        return chinchilla([x[0] * of(x[2], rho, 1.0), x[1] * of(x[2], sigma, 1.0)], *shared)

    def additive(x: Sequence[Values], *constants: Values) -> Values:
        shared, (delta, nu), k = constants[:5], constants[5:7], constants[7:]
        return chinchilla(x[:2], *shared) + of(x[2], k, 0.0) * x[1] ** delta / x[0] ** nu

    def each(name: str, box: tuple[float, float]) -> dict[str, tuple[float, float]]:
        return {f"{name}_{one:g}": box for one in few}

    return {
        "no bits": Law(lambda x, *constants: chinchilla(x[:2], *constants), _SHARED),
        "Kumar": KUMAR,
        "capacity": Law(capacity, _SHARED | each("rho", (0.1, 1.0))),
        "both": Law(both, _SHARED | each("rho", (0.1, 1.0)) | each("sigma", (0.1, 1.0))),
        "additive": Law(
            additive, _SHARED | {"delta": (0.02, 1.0), "nu": (0.02, 1.0)} | each("k", (1e-3, 0.3))
        ),
    }


class Compared(NamedTuple):
    """How well a form fits."""

    form: str
    constants: int
    bic: float  # n ln(mean squared log residual) + constants ln n
    error: float  # root mean squared log residual
    held_out: float  # relative error of the mean loss at the largest N, predicted from all smaller ones


def compare(N: ArrayLike, D: ArrayLike, P: ArrayLike, L: ArrayLike, *, starts: int = 50) -> list[Compared]:
    """Every form fitted to losses L [n] at N, D, P [n], the best by BIC first; those with too many constants are left
    out.

    Args:
      starts: random starts of every fit.
    """
    x, losses = [np.asarray(v, float) for v in (N, D, P)], np.asarray(L, float)
    smaller = x[0] < x[0].max()
    bits = np.unique(x[2]).tolist()

    def predicted(law: str | Law, used: NDArray[np.bool_], variables: Sequence[Values]) -> Values:
        """At all points, by a fit to the used ones."""
        return fit(law, [v[used] for v in variables], losses[used], starts=starts)(*variables)

    def compared(form: str, constants: int, whole: Values, rest: Values) -> Compared:
        """Of the predictions by a fit to all points, and by one to the smaller sizes."""
        squared = float(np.mean((np.log(whole) - np.log(losses)) ** 2))
        bic = losses.size * math.log(squared) + constants * math.log(losses.size)
        held_out = float(np.mean(rest[~smaller]) / np.mean(losses[~smaller]) - 1)
        return Compared(form, constants, bic, math.sqrt(squared), held_out)

    rows = []
    for name, law in forms(bits).items():
        if np.count_nonzero(smaller) > len(law.boxes):
            fits = (predicted(law, used, x) for used in (np.full(losses.size, True), smaller))
            rows.append(compared(name, len(law.boxes), *fits))
    each = [x[2] == one for one in bits]
    if min(np.count_nonzero(mine & smaller) for mine in each) > len(_SHARED):
        whole, rest = np.empty_like(losses), np.empty_like(losses)
        for mine in each:
            whole[mine] = predicted("chinchilla", mine, x[:2])[mine]
            rest[mine] = predicted("chinchilla", mine & smaller, x[:2])[mine]
        rows.append(compared("separate", len(_SHARED) * len(bits), whole, rest))
    return sorted(rows, key=lambda row: row.bic)


def gamma(N: ArrayLike, D: ArrayLike, P: ArrayLike, L: ArrayLike, *, draws: int = 200) -> Range:
    """gamma of Kumar's form, fitted to losses L [n] at N, D, P [n], with its 95 % interval by bootstrap."""
    low, high = bootstrap(KUMAR, [N, D, P], L, draws=draws, starts=2)["gamma"]
    return Range(fit(KUMAR, [N, D, P], L).constants["gamma"], low, high)
