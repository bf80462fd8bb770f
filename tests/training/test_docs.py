"""The recipes of docs/lora.md run and print what their comments say."""

import re
from pathlib import Path

import pytest

for name in ("accelerate", "datasets", "peft", "trl"):
    pytest.importorskip(name)

ROOT = Path(__file__).parent.parent.parent


def test_recipes_of_trainer_trl_and_peft(monkeypatch, capsys, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    text = (ROOT / "docs/lora.md").read_text()
    recipes = text[text.index("## Trainer\n") :]
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", recipes, re.MULTILINE | re.DOTALL))
    exec(compile(code, "docs/lora.md", "exec"), {"__name__": "recipes"})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{'")]
    assert expected and printed == expected
