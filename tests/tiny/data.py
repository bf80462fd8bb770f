"""Small training data: images, and rows in every form."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CONVERSATION = {
    "image": "0.png",
    "conversations": [
        {"from": "human", "value": "<image>\nHow many circles?"},
        {"from": "gpt", "value": "two"},
        {"from": "human", "value": "What colour?"},
        {"from": "gpt", "value": "red and blue"},
    ],
}
TEXT_ALONE = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "a good day to you"},
    ]
}
TWO_IMAGES = {"images": ["1.png", "2.png"], "question": "Which is red?", "answer": "the second"}
LATE_IMAGE = {
    "messages": [
        {"role": "user", "content": "describe"},
        {"role": "assistant", "content": "what?"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "the picture "},
                {"type": "image_url", "image_url": {"url": "1.png"}},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
    ]
}
ROWS = [CONVERSATION, TEXT_ALONE, TWO_IMAGES, LATE_IMAGE]


def write_images(folder: Path, count: int = 3) -> None:
    """0.png, 1.png ... of unequal sizes."""
    for number in range(count):
        pixels = np.random.RandomState(number).randint(0, 256, (40 + 30 * number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write(folder: Path, rows: list = ROWS, name: str = "photos.jsonl") -> Path:
    """Images, and rows as JSON lines beside them."""
    write_images(folder)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
