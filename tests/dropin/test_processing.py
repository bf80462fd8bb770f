"""The processors and image functions of older scripts against the plain formula and the package."""

import base64
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, ByT5Tokenizer

import mllama
from mllama.assets import EMBEDDED
from mllama.dropin import processing
from mllama.dropin.processing import (
    CLIP_MEAN,
    CLIP_STD,
    HALVES,
    add_image_tokens_to_prompts,
    normalize,
    process_images_clip,
    process_images_half,
    rescale,
    resize,
)

N, S = 16, 32
RUN = "<image>" * N
PROMPT = "What color is it?"
KINDS = {
    processing.MllamaImageProcessor: (CLIP_MEAN, CLIP_STD),
    processing.paligemmaProcessor: (HALVES, HALVES),
    processing.PaliGemmaProcessor: (HALVES, HALVES),
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def processor(kind, make_tokenizer):
    return kind(make_tokenizer(), N, S)


def image(seed=0, size=(50, 37)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def plain_formula(image, size, mean, std, resample=Image.Resampling.BICUBIC, factor=1 / 255):
    """What the loose files compute, with Pillow and numpy alone."""
    pixels = np.array(image.resize((size[1], size[0]), resample=resample))
    pixels = (pixels * factor).astype(np.float32)
    pixels = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.tensor(pixels.transpose(2, 0, 1))


def text_of(processor, batch) -> list[str]:
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [processor.tokenizer.decode(row[mask.bool()]) for row, mask in rows]


def same(batch, expected) -> bool:
    return batch.keys() == expected.keys() and all(
        torch.equal(batch[name], expected[name]) for name in expected
    )


# ---- images


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_process_images_by_the_plain_formula(resample):
    images = [image(), image(1, (9, 80))]
    found = process_images_clip(images, (12, 20), 0.01, HALVES, CLIP_STD, resample=resample)
    assert found.dtype == torch.float32
    for given, pixels in zip(images, found, strict=True):
        expected = plain_formula(given, (12, 20), HALVES, CLIP_STD, resample, 0.01)
        assert torch.equal(pixels, expected)
    assert np.array_equal(resize(image(), (8, 12), resample), image().resize((12, 8), resample))


@pytest.mark.parametrize(
    ("process", "mean", "std"),
    [(process_images_clip, CLIP_MEAN, CLIP_STD), (process_images_half, HALVES, HALVES)],
)
def test_each_modules_defaults(process, mean, std):
    pixels = process([image(), image(1)])
    assert torch.equal(pixels[0], plain_formula(image(), (224, 224), mean, std))
    assert torch.equal(process(image()), pixels[:1])
    assert torch.equal(process(image(), (224, 224), 1 / 255), pixels[:1])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode):
    other = image().convert("L").convert(mode) if mode == "I;16" else image().convert(mode)
    resized = resize(other, (8, 12))
    assert resized.mode == "RGB" and resized.size == (12, 8)
    assert torch.equal(
        process_images_half([other], (37, 50)),
        process_images_half(resize(other, (37, 50)), (37, 50)),
    )


def test_loose_steps():
    array = np.array(image())
    assert np.array_equal(rescale(image()), (array * (1 / 255)).astype(np.float32))
    assert rescale(array, 0.5, np.float16).dtype == np.float16
    assert np.array_equal(normalize(np.full((1, 1, 3), 3, np.uint8), 1, 2), np.ones((1, 1, 3)))
    assert normalize(array.astype(np.float64), CLIP_MEAN, CLIP_STD).dtype == np.float64
    large = image(size=(400, 300))
    gap = large.resize((30, 20), Image.Resampling.BICUBIC, reducing_gap=1.5)
    assert np.array_equal(resize(large, (20, 30), None, reducing_gap=1.5), gap)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: resize(image(), (8,)), ValueError, "size"),
        (lambda: resize(image(), {"shortest_edge": 8}), ValueError, "size"),
        (lambda: resize(image(), (8, 0)), ValueError, "size"),
        (lambda: resize(image(), (10**9, 10**9)), ValueError, "size"),
        (lambda: resize(image(), (8, 8), 99), ValueError, "filter"),
        (lambda: resize("nowhere.png", (8, 8)), FileNotFoundError, "nowhere.png"),
        (lambda: normalize(np.zeros((4, 4, 3)), [1, 2], 1), ValueError, None),
        (lambda: normalize(np.zeros((4, 4, 3)), 1, [1, 0, 1]), ValueError, "std"),
        (lambda: process_images_half([]), ValueError, "images"),
        (lambda: process_images_half(None), TypeError, "NoneType"),
        (lambda: process_images_half([image()], (8, 8), "x"), ValueError, "rescale_factor"),
        (lambda: process_images_half([image()], (8, 8), 3), ValueError, "rescale_factor"),
        (lambda: process_images_half([image()], (8, 8), np.nan), ValueError, "rescale_factor"),
        (lambda: process_images_half([image()], colour=3), TypeError, "colour"),
        (lambda: add_image_tokens_to_prompts(["hi"], None, 2, "x"), TypeError, "prefix_prompt"),
    ],
)
def test_what_cannot_be(call, error, named):
    with pytest.raises(error, match=named):
        call()


# ---- prompts


def test_image_tokens_come_before_bos_and_a_newline_last():
    layout = add_image_tokens_to_prompts
    assert layout("hi", "<bos>", 3, "<image>") == "<image><image><image><bos>hi\n"
    assert layout("hi", None, 1, "<image>") == "<image>hi\n"
    assert layout("hi\n", "", 0, "<image>") == "hi\n"


