"""cached_attention: its definition against NumPy, the C++ kernels against the definition and each other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_kernels import attention, bench, cached_attention, cpu, reference_attention

pytestmark = pytest.mark.optimized

needs_library = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}"
)
DTYPES = ("float32", "bfloat16", "int8")
# Scores, weights and outputs are float32 sums of at most 300 terms of magnitude 1 in another order: 300 roundings of
# 2^-24 in the worst case, far fewer in practice.
SAME = {"rtol": 2e-5, "atol": 2e-5}


def problem(B: int, T: int, H: int, K: int, h: int, S: int, dtype: str, seed: int = 0) -> dict:
    """Arguments of cached_attention except the length; one query in four sees no key."""
    random = np.random.default_rng(seed)
    q, k, v = (random.normal(size=size).astype(np.float32) for size in ((B, T, H, h), *[(B, S, K, h)] * 2))
    visible = random.random((B, T, S)) < random.choice([0.0, 0.1, 0.6, 1.0], (B, T, 1))
    arguments = {"q": jnp.asarray(q), "visible": jnp.asarray(visible), "scale": h**-0.5}
    if dtype != "int8":
        return arguments | {"k": jnp.asarray(k, dtype), "v": jnp.asarray(v, dtype)}
    scales = [np.abs(x).max(axis=-1) / 127 for x in (k, v)]
    codes = [np.round(x / s[..., None]).astype(np.int8) for x, s in zip((k, v), scales, strict=True)]
    names = ("k", "v", "k_scale", "v_scale")
    return arguments | {name: jnp.asarray(x) for name, x in zip(names, (*codes, *scales), strict=True)}


def in_float64(arguments: dict, length: int) -> np.ndarray:
    """The definition in float64, query by query."""
    a = {
        name: np.asarray(x, np.float64) if name != "visible" else np.asarray(x)
        for name, x in arguments.items()
    }
    if "k_scale" in a:
        a["k"], a["v"] = a["k"] * a["k_scale"][..., None], a["v"] * a["v_scale"][..., None]
    B, T, H, h = a["q"].shape
    out = np.zeros((B, T, H, h))
    for b, t, j in np.ndindex(B, T, H):
        seen = np.flatnonzero(a["visible"][b, t, :length])
        if len(seen):
            head = j // (H // a["k"].shape[2])
            scores = a["k"][b, seen, head] @ a["q"][b, t, j] * a["scale"]
            p = np.exp(scores - scores.max())
            out[b, t, j] = p / p.sum() @ a["v"][b, seen, head]
    return out


@functools.cache
def compiled(scale: float, isas: tuple[str, ...]):
    """A single program with one result for each of these instruction sets."""
    calls = [cpu.attention(scale, isa) for isa in isas]
    return jax.jit(lambda *operands: [call(*operands) for call in calls])


def by_each(arguments: dict, length: int, isas: tuple[str, ...]) -> dict[str, np.ndarray]:
    a = dict(arguments)
    scale = a.pop("scale")
    checked = attention.check_attention(
        a["q"], a["k"], a["v"], a["visible"], a.get("k_scale"), a.get("v_scale")
    )
    results = compiled(scale, isas)(*checked, jnp.int32(length))
    return dict(zip(isas, map(np.asarray, results), strict=True))


def by_cpu(arguments: dict, length: int, isa: str | None = None) -> np.ndarray:
    isa = isa or cpu.isa()
    return by_each(arguments, length, (isa,))[isa]


def assert_same_bits(a: np.ndarray, b: np.ndarray, isa: str = "") -> None:
    np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32), err_msg=isa)


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_matches_the_formula(dtype: str, implementation: str) -> None:
    if implementation == "cpu" and cpu.unavailable():
        pytest.skip("no C++ kernels")
    arguments = problem(2, 5, 6, 3, 20, 150, dtype)
    for length in (0, 1, 149, 150, 1000):
        got = cached_attention(**arguments, length=length, implementation=implementation)
        assert (got.shape, got.dtype) == ((2, 5, 6, 20), np.float32)
        np.testing.assert_allclose(got, in_float64(arguments, length), **SAME)


@pytest.mark.parametrize("implementation", ["reference", None])
def test_uint16_bits_are_read_as_bfloat16(implementation: str | None) -> None:
    arguments = problem(2, 3, 4, 2, 64, 40, "bfloat16")
    bits = {name: jax.lax.bitcast_convert_type(arguments[name], jnp.uint16) for name in ("k", "v")}
    call = functools.partial(cached_attention, implementation=implementation, length=30)
    np.testing.assert_array_equal(call(**arguments | bits), call(**arguments))


SHAPES = st.tuples(
    st.integers(1, 3),  # B
    st.integers(1, 9),  # T
    st.integers(1, 3),  # K
    st.integers(1, 5),  # queries per kv head
    st.sampled_from([1, 7, 16, 24, 64, 80, 128]),  # h
    st.integers(1, 300),  # S
)


@needs_library
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_every_instruction_set_is_bit_identical_to_the_scalar_loops(
    shape: tuple, part: float, dtype: str, seed: int
) -> None:
    B, T, K, group, h, S = shape
    arguments, length = problem(B, T, K * group, K, h, S, dtype, seed), round(part * S)
    results = by_each(arguments, length, cpu.available_isas())
    np.testing.assert_allclose(results["scalar"], in_float64(arguments, length), **SAME)
    for isa, result in results.items():
        assert_same_bits(result, results["scalar"], isa)


@pytest.mark.extended(after=3)
@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "h"), [(4, 1, 64), (6, 3, 20), (3, 3, 128)])
def test_a_query_does_not_depend_on_other_queries(H: int, K: int, h: int, dtype: str) -> None:
    """One blocked call with many queries against one call per query, split over chunks of keys."""
    arguments, length = problem(3, 70, H, K, h, 400, dtype), 390
    together = by_cpu(arguments, length)
    per_query = ("q", "visible")
    for b in range(3):
        sequence = {n: x if n == "scale" else x[b : b + 1] for n, x in arguments.items()}
        assert_same_bits(by_cpu(sequence, length), together[b : b + 1])
        for t in range(0, 70, 9):
            one = {n: x[:, t : t + 1] if n in per_query else x for n, x in sequence.items()}
            assert_same_bits(by_cpu(one, length), together[b : b + 1, t : t + 1])


@needs_library
@pytest.mark.parametrize(("T", "S"), [(1, 900), (40, 300), (300, 200)])
def test_the_number_of_threads_changes_no_bit(T: int, S: int) -> None:
    arguments = problem(1, T, 6, 3, 64, S, "bfloat16")
    results = []
    try:
        for count in (1, 2, 5):
            cpu.set_thread_count(count)
            results.append(by_cpu(arguments, S))
    finally:
        cpu.set_thread_count(bench.threads())
    for result in results[1:]:
        assert_same_bits(result, results[0])


@needs_library
def test_keys_beyond_the_length_and_masked_keys_are_never_read() -> None:
    arguments = problem(2, 3, 4, 2, 64, 300, "float32")
    arguments["visible"] = arguments["visible"].at[:, :, 7].set(False).at[1, 2, :200].set(False)
    changed = {name: arguments[name].at[:, 200:].set(jnp.nan) for name in ("k", "v")}
    changed = arguments | changed | {"k": changed["k"].at[:, 7].set(jnp.nan)}
    expected = by_cpu(arguments, 200)
    assert np.isfinite(expected).all()
    assert_same_bits(by_cpu(changed, 200), expected)
    definition = [reference_attention(**a, length=200) for a in (arguments, changed)]
    np.testing.assert_array_equal(*definition)
    assert not expected[1, 2].any()


@needs_library
@pytest.mark.parametrize("size", [1e-30, 1.0, 60.0, 1e4])
def test_scores_of_any_magnitude(size: float) -> None:
    """Large scores select a single key; the weights of all others vanish without a NaN."""
    arguments = problem(1, 4, 2, 1, 16, 200, "float32")
    arguments["q"] = arguments["q"] * size
    # A score of magnitude s has a rounding error of about s 2^-24, and its weight the same relative error.
    tolerance = {"rtol": 2e-5, "atol": 2e-5 + 1e-6 * size}
    np.testing.assert_allclose(by_cpu(arguments, 200), in_float64(arguments, 200), **tolerance)


@needs_library
def test_the_value_of_a_single_key_is_returned_unchanged() -> None:
    arguments = problem(1, 1, 2, 2, 24, 130, "float32")
    arguments["visible"] = jnp.zeros((1, 1, 130), bool).at[0, 0, 129].set(True)
    assert_same_bits(by_cpu(arguments, 130), np.asarray(arguments["v"])[:, 129:130])


@needs_library
def test_transformations() -> None:
    arguments, length = problem(2, 3, 4, 2, 20, 50, "int8"), jnp.int32(41)
    arrays = {name: x for name, x in arguments.items() if name != "scale"}
    call = functools.partial(cached_attention, scale=arguments["scale"], length=length, implementation="cpu")
    expected = call(**arrays)
    assert_same_bits(jax.jit(lambda a: call(**a))(arrays), expected)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), arrays)
    assert_same_bits(jax.vmap(lambda a: call(**a))(stacked), np.stack([expected, expected[::-1]]))
    only_q = jax.vmap(lambda q: call(**arrays | {"q": q}))(stacked["q"][:, :1].repeat(2, axis=1))
    assert only_q.shape == (2, *expected.shape)
    half = call(**arrays | {"q": arrays["q"].astype(jnp.bfloat16)})
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_gradients_are_not_supported(implementation: str | None) -> None:
    arguments = problem(1, 2, 2, 1, 8, 9, "float32")
    with pytest.raises(NotImplementedError, match="cached_attention has no gradient"):
        jax.grad(
            lambda q: cached_attention(**arguments | {"q": q}, length=9, implementation=implementation).sum()
        )(arguments["q"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 3, 4), jnp.float32)}, "q is float32"),
        ({"q": jnp.zeros((2, 3, 5, 8), jnp.float32)}, "H a multiple of K"),
        ({"k": jnp.zeros((2, 9, 2, 8), jnp.float16)}, "k is float16"),
        ({"v": jnp.zeros((2, 8, 2, 8), jnp.float32)}, "expected \\[B, S, K, h\\]"),
        ({"visible": jnp.zeros((2, 3, 8), bool)}, "visible is bool\\[2, 3, 8\\]"),
        ({"k_scale": jnp.zeros((2, 9, 2), jnp.float32)}, "expected None for float32"),
        ({"implementation": "gpu"}, "implementation='gpu'"),
    ],
)
def test_mismatched_operands_are_rejected(change: dict, message: str) -> None:
    arguments = problem(2, 3, 4, 2, 8, 9, "float32") | change
    with pytest.raises(ValueError, match=message):
        cached_attention(**arguments, length=9)


def test_int8_requires_scales() -> None:
    arguments = problem(2, 3, 4, 2, 8, 9, "int8")
    del arguments["v_scale"]
    with pytest.raises(ValueError, match="k_scale or v_scale is None"):
        cached_attention(**arguments, length=9)


def test_a_named_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "it was eaten")
    arguments = problem(1, 1, 2, 1, 8, 9, "float32")
    with pytest.raises(NotImplementedError, match="it was eaten"):
        cached_attention(**arguments, length=9, implementation="cpu")
    cpu.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="it was eaten"):
        got = cached_attention(**arguments, length=9)
    np.testing.assert_array_equal(got, reference_attention(**arguments, length=9))
