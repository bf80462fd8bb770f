"""The README's code runs and prints what it says; its commands exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

import mllama
from mllama.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_print_what_they_say(monkeypatch, capsys, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # one writes a file
    code, names = "\n".join(blocks("python")), {}
    exec(compile(code, "README.md", "exec"), names)
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert said and capsys.readouterr().out.splitlines() == said

    model, batch, again = names["model"], names["batch"], mllama.load()[0]
    with torch.no_grad():  # the adapters have learnt, and are what was saved
        untrained = again(**batch).loss
        mllama.load_lora(again, "please.safetensors")
        assert again(**batch).loss == model(**batch).loss < untrained / 4
    assert all(
        parameter.grad is None for parameter in model.parameters()
    )  # none but the adapters, whose optimizer forgets them, had one


def test_commands_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    lines = [
        shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()
    ]
    assert {line[0] for line in lines} == {"make", "mllama", "python"}
    for program, *arguments in lines:
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
        elif program == "python":
            assert arguments[0] == "-m" and importlib.util.find_spec(f"{arguments[1]}.__main__")
        else:
            parsed = build_parser().parse_args(arguments)
            pictures = [getattr(parsed, "picture", None), *getattr(parsed, "image", [])]
            assert all(Path(picture).is_file() for picture in pictures if picture is not None)


DOCS = ("cli", "design", "fusion", "lora", "older-scripts")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}.md" for name in DOCS)]


@pytest.mark.parametrize("page", [*PAGES, "examples/pictures/README.md"])
def test_links_and_paths_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links), links
    paths = re.findall(
        r"`((?:python|csrc|tests|docs|examples|benchmarks|notebooks)/[\w./-]+\.\w+)`", text
    )
    assert all((ROOT / path).exists() for path in paths), paths
