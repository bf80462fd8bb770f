import torch
from Model.model import KVCache
from Model.processing_mllama import MllamaImageProcessor
from Model.utils import load_hf_model
from PIL import Image

device = "cpu"
model, tokenizer = load_hf_model("hf-model", device=device)
model.eval()

num_image_tokens = model.config.text_config.num_image_tokens
image_size = model.config.vision_config.image_size
processor = MllamaImageProcessor(tokenizer, num_image_tokens, image_size)
inputs = processor(["How many circles?"], [Image.open("cat.jpg").convert("RGB")], padding=True)
pixel_values = inputs["pixel_values"].to(device)
input_ids = inputs["input_ids"].to(device)
attention_mask = inputs["attention_mask"].to(device)
print("prompt ids:", input_ids[0].tolist())

generated = []
kv_cache = KVCache()
with torch.no_grad():
    outputs = model(
        input_ids=input_ids,
        pixel_values=pixel_values,
        attention_mask=attention_mask,
        kv_cache=kv_cache,
    )
    next_token = outputs["logits"][0, -1].argmax(dim=-1, keepdim=True)
    generated.append(next_token.item())
    for _ in range(7):
        attention_mask = torch.cat(
            [attention_mask, torch.ones((1, 1), device=device, dtype=attention_mask.dtype)], dim=1
        )
        outputs = model(
            input_ids=next_token.unsqueeze(0),
            pixel_values=None,
            attention_mask=attention_mask,
            kv_cache=kv_cache,
        )
        next_token = outputs["logits"][0, -1].argmax(dim=-1, keepdim=True)
        generated.append(next_token.item())
print("greedy ids:", generated)
print("text:", type(tokenizer.decode(generated, skip_special_tokens=True)).__name__)
