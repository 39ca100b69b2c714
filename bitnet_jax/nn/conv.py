"""Convolution as a product of patches: BitLinear on windows of an image.

A window of kh x kw pixels with C channels is a row of kh kw C numbers, so the quantizers, the estimators, the packed
product and its exactness are those of `BitLinear`, and a weight is a matrix [features, kh kw C] like any other.

Quantizing a window as BitLinear quantizes a token gives it one scale. For `sign_absmean` that scale, mean|window|,
is XNOR-Net's map K = box filter of the channel mean of |input| (1603.05279; its released code leaves K out, which
is `sign`). A learned threshold has one value for every input of the window, kh kw C of them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.nn.linear import BitLinear


def patches(
    x: Float[Array, "B height width C"], kernel: int, stride: int = 1, padding: int = 0
) -> Float[Array, "B rows columns k"]:
    """Windows of kernel x kernel pixels as vectors, k = kernel^2 C in the order row, column, channel.

    Args:
      padding: rows and columns of zeros around the image. They are added before anything is quantized: to a sign
        they are +1, so that products of signs stay products of signs.

    Raises:
      ValueError: the padded image is smaller than a window.
    """
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((size - kernel) // stride + 1 for size in x.shape[1:3])
    if rows < 1 or columns < 1:
        raise ValueError(f"got an image of {x.shape[1:3]} pixels, expected at least {kernel} x {kernel}")
    windows = [
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
    return jnp.concatenate(windows, axis=-1)


class BitConv(BitLinear):
    """`features` filters of kernel x kernel pixels; float, latent or packed exactly as BitLinear is.

    The default padding keeps the size of the image at stride 1 and an odd kernel.
    """

    kernel: int = 3
    stride: int = 1
    padding: int = 1

    def __call__(  # type: ignore[override]  # an image, where BitLinear takes rows
        self, x: Float[Array, "B height width C"], progress: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "B rows columns n"]:
        return super().__call__(patches(x, self.kernel, self.stride, self.padding), progress)
