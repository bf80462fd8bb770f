"""The short examples run on the embedded model and on a given folder."""

import pytest
import torch

import multimodal_demo
import text_inference
import vision_inference


def test_text(capsys, family_folder):
    with pytest.raises(SystemExit):  # the embedded model answers about images alone
        text_inference.main([])
    text_inference.main(
        ["Name three rivers.", "--model", str(family_folder("llama")), "--max-new-tokens", "4"]
    )
    greedy = capsys.readouterr().out
    torch.manual_seed(0)
    text_inference.main(
        [
            "Name three rivers.",
            "--model",
            str(family_folder("llama")),
            "--max-new-tokens",
            "4",
            "--temperature",
            "9",
        ]
    )
    assert greedy.strip() and capsys.readouterr().out != greedy


def test_vision(capsys):
    """The square of the demo's image is in the middle: patches on it are alike, those beside it
    are not.
    """
    vision_inference.main([])
    first, *rows = capsys.readouterr().out.splitlines()
    assert (
        first == "144 patches, 12 x 12, of 128 features each"
        and [len(row) for row in rows] == [24] * 12
    )
    assert rows[6][12:14] == "@@" and {*"".join(rows)} >= {" ", "@"}


@pytest.mark.parametrize("family", ["siglip", "paligemma"])
def test_vision_of_another_model(capsys, family_folder, image_file, family):
    vision_inference.main([str(image_file), "--model", str(family_folder(family))])
    assert "4 patches, 2 x 2, of 32 features each" in capsys.readouterr().out


def test_fusion_by_hand(capsys):
    logits = multimodal_demo.main()
    printed = capsys.readouterr().out
    assert (
        logits.shape[1] == multimodal_demo.VISUAL_TOKENS + 4
        and f"logits        {list(logits.shape)}" in printed
    )
    assert "visual tokens [1, 8, 128]" in printed
