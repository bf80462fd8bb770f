import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor as Stock
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllama.hf.processors.paligemma import PaliGemmaProcessor
from mllama.hf.processors.square import SquareImageProcessor
from mllama.processing.detections import Detection, parse_detections

N, S = 4, 28
SETTINGS = {"size": {"height": S, "width": S}, "image_seq_length": N}
RUN = "<image>" * N
BOTH = {"padding": True, "return_tensors": "pt"}


@pytest.fixture
def ours(make_tokenizer):
    return PaliGemmaProcessor(SquareImageProcessor(**SETTINGS), make_tokenizer())


@pytest.fixture
def stock(make_tokenizer):
    return Stock(SiglipImageProcessorPil(**SETTINGS), make_tokenizer())


def text_of(processor, batch):
    return [
        processor.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("suffix", [False, True])
def test_batches_are_stock(ours, stock, noise, side, suffix):
    a, b, c = noise(), noise(20, 30, 1), noise(60, 9, 2)
    for text, images in [
        ("caption en", a),
        ("<image>caption en", a),
        (["caption en", "a much longer prompt"], [a, b]),
        (["a", "bc"], [[a, b], [c, a]]),
        (["<image>a", "<image><image>bc"], [a, b, c]),
        (["<image> a <image> b"], [[b, c]]),
    ]:
        given = (
            {"suffix": ["two cats", "x"][: 1 if isinstance(text, str) else len(text)]}
            if suffix
            else {}
        )
        batch = ours(images=images, text=text, padding_side=side, **given, **BOTH)
        expected = stock(images=images, text=text, padding_side=side, **given, **BOTH)
        if not suffix:  # there stock writes labels of nothing
            assert (expected.pop("labels") == -100).all()
        assert set(batch) == set(expected)
        for name, value in expected.items():
            assert batch[name].dtype == value.dtype and torch.equal(batch[name], value), name


def test_layout(ours, noise):
    for text, images, expected in [
        ("caption en", noise(), f"{RUN}<bos>caption en\n"),
        ("<image>caption en\n", noise(), f"{RUN}<bos>caption en\n"),
        ("<image><bos>caption en\n", noise(), f"{RUN}<bos>caption en\n"),
        ("<bos>caption en", noise(), f"{RUN}<bos>caption en\n"),
        ("<image> a <image>b", [noise(), noise()], f"{RUN} a {RUN}<bos>b\n"),
        ("<bos><image>b", noise(), f"<bos>{RUN}b\n"),
        ("no image", None, "<bos>no image\n"),
        ("", noise(), f"{RUN}<bos>\n"),
    ]:
        assert text_of(ours, ours(images=images, text=text, **BOTH)) == [expected]
    batch = ours(
        images=[[noise()], None, [noise(), noise()]],
        text=["<image>a", "b", "<image>c<image>d"],
        **BOTH,
    )
    assert (
        text_of(ours, batch) == [f"{RUN}<bos>a\n", "<bos>b\n", f"{RUN}c{RUN}<bos>d\n"]
        and len(batch["pixel_values"]) == 3
    )
    assert set(ours(images=[noise()] * 2, return_tensors="pt")) == {"pixel_values"}


def test_suffix_and_labels(ours, noise):
    for suffix in ("two cats", "two cats<eos>"):
        batch = ours(
            images=[noise()] * 2,
            text=["count", "how many cats"],
            suffix=[suffix, "x"],
            padding_side="right",
            **BOTH,
        )
        assert text_of(ours, batch) == [
            f"{RUN}<bos>count\ntwo cats<eos>",
            f"{RUN}<bos>how many cats\nx<eos>",
        ]
        for row, answer in zip(range(2), ("two cats<eos>", "x<eos>"), strict=True):
            learnt = batch["labels"][row] != -100
            assert torch.equal(learnt, batch["token_type_ids"][row] == 1)
            assert ours.decode(batch["labels"][row][learnt]) == answer
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    ragged = ours(images=noise(), text="count", suffix="x")
    assert [len(ragged[name][0]) for name in ("labels", "token_type_ids")] == [
        len(ragged["input_ids"][0])
    ] * 2


@pytest.mark.parametrize("suffix", [None, "x"])
def test_tokenizers_that_add_bos_do_not_double_it(make_tokenizer, noise, suffix):
    processor = PaliGemmaProcessor(SquareImageProcessor(**SETTINGS), make_tokenizer(adds_bos=True))
    batch = processor(images=noise(), text="a", suffix=suffix, **BOTH)
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1


def test_truncation_never_cuts_an_image(ours, noise):
    assert (
        len(
            ours(images=noise(), text="caption en", truncation=True, max_length=N + 2)["input_ids"][
                0
            ]
        )
        == N + 2
    )
    with pytest.raises(ValueError, match="max_length"):
        ours(images=noise(), text="caption en", truncation=True, max_length=3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"text": "<image>a", "images": 2}, ValueError, r"hold 1 <image> .* got 2 image"),
        ({"text": ["a", "b", "c"], "images": 2}, ValueError, "2 image.* for 3 prompts"),
        ({"text": "<image>a"}, ValueError, r"hold 1 <image> .* got 0 image"),
        (
            {"text": ["a", "b"], "images": 2, "suffix": ["x"]},
            ValueError,
            r"1 suffix\(es\) for 2 prompt",
        ),
        ({"text": "a", "images": 1, "suffix": [None]}, TypeError, "suffix"),
        ({"text": "a", "images": 1, "suffix": "an <image>"}, ValueError, "suffix"),
        ({"text": [], "images": 1}, ValueError, "text is an empty list"),
        ({"text": "a", "videos": [1]}, TypeError, "no videos and no audio"),
        ({}, ValueError, "give text, images, or both"),
        ({"text": 5, "images": 1}, TypeError, "text"),
        (
            {"text": "a", "images": 1, "return_text_replacement_offsets": True},
            ValueError,
            "give the answer as suffix",
        ),
    ],
)
def test_bad_calls(ours, noise, arguments, error, match):
    if "images" in arguments:
        arguments = {**arguments, "images": [noise()] * arguments["images"]}
    with pytest.raises(error, match=match):
        ours(**arguments)


