import torch
from PIL import Image
from processing_mllama import MllamaImageProcessor
from utils import load_hf_model

from model import KVCache, MllamaForConditionalGeneration

model, tokenizer = load_hf_model("hf-model", "cpu")
model = model.to("cpu").eval()
print("a multimodal model:", isinstance(model, MllamaForConditionalGeneration))

processor = MllamaImageProcessor(
    tokenizer, model.config.text_config.num_image_tokens, model.config.vision_config.image_size
)
inputs = processor(text=["How many circles?"], images=[Image.open("cat.jpg")], padding=True)
with torch.no_grad():
    out = model(**inputs, kv_cache=KVCache())
print("next:", out["logits"][0, -1].argmax().item())

try:
    load_hf_model("hf-model-with-leftovers", "cpu")
except Exception as error:
    print("leftovers:", type(error).__name__, "leftover" in str(error))
