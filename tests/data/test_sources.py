"""Training data of every form as examples."""

import base64
import json
import os
import pickle
import time
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mllama.data import files
from mllama.data.sources import open_examples
from tiny import data

PNG = b"\x89PNG"


def roles(example) -> list[str]:
    return [message["role"] for message in example.messages]


def parts(message: dict, folder: Path | None = None) -> list:
    """A message's texts, and its images by name."""
    return [
        part["text"]
        if part["type"] == "text"
        else os.path.relpath(part["image"], folder).encode()
        if isinstance(part["image"], str)
        else part["image"]
        for part in message["content"]
    ]


def one(folder: Path, row: dict, **options):
    return open_examples(data.write(folder, [row]), **options)[0]


def test_json_lines(tmp_path):
    examples = open_examples(data.write(tmp_path))
    assert len(examples) == 4
    assert [example.where for example in examples] == [
        f"photos.jsonl, row {number}" for number in (1, 2, 3, 4)
    ]
    assert roles(examples[0]) == ["user", "assistant"] * 2
    assert [parts(message, tmp_path) for message in examples[0].messages] == [
        [b"0.png", "How many circles?"],
        ["two"],
        ["What colour?"],
        ["red and blue"],
    ]
    assert parts(examples[2].messages[0], tmp_path) == [b"1.png", b"2.png", "Which is red?"]
    assert parts(examples[3].messages[2], tmp_path) == ["the picture ", b"1.png"]
    assert examples[-1].answers == ("blue",) and len(examples[1:3]) == 2
    with pytest.raises(IndexError):
        examples[4]


def test_a_json_array_and_other_endings(tmp_path):
    data.write_images(tmp_path)
    (tmp_path / "a.json").write_text("\n " + json.dumps(data.ROWS, indent=1))
    for name, content in {
        "b.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, data.ROWS)),
        "c.json": "\n\n".join(map(json.dumps, data.ROWS)) + "\r\n\r\n",
    }.items():
        (tmp_path / name).write_bytes(content.encode())
    found = [open_examples(tmp_path / name) for name in ("a.json", "b.jsonl", "c.json")]
    assert [len(examples) for examples in found] == [4, 4, 4]
    for examples in found:
        assert [x.messages for x in examples] == [x.messages for x in found[0]]
    assert [x.where for x in found[2]] == [f"c.json, row {row}" for row in (1, 3, 5, 7)]


def test_csv(tmp_path):
    data.write_images(tmp_path)
    path = tmp_path / "x.csv"
    path.write_bytes(
        b'\xef\xbb\xbfanswer,source, image ,question\r\n"two, or\nthree",a,0.png,How many?\r\n\r\n'
        b'yes,b,,"Is ""it"" on?"\r\n'
    )
    examples = open_examples(path)
    assert examples.unread == ["source"]
    assert [[parts(message, tmp_path) for message in x.messages] for x in examples] == [
        [[b"0.png", "How many?"], ["two, or\nthree"]],
        [['Is "it" on?'], ["yes"]],
    ]
    path.write_text("image,answer\n0.png,x\n")
    assert parts(open_examples(path, question="What?")[0].messages[0], tmp_path)[1:] == ["What?"]
    with pytest.raises(ValueError, match="x.csv, row 1: .*question"):
        open_examples(path)[0]


def test_columns_that_are_not_dropped(tmp_path):
    """What changes a row's meaning is honored or rejected in tables as in JSON."""
    data.write_images(tmp_path)
    path = tmp_path / "x.csv"
    path.write_text("images,question,answer,system\n0.png,Which?,a,\n,Which?,a,Be short.\n")
    examples = open_examples(path)
    assert len(examples[0].images) == 1 and examples.unread == []
    with pytest.raises(ValueError, match="x.csv, row 2: system"):
        examples[1]
    datasets = pytest.importorskip("datasets")
    row = {"question": "Which?", "answer": "a", "system": "Be short."}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved, row 1: system"):
        open_examples(tmp_path / "saved")[0]


