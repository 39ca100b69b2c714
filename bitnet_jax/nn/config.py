"""Model configuration as a frozen dataclass, shared by all modules built from it.

`Architecture` is the interface that packing, training and statistics need from any model; `TransformerShape` holds
the fields that the modules of this package need. models.ModelConfig adds the module that is built from it.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bitnet_jax.names import check_name
from bitnet_jax.nn.rope_scaling import RopeScaling
from bitnet_jax.nn.tables import HEADS, INTEGER_TABLES, head_precision, table_precision
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import Recipe, Rules, resolve
from bitnet_jax.quantization.warmup import check_share

GATED_MLPS = ("silu_glu", "relu2_glu")
FLOAT32_MAX = 3.4028234e38  # settings enter float32 computations

# Upper bound of all integer settings: JAX indexes in int32. Layers are Python objects traced one by one, so their
# bound is lower; the deepest published Transformers have about a thousand.
LARGEST = 2**31 - 1
MAX_LAYERS = {"num_layers": 4096, "convolutions": 4096}

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("sub", "pre", "inside", "post"),
    "mlp": ("relu", "relu2", "gelu", "gelu_erf", *GATED_MLPS),
    "attention": ("softmax", "relu", "linear", "binary_qk", "binary"),
    "position": ("rope", "learned", "none"),
    "pooling": ("none", "mean"),
    "attention_bias": ("none", "qkv", "qkvo"),
    "embedding_dtype": ("float32", "bfloat16", *INTEGER_TABLES),
    "head": HEADS,
    "ternary_format": ("ternary2", "ternary5"),
    "dtype": ("float32", "bfloat16"),
    "product": ("float", "int8", "int8_gradients"),
}


def _recipe(recipe: Recipe) -> str | Precision:
    return Precision.from_dict(recipe) if isinstance(recipe, Mapping) else recipe


def _check_int8(precisions: Mapping[str, Precision], product: str) -> None:
    for path, precision in precisions.items():
        if precision.quantizes_weights and not precision.codes_fit_int8:
            raise ValueError(
                f"model.product={product!r}: {path} has weight={precision.weight!r}, "
                f"activation={precision.activation!r}, which do not both have codes in [-128, 127]; "
                "choose another recipe for it, or product='float'"
            )


def hashable(rules: Rules) -> Rules:
    """Converts JSON lists and mappings to tuples and Precisions: a config is a static argument of jit."""
    if isinstance(rules, str | Precision | Mapping):
        return _recipe(rules)
    return tuple((pattern, _recipe(recipe)) for pattern, recipe in rules)


# Not typing.Self, which beartype, the checker of the tests, does not support in a decorated method.
Config = TypeVar("Config", bound="Architecture")


class Architecture:
    """Base class of model configs: frozen dataclasses with the fields `precision` and `ternary_format`.

    A custom model subclasses it and defines `linear_shapes` and `module`, and `example_input` unless its input is
    token ids.
    """

    precision: Rules
    ternary_format: str

    def module(self) -> nn.Module:
        """The module of this config; its output has a field `logits`."""
        raise NotImplementedError

    def example_input(self) -> Array:
        """A minimal input of zeros for `module`, used to initialize parameters."""
        return jnp.zeros((1, 1), jnp.int32)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Path of every linear layer -> (outputs, inputs), in the order of the forward pass."""
        raise NotImplementedError

    def rules(self) -> Rules:
        """The rules that `resolve` turns into a Precision per path."""
        return self.precision

    def precisions(self) -> dict[str, Precision]:
        """Path of every linear layer -> its Precision.

        Raises:
          ValueError: an unknown recipe, a path no rule matches, or a rule that matches no path.
        """
        return resolve(self.rules(), list(self.linear_shapes()))

    def packed_formats(self) -> dict[str, str]:
        """Path of every packed linear layer -> the format of its codes."""
        formats = {path: precision.packed_format for path, precision in self.precisions().items()}
        return {
            path: self.ternary_format if format == "ternary2" else format
            for path, format in formats.items()
            if format is not None
        }

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass

    @classmethod
    def from_dict(cls: type[Config], fields: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`.

        Raises:
          ValueError: an unknown or missing field (the message names the nearest valid one).
        """
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in fields:
            check_name("field of model", name, known)
        required = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
        if required:
            raise ValueError(f"model is missing {', '.join(required)}; got {', '.join(fields) or 'nothing'}")
        return cls(**fields)

    def _check(self, choices: Mapping[str, tuple[str, ...]], positive: tuple[str, ...]) -> None:
        """Raises ValueError for a field of the wrong type, not among its `choices`, or not a `positive` integer."""
        for name, expected in _plain_types(cast(Any, type(self))).items():
            if not _is_a(value := getattr(self, name), expected):
                wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in expected)
                finite = "a finite " if float in expected else ""
                raise ValueError(f"model.{name}: got {repr(value)[:60]}, expected {finite}{wanted}")
        for name, allowed in choices.items():
            check_name(f"model.{name}", getattr(self, name), allowed)
        for name in positive:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"model.{name}: got {value!r}, expected a positive integer")
            if value > (most := MAX_LAYERS.get(name, LARGEST)):
                raise ValueError(f"model.{name}: got {value}, expected at most {most}")


@functools.cache
def _plain_types(kind: Any) -> dict[str, tuple[type, ...]]:
    """Field -> its types, for the fields that hold a number, string, boolean or None."""
    hints = {name: typing.get_args(hint) or (hint,) for name, hint in typing.get_type_hints(kind).items()}
    plain = {int, float, str, bool, type(None)}
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(kind)
        if plain.issuperset(hints[field.name])
    }


def _is_a(value: Any, expected: tuple[type, ...]) -> bool:
    if isinstance(value, float):
        return float in expected and abs(value) <= FLOAT32_MAX  # False for NaN and infinity
    return type(value) in expected or (type(value) is int and float in expected)


def override_ends(precision: Rules, *ends: tuple[str, Recipe]) -> Rules:
    """Rules with separate recipes for the first and last layers: `ends` are (path, recipe) pairs.

    Keeping both in float helps more than any estimator (larq's BinaryNet on CIFAR-10: 83.9 against 66.5).
    """
    if isinstance(precision, str | Precision | Mapping):
        precision = (("*", precision),)
    return (*ends, *precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerShape(Architecture):
    """A decoder language model, an encoder classifier when `num_classes` > 0, or an encoder of texts with `pooling`.

    Raises:
      ValueError: an unknown choice, or inconsistent sizes.
    """

    vocab_size: int
    hidden_size: int  # D
    num_layers: int
    num_heads: int  # H
    ffn_size: int  # F
    max_length: int  # maximum sequence length in positions
    # Tokens per training sequence; None: unknown, as for most third-party models. Nothing is computed from it, so
    # configs that differ only in it compare equal and share compiled programs.
    trained_length: int | None = dataclasses.field(default=None, compare=False)
    num_kv_heads: int | None = None  # K; None: num_heads
    head_dim: int | None = None  # h; None: hidden_size // num_heads

    causal: bool = True
    num_classes: int = 0  # 0: language model; > 0: masked mean of the hidden states, then a linear head
    pooling: str = "none"  # mean: the output is the masked mean of the hidden states, scaled to length 1

    attention: str = "softmax"
    attention_scale: float | None = None  # factor on q.k; None: head_dim ** -0.5
    kv_bits: int | None = (
        None  # quantize keys and values to 2-8 bits per token and head; None: no quantization
    )
    position: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None  # changed frequencies, for texts longer than at first trained on
    # Indices of the layers without rotary positions (SmolLM3); stored as a tuple.
    no_rope_layers: tuple[int, ...] | list[int] = ()
    qk_norm: bool = False  # normalize q and k per head, before the rotary embedding (Qwen3)
    sliding_window: int | None = (
        None  # a token attends to itself and the sliding_window - 1 before it; None: to all
    )

    mlp: str = "relu2_glu"
    use_bias: bool = (
        False  # on every projection of the blocks, or only on those that the next two fields name
    )
    attention_bias: str = "none"
    mlp_bias: bool = False
    dropout: float = 0.0

    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_scale: bool = True  # gains on the block norms and sub norms
    norm_bias: bool = False  # on the block norms of norm="layernorm"
    # Papers' variants: sub = B (2B-4T), pre = C (TriLM), inside = A (BitNet b1), post = after the residual sum (BERT).
    norm_placement: str = "sub"
    sub_norm_warmup: float = 0.0  # share of training in which sub norms are blended in, see nn/norms.py
    inside_norm: bool = False  # an extra RMSNorm with gain before each projection (HF `use_rms_norm`)
    inside_norm_eps: float = 1e-6

    tie_embeddings: bool = True
    head: str = "float"  # output head: the table as stored, or its integer codes times int8 activations
    # Of embeddings (and head) in the forward pass and in packed models; integers have one scale per 32 inputs.
    embedding_dtype: str = "float32"
    init_std: float = 0.02

    precision: Rules = "bitnet_b158"  # a recipe name, or ordered (path pattern, recipe) rules
    ternary_format: str = (
        "ternary2"  # of packed ternary codes: ternary2 (2 bits each) or ternary5 (5 codes per byte)
    )
    dtype: str = "float32"  # compute dtype of the residual stream and of float matmuls
    product: str = "float"  # of codes in training, see nn/products.py; float layers stay float
    # True: recompute each block in the backward pass, which is less memory and a third more work. "codes": but keep the
    # int8 codes and scales of the inputs of its linear layers, a byte per input, where it quantizes them.
    remat: bool | str = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "max_length")
        self._check(_CHOICES, sizes if self.trained_length is None else (*sizes, "trained_length"))
        self._check_ranges()
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "change one of them or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}"
            )
        if self.kv_bits is not None and self.kv_bits not in range(2, 9):
            raise ValueError(f"model.kv_bits: got {self.kv_bits!r}, expected None or 2 to 8")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(
                f"model.head_dim={self.head_size} is odd; rotary positions need an even head_dim"
            )
        if self.head != "float" and (self.num_classes or not self.causal):
            raise ValueError(
                f"model.head: got {self.head!r} with causal={self.causal}, num_classes={self.num_classes}; "
                "expected a causal language model, or head='float'"
            )
        if self.pooling != "none" and (self.num_classes or self.causal):
            raise ValueError(
                f"model.pooling: got {self.pooling!r} with causal={self.causal}, num_classes={self.num_classes}; "
                "expected an encoder (causal=False) without classes, or pooling='none'"
            )
        if self.norm_bias and self.norm != "layernorm":
            raise ValueError(f"model.norm_bias: got true with norm={self.norm!r}, expected norm='layernorm'")
        check_share("model.sub_norm_warmup", self.sub_norm_warmup)
        if self.sub_norm_warmup and self.norm_placement != "sub":
            raise ValueError(
                f"model.sub_norm_warmup: got {self.sub_norm_warmup} with norm_placement={self.norm_placement!r}, "
                "expected 'sub'"
            )
        self._check_rotary()
        if isinstance(self.remat, str):
            check_name("model.remat", self.remat, ("codes",), also=", true or false")
        if self.sliding_window is not None and (not self.causal or self.attention == "linear"):
            raise ValueError(
                f"model.sliding_window: got {self.sliding_window} with causal={self.causal}, "
                f"attention={self.attention!r}; expected causal attention of another kind than linear, or None"
            )
        if self.head != "float" and self.embedding_dtype in INTEGER_TABLES:
            raise ValueError(
                f"model.head: got {self.head!r} with embedding_dtype={self.embedding_dtype!r}, expected head='float': "
                "the head multiplies with the integers of the table"
            )
        object.__setattr__(self, "precision", hashable(self.precision))
        precisions = self.precisions()
        if self.product != "float":
            _check_int8(precisions, self.product)
        if self.remat == "codes" and not any(p.codes_fit_int8 for p in precisions.values()):
            raise ValueError(
                "model.remat: got 'codes' with a precision that quantizes no input of a linear layer to int8, "
                "expected true or false"
            )
        if self.remat == "codes" and any(p.warmup for p in precisions.values()):
            raise ValueError("model.remat: got 'codes' with a precision with warmup, expected true or false")

    def _check_rotary(self) -> None:
        layers = self.no_rope_layers
        if not isinstance(layers, list | tuple) or not all(
            type(i) is int and 0 <= i < self.num_layers for i in layers
        ):
            raise ValueError(
                f"model.no_rope_layers: got {str(layers)[:60]}, expected indices from 0 to {self.num_layers - 1}"
            )
        object.__setattr__(self, "no_rope_layers", tuple(sorted(set(layers))))
        if layers and self.position != "rope":
            raise ValueError(
                f"model.no_rope_layers: got {str(layers)[:60]} with position={self.position!r}, expected "
                "position='rope'"
            )
        scaling = self.rope_scaling
        if isinstance(scaling, Mapping):
            scaling = RopeScaling.from_dict(scaling)
            object.__setattr__(self, "rope_scaling", scaling)
        if scaling is None:
            return
        if not isinstance(scaling, RopeScaling):
            raise ValueError(f"model.rope_scaling: got {str(scaling)[:60]!r}, expected None or a RopeScaling")
        if self.position != "rope" or self.rope_theta <= 1:
            raise ValueError(
                f"model.rope_scaling: got position={self.position!r}, rope_theta={self.rope_theta}, expected "
                "position='rope' with a rope_theta above 1"
            )

    def _check_ranges(self) -> None:
        expected = {
            "num_kv_heads": (
                self.num_kv_heads is None or self.num_kv_heads >= 1,
                "None or a positive integer",
            ),
            "head_dim": (self.head_dim is None or self.head_dim >= 1, "None or a positive integer"),
            "num_classes": (self.num_classes >= 0, "0 or more"),
            "sliding_window": (
                self.sliding_window is None or 1 <= self.sliding_window <= LARGEST,
                "None or a positive integer",
            ),
            "rope_theta": (self.rope_theta > 0, "a positive number"),
            "norm_eps": (self.norm_eps > 0, "a positive number"),
            "inside_norm_eps": (self.inside_norm_eps > 0, "a positive number"),
            "dropout": (0 <= self.dropout < 1, "a number from 0 to below 1"),
            "init_std": (self.init_std >= 0, "0 or more"),
        }
        for name, (holds, range_) in expected.items():
            if not holds:
                raise ValueError(f"model.{name}: got {getattr(self, name)!r}, expected {range_}")

    @property
    def known_length(self) -> int:
        """Longest sequence in tokens that the model was trained on; max_length if unknown."""
        return min(self.trained_length or self.max_length, self.max_length)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def score_scale(self) -> float:
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def head_product(self) -> str:
        """The product of an integer output head. Its gradient stays float: a softmax gradient has one large entry,
        relative to which int8 would round most others to 0."""
        return "int8" if self.product == "int8_gradients" else self.product

    @property
    def biased(self) -> tuple[str, ...]:
        """The projections of a block that have a bias."""
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        if self.use_bias:
            return (*attention, *self.mlp_linears)
        count = {"none": 0, "qkv": 3, "qkvo": 4}[self.attention_bias]
        return (*attention[:count], *(self.mlp_linears if self.mlp_bias else ()))

    @property
    def mlp_linears(self) -> tuple[str, ...]:
        return ("gate_proj", "up_proj", "down_proj") if self.mlp in GATED_MLPS else ("up_proj", "down_proj")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        D, F = self.hidden_size, self.ffn_size
        q, kv = self.num_heads * self.head_size, self.kv_heads * self.head_size
        attention = {"q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q)}
        mlp = {name: ((D, F) if name == "down_proj" else (F, D)) for name in self.mlp_linears}
        shapes: dict[str, tuple[int, int]] = {}
        for i in range(self.num_layers):
            shapes |= {f"layers_{i}/attention/{name}": shape for name, shape in attention.items()}
            shapes |= {f"layers_{i}/mlp/{name}": shape for name, shape in mlp.items()}
        if self.num_classes:
            shapes["classifier"] = (self.num_classes, D)
        elif self.pooling == "none" and (not self.tie_embeddings or self.head != "float"):
            shapes["lm_head"] = (self.vocab_size, D)
        return shapes

    @property
    def head_is_table(self) -> bool:
        """Whether logits are products with the embedding table as it is stored."""
        return self.pooling == "none" and not self.num_classes and "lm_head" not in self.linear_shapes()

    def precisions(self) -> dict[str, Precision]:
        """Path of every linear layer -> its Precision. A head other than "float" has the path "lm_head", tied or not.

        Raises:
          ValueError: an unknown recipe, a path no rule matches, a rule that matches no path, a rule for lm_head in
            addition to `head`, or a hidden_size that `head` cannot divide into groups.
        """
        paths = [path for path in self.linear_shapes() if path != "lm_head" or not self.tie_embeddings]
        precisions = resolve(self.rules(), paths)
        table = table_precision(self.embedding_dtype, self.hidden_size)
        if table is not None and precisions.get("lm_head") == Precision():
            return precisions | {"lm_head": table}
        if self.head == "float":
            return precisions
        if precisions.get("lm_head", Precision()) != Precision():
            raise ValueError(
                f"model.head={self.head!r} and a precision rule for lm_head; expected only one of the two"
            )
        return precisions | {"lm_head": head_precision(self.head, self.hidden_size)}
