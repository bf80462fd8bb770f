"""Evaluation of tiny models: answers in batches, perplexity, the report and the command."""

import html
import json
import math
import re

import pytest
import torch
from PIL import Image

import mllama
from mllama.cli import _evaluation, main
from mllama.data.collate import Collator
from mllama.data.rows import Example
from mllama.data.sources import open_examples
from mllama.evaluate import run
from mllama.evaluate.answers import answer_rows
from mllama.evaluate.perplexity import perplexity
from mllama.evaluate.report import PAGE, REPORT, write_report
from mllama.evaluate.run import DEFAULT, KNOWN, _session
from tiny import folders

WITHOUT_TEXT = ("siglip",)
FAMILIES = [family for family in folders.MAKERS if family not in WITHOUT_TEXT]
ONE_IMAGE = ("paligemma",)  # in every row
TEXT = ("llama", "gemma")
WORDS = ["two", "red", "three", "blue", "describe", "the", "picture", "hello", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> (folder, model, processor)"""
    made = {}

    def find(family: str):
        if family not in made:
            folder = folders.write(family, tmp_path_factory.mktemp("model"))
            made[family] = (folder, *mllama.load(folder, dtype="float32", device="cpu"))
        return made[family]

    return find


def rows_for(family: str, folder) -> list[Example]:
    """Seven rows of unequal length, some with images where the family takes them."""
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    Image.new("RGB", (30, 50), "blue").save(folder / "b.png")
    rows = []
    for number in range(7):
        row = {"question": " ".join(WORDS[: 2 + number]), "answer": " ".join(WORDS[number:][:3])}
        if family not in TEXT and (number % 2 == 0 or family in ONE_IMAGE):
            row["image"] = "ab"[number % 4 // 2] + ".png"
        rows.append(row)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_are_those_one_by_one(models, tmp_path, family):
    _, model, processor = models(family)
    examples = open_examples(rows_for(family, tmp_path))
    session = _session(model, processor, None, None)
    done = []
    together = answer_rows(session, examples, 8, 4, done.append)
    alone = answer_rows(_session(model, processor, None, None), examples, 8, 1)
    assert sum(done) == len(examples) and len(done) < len(examples)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert len({one.text for one in together}) > 1  # they do depend on the row


def test_answers_are_those_of_ask(models, tmp_path):
    _, model, processor = models("llava, siglip")
    examples = open_examples(rows_for("llava, siglip", tmp_path))
    answers = answer_rows(_session(model, processor, None, None), examples, 6, 3)
    for place in (0, 2):
        image = examples[place].messages[0]["content"][0]["image"]
        question = examples[place].messages[0]["content"][-1]["text"]
        expected = mllama.ask(image, question, model, processor, max_new_tokens=6)
        assert answers[place].text == expected


@pytest.mark.parametrize("family", ["llama", "llava, siglip", "mllama"])
def test_perplexity_is_that_of_the_log_probabilities(models, tmp_path, family):
    _, model, processor = models(family)
    examples = open_examples(rows_for(family, tmp_path))
    found = perplexity(model, processor, examples)
    losses = []
    for place, example in enumerate(examples):
        batch = Collator(model, processor)([example])
        labels = batch.pop("labels")
        with torch.no_grad():
            scores = model(**batch).logits.double().log_softmax(-1)
        scored = (labels[0, 1:] != -100).nonzero().squeeze(1)
        own = [-scores[0, t, labels[0, t + 1]].item() for t in scored]
        assert found.rows[place] == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-4)
        assert found.tokens[place] == len(own)
        losses += own
    assert found.total == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_a_run_scores_what_was_answered(models, tmp_path):
    _, model, processor = models("llava, siglip")
    path = rows_for("llava, siglip", tmp_path)
    answers = answer_rows(_session(model, processor, None, None), open_examples(path), 8, 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["answers"] = ["nothing of it", answers[3].text or "?"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.train()
    told = []
    found = run(
        model,
        processor,
        open_examples(path),
        ["anls", "perplexity", "exact_match"],
        max_new_tokens=8,
        progress=lambda stage, count: told.append((stage, count)),
    )
    assert model.training and model.eval()
    assert list(found.scores) == ["anls", "perplexity", "exact_match"]
    assert found.rows[3].scores["exact_match"] == 1
    assert found.rows[3].references == ("nothing of it", answers[3].text)
    expected = sum(row.scores["exact_match"] for row in found.rows) / len(found.rows)
    assert found.scores["exact_match"].total == pytest.approx(expected)
    assert [row.answer.text for row in found.rows] == [one.text for one in answers]
    assert found.worst()[-1].scores["anls"] == max(row.scores["anls"] for row in found.rows)
    assert sum(count for stage, count in told if stage == "answers") == 7
    only = run(model, processor, open_examples(path), ["perplexity"])
    assert only.rows[0].answer is None and "answers" not in only.seconds
    worst = only.worst()
    assert worst[0].scores["perplexity"] == max(row.scores["perplexity"] for row in worst)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"metrics": ["best"]}, "best"),
        ({"metrics": []}, "metrics"),
        ({"metrics": "anls"}, "metrics"),
        ({"metrics": ["anls", "anls"]}, "twice"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"metrics": ["anls"], "max_length": 9}, "max_length"),
    ],
)
def test_what_cannot_be_evaluated(models, tmp_path, options, text):
    _, model, processor = models("llama")
    with pytest.raises(ValueError, match=text):
        run(model, processor, open_examples(rows_for("llama", tmp_path)), **options)


def test_no_rows_and_a_row_that_fails_are_named(models, tmp_path):
    _, model, processor = models("llama")
    with pytest.raises(ValueError, match="no rows"):
        run(model, processor, [])
    path = rows_for("llama", tmp_path)
    with path.open("a") as file:
        file.write(json.dumps({"question": "long " * 900, "answer": "a"}) + "\n")
    with pytest.raises(ValueError, match="row 8"):
        run(model, processor, open_examples(path), ["anls"])


def test_the_page_escapes_every_text_and_needs_nothing_else(models, tmp_path):
    _, model, processor = models("llava, siglip")
    path = rows_for("llava, siglip", tmp_path)
    evil = "<script>alert('1')</script>\"&"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"question": evil, "answer": evil}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = open_examples(path)
    found = run(model, processor, examples, ["anls"], max_new_tokens=4)
    settings = {"model": evil, "data": evil}
    write_report(tmp_path / "out", found, examples, settings, [evil])
    page = (tmp_path / "out" / PAGE).read_text()
    assert "<script" not in page and html.escape(evil) in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 4 and all(one.startswith("data:image/jpeg;base64,") for one in sources)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["settings"] == settings and report["bad_rows"] == [evil]
    assert report["rows"][0]["question"] == evil
    assert report["metrics"]["anls"]["total"] == found.scores["anls"].total


def test_a_report_that_cannot_be_written_leaves_the_old_one(models, tmp_path, monkeypatch):
    _, model, processor = models("llama")
    examples = open_examples(rows_for("llama", tmp_path))
    found = run(model, processor, examples, ["anls"], max_new_tokens=2)
    write_report(tmp_path / "out", found, examples, {"model": "first"})

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("mllama.checkpoints.files._sync", fail)
    with pytest.raises(OSError, match="space"):
        write_report(tmp_path / "out", found, examples, {"model": "second"})
    assert json.loads((tmp_path / "out" / REPORT).read_text())["settings"]["model"] == "first"
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [REPORT, PAGE]


def test_the_command(models, tmp_path, capsys):
    folder, _, _ = models("llava, siglip")
    path = rows_for("llava, siglip", tmp_path)
    words = ["eval", str(path), "--model", str(folder), "--device", "cpu", "--dtype", "float32"]
    words += ["--weights", "none", "--limit", "3", "--max-new-tokens", "4", "--batch-size", "2"]
    out = tmp_path / "out"
    assert main([*words, "--output", str(out), "--metrics", "anls", "perplexity"]) == 0
    page = capsys.readouterr().out
    assert "3 rows" in page and "anls" in page and "perplexity" in page
    report = json.loads((out / REPORT).read_text())
    assert len(report["rows"]) == 3 and report["settings"]["limit"] == 3
    assert (out / PAGE).is_file()
    assert main([*words, "--json", "--metrics", "exact_match"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"].keys() == {"exact_match"} and "rows" not in found
    with path.open("a") as file:
        file.write("{\n")
    assert main(["eval", str(path), "--model", str(folder), "--metrics", "anls"]) == 2
    assert "row 8" in capsys.readouterr().err
    assert main([*words, "--output", str(path)]) == 2


def test_an_adapter_and_packed_weights_are_evaluated(models, tmp_path, capsys):
    folder, _, _ = models("llava, siglip")
    path = rows_for("llava, siglip", tmp_path)
    model, _ = mllama.load(folder, dtype="float32", device="cpu")
    for layer in mllama.convert_linears_to_lora(model.language_model).values():
        torch.nn.init.normal_(layer.lora_b.weight)
    mllama.save_lora(model, tmp_path / "adapter.safetensors")
    words = ["eval", str(path), "--model", str(folder), "--device", "cpu", "--dtype", "float32"]
    words += ["--metrics", "perplexity", "--json"]
    adapter = ["--adapter", str(tmp_path / "adapter.safetensors")]
    totals = []
    for more in (["--weights", "none"], ["--weights", "int8"], adapter):
        assert main([*words, *more]) == 0
        totals.append(json.loads(capsys.readouterr().out)["metrics"]["perplexity"]["total"])
    assert totals[1] == pytest.approx(totals[0], rel=0.05) and totals[1] != totals[0]
    assert abs(totals[2] - totals[0]) > 0.1 * totals[0]


def test_the_command_knows_every_metric():
    assert _evaluation.METRICS == KNOWN and _evaluation.DEFAULT_METRICS == DEFAULT
