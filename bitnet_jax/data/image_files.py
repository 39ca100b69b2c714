"""Images that a classifier is asked about, from files.

.npy .npz            [height, width], [height, width, C] or [N, height, width, C] with C = 1 or 3, or
                     [N, height, width]; uint8, or other numbers from 0 to 255; an .npz holds one array
MNIST's idx files    as data/images.py reads them, also .gz
.png .pgm and more   what Pillow reads (optional package pillow)
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
PILLOW_MODES = {1: "L", 3: "RGB"}  # channels -> the mode of Pillow: grey values or colours of eight bits


def read_images(path: Path, channels: int) -> np.ndarray:
    """The images of a file (see the module docstring): float32 [N, height, width, channels], from 0 to 255.

    Raises:
      DataError: no such file, not a regular one, damaged, of an unknown kind, of other values or channels.
    """
    if not path.is_file():
        raise DataError(f"{path}: got no such file, expected one with an image or with several")
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
    if not 0 <= low <= high <= 255:  # also when they are NaN
        raise DataError(f"{path}: got values from {low:g} to {high:g}, expected pixels from 0 to 255")
    if images.dtype.kind == "f" and 0 < high <= 1:
        raise DataError(
            f"{path}: got fractions of at most {high:g}, expected pixels from 0 to 255; multiply by 255"
        )
    return values


def model_inputs(images: np.ndarray, pixels: Pixels, size: int, *, resize: bool = False) -> np.ndarray:
    """float32 [N, size, size, C], shrunk and normalised as the images that the model was trained on.

    Args:
      images: from 0 to 255; of the size of the training images before or after they were shrunk.
      resize: shrink images of any other size too, whatever that does to their proportions.

    Raises:
      DataError: images of another size.
    """
    height, width = images.shape[1:3]
    if (height, width) not in (pixels.size, (size, size)) and not resize:
        before = "" if pixels.size == (size, size) else "{} x {} (which is shrunk) or ".format(*pixels.size)
        raise DataError(
            f"got an image of {height} x {width} pixels, expected {before}{size} x {size}; resize it, or let it be "
            "shrunk with --resize (resize=True)"
        )
    return normalised(images if (height, width) == (size, size) else shrink(images, size), pixels)


def _read_array(path: Path) -> np.ndarray:
    """The one array of the file, not larger than MAX_BYTES."""
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
            f"{path}: got no array that NumPy can read ({one_line(error)}); save it again"
        ) from error
    if array.dtype.kind not in "uif" or array.nbytes > MAX_BYTES:
        raise DataError(
            f"{path}: got {array.dtype}{list(array.shape)}, expected numbers of at most {MAX_BYTES} bytes"
        )
    return np.asarray(array)


def _with_channels(array: np.ndarray, path: Path) -> np.ndarray:
    """[N, height, width, C]; a last axis of 1 or 3 is that of channels."""
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
            f"{path}: got an image file for a model of {channels} channels, expected an .npy file"
        )
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
                raise DataError(
                    f"{path}: got an image of mode {image.mode}, expected grey values or colours of eight bits without "
                    "transparency; convert it"
                )
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in all"
                )
            return np.asarray(image.convert(PILLOW_MODES[channels])).reshape(
                1, image.height, image.width, channels
            )
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in many ways inside Pillow
        raise DataError(
            f"{path}: got no image that Pillow can read ({one_line(error)}), expected .png, .pgm and the like, .npy, "
            ".npz or MNIST's idx files"
        ) from error
