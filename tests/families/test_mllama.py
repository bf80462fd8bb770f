"""Llama-3.2-Vision as a whole against stock transformers: logits, rounding, caches, generation,
training, folders.
"""

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import tiny
from mllama import MllamaForConditionalGeneration
from tiny import close, pairs
from tiny.batches import tiled
from tiny.pairs import Pair
from tiny.sizes import TILED_IMAGE

SIZES = {
    "grouped": ({}, {}),
    "all heads": (
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "cross_attention_layers": [2],
        },
        {
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "image_size": 24,
            "attention_heads": 1,
        },
    ),
    "one kv head": (
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "cross_attention_layers": [1, 2, 4],
        },
        {
            "hidden_size": 48,
            "attention_heads": 3,
            "intermediate_layers_indices": [1],
            "num_global_layers": 1,
        },
    ),
}


def sized(name: str) -> Pair:
    text, vision = SIZES[name]
    return pairs.make("mllama", text=text, vision=vision)


ROWS = {
    "one": (([TILED_IMAGE, *tiny.tokens(6)], [1]),),
    "text before it": (([*tiny.tokens(3), TILED_IMAGE, *tiny.tokens(4)], [3]),),
    "two": (
        ([5, TILED_IMAGE, *tiny.tokens(3), TILED_IMAGE, *tiny.tokens(3)], [2, 1]),
        ([TILED_IMAGE, TILED_IMAGE, *tiny.tokens(3)], [1, 3]),
    ),
    "mixed": (
        ([*tiny.tokens(2), TILED_IMAGE, *tiny.tokens(4)], [2]),
        (tiny.tokens(5), []),
        ([TILED_IMAGE, 7, TILED_IMAGE, 9], [3, 1]),
    ),
    "none": ((tiny.tokens(6), []), (tiny.tokens(4), [])),
}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Tokens counted without padding, which transformers' forward does not do by itself."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def stock_logits(theirs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return theirs(**batch, position_ids=positions(batch["attention_mask"])).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", SIZES)
def test_logits_equal_transformers(sizes, side):
    ours, theirs = sized(sizes)
    for rows in ROWS.values():
        batch = tiled(ours, *rows, side=side)
        with torch.no_grad():
            expected, got = stock_logits(theirs, batch), ours(**batch).logits
        real = batch["attention_mask"].bool()
        close(got[real], expected[real])


@pytest.mark.parametrize("sizes", SIZES)
def test_bfloat16_rounds_no_more_than_theirs(sizes):
    """On weights that bfloat16 holds exactly; stock's rotary frequencies stay float32, as its
    from_pretrained leaves them.
    """
    both = sized(sizes)
    long = (
        ([3, TILED_IMAGE, *tiny.tokens(50), TILED_IMAGE, *tiny.tokens(20, 3)], [6, 2]),
        ([TILED_IMAGE, *tiny.tokens(61, 4)], [1]),
    )
    if both.ours.config.vision_config.max_num_tiles == 2:
        long = tuple((ids, [2] * len(ratios)) for ids, ratios in long)
    batch = tiled(both.ours, *long)
    real, results = batch["attention_mask"].bool(), []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            for parameter in (*both.ours.parameters(), *both.theirs.parameters()):
                parameter.data = parameter.data.to(dtype)
            results += [
                both.ours(**batch).logits[real].float(),
                stock_logits(both.theirs, batch)[real].float(),
            ]
    ours, theirs, again, exact = results
    close(again, exact)
    errors = [(result - exact).square().mean().sqrt() for result in (ours, theirs)]
    assert 0 < errors[0] <= 1.2 * errors[1]


