"""Each record describes its quantizer function correctly, including what the function rejects."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.records import ActivationQuantizer, Quantizer, WeightQuantizer
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bitnet_jax.quantization.ste import STES

ALL: dict[str, Quantizer] = {f"weight {name}": record for name, record in WEIGHT_QUANTIZERS.items()}
ALL |= {f"activation {name}": record for name, record in ACTIVATION_QUANTIZERS.items()}
RANGES = {"binary": (-1, 1), "ternary2": (-1, 1), "int4": (-8, 7), "int8": (-128, 127), "uint4": (0, 15)}
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 16)), jnp.float32)
KEY = jax.random.key(0)


def usable(record: Quantizer, **settings) -> Arguments:
    """The arguments that the record uses, updated with the given ones."""
    weights = isinstance(record, WeightQuantizer)
    arguments = {
        "granularity": "channel",
        "scale": jnp.full((6, 1) if weights else (), 0.7),
        "shift": jnp.full(16, 0.1),
        "key": KEY,
    }
    return Arguments(**{name: value for name, value in arguments.items() if name in record.uses} | settings)


def codes(record: Quantizer, args: Arguments) -> np.ndarray:
    return np.asarray(record(X, args).dequantize())


@pytest.mark.parametrize("name", ALL)
def test_the_docstring_documents_forward_backward_and_source(name: str) -> None:
    text = inspect.getdoc(ALL[name].function) or ""
    for part in ("Forward:  ", "Backward: ", "Source:   "):
        assert text.count(f"\n{part}") == 1, part


@pytest.mark.parametrize("argument", ["granularity", "scale", "shift", "key"])
@pytest.mark.parametrize("name", ALL)
def test_an_argument_has_an_effect_or_is_rejected(name: str, argument: str) -> None:
    record = ALL[name]
    needs_scale = isinstance(record, ActivationQuantizer) and not record.measures_scale
    base = Arguments(scale=jnp.float32(0.75)) if needs_scale else Arguments()
    given = {"granularity": "channel", "scale": jnp.ones(()), "shift": jnp.ones(16), "key": KEY}[argument]
    if argument in record.uses:
        value = getattr(usable(record), argument)
        scale = value if argument == "scale" else base.scale
        changed = Arguments(**{"scale": scale, argument: value})
        assert (codes(record, changed) != codes(record, base)).any()
    else:
        with pytest.raises(
            ValueError, match=f"^{argument}: got one for the quantizer .* which uses none"
        ) as caught:
            record(X, Arguments(**{"scale": base.scale, argument: given}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("name", ALL)
def test_supported_stes_have_a_gradient_and_others_are_rejected(name: str, ste: str) -> None:
    record = ALL[name]
    gradient = jax.grad(lambda x: record(x, usable(record, ste=ste)).dequantize().sum())
    if ste in record.stes:
        assert np.isfinite(gradient(X)).all()
    else:
        with pytest.raises(ValueError, match=f"^STE of .*: got '{ste}', expected one of .*clipped"):
            gradient(X)


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_codes_match_the_bits_and_format_of_the_record(name: str) -> None:
    """At most 2^bits distinct codes, all of them used, within the range of the packed format."""
    record = WEIGHT_QUANTIZERS[name]
    w = jnp.asarray(np.random.default_rng(1).standard_normal((64, 64)), jnp.float32)
    scale = jnp.full((1, 1), 3 / 2**record.bits) if "scale" in record.uses else None
    seen = np.unique(record(w, Arguments(scale=scale)).codes)
    assert len(seen) == round(2**record.bits)
    low, high = RANGES[str(record.packed_format_with({}))]
    assert low <= seen.min()
    assert seen.max() <= high
    assert (record.packed_format_with({}) == "binary") == (set(seen) == {-1, 1})


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_mid_rise_grid_fits_its_format(bits: int) -> None:
    record, options = WEIGHT_QUANTIZERS[f"int{bits}"], {"levels": "midrise"}
    largest = float(jnp.abs(record(X, **options).codes).max())
    format = record.packed_format_with(options)
    assert largest == 2**bits - 1
    assert format == {3: "int4", 4: "int8", 8: None}[bits]
    assert largest <= RANGES[format][1] if format else largest > 127


@pytest.mark.parametrize("name", ACTIVATION_QUANTIZERS)
def test_inputs_declared_as_signs_are_signs(name: str) -> None:
    record = ACTIVATION_QUANTIZERS[name]
    seen = np.unique(record(X, usable(record)).codes)
    assert record.signs == (set(seen) == {-1, 1})
    if record.bits is not None:
        assert len(seen) <= 2**record.bits


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_the_measured_scale_is_one_where_the_record_says_so(name: str) -> None:
    record = WEIGHT_QUANTIZERS[name]
    # Times 3: a measured scale that is a power of two happens to be 1 for X.
    assert record.unit_scale == bool((record(3 * X).scale == 1).all())


def test_fixed_arguments_are_not_options() -> None:
    """With `bits` as an option, int4 could have the codes of another quantizer but the bits and format of int4."""
    for weight, option in (("int4", ("bits", 8)), ("seq_ternary", ("levels", 4)), ("int2", ("bits", 3))):
        with pytest.raises(ValueError, match=f"weight_options: got '{option[0]}', expected one of"):
            Precision(weight=weight, weight_options=(option,))


def test_arguments_pass_through_jit_and_grad() -> None:
    """Arrays are leaves, names are static: other values do not retrace."""
    record, traced = WEIGHT_QUANTIZERS["binary"], 0

    @jax.jit
    def total(w, args: Arguments):
        nonlocal traced
        traced += 1
        return record(w, args).dequantize().sum()

    w = jnp.abs(X)
    for scale in (0.5, 0.25):
        args = Arguments(granularity="channel", ste="clipped", scale=jnp.full((6, 1), scale), progress=0.5)
        gradient = jax.grad(total, argnums=1)(w, args)
        np.testing.assert_allclose(gradient.scale, np.full((6, 1), 16 / np.sqrt(16)), rtol=1e-6)
        np.testing.assert_allclose(total(w, args), 96 * scale, rtol=1e-6)
    assert traced == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: p.quantize_activation(X, shift=jnp.zeros(16)),
            "activation_shift=False: got a learned shift",
        ),
        (lambda p: p.quantize_activation(X, key=KEY), "key: got one for the quantizer sign, which uses none"),
        (lambda p: p.quantize_weight(X, key=KEY), "key: got one for the quantizer binary, which uses none"),
    ],
)
def test_a_precision_rejects_fields_its_quantizer_does_not_use(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Precision(weight="binary", activation="sign"))


def test_a_precision_with_a_threshold_requires_it() -> None:
    precision = Precision(weight="binary", activation="sign", activation_shift=True)
    with pytest.raises(ValueError, match="activation_shift=True: got no learned shift, expected one"):
        precision.quantize_activation(X)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weight": "binary_raw", "granularity": "channel"},
            "granularity: got 'channel' with weight='binary_raw', whose scale is 1, expected 'tensor'",
        ),
        (
            {
                "weight": "binary",
                "activation": "elastic_unsigned",
                "activation_scale": "learned",
                "activation_ste": "approx_sign",
            },
            "activation_ste: got 'approx_sign', expected one of .*clipped",
        ),
    ],
)
def test_invalid_precisions_are_rejected_at_construction(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precision(**fields)
