"""The demo's data: the committed subset is sound; every kind of bad file is named and explained."""

import gzip
import shutil
import struct
from pathlib import Path

import pytest
import torch

from torchops.demo import data

REPOSITORY_DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"


def images_file(count=20, height=28, width=28, magic=0x803) -> bytes:
    header = struct.pack(">4I", magic, count, height, width)
    return (
        header
        + bytes(range(256)) * (count * height * width // 256)
        + bytes(count * height * width % 256)
    )


def labels_file(count=20, magic=0x801) -> bytes:
    return struct.pack(">2I", magic, count) + bytes(i % 10 for i in range(count))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A small, sound data folder in TORCHOPS_DATA, for each test to damage."""
    write(tmp_path / TRAIN_IMAGES, images_file())
    write(tmp_path / TRAIN_LABELS, labels_file())
    write(tmp_path / TEST_IMAGES, images_file(10))
    write(tmp_path / TEST_LABELS, labels_file(10))
    monkeypatch.setenv("TORCHOPS_DATA", str(tmp_path))
    return tmp_path


def write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def assert_load_fails(name: str | Path, reason: str) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load()
    message = str(caught.value)
    assert str(name) in message and reason in message and "TORCHOPS_DATA" in message, message


def test_committed_subset(monkeypatch):
    monkeypatch.setenv("TORCHOPS_DATA", str(REPOSITORY_DATA))
    dataset = data.load()
    assert dataset.folder == REPOSITORY_DATA
    assert dataset.train.images.shape == (6000, 1, 28, 28)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.train.labels.bincount().tolist() == [600] * 10
    assert dataset.test.images.shape == (1000, 1, 28, 28)
    assert dataset.test.labels.bincount().tolist() == [100] * 10
    # Ankle boot, T-shirt, T-shirt, dress: how the original training set begins.
    assert dataset.train.labels[:4].tolist() == [9, 0, 0, 3]
    assert data.normalised(dataset.train.images).mean().abs() < 0.02
    assert (data.normalised(dataset.train.images).std() - 1).abs() < 0.02


def test_sound_folder_keeps_every_byte(folder):
    train = data.load().train
    assert train.images.flatten()[:300].tolist() == [i % 256 for i in range(300)]
    assert train.labels.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize("name", [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
def test_missing_file(folder, name):
    (folder / name).unlink()
    assert_load_fails(folder / name, "No such file")


def test_missing_folder(folder, monkeypatch):
    monkeypatch.setenv("TORCHOPS_DATA", str(folder / "absent"))
    assert_load_fails(folder / "absent" / TRAIN_IMAGES, "No such file")


def test_directory_in_place_of_file(folder):
    (folder / TRAIN_IMAGES).unlink()
    (folder / TRAIN_IMAGES).mkdir()
    assert_load_fails(folder / TRAIN_IMAGES, "Is a directory")


def test_empty_file(folder):
    (folder / TRAIN_LABELS).write_bytes(b"")
    assert_load_fails(folder / TRAIN_LABELS, "ends within the header, after 0 bytes")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_half_written_gzip(folder, kept):
    whole = (REPOSITORY_DATA / TRAIN_IMAGES).read_bytes()
    (folder / TRAIN_IMAGES).write_bytes(whole[: int(len(whole) * kept)])
    assert_load_fails(folder / TRAIN_IMAGES, "the gzip stream is cut off")


def test_flipped_bits(folder):
    content = bytearray((REPOSITORY_DATA / TRAIN_LABELS).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / TRAIN_LABELS).write_bytes(content)
    assert_load_fails(folder / TRAIN_LABELS, "not a sound gzip file")


def test_not_gzip(folder):
    (folder / TRAIN_IMAGES).write_bytes(images_file())
    assert_load_fails(folder / TRAIN_IMAGES, "not a sound gzip file")


def test_git_lfs_pointer(folder):
    (folder / TRAIN_IMAGES).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_load_fails(folder / TRAIN_IMAGES, "not a sound gzip file")


def test_bad_magic_number(folder):
    write(folder / TRAIN_IMAGES, images_file(magic=0x801))
    assert_load_fails(folder / TRAIN_IMAGES, "magic number is 0x00000801, not 0x00000803")


def test_swapped_files(folder):
    shutil.copy(folder / TRAIN_LABELS, folder / TRAIN_IMAGES)
    assert_load_fails(folder / TRAIN_IMAGES, "magic number is 0x00000801, not 0x00000803")


def test_header_cut_off(folder):
    write(folder / TRAIN_IMAGES, images_file()[:10])
    assert_load_fails(folder / TRAIN_IMAGES, "ends within the header, after 10 bytes")


@pytest.mark.parametrize(("extra", "present"), [(-1, 15679), (1, 15681)])
def test_wrong_count(folder, extra, present):
    content = images_file()
    write(folder / TRAIN_IMAGES, content[:-1] if extra < 0 else content + b"\0")
    assert_load_fails(
        folder / TRAIN_IMAGES, f"promises 20x28x28 = 15680 bytes of data, {present} follow"
    )


def test_absurd_count_is_not_believed(folder):
    write(folder / TRAIN_IMAGES, struct.pack(">4I", 0x803, *[2**32 - 1] * 3))
    assert_load_fails(folder / TRAIN_IMAGES, "0 follow")


def test_no_images(folder):
    write(folder / TEST_IMAGES, images_file(0))
    assert_load_fails(folder / TEST_IMAGES, "it is empty")


def test_wrong_image_size(folder):
    write(folder / TRAIN_IMAGES, images_file(height=32, width=32))
    assert_load_fails(folder / TRAIN_IMAGES, "its images are 32x32, not 28x28")


def test_label_count_differs_from_image_count(folder):
    write(folder / TRAIN_LABELS, labels_file(19))
    assert_load_fails(folder / TRAIN_LABELS, "it has 19 labels for 20 images")


def test_label_past_the_last_class(folder):
    write(folder / TRAIN_LABELS, labels_file()[:-1] + b"\x0a")
    assert_load_fails(folder / TRAIN_LABELS, "the label 10, past the last class 9")


def test_debian_package_is_preferred_to_the_subset(folder, monkeypatch):
    monkeypatch.delenv("TORCHOPS_DATA")
    monkeypatch.setattr(data, "DEBIAN_FOLDER", folder)
    assert data.find_folder() == folder


def test_subset_is_found_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHOPS_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path)
    monkeypatch.chdir(REPOSITORY_DATA.parents[1])
    assert data.find_folder().samefile(REPOSITORY_DATA)


def test_nothing_found(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHOPS_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(data, "__file__", str(tmp_path / "torchops" / "demo" / "data.py"))
    monkeypatch.setattr(data.sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.chdir(tmp_path)
    assert_load_fails(tmp_path / "debian", "Fashion-MNIST was not found")
