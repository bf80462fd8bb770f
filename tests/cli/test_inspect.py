"""`mllama inspect`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import mllama
import tiny
from mllama.checkpoints.meta.reader import text_weight_map
from mllama.families import compose
from mllama.weights.rows import to_file

METAS = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def change(folder, **changed) -> None:
    """Put other tensors in a folder's weights; None takes one away."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_sound_folder(run, model_folder):
    code, out, err = run("inspect", model_folder, "--json")
    said = json.loads(out)
    model = mllama.MllamaForConditionalGeneration.from_pretrained(model_folder)
    assert (code, err, said["loads"], said["missing"], said["unexpected"]) == (0, "", True, [], [])
    assert said["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert set(said["parameters"]) == {
        "vision encoder",
        "projector",
        "embeddings",
        "decoder",
        "head",
        "total",
    }
    assert said["memory"]["weights"] == 4 * said["parameters"]["total"]
    assert said["work"] == {"context": 512, "batch": 1, "tiles": 1, "dtype": "float32"}
    assert said["sizes"]["features of a row's images"] == tiny.PATCHES
    code, out, err = run("inspect", model_folder)
    assert (
        (code, err) == (0, "")
        and "loads: every tensor has its place" in out
        and f"{said['parameters']['total']:,}" in out
    )


@pytest.mark.parametrize(
    ("options", "made_of"),
    [
        (
            {"fusion": "prepend", "image_pooling": "learned"},
            "siglip vision encoder + learned pooling + mlp projector + 2-layer decoder",
        ),
        (
            {"fusion": "cross_attention", "cross_attention_every": 1, "projector": "linear"},
            "siglip vision encoder + linear projector + 4-layer decoder, 2 of them cross-attention",
        ),
    ],
)
def test_other_fusions(run, options, made_of, tmp_path):
    tiny.model(**options).save_pretrained(tmp_path)
    code, out, _ = run("inspect", tmp_path, "--json")
    said = json.loads(out)
    assert (code, said["made of"]) == (0, made_of)
    assert (
        ("cross layers" in said["parameters"])
        == ("cross-attention keys and values" in said["memory"])
        == ("cross" in made_of)
    )


def test_what_is_asked_decides_the_memory(run, model_folder):
    plain, asked = (
        json.loads(run("inspect", model_folder, "--json", *options)[1])["memory"]
        for options in ((), ("--context", 1024, "--batch", 3, "--tiles", 2, "--dtype", "bfloat16"))
    )
    assert asked["weights"] * 2 == plain["weights"]
    assert asked["key-value cache"] == plain["key-value cache"] * 2 * 3 // 2
    assert asked["vision activations"] == plain["vision activations"] * 2 * 3 // 2
    assert asked["total"] == sum(size for part, size in asked.items() if part != "total")


def test_what_would_not_load_is_told_from_headers(run, folder):
    names = list(load_file(folder / "model.safetensors"))
    gone, bent = (
        next(name for name in names if name.endswith(end))
        for end in ("layers.1.mlp.up_proj.weight", "model.norm.weight")
    )
    change(folder, **{gone: None, bent: torch.zeros(3), "stray.weight": torch.zeros(1)})
    code, out, err = run("inspect", folder, "--json")
    said = json.loads(out)
    assert (code, err, said["loads"], said["missing"], said["unexpected"]) == (
        1,
        "",
        False,
        [gone],
        ["stray.weight"],
    )
    assert (
        len(said["of another shape or kind"]) == 1 and bent in said["of another shape or kind"][0]
    )
    code, out, err = run("inspect", folder)
    assert (
        (code, err) == (1, "")
        and f"missing (1): {gone}" in out
        and "unexpected (1): stray.weight" in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["FOLDER", "--context", "0"], "a whole number of at least 1"),
        (["FOLDER", "--tiles", "-1"], "a whole number of at least 0"),
        (["FOLDER", "--model", "FOLDER"], "not allowed with"),
    ],
)
def test_inspect_refuses(run, model_folder, arguments, message):
    code, out, err = run(
        "inspect", *(model_folder if argument == "FOLDER" else argument for argument in arguments)
    )
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_config_that_wants_more_layers_than_the_files_have_is_refused_before_they_are_built(
    run, folder
):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    for command in ("inspect", "verify"):
        code, out, err = run(command, folder)
        assert (code, out, err.count("\n")) == (2, "", 1) and "num_hidden_layers" in err


