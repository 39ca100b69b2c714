"""Precision: the quantizers of one linear layer, as a value.

In training, a layer with `p: Precision` computes

    wq = p.quantize_weight(w, scale=learned or None, progress=..., key=...)
    xq = p.quantize_activation(x, scale=learned or None, shift=learned or None, progress=..., key=...)
    y = (xq.codes @ wq.codes.T) * wq.scale * xq.scale        (x @ w.T where p.quantizes_weights is False;
                                                              + sum(xq.codes) * wq.minimum * xq.scale if there is one)

in the warm-up, if there is one, with amount = warm_up(progress, p.warmup) below 1,

    y = blend(x, xq.dequantize(), amount) @ blend(w, wq.dequantize(), amount).T

and creates its extra parameters, all float32, from

    p.weight_scale_init(w)        -> initial learned weight scale [#n, G], or None if it has none
    p.activation_param_shapes(k)  -> {"activation_scale": ((), 1.6), "activation_shift": ((k,), 0.0)}, only
                                     the entries that exist; initial values assume unit-variance inputs
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bitnet_jax.names import check_name
from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.input_transforms import TOP_K_STES, hadamard, top_k
from bitnet_jax.quantization.records import (
    ROUNDING_STES,
    ActivationQuantizer,
    PackedFormat,
    WeightQuantizer,
)
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bitnet_jax.quantization.scales import (
    SMALLEST_SCALE,
    Granularity,
    Quantized,
    float16_values,
    measure,
)
from bitnet_jax.quantization.ste import ANNEALED, Progress
from bitnet_jax.quantization.warmup import check_share

Options = Mapping[str, Any] | tuple[tuple[str, Any], ...]
OPTION_FIELDS = ("weight_options", "activation_options")
UNIT_NORMAL_MEAN = math.sqrt(2 / math.pi)  # mean |x| of a standard normal input


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Quantization of the weights and input of one linear layer. Hashable; `dataclasses.asdict` gives JSON."""

    # quantizers
    weight: str = "float"  # "float" or a name in WEIGHT_QUANTIZERS
    activation: str = "none"  # a name in ACTIVATION_QUANTIZERS
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the product, for weight="float" only
    # surrogate gradients
    weight_ste: str = "identity"
    activation_ste: str = "identity"
    latent_clip: float | None = None  # the optimizer clips latents to [-c, c] after each update
    # share of training in which weights and input pass from float to quantized, see warmup.py; 0: quantized throughout
    warmup: float = 0.0
    # scales
    scale: Literal["analytic", "learned", "none"] = "analytic"
    scale_init: Literal["analytic", "lsq"] = "analytic"  # of a learned one: lsq is 2 mean|w| / sqrt(Qp)
    granularity: Granularity = "tensor"  # "tensor", "channel", or inputs per scale
    scale_dtype: Literal["float32", "float16"] = (
        "float32"  # measured scales and minima are rounded to it and stored so
    )
    activation_scale: Literal["analytic", "learned"] = "analytic"
    activation_shift: bool = False  # learned threshold per input feature
    # around the activation quantizer: BitNet v2, a4.8
    hadamard: bool | Literal["block"] = False  # rotate the input; "block": any width, not only powers of two
    top_k: float = 1.0  # fraction of inputs kept per token (a4.8, Q-Sparse)
    top_k_ste: Literal["identity", "masked"] = "identity"  # masked: no gradient to dropped inputs
    # details on which papers differ: keyword arguments of the two quantizers, stored as sorted (name, value) pairs
    weight_options: Options = ()
    activation_options: Options = ()

    def __post_init__(self) -> None:
        for field in OPTION_FIELDS:
            object.__setattr__(self, field, _pairs(getattr(self, field)))
        check_name("weight", self.weight, ("float", *WEIGHT_QUANTIZERS))
        check_name("activation", self.activation, ACTIVATION_QUANTIZERS)
        check_name("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        check_name("scale", self.scale, ("analytic", "learned", "none"))
        check_name("scale_init", self.scale_init, ("analytic", "lsq"))
        check_name("scale_dtype", self.scale_dtype, ("float32", "float16"))
        check_name("activation_scale", self.activation_scale, ("analytic", "learned"))
        size = self.granularity
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            check_name("granularity", size, ("tensor", "channel"), " or a positive group size")
        if self.hadamard not in (False, True, "block"):
            raise ValueError(f"hadamard: got {self.hadamard!r}, expected False, True or 'block'")
        if not 0 < self.top_k <= 1:
            raise ValueError(f"top_k: got {self.top_k}, expected a fraction in (0, 1]")
        check_name("top_k_ste", self.top_k_ste, TOP_K_STES)
        check_share("warmup", self.warmup)
        if self.warmup and (not self.quantizes_weights or self.hadamard or self.top_k < 1):
            raise ValueError(
                f"warmup: got {self.warmup} with weight={self.weight!r}, hadamard={self.hadamard}, top_k={self.top_k}, "
                "expected a quantizer of weights and an input that is neither rotated nor thinned out, or warmup=0"
            )
        self._check_weight()
        self._check_activation()

    def _check_weight(self) -> None:
        quantizer = self.weight_quantizer
        check_name("weight_ste", self.weight_ste, quantizer.stes if quantizer else ROUNDING_STES)
        if quantizer is None:
            if self.activation != "none":
                raise ValueError(
                    f"activation: got {self.activation!r} with weight='float', expected 'none'; "
                    "choose a weight quantizer"
                )
            if self.weight_options:
                raise ValueError(
                    f"weight_options: got {self.weight_options} with weight='float', expected none"
                )
        else:
            for name in dict(self.weight_options):
                check_name("weight_options", name, quantizer.options)
            if "granularity" not in quantizer.uses and self.granularity != "tensor":
                raise ValueError(
                    f"granularity: got {self.granularity!r} with weight={self.weight!r}, whose scale is 1, "
                    "expected 'tensor'"
                )
        if self.scale != "analytic" and quantizer is not None:
            scaled = [name for name, record in WEIGHT_QUANTIZERS.items() if "scale" in record.uses]
            check_name(f"weight with scale={self.scale!r}", self.weight, scaled)
        if self.scale_dtype != "float32" and (quantizer is None or self.scale != "analytic"):
            raise ValueError(
                f"scale_dtype: got {self.scale_dtype!r} with weight={self.weight!r}, scale={self.scale!r}, expected "
                "'float32'; only measured scales are rounded, learned ones are parameters in float32"
            )
        if self.scale_init == "lsq":
            by_lsq = [name for name, record in WEIGHT_QUANTIZERS.items() if record.lsq_code]
            check_name("weight with scale_init='lsq'", self.weight, by_lsq)

    def _check_activation(self) -> None:
        quantizer = self.activation_quantizer
        check_name("activation_ste", self.activation_ste, quantizer.stes)
        for name in dict(self.activation_options):
            check_name("activation_options", name, quantizer.options)
        if not quantizer.measures_scale and self.activation_scale != "learned":
            raise ValueError(
                f"activation={self.activation!r} needs activation_scale='learned', got 'analytic'"
            )
        if self.activation_scale == "learned":
            scaled = [name for name, record in ACTIVATION_QUANTIZERS.items() if "scale" in record.uses]
            check_name("activation with activation_scale='learned'", self.activation, scaled)
        if self.activation_shift:
            shifted = [name for name, record in ACTIVATION_QUANTIZERS.items() if "shift" in record.uses]
            check_name("activation with activation_shift=True", self.activation, shifted)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Precision:
        """The inverse of dataclasses.asdict, also after a JSON round trip. ValueError for an unknown field."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            check_name("Precision field", name, names)
        pairs = {field: _pairs(values[field]) for field in OPTION_FIELDS if field in values}
        return cls(**{**values, **pairs})

    @property
    def weight_quantizer(self) -> WeightQuantizer | None:
        """The record of the weight quantizer; None for float weights."""
        return WEIGHT_QUANTIZERS[self.weight] if self.quantizes_weights else None

    @property
    def activation_quantizer(self) -> ActivationQuantizer:
        """The record of the activation quantizer."""
        return ACTIVATION_QUANTIZERS[self.activation]

    @property
    def quantizes_weights(self) -> bool:
        return self.weight != "float"

    @property
    def packed_format(self) -> PackedFormat | None:
        """The packed format of the weight codes, independent of activations; None if there is none."""
        quantizer = self.weight_quantizer
        return None if quantizer is None else quantizer.packed_format_with(dict(self.weight_options))

    @property
    def codes_fit_int8(self) -> bool:
        """True if weights and input both have integer codes in [-128, 127], or digits of such codes."""
        return self.activation != "none" and self.packed_format is not None

    @property
    def input_digits(self) -> int:
        """How many int8 digits a code of the input has: 2 for int16, else 1."""
        return 2 if self.activation == "int16" else 1

    @property
    def absmax_bits(self) -> int | None:
        """8 or 16 if the input is quantized by plain per-token absmax, which packed_matmul does itself; else None."""
        if not self.quantizes_weights or self.activation not in ("int8", "int16"):
            return None
        plain = Precision(weight=self.weight, activation=self.activation)
        fields = ("activation_scale", "hadamard", "top_k", "activation_options")
        return 8 * self.input_digits if all(getattr(self, f) == getattr(plain, f) for f in fields) else None

    @property
    def input_is_signs(self) -> bool:
        """True if every code of the input is -1 or 1."""
        return self.activation_quantizer.signs and self.top_k == 1

    @property
    def weight_bits(self) -> float:
        """Bits of information per weight: 1, log2(3), ..., without scales."""
        quantizer = self.weight_quantizer
        return self._float_bits if quantizer is None else quantizer.bits

    @property
    def activation_bits(self) -> float:
        bits = self.activation_quantizer.bits
        return self._float_bits if bits is None else bits

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
        """Codes and scale of latent weights, and their minimum if the quantizer has one.

        Codes follow from the float32 scale, which scale_dtype="float16" rounds afterwards; what exceeds float16 is
        infinite.

        Args:
          scale: the learned scale; required if and only if the scale is learned.
          key: for a stochastic quantizer; None gives its deterministic codes.
        Raises:
          ValueError: an argument is missing, or given but unused.
        """
        quantizer = self.weight_quantizer
        if quantizer is None:
            raise ValueError("weight='float' has no codes; check quantizes_weights first")
        _check_given(f"scale={self.scale!r}", "learned scale", scale, self.scale == "learned")
        if self.scale == "none":
            scale = jnp.ones((1, 1), jnp.float32)
        args = Arguments(
            granularity=self.granularity, ste=self.weight_ste, scale=scale, progress=progress, key=key
        )
        quantized = quantizer(w, args, **dict(self.weight_options))
        if self.scale_dtype == "float32":
            return quantized
        minimum = None if quantized.minimum is None else float16_values(quantized.minimum)
        return quantized._replace(scale=float16_values(quantized.scale), minimum=minimum)

    def quantize_activation(
        self,
        x: Float[Array, "... k"],
        scale: Float[Array, ""] | None = None,
        shift: Float[Array, "k"] | None = None,
        progress: Progress = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> Quantized:
        """Codes and scale of an input: rotate, quantize, keep the codes of the top_k largest |x| per token.

        Args:
          scale, shift: learned scale and threshold; required if and only if they are learned.
          key: for a stochastic quantizer; None gives its deterministic codes.
        Raises:
          ValueError: an argument is missing, or given but unused.
        """
        learned = self.activation_scale == "learned"
        _check_given(f"activation_scale={self.activation_scale!r}", "learned scale", scale, learned)
        _check_given(
            f"activation_shift={self.activation_shift}", "learned shift", shift, self.activation_shift
        )
        x = x.astype(jnp.float32)
        if self.hadamard:
            x = hadamard(x, block=self.hadamard == "block")
        args = Arguments(ste=self.activation_ste, scale=scale, shift=shift, progress=progress, key=key)
        quantized = self.activation_quantizer(x, args, **dict(self.activation_options))
        if self.top_k < 1:
            quantized = quantized._replace(codes=top_k(quantized.codes, self.top_k, by=x, ste=self.top_k_ste))
        return quantized

    def weight_scale_init(self, w: Float[Array, "n k"]) -> Float[Array, "#n G"] | None:
        """Initial value of the learned weight scale for latents w; None if the scale is not learned."""
        quantizer = self.weight_quantizer
        if self.scale != "learned" or quantizer is None:
            return None
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        if self.scale_init == "lsq" and quantizer.lsq_code:
            size = measure(jnp.mean, jnp.abs(w), self.granularity) * (2 / math.sqrt(quantizer.lsq_code))
        elif callable(quantizer.first_scale):
            size = quantizer.first_scale(w, self.granularity)
        else:
            size = dataclasses.replace(self, scale="analytic").quantize_weight(w).scale
        return jnp.maximum(size, SMALLEST_SCALE)

    def activation_param_shapes(self, k: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """Learned activation parameters of a layer with k inputs: name -> (shape, initial value)."""
        declared: dict[str, tuple[tuple[int, ...], float]] = {}
        first_scale = self.activation_quantizer.first_scale
        if self.activation_scale == "learned" and first_scale is not None:
            declared["activation_scale"] = ((), first_scale * UNIT_NORMAL_MEAN)
        if self.activation_shift:
            declared["activation_shift"] = ((k,), 0.0)
        return declared


def _pairs(options: Mapping[str, Any] | Iterable[Iterable[Any]]) -> tuple[tuple[str, Any], ...]:
    """Options as sorted (name, value) pairs, from a mapping or from pairs, which are lists in JSON."""
    pairs: Iterable[Iterable[Any]] = options.items() if isinstance(options, Mapping) else options
    return tuple(sorted((str(name), option) for name, option in pairs))


def _check_given(setting: str, what: str, value: Array | None, expected: bool) -> None:
    if (value is not None) != expected:
        got, wanted = ("no", "one") if expected else ("a", "none")
        raise ValueError(f"{setting}: got {got} {what}, expected {wanted}")


def annealed(precisions: Iterable[Precision]) -> list[str]:
    """What depends on the total number of updates in these layers: gradient estimators and warm-ups, in words."""
    precisions = list(precisions)
    stes = {ste for p in precisions for ste in (p.weight_ste, p.activation_ste)} & ANNEALED
    shares = {p.warmup for p in precisions} - {0.0}
    return [f"the gradient {ste!r}" for ste in sorted(stes)] + [f"warmup={share}" for share in sorted(shares)]
