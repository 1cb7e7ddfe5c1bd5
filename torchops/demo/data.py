"""Fashion-MNIST on this machine: where it is, what is in its files, what is wrong with a bad one.

Files are gzipped IDX: a big-endian magic number 0x0800 + rank, one 32-bit size per dimension, then
unsigned bytes. Nothing is ever downloaded.
"""

import gzip
import math
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
IMAGE_SIZE = (28, 28)
MEAN, DEVIATION = 72.94, 90.02  # of the pixels 0..255 of the full training set


class DataError(Exception):
    """The data is missing or damaged; the message names the file or folder and the remedy."""


class Split(NamedTuple):
    """`images`: uint8 (N, 1, 28, 28); `labels`: int64 (N)."""

    images: Tensor
    labels: Tensor


class Dataset(NamedTuple):
    folder: Path
    train: Split
    test: Split


def load() -> Dataset:
    """The full set where TORCHOPS_DATA or Debian's package has it, else the repository's subset."""
    folder = find_folder()
    return Dataset(folder, load_split(folder, "train"), load_split(folder, "t10k"))


def find_folder() -> Path:
    chosen = os.environ.get("TORCHOPS_DATA")
    if chosen:
        return Path(chosen)
    # The checkout is above the package (editable install), above .venv, or where the user stands.
    checkouts = Path(__file__).parents[2], Path(sys.prefix).parent, Path.cwd()
    candidates = [DEBIAN_FOLDER, *(checkout / "examples" / "data" for checkout in checkouts)]
    for folder in candidates:
        if (folder / "train-images-idx3-ubyte.gz").exists():
            return folder
    raise DataError(
        "Fashion-MNIST was not found; looked in "
        + ", ".join(dict.fromkeys(map(str, candidates)))
        + ".\nSet TORCHOPS_DATA to a folder with train-images-idx3-ubyte.gz and its three"
        " companions: the repository's examples/data, or what apt-get install"
        " dataset-fashion-mnist puts into " + str(DEBIAN_FOLDER) + "."
    )


def load_split(folder: Path, name: str) -> Split:
    images_path = folder / f"{name}-images-idx3-ubyte.gz"
    labels_path = folder / f"{name}-labels-idx1-ubyte.gz"
    images = read_idx(images_path, rank=3)
    labels = read_idx(labels_path, rank=1)
    if images.shape[1:] != IMAGE_SIZE:
        height, width = images.shape[1:]
        raise damaged(images_path, f"its images are {height}x{width}, not 28x28")
    if len(images) != len(labels):
        raise damaged(
            labels_path, f"it has {len(labels)} labels for {len(images)} images in {images_path}"
        )
    if labels.max() >= CLASSES:
        raise damaged(labels_path, f"it has the label {labels.max()}, past the last class 9")
    return Split(images.unsqueeze(1), labels.long())


def read_idx(path: Path, rank: int) -> Tensor:
    """The bytes of one IDX file as a uint8 tensor of `rank` dimensions."""
    content = decompress(path)
    header_size = 4 * (1 + rank)
    if len(content) < header_size:
        raise damaged(path, f"it ends within the header, after {len(content)} bytes")
    magic, *shape = struct.unpack_from(f">{1 + rank}I", content)
    if magic != 0x0800 + rank:
        raise damaged(path, f"its magic number is 0x{magic:08x}, not 0x{0x0800 + rank:08x}")
    promised, present = math.prod(shape), len(content) - header_size
    if promised != present:
        sizes = "x".join(map(str, shape))
        raise damaged(
            path, f"its header promises {sizes} = {promised} bytes of data, {present} follow"
        )
    if not promised:
        raise damaged(path, "it is empty")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_size)
    return data.reshape(shape)


def decompress(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except EOFError:
        raise damaged(path, "the gzip stream is cut off") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"not a sound gzip file ({error})") from None
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None


def damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: {reason}.\nReplace the file, or set TORCHOPS_DATA to another folder with"
        " Fashion-MNIST."
    )


def normalised(images: Tensor) -> Tensor:
    """Grey levels as float32 with mean 0 and deviation 1."""
    return (images.float() - MEAN) / DEVIATION
