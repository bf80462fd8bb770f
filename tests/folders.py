"""What tests of model folders share: one batch of inputs, its logits, and an edit of a JSON file."""

import json

import torch

import twins

PICTURE = [twins.IMAGE] * twins.PATCHES
INPUTS = twins.batch(PICTURE + twins.tokens(6), twins.tokens(3) + PICTURE + twins.tokens(2)) | {
    "pixel_values": twins.pictures(2)
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits[INPUTS["attention_mask"].bool()]


def change(folder, edit, name="config.json"):
    """Edit a JSON file of a folder in place."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))
