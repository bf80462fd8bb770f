"""Weight files that are absent, broken or disagree with their index."""

import pickle

import pytest

from mllama import MllamaForConditionalGeneration
from mllama.checkpoints import files
from tiny.folders import change


def test_absent_folders_and_files(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        MllamaForConditionalGeneration.from_pretrained(folder)
    (folder / "small.gguf").touch()
    with pytest.raises(FileNotFoundError, match="small.gguf"):
        MllamaForConditionalGeneration.from_pretrained(folder)
    (folder / "small.gguf").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_pickle_is_never_opened(saved):
    folder, _ = saved
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (open, (str(folder / "sprung"), "w"))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        MllamaForConditionalGeneration.from_pretrained(folder)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "[:12]]
)
def test_broken_weight_files_are_refused(content, saved):
    folder, _ = saved
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_a_cut_weight_file_is_refused(saved):
    folder, _ = saved
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        MllamaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "model.bin",
        "a\\b.safetensors",
        "\ud800.safetensors",
        "\0.safetensors",
        f"{'a' * 300}.safetensors",
    ],
)
def test_shard_names_stay_inside_the_folder(shard, sharded):
    change(sharded, lambda c: c["weight_map"].update({"surprise": shard}), files.INDEX)
    with pytest.raises(ValueError, match="inside the folder"):
        MllamaForConditionalGeneration.from_pretrained(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    change(
        sharded,
        lambda c: c["weight_map"].update({"surprise": "model-00001-of-00005.safetensors"}),
        files.INDEX,
    )
    with pytest.raises(ValueError, match="surprise"):
        MllamaForConditionalGeneration.from_pretrained(sharded)
    change(
        sharded,
        lambda c: (
            c["weight_map"].pop("surprise"),
            c["weight_map"].pop("multi_modal_projector.linear_1.bias"),
        ),
        files.INDEX,
    )
    with pytest.raises(ValueError, match="linear_1.bias"):
        MllamaForConditionalGeneration.from_pretrained(sharded)
    change(sharded, lambda c: c.update(weight_map=["x"]), files.INDEX)
    with pytest.raises(ValueError, match="weight_map"):
        MllamaForConditionalGeneration.from_pretrained(sharded)


def test_a_missing_shard_is_a_missing_file(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        MllamaForConditionalGeneration.from_pretrained(sharded)