def test_attributes_and_tokens(kind, make_tokenizer):
    tokenizer = make_tokenizer()
    before = len(tokenizer)
    processor = kind(tokenizer, N, S)
    assert kind.IMAGE_TOKEN == processor.IMAGE_TOKEN == "<image>"
    assert (processor.image_seq_length, processor.image_size) == (N, S)
    assert processor.tokenizer is tokenizer and processor.image_token_id == before
    assert "<image>" in tokenizer.extra_special_tokens
    assert not tokenizer.add_bos_token and not tokenizer.add_eos_token
    tokens = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
    assert ids == [[before + 1 + place] for place in range(1152)]


def test_a_batch(processor, kind):
    batch = processor([PROMPT], [image()], padding="longest", truncation=True)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert text_of(processor, batch) == [RUN + "<bos>" + PROMPT + "\n"]
    assert (batch["input_ids"] == processor.image_token_id).sum() == N
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert torch.equal(batch["pixel_values"][0], plain_formula(image(), (S, S), *KINDS[kind]))
    for key in ("pixel Value", "pixel_value"):
        assert key in batch and batch[key] is batch["pixel_values"]
    moved = {name: tensor.to("cpu") for name, tensor in batch.items()}
    assert (lambda pixel_values, input_ids, attention_mask: True)(**moved)


def test_every_way_to_call_it(processor, tmp_path):
    expected = processor([PROMPT], [image()])
    processor.save_pretrained(tmp_path)
    for batch in (
        processor(PROMPT, image()),
        processor([PROMPT], [image()], True),
        processor(text=[PROMPT], images=[image()], padding=True, return_tensors="pt"),
        processor(images=np.array(image()), text=PROMPT, truncation=False),
        pickle.loads(pickle.dumps(processor))([PROMPT], [image()]),
        type(processor).from_pretrained(tmp_path)([PROMPT], [image()]),
    ):
        assert same(batch, expected)


def test_prompts_are_the_packages(kind, make_tokenizer):
    ours, (mean, std) = kind(make_tokenizer(), N, S), KINDS[kind]
    options = {"image_mean": mean, "image_std": std, "location_tokens": True}
    theirs = mllama.MllamaImageProcessor(make_tokenizer(), N, S, **options)
    prompts, images = [PROMPT, "hello\n", "<bos>two"], [image(seed) for seed in range(3)]
    for given in (
        (prompts, images),
        ("<image> and <image>?", images[:2]),
        (PROMPT, None),
        (prompts[:2], [images[:2], None]),
    ):
        assert same(ours(*given), theirs(*given))
    run = add_image_tokens_to_prompts(PROMPT, "<bos>", N, "<image>")
    with pytest.raises(ValueError, match="<image>"):  # an expanded prompt is refused
        ours(run, images[0])
    assert text_of(ours, ours("see <image>", image())) == ["see " + RUN]


def test_truncation_without_a_length_cuts_nothing_and_says_nothing(kind, make_tokenizer, caplog):
    processor = kind(make_tokenizer(), 100, S)
    processor.tokenizer.model_max_length = 40
    logging.getLogger("transformers").propagate = True
    try:
        batch = processor([PROMPT], [image()], padding=True, truncation=True)
    finally:
        logging.getLogger("transformers").propagate = False
    assert text_of(processor, batch) == ["<image>" * 100 + "<bos>" + PROMPT + "\n"]
    assert not caplog.records
    assert processor(["one two three"], [image()], max_length=103)["input_ids"].shape == (1, 103)
    with pytest.raises(ValueError, match="max_length"):
        processor(PROMPT, image(), max_length=40)


def test_other_tokenizers(kind, make_tokenizer):
    for tokenizer in (
        AutoTokenizer.from_pretrained(EMBEDDED),
        make_tokenizer(adds_bos=True),
        make_tokenizer(bos=False, pad=False),
        ByT5Tokenizer(),  # without BOS, and without the habit of adding it
    ):
        processor = kind(tokenizer, N, S)
        texts = text_of(processor, processor(["one", "two"], [image(), image(1)]))
        assert texts == [RUN + (tokenizer.bos_token or "") + text + "\n" for text in ("one", "two")]
        assert not getattr(tokenizer, "add_bos_token", False)


def test_processors_that_cannot_be(kind, make_tokenizer):
    with pytest.raises(TypeError, match="tokenizer"):
        kind("gpt2", N, S)
    with pytest.raises(ValueError, match="num_image_token"):
        kind(make_tokenizer(), 0, S)


def test_a_tiktoken_tokenizer_is_wrapped(kind, tmp_path):
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    tokens = [bytes([byte]) for byte in range(256)] + [b"ha", b"at", b"hat", b"What", b" p"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    metas = mllama.Tokenizer(tmp_path / "tokenizer.model")
    processor = kind(metas, N, S)
    token = processor.image_token_id
    assert token == metas.n_words and "<image>" not in metas.special
    prompts = ["What's in the  picture?", "Wie heißt das? 日本語 12345"]
    batch = processor(prompts, [image(), image(1)], padding="longest", truncation=True)
    for row, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], prompts, strict=True):
        assert row[mask.bool()].tolist() == [token] * N + metas.encode(prompt + "\n", bos=True)
        assert set(row[~mask.bool()].tolist()) <= {metas.pad_id}
    text = processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert text == prompts[0] + "\n"
