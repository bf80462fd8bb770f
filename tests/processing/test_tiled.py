import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllama.hf.processors.tiled import TiledImageProcessor, TiledProcessor

T = 28
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SETTINGS = {"size": {"height": T, "width": T}, **CLIP}
SIZES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (1, 3000),
    (3000, 1),
    (2, 2000),
    (T, T),
    (T + 1, T - 1),
    (2 * T, T),
    (T, 2 * T),
    (4 * T, T + 1),
    (T, 5 * T),
]
SIZES += [(200, 133), (133, 200), (640, 480), (2 * T, 2 * T), (2 * T + 1, 2 * T), (99, 100)]
IMAGE, BOS = "<|image|>", "<|begin_of_text|>"
BOTH = {"padding": True, "return_tensors": "pt"}


def equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


@pytest.fixture
def ours(make_llama_tokenizer, llama_template):
    return TiledProcessor(
        TiledImageProcessor(**SETTINGS), make_llama_tokenizer(), chat_template=llama_template
    )


@pytest.fixture
def stock(make_llama_tokenizer, llama_template):
    return MllamaProcessor(
        MllamaImageProcessorPil(**SETTINGS), make_llama_tokenizer(), chat_template=llama_template
    )


# ---- images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 12])
def test_tiles_are_stock(noise, tiles):
    ours, stock = (
        TiledImageProcessor(**SETTINGS, max_image_tiles=tiles),
        MllamaImageProcessorPil(**SETTINGS, max_image_tiles=tiles),
    )
    for size in SIZES:
        image = noise(*size)
        equal(ours(image, return_tensors="pt"), stock(image, return_tensors="pt"))


@pytest.mark.parametrize(
    "overrides",
    [
        {"resample": 3},
        {"resample": 1},
        {"resample": 0},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 100},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"size": {"height": 20, "width": 20}},
        {"max_image_tiles": 2},
    ],
    ids=str,
)
def test_options_are_stock(noise, overrides):
    for size in ((100, 37), (5, 90)):
        image = noise(*size)
        expected = MllamaImageProcessorPil(**SETTINGS)(image, return_tensors="pt", **overrides)
        equal(TiledImageProcessor(**SETTINGS)(image, return_tensors="pt", **overrides), expected)


def test_rows_are_stock(noise):
    ours, stock = TiledImageProcessor(**SETTINGS), MllamaImageProcessorPil(**SETTINGS)
    a, b, c = noise(100, 30), noise(20, 20, 1), noise(60, 90, 2)
    for rows in (a, [a, b], [[a], [b, c]], [[a, b, c], [c], [b, b]], [[a], []]):
        equal(ours(rows, return_tensors="pt"), stock(rows, return_tensors="pt"))
    batch, expected = (
        ours([None, a, [b, c]], return_tensors="pt"),
        ours([[], [a], [b, c]], return_tensors="pt"),
    )
    equal(batch, expected)
    assert (
        batch["aspect_ratio_ids"][0].tolist() == [0, 0]
        and batch["aspect_ratio_mask"][0].tolist() == [[1, 0, 0, 0]] * 2
    )
    assert not batch["pixel_values"][0].any() and batch["num_tiles"][0] == []


def test_every_kind_of_image(noise, tmp_path):
    processor, image = TiledImageProcessor(**SETTINGS), noise(100, 37)
    image.save(tmp_path / "a.png")
    array = np.array(image)
    expected = processor(image, return_tensors="pt")
    for same in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        array,
        torch.from_numpy(array),
        array[None],
        [array[None]],
    ):
        equal(processor(same, return_tensors="pt"), expected)
    for mode in ("L", "CMYK", "P", "LA", "1", "I;16"):
        odd = Image.new("I;16", (40, 30)) if mode == "I;16" else image.convert(mode)
        assert processor(odd, return_tensors="pt")["pixel_values"].shape == (1, 1, 4, 3, T, T)
    clear = Image.new("RGBA", (T, T), (0, 0, 0, 0))  # lies on white
    white = processor(Image.new("RGB", (T, T), "white"), return_tensors="pt")
    equal(processor(clear, return_tensors="pt"), white)
    turned = Image.new("RGB", (90, 30))
    turned.getexif()[0x0112] = 6
    assert (
        processor(turned, return_tensors="pt")["aspect_ratio_ids"].item()
        == processor(turned.rotate(90, expand=True))["aspect_ratio_ids"].item()
    )


