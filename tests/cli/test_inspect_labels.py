"""`mllama inspect-labels`: tokens with their roles and labels, and the summary."""

import json

import pytest

from tiny import data


@pytest.fixture
def inspected(run, tmp_path, family_folder):
    """inspected(*options, family=..., rows=...) -> what --json prints."""

    def call(*options, family: str = "llava, siglip", rows=data.ROWS):
        path = data.write(tmp_path, rows)
        model = ["--model", family_folder(family)]
        code, out, err = run("inspect-labels", path, *model, "--json", *options)
        assert code in (0, 1), err
        return json.loads(out), code

    return call


def texts(found: dict, role: str) -> str:
    return "".join(token["text"] for token in found["tokens"] if token["role"] == role)


def test_roles_and_labels(inspected):
    found, code = inspected()
    assert code == 0 and found["where"] == "photos.jsonl, row 1"
    assert texts(found, "user").replace("\n", "") == "How many circles?What colour?"
    assert texts(found, "assistant") == "two<eos>red and blue<eos>"
    assert texts(found, "image") == "<image>" * 4
    assert all(token["trained"] == (token["role"] == "assistant") for token in found["tokens"])
    assert [token["place"] for token in found["tokens"]] == list(range(len(found["tokens"])))
    counts = found["counts"]
    assert counts["image"] == 4 and counts["trained"] == counts["assistant"]
    assert sum(counts.values()) - counts["trained"] == len(found["tokens"])


def test_every_family(inspected):
    for family, user in {
        "llava, clip": "describethepicture",
        "mllama": "describethepicture",
        "paligemma": "hello",
        "gemma": "hello",
        "llama": "hello",
    }.items():
        row = 4 if user.startswith("describe") else 2
        found, _ = inspected("--row", row, family=family)
        assert texts(found, "user").replace(" ", "") == user, family
        assert found["counts"]["trained"] > 0
        assert found["counts"].get("image", 0) == {"llava, clip": 4, "mllama": 1}.get(family, 0)


def test_system_messages_and_characters_of_several_tokens(inspected):
    turns = [("system", "Be short."), ("user", "é — 日本?"), ("assistant", "是")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found, _ = inspected(family="llama", rows=[row])
    assert texts(found, "system") == "Be short."
    assert texts(found, "user") == "é — 日本?"
    assert texts(found, "assistant").strip() == "assistant: 是"
    assert "\ufffd" not in texts(found, "user") + texts(found, "assistant")


def test_the_summary(inspected):
    rows = [*data.ROWS, {"question": "a"}, data.TEXT_ALONE | {"id": 4}]
    found, code = inspected("--rows", 5, "--max-length", 20, rows=rows)
    summary = found["summary"]
    assert code == 1 and summary["rows"] + len(summary["bad_rows"]) == 5
    assert any("row 5" in reason for reason in summary["bad_rows"])
    assert summary["longest"] <= 20 and summary["truncated"] > 0 and found["truncated"] > 0
    assert 0 < summary["trained"] < summary["tokens"]
    found, code = inspected(rows=[{**data.TEXT_ALONE, "id": 4}])
    assert code == 0 and found["unread"] == ["id"]
    assert found["summary"]["tokens"] == found["summary"]["longest"] == len(found["tokens"])


def test_the_table(run, tmp_path, monkeypatch):
    path = data.write(tmp_path)
    code, out, err = run("inspect-labels", path)
    assert code == 0 and "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("photos.jsonl, row 1: ")
    assert "0-143" in lines[2] and lines[2].endswith("x 144") and " - " in lines[2]
    answer = [line.split() for line in lines if line.split()[2:3] == ["assistant"]]
    assert len(answer) > 2 and all(line[3] == line[1] for line in answer)  # label and id
    assert answer[-1][-1] == "'<eos>'"
    assert "the first 4 of 4 rows:" in lines
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, colored, _ = run("inspect-labels", path)
    assert code == 0 and colored.count("\x1b[0m") > 10


def test_errors(run, tmp_path, family_folder):
    path = data.write(tmp_path, [{"question": "a"}, data.TEXT_ALONE])
    for options, said in [
        ([path], "photos.jsonl, row 1"),
        ([path, "--row", 3], "--row must be at most 2"),
        ([tmp_path / "no.jsonl"], "no.jsonl"),
        ([path, "--row", 2, "--model", family_folder("siglip")], "decoder"),
        ([path, "--row", 2, "--max-length", 3], "row 2"),
        ([path, "--split", "x"], "split"),
        ([path, "--reference", "meta"], "--reference meta is for Llama-3.2-Vision only"),
    ]:
        code, out, err = run("inspect-labels", *options)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
