"""What the tests of the command line share."""

import io
import sys

import pytest

import mllama
from mllama import api, cli


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments, stdin="") -> (exit code, stdout, stderr); stdin is text, or bytes to be
    decoded.
    """
    monkeypatch.setenv("TQDM_DISABLE", "")

    def main(*arguments, stdin: str | bytes = "") -> tuple[int, str, str]:
        stream = (
            io.StringIO(stdin)
            if isinstance(stdin, str)
            else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        )
        monkeypatch.setattr(sys, "stdin", stream)
        api._say.cache_clear()
        capsys.readouterr()  # what fixtures wrote
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return main


@pytest.fixture(scope="module")
def loaded(model_folder):
    return mllama.load(model_folder, dtype="float32", device="cpu")


@pytest.fixture
def options(model_folder):
    return ["--model", model_folder, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 8]
