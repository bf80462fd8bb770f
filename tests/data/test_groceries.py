"""examples/finetune_groceries writes folders of classes; no network is used."""

import io
import runpy
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllama.data.sources import open_examples

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

EXAMPLE = Path(__file__).parent.parent.parent / "examples/finetune_groceries"
COLORS = {"Royal-Gala": (200, 40, 40), "Kaiser": (120, 90, 30)}


def jpeg(color, size=(40, 56)) -> bytes:
    """A photograph of one color, darker at the left."""
    shade = np.linspace(0.5, 1, size[0])[None, :, None]
    pixels = (np.array(color) * shade).repeat(size[1], 0).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path) -> Path:
    """A parquet file with the package's columns; the test split has each photograph twice."""
    rows = [
        {"dataset": split, "finegrained_cat": name, "image_data": jpeg(np.array(color) + shift)}
        for name, color in COLORS.items()
        for split, shift in (("train", 0), ("train", 20), ("val", 10), ("test", 5), ("test", 5))
    ]
    rows.append({**rows[0], "dataset": "test", "finegrained_cat": "Kaiser"})  # nearest to a Gala
    path = tmp_path / "images2.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def example() -> dict:
    return runpy.run_path(str(EXAMPLE / "prepare.py"))


@pytest.mark.parametrize("apart", [False, True])
def test_folders(tmp_path, source, example, capsys, apart):
    out = tmp_path / "data"
    flags = ["--source", str(source), "--out", str(out), "--copies", "3", *["--val"] * apart]
    example["main"](flags)
    assert "chance: 50.0%" in (printed := capsys.readouterr().out)
    assert "nearest neighbor on 32 x 32 pixels: 66.7%" in printed
    rows = {folder.name: list(open_examples(folder, question="?")) for folder in out.iterdir()}
    counts = {"train": 16, "val": 2, "test": 3} if apart else {"train": 24, "test": 3}
    assert {split: len(found) for split, found in rows.items()} == counts
    answers = {row.messages[-1]["content"][0]["text"] for row in rows["train"]}
    assert answers == {"royal gala", "kaiser"}
    photographs = {path.read_bytes() for path in out.glob("train/*/????.jpg")}
    copies = {path.read_bytes() for path in out.glob("train/*/????-??.jpg")}
    assert len(photographs) * 3 == len(copies - photographs) == len(copies)
    with pytest.raises(FileExistsError):
        example["prepare"](out, 3, source)


def test_copies_keep_the_kind(example):
    """They have other pixels, nearer to their own photograph's color than to another's."""
    random = np.random.default_rng(0)
    for color in COLORS.values():
        image = Image.open(io.BytesIO(jpeg(color)))
        means = [np.asarray(example["changed"](image, random)).mean((0, 1)) for _ in range(8)]
        assert len({tuple(mean.round()) for mean in means}) > 4
        hues = np.array([mean / mean.sum() for mean in means])
        distances = {
            name: np.abs(hues - np.divide(other, sum(other))).sum(1)
            for name, other in COLORS.items()
        }
        own = next(name for name, other in COLORS.items() if other == color)
        other = next(name for name in COLORS if name != own)
        assert (distances[own] < distances[other]).all()


def test_same_copies_each_time(example, source, tmp_path):
    for folder in ("a", "b"):
        example["prepare"](tmp_path / folder, 2, source)
    a, b = ([path.read_bytes() for path in sorted(tmp_path.glob(f"{x}/*/*/*"))] for x in "ab")
    assert a == b and len(a) == 18 + 3


def test_wheel(example, source, tmp_path):
    wheel = tmp_path / "eccd.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(source, example["MEMBER"])
    assert example["read_photos"](example["read_source"](wheel)) == example["read_photos"](
        source.read_bytes()
    )


def test_configs(monkeypatch, tmp_path, source, example):
    """Every key of both configs is known, and their data is what prepare.py writes."""
    settings = pytest.importorskip("mllama.train.settings")
    example["prepare"](tmp_path / "runs/groceries-data", 0, source)
    monkeypatch.chdir(tmp_path)
    adapter, full = (settings.load_settings(EXAMPLE / name) for name in ("train.yaml", "full.yaml"))
    assert (adapter.method, full.method) == ("lora", "full")
    assert adapter.output != full.output and adapter.data == full.data
