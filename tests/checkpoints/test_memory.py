"""A load holds the weights once: peak of anonymous memory and weights kept mapped, less the figure
after imports, over the weights.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import LlamaConfig, MllamaConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.files import save_weights, write_json
from mllama.families import FAMILIES
from mllama.hf.config_objects import compose, file_content
from mllama.weights.rows import to_file

BOUND = 1.15
CHILD = """
    import json, re, sys, threading
    import torch
    from mllama import MllamaForConditionalGeneration
    import mllama.checkpoints

    torch.zeros(1) + 1  # what torch allocates on first use is none of the weights'

    def resident(kind):
        return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

    def measure(folder, dtype):
        peak = before = resident("RssAnon")
        read = pages = resident("RssFile")
        done = threading.Event()

        def sample():
            nonlocal peak, read
            while not done.wait(0.001):
                peak, read = max(peak, resident("RssAnon")), max(read, resident("RssFile"))

        thread = threading.Thread(target=sample)
        thread.start()
        model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        done.set()
        thread.join()
        mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".safetensors" in line}
        weights = sum(parameter.nbytes for parameter in model.parameters())
        pages = read - pages
        mapped = sorted(mapped)
        return {"peak": peak - before, "pages": pages, "mapped": mapped, "weights": weights}

    print(json.dumps([measure(folder, dtype) for folder, dtype in json.loads(sys.argv[1])]))
"""

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc"
)


def save_zeros(config, folder, shard: str) -> None:
    """A bfloat16 model of zeros, without making it."""
    weight_map = FAMILIES[config.model_type].weight_map(compose(config))
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    tied = model.get_expanded_tied_weights_keys()
    own = {name: value for name, value in model.state_dict().items() if name not in tied}
    shapes = {name: value.shape for name, value in to_file(weight_map, own).items()}
    folder.mkdir()
    save_weights(
        folder,
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        shard,
    )
    write_json(folder / "config.json", file_content(config)[0])


def measure(*loads: tuple[str, str]) -> list[dict]:
    """What loads of (folder, dtype) take, in a process of their own: {"peak", "pages" of files,
    "weights": bytes, "mapped": names}.
    """
    command = [sys.executable, "-c", textwrap.dedent(CHILD), json.dumps(loads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_load_holds_the_weights_once(tmp_path):
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "vocab_size": 8000,
    }
    save_zeros(
        LlamaConfig(**sizes, num_hidden_layers=6, tie_word_embeddings=True),
        tmp_path / "tied",
        "60MB",
    )
    save_zeros(LlamaConfig(**sizes, num_hidden_layers=2), tmp_path / "untied", "60MB")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 3
    for found in measure((str(tmp_path / "tied"), "auto"), (str(tmp_path / "untied"), "float32")):
        assert found["mapped"] == []
        assert found["weights"] > 190e6 and found["peak"] <= BOUND * found["weights"]


@pytest.mark.skipif(
    os.environ.get("MLLAMA_LARGE_TESTS") != "1",
    reason="writes 2 GB; set MLLAMA_LARGE_TESTS=1 to run it",
)
def test_a_scaled_down_llama_3_2_vision_from_four_shards(tmp_path):
    """Every layer kind of the 11B model, 32 + 8 in the encoder and 40 with 8 that cross."""
    vision = MllamaVisionConfig(
        hidden_size=640,
        intermediate_size=2560,
        attention_heads=8,
        vision_output_dim=6 * 640,
        image_size=448,
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = MllamaTextConfig(
        **ids,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=96000,
    )
    save_zeros(MllamaConfig(vision_config=vision, text_config=text), tmp_path / "model", "600MB")
    try:
        assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
        (found,) = measure((str(tmp_path / "model"), "auto"))
    finally:
        for path in (tmp_path / "model").glob("*.safetensors"):
            path.unlink()
    print(found, found["peak"] / found["weights"])
    assert found["mapped"] == []
    assert found["weights"] > 1.8e9 and found["peak"] <= BOUND * found["weights"]
    assert (
        found["pages"] < 0.35 * found["weights"]
    )  # those of tensors that are done with are given back