def test_hidden_states_and_attentions():
    ours, theirs = pairs.make("mllama")
    theirs.set_attn_implementation("eager")
    for rows in ("two", "none"):
        batch = tiled(ours, *ROWS[rows])
        seen = batch["attention_mask"].bool()
        with torch.no_grad():
            mine = ours(**batch, output_hidden_states=True, output_attentions=True)
            other = theirs(
                **batch,
                position_ids=positions(batch["attention_mask"]),
                output_hidden_states=True,
                output_attentions=True,
            )
        if rows == "two":  # stock records nothing of layers that it skips
            for state, expected in zip(mine.hidden_states, other.hidden_states, strict=True):
                close(state[seen], expected[seen])
            for weights, expected in zip(mine.attentions, other.attentions, strict=True):
                close(weights.transpose(1, 2)[seen], expected.transpose(1, 2)[seen])
            assert (
                mine.image_hidden_states.shape == (2, 2 * 4 * 5, 64)
                and len(mine.image_attentions) == 5
            )
        else:
            assert [weights is None for weights in mine.attentions] == [
                False,
                True,
                False,
                True,
                False,
            ]


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_cached_equals_uncached(reference):
    """In steps of any size, with the second image given when it comes up."""
    ours, _ = pairs.make("mllama")
    ours.reference = reference
    batch = tiled(ours, *ROWS["two"], side="right")
    with torch.no_grad():
        whole = ours(**batch).logits
        cache, got = DynamicCache(), []
        for start, end in ((0, 2), (2, 3), (3, 7), (7, 9)):
            step = {
                "input_ids": batch["input_ids"][:, start:end],
                "attention_mask": batch["attention_mask"][:, :end],
            }
            step["cross_attention_mask"] = batch["cross_attention_mask"][:, start:end]
            if start == 0:
                step |= {
                    name: batch[name]
                    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
                }
            got.append(ours(**step, past_key_values=cache).logits)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(got, 1)[real], whole[real], rtol=1e-4, atol=1e-4)


def test_an_image_may_come_to_a_filled_cache():
    ours, _ = pairs.make("mllama")
    ours.reference = "meta"
    row = [TILED_IMAGE, *tiny.tokens(4), TILED_IMAGE, *tiny.tokens(3)]
    batch = tiled(ours, (row, [2, 6]))
    images = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    with torch.no_grad():
        whole = ours(**batch).logits
        first = ours(
            batch["input_ids"][:, :5],
            **{name: batch[name][:, :1] for name in images},
            cross_attention_mask=batch["cross_attention_mask"][:, :5, :1],
        )
        second = ours(
            batch["input_ids"][:, 5:],
            **{name: batch[name][:, 1:] for name in images},
            cross_attention_mask=batch["cross_attention_mask"][:, 5:],
            past_key_values=first.past_key_values,
        )
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4
    )


GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models():
    return pairs.make("mllama")


@pytest.mark.parametrize("rows", ROWS)
def test_greedy_and_beams_equal_transformers(models, rows):
    ours, theirs = models
    batch = tiled(ours, *ROWS[rows])
    greedy = ours.generate(**batch, **GREEDY)
    assert torch.equal(greedy, theirs.generate(**batch, **GREEDY))
    assert (greedy[:, -8:] != greedy[:, -8:-7]).any()  # not one token over and over
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_ways_of_generating_agree(models, reference):
    ours, _ = models
    ours.reference = reference
    for rows in ("two", "none", "mixed"):
        batch = tiled(ours, *ROWS[rows])
        greedy = ours.generate(**batch, **GREEDY)
        for options in (
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"past_key_values": StaticCache(config=ours.config, max_cache_len=40)},
            {"past_key_values": DynamicCache(config=ours.config)},
            {"past_key_values": DynamicCache()},
        ):
            assert torch.equal(ours.generate(**batch, **GREEDY, **options), greedy), (rows, options)
    beams = GREEDY | {"num_beams": 3}
    assert torch.equal(
        ours.generate(**batch, **beams, cache_implementation="static"),
        ours.generate(**batch, **beams),
    )
    batch = tiled(ours, *ROWS["text before it"])  # these take one row
    greedy = ours.generate(**batch, **GREEDY)
    assistant = pairs.make("mllama", seed=1)[0]
    assert torch.equal(ours.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2), greedy)
    assert torch.equal(ours.generate(**batch, **GREEDY, assistant_model=assistant), greedy)
    ours.reference = "hf"


