"""ModelConfig: validation, derived values, and JSON round trips."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.models import PRESETS, ModelConfig, Transformer, init_variables
from bitnet_jax.nn.rope_scaling import RopeScaling
from bitnet_jax.quantization.precision import Precision

TINY = PRESETS["tiny"].to_dict()
WIDE = Precision(
    weight="int8", activation="int8", weight_options=(("levels", "midrise"),)
)  # odd codes to 255


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name: str) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_rules_round_trip_through_json_and_stay_hashable() -> None:
    config = ModelConfig(**TINY | {"precision": [["layers_*/mlp/*", "bitnet"], ["*", "int8"]]})
    assert hash(config) == hash(ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
    assert config.precisions()["layers_1/mlp/up_proj"].weight == "binary_centred"
    assert config.precisions()["layers_1/attention/q_proj"].weight == "int8"


def test_precisions_in_rules_round_trip_through_json() -> None:
    own = Precision(weight="binary", granularity=64, weight_options=(("zero", -1),))
    config = ModelConfig(**TINY | {"precision": (("*", own),)})
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rotary_settings_round_trip_through_json_and_stay_hashable() -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_length=32)
    config = ModelConfig(**TINY | {"rope_scaling": scaling, "no_rope_layers": [1, 0]})
    assert config.no_rope_layers == (0, 1)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert again.rope_scaling == scaling


@pytest.mark.parametrize(
    ("fields", "biased"),
    [
        ({}, ""),
        ({"use_bias": True}, "q k v o gate up down"),
        ({"attention_bias": "qkv"}, "q k v"),
        ({"attention_bias": "qkvo"}, "q k v o"),
        ({"mlp_bias": True}, "gate up down"),
    ],
)
def test_biased_projections(fields: dict[str, Any], biased: str) -> None:
    config = ModelConfig(**TINY | fields)
    assert config.biased == tuple(f"{name}_proj" for name in biased.split())
    params = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))["params"]
    found = {path[-2] for path in flatten_dict(params) if path[-1] == "bias"}
    assert found == set(config.biased)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": "rmsnorm"}, "field of model: got 'norms', .*did you mean 'norm'"),
        ({"norm": "batch"}, r"model\.norm: got 'batch', expected one of rmsnorm, layernorm"),
        ({"hidden_size": 0}, r"model\.hidden_size: got 0, expected a positive integer"),
        ({"trained_length": 0}, r"model\.trained_length: got 0, expected a positive integer"),
        ({"trained_length": 1.5}, r"model\.trained_length: got 1\.5, expected int or None"),
        ({"hidden_size": 65}, r"hidden_size=65 is not a multiple of num_heads=4"),
        ({"num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"kv_bits": 1}, r"model\.kv_bits: got 1, expected None or 2 to 8"),
        ({"head_dim": 7}, r"head_dim=7 is odd"),
        ({"attention_bias": "o"}, r"model\.attention_bias: got 'o', expected one of none, qkv, qkvo"),
        ({"sliding_window": 0}, r"model\.sliding_window: got 0, expected None or a positive integer"),
        ({"sliding_window": 4, "causal": False}, r"model\.sliding_window: got 4 with causal=False"),
        ({"sliding_window": 4, "attention": "linear"}, r"sliding_window: got 4 .* attention='linear'"),
        ({"no_rope_layers": [9]}, r"model\.no_rope_layers: got \[9\], expected indices from 0 to"),
        ({"no_rope_layers": 1}, r"model\.no_rope_layers: got 1, expected indices"),
        ({"no_rope_layers": [0], "position": "none"}, r"no_rope_layers: got \[0\] with position='none'"),
        ({"rope_scaling": "yarn"}, r"model\.rope_scaling: got 'yarn', expected None or a RopeScaling"),
        ({"rope_scaling": {"kind": "yarn"}}, r"rope_scaling: got kind, expected kind, factor and any of"),
        (
            {"rope_scaling": {"kind": "ntk", "factor": 2}},
            r"rope_scaling\.kind: got 'ntk', expected one of linear",
        ),
        ({"rope_scaling": {"kind": "yarn", "factor": 2}}, r"rope_scaling\.original_length: got None"),
        (
            {"rope_scaling": {"kind": "linear", "factor": 2}, "position": "none"},
            r"model\.rope_scaling: got position='none'",
        ),
        ({"precision": "bitnet_b159"}, r"recipe: got 'bitnet_b159'.*did you mean 'bitnet_b158'"),
        ({"precision": [["layers_9/*", "int8"], ["*", "bitnet"]]}, r"layers_9"),
        ({"product": "int4"}, r"model\.product: got 'int4', expected one of float, int8, int8_gradients"),
        (
            {"product": "int8", "precision": [["*q_proj", "int8"], ["*", "bitnet_weight_only"]]},
            r"model\.product='int8': layers_0/attention/k_proj has weight='ternary_absmean', activation='none', "
            r"which do not both have codes in \[-128, 127\]; choose another recipe for it, or product='float'",
        ),
        (
            {"product": "int8_gradients", "precision": WIDE},
            r"product='int8_gradients': layers_0/attention/q_proj has weight='int8'",
        ),
    ],
)
@pytest.mark.unchecked_annotations
def test_invalid_configs_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(TINY | change)


def test_the_trained_length_is_stored_but_does_not_affect_equality() -> None:
    """An equal static argument hits the compilation cache: the trained length never causes a recompilation."""
    config = ModelConfig(**TINY | {"trained_length": 64})
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (again.trained_length, again.known_length) == (64, 64)
    unknown = ModelConfig.from_dict({name: value for name, value in TINY.items() if name != "trained_length"})
    assert (unknown.trained_length, unknown.known_length) == (None, TINY["max_length"])
    assert config == unknown
    assert hash(config) == hash(unknown)
    assert ModelConfig(**TINY | {"trained_length": 10**6}).known_length == TINY["max_length"]


def test_the_error_names_missing_fields() -> None:
    with pytest.raises(ValueError, match="missing hidden_size, num_layers, num_heads, ffn_size, max_length"):
        ModelConfig.from_dict({"vocab_size": 3})


@pytest.mark.parametrize(
    "change", [{}, {"tie_embeddings": False}, {"mlp": "relu"}, {"num_classes": 3, "causal": False}]
)
def test_linear_shapes_match_the_parameters(change: dict[str, Any]) -> None:
    config = ModelConfig(**TINY | change)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]
    weights = {path[:-1]: leaf.shape for path, leaf in flatten_dict(params).items() if path[-1] == "weight"}
    assert {"/".join(path): shape for path, shape in weights.items()} == config.linear_shapes()


def test_2b4t_has_as_many_linear_parameters_as_the_released_model() -> None:
    # papers/bitnet_line 6.1: 69.47 M per layer, 2.0840 B in total, embedding 328.3 M
    shapes = PRESETS["2b4t"].linear_shapes().values()
    assert round(sum(n * k for n, k in shapes) / 1e9, 4) == 2.0840
    assert round(PRESETS["2b4t"].vocab_size * PRESETS["2b4t"].hidden_size / 1e6, 1) == 328.3


def test_the_head_stays_float_under_a_bare_recipe() -> None:
    for change, head in (({"tie_embeddings": False}, "lm_head"), ({"num_classes": 2}, "classifier")):
        precisions = ModelConfig(**TINY | change).precisions()
        assert not precisions[head].quantizes_weights
        assert precisions["layers_0/mlp/up_proj"].quantizes_weights


def test_an_integer_head_is_a_linear_layer_tied_or_untied() -> None:
    for tied in (True, False):
        config = ModelConfig(**TINY | {"tie_embeddings": tied, "head": "int8"})
        assert config.linear_shapes()["lm_head"] == (config.vocab_size, config.hidden_size)
        assert config.precisions()["lm_head"] == Precision(
            weight="int8", activation="int8", granularity="channel"
        )
    for size, group in ((256, 128), (192, 64), (96, 32)):
        config = ModelConfig(**TINY | {"hidden_size": size, "num_heads": 2, "head": "int4"})
        assert config.precisions()["lm_head"].granularity == group


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "int2"}, "model.head: got 'int2', expected one of float, int8, int4"),
        ({"head": "int8", "num_classes": 3}, "expected a causal language model, or head='float'"),
        ({"head": "int8", "causal": False}, "got 'int8' with causal=False"),
        (
            {"head": "int4", "hidden_size": 40, "num_heads": 2},
            "got hidden_size=40, expected a multiple of 32",
        ),
        (
            {"head": "int8", "tie_embeddings": False, "precision": (("lm_head", "int8"), ("*", "bitnet"))},
            "and a precision rule for lm_head; expected only one of the two",
        ),
    ],
)
def test_invalid_heads_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**TINY | change)


def test_float_layers_stay_float_with_int8_products() -> None:
    assert ModelConfig(**TINY | {"product": "int8", "precision": "float32"}).product == "int8"
    mixed = ModelConfig(
        **TINY | {"product": "int8_gradients", "precision": [["*q_proj", "float32"], ["*", "bitnet"]]}
    )
    assert mixed.head_product == "int8"
