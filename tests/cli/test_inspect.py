"""`mllama inspect`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllama
import twins


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
    assert set(said["parameters"]) == {"tower", "projector", "embeddings", "decoder", "head", "total"}
    assert said["memory"]["weights"] == 4 * said["parameters"]["total"]
    assert said["work"] == {"context": 512, "batch": 1, "tiles": 1, "dtype": "float32"}
    assert said["sizes"]["features of a row's pictures"] == twins.PATCHES
    code, out, err = run("inspect", model_folder)
    assert (code, err) == (0, "") and "loads: every tensor has its place" in out and f"{said['parameters']['total']:,}" in out


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
    gone, bent = (next(name for name in names if name.endswith(end)) for end in ("layers.1.mlp.up_proj.weight", "model.norm.weight"))
    change(folder, **{gone: None, bent: torch.zeros(3), "stray.weight": torch.zeros(1)})
    code, out, err = run("inspect", folder, "--json")
    said = json.loads(out)
    assert (code, err, said["loads"], said["missing"], said["unexpected"]) == (1, "", False, [gone], ["stray.weight"])
    assert len(said["of another shape or kind"]) == 1 and bent in said["of another shape or kind"][0]
    code, out, err = run("inspect", folder)
    assert (code, err) == (1, "") and f"missing (1): {gone}" in out and "unexpected (1): stray.weight" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["FOLDER", "--context", "0"], "a whole number of at least 1"),
        (["FOLDER", "--tiles", "-1"], "a whole number of at least 0"),
    ],
)
def test_inspect_refuses(run, model_folder, arguments, message):
    code, out, err = run("inspect", *(model_folder if argument == "FOLDER" else argument for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
