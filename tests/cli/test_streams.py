"""The command line in a process of its own, with closed streams."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("redirection", "arguments", "code", "message"),
    [
        (
            "<&-",
            ["chat", "IMAGE"],
            2,
            "mllama: error: stdin is closed: there are no questions to read\n",
        ),
        (
            "<&-",
            ["ask", "-", "?"],
            2,
            "mllama: error: stdin is closed: there is no image to read\n",
        ),
        (">&-", ["ask", "IMAGE", "?"], 2, "mllama: error: stdout is closed\n"),
        ("2>&-", ["ask", "nowhere.png", "?"], 2, ""),
    ],
)
def test_closed_streams(image_file, redirection, arguments, code, message):
    command = [
        sys.executable,
        "-m",
        "mllama",
        *(str(image_file) if argument == "IMAGE" else argument for argument in arguments),
    ]
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", message)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ""])
def test_an_answer_needs_no_stderr(image_file, redirection):
    command = [sys.executable, "-m", "mllama", "ask", str(image_file), "How many?", "--timings"]
    reader, writer = os.pipe()
    os.close(reader)  # who reads stderr is gone
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        stdout=subprocess.PIPE,
        stderr=writer,
    )
    os.close(writer)
    assert ended.returncode == 0 and ended.stdout.strip()


def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = (
        [sys.executable, "-m", "mllama", "--help"],
        os.environ | {"PYTHONUNBUFFERED": ""},
    )
    ended = subprocess.run(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
