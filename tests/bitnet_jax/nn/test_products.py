"""Products of int8 operands: equal to fake quantization, with gradients rounded only on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.nn.products import LONGEST_INT8_SUM, sums_of_products
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES

M, N, K = 15, 48, 256
X, G = (jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, n)), jnp.float32) for n in (K, N))
EPS = float(jnp.finfo(jnp.float32).eps)
Gradients = tuple[dict[str, jax.Array], jax.Array]


def integer_precisions() -> dict[str, Precision]:
    """Every Precision of the named recipes that has integer codes on both sides, once."""
    named = {
        f"{name}:{pattern}": precision
        for name, recipe in RECIPES.items()
        for pattern, precision in ((("*", recipe),) if isinstance(recipe, Precision) else recipe)
    }
    once = {precision: name for name, precision in reversed(named.items()) if precision.codes_fit_int8}
    return {name: precision for precision, name in reversed(once.items())}


PRECISIONS = integer_precisions()
TERNARY = RECIPES["bitnet_b158"]
assert isinstance(TERNARY, Precision)


@lru_cache
def initial(module: BitLinear) -> dict[str, jax.Array]:
    return jax.jit(module.init)(jax.random.key(2), X)["params"]


def layer(precision: Precision, **options: Any) -> tuple[BitLinear, dict[str, jax.Array]]:
    module = BitLinear(N, precision, **options)
    return module, dict(initial(module))


def value_and_gradients(
    module: BitLinear,
    params: dict[str, jax.Array],
    x: jax.Array = X,
    *,
    wrap: Callable[..., Any] = jax.jit,
    remat: bool = False,
) -> tuple[jax.Array, Gradients]:
    """The layer's output, and the gradients of sum(output * G) with respect to its parameters and input."""

    def run(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, Gradients]:
        apply = jax.checkpoint(module.apply) if remat else module.apply
        y, pullback = jax.vjp(lambda p, x: apply({"params": p}, x), params, x)
        return y, pullback(G.astype(y.dtype))

    return wrap(run)(params, x)


