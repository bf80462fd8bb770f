"""The command line: what it refuses and how it ends."""

import json
import re
import shlex
from pathlib import Path

import pytest

import mllama
from mllama.cli._parser import build_parser


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
        (["ask"], "required: IMAGE, QUESTION"),
        (["ask", "image.png", " "], "the question is empty"),
        (["ask", "nowhere.png", "?"], "nowhere.png"),
        (["ask", __file__, "?"], "cannot read the image"),
        (["chat", "nowhere.png"], "nowhere.png"),
        (["ask", "IMAGE", "?", "--model", "nowhere"], "'nowhere'"),
        (["ask", "IMAGE", "?", "--device", "abacus"], "device 'abacus'"),
        (["ask", "IMAGE", "?", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["ask", "IMAGE", "?", "--max-new-tokens", "0"], "'0'"),
        (["ask", "IMAGE", "?", "--max-new-tokens", "many"], "'many'"),
        (["ask", "IMAGE", "?", "--max-new-tokens", "+-5"], "'+-5'"),
        (["ask", "IMAGE", "?", "--max-new-tokens", "9" * 5000], "'9999"),
        (["ask", "IMAGE", "\udcff"], "the question is no valid UTF-8 text"),
        (["ask", "IMAGE", "what <image>?"], "the question"),
        (["ask", "IMAGE", "a b c d " * 2000], "answer included"),
        (["ask", "IMAGE", "?", "--model", ""], "path is empty"),
        (["ask", "IMAGE", "?", "--device", "cpu:1"], "device 'cpu:1'"),
        (["ask", "IMAGE", "?", "--temperature", "-0.5"], "'-0.5'"),
        (["ask", "IMAGE", "?", "--temperature", "nan"], "'nan'"),
        (["ask", "IMAGE", "?", "--temperature", "inf"], "'inf'"),
        (["ask", "IMAGE", "?", "--top-p", "0"], "'0'"),
        (["ask", "IMAGE", "?", "--top-p", "1.5"], "'1.5'"),
        (["ask", "IMAGE", "?", "--top-k", "2.5"], "'2.5'"),
        (["ask", "IMAGE", "?", "--seed", "-1"], "a whole number of at least 0"),
        (["info", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_what_is_refused_is_told_in_one_line(run, image_file, arguments, message):
    code, out, err = run(
        *(image_file if argument == "IMAGE" else argument for argument in arguments)
    )
    assert (
        (code, out, err.count("\n")) == (2, "", 1) and err.startswith("mllama") and message in err
    )


def test_a_long_error_is_cut_to_a_line(run, monkeypatch, image_file):
    monkeypatch.setattr(
        "mllama.cli.ask.run",
        lambda arguments: (_ for _ in ()).throw(ValueError("missing:\n" + "weight\n" * 1000)),
    )
    code, _, err = run("ask", image_file, "?")
    assert (code, err.count("\n")) == (2, 1) and err.endswith(" ...\n") and len(err) < 1100


def test_an_error_nobody_foresaw_is_told_in_one_line_unless_asked_for_whole(
    run, monkeypatch, image_file
):
    monkeypatch.setattr(
        "mllama.cli.ask.run",
        lambda arguments: (_ for _ in ()).throw(RuntimeError("out of memory\nat 3")),
    )
    assert run("ask", image_file, "?") == (
        2,
        "",
        "mllama: error: RuntimeError: out of memory at 3\n",
    )
    monkeypatch.setenv("MLLAMA_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        run("ask", image_file, "?")


def test_interruption_ends_quietly(run, monkeypatch, image_file):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("mllama.cli.ask.run", interrupted)
    assert run("ask", image_file, "?") == (130, "", "")


def test_the_page_of_the_command_line_has_every_command_with_an_example_that_parses():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| `(mllama .*)` \|$", page, re.MULTILINE)
    parser = build_parser()
    assert [parser.parse_args(shlex.split(example)[1:]).command for _, example in rows] == [
        command for command, _ in rows
    ]
    commands = parser._subparsers._group_actions[0].choices
    assert commands.keys() == dict(rows).keys()
