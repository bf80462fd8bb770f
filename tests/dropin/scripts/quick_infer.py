import torch
from PIL import Image
from processing_mllama import MllamaImageProcessor
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer

from model import MLLAMAConfig, MllamaForConditionalGeneration

# 1) configs from plain dicts
vision_cfg = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
text_cfg = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "n_heads": 4,
    "n_kv_groups": 2,
    "n_layers": 2,
    "hidden_dim": 128,
    "max_position_embeddings": 2048,
    "context_length": 131072,
}
cfg = MLLAMAConfig(vision_config=vision_cfg, text_config=text_cfg, projection_dim=64)
model = MllamaForConditionalGeneration(cfg)
model.eval()

# 2) tokenizer and processor
tokenizer = LlamaTokenizer.from_pretrained("llama-tokenizer")
num_image_tokens = cfg.text_config.num_image_tokens
image_processor = MllamaImageProcessor(
    tokenizer, num_image_token=num_image_tokens, image_size=cfg.vision_config.image_size
)
print("image tokens:", num_image_tokens, "vocabulary:", len(tokenizer))

# 3) inputs
img = Image.open("cat.jpg").convert("RGB")
prompt = "Describe the image."
batch = image_processor([prompt], [img], padding=True)
pixel_values = batch["pixel Value"]
input_ids = batch["input_ids"]
attention_mask = batch["attention_mask"]
print(
    "pixels:",
    tuple(pixel_values.shape),
    "ids:",
    tuple(input_ids.shape),
    "mask:",
    tuple(attention_mask.shape),
)

# 4) forward and argmax
with torch.no_grad():
    out = model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
logits = out["logits"]
pred_ids = logits.argmax(-1)
print("logits:", tuple(logits.shape))
decoded = tokenizer.decode(pred_ids[0], skip_special_tokens=True)
print("decoded:", type(decoded).__name__)

# 5) the picture is looked at
with torch.no_grad():
    other = model(
        input_ids=input_ids,
        pixel_values=torch.zeros_like(pixel_values),
        attention_mask=attention_mask,
    )
print("another picture, other logits:", not torch.equal(other["logits"], logits))

# 6) an answer of several tokens
question = image_processor(["How many circles?"], [img])
outputs = model.generate(
    input_ids=question["input_ids"],
    pixel_values=question["pixel Value"],
    max_new_tokens=5,
    temperature=0.7,
)
print(
    "answer:",
    tokenizer.decode(outputs[0], skip_special_tokens=True).startswith("How many circles?"),
)
sampled = model.generate(**question, max_new_tokens=5, do_sample=True, top_p=0.9)
print("sampled:", tuple(sampled.shape[:1]))

# 7) weights to a file and back
save_file(model.state_dict(), "checkpoint.safetensors")
again = MllamaForConditionalGeneration(cfg).eval()
again.load_state_dict(load_file("checkpoint.safetensors"), strict=False)
with torch.no_grad():
    same = again(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
print("same after reloading:", torch.equal(same["logits"], logits))

# 8) a batch of pictures
images = [Image.open("cat.jpg"), Image.new("L", (90, 30), 200), Image.new("RGBA", (20, 40))]
batch = image_processor(["Describe the image."] * 2 + ["And this?"], images, padding=True)
outputs = model(**batch)
for i, row in enumerate(outputs["logits"]):
    print(f"Image {i}:", len(row.argmax(dim=-1)))
