"""Images to classify, from files.

.npy .npz            [height, width], [height, width, C] or [N, height, width, C] with C = 1 or 3, or
                     [N, height, width]; uint8, or other numbers from 0 to 255; an .npz holds one array
MNIST's idx files    see data/images.py, also .gz
.png, .pgm, ...      any format of Pillow (optional package pillow)
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.images import IDX_UINT8, Pixels, normalised, read_idx, shrink
from bitnet_jax.optional_packages import missing_package

MAX_BYTES = 1 << 30  # of an array in a file
MAX_PIXELS = 1 << 26  # of an image that Pillow decodes
PILLOW_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow mode: 8-bit greyscale or RGB


def read_images(path: Path, channels: int) -> np.ndarray:
    """The images of a file (see the module docstring): float32 [N, height, width, channels], from 0 to 255.

    Raises:
      DataError: the file is missing, not regular, damaged, of an unknown format, or has other values or channels.
    """
    if not path.is_file():
        raise DataError(f"{path}: got no such file, expected a file of one or more images")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if path.suffix in (".npy", ".npz"):
        images = _with_channels(_read_array(path), path)
    elif start == bytes((0, 0, IDX_UINT8, 3)) or path.suffix == ".gz":
        images = read_idx(path, axes=3)[..., None]
    else:
        images = _read_with_pillow(path, channels)
    if images.shape[-1] != channels or not images.size:
        raise DataError(f"{path}: got an array {list(images.shape)}, expected images of {channels} channels")
    values = images.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 255:  # false for NaN too
        raise DataError(f"{path}: got values from {low:g} to {high:g}, expected pixels from 0 to 255")
    if images.dtype.kind == "f" and 0 < high <= 1:
        raise DataError(
            f"{path}: got values from 0 to {high:g}, expected pixels from 0 to 255; multiply by 255"
        )
    return values


def model_inputs(images: np.ndarray, pixels: Pixels, size: int, *, resize: bool = False) -> np.ndarray:
    """float32 [N, size, size, C], downsampled and normalised like the model's training images.

    Args:
      images: from 0 to 255, of the size of the training images before or after downsampling.
      resize: also downsample images of any other size, ignoring their aspect ratio.

    Raises:
      DataError: images of another size.
    """
    height, width = images.shape[1:3]
    if (height, width) not in (pixels.size, (size, size)) and not resize:
        source = "" if pixels.size == (size, size) else "{} x {} (downsampled) or ".format(*pixels.size)
        raise DataError(
            f"got an image of {height} x {width} pixels, expected {source}{size} x {size}; resize it, or pass "
            "--resize (resize=True) to downsample it"
        )
    return normalised(images if (height, width) == (size, size) else shrink(images, size), pixels)


def _read_array(path: Path) -> np.ndarray:
    """The single array of the file, at most MAX_BYTES large."""
    try:
        if path.suffix == ".npy":
            array: Any = np.load(
                path, mmap_mode="r", allow_pickle=False
            )  # sizes are checked against the file
        else:
            with zipfile.ZipFile(path) as members:
                inside = members.infolist()
            if len(inside) != 1:
                names = ", ".join(member.filename for member in inside[:8])
                raise DataError(f"{path}: got {len(inside)} arrays ({names}), expected one")
            if inside[0].file_size > MAX_BYTES:
                raise DataError(
                    f"{path}: got {inside[0].file_size} bytes unpacked, expected at most {MAX_BYTES}"
                )
            with np.load(path, allow_pickle=False) as file:
                (array,) = file.values()
    except DataError:
        raise
    except Exception as error:  # NumPy and zipfile report damage in many ways
        raise DataError(
            f"{path}: got a file that NumPy cannot read ({one_line(error)}), expected an array; save it again"
        ) from error
    if array.dtype.kind not in "uif" or array.nbytes > MAX_BYTES:
        raise DataError(
            f"{path}: got {array.dtype}{list(array.shape)}, expected numbers of at most {MAX_BYTES} bytes"
        )
    return np.asarray(array)


def _with_channels(array: np.ndarray, path: Path) -> np.ndarray:
    """[N, height, width, C]; a last axis of size 1 or 3 is the channel axis."""
    has_channels = array.ndim > 2 and array.shape[-1] in PILLOW_MODES
    array = array if has_channels else array[..., None]
    if array.ndim not in (3, 4):
        raise DataError(
            f"{path}: got an array {list(array.shape)}, expected [height, width], [height, width, C], "
            "[N, height, width] or [N, height, width, C]"
        )
    return array[None] if array.ndim == 3 else array


def _read_with_pillow(path: Path, channels: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path}: {missing_package('pillow')}, or give an .npy file") from error
    if channels not in PILLOW_MODES:
        raise DataError(
            f"{path}: got an image file for a model with {channels} channels, expected an .npy file"
        )
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
                raise DataError(
                    f"{path}: got an image of mode {image.mode}, expected 8-bit greyscale or RGB without transparency; "
                    "convert it"
                )
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in total"
                )
            return np.asarray(image.convert(PILLOW_MODES[channels])).reshape(
                1, image.height, image.width, channels
            )
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in many ways inside Pillow
        raise DataError(
            f"{path}: got a file that Pillow cannot read ({one_line(error)}), expected an image such as .png or .pgm, "
            ".npy, .npz or an idx file of MNIST"
        ) from error
