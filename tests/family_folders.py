"""Model folders of every family as people have them: a tiny random model of stock transformers,
written with its processor's files.
"""

from collections.abc import Callable
from pathlib import Path

import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import twins
from mllama.hf.processors.paligemma import PaliGemmaProcessor
from mllama.hf.processors.square import SquareImageProcessor
from mllama.hf.processors.tiled import TiledImageProcessor, TiledProcessor

SIDE = twins.VISION["image_size"]
SIZE = {"size": {"height": SIDE, "width": SIDE}}
TEXT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
PICTURE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
)
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _text(tokenizer, less: int = 0, **options) -> dict:
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    return (
        twins.TEXT
        | ends
        | {"vocab_size": len(tokenizer) - less, "max_position_embeddings": 512}
        | options
    )


def _llama(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_text(tokenizer), tie_word_embeddings=True)
    ), tokenizer


def _gemma(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**_text(tokenizer, head_dim=16))
    ), tokenizer


def _clip(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE["size"])
    template = PICTURE_TEMPLATE.replace("IMAGE", "<image>")
    processor = LlavaProcessor(
        pictures, tokenizer, 8, "default", chat_template=template, num_additional_image_tokens=1
    )
    config = transformers.LlavaConfig(
        vision_config=twins.VISION | {"model_type": "clip_vision_model"},
        text_config=_text(tokenizer, model_type="llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _paligemma(make_tokenizer):
    processor = PaliGemmaProcessor(
        SquareImageProcessor(**SIZE, image_seq_length=twins.PATCHES), make_tokenizer()
    )
    tokenizer = processor.tokenizer
    config = transformers.PaliGemmaConfig(
        vision_config=twins.VISION
        | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=_text(tokenizer, model_type="gemma", head_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=twins.TEXT["hidden_size"],
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def _mllama(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    processor = TiledProcessor(
        TiledImageProcessor(**SIZE),
        tokenizer,
        chat_template=PICTURE_TEMPLATE.replace("IMAGE", "<|image|>"),
    )
    vision = {
        name: value for name, value in twins.VISION.items() if name != "num_attention_heads"
    } | {
        "attention_heads": 2,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 3 * twins.VISION["hidden_size"],
        "model_type": MllamaVisionConfig.model_type,
    }
    text = _text(
        tokenizer, less=1, num_hidden_layers=4, cross_attention_layers=[1, 3], rope_scaling=ROPE
    )
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=len(tokenizer) - 1
    )
    return transformers.MllamaForConditionalGeneration(config), processor


def _siglip(make_tokenizer):
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**twins.VISION)
    ), SiglipImageProcessorPil(**SIZE)


MAKERS = {
    "llama": _llama,
    "gemma": _gemma,
    "llava, clip": _clip,
    "paligemma": _paligemma,
    "mllama": _mllama,
    "siglip": _siglip,
}


def write(family: str, make_tokenizer: Callable, folder: Path) -> Path:
    """Write a family's folder; the tokenizer's maker is the fixture's."""
    model, processor = MAKERS[family](make_tokenizer)
    twins.randomise(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
