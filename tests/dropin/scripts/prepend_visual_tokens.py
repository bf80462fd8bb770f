import torch
from PIL import Image
from processing_siglip import paligemmaProcessor
from siglip import SiglipModel, SiglipVisionConfig

from model import LLAMA32_CONFIG, Llama3Model, Tokenizer

LLAMA32_CONFIG.update(
    {
        "context_length": 256,
        "emb_dim": 32,
        "n_heads": 4,
        "n_layers": 2,
        "hidden_dim": 64,
        "n_kv_groups": 2,
        "dtype": torch.float32,
    }
)
image_seq_len = 4
device = torch.device("cpu")

vision_config = SiglipVisionConfig(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=64
)
vision = SiglipModel(vision_config)
tokenizer = Tokenizer("Llama-3.2-1B-Instruct/original/tokenizer.model")
processor = paligemmaProcessor(tokenizer, image_seq_len, vision_config.image_size)
model = Llama3Model(LLAMA32_CONFIG)

prompt = "What is in the picture?"
pixel_values = processor([prompt], [Image.open("cat.jpg")], padding=True)["pixel_values"].to(device)
with torch.no_grad():
    patch_embeds = vision(pixel_values)

# pooled
pooler = torch.nn.AdaptiveAvgPool1d(image_seq_len)
pooled = pooler(patch_embeds.transpose(1, 2)).transpose(1, 2)
proj = torch.nn.Linear(vision_config.hidden_size, LLAMA32_CONFIG["emb_dim"]).to(device)
visual_token_embeds = proj(pooled)

ids = tokenizer.encode(prompt, bos=True)
text_embeds = model.tok_emb(torch.tensor([ids], device=device))
combined = torch.cat([visual_token_embeds, text_embeds], dim=1)
logits = model.forward_with_embeds(combined)
print("pooled:", tuple(patch_embeds.shape), "->", tuple(visual_token_embeds.shape))
print(
    "logits are of every position:",
    tuple(logits.shape) == (1, image_seq_len + len(ids), LLAMA32_CONFIG["vocab_size"]),
)

# learned: patches to visual tokens by a convolution over the patches
learned = torch.nn.Conv1d(patch_embeds.shape[1], image_seq_len, kernel_size=1)
visual_token_embeds = proj(learned(patch_embeds))
logits = model.forward_with_embeds(torch.cat([visual_token_embeds, text_embeds], dim=1))
logits[:, -1].float().logsumexp(-1).sum().backward()
print("learned:", tuple(visual_token_embeds.shape))
print(
    "gradients reach projection and pooling:",
    bool(learned.weight.grad.abs().sum() > 0 and proj.weight.grad.abs().sum() > 0),
)

# and on, token by token
with torch.no_grad():
    logits, past_kv = model.forward_with_embeds(combined, use_cache=True)
    for _ in range(3):
        next_id = logits[:, -1:].argmax(-1)
        logits, past_kv = model(next_id, past_kv=past_kv, use_cache=True)
print("cached positions:", past_kv[0][0].shape[2] - combined.shape[1])
