"""`generate`, its tokenizer's helpers, and the tokenizer."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import mllama
from dropin import toys
from dropin.toys import ids
from mllama.dropin.model import Llama3Model, Tokenizer, generate, text_to_tokens, token_to_text

FAR = torch.finfo(torch.float32).max


class Fixed(nn.Module):
    """Answers the same logits everywhere; without a cache, as a script's own model may be."""

    def __init__(self, *logits: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*ids.shape, -1)


class Scripted(nn.Module):
    """Row r says script[r][t] after t + 1 tokens."""

    def __init__(self, *script: list[int]):
        super().__init__()
        self.register_buffer("script", torch.tensor(script))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(self.script[:, : ids.shape[1]], 10).float()


def test_a_model_without_a_head_is_refused_and_one_with_it_is_taken():
    model, tokens = toys.by_config(), ids()
    with pytest.raises(ValueError, match="Llama3ForCausalLM"):
        generate(model.model, tokens, 4, 128)
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids(), 4, 128), tokens)


def test_signature():
    parameters = inspect.signature(generate).parameters
    defaults = {"temperature": 0.0, "top_k": None, "eos_id": None, "use_cache": True}
    assert list(parameters) == ["model", "idx", "max_new_tokens", "context_size", *defaults]
    assert {name: parameters[name].default for name in defaults} == defaults


def test_greedy_is_stock_transformers():
    stock, tokens = toys.stock(), ids(2, 5)
    expected = stock.generate(
        tokens, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(generate(toys.by_dict(), tokens, 20, 64), expected)


@pytest.mark.parametrize("prompt, context_size", [(5, 64), (5, 9), (5, 5), (12, 8), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 5}])
def test_cached_is_uncached(prompt, context_size, options):
    model, tokens, answers = toys.by_dict(), ids(3, prompt), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        answers.append(generate(model, tokens, 10, context_size, use_cache=use_cache, **options))
    assert torch.equal(*answers) and answers[0].shape == (3, prompt + 10)
    assert torch.equal(answers[0][:, :prompt], tokens)


def test_the_cache_is_used_while_the_window_holds_all():
    model, lengths = toys.by_dict(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, ids(1, 4), 6, 7)
    assert lengths == [4, 1, 1, 1, 7, 7]
    lengths.clear()
    generate(model, ids(1, 4), 6, 7, use_cache=False)
    assert lengths == [4, 5, 6, 7, 7, 7]


def test_both_families_and_any_other_module():
    tokens = ids(2, 5)
    expected = generate(toys.by_dict(), tokens, 6, 64)
    assert torch.equal(
        generate(toys.by_config(), tokens, 6, 64), expected
    )  # (logits, kv_cache), without past_kv
    assert torch.equal(generate(toys.stock().model.embed_tokens, tokens, 0, 64), tokens)
    assert torch.equal(
        generate(toys.stock(), tokens, 6, 64), expected
    )  # an output that begins with logits
    assert generate(Fixed(0.0, 2.0, 1.0), tokens, 3, 64)[:, 5:].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_k_keeps_the_likeliest(dtype):
    model = Fixed(0.0, 3.0, 2.0, 2.9, -1.0, dtype=dtype)
    drawn = generate(model, torch.zeros(200, 1, dtype=torch.long), 5, 8, temperature=1.0, top_k=2)[
        :, 1:
    ]
    assert set(drawn.flatten().tolist()) == {1, 3}
    assert (
        generate(model, torch.zeros(2, 1, dtype=torch.long), 2, 8, temperature=FAR, top_k=1)[:, 1:]
        .eq(1)
        .all()
    )


def test_temperature():
    model, start = Fixed(0.0, 1.0), torch.zeros(4000, 1, dtype=torch.long)
    for temperature in (0.5, 1.0, 2.0):
        share = generate(model, start, 1, 8, temperature)[:, 1].float().mean()
        assert abs(share - torch.tensor(1 / temperature).sigmoid()) < 0.03
    for temperature in (1e-30, 5e-324):
        assert generate(model, start[:4], 1, 8, temperature)[:, 1].eq(1).all()
    assert set(generate(model, start, 1, 8, 1.0, top_k=0)[:, 1].tolist()) == {0, 1}  # no limit


