"""What there is to know about a quantizer: one record beside its function.

`Precision` and whoever else asks what a quantizer is asks its record. A record is called like its function, and is
the one place that refuses arguments which the function would ignore.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Array, Float

from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.names import check_name
from bitnet_jax.quantization.scales import Granularity, Quantized
from bitnet_jax.quantization.ste import STES

SIGN_STES = tuple(STES)  # a sign has one jump, which every surrogate describes
ROUNDING_STES = ("identity", "clipped")  # the two that mean something for a staircase

PackedFormat = Literal["binary", "ternary2", "int4", "int8"]
Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Quantizer:
    """What holds for quantizers of both kinds."""

    function: Callable[..., Quantized]  # (array, arguments, *, options); its docstring says what it computes
    fixed: Options = dataclasses.field(
        default_factory=dict
    )  # keyword arguments that make the function this one
    stes: tuple[str, ...]  # of its step
    random: bool = False  # draws its codes where it is given a key

    @property
    def name(self) -> str:
        """For errors: how the function is called."""
        return ", ".join([self.function.__name__, *(f"{name}={value}" for name, value in self.fixed.items())])

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword arguments of the function that are left to choose."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.fixed)

    @property
    def uses(self) -> frozenset[str]:
        """The names of `Arguments` that make a difference, beside `ste` and `progress`."""
        return frozenset({"key"} if self.random else ())

    def check(self, args: Arguments) -> None:
        """ValueError: an argument is given that the quantizer does not use, or an STE that its step does not have."""
        given = {
            "granularity": args.granularity != DEFAULT.granularity,
            "scale": args.scale is not None,
            "shift": args.shift is not None,
            "key": args.key is not None,
        }
        for argument, is_given in given.items():
            if is_given and argument not in self.uses:
                raise ValueError(
                    f"{argument}: got one for the quantizer {self.name}, expected none, for it uses none; leave it out"
                )
        check_name(f"STE of {self.name}", args.ste, self.stes)

    def __call__(self, x: Float[Array, "..."], args: Arguments = DEFAULT, **options: Any) -> Quantized:
        """Codes and scale of x. ValueError as in `check`, and what the function itself raises."""
        self.check(args)
        return self.function(x, args, **self.fixed, **options)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WeightQuantizer(Quantizer):
    """A quantizer of weight matrices [n, k]."""

    bits: float  # information per code
    packed_format: (
        PackedFormat | Callable[[Options], PackedFormat | None]
    )  # of the codes; by options if they matter
    # First value of a learned scale: the measured one, or a function of (w, granularity). None: it cannot be learned.
    first_scale: Literal["measured"] | Callable[[Array, Granularity], Array] | None = "measured"
    lsq_code: int | None = (
        None  # the largest code Qp, where LSQ's first scale 2 mean|w| / sqrt(Qp) makes sense
    )
    unit_scale: bool = False  # the scale is 1 unless it is learned

    @property
    def uses(self) -> frozenset[str]:
        measured = set() if self.unit_scale else {"granularity"}
        learned = set() if self.first_scale is None else {"scale"}
        return super().uses | measured | learned

    def packed_format_with(self, options: Options) -> PackedFormat | None:
        """The format that holds every code it has under these options; None: no format does."""
        return self.packed_format(options) if callable(self.packed_format) else self.packed_format


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ActivationQuantizer(Quantizer):
    """A quantizer of inputs [..., k], one scale per token."""

    bits: float | None  # information per code; None: floats, no codes
    first_scale: float | None = None  # of a learned scalar, in units of mean|x|; None: it cannot be learned
    measures_scale: bool = True  # False: there is no scale but a learned one
    has_threshold: bool = False  # one per feature can be learned
    signs: bool = False  # every code is -1 or 1

    @property
    def uses(self) -> frozenset[str]:
        learned = set() if self.first_scale is None else {"scale"}
        return super().uses | learned | ({"shift"} if self.has_threshold else set())