def products(run: Callable[..., Any], *arguments: Any) -> Counter[tuple[str, ...]]:
    """The matrix products of a function: the dtypes of both operands and the result."""
    found: Counter[tuple[str, ...]] = Counter()

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found[tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars))] += 1
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(run)(*arguments).jaxpr)
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal up to the rounding of float32 sums of at most K products in a different order."""

    def compare(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=K * EPS * float(jnp.abs(b).max()))

    jax.tree.map(compare, ours, theirs)


@pytest.mark.extended(after=6)
@pytest.mark.parametrize("name", PRECISIONS)
def test_integer_products_equal_fake_quantization(name: str) -> None:
    module, params = layer(PRECISIONS[name])
    y, gradients = value_and_gradients(module, params)
    ours, our_gradients = value_and_gradients(module.clone(product="int8"), params)
    # The largest sum, 256 * 128 * 128, is below 2^24: both are exact, and the scaling is the same.
    np.testing.assert_array_equal(ours, y)
    assert_same(our_gradients, gradients)


@pytest.mark.extended(after=6)
@pytest.mark.parametrize("name", [name for name, p in PRECISIONS.items() if p.input_digits == 1])
def test_sums_of_codes_are_exact_integers(name: str) -> None:
    module, params = layer(PRECISIONS[name])
    learned = {k.removeprefix("activation_"): v for k, v in params.items() if k.startswith("activation_")}
    x = PRECISIONS[name].quantize_activation(X.reshape(M, K), **learned).codes
    w = PRECISIONS[name].quantize_weight(params["weight"], scale=params.get("weight_scale"))
    groups = w.scale.shape[-1]
    by_group = (x.reshape(M, groups, -1), w.codes.reshape(N, groups, -1))
    exact = np.einsum("mgk,ngk->gmn", *(np.asarray(codes, np.int64) for codes in by_group))
    operands = by_group if groups > 1 else (x, w.codes)
    sums = sums_of_products(*operands, product="int8")
    np.testing.assert_array_equal(sums.reshape(groups, M, N), exact)


def test_long_sums_are_rounded_once() -> None:
    k = 4096
    rng = np.random.default_rng(0)
    x, w = rng.integers(100, 128, (2, k)), rng.integers(100, 128, (3, k))
    exact = x @ w.T
    assert exact.min() > 2**24
    operands = (jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    np.testing.assert_array_equal(sums_of_products(*operands, product="int8"), exact.astype(np.float32))
    # float32 rounds up to k times, each time by at most half an eps of the partial sum
    np.testing.assert_allclose(sums_of_products(*operands), exact, rtol=k * EPS / 2)


def test_sums_that_may_overflow_int32_are_rejected() -> None:
    def run(k: int) -> Any:
        rows = jax.ShapeDtypeStruct((1, k), jnp.float32)
        return jax.eval_shape(lambda x, w: sums_of_products(x, w, product="int8"), rows, rows)

    assert LONGEST_INT8_SUM * 128 * 128 < 2**31 <= (LONGEST_INT8_SUM + 1) * 128 * 128
    run(LONGEST_INT8_SUM)
    with pytest.raises(ValueError, match=r"got sums over 131072, expected at most 131071.*product='float'"):
        run(LONGEST_INT8_SUM + 1)


def test_int8_gradients_round_only_the_gradient_to_the_input() -> None:
    module, params = layer(PRECISIONS["bitnet_b158_group64:*"])
    y, (dparams, dx) = value_and_gradients(module.clone(product="int8"), params)
    ours, (our_dparams, our_dx) = value_and_gradients(module.clone(product="int8_gradients"), params)
    np.testing.assert_array_equal(ours, y)
    np.testing.assert_array_equal(our_dparams["weight"], dparams["weight"])
    cosine = jnp.vdot(our_dx, dx) / jnp.linalg.norm(our_dx) / jnp.linalg.norm(dx)
    # Normal gradients of 48 outputs peak near 2.5 sigma: a step of 0.02 sigma, an error of 0.006 sigma.
    assert 0 < 1 - float(cosine) < 1e-4


@pytest.mark.parametrize("groups", [1, 4])
def test_rounded_gradients_are_exact_products_of_their_codes(groups: int) -> None:
    rng = np.random.default_rng(0)
    axes = (K,) if groups == 1 else (groups, K // groups)
    x, w = rng.integers(-128, 128, (M, *axes)), rng.integers(-1, 2, (N, *axes))
    g = rng.normal(size=(groups, M, N) if groups > 1 else (M, N)).astype(np.float32)
    g[..., 0, :] *= 1e-20  # small tokens lose no accuracy
    g[..., 1, :] = 0
    operands = (jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    _, pullback = jax.vjp(lambda x, w: sums_of_products(x, w, product="int8_gradients"), *operands)
    dx, dw = pullback(jnp.asarray(g))

    step = np.abs(g).max(-1, keepdims=True).astype(np.float64) / 127
    codes = np.round(np.divide(g, step, out=np.zeros_like(step * g), where=step > 0)).astype(np.int64)
    to_x, to_w = ("gmn,ngk->mgk", "gmn,mgk->ngk") if groups > 1 else ("mn,nk->mk", "mn,mk->nk")
    step = step if groups == 1 else step.swapaxes(0, 1)
    # the step, its reciprocal and the product are rounded once each
    np.testing.assert_allclose(dx, np.einsum(to_x, codes, w) * step, rtol=4 * EPS, atol=0)
    bound = step / 2 * np.einsum(to_x, np.ones_like(codes), np.abs(w))
    assert (np.abs(dx - np.einsum(to_x, g.astype(np.float64), w)) <= bound * (1 + 1e-5)).all()
    assert not np.asarray(dx)[1].any()
    np.testing.assert_allclose(dw, np.einsum(to_w, g, x), rtol=0, atol=M * EPS * np.abs(g).max() * 128)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("name", ["bnn:*", "lsq4:*"])
def test_nan_stays_visible(name: str) -> None:
    module, params = layer(PRECISIONS[name], product="int8_gradients")
    y, _ = value_and_gradients(module, params, X.at[1, 2, 3].set(jnp.nan))
    rows = jnp.isnan(y).all(-1)
    assert rows[1, 2]
    assert rows.sum() == jnp.isnan(y).any(-1).sum() == 1

    g = G.at[1, 2, 3].set(jnp.nan)
    (dx,) = jax.jit(lambda x, g: jax.vjp(lambda x: module.apply({"params": params}, x), x)[1](g))(X, g)
    np.testing.assert_array_equal(jnp.isnan(dx).any(-1), rows)

    params["weight"] = params["weight"].at[7, 0].set(jnp.nan)
    y, _ = value_and_gradients(module, params)
    assert jnp.isnan(y[..., 7]).all()


def test_products_have_the_requested_dtypes() -> None:
    for dtype in ("float32", "bfloat16"):
        floats, int8s = (dtype, dtype, "float32"), ("int8", "int8", "int32")
        for product, expected in {
            "float": {floats: 3},
            "int8": {int8s: 1, floats: 2},
            "int8_gradients": {int8s: 2, floats: 1},
        }.items():
            module, params = layer(TERNARY, dtype=dtype, product=product)
            x = X.astype(dtype)
            assert products(partial(value_and_gradients, module), params, x) == expected
    dense, params = layer(Precision(compute_dtype="bfloat16"))
    assert products(partial(value_and_gradients, dense), params) == {("bfloat16", "bfloat16", "float32"): 3}


@pytest.mark.parametrize("product", ["float", "int8", "int8_gradients"])
def test_the_backward_pass_keeps_one_byte_per_code(product: str) -> None:
    def kept(product: str) -> Counter[str]:
        module, params = layer(TERNARY, product=product)
        _, pullback = jax.vjp(jax.jit(lambda p, x: module.apply({"params": p}, x)), params, X)
        sizes: Counter[str] = Counter()
        for array in jax.tree.leaves(pullback):
            sizes[str(array.dtype)] += array.nbytes
        return sizes

    sizes, scales = kept(product), 4 * (M + N)
    assert sizes["int8"] == (M + N) * K
    assert (
        sizes["float32"] <= 2 * scales
    )  # the scales by which rows were divided and are multiplied at the end


@pytest.mark.parametrize("product", ["float", "int8"])
def test_a_scan_over_layers_keeps_one_byte_per_code(product: str) -> None:
    rows, width, layers = 512, 128, 8

    module = BitLinear(width, TERNARY, product=product)

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(
            jax.lax.scan(lambda x, w: (module.apply({"params": {"weight": w}}, x), None), x, weights)[0]
        )

    shapes = [(layers, width, width), (rows, width)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    memory = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    codes = layers * (rows + width) * width
    # One layer at a time needs its input, its result and a gradient of each in float32.
    assert codes < memory.temp_size_in_bytes < codes + 4 * 4 * rows * width


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("product", ["int8", "int8_gradients"])
def test_eager_compiled_and_rematerialized_results_are_equal(product: str) -> None:
    module, params = layer(TERNARY, product=product)
    compiled = value_and_gradients(module, params)
    assert_same(value_and_gradients(module, params, wrap=lambda run: run), compiled)
    assert_same(value_and_gradients(module, params, remat=True), compiled)


def test_vmap_over_layers() -> None:
    module, params = layer(PRECISIONS["bitnet_group64:*"], product="int8_gradients")
    both = jax.tree.map(lambda p: jnp.stack([p, -2 * p + 0.01]), params)
    mapped = jax.vmap(lambda p, x: value_and_gradients(module, p, x))(both, jnp.stack([X, X + 1]))
    for i, x in enumerate((X, X + 1)):
        alone = value_and_gradients(module, jax.tree.map(lambda p, i=i: p[i], both), x)
        assert_same(jax.tree.map(lambda m, i=i: m[i], mapped), alone)


@pytest.mark.parametrize("product", ["int8", "int8_gradients"])
def test_bfloat16_inputs(product: str) -> None:
    x = X.astype(jnp.bfloat16)
    module, params = layer(TERNARY, dtype="bfloat16")
    y, (dparams, dx) = value_and_gradients(module, params, x)
    ours, (our_dparams, our_dx) = value_and_gradients(module.clone(product=product), params, x)
    assert ours.dtype == our_dx.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, y)
    assert_same(our_dparams, dparams)
    if product == "int8":
        np.testing.assert_array_equal(our_dx, dx)
