"""The output head of a language model: logits from a bfloat16 table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu
from bitnet_kernels.dtypes import FLOATS

IMPLEMENTATIONS = ("cpu", "reference")


def bfloat16_logits(x: jax.Array, table: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x float [..., k] times the transpose of a bfloat16 table [n, k] -> float32 [..., n].

    x and weights are converted to float32; only the sums are rounded. "cpu", the C++ kernel, sums in a fixed order
    (kernels/csrc/head.h): a logit is bit-identical across instruction sets, thread counts and other rows of x and of
    the table. "reference" is XLA's float32 product, with XLA's order of summation. Both are within
    n_k * 2^-24 * sum |x_i w_i| of the exact sum, where n_k is the number of additions a product goes through: at most
    k, in the kernel k / 16 + 4.

    implementation=None selects "cpu" when compiling for CPU with the library present, else "reference", with a
    warning on CPU. Works under jit, vmap and grad; only x gets a gradient, dx = dy @ table.

    Raises:
      ValueError: inconsistent shapes or dtypes, an unknown implementation.
      NotImplementedError: the named implementation cannot be used here.
    """
    x = jnp.asarray(x)
    check_operands(x, table)
    isa = choose_isa(implementation)
    y = _logits(implementation, isa, x.astype(jnp.float32).reshape(-1, x.shape[-1]), table)
    return y.reshape(*x.shape[:-1], table.shape[0])


def check_operands(x: jax.Array, table: jax.Array) -> None:
    """Raises ValueError unless x is float [..., k] and table bfloat16 [n, k]."""
    if table.dtype != jnp.bfloat16 or table.ndim != 2 or min(table.shape) < 1:
        raise ValueError(f"table is {table.dtype}{list(table.shape)}; expected bfloat16[n, k], n, k >= 1")
    if x.dtype.name not in FLOATS or x.ndim < 1 or x.shape[-1] != table.shape[1]:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}; expected {', '.join(FLOATS)} [..., {table.shape[1]}]"
        )


def choose_isa(implementation: str | None) -> str | None:
    """The instruction set of the C++ kernels, or None for the reference; see bfloat16_logits."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}; expected None or one of {IMPLEMENTATIONS}")
    return cpu.resolve("the output head", implementation, cpu.unavailable())[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logits(implementation: str | None, isa: str | None, x: jax.Array, table: jax.Array) -> jax.Array:
    if isa is None:
        return _reference(x, table)
    by_cpu = functools.partial(cpu.bfloat16_logits, isa_name=isa)
    default = {"default": _reference} if implementation is None else {}
    return jax.lax.platform_dependent(x, table, cpu=by_cpu, **default)


def _reference(x: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("mk,nk->mn", x, table.astype(jnp.float32), precision="highest")


def _forward(
    implementation: str | None, isa: str | None, x: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _logits(implementation, isa, x, table), table


def _backward(
    implementation: str | None, isa: str | None, table: jax.Array, dy: jax.Array
) -> tuple[jax.Array, None]:
    return jnp.einsum("mn,nk->mk", dy, table.astype(jnp.float32), precision="highest"), None


_logits.defvjp(_forward, _backward)
