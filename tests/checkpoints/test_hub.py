"""Models by their hub id, without a network: what is asked of huggingface_hub, its cache's layout,
and every refusal in one line.
"""

import os

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import tiny
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints import hub

try:  # huggingface_hub's client, from its release 2 on
    import httpx2 as httpx
except ImportError:
    import httpx

REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path):
    """A cache folder as huggingface_hub lays it out, with org/name in it; and the model."""
    model = tiny.model()
    model.save_pretrained(tmp_path / "files", max_shard_size="100KB")
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = repository / "snapshots" / REVISION
    for folder in (
        repository / "blobs",
        repository / "refs",
        snapshot,
        tmp_path / "cache" / "blobs" / "ab",
    ):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted((tmp_path / "files").iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if number % 2:  # as files that models share are laid out
            os.replace(file, tmp_path / "cache" / "blobs" / "ab" / blob.name)
            blob.symlink_to(f"../../blobs/ab/{blob.name}")
        else:
            os.replace(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return tmp_path / "cache", snapshot, model


def same(loaded, model) -> bool:
    return all(
        torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items()
    )


def test_a_cached_model_is_loaded_by_its_id(cache):
    folder, snapshot, model = cache
    assert same(
        MllamaForConditionalGeneration.from_pretrained(
            "org/name", cache_dir=folder, local_files_only=True
        ),
        model,
    )
    assert same(MllamaForConditionalGeneration.from_pretrained(snapshot), model)


def test_a_link_out_of_the_cache_is_refused(cache):
    folder, snapshot, _ = cache
    outside = folder.parent / "config.json"
    outside.write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside)
    with pytest.raises(ValueError, match="outside the folder"):
        MllamaForConditionalGeneration.from_pretrained(
            "org/name", cache_dir=folder, local_files_only=True
        )


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    model = tiny.model()
    model.save_pretrained(tmp_path / "fetched" / "inner")
    asked = {}
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda name, **options: asked.update(name=name, **options) or str(tmp_path / "fetched"),
    )
    options = {
        "revision": "main",
        "cache_dir": tmp_path,
        "token": "secret",
        "local_files_only": False,
        "force_download": True,
    }
    loaded = MllamaForConditionalGeneration.from_pretrained(
        "org/name", subfolder="inner", **options
    )
    assert same(loaded, model)
    patterns = asked.pop("allow_patterns")
    assert asked == {"name": "org/name", "ignore_patterns": ["original/*"], **options}
    assert "inner/*.safetensors" in patterns and "inner/*.json" in patterns
    assert not any(
        pattern.endswith(kind)
        for pattern in hub.PATTERNS
        for kind in ("bin", "pt", "pth", "h5", "*")
    )


def test_a_local_folder_of_that_name_wins(tmp_path, monkeypatch):
    model = tiny.model()
    model.save_pretrained(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", None)
    assert same(MllamaForConditionalGeneration.from_pretrained("org/name"), model)


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            GatedRepoError("long\ntext", response=RESPONSE),
            "accept its license at https://huggingface.co/org/name and log in",
        ),
        (
            RepositoryNotFoundError("long\ntext", response=RESPONSE),
            "no folder 'org/name' here, .* accept its license .* and log in",
        ),
        (RevisionNotFoundError("long\ntext", response=RESPONSE), "no revision 'v9'"),
        (LocalEntryNotFoundError("long\ntext"), "offline"),
        (httpx.ProxyError("long\ntext"), "cannot be fetched from the hub: ProxyError long text"),
    ],
)
def test_refusals_are_one_line(error, said, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=said) as caught:
        MllamaForConditionalGeneration.from_pretrained("org/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_offline_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="offline"):
        MllamaForConditionalGeneration.from_pretrained(
            "org/name", cache_dir=tmp_path, local_files_only=True
        )


@pytest.mark.parametrize(
    "path", ["nowhere", "./org/name", "../name", "org/name/more", "/org/name", "org/..", "a\nb/c"]
)
def test_what_is_no_id_is_a_path(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError):
        MllamaForConditionalGeneration.from_pretrained(path)


def test_an_empty_path_is_not_the_current_folder(saved, monkeypatch):
    monkeypatch.chdir(saved[0])
    with pytest.raises(ValueError, match="path is empty"):
        MllamaForConditionalGeneration.from_pretrained("")


def test_an_id_the_hub_refuses_is_a_value_error(tmp_path):
    with pytest.raises(HFValidationError):  # a ValueError
        MllamaForConditionalGeneration.from_pretrained(
            "org--x/na..me", cache_dir=tmp_path, local_files_only=True
        )
