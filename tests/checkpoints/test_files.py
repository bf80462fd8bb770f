"""Writing a folder: whole or not at all, over an older one too."""

import json
import stat

import pytest
import torch

import tiny
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints import files
from mllama.hf import checkpoints
from tiny.folders import logits


def test_saving_again_leaves_no_older_weights_and_keeps_other_files(tmp_path):
    model = tiny.model()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for shard in ("100KB", "5GB", "150KB", "100KB"):
        model.save_pretrained(folder, max_shard_size=shard)
        assert torch.equal(
            logits(MllamaForConditionalGeneration.from_pretrained(folder)), logits(model)
        )
        weights = {path.name for path in folder.glob("*.safetensors")}
        index = folder / files.INDEX
        assert weights == (
            set(json.loads(index.read_text())["weight_map"].values())
            if index.exists()
            else {"model.safetensors"}
        )
    assert {path.name for path in folder.iterdir()} - weights == {
        "tokenizer.json",
        "config.json",
        "generation_config.json",
        files.INDEX,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("exists", [False, True], ids=["a new folder", "over an older model"])
def test_a_save_that_fails_changes_nothing(exists, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if exists:
        tiny.model().save_pretrained(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(path, *args):
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.model(seed=1).save_pretrained(folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert folder.exists() is exists


def interrupt(monkeypatch, after, times):
    """Have the renames of a save fail: the first `after` are done, the next `times` raise."""
    replace, calls = files.os.replace, []

    def replace_or_raise(source, target):
        calls.append(target)
        if after < len(calls) <= after + times:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replace_or_raise)


@pytest.mark.parametrize("after", [0, 1, 3, 7, 8, 9, 12])
def test_an_interrupt_between_the_renames_leaves_the_older_model(after, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder, max_shard_size="100KB")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    interrupt(monkeypatch, after, times=1)
    with pytest.raises(KeyboardInterrupt):
        tiny.model(seed=1).save_pretrained(folder, max_shard_size="100KB")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path for path in folder.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("fails", [False, True], ids=["when all is written", "after an error"])
def test_an_interrupt_of_the_removal_leaves_nothing_hidden(fails, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    rmtree = files.shutil.rmtree

    def interrupted(path, **options):
        monkeypatch.setattr(files.shutil, "rmtree", rmtree)
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    def write(aside):
        (aside / "model.safetensors").write_bytes(b"half")
        (aside / "config.json").write_bytes(b"{}")
        if fails:
            raise OSError("disk full")

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_folder(folder, write)
    assert not list(folder.glob(".*"))


def test_the_older_weights_are_kept_aside_where_they_cannot_be_put_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    interrupt(monkeypatch, after=4, times=100)
    with pytest.raises(KeyboardInterrupt):
        tiny.model(seed=1).save_pretrained(folder)
    with pytest.raises(FileNotFoundError):
        MllamaForConditionalGeneration.from_pretrained(folder)
    (kept,) = folder.glob(".*-old/model.safetensors")
    assert kept.read_bytes() == before


def test_what_is_saved_has_ordinary_permissions(saved):
    folder, _ = saved
    other = folder.parent / "other"
    other.mkdir()
    (other / "file").touch()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        stat.S_IMODE((other / "file").stat().st_mode)
    }


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        tiny.model().save_pretrained(tmp_path / "model")
