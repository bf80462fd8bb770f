"""The README's code runs and prints what it says; its commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from mllama.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_print_what_they_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = "\n".join(blocks("python"))
    exec(compile(code, "README.md", "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert said and capsys.readouterr().out.splitlines() == said


def test_commands_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert {line[0] for line in lines} == {"make", "mllama"}
    for program, *arguments in lines:
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
        else:
            parsed = build_parser().parse_args(arguments)
            pictures = [getattr(parsed, "picture", None), *getattr(parsed, "image", [])]
            assert all(Path(picture).is_file() for picture in pictures if picture is not None)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/cli.md", "examples/pictures/README.md"]
)
def test_links_and_paths_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links), links
    paths = re.findall(r"`((?:python|csrc|tests|docs|examples|benchmarks|notebooks)/[\w./-]+\.\w+)`", text)
    assert all((ROOT / path).exists() for path in paths), paths
