import torch
from safetensors.torch import load_file

from model import LLAMA32_CONFIG, Llama3Model, Tokenizer, generate, load_weights_into_llama

LLAMA32_CONFIG.update(
    {
        "context_length": 512,
        "emb_dim": 32,
        "n_heads": 4,
        "n_layers": 2,
        "hidden_dim": 64,
        "n_kv_groups": 2,
        "dtype": torch.float32,
    }
)

# 1) Meta's tokenizer file
tokenizer = Tokenizer("Llama-3.2-1B-Instruct/original/tokenizer.model")

# 2) weights under Hugging Face's names
params = load_file("Llama-3.2-1B-Instruct/model.safetensors")

# 3) model
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = Llama3Model(LLAMA32_CONFIG).to(device)
load_weights_into_llama(model, LLAMA32_CONFIG, params)
model.eval()

# 4) a prompt, greedy and sampled
prompt = "### Instruction:\nName a colour.\n\n### Response:\n"
ids = tokenizer.encode(prompt, bos=True, eos=False)
idx = torch.tensor(ids, device=device).unsqueeze(0)
greedy = generate(model, idx, max_new_tokens=12, context_size=LLAMA32_CONFIG["context_length"])
print("prompt ids:", ids)
print("greedy ids:", greedy[0, len(ids) :].tolist())

uncached = generate(
    model, idx, max_new_tokens=12, context_size=LLAMA32_CONFIG["context_length"], use_cache=False
)
print("uncached is the same:", torch.equal(greedy, uncached))

torch.manual_seed(123)
out = generate(
    model,
    idx,
    max_new_tokens=12,
    context_size=LLAMA32_CONFIG["context_length"],
    temperature=0.8,
    top_k=50,
)
print("sampled ids:", out[0, len(ids) :].tolist())
text = tokenizer.decode(out.squeeze(0).tolist())
print("text goes on from the prompt:", text.startswith("<|begin_of_text|>" + prompt))

# 5) two rows at once, and an end token
rows = generate(
    model, idx.repeat(2, 1), max_new_tokens=3, context_size=LLAMA32_CONFIG["context_length"]
)
print("rows:", tuple(rows.shape))
stopped = generate(
    model,
    idx,
    max_new_tokens=12,
    context_size=LLAMA32_CONFIG["context_length"],
    eos_id=int(greedy[0, len(ids) + 2]),
)
print("stopped after:", stopped.shape[1] - len(ids))
