"""Precision as a value: which quantizers a linear layer uses.

A layer with `p: Precision` does, in training,

    wq = p.quantize_weight(w, scale=learned or None, progress=..., key=...)
    xq = p.quantize_activation(x, scale=learned or None, shift=learned or None, progress=..., key=...)
    y = (xq.codes @ wq.codes.T) * wq.scale * xq.scale        (x @ w.T where p.quantizes_weights is False)

and asks for its extra parameters, all float32, so:

    p.weight_scale_init(w)        -> first learned weight scale [#n, G], or None if it has none
    p.activation_param_shapes(k)  -> {"activation_scale": ((), 1.6), "activation_shift": ((k,), 0.0)}, only
                                     the entries that exist; the values suit inputs of unit variance
    p.activation_scale_init(x)    -> the same scale measured on a first batch (BiT, LSQ), or None
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bitnet_jax.quantization.activations import TOP_K_STES
from bitnet_jax.quantization.registry import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    Quantized,
    hadamard,
    top_k,
)
from bitnet_jax.quantization.scales import SMALLEST_SCALE, Granularity, absmax, measure
from bitnet_jax.quantization.ste import STES, Progress

# name -> (bits a weight carries, packed format of its codes)
PackedFormat = Literal["binary", "ternary2", "int4", "int8"]
WEIGHT_FORMATS: dict[str, tuple[float, PackedFormat | None]] = {
    "binary": (1, "binary"),
    "binary_centred": (1, "binary"),
    "binary_raw": (1, "binary"),
    "binary_stochastic": (1, "binary"),
    "bwn": (1, "binary"),
    "zero_one": (1, "ternary2"),
    "ternary_absmean": (math.log2(3), "ternary2"),
    "ternary_absmedian": (math.log2(3), "ternary2"),
    "ternary_twn": (math.log2(3), "ternary2"),
    "seq_ternary": (math.log2(3), "ternary2"),
    "seq_int2": (2, "int4"),
    "int2": (2, "int4"),
    "int3": (3, "int4"),
    "int4": (4, "int4"),
    "int8": (8, "int8"),
}
ACTIVATION_BITS: dict[str, float] = {
    "int8": 8,
    "int4": 4,
    "int2": 2,
    "sign": 1,
    "sign_absmean": 1,
    "boolean": 1,
    "elastic_signed": 1,
    "elastic_unsigned": 1,
}
SHIFTED = ("sign", "sign_absmean", "boolean", "elastic_signed", "elastic_unsigned")
ROUNDING = ("none", "int8", "int4", "int2")  # these know only the STEs identity and clipped
UNIT_NORMAL_MEAN = math.sqrt(2 / math.pi)  # mean |x| of a standard normal input


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """How one linear layer represents its weights and its input. Hashable; `dataclasses.asdict` is JSON."""

    # what
    weight: str = "float"  # "float" or a name in WEIGHT_QUANTIZERS
    activation: str = "none"  # a name in ACTIVATION_QUANTIZERS
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the product, for weight="float" only
    # the gradient of the steps
    weight_ste: str = "identity"
    activation_ste: str = "identity"
    latent_clip: float | None = None  # the optimizer clips the latents to +-c after each update
    # scales
    scale: Literal["analytic", "learned", "none"] = "analytic"
    scale_init: Literal["analytic", "lsq"] = "analytic"  # of a learned one: measured, or 2 mean|w| / sqrt(Qp)
    granularity: Granularity = "tensor"  # "tensor", "channel" or g inputs per scale
    activation_scale: Literal["analytic", "learned"] = "analytic"
    activation_shift: bool = False  # learn a threshold per input feature
    # around the activation quantizer: BitNet v2, a4.8
    hadamard: bool | Literal["block"] = False  # rotate the input; "block" for widths that are no power of two
    top_k: float = 1.0  # fraction of inputs kept per token (a4.8, Q-Sparse)
    top_k_ste: Literal["identity", "masked"] = "identity"  # masked: no gradient to inputs that were not kept
    # disputed details: keyword arguments of the two quantizers, as (name, value) pairs
    weight_options: tuple[tuple[str, Any], ...] = ()
    activation_options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for field in ("weight_options", "activation_options"):
            value = getattr(self, field)
            pairs = value.items() if isinstance(value, Mapping) else value
            object.__setattr__(self, field, tuple(sorted((str(name), option) for name, option in pairs)))
        check_name("weight", self.weight, ("float", *WEIGHT_QUANTIZERS))
        check_name("activation", self.activation, tuple(ACTIVATION_QUANTIZERS))
        check_name("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        check_name("scale", self.scale, ("analytic", "learned", "none"))
        check_name("scale_init", self.scale_init, ("analytic", "lsq"))
        check_name("activation_scale", self.activation_scale, ("analytic", "learned"))
        check_name("weight_ste", self.weight_ste, _stes(self.packed_format == "binary"))
        check_name("activation_ste", self.activation_ste, _stes(self.activation not in ROUNDING))
        if (
            not isinstance(self.granularity, int)
            or isinstance(self.granularity, bool)
            or self.granularity < 1
        ):
            check_name("granularity", self.granularity, ("tensor", "channel"), " or a positive group size")
        if self.hadamard not in (False, True, "block"):
            raise ValueError(f"hadamard: got {self.hadamard!r}, expected False, True or 'block'")
        if not 0 < self.top_k <= 1:
            raise ValueError(f"top_k: got {self.top_k}, expected a fraction in (0, 1]")
        check_name("top_k_ste", self.top_k_ste, TOP_K_STES)
        if self.weight == "float" and self.activation != "none":
            raise ValueError(
                f"activation: got {self.activation!r} with weight='float', expected 'none'; "
                "choose a weight quantizer"
            )
        if self.activation.startswith("elastic") and self.activation_scale != "learned":
            raise ValueError(
                f"activation={self.activation!r} needs activation_scale='learned', got 'analytic'"
            )
        if self.activation_scale == "learned" and self.activation not in LEARNED_ACTIVATIONS:
            raise ValueError(
                f"activation_scale='learned': got activation={self.activation!r}, "
                f"expected one of {sorted(LEARNED_ACTIVATIONS)}"
            )
        if self.scale_init == "lsq" and self.weight not in ("int8", "int4", "int3"):
            raise ValueError(
                f"scale_init='lsq': got weight={self.weight!r}, expected 'int8', 'int4' or 'int3'"
            )
        if self.weight == "float" and self.weight_options:
            raise ValueError(f"weight_options: got {self.weight_options} with weight='float', expected none")
        if self.quantizes_weights:
            _check_options("weight_options", self.weight_options, WEIGHT_QUANTIZERS[self.weight])
        _check_options("activation_options", self.activation_options, ACTIVATION_QUANTIZERS[self.activation])
        if self.activation_shift and self.activation not in SHIFTED:
            raise ValueError(
                f"activation_shift: got activation={self.activation!r}, expected one of {sorted(SHIFTED)}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Precision:
        """The inverse of dataclasses.asdict, also by way of JSON. ValueError for an unknown field."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            check_name("Precision field", name, names)
        return cls(**values)

    @property
    def quantizes_weights(self) -> bool:
        return self.weight != "float"

    @property
    def packed_format(self) -> PackedFormat | None:
        """The packed form of the weight codes, whatever the activations are; None if there is none."""
        if not self.quantizes_weights:
            return None
        bits, format = WEIGHT_FORMATS[self.weight]
        if ("levels", "midrise") in self.weight_options and bits >= 4:  # codes of twice the range
            return "int8" if bits == 4 else None
        return format

    @property
    def codes_fit_int8(self) -> bool:
        """True where weights and input both have integer codes, in [-128, 127]."""
        return self.activation != "none" and self.packed_format is not None

    @property
    def quantizes_input_by_absmax(self) -> bool:
        """True where the input becomes plain absmax int8 per token, which packed_matmul does by itself."""
        plain = Precision(weight=self.weight, activation="int8") if self.quantizes_weights else None
        fields = ("activation", "activation_scale", "hadamard", "top_k", "activation_options")
        return plain is not None and all(getattr(self, f) == getattr(plain, f) for f in fields)

    @property
    def input_is_signs(self) -> bool:
        """True where every code of the input is -1 or 1."""
        return self.activation in ("sign", "sign_absmean", "elastic_signed") and self.top_k == 1

    @property
    def weight_bits(self) -> float:
        """Information per weight: 1, log2(3), ..., without the scales."""
        return WEIGHT_FORMATS[self.weight][0] if self.quantizes_weights else self._float_bits

    @property
    def activation_bits(self) -> float:
        return ACTIVATION_BITS.get(self.activation, self._float_bits)

    @property
    def needs_key(self) -> bool:
        """True if training draws random codes; without a key the quantizer is its deterministic self."""
        return self.weight == "binary_stochastic"

    @property
    def _float_bits(self) -> float:
        return 16 if self.compute_dtype == "bfloat16" else 32

    def quantize_weight(
        self,
        w: Float[Array, "n k"],
        scale: Float[Array, "#n G"] | None = None,
        progress: Progress = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> Quantized:
        """Codes and scale of latent weights; `scale` is the learned one, given exactly if there is one."""
        if not self.quantizes_weights:
            raise ValueError("weight='float' has no codes; check quantizes_weights first")
        if (scale is not None) != (self.scale == "learned"):
            raise ValueError(
                f"scale={self.scale!r}: got {'a' if scale is not None else 'no'} learned scale, "
                "expected the other"
            )
        if self.scale == "none":
            scale = jnp.ones((1, 1), jnp.float32)
        options = dict(self.weight_options)
        return WEIGHT_QUANTIZERS[self.weight](
            w,
            granularity=self.granularity,
            ste=self.weight_ste,
            scale=scale,
            progress=progress,
            key=key,
            **options,
        )

    def quantize_activation(
        self,
        x: Float[Array, "... k"],
        scale: Float[Array, ""] | None = None,
        shift: Float[Array, "k"] | None = None,
        progress: Progress = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> Quantized:
        """Codes and scale of an input: rotate, quantize, keep the codes of each token's top_k largest |x|."""
        if (scale is not None) != (self.activation_scale == "learned"):
            raise ValueError(
                f"activation_scale={self.activation_scale!r}: got "
                f"{'a' if scale is not None else 'no'} learned scale, expected the other"
            )
        x = x.astype(jnp.float32)
        if self.hadamard:
            x = hadamard(x, block=self.hadamard == "block")
        quantized = ACTIVATION_QUANTIZERS[self.activation](
            x,
            ste=self.activation_ste,
            scale=scale,
            shift=shift,
            progress=progress,
            key=key,
            **dict(self.activation_options),
        )
        if self.top_k < 1:
            quantized = quantized._replace(codes=top_k(quantized.codes, self.top_k, by=x, ste=self.top_k_ste))
        return quantized

    def weight_scale_init(self, w: Float[Array, "n k"]) -> Float[Array, "#n G"] | None:
        """First value of the learned weight scale for latents w, None if scales are not learned."""
        if self.scale != "learned":
            return None
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        if self.scale_init == "lsq":
            q_max = 2 ** (int(self.weight_bits) - 1) - 1
            size = measure(jnp.mean, jnp.abs(w), self.granularity) * (2 / math.sqrt(q_max))
        elif self.weight.startswith("seq"):
            size = measure(absmax, w, self.granularity)
        else:
            analytic = dataclasses.replace(self, scale="analytic")
            size = analytic.quantize_weight(w).scale
        return jnp.maximum(size, SMALLEST_SCALE)

    def activation_param_shapes(self, k: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """Learned activation parameters of a layer with k inputs: name -> (shape, first value)."""
        declared: dict[str, tuple[tuple[int, ...], float]] = {}
        if self.activation_scale == "learned":
            declared["activation_scale"] = ((), LEARNED_ACTIVATIONS[self.activation] * UNIT_NORMAL_MEAN)
        if self.activation_shift:
            declared["activation_shift"] = ((k,), 0.0)
        return declared

    def activation_scale_init(self, x: Float[Array, "... k"]) -> Float[Array, ""] | None:
        """First value of the learned activation scale measured on a batch, None if it is not learned."""
        if self.activation_scale != "learned":
            return None
        size = jnp.mean(jnp.abs(x.astype(jnp.float32))) * LEARNED_ACTIVATIONS[self.activation]
        return jnp.maximum(jax.lax.stop_gradient(size), SMALLEST_SCALE)


# Learnable activation quantizers: first scale in units of mean|x|. BiT: 2 or 4; LSQ: 2 / sqrt(Qp).
LEARNED_ACTIVATIONS = {
    "elastic_signed": 2.0,
    "elastic_unsigned": 4.0,
    "int8": 2 / math.sqrt(127),
    "int4": 2 / math.sqrt(7),
    "int2": 1.0,
}


def _stes(is_sign: bool) -> tuple[str, ...]:
    return tuple(STES) if is_sign else ("identity", "clipped")


# What every quantizer is called with; anything else in its signature is an option.
CALLED_WITH = ("w", "x", "granularity", "ste", "scale", "shift", "progress", "key")


def _check_options(
    what: str, options: tuple[tuple[str, Any], ...], quantizer: Callable[..., Quantized]
) -> None:
    allowed = [name for name in inspect.signature(quantizer).parameters if name not in CALLED_WITH]
    for name, _ in options:
        check_name(what, name, allowed)


def check_name(what: str, got: Any, allowed: Sequence[str], also: str = "") -> None:
    if got not in allowed:
        near = difflib.get_close_matches(str(got), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what}: got {got!r}, expected one of {sorted(allowed)}{also}{hint}")
