"""Packing: every recipe with a packed form gives the same model, and errors are detected."""

from __future__ import annotations

import dataclasses
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.inference.generation import greedy, left_pad
from bitnet_jax.models import PRESETS, ModelConfig, Transformer
from bitnet_jax.nn import linear
from bitnet_jax.packed import packing
from bitnet_jax.packed.packing import PackingError
from bitnet_jax.packed.proof import Proof, logits, prove
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES, resolve
from bitnet_kernels import PackedArray, packed_matmul, unpack

# ffn_size and head sizes that are not multiples of a panel of 16 rows or a block of 16 or 32 inputs.
SHAPE: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 24, "num_layers": 1, "num_heads": 2, "ffn_size": 40, "max_length": 48,
    "num_kv_heads": 1,
}  # fmt: skip
TOKENS, MASK = left_pad([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3]])
PATHS = list(ModelConfig(**SHAPE).linear_shapes())
PACKABLE = [name for name in RECIPES if all(p.packed_format for p in resolve(name, PATHS).values())]


def init(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(Transformer(config).init)(jax.random.key(seed), tokens)["params"]


def pack(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """packing.pack; also checks that packing.abstract predicts the result."""
    packed, abstract = packing.pack(params, config), packing.abstract(config)
    assert jax.tree.structure(packed) == jax.tree.structure(abstract)  # including formats and shapes
    for leaf, described in zip(jax.tree.leaves(packed), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (described.shape, described.dtype)
    return packed


@pytest.fixture(scope="module")
def ternary() -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    config = ModelConfig(**SHAPE, precision="bitnet_b158")
    params = init(config)
    return config, params, pack(params, config)


def greedy_without_cache(
    config: ModelConfig, variables: Any, tokens: np.ndarray, mask: np.ndarray, count: int
) -> np.ndarray:
    """Greedy by definition: recomputes the full text for each token, with left padding for the new ones."""
    assert not mask[:, :count].any()
    generated = []
    for _ in range(count):
        values = logits(config.module(), variables, jnp.asarray(tokens), jnp.asarray(mask))
        generated.append(np.argmax(values[:, -1], axis=-1).astype(np.int32))
        tokens = np.concatenate([tokens[:, 1:], generated[-1][:, None]], axis=1)
        mask = np.concatenate([mask[:, 1:], np.ones_like(mask[:, :1])], axis=1)
    return np.stack(generated, axis=1)


@pytest.mark.extended
@pytest.mark.parametrize("half", [0, 1])
def test_all_packable_recipes_in_few_models_are_proved(half: int) -> None:
    """Each linear layer of a model has a different recipe, so that one compilation covers many."""
    recipes = PACKABLE[half::2]
    grouped = [
        r for r in recipes if isinstance(RECIPES[r], Precision) and isinstance(RECIPES[r].granularity, int)
    ]
    others = [r for r in recipes if r not in grouped]
    layers = max(len(grouped), -(-len(others) // 5))
    shape = SHAPE | {
        "num_layers": layers,
        "ffn_size": 256,
        "mlp": "relu2",
    }  # 256: a multiple of every group size
    paths = ModelConfig(**shape).linear_shapes()
    downs, rest = cycle(grouped), cycle(others)
    rules = tuple((path, next(downs if path.endswith("down_proj") else rest)) for path in paths)
    assert {recipe for _, recipe in rules} == set(recipes)
    config = ModelConfig(**shape, precision=rules)

    params = init(config)
    tokens = np.pad(TOKENS, ((0, 0), (20, 0)))
    mask = np.pad(MASK, ((0, 0), (20, 0)))
    proof = prove(
        config,
        {"params": params},
        pack(params, config),
        tokens,
        mask,
        greedy=greedy_without_cache,
        new_tokens=20,
    )
    assert proof.matrices == len(paths) >= len(recipes) >= 10
    assert proof.tokens_identical == 60
    assert proof.logits == MASK.sum() * 29
    # Integer codes are exact; that leaves the weight-only recipes, whose float sums XLA may reorder.
    assert proof.max_relative_logit_error < 5e-6


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("recipe", PACKABLE)
def test_each_packable_recipe_alone_is_proved(recipe: str) -> None:
    config = ModelConfig(**SHAPE | {"hidden_size": 256, "ffn_size": 512}, precision=recipe)
    params = init(config)
    packed = pack(params, config)
    proof = prove(config, {"params": params}, packed, TOKENS, MASK, greedy=greedy, new_tokens=20)
    assert proof.matrices == 7
    assert proof.tokens_identical == 60


@pytest.mark.extended
@pytest.mark.optimized
def test_ternary_is_bit_identical_and_generates_the_same_text(ternary: Any) -> None:
    config, params, _ = ternary
    packed = pack(params, config)  # compiled like the model, so that the means round alike
    proof = prove(config, {"params": params}, packed, TOKENS, MASK, greedy=greedy, new_tokens=30)
    assert proof == Proof(
        matrices=7, max_relative_logit_error=0.0, logits=int(MASK.sum()) * 29, tokens_identical=90
    )


@pytest.mark.extended
@pytest.mark.optimized
def test_bfloat16_models_are_proved_and_only_packed_layers_lose_their_latents() -> None:
    config = ModelConfig(
        **SHAPE, dtype="bfloat16", embedding_dtype="bfloat16", tie_embeddings=False, position="learned",
        precision=(
            ("*/attention/*", "bit"), ("*/up_proj", "int8"), ("*/gate_proj", "float32"), ("*", "bitnet"),
        ),
    )  # fmt: skip
    params = init(config)
    packed = pack(params, config)
    kept, block = packed["params"], packed["params"]["layers_0"]
    assert set(packed["packed"]["layers_0"]["mlp"]) == {"down_proj", "up_proj"}
    assert set(block["attention"]["q_proj"]) == {"activation_scale", "activation_shift"}
    assert block["mlp"]["gate_proj"]["weight"] is params["layers_0"]["mlp"]["gate_proj"]["weight"]
    assert "weight" in params["layers_0"]["attention"]["q_proj"]  # the caller's parameters are untouched
    assert kept["embed"]["embedding"].dtype == kept["position_embed"]["embedding"].dtype == jnp.bfloat16
    assert kept["lm_head"]["weight"].dtype == jnp.bfloat16
    assert prove(config, {"params": params}, packed, TOKENS, MASK).matrices == 6


def test_packed_codes_and_scales_match_the_formula(ternary: Any) -> None:
    _, params, packed = ternary
    latent = np.asarray(params["layers_0"]["mlp"]["up_proj"]["weight"])
    weight = packed["packed"]["layers_0"]["mlp"]["up_proj"]["weight"]
    mean = np.abs(latent).mean(dtype=np.float64)
    np.testing.assert_array_equal(unpack(weight), np.clip(np.round(latent / mean), -1, 1))
    # One float32 mean and two reciprocals: a few units in the last place.
    np.testing.assert_allclose(weight.scale, [[mean]], rtol=1e-6)


@pytest.mark.extended
def test_a_classifier_is_packed_and_proved_on_its_logits() -> None:
    config = ModelConfig(**SHAPE, precision="bitnet", num_classes=3, causal=False)
    params = init(config)
    packed = pack(params, config)
    proof = prove(config, {"params": params}, packed, TOKENS, MASK)
    assert (proof.logits, proof.tokens_identical) == (9, 0)
    assert proof.matrices == len(config.precisions()) - 1  # the classifier head stays float


def test_sizes_count_every_byte(ternary: Any) -> None:
    _, _, packed = ternary
    sizes = packing.sizes(packed)
    assert sizes.total == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert sizes.embeddings == 29 * 24 * 4
    assert sizes.quantized_bfloat16 == 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40)
    assert sizes.packed_ratio == sizes.packed / sizes.quantized_bfloat16
    assert np.isnan(packing.sizes({"params": packed["params"]}).packed_ratio)


DEEP: dict[str, dict[str, Any]] = {
    "one kind of layer": {"num_layers": 12, "precision": "bitnet_b158"},  # layers_10 sorts before layers_2
    "float": {"num_layers": 2, "precision": "float32"},
    "alternating kinds": {
        "num_layers": 5, "use_bias": True,
        "precision": (("layers_[13]/mlp/*", "bitnet"), ("layers_3/*", "float32"), ("*", "bitnet_b158")),
    },
    "learned scales, quantized head": {
        "num_layers": 3, "tie_embeddings": False, "position": "learned", "inside_norm": True,
        "precision": (("*/q_proj", "bit"), ("lm_head", "paretoq_1.58"), ("*", "paretoq_1")),
    },
    "linear attention": {"num_layers": 2, "attention": "linear", "norm_placement": "inside"},
    "layers without rotary positions": {
        "num_layers": 5, "no_rope_layers": (3, 4), "qk_norm": True, "attention_bias": "qkv", "precision": "bitnet",
    },
    "classifier": {"num_layers": 2, "num_classes": 3, "causal": False, "attention": "binary"},
}  # fmt: skip


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("case", DEEP)
def test_the_abstract_model_equals_a_trace_of_all_layers(case: str) -> None:
    config = ModelConfig(**SHAPE | DEEP[case])
    abstract, traced = packing.abstract(config), packing._trace(config)
    assert jax.tree.structure(abstract) == jax.tree.structure(traced)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(traced)


def test_describing_a_deep_model_is_as_fast_as_a_shallow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    depths, trace = [], packing._trace
    monkeypatch.setattr(packing, "_trace", lambda config: depths.append(config.num_layers) or trace(config))
    described = packing.abstract(dataclasses.replace(PRESETS["100b"], precision="bitnet"))
    assert depths == [1]
    assert len(described["packed"]) == 72


def test_a_model_of_100_billion_binary_weights_takes_a_sixteenth_of_bfloat16() -> None:
    sizes = packing.sizes(packing.abstract(dataclasses.replace(PRESETS["100b"], precision="bitnet")))
    assert sizes.packed_ratio == pytest.approx(1 / 16, rel=1e-4)  # plus a few scales
    assert sizes.packed == pytest.approx(12.5e9, rel=0.1)


# What prove must detect. Each mutation is a mistake that a packer, a file or a kernel could make.


def first_weight(packed: dict[str, Any]) -> PackedArray:
    return packed["packed"]["layers_0"]["attention"]["q_proj"]["weight"]


def with_first_weight(packed: dict[str, Any], **changes: Any) -> dict[str, Any]:
    copy = jax.tree.map(lambda leaf: leaf, packed)
    weight = dataclasses.replace(first_weight(packed), **changes)
    copy["packed"]["layers_0"]["attention"]["q_proj"]["weight"] = weight
    return copy


def reversed_fields(codes: np.ndarray) -> np.ndarray:
    """The four 2-bit fields of each byte in reversed order."""
    return ((codes & 3) << 6) | ((codes & 12) << 2) | ((codes & 48) >> 2) | (codes >> 6)


def one_code_changed(codes: np.ndarray) -> np.ndarray:
    changed = codes.copy()
    changed[0, 0, 0] = (changed[0, 0, 0] & ~np.uint8(3)) | ((changed[0, 0, 0] & 3) + 1) % 3
    return changed


MUTATIONS = {
    "one code": lambda w: {"codes": jnp.asarray(one_code_changed(np.asarray(w.codes)))},
    "bit order": lambda w: {"codes": jnp.asarray(reversed_fields(np.asarray(w.codes)))},
    "panel order": lambda w: {"codes": w.codes[::-1]},
    "sign": lambda w: {"codes": jnp.asarray(np.asarray(w.codes) ^ 0xAA & ~np.asarray(w.codes) << 1 & 0xAA)},
    "scale": lambda w: {"scale": w.scale * jnp.float32(1 + 2**-20)},
    "scale sign": lambda w: {"scale": -w.scale},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_weight_is_detected(ternary: Any, mutation: str) -> None:
    config, params, packed = ternary
    mutated = with_first_weight(packed, **MUTATIONS[mutation](first_weight(packed)))
    with pytest.raises(PackingError, match="layers_0/attention/q_proj: (code|the packed scale)"):
        prove(config, {"params": params}, mutated, TOKENS, MASK)


def test_another_format_or_a_missing_matrix_is_detected(ternary: Any) -> None:
    config, params, packed = ternary
    with pytest.raises(PackingError, match="format is binary, expected ternary2"):
        prove(config, {"params": params}, with_first_weight(packed, format="binary"), TOKENS)
    del (missing := jax.tree.map(lambda leaf: leaf, packed))["packed"]["layers_0"]["mlp"]["up_proj"]
    with pytest.raises(PackingError, match="layers_0/mlp/up_proj/weight is missing"):
        prove(config, {"params": params}, missing, TOKENS)
    extra = jax.tree.map(lambda leaf: leaf, packed)
    extra["packed"]["layers_7"] = extra["packed"]["layers_0"]
    with pytest.raises(PackingError, match="layers_7/attention/k_proj/weight is unexpected"):
        prove(config, {"params": params}, extra, TOKENS)


def test_a_changed_float_parameter_is_detected_in_the_logits(ternary: Any) -> None:
    config, params, packed = ternary
    changed = jax.tree.map(lambda leaf: leaf, packed)
    changed["params"]["final_norm"]["scale"] = changed["params"]["final_norm"]["scale"].at[3].multiply(1.01)
    with pytest.raises(PackingError, match=r"logits differ by .* at index"):
        prove(config, {"params": params}, changed, TOKENS, MASK)
    broken = jax.tree.map(lambda leaf: leaf, packed)
    broken["params"]["final_norm"]["scale"] = jnp.full(24, jnp.nan)
    with pytest.raises(PackingError, match="logits differ by nan"):
        prove(config, {"params": params}, broken, TOKENS, MASK)
    latent = {**params, "final_norm": broken["params"]["final_norm"]}
    with pytest.raises(PackingError, match="got NaN or infinite logits from the latent model"):
        prove(config, {"params": latent}, packed, TOKENS, MASK)


def test_a_wrong_kernel_is_detected_in_the_logits(ternary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, params, packed = ternary
    # A different max_length gives the same model but a separate compilation.
    config = dataclasses.replace(config, max_length=50)
    monkeypatch.setattr(linear, "packed_matmul", lambda *a, **k: packed_matmul(*a, **k) * (1 + 2.0**-10))
    with pytest.raises(PackingError, match="logits differ"):
        prove(config, {"params": params}, packed, TOKENS, MASK)


def test_the_error_names_the_first_differing_greedy_token(ternary: Any) -> None:
    config, params, packed = ternary

    def nearly(config: ModelConfig, variables: Any, tokens: Any, mask: Any, count: int) -> np.ndarray:
        generated = np.arange(3 * count).reshape(3, count)
        generated[2, 3] += "packed" in variables
        generated[1, 4:] += "packed" in variables
        return generated

    with pytest.raises(PackingError, match="greedy token 3 of prompt 2 is 22 packed and 21 latent .21 of 27"):
        prove(config, {"params": params}, packed, TOKENS, MASK, greedy=nearly, new_tokens=9)
    with pytest.raises(ValueError, match="needs greedy="):
        prove(config, {"params": params}, packed, TOKENS, MASK, new_tokens=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: None, "up_proj/weight: got none, expected .40, 24."),
        (lambda w: w[:, :5], "up_proj/weight: got .40, 5., expected .40, 24."),
        (lambda w: w.at[2, 3].set(jnp.nan), "up_proj: the weights or scales contain NaN"),
    ],
)
def test_the_error_names_weights_that_cannot_be_packed(ternary: Any, change: Any, message: str) -> None:
    config, params, _ = ternary
    params = jax.tree.map(lambda leaf: leaf, params)
    weight = change(params["layers_0"]["mlp"]["up_proj"].pop("weight"))
    if weight is not None:
        params["layers_0"]["mlp"]["up_proj"]["weight"] = weight
    with pytest.raises(PackingError, match=message):
        packing.pack(params, config)


def test_codes_and_scales_that_the_format_cannot_hold_are_rejected(
    ternary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params, _ = ternary
    groups_of_8 = Precision(weight="binary", activation="int8", granularity=8)
    with pytest.raises(PackingError, match="layers_0/attention/q_proj: .*scale has shape"):
        packing.pack(params, ModelConfig(**SHAPE, precision=(("*", groups_of_8),)))
    monkeypatch.setattr(Precision, "packed_format", "binary")  # a quantizer that declares the wrong format
    with pytest.raises(PackingError, match="q_proj: got codes .* expected only"):
        packing.pack(params, ModelConfig(**SHAPE, precision="bitnet_b158"))


@pytest.mark.extended
@pytest.mark.optimized
def test_the_ternary5_format_gives_the_same_model(ternary: Any) -> None:
    config, params, packed = ternary
    dense = dataclasses.replace(config, ternary_format="ternary5")
    repacked = pack(params, dense)
    weight = repacked["packed"]["layers_0"]["mlp"]["down_proj"]["weight"]
    assert weight.format == "ternary5"
    proof = prove(dense, {"params": params}, repacked, TOKENS, MASK, greedy=greedy, new_tokens=10)
    assert proof.max_relative_logit_error == 0.0
    with pytest.raises(PackingError, match="the packed format is ternary2, expected ternary5"):
        prove(dense, {"params": params}, packed, TOKENS, MASK)


# The integer output head.

HEAD_SHAPE = SHAPE | {"hidden_size": 32, "embedding_dtype": "bfloat16"}


@pytest.mark.extended
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_a_quantized_head_is_packed_and_proved(head: str, tied: bool) -> None:
    config = ModelConfig(**HEAD_SHAPE, head=head, tie_embeddings=tied)
    params = init(config)
    packed = pack(params, config)
    weight = packed["packed"]["lm_head"]["weight"]
    assert (weight.format, weight.shape) == (head, (29, 32))
    assert "lm_head" not in packed["params"]
    assert packed["params"]["embed"]["embedding"].dtype == jnp.bfloat16  # for look-ups
    # Compilation dominates: two of the four generate text, covering each head and each kind of table once.
    new_tokens = 20 if tied == (head == "int8") else 0
    proof = prove(config, {"params": params}, packed, TOKENS, MASK, greedy=greedy, new_tokens=new_tokens)
    assert (proof.matrices, proof.tokens_identical) == (8, 3 * new_tokens)
    assert packing.sizes(packed).total == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))

    # The codes follow the formula on the rounded table: the maximum of a row, or of 32 inputs, is 127 or 7.
    table = params["embed"]["embedding"] if tied else params["lm_head"]["weight"]
    table = np.asarray(table.astype(jnp.bfloat16), np.float32)
    scale = np.abs(table).max(axis=1, keepdims=True) / np.float32(127 if head == "int8" else 7)
    np.testing.assert_allclose(weight.scale, scale, rtol=1e-6)
    assert (np.abs(np.asarray(unpack(weight)) - table / scale) <= 0.5001).all()  # rounded, up to an ulp

    changed = jax.tree.map(lambda leaf: leaf, packed)
    changed["packed"]["lm_head"]["weight"] = dataclasses.replace(weight, codes=weight.codes ^ 1)
    with pytest.raises(PackingError, match="lm_head: code"):
        prove(config, {"params": params}, changed, TOKENS, MASK)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("tied", [True, False])
def test_with_head_equals_packing_with_that_head(tied: bool) -> None:
    config = ModelConfig(**HEAD_SHAPE, tie_embeddings=tied)
    params = init(config)
    packed = pack(params, config)
    for head in ("int8", "int4"):
        wanted = dataclasses.replace(config, head=head)
        changed, variables = packing.with_head(config, packed, head)
        assert changed == wanted
        expected = pack(params, wanted)
        assert jax.tree.structure(variables) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
        assert variables["params"]["embed"]["embedding"] is packed["params"]["embed"]["embedding"]
        if tied:
            back, same = packing.with_head(changed, variables, "float")
            assert back == config
            jax.tree.map(np.testing.assert_array_equal, same, packed)
        else:
            with pytest.raises(PackingError, match=f"got {head} codes, expected the float table"):
                packing.with_head(changed, variables, "float")
    assert "lm_head" not in packed["packed"]  # the given variables are untouched


def test_a_quantized_head_trains_its_embedding() -> None:
    config = ModelConfig(**HEAD_SHAPE, head="int8")
    params = init(config)

    def total(params: dict[str, Any]) -> jax.Array:
        return jnp.sum(Transformer(config).apply({"params": params}, TOKENS).logits[..., 7])

    gradient = jax.jit(jax.grad(total))(params)["embed"]["embedding"]
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[7]).max() > 1e-3  # only one prompt contains token 7, but its head row affects all
