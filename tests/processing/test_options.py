"""Options of a processor's call: each that transformers' processor of the family takes does the
same here, or is refused by name.
"""

import logging

import numpy as np
import pytest
import torch
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor as StockPaliGemma
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import TextKwargs

from mllama import MllamaImageProcessor, chat_labels
from mllama.hf.processors.paligemma import PaliGemmaProcessor
from mllama.hf.processors.tiled import TiledProcessor

SIZE = {"height": 28, "width": 28}
FAMILIES = ("llava", "mllama", "paligemma")
VALUES = {  # every option that there is, with values that change something where any does
    "text_pair": [["d"]],
    "text_target": [["hello"]],
    "text_pair_target": [["d"]],
    "add_special_tokens": [False],
    "padding": [True, "max_length", False],
    "truncation": [True],
    "max_length": [60],
    "stride": [2],
    "is_split_into_words": [True],
    "pad_to_multiple_of": [16],
    "return_token_type_ids": [True, False],
    "return_attention_mask": [False],
    "return_overflowing_tokens": [True],
    "return_special_tokens_mask": [True],
    "return_offsets_mapping": [True],
    "return_length": [True],
    "verbose": [False],
    "padding_side": ["left", "right"],
    "return_mm_token_type_ids": [True],
    "return_text_replacement_offsets": [True],
    "sanitize_control_tokens": [False],
    "return_tensors": ["pt", "np"],
    "do_convert_rgb": [True, False],
    "do_resize": [True, False],
    "size": [{"height": 14, "width": 14}],
    "default_to_square": [True],
    "crop_size": [{"height": 14, "width": 14}],
    "resample": [0, 2, 3],
    "do_rescale": [False],
    "rescale_factor": [0.5],
    "do_normalize": [False],
    "image_mean": [[0.1, 0.2, 0.3]],
    "image_std": [[0.1, 0.2, 0.3]],
    "do_pad": [True, False],
    "pad_size": [{"height": 56, "width": 56}],
    "do_center_crop": [True, False],
    "data_format": ["channels_first", "channels_last"],
    "input_data_format": ["channels_last"],
    "device": ["cpu", "cuda"],
    "disable_grouping": [True],
    "image_seq_length": [9],
    "max_image_tiles": [2],
}
NEEDS = {
    "text_pair_target": ["text_target"],
    "max_length": ["truncation"],
    "stride": ["truncation", "max_length"],
    "crop_size": ["do_center_crop"],
}
NEEDS |= {
    "do_center_crop": ["crop_size"],
    "do_pad": ["pad_size"],
    "pad_size": ["do_pad"],
    "pad_to_multiple_of": ["padding"],
    "padding": ["max_length"],
    "truncation": ["max_length"],
}
REFUSED = {
    "stride",
    "is_split_into_words",
    "return_overflowing_tokens",
    "data_format",
    "device",
    "do_convert_rgb",
    "image_seq_length",
}
ALSO_REFUSED = {
    "llava": {
        "max_image_tiles",
        "size",
        "do_resize",
        "crop_size",
        "pad_size",
        "do_center_crop",
        "do_pad",
    },
    "mllama": {"do_resize", "do_pad", "pad_size", "crop_size", "do_center_crop"},
    "paligemma": {
        "text_pair",
        "text_target",
        "text_pair_target",
        "return_token_type_ids",
        "return_text_replacement_offsets",
        "max_image_tiles",
    },
}


@pytest.fixture
def pair(make_tokenizer, make_llama_tokenizer):
    """pair(family): our processor, transformers', and a prompt's text that either lays out the
    same.
    """

    def make(family: str):
        if family == "mllama":
            ours = TiledProcessor(MllamaImageProcessorPil(size=SIZE), make_llama_tokenizer())
            return (
                ours,
                MllamaProcessor(MllamaImageProcessorPil(size=SIZE), make_llama_tokenizer()),
                "<|image|><|begin_of_text|>a b",
            )
        images = SiglipImageProcessorPil(size=SIZE, image_seq_length=4)
        if family == "paligemma":
            return (
                PaliGemmaProcessor(images, make_tokenizer()),
                StockPaliGemma(images, make_tokenizer()),
                "<image>a b",
            )
        ours = MllamaImageProcessor(make_tokenizer(), 4, 28)
        return ours, LlavaProcessor(images, ours.tokenizer, 14, "full"), "<image>a b"

    return make


def call(processor, prompts: list[str], images: list, options: dict) -> dict:
    return dict(processor(text=list(prompts), images=[[image] for image in images], **options))


