"""2,000 mutated files: each row is a valid example or one clear error that names file and row."""

import csv
import io
import json
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import mllama
from mllama.data.collate import Collator
from mllama.data.sources import open_examples
from mllama.processing.image import load_image
from mllama.train.settings import load_settings
from tiny import data

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Image size")
SECONDS = 20  # of the processor, for one file
DEEP = "[" * 10_000 + "]" * 10_000
PIECES = [
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b"\r",
    b'"',
    b"'",
    b",",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"]",
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"<image>",
    b"<|image|>",
    b"\x1b[31m",
    DEEP.encode(),
]
VALUES = [
    None,
    True,
    -1,
    10**40,
    1e308,
    "",
    " ",
    "\0",
    "x" * 5000,
    "<image>",
    "<image><image>",
    "<eos>",
    "é\u202e\U0001f600",
    "../../etc/passwd",
    "/dev/zero",
    "/etc/passwd",
    "http://localhost/x.png",
    "data:image/png;base64,AAAA",
    "0.png\0.jpg",
    ".",
    [],
    {},
    [[]],
    [None],
    {"url": {"url": "0.png"}},
    ["0.png"] * 50,
]
TEXTS = ['"\\ud800"', DEEP, "1" * 5000, "1e999", "NaN", "-Infinity", '{"a": 1, "a": 2}', "0.png"]


@pytest.fixture(scope="module")
def collator() -> Collator:
    model, processor = mllama.load(dtype="float32", device="cpu")
    return Collator(model, processor, max_length=1000)


def one_line(error: Exception, *names: str) -> None:
    """Short, printable, and with the names."""
    text = str(error)
    assert text and len(text) < 1500 and all(name in text for name in names), text
    assert "\x1b" not in text and "\0" not in text, text


def check(path: Path, collator: Collator, rows: int | None, **options) -> tuple[dict, int]:
    """Read and encode each row. Returns the valid ones by number, and how many there are.

    Args:
        rows: how many there are, if the file can be opened.
    """
    begin, good, bad = time.process_time(), {}, []
    try:
        examples = open_examples(path, **options)
    except ValueError as error:
        one_line(error, path.name)
        return {}, 0
    assert rows is None or len(examples) == rows
    for index in range(len(examples)):
        try:
            example = examples[index]
            assert len(collator.encode(example)) > 0
            good[index] = example.messages
        except ValueError as error:
            one_line(error, path.name, "row")
            bad.append(str(error))
    if good and len(bad) % 3 == 1:  # one call that leaves out the bad ones, too
        whole = open_examples(path, **options)
        left = whole.leave_out_bad(collator.encode)
        assert left.bad_rows == bad and len(left) == len(good)
    assert time.process_time() - begin < SECONDS
    return good, len(examples)


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Change a few places of some bytes."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(content) + 1)
        end = min(at + chance.choice((1, 1, 4, 30)), len(content))
        kind = chance.randrange(6)
        if kind == 0:
            content = content[:at] + chance.choice(PIECES) + content[at:]
        elif kind == 1:
            content = content[:at] + content[end:]
        elif kind == 2:
            content = content[:at] + content[at:end] * chance.choice((2, 3, 40)) + content[end:]
        elif kind == 3:
            content = content[:at] + chance.randbytes(end - at) + content[end:]
        elif kind == 4:
            other = chance.randrange(len(content) + 1)
            content = content[:at] + content[other : other + 20] + content[end:]
        else:
            content = content[: chance.choice((at, len(content)))]
        content = content or b" "
    return content