def test_ambiguous_channels(
    noise,
):  # an image one or three pixels high is no image of one or three channels
    processor, stock = TiledImageProcessor(**SETTINGS), MllamaImageProcessorPil(**SETTINGS)
    for size in ((1, 1), (100, 1), (3, 3), (3, 1), (100, 3)):
        equal(
            processor(noise(*size), return_tensors="pt"), stock(noise(*size), return_tensors="pt")
        )


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ([], ValueError, "give at least one image"),
        ([[], None], ValueError, "give at least one image"),
        (5, TypeError, "got int"),
        ([[np.zeros((4, 4, 3), np.uint8), None]], TypeError, "got NoneType"),
        ("no/such.png", FileNotFoundError, "no such image"),
        ("https://x.org/a.png", ValueError, "allow_urls"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "no pixels"),
        (np.full((4, 4, 3), 7.0), ValueError, "must hold 0..1"),
    ],
)
def test_bad_images(given, error, match):
    with pytest.raises(error, match=match):
        TiledImageProcessor(**SETTINGS)(given)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_image_tiles": 0},
        {"max_image_tiles": -1},
        {"max_image_tiles": 10**9},
        {"max_image_tiles": 2.5},
        {"size": {"height": 28, "width": 29}},
        {"size": {"height": 10**6, "width": 10**6}},
        {"size": {"shortest_edge": 28}},
    ],
    ids=str,
)
def test_bad_settings(noise, settings):
    with pytest.raises(ValueError, match="max_image_tiles|size"):
        TiledImageProcessor(**{**SETTINGS, **settings})
    if settings.get("max_image_tiles") != 2.5:  # that is transformers' own type check
        with pytest.raises(ValueError, match="max_image_tiles|size"):
            TiledImageProcessor(**SETTINGS)(noise(), **settings)


# ---- text and images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_stock(ours, stock, noise, side):
    a, b, c = noise(100, 30), noise(20, 20, 1), noise(60, 90, 2)
    options = {**BOTH, "padding_side": side}
    for text, images in [
        (f"{IMAGE}What is it?", a),
        (f"{IMAGE}What is it?", [a]),
        ([f"{IMAGE}What is it?"], [[a]]),
        (f"Before {IMAGE} after", a),
        ([f"{IMAGE}{IMAGE}two {IMAGE}and one", f"{IMAGE}one"], [[a, b, c], [c]]),
        ([f"x {IMAGE} y {IMAGE}{IMAGE} z", f"{BOS}{IMAGE}one"], [[a, b, c], [c]]),
        (["hello", "longer prompt"], None),
        ("hello", None),
        (None, [[a], [b, c]]),
    ]:
        equal(ours(images=images, text=text, **options), stock(images=images, text=text, **options))


def test_keys_and_shapes(ours, noise):
    batch = ours(
        images=[[noise(100, 30)], [noise(), noise()]], text=[IMAGE, f"{IMAGE}{IMAGE} hi"], **BOTH
    )
    tokens = batch["input_ids"].shape[1]
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, tokens),
        "attention_mask": (2, tokens),
        "pixel_values": (2, 2, 4, 3, T, T),
        "aspect_ratio_ids": (2, 2),
        "aspect_ratio_mask": (2, 2, 4),
        "cross_attention_mask": (2, tokens, 2, 4),
    }