def listed(value):
    return (
        value.tolist()
        if isinstance(value, (torch.Tensor, np.ndarray))
        else [listed(item) for item in value]
        if isinstance(value, list)
        else value
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_is_honored_or_refused(pair, noise, family):
    ours, stock, prompt = pair(family)
    names = {*TextKwargs.__annotations__, *stock.image_processor.valid_kwargs.__annotations__}
    assert names <= VALUES.keys()
    for name in names:
        for value in VALUES[name]:
            options = {
                "return_tensors": "np",
                **{other: VALUES[other][0] for other in NEEDS.get(name, ())},
                name: value,
            }
            try:
                found = call(ours, [prompt], [noise()], options)
            except (TypeError, ValueError) as error:
                assert (
                    any(given in str(error) for given in options)
                    and name in REFUSED | ALSO_REFUSED[family]
                ), (name, value, error)
                continue
            if name == "return_text_replacement_offsets":
                continue  # tests of answers use it
            wanted = call(stock, [prompt], [noise()], options)
            assert {"input_ids", "pixel_values"} <= found.keys() & wanted.keys(), (name, value)
            for key in found.keys() & wanted.keys():
                if (name, key) == (
                    "max_image_tiles",
                    "cross_attention_mask",
                ):  # transformers' has the tiles of the processor
                    continue
                assert listed(found[key]) == listed(wanted[key]), (name, value, key)
            asked = {
                "text_target": "labels",
                "return_length": "length",
                "return_offsets_mapping": "offset_mapping",
            }.get(name)
            assert asked is None or asked in found, (name, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_options_in_groups(pair, noise, family):
    ours, stock, prompt = pair(family)
    grouped = {
        "text_kwargs": {"padding": "max_length", "max_length": 50},
        "images_kwargs": {"image_mean": 0.1, "resample": 0},
    }
    grouped["common_kwargs"] = {"return_tensors": "pt"}
    grouped_stock = grouped | {"images_kwargs": {"image_mean": [0.1] * 3, "resample": 0}}
    found, wanted = (
        call(ours, [prompt], [noise()], grouped),
        call(stock, [prompt], [noise()], grouped_stock),
    )
    assert all(
        torch.equal(found[name], wanted[name])
        for name in ("input_ids", "attention_mask", "pixel_values")
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pading": True}, "pading.*padding"),
        ({"text_kwargs": {"max_lenght": 5}}, "max_lenght.*max_length"),
        ({"images_kwargs": {"do_resise": True}}, "do_resise.*do_resize"),
        ({"images_kwargs": {"padding": True}}, "padding"),
        ({"text_kwargs": 5}, "text_kwargs"),
        ({"fps": 2}, "fps"),
        ({"videos_kwargs": {"fps": 2}}, "videos_kwargs"),
    ],
)
def test_unknown_options_are_refused(pair, noise, family, options, named):
    ours, _, prompt = pair(family)
    with pytest.raises(TypeError, match=named):
        call(ours, [prompt], [noise()], options)
    ours.chat_template = "{{ messages[0]['content'] }}{{ used }}"
    message = [{"role": "user", "content": "a"}]
    assert ours.apply_chat_template(message, used="b") == "ab"
    with pytest.raises(TypeError, match="unused"):
        ours.apply_chat_template(message, tokenize=True, unused=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unequal_length(pair, noise, family, caplog):
    ours, stock, prompt = pair(family)
    logging.getLogger("transformers").addHandler(caplog.handler)
    prompts, images = [prompt, f"{prompt} c d hello"], [noise(), noise(seed=1)]
    found = call(ours, prompts, images, {"padding": True, "return_tensors": "pt"})
    ours.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    ours.apply_chat_template(
        [[{"role": "user", "content": text}] for text in ("a", "a b c")],
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
    )
    assert caplog.records == []
    logging.getLogger("transformers").removeHandler(caplog.handler)
    wanted = call(stock, prompts, images, {"padding": True, "return_tensors": "pt"})
    assert all(torch.equal(found[name], wanted[name]) for name in found.keys() & wanted.keys())
    with pytest.raises(ValueError, match="padding"):
        call(ours, prompts, images, {"padding": False, "return_tensors": "pt"})


def test_arrays_with_their_axes_named(pair, noise):
    ours, _, prompt = pair("llava")
    pixels = np.array(noise(3, 40))  # [40, 3, 3]: channels could be either of two axes
    for value in (pixels.transpose(2, 0, 1), torch.tensor(pixels.transpose(2, 0, 1))):
        found = call(ours, [prompt], [value], {"input_data_format": "channels_first"})
        assert torch.equal(
            found["pixel_values"], call(ours, [prompt], [noise(3, 40)], {})["pixel_values"]
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", ["meta", "cpu", torch.bfloat16, torch.float64])
def test_torchs_defaults_change_nothing(pair, noise, family, setting):
    ours, _, prompt = pair(family)
    options = {"padding": True, "return_tensors": "pt"}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if family != "paligemma":
        ours.chat_template = (
            "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
        )

    def results() -> list[dict]:
        rows = call(ours, [prompt, prompt + " c"], [noise(), noise(70, 30, 1)], options)
        return [rows, dict(chat_labels(ours, [talk])), dict(ours(images=[noise()], **options))]

    wanted = results()
    dtype = torch.get_default_dtype()
    try:
        (torch.set_default_device if isinstance(setting, str) else torch.set_default_dtype)(setting)
        found = results()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (
                ours[name].dtype == value.dtype
                and ours[name].device == value.device
                and torch.equal(ours[name], value)
            ), name
