"""Scripts in the older style run as they are, on `PYTHONPATH=$(python -m mllama.dropin)`:
`scripts/`, against stock transformers.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from mllama import MllamaImageProcessor, dropin
from mllama.dropin.processing import CLIP_MEAN, CLIP_STD
from mllama.hf.processors.paligemma import PaliGemmaProcessor

HERE = Path(__file__).parent
SCRIPTS = sorted((HERE / "scripts").glob("*.py"))
NEED_METAS_FILE = {"text_generate", "prepend_visual_tokens"}
LLAMA = {
    "vocab_size": 128_256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def metas_file() -> Path | None:
    """Meta's tokenizer.model, out of the llama-models package."""
    try:
        from llama_models.llama3 import tokenizer
    except ImportError:
        return None
    return Path(tokenizer.__file__).parent / "tokenizer.model"


def write_llama(folder: Path) -> None:
    """A tiny Llama 3.2 by stock transformers, with Meta's tokenizer where it is."""
    torch.manual_seed(0)
    tiny.randomize(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    ).save_pretrained(folder)
    if metas_file():
        (folder / "original").mkdir()
        shutil.copy(metas_file(), folder / "original" / "tokenizer.model")


def write_llama_tokenizer(folder: Path) -> None:
    """A tokenizer of Llama 2's kind: bytes and letters."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *map(chr, range(33, 127)),
    ]
    transformers.LlamaTokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]
    ).save_pretrained(folder)


def write_llava(folder: Path, tokenizer) -> None:
    """A tiny SigLIP + Llama by stock transformers."""
    processor = MllamaImageProcessor(tokenizer, tiny.PATCHES, tiny.VISION["image_size"])
    sizes = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 512}
    tiny.twin(tiny.model(text=sizes, image_token_index=processor.image_token_id)).save_pretrained(
        folder
    )
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_tokenizer, family_folder):
    """A folder with what the scripts open."""
    folder = tmp_path_factory.mktemp("workplace")
    Image.effect_mandelbrot((120, 80), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "cat.jpg")
    make_tokenizer(bos=True).save_pretrained(folder / "tokenizer")
    write_llama_tokenizer(folder / "llama-tokenizer")
    write_llama(folder / "Llama-3.2-1B-Instruct")
    write_llava(folder / "hf-model", make_tokenizer(bos=True))
    shutil.copytree(folder / "hf-model", folder / "hf-model-with-leftovers")
    weights = folder / "hf-model-with-leftovers" / "model.safetensors"
    save_file(
        load_file(weights) | {"model.leftover.weight": torch.zeros(3)}, weights, {"format": "pt"}
    )
    (folder / "paligemma").symlink_to(family_folder("paligemma"))
    return folder


@pytest.fixture(scope="module")
def results(workplace):
    """{script's name: what became of it}, all of them run in one go."""
    scripts = [
        str(script) for script in SCRIPTS if metas_file() or script.stem not in NEED_METAS_FILE
    ]
    paths = [dropin.FOLDER, *filter(None, [os.environ.get("PYTHONPATH"), *sys.path[1:]])]
    run = subprocess.run(
        [sys.executable, HERE / "run_scripts.py", *scripts],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def said(results):
    """said(script) -> {what is before a colon in its lines: what comes after}."""

    def read(script: str) -> dict[str, str]:
        if script not in results:
            pytest.skip(
                "llama-models is not installed (--no-deps): there is no tokenizer.model of Meta's"
            )
        result = results[script]
        assert result["code"] == 0, result["err"]
        return dict(line.split(": ", 1) for line in result["out"].splitlines() if ": " in line)

    return read


@pytest.mark.parametrize("script", [script.stem for script in SCRIPTS])
def test_runs_to_its_end(said, script):
    assert "False" not in said(script).values()  # the scripts print what should hold


PRINTED = {
    "vision_forward": {"Vision features": "torch.Size([2, 16, 64])"},
    "minimal_forward": {"Logits": "(1, 24, 500) torch.float16", "Loss": "None"},
    "text_cache_loop": {"cache": "3 [(2, 2, 9, 16), (2, 2, 9, 16)]", "dtype": "torch.bfloat16"},
    "prepend_visual_tokens": {
        "pooled": "(1, 16, 48) -> (1, 4, 32)",
        "learned": "(1, 4, 32)",
        "cached positions": "3",
    },
    "lora_recursive": {"converted": "8", "unexpected": "[]", "trained": "['lora_a', 'lora_b']"},
    # two layers of seven
    "lora_converters": {
        "all linears of the decoder": "14",
        "by name": "4",
        "of the tower too": "8",
    },
    "kv_cache_loop": {"cached items": "7", "layers": "2 (1, 2) 8"},
}


@pytest.mark.parametrize("script", PRINTED)
def test_what_is_printed(said, script):
    assert PRINTED[script].items() <= said(script).items()


def test_images_without_placeholders_and_older_names(said, results):
    assert "pixel_values are not used" in results["minimal_forward"]["err"]
    keys = said("text_cache_loop")["keys"]
    assert "trf_blocks.0.att.W_query.weight" in keys and "cos" not in keys


def test_quick_inference(said):
    printed = said("quick_infer")
    assert printed["image tokens"].startswith("16 ")
    assert printed["pixels"].startswith("(1, 3, 64, 64)")
    assert (
        printed["logits"].endswith(" 2048)") and {f"Image {i}" for i in range(3)} <= printed.keys()
    )


def test_text_generation_is_stock_transformers(said, workplace):
    printed = said("text_generate")
    prompt = torch.tensor([json.loads(printed["prompt ids"])])
    stock = transformers.LlamaForCausalLM.from_pretrained(
        workplace / "Llama-3.2-1B-Instruct", dtype=torch.float32
    )
    expected = stock.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[
        0, prompt.shape[1] :
    ].tolist()
    assert json.loads(printed["greedy ids"]) == expected
    assert len(json.loads(printed["sampled ids"])) == 12
    assert printed["rows"] == str((2, prompt.shape[1] + 3)) and int(printed["stopped after"]) <= 3


def greedy(stock, inputs, count: int = 8) -> list[int]:
    new = stock.generate(
        **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return new[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_folder_of_stock_transformers(said, workplace):
    folder = workplace / "hf-model"
    tokenizer, means = (
        transformers.AutoTokenizer.from_pretrained(folder),
        {"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    )
    processor = MllamaImageProcessor(tokenizer, tiny.PATCHES, tiny.VISION["image_size"], **means)
    inputs = processor(
        ["How many circles?"], [Image.open(workplace / "cat.jpg")], return_tensors="pt"
    )
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    printed, expected = said("load_hf_tolerant"), greedy(stock, inputs)
    assert json.loads(printed["prompt ids"]) == inputs["input_ids"][0].tolist()
    assert json.loads(printed["greedy ids"]) == expected
    strict = said("load_hf_strict")
    assert int(strict["next"]) == expected[0] and strict["leftovers"] == "ValueError True"


def test_a_paligemma_of_stock_transformers(said, workplace):
    folder, printed = workplace / "paligemma", said("paligemma_inference")
    processor = PaliGemmaProcessor.from_pretrained(folder)
    inputs = processor(
        text=["describe"], images=[Image.open(workplace / "cat.jpg")], return_tensors="pt"
    )
    stock = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    expected, ids = greedy(stock, inputs), json.loads(printed["greedy ids"])
    assert ids == expected[: len(ids)]


NAMES = {
    "model": """LLAMA32_CONFIG Tokenizer Llama3Model TransformerBlock GroupQueryAttention
        FeedForward RMSNorm compute_rope_params rope assign load_weights_into_llama generate
        text_to_tokens token_to_text MLLAMAConfig LLAMA32Config
        MllamaForConditionalGeneration Llama3ForCausalLM
        MultiModalProjector KVCache LLAMARMSNorm LLAMARotaryEmbedding Linear_LORA
        convert_linears_to_lora replace_linear_with_lora convert_to_lora""",
    "siglip": """SiglipVisionConfig SiglipModel SiglipVisionEmbedding SiglipVisionEmbeddings
        SiglipAttention SiglipMLP SiglipVisionEncoder SiglipEncoderLayer SiglipEncoder
        SiglipVisionTransformer""",
    "modeling_siglip": "SiglipVisionConfig SiglipVisionModel",
    "processing_mllama": "MllamaImageProcessor",
    "processing_siglip": "paligemmaProcessor",
    "processing_paligemma": "PaliGemmaProcessor",
    "modeling_gemma": """GemmaConfig GemmaForCausalLM PaliGemmaConfig
        PaliGemmaForConditionalGeneration KVCache""",
    "utils": "load_hf_model",
    "Model": "MLLAMAConfig MllamaForConditionalGeneration",
    "Model.utils": "load_hf_model",
    "Tools": "FusedRMSNorm",
    "Tools.rmsnorm": "FusedRMSNorm",
}
PROCESSING = """ IMAGENET_STANDARD_MEAN IMAGENET_STANDARD_STD resize rescale normalize
    process_images add_image_tokens_to_prompts add_image_tokens_to_prompt"""
NAMES |= {name: names + PROCESSING for name, names in NAMES.items() if "processing" in name}
SAME = {
    "llama32_multimodal": "model",
    "Model.model": "model",
    "Model.siglip": "siglip",
    "Model.processing_mllama": "processing_mllama",
}
NAMES |= {name: NAMES[other] for name, other in SAME.items()}


def test_names_where_scripts_look_for_them(run_python, tmp_path):
    lines = [f"from {module} import {', '.join(names.split())}" for module, names in NAMES.items()]
    lines += [
        "import utils, Model.utils, model, Model.model, modeling_gemma",
        "assert utils.load_hf_model is not Model.utils.load_hf_model",
        "assert model.KVCache is modeling_gemma.KVCache is Model.model.KVCache",
        "try: from Tools import FusedSwiGLU",
        "except ImportError: print('falls back')",
    ]
    done = run_python("-c", "\n".join(["import mllama.dropin", *lines]), cwd=tmp_path)
    assert done.stdout == "falls back\n", done.stderr