def test_who_sees_which_image(ours, noise):
    wide = noise(3 * T, T)  # three tiles
    batch = ours(images=[wide, wide, wide], text=f"{BOS}a{IMAGE}b{IMAGE}{IMAGE}c", **BOTH)
    seen = batch["cross_attention_mask"][0]
    assert seen[..., 3].sum() == 0 and torch.equal(seen[..., 0], seen[..., 2])
    #                                   BOS  a  1  b  2  3  c
    assert seen[..., 0].T.tolist() == [
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_rows_with_and_without_images(ours, noise):
    a, b = noise(100, 30), noise(20, 20, 1)
    text = ["no image", f"{IMAGE}{IMAGE}two", "none"]
    batch = ours(images=[None, [a, b], []], text=text, **BOTH)
    alone = ours(images=[[a, b]], text=text[1:2], **BOTH)
    equal(ours(images=[[], (a, b), None], text=text, **BOTH), batch)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(batch[name][1:2], alone[name])
    for row in (0, 2):
        assert (
            not batch["cross_attention_mask"][row].any()
            and not batch["aspect_ratio_ids"][row].any()
        )
        assert not batch["pixel_values"][row].any()
    assert batch["cross_attention_mask"][1].any()
    without = ours(images=[None, []], text=["a", "b"], **BOTH)
    assert set(without) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_never_doubled(make_llama_tokenizer, noise, adds_bos):
    processor = TiledProcessor(TiledImageProcessor(**SETTINGS), make_llama_tokenizer(adds_bos))
    for text, expected in [
        ("hi", BOS + "hi"),
        (BOS + "hi", BOS + "hi"),
        (f"{IMAGE}hi", f"{IMAGE}{BOS}hi"),
        (f"{IMAGE}{IMAGE}hi", f"{IMAGE}{IMAGE}{BOS}hi"),
        (f"{BOS}{IMAGE}hi", f"{BOS}{IMAGE}hi"),
        (f"hi {IMAGE}", f"{BOS}hi {IMAGE}"),
    ]:
        images = [noise()] * text.count(IMAGE) or None
        assert processor.decode(processor(images=images, text=text)["input_ids"][0]) == expected


def test_tokenizers_without_bos(make_llama_tokenizer, noise):
    processor = TiledProcessor(
        TiledImageProcessor(**SETTINGS), make_llama_tokenizer(bos_token=None)
    )
    assert (
        processor.decode(processor(images=noise(), text=f"{IMAGE}hi")["input_ids"][0])
        == f"{IMAGE}hi"
    )


def test_mask_has_as_many_tiles_as_the_images(ours, noise):
    for tiles in (2, 6):
        batch = ours(images=noise(6 * T, T), text=IMAGE, max_image_tiles=tiles, **BOTH)
        assert batch["cross_attention_mask"].shape[-1] == batch["pixel_values"].shape[2] == tiles
        assert batch["cross_attention_mask"].any(1).all()  # tiles in use, all of them


def test_truncation_never_cuts_an_image(ours, noise):
    assert (
        ours(images=noise(), text=f"{IMAGE}hello", truncation=True, max_length=3)["input_ids"]
        == ours(text=f"{IMAGE}h", images=noise())["input_ids"]
    )
    with pytest.raises(ValueError, match="max_length"):
        ours(images=noise(), text=f"hello {IMAGE}", truncation=True, max_length=3)


@pytest.mark.parametrize(
    ("text", "images", "error", "match"),
    [
        (
            [IMAGE, IMAGE],
            "ab",
            ValueError,
            r"Found \[1, 1\] <\|image\|> tokens and \[2\] images per sample",
        ),  # flat: ambiguous
        ([IMAGE, IMAGE], "a", ValueError, r"Found \[1, 1\]"),
        (IMAGE, "ab", ValueError, r"Found \[1\] .* \[2\] images"),
        (IMAGE, None, ValueError, r"Found \[1\] .* \[0\] images"),
        ("hi", "a", ValueError, r"Found \[0\]"),
        (
            [f"{IMAGE}{IMAGE}", "x"],
            [["a"], ["b"]],
            ValueError,
            r"Found \[2, 0\] .* \[1, 1\] images",
        ),
        ([IMAGE], [["a"], ["b"]], ValueError, "2 lists of images for 1 prompt"),
        ([], None, ValueError, "text is an empty list"),
        (5, "a", TypeError, "text"),
        (None, None, ValueError, "give text, images, or both"),
        (IMAGE, [5], TypeError, "got int"),
        ([IMAGE, IMAGE], [["a"], [None]], TypeError, "got NoneType"),
    ],
)
def test_bad_calls(ours, noise, text, images, error, match):
    named = {"a": noise(), "b": noise(seed=1)}
    if isinstance(images, str):
        images = [named[name] for name in images]
    elif images and isinstance(images[0], list):
        images = [[named.get(name) for name in row] for row in images]
    with pytest.raises(error, match=match):
        ours(images=images, text=text)


def test_no_other_media(ours):
    for name in ("videos", "audio"):
        with pytest.raises(TypeError, match="videos"):
            ours(text="a", **{name: [1]})


def test_stock_refuses_the_flat_list_alike(ours, stock, noise):
    errors = []
    for processor in (ours, stock):
        with pytest.raises(ValueError, match="images per sample") as caught:
            processor(images=[noise(), noise()], text=[IMAGE, IMAGE])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


# ---- chat template
# ---------------------------------------------------------------------------------------------


def test_chat_template(ours, stock, noise, tmp_path):
    image = noise()
    image.save(tmp_path / "a.png")
    question = {"type": "text", "text": "What is it?"}
    batch = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    expected = stock.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image}, question]}], **batch
    )
    for part in (
        {"image": image},
        {"image": np.array(image)},
        {"path": str(tmp_path / "a.png")},
        {"url": str(tmp_path / "a.png")},
    ):
        equal(
            ours.apply_chat_template(
                [{"role": "user", "content": [{"type": "image", **part}, question]}], **batch
            ),
            expected,
        )
    as_string = ours.apply_chat_template(
        [{"role": "user", "content": f"{IMAGE}What is it?"}], add_generation_prompt=True
    )
    equal(ours(images=image, text=as_string, return_tensors="pt"), expected)
    text = ours.decode(expected["input_ids"][0])
    assert text.count(BOS) == 1 and text.startswith(
        f"{BOS}<|start_header_id|>user<|end_header_id|>\n\n{IMAGE}What"
    )


