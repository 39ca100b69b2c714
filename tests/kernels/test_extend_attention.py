"""extend_and_attend: its cache and result against the operations it joins, in place, under transformations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import cached_attention, cpu, extend_and_attend
from bitnet_kernels.kv_cache import KVCache, rotate, write

B, T, S, H, K, h = 2, 3, 20, 4, 2, 16
SCALE = 0.25
here = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
IMPLEMENTATIONS = [pytest.param("cpu", marks=here), "reference"]
FORMATS = ("float32", "bfloat16", "uint16", "int8")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled_cache(dtype: str) -> KVCache:
    empty = jnp.zeros((B, S, K, h), dtype)
    scales = (jnp.zeros((B, S, K)), jnp.zeros((B, S, K))) if dtype == "int8" else ()
    return write(KVCache(empty, empty, *scales), normal(1, B, 9, K, h), normal(2, B, 9, K, h), jnp.int32(0))


def arguments(dtype: str, length: Any, tokens: int = T) -> dict[str, Any]:
    positions = np.asarray(length)[..., None] + np.arange(tokens)
    visible = np.arange(S) <= np.broadcast_to(positions, (B, tokens))[..., None]
    return {
        "q": normal(3, B, tokens, H, h),
        "k": normal(4, B, tokens, K, h),
        "v": normal(5, B, tokens, K, h),
        "cache": filled_cache(dtype),
        "visible": jnp.asarray(visible),
        "scale": SCALE,
        "length": jnp.asarray(length, jnp.int32),
    }


def angles(tokens: int = T) -> jax.Array:
    turns = np.random.default_rng(6).normal(size=(B, tokens, h // 2))
    return jnp.asarray(np.concatenate([np.cos(turns), np.sin(turns)], axis=-1), jnp.float32)


def rotated(x: jax.Array, angles: jax.Array) -> np.ndarray:
    """`kv_cache.rotate` by NumPy, which rounds every product and sum."""
    cos, sin = np.split(np.asarray(angles)[:, :, None], 2, axis=-1)
    first, second = np.split(np.asarray(x), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def same_bits(a: Any, b: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [0, 9, [9, 2]], ids=str)
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_is_the_operations_that_it_joins(dtype: str, length: Any, implementation: str) -> None:
    given = arguments(dtype, length)
    o, cache = extend_and_attend(**given, implementation=implementation)
    expected = write(given["cache"], given["k"], given["v"], given["length"])
    same_bits(cache, expected)
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    apart = cached_attention(
        given["q"], cache.k, cache.v, given["visible"], SCALE,
        length=jnp.max(given["length"]) + T, implementation=implementation, **scales,
    )  # fmt: skip
    same_bits(o, apart)


@here
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_rotates_queries_and_keys_with_every_product_rounded(dtype: str) -> None:
    given, turns = arguments(dtype, [9, 2]), angles()
    by_hand = given | {name: jnp.asarray(rotated(given[name], turns)) for name in ("q", "k")}
    same_bits(
        extend_and_attend(**given, angles=turns, implementation="cpu"),
        extend_and_attend(**by_hand, implementation="cpu"),
    )


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_reference_rotates_alike(dtype: str) -> None:
    given, turns = arguments(dtype, 9), angles()
    np.testing.assert_allclose(rotate(given["k"], turns), rotated(given["k"], turns), atol=1e-6)
    o, _ = extend_and_attend(**given, angles=turns)
    reference, _ = extend_and_attend(**given, angles=turns, implementation="reference")
    # A key on the edge between two int8 codes, or two bfloat16 numbers, may be rounded to the other one.
    np.testing.assert_allclose(o, reference, atol=1e-5 if dtype == "float32" else 2e-2)


@here
def test_a_long_prompt_on_several_threads_has_the_same_bits() -> None:
    tokens = S - 2
    given = arguments("bfloat16", 2, tokens) | {"angles": angles(tokens)}
    wide = {
        name: jnp.tile(given[name], (1, 1, 32, 1)) for name in ("q", "k", "v")
    }  # enough for several threads
    cache = KVCache(*(jnp.tile(x, (1, 1, 32, 1)) for x in given["cache"][:2]))
    o, extended = extend_and_attend(**given | wide | {"cache": cache}, implementation="cpu")
    alone, _ = extend_and_attend(**given, implementation="cpu")
    assert extended.k.shape[2] == 32 * K
    np.testing.assert_array_equal(o[:, :, : H // K], alone[:, :, : H // K])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_start_beyond_the_room_is_moved_back(implementation: str) -> None:
    given = arguments("float32", S - T)
    fitting = extend_and_attend(**given, implementation=implementation)
    beyond = extend_and_attend(**given | {"length": jnp.int32(S + 5)}, implementation=implementation)
    same_bits(fitting, beyond)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_special_values_are_written_as_they_are(value: float, dtype: str, implementation: str) -> None:
    given = arguments(dtype, 9)
    given["k"] = given["k"].at[1, 2, 0, 3].set(value) if value else jnp.zeros_like(given["k"])
    _, cache = extend_and_attend(**given, implementation=implementation)
    expected = write(given["cache"], given["k"], given["v"], given["length"])
    if dtype == "uint16":  # the bits of a NaN are not defined
        cache, expected = (
            [jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32) for x in c[:2]]
            for c in (cache, expected)
        )
    same_bits(cache, expected)


@here
@pytest.mark.parametrize("dtype", ["uint16", "int8"])
def test_the_cache_is_extended_in_place(dtype: str) -> None:
    given = arguments(dtype, 9)
    cache = given.pop("cache")
    step = functools.partial(extend_and_attend, **given)
    expected = jax.jit(lambda cache: step(cache=cache))(cache)

    big = jax.tree.map(lambda x: jax.ShapeDtypeStruct((B, 4096, *x.shape[2:]), x.dtype), cache)
    wide = jnp.zeros((B, T, 4096), bool)
    compiled = jax.jit(lambda cache: step(cache=cache, visible=wide), donate_argnums=0).lower(big).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < big.k.size / 4

    # The argument is unchanged unless it is donated.
    same_bits(cache, filled_cache(dtype))
    same_bits(jax.jit(lambda cache: step(cache=cache), donate_argnums=0)(filled_cache(dtype)), expected)


@here
def test_it_works_in_loops_and_under_vmap() -> None:
    given = arguments("uint16", 9)
    once = extend_and_attend(**given)
    several = {name: given[name][None] for name in ("q", "k", "v", "visible")}
    cache = jax.tree.map(lambda x: x[None], given["cache"])
    mapped = jax.vmap(
        lambda cache, x: extend_and_attend(cache=cache, scale=SCALE, length=given["length"], **x)
    )
    same_bits(jax.tree.map(lambda x: x[0], mapped(cache, several)), once)

    def body(i: jax.Array, state: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        return extend_and_attend(**given | {"cache": state[1], "length": i * T})

    looped = jax.lax.fori_loop(0, 4, body, (jnp.zeros((B, T, H, h)), filled_cache("uint16")))
    state = jnp.zeros(()), filled_cache("uint16")
    for i in range(4):
        state = body(jnp.int32(i), state)
    same_bits(looped, state)


def test_wrong_arguments_are_refused() -> None:
    given = arguments("float32", 9)
    wrong = {
        r"new v is \[2, 2, 2, 16\]": {"v": given["v"][:, :2]},
        "got 21 tokens for a cache of 20": {
            name: jnp.tile(given[name], (1, 7, 1, 1)) for name in ("q", "k", "v")
        },
        r"length has shape \(3,\)": {"length": jnp.zeros(3, jnp.int32)},
        r"angles are float32\[2, 3, 8\]": {"angles": angles()[..., :8]},
        "implementation='gpu'": {"implementation": "gpu"},
        "k is int32": {"k": given["k"].astype(jnp.int32)},
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            extend_and_attend(**given | changed)
    with pytest.raises(NotImplementedError, match="extend_and_attend has no gradient"):
        jax.grad(lambda q: extend_and_attend(**given | {"q": q})[0].sum())(given["q"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_sequences_can_have_any_rows_of_a_larger_cache(dtype: str, implementation: str) -> None:
    """The same as if a sequence's rows were the whole cache, and other rows stay as they are."""
    given, turns, rows = arguments(dtype, [9, 2]), angles(), np.array([3, 1])
    small = given["cache"]
    large = KVCache(*(None if x is None else jnp.full((5, *x.shape[1:]), 7, x.dtype) for x in small))
    large = jax.tree.map(lambda x, y: x.at[rows].set(y), large, small)
    given |= {"angles": turns, "implementation": implementation}
    o, cache = extend_and_attend(**given)
    o_of_rows, extended = extend_and_attend(**given | {"cache": large, "rows": jnp.asarray(rows)})
    same_bits(o_of_rows, o)
    same_bits(extended, jax.tree.map(lambda x, y: x.at[rows].set(y), large, cache))


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]], ids=str)
def test_rows_that_do_not_fit_are_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="rows has shape"):
        extend_and_attend(**arguments("float32", 9), rows=jnp.asarray(rows))
