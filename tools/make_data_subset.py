"""Makes examples/data: the first 600 training and 100 test images of every Fashion-MNIST class.

    python tools/make_data_subset.py [--source DIR] [--target DIR]

The source folder holds the four original files; Debian's package dataset-fashion-mnist puts them
where the default looks. The images keep their order: the output depends on the input alone.
"""

import argparse
import gzip
import struct
from pathlib import Path

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).resolve().parents[1] / "examples" / "data"
PER_CLASS = {"train": 600, "t10k": 100}
IMAGE_BYTES = 28 * 28
IMAGES_HEADER = struct.Struct(">4I")  # magic number, count, height, width
LABELS_HEADER = struct.Struct(">2I")  # magic number, count


def first_of_each_class(labels: bytes, per_class: int) -> list[int]:
    """Positions of the first `per_class` appearances of every label, in order."""
    taken = [0] * 10
    positions = []
    for position, label in enumerate(labels):
        if taken[label] < per_class:
            taken[label] += 1
            positions.append(position)
    assert taken == [per_class] * 10, f"too few images of some class: {taken}"
    return positions


def write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, mtime=0))
    print(f"{path}: {path.stat().st_size:,} bytes")


def make(source: Path, target: Path) -> None:
    for split, per_class in PER_CLASS.items():
        images_name, labels_name = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
        images = gzip.decompress((source / images_name).read_bytes())[IMAGES_HEADER.size :]
        labels = gzip.decompress((source / labels_name).read_bytes())[LABELS_HEADER.size :]
        kept = first_of_each_class(labels, per_class)
        write(
            target / images_name,
            IMAGES_HEADER.pack(0x803, len(kept), 28, 28)
            + b"".join(images[i * IMAGE_BYTES : (i + 1) * IMAGE_BYTES] for i in kept),
        )
        write(
            target / labels_name,
            LABELS_HEADER.pack(0x801, len(kept)) + bytes(labels[i] for i in kept),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE, metavar="DIR")
    parser.add_argument("--target", type=Path, default=TARGET, metavar="DIR")
    arguments = parser.parse_args()
    make(arguments.source, arguments.target)
