"""Masks of four dimensions, which say all of what is seen: as stock transformers takes them."""

import math

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tiny
from families.test_training import trained
from tiny import batches, close, pairs
from tiny.pairs import ONE_EACH, Pair, make, pair
from tiny.sizes import TILED_IMAGE

LEAST = torch.finfo(torch.float32).min
LLAMA_VISION = "llama vision"


def both_and_batch(case: str) -> tuple[Pair, dict[str, torch.Tensor]]:
    """Two rows with images, where the model has some, of one length and without a mask."""
    if case == LLAMA_VISION:
        both = pairs.make("mllama")
        batch = batches.tiled(
            both.ours,
            ([TILED_IMAGE, *tiny.tokens(8)], [1]),
            ([5, TILED_IMAGE, *tiny.tokens(7)], [3]),
        )
    else:
        both = make(case)
        batch = both.inputs((["image", 5], ["image", 2, 3]), completion=3)
    del batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(
        batch["input_ids"] == getattr(both.ours.config, "image_token_index", -1), -100
    )
    return both, batch | {"labels": labels}


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4)) > 0.4


def numbers(seen: torch.Tensor, hidden: float = -math.inf) -> torch.Tensor:
    return torch.randn(seen.shape, generator=torch.Generator().manual_seed(5)).masked_fill(
        ~seen, hidden
    )


def masks(heads: int, length: int) -> dict[str, torch.Tensor]:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    padded = causal & (
        torch.arange(length) >= torch.tensor([0, 2])[:, None, None, None]
    )  # its first two rows see nothing
    return {
        "causal and padding": padded,
        "bool, one for all": random(1, 1, length, length),
        "bool, of each head": random(2, heads, length, length),
        "keys alone": random(2, 1, 1, length),
        "numbers": numbers(random(2, 1, length, length)),
        "numbers of each head": numbers(random(2, heads, length, length) | causal),
        "least numbers": numbers(padded, LEAST),
        "half numbers": numbers(causal)[None, None].half(),
    }


def is_eager(model) -> bool:
    """Whether stock adds every mask to the scores (Gemma 2): True as a 1, too."""
    return model.config.get_text_config(decoder=True)._attn_implementation == "eager"


