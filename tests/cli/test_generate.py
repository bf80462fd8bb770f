"""`mllama generate`."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import mllama
from helpers import answer
from mllama.cli import _parser

IMAGED = ["llava, siglip", "llava, clip", "paligemma", "mllama"]
GREEDY = ["--dtype", "float32", "--cpu", "--max-new-tokens", 12]


@pytest.mark.parametrize("family", ["llama", "gemma", *IMAGED])
def test_both_runtimes_say_the_same(run, family_folder, image_file, family):
    images = ["--image", image_file] if family in IMAGED else []
    command = [
        "generate",
        "--model-id",
        family_folder(family),
        "--prompt",
        "How many circles?",
        *images,
        *GREEDY,
        "--reference",
        "hf",
    ]
    code, out, err = run(*command)
    assert (code, err) == (0, f"mllama: {family_folder(family)} in float32 on cpu\n")
    assert out.strip() == mllama.ask(
        image_file if images else None,
        "How many circles?",
        *mllama.load(family_folder(family), dtype="float32", device="cpu", reference="hf"),
        max_new_tokens=12,
    )
    code, theirs, said = run(*command, "--runtime", "transformers")
    assert (code, theirs) == (0, out) and said.endswith(err)


def test_several_images(run, family_folder, image_file):
    command = [
        "generate",
        "--model-id",
        family_folder("mllama"),
        "--prompt",
        "What changed?",
        *GREEDY,
    ]
    one, two = (run(*command, *["--image", image_file] * count) for count in (1, 2))
    assert one[0] == two[0] == 0 and one[1] != two[1]
    assert (
        run(*command, "--image", image_file, "--image", image_file, "--runtime", "transformers")[0]
        == 0
    )


def test_raw_leaves_the_template_out(run, family_folder):
    folder = family_folder("llama")
    command = ["generate", "--model-id", folder, "--prompt", "a b c", *GREEDY]
    raw, plain = run(*command, "--raw"), run(*command)
    model, tokenizer = mllama.load(folder, dtype="float32", device="cpu")
    inputs = AutoTokenizer.from_pretrained(folder)("a b c", return_tensors="pt")
    assert (
        raw[0] == 0 and raw[1].strip() == answer(model, tokenizer, inputs, max_new_tokens=12).text
    )
    assert raw[1] != plain[1]


def test_the_cache_has_the_dtype_asked_for(run, family_folder):
    for words in (["--raw"], []):
        command = ["generate", "--model-id", family_folder("llama"), "--prompt", "a b c", *GREEDY]
        plain, exact, quantized = (
            run(*command, *words, *more)
            for more in ([], ["--kv-cache", "f32"], ["--kv-cache", "int8"])
        )
        assert exact == plain and quantized[0] == 0 and quantized[1]


def test_do_sample_samples(run, family_folder):
    command = ["generate", "--model-id", family_folder("llama"), "--prompt", "a b c", *GREEDY]
    sampled = {
        run(*command, "--do-sample", "--temperature", "3", "--seed", seed)[1] for seed in range(3)
    }
    assert len(sampled) > 1


@pytest.mark.parametrize("runtime", ["mllama", "transformers"])
def test_timings_of_both_runtimes(run, family_folder, image_file, runtime):
    command = [
        "generate",
        "--model-id",
        family_folder("llava, siglip"),
        "--prompt",
        "a b c",
        *GREEDY,
    ]
    command += ["--image", image_file, "--runtime", runtime, "--timings"]
    said = json.loads(run(*command, "--json")[1])
    timings = said["timings"]
    assert timings["images"] == (runtime == "mllama")
    assert timings["decode_tokens"] == said["tokens"] - 1 and timings["prompt_tokens"] > 3
    assert 0 < timings["prompt_seconds"] < timings["first_token_seconds"] + 2e-6
    assert timings["first_token_seconds"] < timings["total_seconds"]
    lines = run(*command)[2].splitlines()[-6:]
    assert f"{timings['prompt_tokens']} tokens" in lines[2]


def test_without_a_model_it_is_the_embedded_one(run, image_file):
    code, out, err = run(
        "generate", "--prompt", "How many circles?", "--image", image_file, *GREEDY
    )
    assert code == 0 and out.strip() and "the embedded model" in err


def test_sizes_are_ids(run, monkeypatch):
    asked = []

    def load(path, *others, **options):
        asked.append(path)
        raise FileNotFoundError(f"{path} is gated")

    monkeypatch.setattr("mllama.cli._answering.open_session", load)
    assert [run("generate", "--size", size, "--prompt", "a")[0] for size in _parser.SIZES] == [
        2
    ] * 4
    assert (
        asked == list(_parser.SIZES.values())
        and asked[-1] == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-id", "LLAMA"], "required: --prompt"),
        (["--model-id", "LLAMA", "--prompt", " "], "--prompt"),
        (
            ["--model-id", "LLAMA", "--prompt", "a", "--size", "1B"],
            "not allowed with argument --model-id",
        ),
        (["--size", "2B", "--prompt", "a"], "invalid choice: '2B'"),
        (["--model-id", "LLAMA", "--prompt", "a", "--image", "nowhere.png"], "nowhere.png"),
        (["--model-id", "LLAMA", "--prompt", "a", "--image", "IMAGE"], "this model takes no"),
        (
            ["--model-id", "LLAMA", "--prompt", "a", "--image", "IMAGE", "--raw"],
            "this model takes no",
        ),
        (["--model-id", "nowhere", "--prompt", "a"], "nowhere"),
        (["--model-id", "some/where", "--prompt", "a"], "no folder 'some/where' here"),
        (["--model-id", "LLAMA", "--prompt", "a", "--top-p", "0"], "above 0"),
        (["--model-id", "SIGLIP", "--prompt", "a"], "a SigLIP vision model has no decoder"),
        (
            ["--prompt", "a", "--runtime", "transformers", "--kv-cache", "int8"],
            "--kv-cache needs --runtime mllama",
        ),
        (
            ["--model-id", "LLAMA", "--prompt", "a", "--device", "cpu", "--gpu-layers", "1"],
            "gpu_layers needs a CUDA device",
        ),
        (
            ["--model-id", "SIGLIP", "--prompt", "a", "--raw", "--runtime", "transformers"],
            "a SigLIP vision model has no decoder",
        ),
        (
            ["--model-id", "IMAGE", "--prompt", "a"],
            "circle.png is neither a model folder nor a .gguf file",
        ),
    ],
)
def test_generate_refuses(run, family_folder, image_file, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = {
        "LLAMA": family_folder("llama"),
        "SIGLIP": family_folder("siglip"),
        "IMAGE": image_file,
    }
    code, out, err = run("generate", *(given.get(argument, argument) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_transformers_makes_nothing_up(run, family_folder, tmp_path):
    shutil.copytree(family_folder("llama"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.0.mlp.down_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    code, out, err = run(
        "generate", "--model-id", tmp_path, "--prompt", "a", "--runtime", "transformers"
    )
    assert (code, out, err.count("\n")) == (
        2,
        "",
        1,
    ) and "missing (1): model.layers.0.mlp.down_proj.weight" in err