def places(value, path=()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        for key, item in inner:
            found += (
                places(item, (*path, key)) if isinstance(item, (dict, list)) else [(*path, key)]
            )
    return found


def mutate_row(row: dict, chance: random.Random) -> str:
    """Change one value of a row, drop it, repeat it, or put it under another name."""
    row = json.loads(json.dumps(row))
    *head, last = chance.choice(places(row))
    target = row
    for key in head:
        target = target[key]
    kind = chance.randrange(5)
    if kind == 0:
        target[last] = chance.choice(VALUES)
    elif kind == 1:
        target[last] = "MARK"
        return json.dumps(row).replace('"MARK"', chance.choice(TEXTS))
    elif kind == 2:
        del target[last]
    elif kind == 3 and isinstance(target, list):
        target.insert(chance.randrange(len(target) + 1), chance.choice([target[last], *VALUES]))
    elif kind == 3:
        target[chance.choice(("role", "image", "text", "messages", "weight", "x"))] = target[last]
    else:
        moved = json.dumps(row)
        names = [name for name in ("user", "assistant", "human", "gpt", "type") if name in moved]
        return moved.replace(
            chance.choice(names or ["image"]), chance.choice(("gpt", "user", "q")), 1
        )
    return json.dumps(row)


def lines(content: bytes) -> int:
    """Lines that are not empty."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    return sum(line not in (b"", b"\r") for line in content.split(b"\n"))


def test_mutated_lines(tmp_path, collator):
    """Bytes anywhere in a file."""
    path, chance, found = data.write(tmp_path), random.Random(1), 0
    whole = path.read_bytes()
    for _ in range(400):
        content = mutate(whole, chance)
        path.write_bytes(content)
        found += len(check(path, collator, lines(content))[0])
    assert 800 < found < 1600  # most rows are as they were


def test_mutated_rows_leave_the_others_as_they_are(tmp_path, collator):
    path, chance, broken = data.write(tmp_path), random.Random(2), 0
    valid, _ = check(path, collator, 4)
    assert sorted(valid) == [0, 1, 2, 3]
    for _ in range(400):
        number = chance.randrange(4)
        text = [json.dumps(row) for row in data.ROWS]
        text[number] = mutate_row(data.ROWS[number], chance)
        path.write_text("\n".join(text), encoding="utf-8", errors="surrogatepass")
        found, _ = check(path, collator, 4)
        broken += number not in found
        others = [index for index in range(4) if index != number]
        assert [found[index] for index in others] == [valid[index] for index in others]
    assert broken > 200


CSV = b"image,question,answer\n0.png,How many?,two\n,hello,you\n" + b'1.png,"a, ""b""","c\nd"\n' * 2


def test_mutated_csv(tmp_path, collator):
    data.write_images(tmp_path)
    path, chance, found = tmp_path / "x.csv", random.Random(3), 0
    for _ in range(400):
        content = mutate(CSV, chance)
        path.write_bytes(content)
        text = content.decode("utf-8-sig", "surrogateescape")
        try:
            rows = sum(map(bool, csv.reader(io.StringIO(text, newline=""), strict=True))) - 1
        except csv.Error:
            rows = None
        good, count = check(path, collator, rows)
        assert not (rows is None and count)
        found += len(good)
    assert 600 < found < 1600


def pictures(folder: Path) -> dict[str, bytes]:
    """Valid images of many kinds."""
    data.write_images(folder, 1)
    plain = Image.open(folder / "0.png").convert("RGB")
    deep = Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.uint16))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    kinds = {
        "png": (plain, {}),
        "jpeg": (plain, {}),
        "gif": (plain.convert("P"), {"save_all": True, "append_images": [plain.rotate(9)]}),
        "deep.png": (deep, {}),
        "cmyk.jpeg": (plain.convert("CMYK"), {}),
        "turned.jpeg": (plain, {"exif": rotated}),
        "clear.png": (plain.convert("RGBA"), {}),
        "webp": (plain, {}),
        "tiff": (plain, {"compression": "tiff_lzw"}),
        "bmp": (plain.convert("L"), {}),
    }
    found = {}
    for name, (image, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, name.split(".")[-1], **options)
        found[name] = file.getvalue()
    return found


ROW = {"image": "x.png", "question": "What?", "answer": "a"}


def test_mutated_images(tmp_path, collator):
    path, chance, good = data.write(tmp_path, [ROW, data.TEXT_ALONE]), random.Random(4), 0
    found = list(pictures(tmp_path).values())
    for number in range(500):
        (tmp_path / "x.png").write_bytes(mutate(found[number % len(found)], chance))
        valid, _ = check(path, collator, 2)
        assert 1 in valid
        good += 0 in valid
    assert 50 < good < 400


def test_kinds_of_images(tmp_path, collator):
    """All kinds are read, upright, and an animation by its first frame."""
    path = data.write(tmp_path, [ROW])
    sizes = {}
    for name, content in pictures(tmp_path).items():
        (tmp_path / "x.png").write_bytes(content)
        assert len(check(path, collator, 1)[0]) == 1
        image = load_image(open_examples(path)[0].messages[0]["content"][0]["image"])
        assert image.mode == "RGB"
        sizes[name] = image.size
        own = Image.open(io.BytesIO(content))
        if name == "turned.jpeg":
            assert np.array_equal(image, ImageOps.exif_transpose(own).convert("RGB"))
        elif name == "gif":
            assert own.n_frames == 2 and np.array_equal(image, own.convert("RGB"))
    assert sizes["turned.jpeg"] == sizes["png"][::-1]


def chunk(kind: bytes, content: bytes) -> bytes:
    end = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + end


def bomb(width: int, height: int, content: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (13_000, 13_000), (0, 4)])
def test_images_that_would_fill_the_memory(tmp_path, collator, size):
    path = data.write(tmp_path, [ROW])
    (tmp_path / "x.png").write_bytes(bomb(*size, zlib.compress(bytes(10_000_000), 9)))
    assert check(path, collator, 1) == ({}, 1)


def test_files_that_are_no_images(tmp_path, collator):
    path = data.write(tmp_path, [ROW])
    (tmp_path / "x.png").mkdir()
    assert check(path, collator, 1) == ({}, 1)
    (tmp_path / "x.png").rmdir()
    for content in (b"", b"<html>", b"\x89PNG", b"RIFF\0\0\0\0WEBP", b"\0" * 1000, b"GIF89a"):
        (tmp_path / "x.png").write_bytes(content)
        assert check(path, collator, 1) == ({}, 1)


CONFIG = b"""data: photos.jsonl
method: lora
rank: 8
targets: [attn, "mlp[0:2]"]
ranks: {attn: 4}
epochs: 2.5
max_length: 128
pack: true
# a comment
run_name: null
"""


def test_mutated_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write(tmp_path)
    path, chance, good = tmp_path / "c.yaml", random.Random(5), 0
    path.write_bytes(CONFIG)
    assert load_settings(path).rank == 8
    for _ in range(300):
        path.write_bytes(mutate(CONFIG, chance))
        begin = time.process_time()
        try:
            load_settings(path)
            good += 1
        except (ValueError, FileNotFoundError) as error:
            one_line(error, "c.yaml")
        assert time.process_time() - begin < SECONDS
    assert 10 < good < 250
