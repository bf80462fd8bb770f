import torch

from model import LLAMA32_CONFIG, Linear_LORA, Llama3Model


def replace_with_lora(module, rank=8, alpha=32, dropout=0.0, names=None):
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear) and (names is None or name in names):
            lora = Linear_LORA(child.in_features, child.out_features, rank, alpha, dropout)
            with torch.no_grad():
                lora.linear.weight.copy_(child.weight)
            setattr(module, name, lora)
        else:
            replace_with_lora(child, rank, alpha, dropout, names)


torch.manual_seed(0)
cfg = {
    **LLAMA32_CONFIG,
    "vocab_size": 64,
    "context_length": 64,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 64,
    "n_kv_groups": 2,
}
cfg["dtype"] = torch.float32
model = Llama3Model(cfg)
input_ids = torch.randint(0, 64, (4, 13))
inputs, labels = input_ids[:, :-1], input_ids[:, 1:]

for p in model.parameters():
    p.requires_grad = False
before = model(inputs)
replace_with_lora(model, names=["W_query", "out_proj", "fc1", "fc3"])
print("converted:", sum(isinstance(m, Linear_LORA) for m in model.modules()))
print("same before training:", torch.allclose(model(inputs), before, atol=1e-5))

optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2)
loss_fn = torch.nn.CrossEntropyLoss()
losses = []
for _ in range(30):
    optimizer.zero_grad()
    logits = model(inputs)
    loss = loss_fn(logits.reshape(-1, cfg["vocab_size"]), labels.reshape(-1))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("loss falls:", losses[-1] < losses[0] - 0.3)
print(
    "trained:",
    sorted({name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.grad is not None}),
)

# adapters alone to a file
adapter_state = {}
for name, module in model.named_modules():
    if isinstance(module, Linear_LORA):
        adapter_state[f"{name}.lora_a.weight"] = module.lora_a.weight.cpu()
        adapter_state[f"{name}.lora_b.weight"] = module.lora_b.weight.cpu()
torch.save(adapter_state, "lora_adapters.pth")
trained = model(inputs)

# and back: onto the untrained model with the same conversion
torch.manual_seed(0)
fresh = Llama3Model(cfg)
replace_with_lora(fresh, names=["W_query", "out_proj", "fc1", "fc3"])
report = fresh.load_state_dict(torch.load("lora_adapters.pth"), strict=False)
print("unexpected:", report.unexpected_keys)
print("same after reloading:", torch.allclose(fresh(inputs), trained, atol=1e-5))
