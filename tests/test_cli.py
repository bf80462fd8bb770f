"""The command line: what it prints, what it refuses and how it ends."""

import io
import json
import os
import subprocess
import sys

import pytest

import mllama
from mllama import api, cli


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments, stdin="") -> (exit code, stdout, stderr); stdin is text, or bytes to be decoded."""
    monkeypatch.setenv("TQDM_DISABLE", "")

    def main(*arguments, stdin: str | bytes = "") -> tuple[int, str, str]:
        stream = io.StringIO(stdin) if isinstance(stdin, str) else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        api._say.cache_clear()
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


def test_ask_streams_the_answer(run, loaded, options, picture_file, model_folder):
    code, out, err = run("ask", picture_file, "How many circles?", *options)
    assert (code, out.strip()) == (0, mllama.ask(picture_file, "How many circles?", *loaded, max_new_tokens=8))
    assert err == f"mllama: {model_folder} in float32 on cpu\n"


def test_ask_json_is_one_object(run, loaded, options, picture_file, model_folder):
    code, out, _ = run("ask", picture_file, "How many circles?", "--json", *options)
    said = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and said.pop("seconds") > 0 and 1 <= said.pop("tokens") <= 8
    assert said == {
        "picture": str(picture_file),
        "question": "How many circles?",
        "answer": mllama.ask(picture_file, "How many circles?", *loaded, max_new_tokens=8),
        "model": str(model_folder),
        "dtype": "float32",
        "device": "cpu",
    }


def test_a_seed_repeats_a_sampled_answer(run, options, picture_file):
    sampled = ["ask", picture_file, "How many?", "--temperature", "3", "--top-k", "200", "--top-p", "0.99", *options]
    first, again, other = (run(*sampled, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_chat_answers_in_the_light_of_what_was_said(run, loaded, options, picture_file):
    first = api.answer(*loaded, api.encode(loaded[1], picture_file, "How many circles?"), max_new_tokens=8).text
    turns = [("How many circles?", first)]
    second = api.answer(*loaded, api.encode(loaded[1], picture_file, "a b c", turns), max_new_tokens=8).text
    code, out, _ = run("chat", picture_file, *options, stdin="How many circles?\n\n a b c \n/exit\nWhat colour?\n")
    assert (code, [line.strip() for line in out.splitlines()]) == (0, [first, second])


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(run, options, picture_file):
    code, _, err = run("chat", picture_file, *options, stdin=f"{'a b c d ' * 20}\n" * 8)
    assert (code, err.count("\n")) == (0, 1)


def test_info(run):
    code, out, err = run("info")
    assert (code, err) == (0, "") and f"mllama:           {mllama.__version__}\n" in out
    code, out, err = run("info", "--json")
    assert (code, err) == (0, "")
    assert {"mllama", "torch", "cpu", "kernels", "cuda", "embedded model"} <= json.loads(out).keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["look"], "invalid choice: 'look'"),
        (["ask"], "required: PICTURE, QUESTION"),
        (["ask", "picture.png", " "], "QUESTION: must not be empty"),
        (["ask", "nowhere.png", "?"], "no such picture: nowhere.png"),
        (["ask", __file__, "?"], "cannot read the picture"),
        (["chat", "nowhere.png"], "no such picture: nowhere.png"),
        (["ask", "PICTURE", "?", "--model", "nowhere"], "'nowhere'"),
        (["ask", "PICTURE", "?", "--device", "abacus"], "device 'abacus' is not known or not here"),
        (["ask", "PICTURE", "?", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["ask", "PICTURE", "?", "--max-new-tokens", "0"], "a whole number of at least 1, got '0'"),
        (["ask", "PICTURE", "?", "--max-new-tokens", "many"], "a whole number of at least 1, got 'many'"),
        (["ask", "PICTURE", "?", "--max-new-tokens", "+-5"], "a whole number of at least 1, got '+-5'"),
        (["ask", "PICTURE", "?", "--max-new-tokens", "9" * 5000], "a whole number of at least 1, got '9999"),
        (["ask", "PICTURE", "\udcff"], "the question is no valid UTF-8 text"),
        (["ask", "PICTURE", "what <image>?"], "the question must not contain '<image>'"),
        (["ask", "PICTURE", "a b c d " * 2000], "answer included"),
        (["ask", "PICTURE", "?", "--model", ""], "path is empty"),
        (["ask", "PICTURE", "?", "--device", "cpu:1"], "device 'cpu:1' is not known or not here"),
        (["ask", "PICTURE", "?", "--temperature", "-0.5"], "a number of at least 0, got '-0.5'"),
        (["ask", "PICTURE", "?", "--temperature", "nan"], "a number of at least 0, got 'nan'"),
        (["ask", "PICTURE", "?", "--temperature", "inf"], "a number of at least 0, got 'inf'"),
        (["ask", "PICTURE", "?", "--top-p", "0"], "a number above 0 and at most 1, got '0'"),
        (["ask", "PICTURE", "?", "--top-p", "1.5"], "a number above 0 and at most 1, got '1.5'"),
        (["ask", "PICTURE", "?", "--top-k", "2.5"], "a whole number of at least 1, got '2.5'"),
        (["ask", "PICTURE", "?", "--seed", "-1"], "a whole number of at least 0"),
        (["info", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_what_is_refused_is_told_in_one_line(run, picture_file, arguments, message):
    code, out, err = run(*(picture_file if argument == "PICTURE" else argument for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("mllama") and message in err


def test_a_long_error_is_cut_to_a_line(run, monkeypatch, picture_file):
    monkeypatch.setattr("mllama.cli.ask.run", lambda arguments: (_ for _ in ()).throw(ValueError("missing:\n" + "weight\n" * 1000)))
    code, _, err = run("ask", picture_file, "?")
    assert (code, err.count("\n")) == (2, 1) and err.endswith(" ...\n") and len(err) < 1100


def test_an_error_nobody_foresaw_is_told_in_one_line_unless_asked_for_whole(run, monkeypatch, picture_file):
    monkeypatch.setattr("mllama.cli.ask.run", lambda arguments: (_ for _ in ()).throw(RuntimeError("out of memory\nat 3")))
    assert run("ask", picture_file, "?") == (2, "", "mllama: error: RuntimeError: out of memory at 3\n")
    monkeypatch.setenv("MLLAMA_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        run("ask", picture_file, "?")


def test_a_bad_question_does_not_end_the_chat(run, options, picture_file):
    _, plain, _ = run("chat", picture_file, *options, stdin="How many circles?\na b c\n")
    bad = f"what <image>?\n{'a b c d ' * 2000}\nwhat \udcff?\n"
    code, out, err = run("chat", picture_file, *options, stdin=f"How many circles?\n{bad}a b c\n")
    assert (code, out) == (0, plain)
    _, placeholder, length, text = err.splitlines()
    assert "must not contain '<image>'" in placeholder and "answer included" in length and "no valid UTF-8" in text


def test_a_chat_goes_on_after_bytes_that_are_no_text(run, options, picture_file):
    code, out, err = run("chat", picture_file, *options, stdin=b"\xff\nHow many?\n")
    assert code == 0 and out.strip() and "no valid UTF-8" in err


def test_json_is_ascii(run, options, picture_file, tmp_path):
    named = tmp_path / "Bild-é.png"
    named.write_bytes(picture_file.read_bytes())
    code, out, _ = run("ask", named, "How many?", "--json", *options)
    assert code == 0 and out.isascii() and json.loads(out)["picture"] == str(named)


@pytest.mark.parametrize(
    ("redirection", "arguments", "code", "message"),
    [
        ("<&-", ["chat", "PICTURE"], 2, "mllama: error: stdin is closed: there are no questions to read\n"),
        (">&-", ["ask", "PICTURE", "?"], 2, "mllama: error: stdout is closed\n"),
        ("2>&-", ["ask", "nowhere.png", "?"], 2, ""),
    ],
)
def test_closed_streams(picture_file, redirection, arguments, code, message):
    command = [sys.executable, "-m", "mllama", *(str(picture_file) if argument == "PICTURE" else argument for argument in arguments)]
    ended = subprocess.run(["sh", "-c", f'exec "$@" {redirection}', "sh", *command], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", message)


def test_interruption_ends_quietly(run, monkeypatch, picture_file):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("mllama.cli.ask.run", interrupted)
    assert run("ask", picture_file, "?") == (130, "", "")


def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = [sys.executable, "-m", "mllama", "--help"], os.environ | {"PYTHONUNBUFFERED": ""}
    ended = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
