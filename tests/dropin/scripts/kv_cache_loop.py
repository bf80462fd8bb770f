import torch
from PIL import Image
from processing_mllama import MllamaImageProcessor
from transformers import AutoTokenizer

from model import KVCache, MLLAMAConfig, MllamaForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained("tokenizer")
vision_config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
text_config = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "n_heads": 4,
    "n_kv_groups": 2,
    "n_layers": 2,
    "hidden_dim": 64,
    "dtype": torch.float32,
}
config = MLLAMAConfig(vision_config=vision_config, text_config=text_config, projection_dim=32)
model = MllamaForConditionalGeneration(config).eval()
processor = MllamaImageProcessor(
    tokenizer, config.text_config.num_image_tokens, config.vision_config.image_size
)
inputs = processor(["What is this?"], [Image.open("cat.jpg")], padding=True)

input_ids = inputs["input_ids"]
pixel_values = inputs["pixel_values"]
attention_mask = inputs["attention_mask"].float()
prompt_length = input_ids.shape[1]

kv_cache = KVCache()
generated = []
with torch.no_grad():
    for _ in range(8):
        outputs = model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            kv_cache=kv_cache,
        )
        kv_cache = outputs["kv_cache"]
        next_token = torch.argmax(outputs["logits"][:, -1, :], dim=-1, keepdim=True)
        generated.append(next_token)
        input_ids = next_token
        attention_mask = torch.cat([attention_mask, torch.ones((1, 1))], dim=-1)

    # the same with everything computed anew
    ids = inputs["input_ids"]
    again = []
    for _ in range(8):
        outputs = model(
            input_ids=ids, pixel_values=pixel_values, attention_mask=torch.ones_like(ids)
        )
        next_token = outputs["logits"][:, -1, :].argmax(dim=-1, keepdim=True)
        again.append(next_token)
        ids = torch.cat([ids, next_token], dim=1)

print("cached items:", kv_cache.num_items() - prompt_length)
print(
    "layers:",
    len(kv_cache.key_cache),
    tuple(kv_cache.key_cache[0].shape[:2]),
    kv_cache.value_cache[1].shape[-1],
)
print("cached is the same:", torch.equal(torch.cat(generated, dim=-1), torch.cat(again, dim=-1)))
print(
    "text:",
    type(tokenizer.decode(torch.cat(generated, dim=-1)[0], skip_special_tokens=True)).__name__,
)
