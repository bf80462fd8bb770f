"""`generate`, `assign` and `load_weights_into_llama`."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mllama
from dropin import toys
from dropin.toys import CFG, ids
from mllama.dropin.generate import (
    assign,
    generate,
    load_weights_into_llama,
    text_to_tokens,
    token_to_text,
)
from mllama.dropin.text import Llama3Model


class Fixed(nn.Module):
    """Returns the same logits everywhere; without a cache, as a script's own model may be."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*ids.shape, -1)


class Scripted(nn.Module):
    """Row r says script[r][t] after t + 1 tokens."""

    def __init__(self, *script: list[int]):
        super().__init__()
        self.register_buffer("script", torch.tensor(script))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(self.script[:, : ids.shape[1]], 10).float()


def test_greedy_is_stock_transformers():
    stock, tokens = toys.stock(), ids(2, 5)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = stock.generate(tokens, **options)
    for model in (toys.by_dict(), toys.by_config(), stock):  # logits, a tuple, an output
        assert torch.equal(generate(model, tokens, 20, 64), expected)


@pytest.mark.parametrize("prompt, context_size", [(5, 64), (5, 9), (12, 8), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 5}])
def test_cached_is_uncached(prompt, context_size, options):
    model, tokens, found = toys.by_dict(), ids(3, prompt), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(generate(model, tokens, 10, context_size, use_cache=use_cache, **options))
    assert torch.equal(*found) and torch.equal(found[0][:, :prompt], tokens)
    assert found[0].shape == (3, prompt + 10) and not found[0].requires_grad


def test_the_cache_is_used_while_the_window_holds_all():
    model, lengths = toys.by_dict(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, ids(1, 4), 6, 7)
    assert lengths == [4, 1, 1, 1, 7, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_k_keeps_the_likeliest(dtype):
    """Logits far above any id, so that a threshold taken from top-k's indices would keep all."""
    model = Fixed(torch.linspace(149, 100, 50, dtype=dtype))
    with torch.device("meta"):  # a new tensor would not be where the logits are
        drawn = generate(model, torch.zeros(500, 1, dtype=torch.long, device="cpu"), 1, 8, 100.0, 3)
    assert set(drawn[:, 1].tolist()) == {0, 1, 2}


def test_temperature():
    model, start = Fixed(torch.tensor([0.0, 1.0])), torch.zeros(4000, 1, dtype=torch.long)
    for temperature in (0.5, 1.0, 2.0):
        share = generate(model, start, 1, 8, temperature, top_k=0)[:, 1].float().mean()
        assert abs(share - torch.tensor(1 / temperature).sigmoid()) < 0.03
    assert generate(model, start[:4], 1, 8, 5e-324)[:, 1].eq(1).all()


def test_a_row_ends_for_itself():
    model = Scripted([1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 9, 6])
    tokens = generate(model, torch.zeros(2, 1, dtype=torch.long), 6, 8, eos_id=9)
    assert tokens.tolist() == [[0, 1, 2, 9, 9], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"idx": torch.zeros(1, 3)}, TypeError),
        ({"idx": torch.zeros(3, dtype=torch.long)}, ValueError),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, ValueError),
        ({"max_new_tokens": -1}, ValueError),
        ({"context_size": 0}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"top_k": 100}, ValueError),
        ({"top_k": -1}, ValueError),
        ({"eos_id": "<eos>"}, ValueError),
        ({"model": toys.by_config().model}, ValueError),
    ],
)
def test_calls_that_cannot_be(change, error):
    given = {"model": toys.by_dict(), "idx": ids(1, 4), "max_new_tokens": 2, "context_size": 8}
    with pytest.raises(error, match=next(iter(change))):
        generate(**given | change)


def test_metas_tokenizer():
    meta = pytest.importorskip("llama_models.llama3.tokenizer", reason="no tokenizer.model")
    tokenizer = mllama.Tokenizer(Path(meta.__file__).parent / "tokenizer.model")
    tokens = text_to_tokens("naïve café, 12345.", tokenizer)
    assert tokens.shape == (1, tokens.numel()) and tokens.dtype == torch.int64
    assert token_to_text(tokens, tokenizer) == "naïve café, 12345."


@pytest.mark.parametrize("name", ["generate", "assign", "load_weights_into_llama"])
def test_there_is_one_of_each(name):
    """Such files had two, of which Python kept the second."""
    folder = Path(mllama.__file__).parent / "dropin"
    bodies = [ast.parse(path.read_text()).body for path in folder.rglob("*.py")]
    found = [node for body in bodies for node in body if getattr(node, "name", None) == name]
    assert len(found) == 1


# ---- weights


def test_assign():
    left = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    right = torch.ones(2, 3)
    for given in (right, np.ones((2, 3)), [[1.0] * 3] * 2):
        made = assign(left, given, "a name")
        assert isinstance(made, nn.Parameter) and made.dtype == torch.bfloat16
        assert made.requires_grad and made.eq(1).all()
    made = assign(torch.empty(2, 3, device="meta"), right)
    right.zero_()  # no memory is shared
    assert made.eq(1).all() and made.device.type == "cpu"
    with pytest.raises(ValueError, match=r"a\.weight"):
        assign(torch.zeros(2, 3), torch.zeros(3, 2), "a.weight")


def test_from_a_file_of_stock_transformers(tmp_path):
    stock = toys.stock()
    stock.save_pretrained(tmp_path)
    params = load_file(tmp_path / "model.safetensors")
    model = Llama3Model(CFG | {"dtype": torch.bfloat16})
    del params["lm_head.weight"]  # the head falls back to the embedding
    with pytest.warns(UserWarning, match=r"model\.layers\.2\.x"):
        load_weights_into_llama(model, CFG, params | {"model.layers.2.x": torch.zeros(1)})
    expected = stock.bfloat16().state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.trf_blocks[1].ff.fc2.weight, expected)
    assert torch.equal(model.out_head.weight, model.tok_emb.weight)
    assert model.out_head.weight is not model.tok_emb.weight


@pytest.mark.parametrize(
    ("cfg", "change", "named"),
    [
        (CFG, {"model.norm.weight": None}, "final_norm"),
        (CFG, {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}, "up_proj"),
        (CFG | {"n_layers": 3}, {}, "n_layers"),
        ({}, {}, "n_layers"),
    ],
)
def test_what_does_not_fit_changes_nothing(cfg, change, named):
    model, params = Llama3Model(CFG), toys.stock().state_dict() | change
    before = {name: value.clone() for name, value in model.state_dict().items()}
    params = {name: value for name, value in params.items() if value is not None}
    with pytest.raises(ValueError, match=named):
        load_weights_into_llama(model, cfg, params)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match="model"):
        load_weights_into_llama(toys.by_config().model, CFG, params)


def test_weights_come_before_lora():
    model = Llama3Model(CFG)
    mllama.convert_to_lora(model, ["W_query"], 4, 8)
    with pytest.raises(ValueError, match="W_query"):
        load_weights_into_llama(model, CFG, toys.stock().state_dict())
