"""`processing_mllama`, `processing_siglip` and `processing_paligemma`: signatures, pictures by the
plain formula, prompts.
"""

import base64
import inspect
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import mllama
from mllama.dropin import processing_mllama, processing_paligemma, processing_siglip
from mllama.processing.image import load_picture
from mllama.processing.prompt import LOCATION_TOKENS

MODULES = [processing_mllama, processing_siglip, processing_paligemma]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
N, S = 16, 32
RUN = "<image>" * N
PROMPT = "What colour is it?"
EMBEDDED = Path(mllama.__file__).parent / "assets" / "embedded"


def picture(seed=0, size=(50, 37)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def plain_formula(image, size, resample, factor, mean, std):
    """What the loose files compute, with Pillow and numpy alone."""
    pixels = np.array(image.resize((size[1], size[0]), resample=resample))
    pixels = (pixels * factor).astype(np.float32)
    pixels = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return pixels.transpose(2, 0, 1)


def processor_of(module):
    names = {
        "processing_mllama": "MllamaImageProcessor",
        "processing_siglip": "paligemmaProcessor",
        "processing_paligemma": "PaliGemmaProcessor",
    }
    return getattr(module, names[module.__name__.rpartition(".")[2]])


def text_of(processor, batch):
    return [
        processor.tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.fixture(params=MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def module(request):
    return request.param


@pytest.fixture
def processor(module, make_tokenizer):
    return processor_of(module)(make_tokenizer(), N, S)


# ---- names
# -------------------------------------------------------------------------------------------------------------------------------


def test_modules_of_those_names_are_these():
    import Model.processing_mllama
    import processing_mllama as loose
    import processing_paligemma as loose_c
    import processing_siglip as loose_b

    for ours, theirs in zip(
        (*MODULES, processing_mllama),
        (loose, loose_b, loose_c, Model.processing_mllama),
        strict=True,
    ):
        assert all(getattr(theirs, name) is getattr(ours, name) for name in ours.__all__)


def test_mean_and_deviation_are_each_modules_own():
    assert (processing_mllama.IMAGENET_STANDARD_MEAN, processing_mllama.IMAGENET_STANDARD_STD) == (
        MEAN,
        STD,
    )
    for module in (processing_siglip, processing_paligemma):
        assert module.IMAGENET_STANDARD_MEAN == module.IMAGENET_STANDARD_STD == [0.5, 0.5, 0.5]


def test_signatures(module):
    def defaults(function):
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
        }

    none, bicubic = inspect.Parameter.empty, Image.Resampling.BICUBIC
    assert defaults(module.resize) == {
        "image": none,
        "size": none,
        "resample": bicubic,
        "reducing_gap": None,
    }
    assert defaults(module.rescale) == {"image": none, "scale": 1 / 255, "dtype": np.float32}
    assert defaults(module.normalize) == {"image": none, "mean": none, "std": none}
    assert defaults(module.process_images) == {
        "images": none,
        "size": (224, 224),
        "rescale_factor": 1 / 255,
        "image_mean": module.IMAGENET_STANDARD_MEAN,
        "image_std": module.IMAGENET_STANDARD_STD,
        "resample": bicubic,
    }
    assert list(defaults(module.process_images)) == [
        "images",
        "size",
        "rescale_factor",
        "image_mean",
        "image_std",
        "resample",
    ]
    assert list(defaults(module.add_image_tokens_to_prompts).items()) == [
        (name, none) for name in ("prefix_prompt", "bos_token", "image_seq_len", "image_token")
    ]
    assert module.add_image_tokens_to_prompt is module.add_image_tokens_to_prompts
    tokens = "num_image_tokens" if module is processing_paligemma else "num_image_token"
    assert list(defaults(processor_of(module)).items()) == [
        (name, none) for name in ("tokenizer", tokens, "image_size", "kwargs")
    ]
    call = inspect.signature(processor_of(module).__call__).parameters
    assert (
        list(call)[1:5] == ["text", "images", "padding", "truncation"]
        and call["truncation"].default is True
    )


# ---- the loose steps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [*Image.Resampling, None, 2])
def test_resize_takes_height_first(module, resample):
    resized = module.resize(picture(), (8, 12), resample)
    assert isinstance(resized, Image.Image) and resized.size == (12, 8)
    assert np.array_equal(
        resized,
        picture().resize((12, 8), Image.Resampling.BICUBIC if resample is None else resample),
    )


def test_resize_with_a_reducing_gap():
    large = picture(size=(400, 300))
    gap = processing_mllama.resize(image=large, size=(20, 30), reducing_gap=1.5)
    assert np.array_equal(gap, large.resize((30, 20), Image.Resampling.BICUBIC, reducing_gap=1.5))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16", "LA"])
def test_pictures_of_every_mode_become_rgb(module, mode):
    other = picture().convert("L").convert(mode) if mode == "I;16" else picture().convert(mode)
    resized = module.resize(other, (8, 12))
    assert resized.mode == "RGB"
    assert torch.equal(
        module.process_images([other], (8, 12)),
        module.process_images([load_picture(other)], (8, 12)),
    )


def test_rescale(module):
    image = np.array(picture())
    scaled = module.rescale(image)
    assert scaled.dtype == np.float32 and np.array_equal(
        scaled, (image * (1 / 255)).astype(np.float32)
    )
    assert module.rescale(image, 0.5, np.float16).dtype == np.float16
    assert np.array_equal(module.rescale(picture(), scale=1 / 255.0), scaled)


def test_normalize(module):
    image = np.random.default_rng(0).random((5, 4, 3), dtype=np.float32)
    expected = (image - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    got = module.normalize(image, MEAN, STD)
    assert got.dtype == np.float32 and np.array_equal(got, expected)
    assert np.array_equal(module.normalize(image[..., 0], 0.5, 0.5), (image[..., 0] - 0.5) / 0.5)
    assert module.normalize(image.astype(np.float64), mean=MEAN, std=STD).dtype == np.float64
    assert np.array_equal(
        module.normalize(np.full((1, 1, 3), 3, dtype=np.uint8), 1, 2),
        np.ones((1, 1, 3), dtype=np.float32),
    )


def test_steps_are_what_process_images_does(module):
    mean, std = module.IMAGENET_STANDARD_MEAN, module.IMAGENET_STANDARD_STD
    arrays = [np.array(module.resize(image, (S, S))) for image in (picture(), picture(1))]
    planes = [
        module.normalize(module.rescale(array), mean, std).transpose(2, 0, 1) for array in arrays
    ]
    assert torch.equal(
        module.process_images([picture(), picture(1)], (S, S)), torch.tensor(np.stack(planes))
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda m: m.resize(picture(), (8,)),
            ValueError,
            r"resize: size must be \(height, width\)",
        ),
        (lambda m: m.resize(picture(), (8, 0)), ValueError, "size must be"),
        (lambda m: m.resize(picture(), (10**9, 10**9)), ValueError, "size must be"),
        (lambda m: m.resize(picture(), (8, 8), 99), ValueError, "resampling filter"),
        (lambda m: m.resize("nowhere.png", (8, 8)), FileNotFoundError, "no such picture"),
        (lambda m: m.resize(5, (8, 8)), TypeError, "a picture must be"),
        (
            lambda m: m.normalize(np.zeros((4, 4, 3)), [1, 2], 1),
            ValueError,
            "mean must be one number or one per channel",
        ),
        (
            lambda m: m.normalize(np.zeros((4, 4, 3)), 1, [1, 0, 1]),
            ValueError,
            "std must hold no zero",
        ),
        (lambda m: m.process_images([]), ValueError, "images is empty"),
        (lambda m: m.process_images(picture(), 8), ValueError, "process_images: size must be"),
        (
            lambda m: m.process_images([picture()], (8, 8), "x"),
            TypeError,
            "rescale_factor must be a number, got str",
        ),
        (
            lambda m: m.process_images([picture()], (8, 8), True),
            TypeError,
            "rescale_factor must be a number, got bool",
        ),
        (
            lambda m: m.process_images([picture()], (8, 8), float("nan")),
            ValueError,
            "rescale_factor must be finite",
        ),
        (
            lambda m: m.process_images([picture()], (8, 8), resample=99),
            ValueError,
            "resample must be one of",
        ),
        (
            lambda m: m.process_images([picture()], (8, 8), 3, resample=3),
            TypeError,
            "multiple values for .*resample",
        ),
        (
            lambda m: m.process_images([picture()], (8, 8), 1 / 255, [0.5, 0.5]),
            ValueError,
            "image_mean must be",
        ),
        (
            lambda m: m.process_images([picture()], image_std=[1, 0, 1]),
            ValueError,
            "image_std must hold no zero",
        ),
        (lambda m: m.process_images([5]), TypeError, "a picture must be"),
        (lambda m: m.process_images(None), TypeError, "a picture must be .* got NoneType"),
        (lambda m: m.process_images(["nowhere.png"]), FileNotFoundError, "no such picture"),
        (
            lambda m: m.add_image_tokens_to_prompts(["hi"], None, 2, "<image>"),
            TypeError,
            "prefix_prompt must be a str, got list",
        ),
    ],
)
def test_errors_name_the_argument(module, call, error, text):
    with pytest.raises(error, match=text):
        call(module)


# ---- all steps at once
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_process_images_by_the_plain_formula(module, resample):
    images = [picture(), picture(1, (9, 80))]
    got = module.process_images(images, (12, 20), 1 / 255.0, MEAN, STD, resample=resample)
    assert got.dtype == torch.float32 and got.shape == (2, 3, 12, 20)
    assert np.array_equal(
        got,
        np.stack(
            [plain_formula(image, (12, 20), resample, 1 / 255.0, MEAN, STD) for image in images]
        ),
    )


def test_process_images_has_its_modules_defaults(module):
    got = module.process_images([picture()])
    mean, std = module.IMAGENET_STANDARD_MEAN, module.IMAGENET_STANDARD_STD
    assert np.array_equal(
        got[0], plain_formula(picture(), (224, 224), Image.Resampling.BICUBIC, 1 / 255, mean, std)
    )


def test_a_filter_may_come_third(module):
    nearest, images = Image.Resampling.NEAREST, [picture()]
    expected = module.process_images(images, (8, 12), 0.01, MEAN, STD, resample=nearest)
    for call in (
        lambda: module.process_images(images, (8, 12), nearest, 0.01, MEAN, STD),
        lambda: module.process_images(images, (8, 12), 0, 0.01, MEAN, STD),
        lambda: module.process_images(
            images, (8, 12), nearest, rescale_factor=0.01, image_mean=MEAN, image_std=STD
        ),
        lambda: module.process_images(
            images,
            size=(8, 12),
            resample=nearest,
            rescale_factor=0.01,
            image_mean=MEAN,
            image_std=STD,
        ),
    ):
        assert torch.equal(call(), expected)
    for third in (None, Image.Resampling.BICUBIC, 3, 1 / 255):
        assert torch.equal(
            module.process_images(images, (8, 12), third), module.process_images(images, (8, 12))
        )
    assert torch.equal(
        module.process_images(images, None, None, None, None, None), module.process_images(images)
    )


def test_what_scripts_do_with_the_result(module):
    pixels = module.process_images([picture(), picture(1)], (8, 8))
    assert torch.equal(torch.tensor(np.stack(pixels, axis=0)), pixels)
    assert torch.equal(module.process_images(picture(), (8, 8)), pixels[:1])
    assert pickle.loads(pickle.dumps(module.process_images)) is module.process_images


# ---- prompts
# -----------------------------------------------------------------------------------------------------------------------------


def test_image_tokens_come_before_bos_and_a_newline_last(module):
    assert (
        module.add_image_tokens_to_prompts("hi", "<bos>", 3, "<image>")
        == "<image><image><image><bos>hi\n"
    )
    assert module.add_image_tokens_to_prompts("hi", None, 1, "<image>") == "<image>hi\n"
    assert (
        module.add_image_tokens_to_prompts(
            prefix_prompt="hi\n", bos_token="", image_seq_len=0, image_token="<image>"
        )
        == "hi\n"
    )


def test_attributes_and_tokens(module, make_tokenizer):
    tokenizer = make_tokenizer()
    before = len(tokenizer)
    processor = processor_of(module)(tokenizer, N, S)
    assert processor_of(module).IMAGE_TOKEN == processor.IMAGE_TOKEN == "<image>"
    assert (processor.image_seq_length, processor.image_size, processor.tokenizer) == (
        N,
        S,
        tokenizer,
    )
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == before
    assert tokenizer.convert_tokens_to_ids(list(LOCATION_TOKENS)) == list(
        range(before + 1, before + 1 + 1024 + 128)
    )
    assert isinstance(processor, mllama.MllamaImageProcessor)


def test_batch(processor, module):
    batch = processor([PROMPT], [picture()], padding="longest", truncation=True)
    assert set(batch) == set(batch.keys()) == {"input_ids", "attention_mask", "pixel_values"}
    assert text_of(processor, batch) == [RUN + "<bos>" + PROMPT + "\n"]
    assert (batch["input_ids"] == processor.image_token_id).sum() == N
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert torch.equal(batch["pixel_values"], module.process_images([picture()], (S, S)))
    assert (
        batch["pixel Value"] is batch["pixel_value"] is batch["pixel_values"]
        and "pixel Value" in batch
    )
    assert (lambda pixel_values, input_ids, attention_mask: pixel_values)(**batch) is batch[
        "pixel_values"
    ]


def test_every_way_to_call_it(processor):
    expected = processor([PROMPT], [picture()])
    for call in (
        lambda: processor(PROMPT, picture()),
        lambda: processor([PROMPT], [picture()], True),
        lambda: processor([PROMPT], [picture()], "longest", True),
        lambda: processor(text=[PROMPT], images=[picture()], padding=True, return_tensors="pt"),
        lambda: processor(PROMPT, [picture()], truncation=False),
        lambda: processor(images=np.array(picture()), text=PROMPT),
    ):
        batch = call()
        assert batch.keys() == expected.keys() and all(
            torch.equal(batch[name], expected[name]) for name in expected
        )


def test_it_goes_to_worker_processes(processor):
    copied = pickle.loads(pickle.dumps(processor))
    assert torch.equal(
        copied([PROMPT], [picture()])["input_ids"], processor([PROMPT], [picture()])["input_ids"]
    )


def test_a_folder_gives_the_same_back(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    read = type(processor).from_pretrained(tmp_path)
    assert type(read) is type(processor) and len(read.tokenizer) == len(processor.tokenizer)
    expected, batch = processor([PROMPT], [picture()]), read([PROMPT], [picture()])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_prompts_are_the_packages(module, make_tokenizer):
    ours = processor_of(module)(make_tokenizer(), N, S)
    mean, std = module.IMAGENET_STANDARD_MEAN, module.IMAGENET_STANDARD_STD
    theirs = mllama.MllamaImageProcessor(
        make_tokenizer(), N, S, image_mean=mean, image_std=std, location_tokens=True
    )
    prompts, pictures = [PROMPT, "hello\n", "<bos>two"], [picture(seed) for seed in range(3)]
    for text, images in (
        (prompts, pictures),
        ("<image> and <image>?", pictures[:2]),
        (PROMPT, None),
        (prompts[:2], [pictures[:2], None]),
    ):
        got, expected = ours(text, images), theirs(text, images)
        assert got.keys() == expected.keys() and all(
            torch.equal(got[name], expected[name]) for name in expected
        )


def test_placeholders_in_the_text_are_not_doubled(processor, module):
    expected = processor([PROMPT, "two"], [picture(), picture(1)])
    laid_out = [
        module.add_image_tokens_to_prompts(text, "<bos>", N, "<image>") for text in (PROMPT, "two")
    ]
    batch = processor(laid_out, [picture(), picture(1)])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert text_of(processor, processor("see <image>", picture())) == ["see " + RUN]


def test_truncation_without_a_length_cuts_nothing_and_says_nothing(module, make_tokenizer, caplog):
    processor = processor_of(module)(make_tokenizer(), 100, S)
    processor.tokenizer.model_max_length = 40
    logging.getLogger("transformers").propagate = True
    try:
        batch = processor([PROMPT], [picture()], padding=True, truncation=True)
    finally:
        logging.getLogger("transformers").propagate = False
    assert (
        text_of(processor, batch) == ["<image>" * 100 + "<bos>" + PROMPT + "\n"]
        and not caplog.records
    )
    cut = processor(["one two three"], [picture()], truncation=True, max_length=103)
    assert cut["input_ids"].shape == (1, 103)
    with pytest.raises(ValueError, match="truncation left 40 of the 100 image tokens"):
        processor(PROMPT, picture(), max_length=40)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_with_the_embedded_models_tokenizer_and_others(module, make_tokenizer, adds_bos):
    embedded = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizers = [
        embedded,
        make_tokenizer(adds_bos=adds_bos),
        make_tokenizer(bos=False),
        make_tokenizer(pad=False),
    ]
    for tokenizer in tokenizers:
        processor = processor_of(module)(tokenizer, N, S)
        texts = text_of(processor, processor(["one", "two"], [picture(), picture(1)]))
        assert texts == [RUN + (tokenizer.bos_token or "") + text + "\n" for text in ("one", "two")]
        assert tokenizer.add_bos_token is tokenizer.add_eos_token is False


def test_refusals(module, make_tokenizer):
    kind = processor_of(module)
    for tokenizer in (None, object(), "gpt2"):
        with pytest.raises(TypeError, match="tokenizer"):
            kind(tokenizer, N, S)
    with pytest.raises(ValueError, match="num_image_token must be at least 1, got 0"):
        kind(make_tokenizer(), 0, S)
    with pytest.raises(TypeError, match="image_size must be an int, got float"):
        kind(make_tokenizer(), N, 2.5)
    with pytest.raises(ValueError, match=r"2 picture\(s\) for 3 prompts"):
        kind(make_tokenizer(), N, S)(["a", "b", "c"], [picture(), picture()])


# ---- Meta's tokenizer
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def metas(tmp_path):
    """A tokenizer.model of the single bytes and a few words."""
    pytest.importorskip(
        "tiktoken", reason="tiktoken is not installed (pip install 'mllama[convert]')"
    )
    tokens = [
        *(bytes([byte]) for byte in range(256)),
        b"ha",
        b"at",
        b"hat",
        b"What",
        b" p",
        b" pic",
    ]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    return mllama.Tokenizer(path)


def test_a_tiktoken_tokenizer_is_wrapped(module, metas):
    processor = processor_of(module)(metas, N, S)
    image = processor.image_token_id
    assert (
        image == metas.n_words and "<image>" not in metas.special
    )  # 128256 behind Meta's own, where the older configs look for it
    prompts = ["What's in the  picture?", "Wie heißt das? 日本語 12345"]
    batch = processor(prompts, [picture(), picture(1)], padding="longest", truncation=True)
    for row, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], prompts, strict=True):
        assert row[mask.bool()].tolist() == [image] * N + metas.encode(prompt + "\n", bos=True)
        assert row[~mask.bool()].tolist() == [metas.pad_id] * int((mask == 0).sum())
    assert (
        processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        == prompts[0] + "\n"
    )
