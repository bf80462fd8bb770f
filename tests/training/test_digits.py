"""examples/finetune_digits at small scale: its adapter, merged by the command and reloaded."""

from pathlib import Path

import pytest
import torch

import mllama
from finetune_digits import prepare
from mllama.api import EMBEDDED
from mllama.cli import main
from mllama.train.settings import load_settings
from training.runs import trained

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")
CONFIG = Path(__file__).parents[2] / "examples/finetune_digits/train.yaml"
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The example's data."""
    folder = tmp_path_factory.mktemp("digits")
    prepare.prepare(folder)
    return folder


def test_the_adapter_is_small_and_merged_is_equal(digits, tmp_path, monkeypatch):
    changes = {"output": str(tmp_path / "run"), "max_steps": 2, "eval_fraction": 0.0, "warmup": 0}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits-data").symlink_to(digits)  # where the config has it
    result = trained(load_settings(CONFIG, changes | {"batch_size": 4, "device": "cpu"}))
    files = {path.stat().st_ino: path.stat().st_size for path in result.trained.iterdir()}
    assert 0.7 * MEGABYTE < sum(files.values()) < MEGABYTE

    words = ["lora", "merge", str(EMBEDDED), str(result.trained), str(tmp_path / "merged")]
    assert main([*words, "--dtype", "float32"]) == 0
    merged, processor = mllama.load(tmp_path / "merged", "float32", "cpu")
    adapted, _ = mllama.load(None, "float32", "cpu", adapter=result.trained)
    base, _ = mllama.load(None, "float32", "cpu")
    batch = mllama.chat_labels(processor, [[image_turn(digits, n), answer()] for n in range(2)])
    logits = [model(**batch).logits for model in (adapted, merged, base)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[2], logits[0], atol=1e-2)
    for number in range(2):
        image = digits / f"images/{number:04}.png"
        asked = [mllama.ask(image, prepare.QUESTION, one, processor) for one in (adapted, merged)]
        assert asked[0] == asked[1]


def image_turn(digits: Path, number: int) -> dict:
    """A question about one of the scans."""
    image = {"type": "image", "path": str(digits / f"images/{number:04}.png")}
    return {"role": "user", "content": [image, {"type": "text", "text": prepare.QUESTION}]}


def answer() -> dict:
    """Any answer."""
    return {"role": "assistant", "content": "7"}
