"""Draw docs/demo.png, the README's figure: the demo's questions and the embedded model's answers.

Needs matplotlib.
"""

import json
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

import mllama
from demo import IMAGES

TARGET = Path(__file__).parent.parent / "docs" / "demo.png"


def main() -> None:
    """Ask the questions and draw the figure."""
    asked = json.loads((IMAGES / "questions.json").read_text())
    figure, axes = plt.subplots(
        len(asked), 2, figsize=(9, 2.6 * len(asked)), width_ratios=(1, 1.5), layout="constrained"
    )
    for (left, right), (name, questions) in zip(axes, asked.items(), strict=True):
        with Image.open(IMAGES / name) as image:
            left.imshow(image)
        left.set(xticks=[], yticks=[])
        right.axis("off")
        for row, question in enumerate(questions):
            height = 1 - (row + 0.5) / len(questions)
            answer = textwrap.fill(mllama.ask(IMAGES / name, question), 26)
            right.text(0.02, height, question, va="center", fontsize=11)
            right.text(
                0.52, height, answer, va="center", fontsize=11, family="monospace", weight="bold"
            )
    figure.savefig(TARGET, dpi=100)


if __name__ == "__main__":
    main()
