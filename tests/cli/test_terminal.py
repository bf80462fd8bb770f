"""The status line of `ask` and `chat`, on pseudo-terminals."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

CONTROL = re.compile(r"\x1b\[(K)|\x1b\[[?\d;]*[A-Za-z]|(\r)|([^\r\x1b\n]+)")


class Terminal:
    """A pseudo-terminal. `file` is what programs write to, `text` all that they wrote."""

    def __init__(self):
        self.master, self.slave = os.openpty()
        self.text, self._changed = "", threading.Condition()
        self.file = open(self.slave, "w")  # noqa: SIM115
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while chunk := self._chunk():
            with self._changed:
                self.text += chunk.decode()
                self._changed.notify()

    def _chunk(self) -> bytes:
        try:
            return os.read(self.master, 4096)
        except OSError:  # every program has closed it
            return b""

    def wait_for(self, text: str) -> None:
        """Wait until a program has written it."""
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.text, timeout=60), self.text

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def screen(self) -> list[str]:
        """The lines that are left, after the control characters have done their work."""
        self.file.flush()
        self.file.write("\0")
        self.file.flush()
        self.wait_for("\0")
        return [one.rstrip() for one in map(draw, self.text.split("\0")[0].split("\n"))]


def draw(line: str) -> str:
    """What a line of a terminal shows."""
    cells, place = "", 0
    for erase, home, text in CONTROL.findall(line):
        if erase:
            cells = cells[:place]
        elif home:
            place = 0
        else:
            cells = cells[:place] + text + cells[place + len(text) :]
            place += len(text)
    return cells


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TQDM_DISABLE", "")
    return Terminal()


def test_the_line_is_gone_where_the_answer_begins(
    run, options, image_file, model_folder, monkeypatch, terminal
):
    answer = run("ask", image_file, "How many?", *options)[1].strip()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert run("ask", image_file, "How many?", *options)[0] == 0
    loaded, said, speed, end = terminal.screen()
    assert (loaded, said, end) == (f"mllama: {model_folder} in float32 on cpu", answer, "")
    assert "8 tokens" in speed and "tokens/s" in speed
    loading, image, prompt = (terminal.text.index(word) for word in ("loading", "image", "prompt"))
    assert loading < image < prompt < terminal.text.index(answer.split()[0])


def test_the_line_counts_tokens_where_the_answer_goes_elsewhere(
    run, options, image_file, monkeypatch, terminal
):
    command = ["ask", image_file, "How many?", *options]
    answer = run(*command)[1]
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert run(*command)[:2] == (0, answer)
    assert len(terminal.screen()) == 3
    monkeypatch.undo()
    assert " tokens/s\r" in terminal.text


def test_dumb_terminals_get_no_line(run, options, image_file, monkeypatch, terminal):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert run("ask", image_file, "How many?", "--timings", *options)[0] == 0
    lines = terminal.screen()
    assert (
        len(lines) == 9
        and "\x1b" not in terminal.text
        and "\r" not in terminal.text.replace("\r\n", "")
    )


def test_an_error_clears_the_line(run, options, image_file, monkeypatch, terminal):
    def fail(*args, **kwargs):
        raise ValueError("no memory for this")

    monkeypatch.setattr("mllama.text.decoder.Decoder.forward", fail)
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert run("ask", image_file, "How many?", *options)[0] == 2
    assert terminal.screen() == ["mllama: error: no memory for this", ""]


def test_ctrl_c_while_the_line_is_made(run, options, image_file, monkeypatch, terminal):
    def interrupted(line, *args, **kwargs):
        raise KeyboardInterrupt

    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    monkeypatch.setattr("tqdm.std.tqdm.refresh", interrupted)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert run("ask", image_file, "How many?", *options)[0] == 130
    gc.collect()
    assert terminal.screen() == [""] and not lost


SLOW = """
import sys, time
from mllama.cli import main
from mllama.model.model import VisionLanguageModel

forward = VisionLanguageModel.compute
def slow(*args, **kwargs):
    for _ in range(6000):  # a signal just before one long sleep would not end it
        time.sleep(0.01)
    return forward(*args, **kwargs)
VisionLanguageModel.compute = slow
sys.exit(main())
"""


def sit_at_terminal() -> None:
    """Make stdin the controlling terminal; take its Ctrl-C even if the tests ignore theirs."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_a_clean_line(family_folder, terminal):
    words = ["chat", "--model", family_folder("llama"), "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)],
        stdin=terminal.slave,
        stdout=terminal.slave,
        stderr=terminal.slave,
        start_new_session=True,
        preexec_fn=sit_at_terminal,
    )
    try:
        terminal.wait_for("> ")
        terminal.type("a b c\n")
        terminal.wait_for("prompt 0/")
        terminal.type("\x03")
        terminal.wait_for("\x1b[K> ")
        terminal.type("/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
    loaded, question, rest, end = terminal.screen()
    assert (question, rest, end) == ("> a b c", "> /exit", "")
