import torch
from llama32_multimodal import LLAMA32_CONFIG, Llama3Model

cfg = {
    **LLAMA32_CONFIG,
    "vocab_size": 300,
    "context_length": 128,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 3,
    "hidden_dim": 96,
    "n_kv_groups": 2,
}
model = Llama3Model(cfg).eval()
ids = torch.randint(0, cfg["vocab_size"], (2, 9))

with torch.no_grad():
    whole = model(ids)
    logits, past_kv = model(ids[:, :4], use_cache=True)
    steps = [logits]
    for place in range(4, ids.shape[1]):
        logits, past_kv = model(ids[:, place : place + 1], past_kv=past_kv, use_cache=True)
        steps.append(logits)

print("dtype:", whole.dtype)
print("cache:", len(past_kv), [tuple(t.shape) for t in past_kv[0]])
print(
    "step by step is the same:",
    torch.allclose(torch.cat(steps, dim=1).float(), whole.float(), atol=3e-2),
)
print(
    "keys:",
    sorted(name for name in model.state_dict() if "trf_blocks.0" in name or "trf" not in name),
)