def test_a_folder_of_class_folders(tmp_path):
    for name in ("red cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        data.write_images(tmp_path / "d" / name, 2)
    (tmp_path / "d" / ".cache").mkdir()
    examples = open_examples(tmp_path / "d", question="What is it?")
    assert [example.answers[0] for example in examples] == ["dog", "dog", "red cat", "red cat"]
    assert parts(examples[3].messages[0], tmp_path) == [b"d/red cat/1.png", "What is it?"]
    assert examples[3].where == "d, row 4 (red cat/1.png)"
    with pytest.raises(ValueError, match="question"):
        open_examples(tmp_path / "d")
    (tmp_path / "d" / "cat").symlink_to(tmp_path / "d" / "red cat")
    assert len(open_examples(tmp_path / "d", question="What?")) == 6
    (tmp_path / "d" / "cat").unlink()
    (tmp_path / "d" / "dog" / "notes.txt").write_text("x")
    (tmp_path / "d" / "dog" / "again").symlink_to(tmp_path / "d")  # a circle
    (tmp_path / "d" / "0.png").write_bytes(PNG)
    examples = open_examples(tmp_path / "d", question="What?", skip_bad_rows=True)
    assert len(examples) == 4 and len(examples.bad_rows) == 3
    for name, reason in zip(("0.png", "dog/again", "notes.txt"), examples.bad_rows, strict=True):
        assert name in reason


def test_the_datasets_library(tmp_path):
    data.write_images(tmp_path)
    shown = [Image.open(tmp_path / f"{number}.png") for number in (0, 1)]
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": "a"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    kinds = {
        "messages": {"messages": [turns] * 2, "images": [[image] for image in shown], "id": [5, 6]},
        "conversations": {
            "conversations": [data.CONVERSATION["conversations"]] * 2,
            "image": shown,
        },
        "answers": {"image": shown, "question": ["a", "c"], "answer": ["b", "d"]},
    }
    for name, columns in kinds.items():
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / name))
        examples = open_examples(tmp_path / name)
        assert len(examples) == 2 and examples[1].where == f"{name}, row 2"
        assert examples.unread == (["id"] if name == "messages" else [])
        image = examples[1].messages[0]["content"][0]["image"]
        assert isinstance(image, bytes) and image.startswith(PNG)
    assert open_examples(tmp_path / "messages")[0].answers == ("b",)
    both = datasets.Dataset.from_dict(kinds["answers"])
    splits = datasets.DatasetDict({"train": both, "test": both.select([1])})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert open_examples(tmp_path / "splits", split="test")[0].answers == ("d",)
    for split in (None, "dev"):
        with pytest.raises(ValueError, match="split must be one of train, test"):
            open_examples(tmp_path / "splits", split=split)


def test_an_id_on_the_hub(tmp_path, monkeypatch):
    data.write_images(tmp_path)
    rows = [data.TWO_IMAGES | {"images": ["1.png", "2.png"]}]
    splits = {"train": datasets.Dataset.from_list(rows, split="train")}
    asked = []

    def load(name, split=None):
        asked.append((name, split))
        if name == "no/such":
            raise ConnectionError("no\nnetwork")
        return datasets.DatasetDict(splits) if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for split in (None, "train"):
        examples = open_examples("someone/photos", image_folder=tmp_path, split=split)
        assert examples[0].where == "someone/photos, row 1" and asked[-1][1] == split
        assert parts(examples[0].messages[0], tmp_path)[:2] == [b"1.png", b"2.png"]
    with pytest.raises(ValueError, match="image_folder"):
        open_examples("someone/photos")[0]
    with pytest.raises(ValueError, match="no/such: no network"):
        open_examples("no/such")


def test_several_right_answers(tmp_path):
    row = {"image": "0.png", "question": "What?", "answers": ["two", "2", "2"]}
    example = one(tmp_path, row)
    assert parts(example.messages[1]) == ["2"] and example.answers == ("two", "2", "2")
    example = one(tmp_path, row | {"answer": "both"})
    assert parts(example.messages[1]) == ["both"] and example.answers == ("two", "2", "2")