def test_chat_template_of_a_mixed_batch(ours, noise):
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": noise()}]}],
        [{"role": "user", "content": "hello"}],
    ]
    batch = ours.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert (
        batch["aspect_ratio_ids"][:, 0].tolist()[1] == 0
        and not batch["cross_attention_mask"][1].any()
    )


# ---- on disk
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_stock_autoprocessor_gives_the_same(
    make_llama_tokenizer, llama_template, noise, tmp_path, adds_bos
):
    ours = TiledProcessor(
        TiledImageProcessor(**SETTINGS),
        make_llama_tokenizer(adds_bos),
        chat_template=llama_template,
    )
    written = ours.save_pretrained(tmp_path)
    assert sorted(written) == sorted(str(path) for path in tmp_path.iterdir())
    on_disk = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert "Tiled" not in on_disk
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert (
        settings["processor_class"] == "MllamaProcessor"
        and settings["image_processor"]["image_processor_type"] == "MllamaImageProcessor"
    )
    stock, again = AutoProcessor.from_pretrained(tmp_path), TiledProcessor.from_pretrained(tmp_path)
    assert type(stock) is MllamaProcessor and type(again.image_processor) is TiledImageProcessor
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": noise()}, {"type": "text", "text": "a"}],
        }
    ]
    options = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "add_generation_prompt": True,
    }
    expected = ours.apply_chat_template(turns, **options)
    equal(stock.apply_chat_template(turns, **options), expected)
    equal(again.apply_chat_template(turns, **options), expected)
    again.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_reads_older_folders(
    make_llama_tokenizer, llama_template, noise, tmp_path
):  # preprocessor_config.json and chat_template.json, as released
    make_llama_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {**SETTINGS, "image_processor_type": "MllamaImageProcessor", "max_image_tiles": 3}
        )
    )
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": llama_template}))
    ours, stock = (
        TiledProcessor.from_pretrained(tmp_path),
        MllamaProcessor.from_pretrained(tmp_path),
    )
    assert ours.image_processor.max_image_tiles == 3 and ours.chat_template == llama_template
    equal(ours(images=noise(), text=IMAGE, **BOTH), stock(images=noise(), text=IMAGE, **BOTH))


def test_refuses_others(make_llama_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"<\|image\|>"):
        TiledProcessor(TiledImageProcessor(**SETTINGS), make_llama_tokenizer(without="image"))
    with pytest.raises(ValueError, match="holds a SiglipImageProcessor"):
        TiledProcessor(SiglipImageProcessorPil(), make_llama_tokenizer())
    assert (
        type(
            TiledProcessor(
                MllamaImageProcessorPil(**SETTINGS), make_llama_tokenizer()
            ).image_processor
        )
        is TiledImageProcessor
    )