@pytest.mark.parametrize("tokens", [None, 0, -1, 1.5, 10**9, "4"])
def test_bad_image_seq_length(make_tokenizer, tokens):
    with pytest.raises(ValueError, match="image_seq_length"):
        PaliGemmaProcessor(
            SquareImageProcessor(size=SETTINGS["size"], image_seq_length=tokens), make_tokenizer()
        )


def test_refuses_another_image_processor(make_tokenizer):
    with pytest.raises(ValueError, match="holds a CLIPImageProcessor"):
        PaliGemmaProcessor(CLIPImageProcessorPil(), make_tokenizer())


def test_stock_autoprocessor_gives_the_same(ours, noise, tmp_path):
    ours.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert (
        settings["processor_class"] == "PaliGemmaProcessor"
        and settings["image_processor"]["image_processor_type"] == "SiglipImageProcessor"
    )
    stock, again = (
        AutoProcessor.from_pretrained(tmp_path),
        PaliGemmaProcessor.from_pretrained(tmp_path),
    )
    assert type(stock) is Stock and type(again.image_processor) is SquareImageProcessor
    again.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    given = {"images": noise(), "text": "caption en", "suffix": "a cat", **BOTH}
    expected = ours(**given)
    for other in (stock(**given), again(**given)):
        assert set(other) == set(expected) and all(
            torch.equal(other[name], expected[name]) for name in expected
        )


def test_reads_older_folders(
    make_tokenizer, noise, tmp_path
):  # as released: preprocessor_config.json only
    make_tokenizer().save_pretrained(tmp_path)
    older = {
        **SETTINGS,
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    ours, stock = PaliGemmaProcessor.from_pretrained(tmp_path), Stock.from_pretrained(tmp_path)
    batch, expected = (
        processor(images=noise(), text="a", suffix="b", **BOTH) for processor in (ours, stock)
    )
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


# ---- places
# ---------------------------------------------------------------------------------------------

CODES = "".join(f"<seg{code:03d}>" for code in range(112, 128))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no cat here", []),
        ("<loc0000><loc0256><loc0512><loc0768> cat", [("cat", (100.0, 0.0, 300.0, 100.0), ())]),
        (
            "<loc0000><loc0256><loc0512><loc0768> black cat ; <loc0512><loc0512><loc1023><loc1023> "
            "dog",
            [
                ("black cat", (100.0, 0.0, 300.0, 100.0), ()),
                ("dog", (200.0, 100.0, 400 * 1023 / 1024, 200 * 1023 / 1024), ()),
            ],
        ),
        (
            f"<loc0000><loc0256><loc0512><loc0768>{CODES} cat",
            [("cat", (100.0, 0.0, 300.0, 100.0), tuple(range(112, 128)))],
        ),
        (
            f"<loc0000><loc0256><loc0512><loc0768> {CODES}cat ;",
            [("cat", (100.0, 0.0, 300.0, 100.0), tuple(range(112, 128)))],
        ),
        ("<loc0000><loc0256><loc0512><loc0768>", [("", (100.0, 0.0, 300.0, 100.0), ())]),
        ("<loc0000><loc0256><loc0512> cat", []),  # three places
        ("<loc0000><loc0256><loc0512><loc1024> cat", []),  # off the grid
        (
            "<loc0001><loc0000><loc0256><loc0512><loc0768> cat",
            [("", (0.0, 200 / 1024, 200.0, 50.0), ())],
        ),
        (
            "<loc0000><loc0256><loc0512><loc0768> cat<eos>",
            [("cat", (100.0, 0.0, 300.0, 100.0), ())],
        ),
        (
            "<loc0000><loc\u0660\u0660\u0660\u0661><loc0512><loc0768> cat",
            [],
        ),  # digits of another script are no tokens
    ],
)
def test_detections(text, expected):
    assert parse_detections(text, 400, 200) == [Detection(*found) for found in expected]
    assert parse_detections(text, np.int64(400), np.float32(200)) == [
        Detection(*found) for found in expected
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((None, 1, 1), TypeError),
        (("", "1", 1), TypeError),
        (("", 1, True), TypeError),
        (("", 0, 1), ValueError),
        (("", 1, float("nan")), ValueError),
    ],
)
def test_bad_detections(arguments, error):
    with pytest.raises(error):
        parse_detections(*arguments)


def test_location_tokens_survive_decoding(ours):
    text = "<loc0000><loc0256><loc0512><loc0768> cat"
    ids = ours.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert parse_detections(ours.decode(ids, skip_special_tokens=True), 400, 200)[0].box == (
        100.0,
        0.0,
        300.0,
        100.0,
    )
    assert np.count_nonzero(np.array(ids) >= ours.tokenizer.convert_tokens_to_ids("<loc0000>")) == 4