def test_images_in_the_row(tmp_path):
    data.write_images(tmp_path)
    encoded = base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    address = f"data:image/png;base64,{encoded}"
    by_part = [
        {"type": "image_url", "image_url": {"url": address, "detail": "auto"}},
        {"type": "image_url", "image_url": address},
        {"type": "image", "base64": encoded},
        {"type": "image", "image": address},
    ]
    content = [*by_part, {"type": "image"}, {"type": "text", "text": "Which?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    found = parts(one(tmp_path, {"messages": turns, "image": address}).messages[0])
    assert len(found) == 6 and all(image.startswith(PNG) for image in found[:5])


def test_system_messages_and_images_between_texts(tmp_path):
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "This <image>\nor\n<image> that?"},
        {"from": "gpt", "value": "this"},
    ]
    example = one(tmp_path, {"conversations": turns, "image": ["0.png", "1.png"]})
    assert roles(example) == ["system", "user", "assistant"]
    assert parts(example.messages[1], tmp_path) == ["This ", b"0.png", "or", b"1.png", " that?"]
    content = "<image>What?"
    row = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    }
    assert parts(one(tmp_path, row).messages[0]) == [content]  # a text, without images
    assert parts(one(tmp_path, row | {"image": "0.png"}).messages[0], tmp_path) == [
        b"0.png",
        "What?",
    ]


def test_paths_stay_in_the_folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    data.write_images(tmp_path / "in" / "deep")
    row = {"image": "deep/0.png", "question": "a", "answer": "b"}
    path = data.write(tmp_path / "in", [row])
    inside = str(tmp_path / "in/deep/0.png")
    for name, folder in {
        "deep/0.png": None,
        "deep/../deep/0.png": None,
        inside: None,
        "0.png": tmp_path / "in/deep",
        "in/deep/0.png": tmp_path,
    }.items():
        path.write_text(json.dumps(row | {"image": name}))
        example = open_examples(path, image_folder=folder)[0]
        assert example.messages[0]["content"][0]["image"] == inside
    for name in ("../x.png", "deep/../../x.png", "/etc/passwd", str(tmp_path / "in2/0.png"), ".."):
        path.write_text(json.dumps(row | {"image": name}))
        with pytest.raises(ValueError, match="photos.jsonl, row 1: .*outside"):
            open_examples(path)[0]
    for name in ("http://a/b.png", "HTTPS://a/b.png", "file:///etc/passwd", "s3://a/b"):
        path.write_text(json.dumps(row | {"image": name}))
        with pytest.raises(ValueError, match="photos.jsonl, row 1: .*image"):
            open_examples(path)[0]


USER, ASSISTANT = ({"role": role, "content": "x"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "empty"),
        ({"messages": [USER]}, "no answer"),
        ({"messages": [USER, USER, ASSISTANT]}, "message 2 must be of the assistant"),
        ({"messages": [ASSISTANT]}, "message 1 must be of the user"),
        ({"messages": [USER, ASSISTANT, USER]}, "no answer"),
        ({"messages": [USER, USER | {"role": "system"}, ASSISTANT]}, "message 2"),
        ({"messages": [USER, USER | {"role": "tool"}]}, "role of message 2"),
        ({"messages": [USER, {"role": "assistant"}]}, "content of message 2"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2.* empty"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [USER, ASSISTANT | {"weight": 1}]}, "weight"),
        ({"messages": [USER | {"content": [{"type": "audio"}]}, ASSISTANT]}, "'audio'"),
        ({"messages": [USER | {"content": [{"type": "text"}]}, ASSISTANT]}, "nothing"),
        ({"messages": [USER | {"content": [{"type": "image"}]}, ASSISTANT]}, "0 image.*for 1"),
        ({"messages": [USER, ASSISTANT], "image": "0.png"}, "1 image.*for 0"),
        ({"messages": [USER, ASSISTANT], "tools": [1]}, "tools"),
        ({"messages": [USER, ASSISTANT | {"content": "<image>"}], "image": "0.png"}, "message 2"),
        ({"messages": [USER, ASSISTANT], "answer": "x"}, "not several"),
        ({"messages": "x"}, "must be a list"),
        ({"messages": [1]}, "message 1"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "no image"),
        ({"conversations": [USER, ASSISTANT]}, "message 1 has role"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "message 2 has weight"),
        ({"messages": [USER, ASSISTANT | {"train": False}]}, "message 2 has train"),
        ({"question": "a"}, "answer missing"),
        ({"question": "a", "answer": 3}, "answer must be a text"),
        ({"question": "a", "answer": "b\ud800"}, "UTF-8"),
        ({"question": "", "answer": "b"}, "message 1.* empty"),
        ({"question": "a", "answer": "b", "image": "0.png", "images": ["1.png"]}, "not both"),
        ({"question": "a", "answer": "b", "image": 7}, "image must be"),
        ({"question": "a", "answer": "b", "image": "data:image/png;base64,%%"}, "base64"),
        ([], "row must be an object"),
        (None, "row must be an object"),
    ],
)
def test_bad_rows(tmp_path, row, problem):
    path = data.write(tmp_path, [data.TEXT_ALONE, row])
    examples = open_examples(path)  # opening it does not fail
    assert len(examples) == 2 and roles(examples[0])
    with pytest.raises(ValueError, match=rf"(?s)^photos.jsonl, row 2: .*{problem}"):
        examples[1]
    examples = open_examples(path, skip_bad_rows=True)
    assert len(examples) == 1 and len(examples.bad_rows) == 1
    assert examples.bad_rows[0].startswith("photos.jsonl, row 2: ")


