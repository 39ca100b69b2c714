"""Kernel checks detect every kind of wrong kernel, off by the last bit or raising; correct ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax.tools import kernel_checks
from bitnet_jax.tools.kernel_checks import check_kernels, instruction_set
from bitnet_kernels import cpu, reference

pytestmark = pytest.mark.extended

built = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
FAST = cpu.available_isas()[-1] if cpu.available_isas() else ""

CHECKS = {
    "products": "_products",
    "scaled products": "_scaled_products",
    "attention": "_attention",
    "head": "_heads",
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "SHAPES", ((3, 17, 65, 1),))
    monkeypatch.setattr(kernel_checks, "ATTENTIONS", kernel_checks.ATTENTIONS[1:2])
    monkeypatch.setattr(kernel_checks, "HEADS", ((2, 100, 33),))


def findings() -> dict[str, str]:
    return {check.name: check.detail for check in check_kernels() if not check.passed}


def test_correct_kernels_pass() -> None:
    checks = check_kernels()
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 4 * (1 + len(cpu.available_isas()))


def last_bit(y: jax.Array) -> jax.Array:
    """Changes the first element by one unit in the last place."""
    first = y.reshape(-1)[0]
    return y.reshape(-1).at[0].set(jnp.nextafter(first, jnp.inf)).reshape(y.shape)


def of_one_isa(
    function: Callable[..., Any], spoil: Callable[..., Any], place: str = "isa_name"
) -> Callable[..., Any]:
    """`function`, with a wrong result for the fastest instruction set."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return spoil(result, *args, **kwargs) if kwargs.get(place, args[-1]) == FAST else result

    return wrapped


@built
@pytest.mark.parametrize(
    ("name", "spoil", "kind", "detail"),
    [
        ("integer_matmul", lambda y, *a, **k: y.at[0, 0, 0].add(1), "products", "k=65 groups=1: 1 of 51 differ"),
        (
            "scaled_matmuls",
            lambda ys, *a, **k: [last_bit(y) for y in ys] if k["activation_bits"] == 1 else ys,
            "scaled products",
            "signs times binary m=3 n=17 k=65 groups=1: 1 of 51 differ",
        ),
        (
            "scaled_matmuls",
            lambda ys, x, *a, **k: [last_bit(y) for y in ys] if x.dtype == jnp.float32 else ys,
            "scaled products",
            "floats in 8 bits times binary",
        ),
        (
            "attention",
            lambda call, *a, **k: lambda *arrays: last_bit(call(*arrays)),
            "attention",
            "with the scalar loops: 1 of 720 differ",
        ),
        ("bfloat16_logits", lambda y, *a, **k: last_bit(y), "head", "with the scalar loops: 1 of 200 differ"),
        (
            "exact_top_logits",
            lambda found, *a, **k: (jnp.full_like(found[0], -jnp.inf).at[:, 0].set(found[0][:, 0]), found[1]),
            "head",
            "of the 3 largest logits are missing",
        ),
        (
            "exact_top_logits",
            lambda found, *a, **k: (jnp.where(jnp.isneginf(found[0]), found[0], found[0] + 1), found[1]),
            "head",
            "exact head m=2 n=100 k=33",
        ),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_detected(
    name: str, spoil: Callable[..., Any], kind: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compilation is most of the time: the other kinds do not call this function.
    for other in CHECKS.keys() - {kind}:
        monkeypatch.setattr(kernel_checks, CHECKS[other], lambda isa: "not checked")
    monkeypatch.setattr(cpu, name, of_one_isa(getattr(cpu, name), spoil))
    found = findings()
    assert list(found) == [f"{kind}, cpu ({FAST})"]
    assert detail in found[f"{kind}, cpu ({FAST})"]


def test_a_wrong_reference_definition_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def softer(*args: Any, **kwargs: Any) -> jax.Array:
        return kernel_checks_attention(*args, **kwargs) * 1.001

    kernel_checks_attention = kernel_checks.reference_attention
    monkeypatch.setattr(kernel_checks, "reference_attention", softer)
    monkeypatch.setattr(
        kernel_checks, "bfloat16_logits", lambda x, table, **_: x @ table.astype(jnp.float32).T + 1e-3
    )
    monkeypatch.setattr(
        reference, "scaled_matmuls", lambda x, ws: [jnp.zeros((len(x), w.shape[0])) for w in ws]
    )
    found = findings()
    assert list(found) == ["scaled products, reference", "attention, reference", "head, reference"]
    assert "off by" in found["attention, reference"]
    assert "exceed the rounding error bound" in found["head, reference"]


@built
def test_an_exception_is_reported_as_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(cpu, "integer_matmul", raises)
    monkeypatch.setattr(cpu, "available_isas", lambda: ("scalar",))
    found = findings()
    assert found["products, cpu (scalar)"] == "RuntimeError: illegal instruction"


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx2")
    with instruction_set("scalar"), instruction_set(None):
        assert kernel_checks.os.environ[cpu.ISA_VARIABLE] == "scalar"
    assert kernel_checks.os.environ[cpu.ISA_VARIABLE] == "avx2"