def for_stock(model, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.float()  # torch takes no half beside float32
    return torch.zeros(mask.shape).masked_fill(~mask, LEAST) if is_eager(model) else mask


@pytest.mark.parametrize("case", [*ONE_EACH, LLAMA_VISION])
def test_loss_and_gradients_equal_transformers(case):
    both, batch = both_and_batch(case)
    eager = is_eager(both.theirs)
    if eager:  # the average of all keys, where a query sees none: two queries of the second row
        batch["labels"][1, :3] = -100
    heads = both.ours.spec.text.num_attention_heads
    named = masks(heads, batch["input_ids"].shape[1])
    with torch.no_grad():
        for name, mask in named.items():
            got = both.ours(**batch, attention_mask=mask)
            expected = both.theirs(**batch, attention_mask=for_stock(both.theirs, mask))
            known = slice(2 if eager and name == "causal and padding" else 0, None)
            close(got.logits[:, known], expected.logits[:, known])
            torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=0, msg=name)
    batch["attention_mask"] = named["numbers of each head"]
    (loss, mine), (expected, theirs) = (
        trained(model, batch | {"use_cache": False}) for model in both
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    theirs = pairs.renamed(theirs)
    for name, gradient in mine.items():
        close(gradient, theirs[name], tolerance=2e-4, floor=1e-2)


@pytest.mark.parametrize("case", [*ONE_EACH, LLAMA_VISION])
def test_with_a_cache(case):
    """Dynamic, in steps of which the last is of one token, and static, whose mask covers slots that
    are not filled yet.
    """
    both, batch = both_and_batch(case)
    length, crossed = batch["input_ids"].shape[1], batch.pop("cross_attention_mask", None)
    del batch["labels"]
    types, ids = batch.pop("token_type_ids", None), batch.pop("input_ids")
    mask = masks(1, length + 3)["causal and padding"]

    def step(model, cache, start: int, end: int, keys: int):
        stock = for_stock(both.theirs, mask) if model is both.theirs else mask
        more = {} if start else dict(batch)
        if crossed is not None:
            more["cross_attention_mask"] = crossed[:, start:end]
        if types is not None and not start:
            more["token_type_ids"] = types
        return model(
            input_ids=ids[:, start:end],
            attention_mask=stock[:, :, start:end, :keys],
            past_key_values=cache,
            **more,
        ).logits

    def parts(model, kind, first: int):
        cache, keys = kind(), length + 3
        static = isinstance(cache, StaticCache)
        edges = [0, first, length - 1, length]
        return torch.cat(
            [
                step(model, cache, *edge, keys if static else edge[1])
                for edge in zip(edges, edges[1:], strict=False)
            ],
            1,
        )

    first = length - 3
    with torch.no_grad():
        # Made of a Gemma's config it would forget keys, which stock cannot beside such a mask.
        config = both.theirs.config if case == LLAMA_VISION else None
        expected = parts(both.theirs, lambda: DynamicCache(config=config), first)
        known = slice(2 if is_eager(both.theirs) else 0, None)
        close(parts(both.ours, DynamicCache, first)[:, known], expected[:, known])
        text = both.ours.config.get_text_config(decoder=True)
        static = parts(both.ours, lambda: StaticCache(text, max_cache_len=length + 3), first)
        close(static[:, known], expected[:, known])


def test_attentions_are_those_of_the_mask():
    both, batch = both_and_batch("llama")
    both.theirs.set_attn_implementation("eager")
    mask = numbers(random(2, 4, 5, 5) | torch.ones(5, 5, dtype=torch.bool).tril())
    with torch.no_grad():
        mine, theirs = (
            model(batch["input_ids"], attention_mask=mask, output_attentions=True).attentions
            for model in both
        )
    for weights, expected in zip(mine, theirs, strict=True):
        close(weights, expected)


def test_positions_are_honored_and_never_begin_sequences():
    both, batch = both_and_batch("llama")
    mask, place = masks(1, 5)["causal and padding"], torch.tensor([[0, 1, 0, 5, 6]])
    with torch.no_grad():
        ours, theirs = (
            model(
                batch["input_ids"], attention_mask=mask, position_ids=place, use_cache=False
            ).logits
            for model in both
        )
    close(ours, theirs)


def test_a_mask_of_packed_rows_equals_positions_that_restart():
    model, place = pair("llama").ours, torch.tensor([[0, 1, 2, 0, 1]])
    row, sequence = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([0, 0, 0, 1, 1])
    mask = (sequence[:, None] == sequence) & torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        close(
            model(row, attention_mask=mask[None, None], position_ids=place).logits,
            model(row, position_ids=place).logits,
        )


@pytest.mark.parametrize("visual", [False, True])
def test_prepended_visual_tokens_are_covered(visual):
    model = tiny.model(fusion="prepend", vision_feature="last", image_token_index=None)
    row, pixels = (
        torch.tensor([tiny.tokens(5)]),
        {"pixel_values": tiny.images(1)} if visual else {},
    )
    length = 5 + visual * tiny.PATCHES
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        close(model(row, **pixels, attention_mask=causal).logits, model(row, **pixels).logits)
        if visual:
            with pytest.raises(ValueError, match="attention_mask"):
                model(row, **pixels, attention_mask=causal[..., :5, :5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_in_float32_beside_16_bits(dtype):
    """The least float32 stays finite: a row of it averages all keys, as in transformers."""
    both, batch = both_and_batch("llama")
    for model in both:
        model.to(dtype)
    with torch.no_grad():
        for mask in (
            numbers(masks(1, 5)["causal and padding"], LEAST),
            numbers(random(2, 1, 5, 5)).to(dtype),
        ):
            ours, theirs = (model(batch["input_ids"], attention_mask=mask).logits for model in both)
            close(ours.float(), theirs.float(), tolerance=5e-2)


def test_it_compiles_in_one_graph():
    both, batch = both_and_batch("llama")
    mask = masks(1, batch["input_ids"].shape[1])["numbers"]
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(both.ours, fullgraph=True, backend="aot_eager")(
            **batch, attention_mask=mask, use_cache=False
        )
        torch.testing.assert_close(got.loss, both.ours(**batch, attention_mask=mask).loss)
    torch._dynamo.reset()


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_generate_takes_none(given):
    """Nor does transformers', which makes masks of later steps from one of two dimensions."""
    both, batch = both_and_batch("llama")
    words = {
        given: batch["input_ids"]
        if given == "input_ids"
        else both.ours.get_input_embeddings()(batch["input_ids"])
    }
    with pytest.raises(ValueError, match="attention_mask"):
        both.ours.generate(
            **words, attention_mask=masks(1, 5)["causal and padding"], max_new_tokens=2
        )
    if given == "input_ids":
        with pytest.raises(ValueError, match="attention_mask"):
            both.theirs.generate(
                **words, attention_mask=masks(1, 5)["causal and padding"], max_new_tokens=2
            )


def test_what_a_mask_excludes_is_refused():
    both, batch = both_and_batch("paligemma")
    length = batch["input_ids"].shape[1]
    batch = batch | {"token_type_ids": None, "attention_mask": masks(1, length)["numbers"]}
    for name, value in (
        ("prefix_length", torch.tensor([3, 3])),
        ("seq_idx", torch.zeros(2, length, dtype=torch.int)),
    ):
        with pytest.raises(ValueError, match=name):
            both.ours(**batch | {name: value})
