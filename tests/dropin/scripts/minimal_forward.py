import torch

from model import MLLAMAConfig, MllamaForConditionalGeneration

vision_cfg = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
text_cfg = {
    "vocab_size": 500,
    "hidden_size": 64,
    "n_heads": 4,
    "n_kv_groups": 2,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 128,
}

m_cfg = MLLAMAConfig(
    vision_config=vision_cfg, text_config=text_cfg, projection_dim=64, vocab_size=500
)
model = MllamaForConditionalGeneration(m_cfg)

batch, seq_len = 1, 24
input_ids = torch.randint(0, m_cfg.vocab_size, (batch, seq_len))
pixel_values = torch.randn(batch, 3, m_cfg.vision_config.image_size, m_cfg.vision_config.image_size)

out = model(input_ids=input_ids, pixel_values=pixel_values)
print("Logits:", tuple(out["logits"].shape), out["logits"].dtype)
print("Loss:", out["loss"])