def test_a_row_ends_for_itself():
    model = Scripted([1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 9, 6])
    tokens = generate(model, torch.zeros(2, 1, dtype=torch.long), 6, 8, eos_id=9)
    assert tokens.tolist() == [
        [0, 1, 2, 9, 9],
        [0, 1, 2, 3, 4],
    ]  # where all have ended, the last one's is not added
    assert generate(model, torch.zeros(2, 1, dtype=torch.long), 6, 8).shape == (2, 7)
    assert generate(
        Scripted([1, 9, 3]), torch.zeros(1, 1, dtype=torch.long), 3, 8, eos_id=9
    ).tolist() == [[0, 1]]


def test_nothing_is_kept_for_gradients_and_the_prompt_stays():
    model, tokens = toys.by_dict().train(), ids(1, 4)
    before = tokens.clone()
    assert (
        not generate(model, tokens.int(), 3, 8).requires_grad
        and model.training
        and torch.equal(tokens, before)
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"idx": torch.zeros(1, 3)}, TypeError, "idx must be an integer"),
        ({"idx": [1, 2]}, TypeError, "idx must be an integer torch.Tensor, got list"),
        ({"idx": torch.zeros(3, dtype=torch.long)}, ValueError, r"\[batch, tokens\]"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "at least one token"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ({"context_size": 0}, ValueError, "context_size"),
        ({"context_size": 65, "max_new_tokens": 62}, ValueError, "65 tokens .*context_length, 64"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": 100}, ValueError, "top_k must be at most the vocabulary's 99 tokens, got 100"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"eos_id": "<eos>"}, ValueError, "eos_id must be an integer"),
    ],
)
def test_what_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        generate(
            **{"model": toys.by_dict(), "idx": ids(1, 4), "max_new_tokens": 2, "context_size": 8}
            | change
        )


@pytest.fixture(scope="module")
def tokenizer_file():
    meta = pytest.importorskip(
        "llama_models.llama3.tokenizer",
        reason="llama-models is not installed (--no-deps): no tokenizer file",
    )
    return Path(meta.__file__).parent / "tokenizer.model"


def test_the_tokenizer(tokenizer_file):
    assert Tokenizer is mllama.Tokenizer
    tokenizer = Tokenizer(str(tokenizer_file))
    named = {
        "begin_of_text": 128000,
        "end_of_text": 128001,
        "start_header_id": 128006,
        "end_header_id": 128007,
        "eot_id": 128009,
    }
    assert {name: tokenizer.special[f"<|{name}|>"] for name in named} == named and len(
        tokenizer.special
    ) == 256
    text = "Write a short sentence: naïve café, 12345."
    ids = tokenizer.encode(text)
    assert (
        tokenizer.encode(text, bos=True, eos=True) == [128000, *ids, 128001]
        and tokenizer.model.decode(ids) == text
    )
    assert (
        text_to_tokens(text, tokenizer).tolist() == [ids]
        and token_to_text(torch.tensor([ids]), tokenizer) == text
    )


def test_a_script_from_prompt_to_text(tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)
    model = Llama3Model(
        toys.CFG | {"vocab_size": tokenizer.n_words, "emb_dim": 16, "n_layers": 1, "hidden_dim": 16}
    )
    idx = torch.tensor(tokenizer.encode("Hello", bos=True, eos=False)).unsqueeze(0)
    out = generate(model, idx, max_new_tokens=4, context_size=64, temperature=0.8, top_k=50)
    assert tokenizer.decode(out.squeeze(0).tolist()).startswith("<|begin_of_text|>Hello")


def test_a_missing_tokenizer_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer(tmp_path / "tokenizer.model")
