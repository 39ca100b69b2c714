"""Precision values, recipes, and the rules that assign one to every linear layer."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization.input_transforms import hadamard, top_k
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES, resolve
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BLOCK = ("attention/q_proj", "attention/k_proj", "attention/v_proj", "attention/o_proj")
BLOCK += ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
PATHS = [f"layers_{i}/{name}" for i in range(2) for name in BLOCK] + ["lm_head"]

DISTINCT = {precision for name in RECIPES for precision in resolve(name, PATHS).values()}
QUANTIZED = sorted((p for p in DISTINCT if p.quantizes_weights), key=str)

W = jnp.asarray(np.random.default_rng(0).standard_normal((8, 256)), jnp.float32) * 0.05
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 256)), jnp.float32)


def label(precision: Precision) -> str:
    default = Precision()
    fields = dataclasses.asdict(precision)
    return "-".join(str(value) for name, value in fields.items() if value != getattr(default, name))


def draws(precision: Precision) -> bool:
    """Whether its weight quantizer draws random codes."""
    return precision.weight_quantizer is not None and precision.weight_quantizer.random


# --- recipes


PROMISED = """
float32 bfloat16 int8 int4 int3 int2 bitnet bitnet_b158 bitnet_a48 bitnet_v2 binaryconnect bwn xnor bnn bit
paretoq_1 paretoq_1.58 paretoq_2 paretoq_3 paretoq_4
bitnet_b158_channel bitnet_b158_group64 bitnet_weight_only
"""


@pytest.mark.parametrize("name", PROMISED.split())
def test_documented_recipes_exist(name: str) -> None:
    assert len(resolve(name, PATHS)) == len(PATHS)


@pytest.mark.extended(after=10)
@pytest.mark.parametrize("precision", QUANTIZED, ids=label)
def test_every_recipe_quantizes_and_has_gradients(precision: Precision) -> None:
    """A layer in a jitted loss: finite values, a gradient for every parameter, packable codes."""
    params = {"weight": W}
    scale = precision.weight_scale_init(W)
    if scale is not None:
        params["weight_scale"] = scale
    for name, (shape, value) in precision.activation_param_shapes(256).items():
        params[name] = jnp.full(shape, value, jnp.float32)

    @jax.jit
    def loss_and_codes(params, x, key):
        def loss(params, x):
            w_key = key if draws(precision) else None
            w = precision.quantize_weight(params["weight"], params.get("weight_scale"), 0.5, w_key)
            a = precision.quantize_activation(
                x, params.get("activation_scale"), params.get("activation_shift"), 0.5
            )
            return jnp.sum((a.dequantize() @ w.dequantize().T - 1) ** 2), (w, a)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (value, (w, a)), gradients = loss_and_codes(params, X, jax.random.key(0))
    assert np.isfinite(value)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
        assert np.any(np.asarray(gradient) != 0)
    if precision.packed_format == "binary":
        assert set(np.unique(w.codes)) == {-1, 1}
    if precision.packed_format == "ternary2":
        assert set(np.unique(w.codes)) == {-1, 0, 1}
    if precision.input_is_signs:
        assert set(np.unique(a.codes)) == {-1, 1}
    if precision.activation != "none":
        integers = {1: np.int8, 2: np.int16}[precision.input_digits]
        np.testing.assert_array_equal(np.asarray(a.codes).astype(integers), a.codes)


def test_formats_and_bits() -> None:
    facts = {
        name: RECIPES[name]
        for name in ("bitnet", "bitnet_b158", "paretoq_1.58", "paretoq_3", "bfloat16", "xnor")
    }
    assert [p.packed_format for p in facts.values()] == [
        "binary",
        "ternary2",
        "ternary2",
        "int4",
        None,
        "binary",
    ]
    bits = [(p.weight_bits, p.activation_bits) for p in facts.values()]
    ternary = math.log2(3)
    assert bits == [(1, 8), (ternary, 8), (ternary, 32), (3, 32), (16, 16), (1, 1)]
    assert RECIPES["bitnet_weight_only"].packed_format == "ternary2"  # weight-only recipes pack too
    odd_codes = [Precision(weight=w, weight_options={"levels": "midrise"}) for w in ("int2", "int4", "int8")]
    assert [p.packed_format for p in odd_codes] == ["int4", "int8", None]  # up to 3, 15 and 255
    random = [name for name, p in RECIPES.items() if isinstance(p, Precision) and draws(p)]
    assert random == ["binaryconnect_stochastic"]


def test_recipe_details_specified_by_papers() -> None:
    a48, v2 = resolve("bitnet_a48", PATHS), resolve("bitnet_v2", PATHS)
    assert (a48["layers_0/attention/o_proj"].activation, a48["layers_0/attention/o_proj"].top_k) == (
        "int8",
        0.5,
    )
    assert a48["layers_1/mlp/down_proj"].activation == "int8"
    assert {a48[f"layers_0/{name}"].activation for name in BLOCK[:3] + BLOCK[4:6]} == {"int4"}
    assert {path for path, p in v2.items() if p.hadamard} == {
        f"layers_{i}/{name}" for i in range(2) for name in ("attention/o_proj", "mlp/down_proj")
    }
    assert RECIPES["binaryconnect"].latent_clip == 1.0
    relu = resolve("bit_relu", PATHS)
    assert relu["layers_0/mlp/down_proj"].activation == "elastic_unsigned"
    assert relu["layers_0/mlp/up_proj"].activation == "elastic_signed"


# --- behavior of a Precision


def test_rotation_precedes_and_sparsity_follows_the_quantizer() -> None:
    plain = ACTIVATION_QUANTIZERS["int8"]
    rotated = Precision(weight="binary", activation="int8", hadamard=True).quantize_activation(X)
    np.testing.assert_array_equal(rotated.codes, plain(hadamard(X)).codes)
    sparse = Precision(weight="binary", activation="int8", top_k=0.5).quantize_activation(X)
    np.testing.assert_array_equal(sparse.codes, top_k(plain(X).codes, 0.5, by=X))
    assert np.mean(np.asarray(sparse.codes) == 0) >= 0.5
    np.testing.assert_array_equal(sparse.scale, plain(X).scale)
    odd = X[..., :96]
    with pytest.raises(ValueError, match="got an axis of 96"):
        Precision(weight="binary", activation="int8", hadamard=True).quantize_activation(odd)
    blocks = Precision(weight="binary", activation="int8", hadamard="block").quantize_activation(odd)
    np.testing.assert_array_equal(blocks.codes, plain(hadamard(odd, block=True)).codes)


def test_options_reach_the_quantizers() -> None:
    zero = jnp.zeros((2, 4))
    assert Precision(weight="binary").quantize_weight(zero).codes.sum() == 8
    assert Precision(weight="binary", weight_options={"zero": -1}).quantize_weight(zero).codes.sum() == -8
    wide = Precision(weight="binary", activation="int8", activation_options={"peak": 128})
    np.testing.assert_array_equal(wide.quantize_activation(jnp.asarray([[-1.0, 0.5]])).codes, [[-128, 64]])


def test_scale_none_leaves_the_codes_unscaled() -> None:
    q = Precision(weight="ternary_absmean", scale="none").quantize_weight(
        jnp.asarray([[0.4, 0.6, -3.0, 0.5]])
    )
    np.testing.assert_array_equal(q.codes, [[0, 1, -1, 0]])
    np.testing.assert_array_equal(q.scale, [[1]])


@pytest.mark.parametrize("granularity", ["channel", 64])
@pytest.mark.parametrize("weight", [name for name, r in WEIGHT_QUANTIZERS.items() if "scale" in r.uses])
def test_a_learned_scale_is_initialized_with_the_measured_one(weight: str, granularity) -> None:
    unscaled = WEIGHT_QUANTIZERS[weight].unit_scale
    given = "tensor" if unscaled else granularity
    measured = Precision(weight=weight, granularity=given)
    learned = Precision(weight=weight, granularity=given, scale="learned")
    assert measured.weight_scale_init(W) is None
    start = learned.weight_scale_init(W)
    q, reference = learned.quantize_weight(W, start), measured.quantize_weight(W)
    assert start.shape == reference.scale.shape
    assert start.shape == ((1, 1) if unscaled else {"channel": (8, 1), 64: (8, 4)}[granularity])
    np.testing.assert_array_equal(q.codes, reference.codes)
    np.testing.assert_array_equal(q.scale, reference.scale)


def test_lsq_initialization() -> None:
    precision = Precision(weight="int4", scale="learned", scale_init="lsq", granularity="channel")
    start = 2 * np.abs(np.asarray(W)).mean(1, keepdims=True) / np.sqrt(7)
    np.testing.assert_allclose(precision.weight_scale_init(W), start, rtol=1e-6)
    np.testing.assert_array_equal(
        precision.weight_scale_init(jnp.zeros((2, 4))), np.full((2, 1), 1e-5, np.float32)
    )


def test_learned_activation_parameters() -> None:
    bit = RECIPES["bit"]
    shapes = bit.activation_param_shapes(256)
    assert {name: shape for name, (shape, _) in shapes.items()} == {
        "activation_scale": (),
        "activation_shift": (256,),
    }
    assert shapes["activation_shift"][1] == 0
    mean = math.sqrt(2 / math.pi)  # of |x|, x a standard normal
    unsigned = resolve("bit_relu", PATHS)["layers_0/mlp/down_proj"]
    firsts = {precision: factor * mean for precision, factor in ((bit, 2), (unsigned, 4))}
    for precision, first in (firsts | {RECIPES["lsq4"]: 2 / math.sqrt(7) * mean}).items():
        assert precision.activation_param_shapes(256)["activation_scale"] == ((), pytest.approx(first))
    assert RECIPES["bitnet"].activation_param_shapes(256) == {}


def test_learned_scales_must_be_given_exactly_when_they_exist() -> None:
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="scale='learned': got no learned scale"):
        RECIPES["paretoq_1"].quantize_weight(W)
    with pytest.raises(ValueError, match="scale='analytic': got a learned scale"):
        RECIPES["bitnet"].quantize_weight(W, one)
    with pytest.raises(ValueError, match="activation_scale='analytic': got a learned scale"):
        RECIPES["bitnet"].quantize_activation(X, jnp.float32(1))
    with pytest.raises(ValueError, match="activation_scale='learned': got no learned scale"):
        RECIPES["bit"].quantize_activation(X)
    with pytest.raises(ValueError, match="has no codes"):
        RECIPES["float32"].quantize_weight(W)


# --- the Precision value


@pytest.mark.parametrize("precision", QUANTIZED, ids=label)
def test_json_round_trip_and_hashing(precision: Precision) -> None:
    copy = Precision.from_dict(json.loads(json.dumps(dataclasses.asdict(precision))))
    assert copy == precision
    assert hash(copy) == hash(precision)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "ternry_absmean"}, "weight: got 'ternry_absmean', .*did you mean 'ternary_absmean'"),
        ({"activation": "int7", "weight": "int8"}, "activation: got 'int7', expected one of"),
        ({"compute_dtype": "float16"}, "compute_dtype: got 'float16'"),
        ({"scale": "fixed"}, "scale: got 'fixed'"),
        ({"scale_init": "zero"}, "scale_init: got 'zero'"),
        (
            {"weight": "binary", "scale": "learned", "scale_init": "lsq"},
            "weight with scale_init='lsq': got 'binary'",
        ),
        ({"warmup": 0.2}, "warmup: got 0.2 with weight='float'"),
        ({"weight": "ternary_absmean", "warmup": 1.0}, "warmup: got 1.0, expected a share of training"),
        (
            {"weight": "int8", "activation": "int8", "warmup": 0.2, "hadamard": True},
            "warmup: got 0.2 .* hadamard=True",
        ),
        (
            {"weight": "int8", "activation": "int8", "warmup": 0.2, "top_k": 0.5},
            "warmup: got 0.2 .* top_k=0.5",
        ),
        ({"weight": "ternary_absmean", "weight_ste": "tanh"}, "weight_ste: got 'tanh', expected .*clipped"),
        (
            {"weight": "binary", "activation": "int8", "activation_ste": "reste"},
            "activation_ste: got 'reste'",
        ),
        ({"weight": "binary", "granularity": "row"}, "granularity: got 'row', .* or a positive group size"),
        ({"weight": "binary", "granularity": 0}, "granularity: got 0"),
        ({"weight": "binary", "granularity": True}, "granularity: got True"),
        ({"weight": "binary", "hadamard": "yes"}, "hadamard: got 'yes', expected False, True or 'block'"),
        ({"weight": "binary", "top_k": 0.0}, "top_k: got 0.0, expected a fraction"),
        ({"activation": "int8"}, "activation: got 'int8' with weight='float', expected 'none'"),
        (
            {"weight": "binary", "activation": "elastic_signed"},
            "needs activation_scale='learned', got 'analytic'",
        ),
        (
            {"weight": "binary", "activation": "sign", "activation_scale": "learned"},
            "activation with activation_scale='learned': got 'sign', expected",
        ),
        (
            {"weight": "binary", "activation": "int8", "activation_shift": True},
            "activation with activation_shift=True: got 'int8'",
        ),
        (
            {"weight": "binary", "weight_options": {"zeros": 1}},
            "weight_options: got 'zeros', .*did you mean 'zero'",
        ),
        ({"weight": "binary", "weight_options": {"ste": "tanh"}}, "weight_options: got 'ste'"),
        (
            {"weight": "binary", "activation_options": {"peak": 128}},
            "activation_options: got 'peak', expected",
        ),
        ({"weight_options": {"zero": 1}}, "weight_options: got .* with weight='float', expected none"),
        ({"wieght": "binary"}, "Precision field: got 'wieght', .*did you mean 'weight'"),
    ],
)
@pytest.mark.unchecked_annotations
def test_the_error_for_a_wrong_field_says_what_to_do(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precision.from_dict(fields)


# --- rules


def test_a_recipe_name_applies_to_all_linear_layers_except_the_head() -> None:
    resolved = resolve("bitnet", PATHS)
    assert list(resolved) == PATHS
    assert resolved.pop("lm_head") == RECIPES["float32"]
    assert set(resolved.values()) == {RECIPES["bitnet"]}
    assert resolve(RECIPES["bitnet"], PATHS) == resolve("bitnet", PATHS)
    assert set(resolve("bitnet", PATHS[:-1]).values()) == {RECIPES["bitnet"]}
    assert resolve("bitnet", [*PATHS[:-1], "classifier"])["classifier"] == RECIPES["float32"]


def test_the_first_match_wins() -> None:
    rules = (("layers_0/mlp/*", "int8"), ("layers_*/mlp/*", "int4"), ("*", "bitnet_b158"))
    resolved = resolve(rules, PATHS)
    assert resolved["layers_0/mlp/up_proj"] == RECIPES["int8"]
    assert resolved["layers_1/mlp/up_proj"] == RECIPES["int4"]
    assert resolved["layers_1/attention/q_proj"] == RECIPES["bitnet_b158"]
    assert resolved["lm_head"] == RECIPES["float32"]


@pytest.mark.parametrize("pattern", ["lm_head", "lm_*", "*head"])
def test_the_head_is_quantized_when_a_pattern_names_it(pattern: str) -> None:
    resolved = resolve((("*_proj", "bitnet"), (pattern, "int8")), PATHS)
    assert resolved["lm_head"] == RECIPES["int8"]


def test_a_recipe_of_rules_expands_inside_its_pattern() -> None:
    resolved = resolve((("layers_0/*", "bitnet_a48"), ("*", "bitnet")), PATHS)
    assert resolved["layers_0/attention/o_proj"].top_k == 0.5
    assert resolved["layers_0/mlp/up_proj"].activation == "int4"
    assert resolved["layers_1/attention/o_proj"] == RECIPES["bitnet"]


def test_rules_may_come_from_json() -> None:
    rules = json.loads(json.dumps([["*/mlp/*", dataclasses.asdict(RECIPES["paretoq_2"])], ["*", "bitnet"]]))
    assert resolve(rules, PATHS)["layers_0/mlp/up_proj"] == RECIPES["paretoq_2"]


def test_a_recipe_name_may_be_followed_by_field_overrides() -> None:
    changed = resolve("bnn(activation_ste=approx_sign, latent_clip=None, activation_shift=True)", PATHS)
    expected = dataclasses.replace(
        RECIPES["bnn"], activation_ste="approx_sign", latent_clip=None, activation_shift=True
    )
    assert changed["layers_0/mlp/up_proj"] == expected
    assert resolve("bitnet(granularity=64)", PATHS)["layers_0/mlp/up_proj"] == RECIPES["bitnet_group64"]
    by_path = resolve("bitnet_a48(top_k=0.25)", PATHS)  # of whichever rule of the recipe applies there
    assert by_path["layers_0/attention/o_proj"].top_k == by_path["layers_0/mlp/up_proj"].top_k == 0.25


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bnn(", r"expected NAME or NAME\(field=value, field=value\)"),
        ("bnn(activation=sign(x))", r"expected NAME or NAME\(field=value, field=value\)"),
        ("bnn()", "got '', expected field=value"),
        ("bnn(identity)", "got 'identity', expected field=value"),
        ("bnn(activation_set=identity)", "did you mean 'activation_ste'"),
        ("bitt(activation_ste=identity)", "did you mean 'bit'"),
        ("bnn(activation_ste=approx)", "activation_ste: got 'approx'"),
    ],
)
def test_invalid_field_overrides_are_rejected(recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(recipe, PATHS)


def test_unknown_recipes_are_rejected() -> None:
    with pytest.raises(
        ValueError, match="recipe: got 'bitnet_b1.58', expected one of .*did you mean 'bitnet_b158'"
    ):
        resolve("bitnet_b1.58", PATHS)


def test_paths_without_a_matching_rule_are_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"leave out .*layers_1/mlp/up_proj.*end the rules with \('\*', recipe\)"
    ):
        resolve((("*/attention/*", "bitnet"), ("layers_0/mlp/*", "bitnet")), PATHS)


def test_patterns_that_never_match_first_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"unused precision patterns: got \['\*/ffn/\*'\]"):
        resolve((("*/ffn/*", "int8"), ("*", "bitnet")), PATHS)
    with pytest.raises(
        ValueError, match=r"unused precision patterns: got \['\*/mlp/\*'\].*before a wider one"
    ):
        resolve((("*", "bitnet"), ("*/mlp/*", "int8")), PATHS)
    # A final "*" after a complete list is a convention, not a mistake.
    assert resolve((("layers_*", "bitnet"), ("*", "float32")), PATHS)["lm_head"] == RECIPES["float32"]
