"""Records of quantizers: a function together with its properties.

All other code reads the properties of a quantizer from its record. A record is called like its function, and rejects
arguments that the function would ignore.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Array, Float

from bitnet_jax.names import check_name
from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.scales import Granularity, Quantized
from bitnet_jax.quantization.ste import STES

SIGN_STES = tuple(STES)  # every surrogate models the single jump of a sign
ROUNDING_STES = ("identity", "clipped")  # those that are defined for a staircase

PackedFormat = Literal["binary", "ternary2", "int4", "int8", "uint4"]
Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Quantizer:
    """Base class of both kinds of quantizers."""

    function: Callable[..., Quantized]  # (array, arguments, *, options), documented there
    fixed: Options = dataclasses.field(default_factory=dict)  # keyword arguments set by this record
    stes: tuple[str, ...]  # supported STEs
    random: bool = False  # stochastic if given a key

    @property
    def name(self) -> str:
        """The function and its fixed arguments, for error messages."""
        return ", ".join([self.function.__name__, *(f"{name}={value}" for name, value in self.fixed.items())])

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword arguments of the function that are not fixed."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.fixed)

    @property
    def uses(self) -> frozenset[str]:
        """Fields of `Arguments` that have an effect, in addition to `ste` and `progress`."""
        return frozenset({"key"} if self.random else ())

    def check(self, args: Arguments) -> None:
        """Raises ValueError for an argument that the quantizer does not use, or an unsupported STE."""
        given = {
            "granularity": args.granularity != DEFAULT.granularity,
            "scale": args.scale is not None,
            "shift": args.shift is not None,
            "key": args.key is not None,
        }
        for argument, is_given in given.items():
            if is_given and argument not in self.uses:
                raise ValueError(
                    f"{argument}: got one for the quantizer {self.name}, which uses none; leave it out"
                )
        check_name(f"STE of {self.name}", args.ste, self.stes)

    def __call__(self, x: Float[Array, "..."], args: Arguments = DEFAULT, **options: Any) -> Quantized:
        """Codes and scale of x. Raises ValueError as `check` does, and whatever the function raises."""
        self.check(args)
        return self.function(x, args, **self.fixed, **options)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WeightQuantizer(Quantizer):
    """A quantizer of weight matrices [n, k]."""

    bits: float  # bits of information per code
    packed_format: (
        PackedFormat | Callable[[Options], PackedFormat | None]
    )  # of the codes, or a function of the options
    # Initial learned scale: the measured one, or a function of (w, granularity). None: the scale cannot be learned.
    first_scale: Literal["measured"] | Callable[[Array, Granularity], Array] | None = "measured"
    lsq_code: int | None = None  # largest code Qp, if LSQ's initial scale 2 mean|w| / sqrt(Qp) applies
    unit_scale: bool = False  # the scale is 1 unless it is learned

    @property
    def uses(self) -> frozenset[str]:
        measured = set() if self.unit_scale else {"granularity"}
        learned = set() if self.first_scale is None else {"scale"}
        return super().uses | measured | learned

    def packed_format_with(self, options: Options) -> PackedFormat | None:
        """The format that holds all codes possible under these options; None if there is none."""
        return self.packed_format(options) if callable(self.packed_format) else self.packed_format


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ActivationQuantizer(Quantizer):
    """A quantizer of inputs [..., k], one scale per token."""

    bits: float | None  # bits of information per code; None: float, no codes
    first_scale: float | None = None  # initial learned scale / mean|x|; None: cannot be learned
    measures_scale: bool = True  # False: the scale must be learned
    has_threshold: bool = False  # supports a learned threshold per feature
    signs: bool = False  # every code is -1 or 1

    @property
    def uses(self) -> frozenset[str]:
        learned = set() if self.first_scale is None else {"scale"}
        return super().uses | learned | ({"shift"} if self.has_threshold else set())