def test_a_config_alone_says_the_sizes(run, folder, family_folder):
    whole = json.loads(run("inspect", folder, "--json")[1])
    (folder / "model.safetensors").unlink()
    code, out, _ = run("inspect", "--model", folder, "--json")
    said = json.loads(out)
    assert (code, said["loads"]) == (0, None) and all(
        said[name] == whole[name] for name in ("sizes", "parameters", "memory")
    )
    assert "no weights" in run("inspect", folder)[1]
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = run("inspect", folder)
    assert (code, out, err.count("\n")) == (2, "", 1) and "num_hidden_layers" in err


@pytest.mark.parametrize(("family", "option"), [("llama", "--tiles"), ("siglip", "--context")])
def test_sizes_of_what_a_model_lacks_are_refused(run, family_folder, family, option):
    code, out, err = run("inspect", family_folder(family), option, 1)
    assert (code, out, err.count("\n")) == (2, "", 1) and option in err


def test_metas_own_folder(run, tmp_path):
    params = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 300,
        "multiple_of": 32,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (tmp_path / "params.json").write_text(json.dumps(params))
    model = mllama.MllamaForConditionalGeneration(LlamaConfig(**METAS))
    torch.save(
        to_file(text_weight_map(compose(model.config.to_dict())), model.state_dict()),
        tmp_path / "consolidated.00.pth",
    )
    code, out, _ = run("inspect", tmp_path, "--json")
    said = json.loads(out)
    assert (code, said["family"], said["read as"]) == (
        0,
        "llama",
        {"float32": said["parameters"]["total"]},
    )
    code, out, _ = run("verify", tmp_path)
    assert code == 0 and "stock transformers does not read" in out and out.count(" ok") == 2


def test_a_gguf_file(run, family_folder, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate", reason="transformers reads no GGUF without it")
    code, _, err = run(
        "convert", family_folder("llama"), tmp_path / "llama.gguf", "--to", "gguf", "--dtype", "f16"
    )
    assert (code, err) == (0, "")
    code, out, _ = run("inspect", tmp_path / "llama.gguf", "--json")
    said = json.loads(out)
    assert (code, said["family"], said["loads"], said["work"]["dtype"]) == (
        0,
        "llama",
        True,
        "float16",
    )
    code, out, _ = run("verify", tmp_path)
    assert code == 0 and "layer 1" in out
    code, out, _ = run(
        "chat",
        "--model",
        tmp_path / "llama.gguf",
        "--max-new-tokens",
        8,
        stdin="How many circles?\n",
    )
    assert code == 0 and out.strip()


def test_packed_weights_and_blocks_count_by_type(run, family_folder, tmp_path):
    """A tied model's; layers are 64 and 96 wide, and the vocabulary's rows go by sixteens."""
    pytest.importorskip("gguf")
    source, packed, blocks = family_folder("llama"), tmp_path / "packed", tmp_path / "m.gguf"
    assert run("quantize", source, packed, "--no-report")[0] == 0
    assert run("convert", source, blocks, "--to", "gguf", "--dtype", "q8_0")[0] == 0
    dense, found, file = (
        json.loads(run("inspect", path, "--json")[1]) for path in (source, packed, blocks)
    )
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    norms, rows = 5 * 64, dense["sizes"]["vocab_size"]
    assert dense["stored"] == {
        "embeddings": {"f32": 4 * rows * 64},
        "decoder": {"f32": 4 * (linear + norms)},
    }
    model = mllama.MllamaForConditionalGeneration.from_pretrained(packed)
    four_bits = sum(
        layer.packed.nbytes for layer in model.modules() if getattr(layer, "packing", "") == "int4"
    )
    eight_bits = -(-rows // 16) * 2 * 544
    assert found["stored"] == {
        "embeddings": {"int8": eight_bits},
        "decoder": {"int4": four_bits, "f32": 4 * norms},
    }
    assert found["memory"]["weights"] == four_bits + eight_bits + 4 * norms
    assert found["parameters"] == dense["parameters"] and found["loads"]
    assert file["stored"]["decoder"] == {"q8_0": linear * 34 // 32, "f32": 4 * norms}


def test_pickled_weights_are_named(run, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, text, error = run("inspect", folder)
    problem = "pytorch_model.bin is a pickle, which is never opened"
    assert (code, error) == (1, "") and f"would not load:\n  {problem}" in text
    with pytest.raises(FileNotFoundError, match=problem):
        mllama.load(folder)
    code, text, _ = run("inspect", folder, "--json")
    said = json.loads(text)
    assert (code, said["loads"], said["pickles"]) == (1, False, ["pytorch_model.bin"])
