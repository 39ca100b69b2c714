"""Labelled images: MNIST's idx files, and synthetic digits that need no files.

A source of images is one of

    drawn      synthetic seven-segment digits: always available, and not quite trivial
    FOLDER     {train,t10k}-images-idx3-ubyte[.gz] and {train,t10k}-labels-idx1-ubyte[.gz], the files of MNIST
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitnet_jax.data.errors import DataError, check_share
from bitnet_jax.data.files import BLOCK, read_blocks
from bitnet_jax.data.text import resolve_path

IDX_UINT8 = 0x08  # the only element type that MNIST uses
DRAWN_EXAMPLES = (4000, 1000)  # training, held out
DRAWN_SIZE = 16


class LabelledImages(NamedTuple):
    images: np.ndarray  # float32 [N, height, width, C], see load_images
    labels: np.ndarray  # int32 [N], from 0


class Pixels(NamedTuple):
    """Normalisation of pixels from 0 to 255: (pixel - mean) / deviation, after downsampling."""

    mean: float
    deviation: float
    size: tuple[int, int]  # height and width of the source images, before downsampling


class ImageSets(NamedTuple):
    train: LabelledImages
    valid: LabelledImages
    classes: int
    pixels: Pixels
    test: LabelledImages | None = None


def load_images(
    source: str = "drawn",
    *,
    size: int | None = None,
    limit: int | None = None,
    root: str | os.PathLike[str] | None = None,
    pixels: Pixels | None = None,
    test_with_valid: float | None = None,
) -> ImageSets:
    """Training and held-out images of a source (see the module docstring), normalised alike.

    Args:
      size: height and width to downsample to by area averaging; None: keep the size.
      limit: use only the first `limit` training images.
      root: base folder of a relative path, see `resolve_path`.
      pixels: normalisation of a trained model; None: computed here, so that the pixels of the training images have
        mean 0 and standard deviation 1.
      test_with_valid: the held-out images are `test`, and `valid` is this share of the training images, the last
        ones; None: the held-out images are `valid`.

    Raises:
      DataError: a file is missing, damaged or of another kind; the two parts have different sizes.
    """
    if source == "drawn":
        train, valid = drawn_digits(DRAWN_EXAMPLES[0], seed=0), drawn_digits(DRAWN_EXAMPLES[1], seed=1)
    else:
        folder = resolve_path(source, root)
        train, valid = _read_pair(folder, "train"), _read_pair(folder, "t10k")
    if train.images.shape[1:] != valid.images.shape[1:]:
        raise DataError(
            f"{source}: got training images of {train.images.shape[1:3]} pixels and held-out ones of "
            f"{valid.images.shape[1:3]}, expected the same size"
        )
    parts = [train, valid]
    if test_with_valid is not None:
        train, held_out = _cut(train, test_with_valid, source)
        parts = [train, held_out, valid]
    if limit is not None:
        if not 1 <= limit <= len(train.labels):
            raise DataError(
                f"data.limit: got {limit}, expected 1 to the {len(train.labels)} images of {source}"
            )
        parts[0] = LabelledImages(train.images[:limit], train.labels[:limit])
    images = [part.images.astype(np.float32) for part in parts]
    if size is not None:
        images = [shrink(part, size) for part in images]
    if pixels is None:
        mean, deviation = images[0].mean(dtype=np.float64), images[0].std(dtype=np.float64)
        if deviation == 0:
            raise DataError(f"{source}: got training images of one colour, expected pixels that differ")
        height, width = train.images.shape[1:3]
        pixels = Pixels(float(mean), float(deviation), (height, width))
    train, valid, *test = (
        LabelledImages(normalised(array, pixels), part.labels)
        for array, part in zip(images, parts, strict=True)
    )
    classes = int(max(part.labels.max() for part in parts)) + 1
    return ImageSets(train, valid, classes, pixels, *test)


def _cut(images: LabelledImages, share: float, source: str) -> tuple[LabelledImages, LabelledImages]:
    """All but the last `share` of the images, and those."""
    check_share("valid_fraction", share)
    count = len(images.labels)
    kept = int(count * (1 - share))
    if not 0 < kept < count:
        raise DataError(
            f"{source}: got {kept} of {count} images to train on with data.valid_fraction={share}, expected some and "
            "some to validate; use another data.valid_fraction"
        )
    first, last = (
        LabelledImages(images.images[at], images.labels[at]) for at in (slice(kept), slice(kept, None))
    )
    return first, last


def normalised(images: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Images from 0 to 255 to float32 model inputs."""
    return ((images - np.float64(pixels.mean)) / np.float64(pixels.deviation)).astype(np.float32)


def _read_pair(folder: Path, part: str) -> LabelledImages:
    images = read_idx(_one_of(folder, f"{part}-images-idx3-ubyte"), axes=3)
    labels = read_idx(_one_of(folder, f"{part}-labels-idx1-ubyte"), axes=1)
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{folder}: got {len(images)} {part} images and {len(labels)} labels, expected the same number, at least 1"
        )
    return LabelledImages(images[..., None], labels.astype(np.int32))


