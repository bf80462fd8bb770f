"""The rows and the code of docs/training-data.md."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mllama.data.rows import READ
from mllama.data.sources import load_images, open_examples

PAGE = (Path(__file__).parents[2] / "docs/training-data.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows(folder):
    text = "".join(blocks("json"))
    (folder / "photos.jsonl").write_text(text)
    (folder / "photos.csv").write_text(blocks("csv")[0])
    lines, table = open_examples("photos.jsonl"), open_examples("photos.csv")
    assert (len(lines), len(table)) == (8, 2)
    for example in [*lines, *table]:
        load_images(example)
    assert {name for row in map(json.loads, text.splitlines()) for name in row} <= set(READ)
    assert lines[7].answers == ("cat", "a cat", "cat")


def test_code(folder, capsys):
    (folder / "photos.jsonl").write_text(blocks("json")[0])
    (code,) = blocks("python")
    exec(compile(code, "docs/training-data.md", "exec"), {"__name__": "recipe"})
    assert capsys.readouterr().out.strip() == re.search(r"^print.*  # (.*)$", code, re.M)[1]
