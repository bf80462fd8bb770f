"""The README's code runs and prints what its comments say; its commands exist."""

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


def test_python_blocks_print_what_their_comments_say(monkeypatch, capsys, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # one writes a file
    code, names = "\n".join(blocks("python")), {}
    exec(compile(code, "README.md", "exec"), names)
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert expected and capsys.readouterr().out.splitlines() == expected

    model, batch, again = names["model"], names["batch"], mllama.load()[0]
    with torch.no_grad():  # the adapters were trained, and the file holds them
        untrained = again(**batch).loss
        mllama.load_lora(again, "please.safetensors")
        assert again(**batch).loss == model(**batch).loss < untrained / 4
    # only adapters had gradients, which the optimizer's zero_grad dropped
    assert all(parameter.grad is None for parameter in model.parameters())


def test_commands_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    lines = [
        shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()
    ]
    assert {line[0] for line in lines} == {"make", "mllama", "pip"}
    for program, *arguments in lines:
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
        elif program == "mllama":
            build_parser().parse_args(arguments)
            images = [argument for argument in arguments if argument.startswith("examples/")]
            assert all(Path(image).is_file() for image in images)


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/pictures/README.md"]
PAGES += ["benchmarks/README.md"]
PAGES += [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links), links
    paths = re.findall(
        r"`((?:python|csrc|tests|docs|examples|benchmarks|notebooks)/[\w./-]+\.\w+)`", text
    )
    assert all((ROOT / path).exists() for path in paths), paths
