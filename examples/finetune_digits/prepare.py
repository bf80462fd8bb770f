"""Write scikit-learn's 1,797 scanned digits as images, with a question and an answer for each.

    python examples/finetune_digits/prepare.py

writes runs/digits-data: train.csv, a held-out fifth in test.csv, and images.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

QUESTION = "What digit is written?"
SIDE = 64  # pixels; the scans have 8 x 8
BRIGHTEST = 16


def main(argv: list[str] | None = None) -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/digits-data"), help="the folder")
    prepare(parser.parse_args(argv).out)


def prepare(folder: Path) -> None:
    """Write images as PNG, black on white, and both CSV files."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    rows = []
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = (255 * (1 - scan / BRIGHTEST)).astype(np.uint8)
        name = f"{number:04}.png"
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(images / name)
        rows.append((f"images/{name}", QUESTION, int(digit)))
    order = np.random.default_rng(0).permutation(len(rows))
    held_out = len(rows) // 5
    for name, chosen in (("test", order[:held_out]), ("train", order[held_out:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "question", "answer"))
            writer.writerows(rows[index] for index in chosen)
    print(f"{folder}: {len(rows) - held_out} rows in train.csv, {held_out} in test.csv")


if __name__ == "__main__":
    main()
