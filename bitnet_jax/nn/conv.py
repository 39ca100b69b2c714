"""Convolution as a matrix product of image patches: BitLinear applied to windows (im2col).

A window of kh x kw pixels with C channels is a vector of kh kw C values, so quantizers, estimators, packed product
and exactness are those of `BitLinear`, and the weight is a matrix [features, kh kw C].

Each window is quantized like a token, with one scale. For `sign_absmean` that scale, mean|window|, is XNOR-Net's
map K = box filter of the channel mean of |input| (1603.05279; its released code omits K, which is `sign`). A learned
threshold has one value per input of the window, kh kw C in all.
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
      padding: rows and columns of zeros around the image, added before quantization: their sign is +1, so products
        of signs stay products of signs.

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
    """`features` filters of kernel x kernel pixels; float, latent or packed like BitLinear.

    The default padding preserves the image size for kernel 3 and stride 1.
    """

    kernel: int = 3
    stride: int = 1
    padding: int = 1

    def __call__(  # type: ignore[override]  # takes an image, BitLinear takes rows
        self, x: Float[Array, "B height width C"], progress: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "B rows columns n"]:
        return super().__call__(patches(x, self.kernel, self.stride, self.padding), progress)
