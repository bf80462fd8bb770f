"""`mllama download`."""

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError


def test_files_go_into_the_folder(run, monkeypatch, tmp_path):
    asked = {}

    def fetch(model_id, **options):
        asked.update(options, model_id=model_id)
        return options["local_dir"]

    monkeypatch.setattr("mllama.checkpoints.hub.model_info", lambda model_id, **options: None)
    monkeypatch.setattr("mllama.checkpoints.hub.snapshot_download", fetch)
    code, out, err = run("download", "some/where", tmp_path)
    assert (code, out, err) == (0, f"{tmp_path}\n", "")
    assert (asked["model_id"], asked["local_dir"]) == ("some/where", str(tmp_path))
    assert {"*.json", "*.safetensors", "tokenizer.model"} <= set(asked["allow_patterns"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [(GatedRepoError, "is gated: accept its license"), (RepositoryNotFoundError, "no such model")],
)
def test_gated_and_missing_models_are_one_line_that_says_what_to_do(
    run, monkeypatch, tmp_path, kind, message
):
    class Response:
        headers, status_code, request = {}, 403, None

    def fetch(model_id, **options):
        raise kind("403", response=Response())

    monkeypatch.setattr("mllama.checkpoints.hub.model_info", lambda model_id, **options: None)
    monkeypatch.setattr("mllama.checkpoints.hub.snapshot_download", fetch)
    for arguments in (
        ["download", "some/where", tmp_path / "new"],
        ["generate", "--model-id", "some/where", "--prompt", "a"],
    ):
        code, out, err = run(*arguments)
        assert (
            (code, out, err.count("\n")) == (2, "", 1)
            and message in err
            and "license" in err
            and "log in" in err
        )
        assert ("no folder" in err) == (
            arguments[0] == "generate" and kind is RepositoryNotFoundError
        )
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_not_taken_for_the_model(run, monkeypatch, tmp_path):
    (tmp_path / "notes.txt").write_text("of something else")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        code, out, err = run("download", "some/where", tmp_path)
        assert (code, out, err.count("\n")) == (2, "", 1) and "offline" in err

    def refuse(model_id, **options):
        raise RepositoryNotFoundError("401", response=Response())

    class Response:
        headers, status_code, request = {}, 401, None

    monkeypatch.setattr("mllama.checkpoints.hub.model_info", refuse)
    monkeypatch.setattr(
        "mllama.checkpoints.hub.snapshot_download", lambda model_id, **options: options["local_dir"]
    )
    code, out, err = run("download", "some/where", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1) and "no such model on the hub" in err
