"""The knapsack: by hand, against all choices of small problems, and against the linear program solver of scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize

from bitnet_jax.conversion.allocation import Frontier, Option

Options = dict[str, dict[str, Option]]


def test_by_hand() -> None:
    frontier = Frontier(
        {
            "a": {"1": Option(1, 8.0), "4": Option(4, 1.0)},
            "b": {"1": Option(2, 3.0), "4": Option(8, 0.5)},
        }
    )
    # 3 bytes: 11; 6: a gets four bits, 4; 9: b instead would be 8.5, worse than 4; 12: both, 1.5.
    assert frontier.bytes.tolist() == [3, 6, 12]
    assert frontier.harm.tolist() == [11, 4, 1.5]
    assert frontier.within_bytes(2) is None
    assert frontier.within_bytes(5) == (3, 11, {"a": "1", "b": "1"})
    assert frontier.within_bytes(11) == (6, 4, {"a": "4", "b": "1"})
    assert frontier.within_bytes(10**9) == (12, 1.5, {"a": "4", "b": "4"})
    assert frontier.within_harm(1.4) is None
    assert frontier.within_harm(4) == (6, 4, {"a": "4", "b": "1"})
    assert frontier.within_harm(50) == (3, 11, {"a": "1", "b": "1"})


def test_more_bytes_without_less_harm_are_never_taken() -> None:
    frontier = Frontier({"a": {"2": Option(4, 2.0), "4": Option(4, 1.0), "8": Option(8, 1.0)}})
    assert frontier.bytes.tolist() == [4]
    assert frontier.choice(0).names == {"a": "4"}


def problem(seed: int, layers: int, harms: int = 1000) -> Options:
    """With three shapes of layers, and harms that often tie where `harms` is small."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(1, 6, 3)
    return {
        f"layer {i}": {
            grid: Option(int(bits * shapes[i % 3]), float(rng.integers(harms)) / bits)
            for grid, bits in (("1", 1), ("1.58", 2), ("4", 4), ("8", 8))
        }
        for i in range(layers)
    }


@pytest.mark.parametrize("harms", [1000, 3])
@pytest.mark.parametrize("seed", range(5))
def test_no_choice_is_better(seed: int, harms: int) -> None:
    options = problem(seed, 5, harms)
    frontier = Frontier(options)
    every = [
        (sum(o.bytes for o in taken), sum(o.harm for o in taken))
        for taken in itertools.product(*(its.values() for its in options.values()))
    ]
    for budget in range(min(every)[0], max(every)[0] + 1):
        found = frontier.within_bytes(budget)
        assert found is not None
        taken = [options[layer][name] for layer, name in found.names.items()]
        assert sum(o.bytes for o in taken) == found.bytes <= budget
        assert sum(o.harm for o in taken) == pytest.approx(found.harm, rel=1e-12)
        assert found.harm == pytest.approx(min(harm for nbytes, harm in every if nbytes <= budget), rel=1e-12)
        smallest = frontier.within_harm(found.harm)
        assert smallest is not None
        assert smallest.bytes == min(n for n, harm in every if harm <= found.harm * (1 + 1e-12))


def test_a_large_problem_against_mixed_integer_programming() -> None:
    options = problem(7, 60)
    frontier = Frontier(options)
    flat = [(i, o) for i, its in enumerate(options.values()) for o in its.values()]
    one_each = np.array([[float(layer == i) for layer, _ in flat] for i in range(len(options))])
    nbytes = np.array([[float(o.bytes) for _, o in flat]])
    for budget in np.linspace(frontier.bytes[0], frontier.bytes[-1], 4).astype(int):
        solved = scipy.optimize.milp(
            [o.harm for _, o in flat],
            integrality=np.ones(len(flat)),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=[
                scipy.optimize.LinearConstraint(one_each, 1, 1),
                scipy.optimize.LinearConstraint(nbytes, ub=budget),
            ],
            options={"mip_rel_gap": 0},
        )
        found = frontier.within_bytes(int(budget))
        assert found is not None
        assert found.harm == pytest.approx(solved.fun, rel=1e-6)


def test_harms_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="b: got the options .*nan.*, expected some, with finite harms"):
        Frontier({"a": {"1": Option(1, 1.0)}, "b": {"1": Option(1, float("nan"))}})
    with pytest.raises(ValueError, match="b: got the options {}"):
        Frontier({"a": {"1": Option(1, 1.0)}, "b": {}})
    with pytest.raises(ValueError, match="got no layers"):
        Frontier({})
