"""PackedArray: its invariants, violated one at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import FORMATS, PackedArray, dequantize, pack, packed_matmul, validate


def with_byte(w: PackedArray, index: tuple[int, int, int], value: int) -> PackedArray:
    return dataclasses.replace(w, codes=w.codes.at[index].set(jnp.uint8(value)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (37, 100, 1), (16, 64, 2), (33, 96, 3)])
def test_a_packed_matrix_is_valid(make_packed, format: str, n: int, k: int, groups: int) -> None:
    _, w = make_packed(format, n, k, groups)
    validate(w)
    assert (w.groups, w.group_size) == (groups, k // groups)
    assert w.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(w))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "ternary9"}, "format='ternary9' is unknown; expected one of"),
        ({"layout": "rows"}, "layout='rows' of ternary2; expected one of"),
        ({"shape": (37, 0)}, "n >= 1 and k >= 1"),
        ({"shape": (37,)}, r"must be \(n, k\)"),
        ({"shape": (49, 100), "scale": jnp.ones((1, 1))}, r"uint8\[3, 7, 64\]; expected uint8\[4, 7, 64\]"),
        ({"shape": (37, 113)}, r"uint8\[3, 7, 64\]; expected uint8\[3, 8, 64\]"),
        ({"codes": jnp.zeros((3, 7, 64), jnp.int8)}, r"int8\[3, 7, 64\]; expected uint8"),
        ({"scale": jnp.ones((1, 1), jnp.int32)}, "scale is int32; expected float32 or float16"),
        ({"scale": jnp.ones((1,), jnp.float32)}, r"scale has shape \(1,\)"),
        (
            {"scale": jnp.ones((36, 1), jnp.float32)},
            r"scale has shape \(36, 1\); expected \(1, 1\), \(37, 1\)",
        ),
        ({"scale": jnp.ones((37, 0), jnp.float32)}, r"scale has shape \(37, 0\)"),
        ({"scale": jnp.ones((37, 3), jnp.float32)}, "G divides k=100"),
        ({"scale": jnp.ones((37, 2), jnp.float32)}, "multiple of 32 inputs"),
        ({"scale": jnp.ones((1, 2), jnp.float32)}, r"expected \(37, G\)"),
        ({"scale": jnp.full((1, 1), jnp.nan, jnp.float32)}, "NaN or infinity"),
        ({"scale": jnp.full((1, 1), jnp.inf, jnp.float32)}, "NaN or infinity"),
    ],
)
def test_errors_name_each_violated_invariant(make_packed, change: dict, message: str) -> None:
    _, w = make_packed("ternary2", 37, 100)
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(w, **change))


def test_scales_may_be_float16(make_packed) -> None:
    _, w = make_packed("int4", 37, 64, 2, scale_dtype="float16")
    validate(w)
    assert w.nbytes == w.codes.nbytes + 2 * 37 * 2
    exact = dataclasses.replace(w, scale=w.scale.astype(jnp.float32))
    np.testing.assert_array_equal(dequantize(w), dequantize(exact))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    for bits in (8, None):
        y = packed_matmul(x, w, activation_bits=bits)
        np.testing.assert_array_equal(y, packed_matmul(x, exact, activation_bits=bits))


@pytest.mark.parametrize(
    ("format", "minimum", "message"),
    [
        ("int4", jnp.ones((37, 2)), "got a minimum for int4; expected none: only uint4 has one"),
        ("uint4", None, r"got no minimum for uint4; expected float32\[37, 2\]"),
        ("uint4", jnp.ones((37, 1)), r"minimum is float32\[37, 1\]; expected float32\[37, 2\], as the scale"),
        ("uint4", jnp.ones((37, 2), jnp.float16), r"minimum is float16\[37, 2\]; expected float32\[37, 2\]"),
        ("uint4", jnp.full((37, 2), jnp.inf), "minimum holds NaN or infinity"),
    ],
)
def test_a_minimum_belongs_to_uint4_and_is_like_the_scale(
    make_packed, format: str, minimum, message: str
) -> None:
    codes, w = make_packed(format, 37, 64, 2)
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(w, minimum=minimum))
    if minimum is None or np.isfinite(np.asarray(minimum)).all():
        with pytest.raises(ValueError, match=message):
            pack(codes, w.scale, format, minimum=minimum)


def test_groups_of_half_a_binary_block_are_rejected(make_packed) -> None:
    _, w = make_packed("ternary2", 5, 96)
    with pytest.raises(ValueError, match="multiple of 32 inputs"):
        validate(dataclasses.replace(w, scale=jnp.ones((5, 2))))  # 48 inputs per group


@pytest.mark.parametrize("field", range(4))
def test_the_undefined_ternary_field_is_rejected(make_packed, field: int) -> None:
    _, w = make_packed("ternary2", 32, 64)
    with pytest.raises(ValueError, match="the field 3"):
        validate(with_byte(w, (1, 2, 5), 3 << (2 * field)))


@pytest.mark.parametrize(("format", "top"), [("binary", 128), ("ternary2", 64)])
def test_padding_must_be_zero(make_packed, format: str, top: int) -> None:
    _, w = make_packed(format, 17, 100)  # row 17 is padding, and so are the upper fields of the last block
    with pytest.raises(ValueError, match="padding rows 17 to 31 are not zero"):
        validate(with_byte(w, (1, 0, 4), 1))
    last = w.codes.shape[1] - 1
    with pytest.raises(ValueError, match="padding inputs 100 to"):
        validate(with_byte(w, (0, last, 0), top))


def test_an_undefined_ternary5_byte_is_rejected(make_packed) -> None:
    _, w = make_packed("ternary5", 32, 64)
    validate(with_byte(w, (1, 2, 5), 242))
    with pytest.raises(ValueError, match="byte 243; ternary5 defines 0 to 242"):
        validate(with_byte(w, (1, 2, 5), 243))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_the_padding_check_starts_at_the_end_of_a_group(format: str, groups: int) -> None:
    form = FORMATS[format]
    for k in range(1, form.block_k) if groups == 1 else (32, 64):
        blocks = -(-k // form.block_k)
        # Only one field of row 0 set: valid for the last input of a group, rejected after it.
        for c in (k - 1, k):
            if c == blocks * form.block_k:
                continue  # the group fills its blocks
            codes = np.zeros((1, groups * blocks, 64), np.uint8)
            codes[0, blocks - 1, c % 4] = form.base ** (c % form.block_k // 4)
            scale = np.ones((16, groups), np.float32)
            minimum = scale if form.has_minimum else None
            w = PackedArray(codes, scale, format, "panel16", (16, groups * k), minimum)
            if c < k:
                validate(w)
            else:
                with pytest.raises(ValueError, match=f"padding inputs {k} to {blocks * form.block_k - 1} of"):
                    validate(w)


def test_contents_of_traced_arrays_are_not_checked(make_packed) -> None:
    _, w = make_packed("ternary2", 16, 16)
    bad = with_byte(w, (0, 0, 0), 255)
    validate(bad, contents=False)

    @jax.jit
    def inside(w: PackedArray) -> jax.Array:
        validate(w)
        return w.scale

    inside(bad)


def test_the_minimum_is_a_third_leaf(make_packed) -> None:
    codes, w = make_packed("uint4", 16, 64, 2)
    assert [leaf.shape for leaf in jax.tree.leaves(w)] == [w.codes.shape, (16, 2), (16, 2)]
    assert "minimum" in jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(w)[0][2][0])
    each = [np.repeat(np.asarray(leaf), 32, axis=1) for leaf in (w.scale, w.minimum)]
    np.testing.assert_array_equal(dequantize(w), codes * each[0] + each[1])


def test_it_is_a_pytree_with_two_leaves(make_packed) -> None:
    _, w = make_packed("binary", 16, 64)
    leaves, tree = jax.tree.flatten(w)
    assert [leaf.shape for leaf in leaves] == [w.codes.shape, w.scale.shape]
    again = jax.tree.unflatten(tree, leaves)
    assert (again.format, again.layout, again.shape) == (w.format, w.layout, w.shape)


def test_dequantize_is_codes_times_scale_of_the_group() -> None:
    codes = np.where(np.arange(2 * 128).reshape(2, 128) % 3 == 0, 1, -1).astype(np.int8)
    scale = np.array([[0.5, 2.0], [3.0, 0.25]], np.float32)
    expected = codes * np.repeat(scale, 64, axis=1)
    np.testing.assert_array_equal(dequantize(pack(codes, scale, "binary")), expected)


def test_repr_is_one_line_without_the_arrays() -> None:
    w = pack(np.ones((33, 128), np.int8), np.ones((33, 2), np.float32), "ternary2")
    line = f"PackedArray(ternary2, panel16, shape=(33, 128), groups=2, nbytes={w.nbytes})"
    assert repr(w) == line
    assert str({"layer": [w, w]}) == f"{{'layer': [{line}, {line}]}}"
    assert repr(jax.eval_shape(lambda: w)) == line
    seen: list[str] = []
    jax.jit(lambda w: seen.append(repr(w)) or w.scale)(w)
    assert seen == [line]
    assert "\n" not in repr(jax.tree.map(lambda leaf: None, w))
