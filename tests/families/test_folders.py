"""A whole folder, model and processor as stock transformers saves them: the answer to a question about pictures equals stock's."""

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import twins
from mllama import MllamaForConditionalGeneration
from mllama.processing.auto import encode_messages, load_processor

SIZE = {"height": 16, "width": 16}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
MODELS = {
    "llava": transformers.LlavaForConditionalGeneration,
    "mllama": transformers.MllamaForConditionalGeneration,
    "paligemma": transformers.PaliGemmaForConditionalGeneration,
}


def save(family: str, folder, tokenizer) -> None:
    """A stock model with its stock processor."""
    if family == "paligemma":
        processor = PaliGemmaProcessor(SiglipImageProcessorPil(size=SIZE, image_seq_length=twins.PATCHES), tokenizer)
        tokenizer = processor.tokenizer
    else:
        image_token = "<|image|>" if family == "mllama" else "<image>"
        tokenizer.add_tokens(["<pad>", image_token], special_tokens=True)  # <|image|> last: it has a row, but no logit
        if family == "llava":
            pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
            options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            processor = LlavaProcessor(pictures, tokenizer, chat_template=TEMPLATE, **options)
        else:
            processor = MllamaProcessor(MllamaImageProcessorPil(size=SIZE), tokenizer, TEMPLATE.replace("<image>", image_token))
    image_id, size = processor.image_token_id, len(tokenizer)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    text = twins.TEXT | ends | {"vocab_size": size, "max_position_embeddings": 512}
    if family == "mllama":
        vision = {name: value for name, value in twins.VISION.items() if name != "num_attention_heads"}
        vision |= {"attention_heads": 2, "num_global_layers": 2, "intermediate_layers_indices": [0], "vision_output_dim": 64}
        text |= {"vocab_size": image_id, "num_hidden_layers": 3, "cross_attention_layers": [1]}
        config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
    elif family == "llava":
        vision = twins.VISION | {"model_type": "clip_vision_model"}
        config = transformers.LlavaConfig(vision_config=vision, text_config=text | {"model_type": "llama"}, image_token_index=image_id)
    else:
        vision = twins.VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
        text |= {"model_type": "gemma", "head_dim": 16}
        config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=image_id, projection_dim=64)
    twins.randomise(MODELS[family](config)).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_answers_equal_stock(make_tokenizer, tmp_path, family, count):
    save(family, tmp_path, make_tokenizer(pad=family == "paligemma"))
    pictures = [Image.effect_noise((40, 20 + 30 * number), 90).convert("RGB") for number in range(count)]
    stock, theirs = MODELS[family].from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    model, processor = MllamaForConditionalGeneration.from_pretrained(tmp_path, reference="hf"), load_processor(tmp_path)
    batch = encode_messages(processor, [{"role": "user", "content": "How many circles?"}], pictures)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    if family == "paligemma" and not count:  # stock's processor takes no text alone
        assert model.generate(**batch, **greedy).shape[1] == batch["input_ids"].shape[1] + 8
        return
    if family == "paligemma":
        inputs = theirs(images=[pictures], text="<image>" * count + "How many circles?", return_tensors="pt")
        inputs.pop("labels")
    else:
        parts = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": "How many circles?"}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = theirs.apply_chat_template([{"role": "user", "content": parts}], **options)
    assert set(batch) == set(inputs) and all(torch.equal(batch[name], inputs[name]) for name in inputs)
    assert torch.equal(model.generate(**batch, **greedy), stock.generate(**inputs, **greedy))
