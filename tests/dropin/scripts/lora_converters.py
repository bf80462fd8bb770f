import torch

import mllama
from model import (
    Linear_LORA,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
    convert_linears_to_lora,
    convert_to_lora,
    replace_linear_with_lora,
)

vision_config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
text_config = {
    "vocab_size": 96,
    "hidden_size": 32,
    "n_heads": 4,
    "n_kv_groups": 2,
    "n_layers": 2,
    "hidden_dim": 64,
    "dtype": torch.float32,
}
config = MLLAMAConfig(
    vision_config=vision_config, text_config=text_config, projection_dim=32, image_token_index=95
)


def build():
    torch.manual_seed(0)
    return MllamaForConditionalGeneration(config)


def adapted(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, Linear_LORA))


# the three helpers, each with its own order and defaults
model = build()
convert_linears_to_lora(model.language_model, rank=4, alpha=16)
print("all linears of the decoder:", len(adapted(model)))

model = build()
replace_linear_with_lora(model.language_model, 8, 32, 0.0, ["q_proj", "v_proj"])
print("by name:", len(adapted(model)))

model = build()
convert_to_lora(model, ["q_proj", "v_proj", "o_proj"], 8, 16)
print("of the tower too:", len(adapted(model)))
for name, param in model.named_parameters():
    if "lora" not in name:
        param.requires_grad = False
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
total = sum(p.numel() for p in model.parameters())
print(f"Trainable: {trainable:,} / {total:,} ({100 * trainable / total:.2f}%)")

# a training loop on labels, in bfloat16 where autocast says so
input_ids = torch.cat([torch.full((2, 4), 95), torch.randint(0, 95, (2, 10))], dim=1)
batch = {
    "input_ids": input_ids,
    "pixel_values": torch.randn(2, 3, 32, 32),
    "attention_mask": torch.ones_like(input_ids),
}
labels = input_ids.clone()
labels[labels == 95] = -100

optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.01
)
model.train()
losses = []
for _ in range(30):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch, labels=labels)
        loss = outputs["loss"]
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.eval()
print("loss falls:", losses[-1] < losses[0] - 0.2)

# adapters to safetensors and back
mllama.save_lora(model, "lora_adapters.safetensors")
with torch.no_grad():
    trained = model(**batch)["logits"]
    again = build().eval()
    convert_to_lora(again, ["q_proj", "v_proj", "o_proj"], 8, 16)
    mllama.load_lora(again, "lora_adapters.safetensors")
    print("same after reloading:", torch.allclose(again(**batch)["logits"], trained, atol=1e-5))
