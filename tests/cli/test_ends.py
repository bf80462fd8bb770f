"""The warning of answers that teach a model no end."""

import json
import shutil

import pytest

from mllama.data.ends import end_ids
from mllama.train.run import train
from tiny import data
from tiny.folders import change
from training.runs import settings_of

SAID = "ends with a token that generation stops at"
# LLaVA-1.5's, which writes a space after an answer.
_LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ part['text'] + ' ' }}{% else %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def folder(family_folder, tmp_path):
    """LLaVA, with a chat template that writes no end token."""
    copy = shutil.copytree(family_folder("llava, clip"), tmp_path / "model")
    (copy / "chat_template.jinja").write_text(_LLAVA)
    return copy


def rows(*answers: str) -> list[dict]:
    return [
        {"image": "0.png", "question": "How many circles are there?", "answer": answer}
        for answer in answers
    ]


def inspected(run, *options) -> tuple[dict, str]:
    code, out, err = run("inspect-labels", *options, "--json")
    assert code == 0, err
    return json.loads(out), err


def test_inspect_labels(run, tmp_path, folder):
    path = data.write(tmp_path, rows("two", "two or three"))
    found, err = inspected(run, path, "--model", folder)
    assert found["summary"]["ended"] == 0 and err.count(SAID) == err.count("\n") == 1
    assert "the first 2 row(s)" in err and "the chat template trains no '<eos>'" in err
    assert found["tokens"][-1]["trained"] and found["tokens"][-1]["text"] == " "


@pytest.mark.parametrize("answers", [("two<eos>", "three<eos>"), ("two", "three<eos>")])
def test_answers_whose_texts_end(run, tmp_path, folder, answers):
    found, err = inspected(run, data.write(tmp_path, rows(*answers)), "--model", folder)
    assert found["summary"]["ended"] == sum("<eos>" in answer for answer in answers)
    assert err == ""


def test_rows_that_are_cut_say_nothing(run, tmp_path, folder):
    path = data.write(tmp_path, rows("two or three or four"))
    length = len(inspected(run, path, "--model", folder)[0]["tokens"])
    found, err = inspected(run, path, "--model", folder, "--max-length", length - 1)
    assert found["summary"]["truncated"] == 1 and err == ""


@pytest.mark.parametrize("family", ["gemma", "paligemma", "llava, siglip"])
def test_families_whose_answers_end(run, tmp_path, family_folder, family):
    path = data.write(tmp_path, [{"question": "hello", "answer": "a good day"}])
    found, err = inspected(run, path, "--model", family_folder(family))
    assert found["summary"]["ended"] == 1 and err == ""


def test_another_end_in_the_generation_settings(run, tmp_path, folder):
    """What counts is what generation stops at, not the tokenizer's own."""
    change(folder, lambda settings: settings.update(eos_token_id=[1]), "generation_config.json")
    path = data.write(tmp_path, rows("two<eos>"))
    found, err = inspected(run, path, "--model", folder)
    assert found["summary"]["ended"] == 0 and "trains no '<bos>'" in err


@pytest.mark.parametrize(("end", "times"), [("", 1), ("<eos>", 0)])
def test_a_run_says_it_once(tmp_path, folder, capsys, end, times):
    pytest.importorskip("accelerate")
    path = data.write(tmp_path, rows(*(word + end for word in ("one", "two", "three"))))
    options = {"max_steps": 1, "eval_fraction": 0.0, "eval_every": None, "batch_size": 1}
    train(settings_of(folder, path, tmp_path / "run", **options))
    assert capsys.readouterr().err.count(SAID) == times


def test_ids_that_end():
    class Tokenizer:
        eos_token_id = 7

    assert end_ids(None, Tokenizer) == {7}
    assert end_ids([2, 3], Tokenizer) == {2, 3}
    assert end_ids(-1, Tokenizer) == frozenset()
