import torch
from siglip import SiglipModel, SiglipVisionConfig

vis_cfg = SiglipVisionConfig(
    hidden_size=64,
    intermediate_size=128,
    image_size=64,
    patch_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
)
vis_model = SiglipModel(vis_cfg).eval()

x = torch.randn(2, 3, vis_cfg.image_size, vis_cfg.image_size)
with torch.no_grad():
    features = vis_model(x)
print("Vision features:", features.shape)
print("Parameters:", sum(p.numel() for p in vis_model.parameters()))