def test_as_many_candidates_as_the_mask_has_rows():
    ours = pairs.make("mllama").ours
    ours.reference = "meta"
    for name, parameter in ours.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 1.0)
    batch = pairs.pair("mllama").inputs(([1, "image", 1],))  # the first token sees no image
    assistant = pairs.make("llama", 5, vocab_size=ours.spec.text.vocab_size).ours
    assistant.generation_config.update(
        assistant_confidence_threshold=0.0,
        num_assistant_tokens=3,
        num_assistant_tokens_schedule="constant",
    )
    options = GREEDY | {"max_new_tokens": 12, "pad_token_id": 97}
    greedy = ours.generate(**batch, **options)
    assert torch.equal(ours.generate(**batch, **options, assistant_model=assistant), greedy)


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_a_conversation_goes_on_from_its_cache(models, reference):
    """A second question, and one with an image of its own: the cache has the first image, and
    what was said of it.
    """
    ours, theirs = models
    ours.reference = reference
    first = tiled(ours, *ROWS["text before it"])
    said = ours.generate(**first, **GREEDY)[0].tolist()
    for more, ratios in (([4, 8, 15], []), ([TILED_IMAGE, 4, 8], [2])):
        whole = tiled(ours, ([*said, *more], [3, *ratios]))
        whole["pixel_values"][:, :1] = first["pixel_values"]
        expected = ours.generate(**whole, **GREEDY)
        if reference == "hf":
            assert torch.equal(theirs.generate(**whole, **GREEDY), expected)
        cache = ours.generate(**first, **GREEDY, return_dict_in_generate=True).past_key_values
        new = (
            {
                name: whole[name][:, 1:]
                for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
            }
            if ratios
            else {}
        )
        batch = {
            name: whole[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")
        }
        assert torch.equal(ours.generate(**batch, **new, **GREEDY, past_key_values=cache), expected)
        if reference == "meta":  # of three tiles and of two
            assert (
                cache.layers[1].keys.shape[2]
                == (3 + len(ratios) * 2) * ours.vision_tower.tokens_per_tile
            )
    ours.reference = "hf"


def examples(model) -> dict[str, torch.Tensor]:
    """A batch with labels."""
    batch = tiled(model, *ROWS["mixed"], side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": labels.masked_fill(labels == TILED_IMAGE, -100)}


def trained(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every parameter's gradient."""
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("sizes", SIZES)
def test_loss_and_gradients_equal_transformers(sizes):
    both = sized(sizes)
    batch = examples(both.ours)
    (loss, mine), (expected, theirs) = (trained(model, batch) for model in both)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    theirs = pairs.renamed(theirs)
    assert mine.keys() == theirs.keys() and len(mine) == len(list(both.ours.parameters()))
    for name, gradient in mine.items():
        close(gradient, theirs[name], tolerance=2e-4, floor=1e-2)


def test_labels_at_placeholders_are_not_trained():
    ours, _ = pairs.make("mllama")
    batch = examples(ours)
    loss = ours(**batch).loss
    batch["labels"] = torch.where(batch["input_ids"] == TILED_IMAGE, TILED_IMAGE, batch["labels"])
    assert torch.equal(ours(**batch).loss, loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_activations_changes_no_gradient(reentrant):
    ours, _ = pairs.make("mllama")
    ours.reference = "meta"
    batch = examples(ours)
    loss, expected = trained(ours, batch)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # this kind needs an input that asks for a gradient
        ours.enable_input_require_grads()
        batch["pixel_values"].requires_grad_()
    again, gradients = trained(ours, batch)
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_lora_on_cross_attention_and_encoder(tmp_path):
    peft = pytest.importorskip("peft")
    ours, _ = pairs.make("mllama")
    targets = r"(vision_tower.*transformer.*|.*cross_attn)\.(q|v)_proj"
    config = peft.LoraConfig(
        target_modules=targets, r=2, task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(ours, config)
    _, gradients = trained(model, examples(ours))
    assert len(gradients) == 2 * 2 * (5 + 2) and all(
        gradient.any() for gradient in gradients.values()
    )
    model.eval().save_pretrained(tmp_path)
    batch = tiled(ours, *ROWS["two"])
    with torch.no_grad():
        expected = model(**batch).logits
        again = peft.PeftModel.from_pretrained(pairs.make("mllama").ours, tmp_path).eval()
        torch.testing.assert_close(again(**batch).logits, expected)
        torch.testing.assert_close(
            model.merge_and_unload()(**batch).logits, expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("sizes", SIZES)
def test_saved_folders_are_stock_transformers(sizes, tmp_path):
    ours, theirs = sized(sizes)
    ours.save_pretrained(tmp_path)
    batch = tiled(
        ours,
        *ROWS["text before it"] if ours.config.vision_config.max_num_tiles == 4 else ROWS["one"],
    )
    with torch.no_grad():
        stock = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(stock_logits(stock, batch), stock_logits(theirs, batch))
        again = MllamaForConditionalGeneration.from_pretrained(tmp_path, reference="hf")
        assert torch.equal(again(**batch).logits, ours(**batch).logits)
        theirs.save_pretrained(tmp_path / "stock")
        again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "stock")
        assert again.reference == "meta"
        again.reference = "hf"
        assert torch.equal(again(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (
            ValueError,
            "pixel_values",
            lambda b: {name: b[name][:1] for name in b if name[:5] in ("pixel", "aspec")},
        ),
        (TypeError, "aspect_ratio_ids must be", lambda b: {"aspect_ratio_ids": None}),
        (
            ValueError,
            "cross_attention_mask",
            lambda b: {"cross_attention_mask": b["cross_attention_mask"][:1]},
        ),
        (
            ValueError,
            "for 8 tiles, got",
            lambda b: {"cross_attention_mask": b["cross_attention_mask"][:, :, :1]},
        ),
        (TypeError, "cross_attention_mask", lambda b: {"cross_attention_mask": [1]}),
        (
            ValueError,
            "image_features",
            lambda b: {"pixel_values": None, "image_features": torch.ones(2, 41, 64)},
        ),
        (
            ValueError,
            "image_features must be",
            lambda b: {"pixel_values": None, "image_features": torch.ones(2, 40, 32)},
        ),
        (
            ValueError,
            "image_features must be",
            lambda b: {"pixel_values": None, "image_features": torch.ones(80, 64)},
        ),
        (
            TypeError,
            "image_features must be",
            lambda b: {"pixel_values": None, "image_features": [1]},
        ),
        (ValueError, "not both", lambda b: {"image_features": torch.ones(2, 40, 64)}),
        (IndexError, "0 to 106", lambda b: {"input_ids": torch.full_like(b["input_ids"], 107)}),
    ],
)
def test_other_input_is_refused(models, error, match, change):
    batch = tiled(models[0], *ROWS["two"])
    with pytest.raises(error, match=match):
        models[0](**batch | change(batch))


def test_a_mask_made_before_padding_moved_is_refused(models):
    """As TRL's collator of prompts and completions makes them: the mask is the padded prompts'.
    Stock transformers fails on its size.
    """
    rows = ([TILED_IMAGE, *tiny.tokens(6)], [1]), ([TILED_IMAGE, *tiny.tokens(3)], [1])
    padded, answer = tiled(models[0], *rows), torch.tensor(tiny.tokens(4)).repeat(2, 1)
    ids = torch.cat([tiled(models[0], *rows, side="right")["input_ids"], answer], 1)
    batch = padded | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"cross_attention_mask"):
        models[0](**batch)
    batch["cross_attention_mask"] = tiled(models[0], *rows, side="right")["cross_attention_mask"]
    with torch.no_grad():
        assert torch.equal(
            models[0](**batch).logits[:1],
            models[0](**{name: value[:1] for name, value in batch.items()}).logits,
        )


def test_features_take_the_place_of_pixels(models):
    ours, _ = models
    batch = tiled(ours, *ROWS["two"])
    with torch.no_grad():
        expected = ours(**batch)
        aspects = {name: batch[name] for name in ("aspect_ratio_ids", "aspect_ratio_mask")}
        features = ours.get_image_features(batch.pop("pixel_values"), **aspects)
        assert torch.equal(features, expected.image_hidden_states)
        assert torch.equal(ours(**batch, image_features=features).logits, expected.logits)
    embeds = ours.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(
        ours(inputs_embeds=embeds, **batch, image_features=features).logits, expected.logits
    )


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_a_row_with_fewer_images_than_others(models, reference):
    """In transformers, text before its image attends to the images that only other rows have."""
    ours, theirs = models
    fewer, more = [1, TILED_IMAGE, 5, 6], [2, TILED_IMAGE, 3, TILED_IMAGE]
    batch, alone = tiled(ours, (fewer, [8]), (more, [8, 7])), tiled(ours, (fewer, [8]))
    ours.reference = reference
    try:
        with torch.no_grad():
            both, one = ours(**batch).logits[0], ours(**alone).logits[0]
            if reference == "meta":
                close(both, one)
                return
            close(both, theirs(**batch).logits[0])
            expected = theirs(**alone).logits[0]
    finally:
        ours.reference = "hf"
    close(one, expected)
    assert (both - one).abs().max() > 100 * (one - expected).abs().max()


def test_an_encoder_of_another_dtype():
    ours, _ = pairs.make("mllama")
    batch = tiled(ours, *ROWS["two"])
    with torch.no_grad():
        expected = ours(**batch).logits
        ours.vision_tower.bfloat16()
        ours.multi_modal_projector.bfloat16()
        logits = ours(**batch).logits
    assert logits.dtype == torch.float32
    close(logits, expected, tolerance=0.1)