def _one_of(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(
        f"{folder}: got no {name} or {name}.gz, expected the four files of MNIST; check data.source"
    )


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an idx file with `axes` axes, unpacked if the name ends in .gz.

    Format: two zero bytes, the type, the number of axes, each axis as a big-endian uint32, then the elements.

    Raises:
      DataError: not such a file, damaged, or its size does not match its header.
    """
    content, expected, shape = bytearray(), 0, tuple[int, ...]()
    header = 4 + 4 * axes
    for block in read_blocks(path):
        content += block
        if not shape and len(content) >= header:
            shape = _idx_shape(path, bytes(content[:header]), axes)
            expected = math.prod(shape)
        # Stop once the file is clearly longer than its header says; one more block still detects damage.
        if shape and len(content) > header + expected + BLOCK:
            break
    if not shape:
        shape = _idx_shape(path, bytes(content), axes)
    content = content[header:]
    if len(content) != expected:
        got = f"{len(content)} bytes or more" if len(content) > expected else f"{len(content)} bytes"
        raise DataError(
            f"{path}: got {got} after the header, expected the {expected} of a "
            f"{' x '.join(map(str, shape))} array; copy the file again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _idx_shape(path: Path, header: bytes, axes: int) -> tuple[int, ...]:
    if header[:4] != bytes((0, 0, IDX_UINT8, axes)) or len(header) < 4 + 4 * axes:
        raise DataError(
            f"{path}: got a file that begins with {header[:4].hex(' ')!r}, expected the idx file of a uint8 "
            f"array with {axes} axes, 00 00 08 {axes:02x}"
        )
    return struct.unpack(f">{axes}I", header[4:])


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Downsample float32 [N, height, width, C] to size x size pixels by area averaging."""
    if not 1 <= size <= min(images.shape[1:3]):
        raise DataError(
            f"data.image_size: got {size}, expected 1 to the {min(images.shape[1:3])} pixels of the images"
        )
    count, height, width, channels = images.shape
    rows, columns = _coverage(height, size), _coverage(width, size)
    areas = np.kron(rows, columns)  # one large matrix product is several times faster than many small ones
    flat = images.transpose(0, 3, 1, 2).reshape(count * channels, height * width).astype(np.float32)
    return (flat @ areas.T).reshape(count, channels, size, size).transpose(0, 2, 3, 1)


def _coverage(old: int, new: int) -> np.ndarray:
    """float32 [new, old]: the share of each new pixel covered by each old pixel."""
    edges = np.arange(new + 1)[:, None] * (old / new)
    pixels = np.arange(old)[None]
    overlap = np.minimum(edges[1:], pixels + 1.0) - np.maximum(edges[:-1], pixels)
    return (np.clip(overlap, 0, None) * (new / old)).astype(np.float32)


# Segments of each digit; a to g: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = ("abcefg", "cf", "acdeg", "acdfg", "bcdf", "abdfg", "abdefg", "acf", "abcdefg", "abcdfg")


def drawn_digits(count: int, seed: int, size: int = DRAWN_SIZE) -> LabelledImages:
    """Seven-segment digits with random position, width, height, slant and brightness, plus noise.

    Returns: images float32 [count, size, size, 1] from 0 to 255, labels int32 [count].
    """
    rng = np.random.Generator(np.random.Philox(seed))
    labels = rng.integers(0, 10, count).astype(np.int32)
    images = np.zeros((count, size, size), np.float32)
    along = np.linspace(0, 1, 2 * size)[None]  # position along a stroke
    for image, label in zip(images, labels, strict=True):
        height, width = rng.integers(8, 11), rng.integers(4, 7)
        top, left = ((size - extent) // 2 + rng.integers(-1, 2) for extent in (height, width))
        slant, brightness = rng.uniform(-0.15, 0.15), rng.uniform(0.6, 1)
        middle = height // 2
        strokes = {
            "a": (0, 0, 0, width), "d": (middle, 0, middle, width), "g": (height, 0, height, width),
            "b": (0, 0, middle, 0), "e": (middle, 0, height, 0),
            "c": (0, width, middle, width), "f": (middle, width, height, width),
        }  # fmt: skip
        y0, x0, y1, x1 = np.array([strokes[segment] for segment in SEGMENTS[label]]).T[:, :, None]
        y, x = y0 + along * (y1 - y0), x0 + along * (x1 - x0)
        columns = np.clip(np.rint(left + x + slant * (middle - y)), 0, size - 1)
        image[(top + np.rint(y)).astype(int), columns.astype(int)] = brightness
    images += rng.normal(0, 0.2, images.shape).astype(np.float32)
    return LabelledImages(np.clip(images * 255, 0, 255)[..., None], labels)
