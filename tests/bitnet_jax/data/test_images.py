"""Images: intact and damaged idx files, downscaling, drawn digits, normalization."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import DataError, load_images
from bitnet_jax.data.images import drawn_digits, read_idx, shrink


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 and 10 images of 6 x 4 pixels in four files, two of them compressed."""
    rng = np.random.default_rng(0)
    for part, count, ending in (("train", 30, ".gz"), ("t10k", 10, "")):
        write_idx(
            tmp_path / f"{part}-images-idx3-ubyte{ending}",
            rng.integers(0, 256, (count, 6, 4)).astype(np.uint8),
        )
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", (np.arange(count) % 3).astype(np.uint8))
    return tmp_path


def test_four_files_become_two_normalized_splits(folder: Path) -> None:
    sets = load_images(folder.name, root=folder.parent)
    assert sets.classes == 3
    assert sets.train.images.shape == (30, 6, 4, 1)
    assert sets.train.images.dtype == sets.valid.images.dtype == np.float32
    np.testing.assert_array_equal(sets.valid.labels, np.arange(10) % 3)
    raw = read_idx(folder / "train-images-idx3-ubyte.gz", 3).astype(np.float64)
    expected = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(sets.train.images[..., 0], expected, rtol=1e-5, atol=1e-6)
    # the held-out split is normalized with the statistics of the training split
    held_out = read_idx(folder / "t10k-images-idx3-ubyte", 3)
    expected = (held_out - raw.mean()) / raw.std()
    np.testing.assert_allclose(sets.valid.images[..., 0], expected, rtol=1e-5, atol=1e-6)
    few = load_images(folder.name, root=folder.parent, limit=7, size=2)
    assert (few.train.images.shape, few.valid.images.shape) == ((7, 2, 2, 1), (10, 2, 2, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"got 719 bytes after the header, expected the 720 of a 30 x 6 x 4 array"),
        (lambda raw: raw + b"x", "got 721 bytes or more after the header"),
        (lambda raw: raw[:9], "expected the idx file of a uint8 array with 3 axes"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "begins with '00 00 0d 03'"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "begins with '00 00 08 01'"),
        (lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "expected the 103079215080"),
        (lambda raw: b"", "begins with ''"),
    ],
)
def test_damaged_idx_files_are_rejected(folder: Path, damage: object, message: str) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        load_images(str(folder))


def test_damaged_gzip_and_mismatched_files_are_rejected(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"no gzip", whole[:20] + bytes(20) + whole[40:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="got damaged gzip data"):
            load_images(str(folder))
    write_idx(path, np.zeros((29, 6, 4), np.uint8))
    with pytest.raises(DataError, match="got 29 train images and 30 labels"):
        load_images(str(folder))
    write_idx(path, np.zeros((30, 6, 5), np.uint8))
    with pytest.raises(DataError, match=r"images of \(6, 5\) pixels and held-out ones of \(6, 4\)"):
        load_images(str(folder))
    write_idx(path, np.zeros((30, 6, 4), np.uint8))
    with pytest.raises(DataError, match="images of one colour"):
        load_images(str(folder))
    path.unlink()
    with pytest.raises(DataError, match=r"got no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"):
        load_images(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 31}, "data.limit: got 31, expected 1 to the 30 images"),
        ({"limit": 0}, "data.limit: got 0"),
        ({"size": 5}, "data.image_size: got 5, expected 1 to the 4 pixels"),
    ],
)
def test_invalid_options_are_rejected(folder: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(str(folder), **options)  # type: ignore[arg-type]


def test_downscaling_averages_areas() -> None:
    images = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype(np.float32)
    expected = images.reshape(2, 2, 3, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(shrink(images, 2), expected, rtol=1e-5, atol=1e-6)
    # of 4 pixels scaled to 3, each new one covers 4/3 old ones: one entirely and a third of its neighbour
    line = np.array([1.0, 2, 4, 8], np.float32).reshape(1, 1, 4, 1).repeat(4, axis=1)
    expected = [(1 + 2 / 3) * 3 / 4, (2 * 2 / 3 + 4 * 2 / 3) * 3 / 4, (4 / 3 + 8) * 3 / 4]
    np.testing.assert_allclose(shrink(line, 3)[0, 0, :, 0], expected, rtol=1e-6)


def test_drawn_digits_are_reproducible_and_distinguish_the_classes() -> None:
    digits, again, other = drawn_digits(300, 0), drawn_digits(300, 0), drawn_digits(300, 1)
    np.testing.assert_array_equal(digits.images, again.images)
    assert (digits.images != other.images).any()
    assert digits.images.shape == (300, 16, 16, 1)
    assert set(digits.labels.tolist()) == set(range(10))
    sets = load_images("drawn", limit=500)
    flat, held_out = (part.images.reshape(len(part.labels), -1) for part in (sets.train, sets.valid))
    distance = np.square(held_out[:200, None] - flat[None]).sum(axis=-1)
    found = sets.train.labels[distance.argmin(axis=1)]
    # the nearest neighbour among 500 is right more than twice as often as chance, but not nearly always
    assert 0.2 < np.mean(found == sets.valid.labels[:200]) < 0.9


def test_mnist(data_root: Path) -> None:
    sets = load_images("vision/mnist", root=data_root, size=14)
    assert (len(sets.train.labels), len(sets.valid.labels), sets.classes) == (60_000, 10_000, 10)
    assert np.bincount(sets.valid.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_with_a_test_part_the_last_training_images_are_held_out(folder: Path) -> None:
    plain, sets = load_images(str(folder)), load_images(str(folder), test_with_valid=0.2, pixels=None)
    assert sets.test is not None
    assert plain.test is None
    assert [len(part.labels) for part in (sets.train, sets.valid, sets.test)] == [24, 6, 10]
    labels = np.concatenate([sets.train.labels, sets.valid.labels])
    np.testing.assert_array_equal(labels, plain.train.labels)
    same = load_images(str(folder), test_with_valid=0.2, pixels=plain.pixels)
    np.testing.assert_array_equal(same.test.images, plain.valid.images)  # type: ignore[union-attr]
    np.testing.assert_array_equal(same.valid.images, plain.train.images[24:])
    few = load_images(str(folder), test_with_valid=0.2, limit=3)
    assert [len(part.labels) for part in (few.train, few.valid)] == [3, 6]
    with pytest.raises(DataError, match="got 30 of 30 images to train on"):
        load_images(str(folder), test_with_valid=1e-18)
