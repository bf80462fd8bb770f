"""Every option of every command is read by it: none is accepted and ignored."""

import argparse

import pytest

from mllama.cli import _parser

TRAINING = ["--max-steps", "1", "--rank", "2", "--dtype", "float32"]
TEXT = ["--dtype", "float32", "--max-new-tokens", "2"]


class Recorder(argparse.Namespace):
    """Arguments that remember which of them were read."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(**vars(arguments))
        super().__setattr__("read", set())

    def __getattribute__(self, name: str):
        if not name.startswith("_") and name != "read":
            super().__getattribute__("read").add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ask", ["IMAGE", "a", "--model", "MLLAMA", *TEXT]),
        ("chat", ["IMAGE", "--model", "MLLAMA", *TEXT]),
        ("generate", ["--prompt", "a", "--image", "IMAGE", "--model", "MLLAMA", *TEXT]),
        ("download", ["some/where", "TARGET"]),
        ("convert", ["LLAMA", "TARGET", "--to", "hf"]),
        ("quantize", ["LLAMA", "TARGET"]),
        ("inspect", ["LLAMA"]),
        ("verify", ["MLLAMA"]),
        ("train", ["--data", "ROWS", "--output", "TARGET", "--model", "LLAMA", *TRAINING]),
        ("plan", ["--data", "ROWS", "--model", "LLAMA", "--memory", "64GB", *TRAINING]),
        ("eval", ["ROWS", "--model", "LLAMA", *TEXT]),
        ("info", []),
    ],
)
def test_every_option_is_read(
    run, family_folder, image_file, monkeypatch, tmp_path, command, words
):
    commands = _parser.build_parser()._subparsers._group_actions[0].choices
    assert set(commands) == {
        "ask",
        "chat",
        "generate",
        "download",
        "convert",
        "quantize",
        "lora",
        "inspect",
        "inspect-labels",
        "verify",
        "plan",
        "train",
        "eval",
        "info",
    }
    recorded = []
    parse = _parser.Parser.parse_args
    monkeypatch.setattr(
        _parser.Parser,
        "parse_args",
        lambda self, *args: recorded.append(Recorder(parse(self, *args))) or recorded[-1],
    )
    monkeypatch.setattr("mllama.cli.download.download", lambda *args, **kwargs: tmp_path)
    given = {
        "LLAMA": family_folder("llama"),
        "MLLAMA": family_folder("mllama"),
        "TARGET": tmp_path / "new",
        "IMAGE": image_file,
        "ROWS": tmp_path / "rows.jsonl",
    }
    given["ROWS"].write_text('{"question": "a", "answer": "b"}\n')
    assert run(command, *(given.get(word, word) for word in words), stdin="a\n")[0] == 0
    options = {action.dest for action in commands[command]._actions} - {"help"}
    assert options and options - recorded[0].read == set()


@pytest.mark.parametrize("spelling", ["--model", "--model-id"])
def test_every_command_takes_a_model_in_either_spelling(spelling):
    parser = _parser.build_parser()
    words = {
        "ask": ["a", spelling, "x"],
        "chat": [spelling, "x"],
        "generate": ["--prompt", "a", spelling, "x"],
        "download": [spelling, "x", "to"],
        "convert": [spelling, "x", "to", "--to", "hf"],
        "quantize": [spelling, "x", "to"],
        "inspect": [spelling, "x"],
        "verify": [spelling, "x"],
        "eval": ["rows.jsonl", spelling, "x"],
    }
    names = {
        "download": "id",
        "convert": "source",
        "quantize": "source",
        "inspect": "folder",
        "verify": "folder",
    }
    for command, given in words.items():
        found = parser.parse_args([command, *given])
        assert getattr(found, names.get(command, "model")) == "x"
        assert getattr(found, "target", getattr(found, "folder", "x")) in ("x", "to")