def test_sources_that_cannot_be_opened(tmp_path):
    path = data.write(tmp_path)
    for source, options, error in [
        (tmp_path / "none.jsonl", {}, FileNotFoundError),
        ("no/such/folder/anywhere", {}, FileNotFoundError),
        (tmp_path / "0.png", {}, ValueError),
        (path, {"split": "train"}, ValueError),
        (7, {}, TypeError),
        ("", {}, TypeError),
        (tmp_path, {"question": "x", "image_folder": tmp_path}, ValueError),
    ]:
        with pytest.raises(error):
            open_examples(source, **options)
    for name, content in {
        "a.jsonl": b"\n\r\n",
        "b.jsonl": b"",
        "c.json": b"[]",
        "d.json": b'[{"a": 1}',
        "e.csv": b"question,image\na,b\n",
        "f.csv": b"question;image;answer\na;b;c\n",
        "g.csv": b"question,answer\n",
        "h.csv": b'question,answer\n"a,b\nc,d\n',
        "i.csv": b"answer,answer\n1,2\n",
        "j.csv": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            open_examples(tmp_path / name)
    with pytest.raises(ValueError, match="all 1 rows are bad"):
        open_examples(data.write(tmp_path, [{}]), skip_bad_rows=True)


def test_a_question_for_all_rows_is_not_dropped(tmp_path):
    path = data.write(tmp_path)
    for index in (0, 1, 2):
        with pytest.raises(ValueError, match="question"):
            open_examples(path, question="What?")[index]


def test_broken_images_are_left_out_if_asked(tmp_path):
    rows = [data.TEXT_ALONE, data.TWO_IMAGES, data.CONVERSATION | {"image": "none.png"}]
    path = data.write(tmp_path, rows)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    examples = open_examples(path, skip_bad_rows=True)
    assert len(examples) == 1 and len(examples.bad_rows) == 2
    assert "row 2" in examples.bad_rows[0] and "2.png" in examples.bad_rows[0]
    assert "row 3" in examples.bad_rows[1] and "none.png" in examples.bad_rows[1]


def test_a_file_that_changes_is_noticed(tmp_path):
    path = data.write(tmp_path)
    examples = pickle.loads(pickle.dumps(open_examples(path)))  # as a worker has it
    assert roles(examples[1]) == ["user", "assistant"]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="row 2: the file was changed"):
        examples[1]


def test_a_million_rows_open_in_seconds_without_their_images(tmp_path, monkeypatch):
    row = json.dumps({"image": "none/{}.png", "question": "What is it?", "answer": "a"}).encode()
    path = tmp_path / "many.jsonl"
    path.write_bytes((row + b"\n") * 1_000_000)
    parsed, parse = [], files.parse_json
    monkeypatch.setattr(files, "parse_json", lambda line: parsed.append(line) or parse(line))
    begin = time.process_time()
    examples = open_examples(path)
    assert time.process_time() - begin < 10
    assert len(examples) == 1_000_000 and len(parsed) <= 1
    assert examples[999_999].where == "many.jsonl, row 1000000" and len(parsed) <= 2


def test_lines_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 7)
    assert len(open_examples(data.write(tmp_path))) == 4
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 150)
    examples = open_examples(tmp_path / "photos.jsonl")
    assert roles(examples[2])
    with pytest.raises(ValueError, match="row 1: the row has .* bytes"):
        examples[0]
