import torch

from model import KVCache, Llama3ForCausalLM, LLAMA32Config

config = LLAMA32Config(
    vocab_size=200,
    hidden_size=32,
    n_heads=4,
    n_kv_groups=2,
    n_layers=2,
    hidden_dim=64,
    dtype=torch.float32,
)
model = Llama3ForCausalLM(config).eval()
model.tie_weights()
print("tied:", model.lm_head.weight is model.model.tok_emb.weight)

ids = torch.randint(0, 200, (1, 7))
position_ids = torch.arange(7).unsqueeze(0)
causal = torch.triu(torch.full((7, 7), float("-inf")), diagonal=1)[None, None]
with torch.no_grad():
    logits, cache = model(input_ids=ids)
    masked, _ = model(input_ids=ids, attention_mask=causal, position_ids=position_ids)
    embedded, _ = model(input_embeds=model.model.get_input_embeddings()(ids))
    kv_cache = KVCache()
    steps = [model(input_ids=ids[:, i : i + 1], kv_cache=kv_cache)[0] for i in range(7)]
print("no cache:", cache)
print("a mask that is causal changes nothing:", torch.allclose(masked, logits, atol=1e-5))
print("from embeddings:", torch.allclose(embedded, logits, atol=1e-6))
print(
    "token by token:",
    torch.allclose(torch.cat(steps, dim=1), logits, atol=1e-5),
    kv_cache.num_items(),
)
