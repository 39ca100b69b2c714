"""A new quantizer is one function and one record (CONTRIBUTING). Here are two, used from training to the proof."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from bitnet_jax.evaluation.energy import operations
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.packed.packing import pack
from bitnet_jax.packed.proof import prove
from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.records import ROUNDING_STES, ActivationQuantizer, WeightQuantizer
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bitnet_jax.quantization.scales import Quantized, absmax, measure, reciprocal, spread
from bitnet_jax.quantization.ste import round_to_grid


def ternary_absmax(w: Float[Array, "n k"], args: Arguments = DEFAULT, *, floor: float = 1e-5) -> Quantized:
    """Ternary weights scaled by the largest magnitude.

    Forward:  s = 1 / max(max|W|, floor), codes = round(W s), scale = 1/s.
    Backward: g h.
    Source:   this test.
    """
    w = w.astype(jnp.float32)
    inverse = 1 / jnp.maximum(jax.lax.stop_gradient(measure(absmax, w, args.granularity)), floor)
    return Quantized(round_to_grid(w * spread(inverse, w.shape[-1]), -1, 1, args.ste), reciprocal(inverse))


def int6(x: Float[Array, "... k"], args: Arguments = DEFAULT) -> Quantized:
    """Absmax with 6 bits.

    Forward:  s = 31 / max(max|x|, 1e-5), codes = round(x s), scale = 1/s.
    Backward: g h.
    Source:   this test.
    """
    s = 31 / jnp.maximum(absmax(jax.lax.stop_gradient(x), keepdims=True), 1e-5)
    return Quantized(round_to_grid(x * s, -32, 31, args.ste), reciprocal(s))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WeightQuantizer(
        function=ternary_absmax,
        bits=np.log2(3),
        packed_format="ternary2",
        stes=ROUNDING_STES,
        first_scale=None,
    )
    monkeypatch.setitem(WEIGHT_QUANTIZERS, "ternary_absmax", weight)
    record = ActivationQuantizer(function=int6, bits=6, stes=ROUNDING_STES)
    monkeypatch.setitem(ACTIVATION_QUANTIZERS, "int6", record)


def precision(**fields) -> Precision:
    return Precision(weight="ternary_absmax", activation="int6", granularity="channel", **fields)


def test_a_precision_accepts_it() -> None:
    own = precision(weight_options={"floor": 0.5}, weight_ste="clipped")
    assert (own.packed_format, own.weight_bits, own.activation_bits) == ("ternary2", np.log2(3), 6)
    assert own.codes_fit_int8
    assert not own.input_is_signs
    assert own.absmax_bits is None
    assert Precision.from_dict({"weight": "ternary_absmax", "weight_options": {"floor": 0.5}}).weight_bits < 2
    for wrong, message in (
        ({"weight_options": {"flor": 0.5}}, "weight_options: got 'flor', .*did you mean 'floor'"),
        ({"weight_ste": "tanh"}, "weight_ste: got 'tanh'"),
        ({"scale": "learned"}, "weight with scale='learned': got 'ternary_absmax', expected one of"),
        ({"scale_init": "lsq"}, "weight with scale_init='lsq': got 'ternary_absmax', expected one of"),
        (
            {"activation_scale": "learned"},
            "activation with activation_scale='learned': got 'int6', expected one of",
        ),
        ({"activation_shift": True}, "activation with activation_shift=True: got 'int6', expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            precision(**wrong)


def test_a_layer_computes_and_learns_with_it() -> None:
    layer = BitLinear(5, precision())
    x = jax.random.normal(jax.random.key(0), (3, 8))
    params = layer.init(jax.random.key(1), x)["params"]
    w = ternary_absmax(params["weight"], Arguments(granularity="channel"))
    y = layer.apply({"params": params}, x)
    # codes of two factors, three products with scales: a few ulp
    np.testing.assert_allclose(y, int6(x).dequantize() @ w.dequantize().T, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda params: layer.apply({"params": params}, x).sum())(params)["weight"]
    expected = np.broadcast_to(np.asarray(int6(x).dequantize().sum(0)), (5, 8))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_a_model_is_packed_and_proved_with_it() -> None:
    config = ModelConfig(
        vocab_size=29, hidden_size=16, num_layers=1, num_heads=2, ffn_size=24, max_length=16,
        precision=(("*", precision()),),
    )  # fmt: skip
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    params = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"]
    packed = pack(params, config)
    assert set(config.packed_formats().values()) == {"ternary2"}
    proof = prove(config, {"params": params}, packed, tokens)
    assert proof.matrices == 7
    assert proof.max_relative_logit_error <= 1e-5
    assert sum(row.adds for row in operations(config, 1) if row.number == "int8") > 0
