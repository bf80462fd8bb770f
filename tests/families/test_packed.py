"""Several sequences in one row: stock transformers on the same weights, and each sequence alone,
say what is right.
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

import tiny
from families.test_training import trained
from mllama import lora
from tiny import batches, close, pairs, tokens
from tiny.pairs import ONE_EACH, Pair, make, pair, renamed
from tiny.sizes import TILED_IMAGE

LENGTHS = [7, 5, 1, 9]


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def packed(lengths: list[int] = LENGTHS, seed: int = 2) -> dict[str, torch.Tensor]:
    """One row, its labels as DataCollatorWithFlattening makes them."""
    place = positions(*lengths)
    row = torch.tensor([tokens(sum(lengths), seed)])
    return {"input_ids": row, "position_ids": place, "labels": row.masked_fill(place == 0, -100)}


def with_images(both: Pair) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A packed row in which some sequences have images, and each sequence alone."""
    alone = []
    for row in (["image", 3], [5], [2, "image", 1, "image", 2]):
        batch = both.inputs((row,), completion=1)
        del batch["attention_mask"]
        if "pixel_values" in batch:
            batch["pixel_values"] = both.images(len(batch["pixel_values"]), seed=len(alone) + 5)
        places = batch["input_ids"] == getattr(both.ours.config, "image_token_index", -1)
        batch["labels"] = batch["input_ids"].masked_fill(places, -100)
        batch["labels"][:, 0] = -100
        alone.append(batch)
    whole = {
        name: torch.cat(
            [batch[name] for batch in alone if name in batch], int(name != "pixel_values")
        )
        for name in alone[0]
    }
    return whole | {
        "position_ids": positions(*(batch["input_ids"].shape[1] for batch in alone))
    }, alone


def sums(losses: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


@pytest.mark.parametrize("shared", [False, True], ids=["two rows", "positions of one row for two"])
@pytest.mark.parametrize("case", ONE_EACH)
def test_loss_and_gradients_equal_transformers(case, shared):
    both = make(case)
    rows = [packed(), packed(LENGTHS if shared else [1, 12, 9], seed=3)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if shared:
        batch["position_ids"] = batch["position_ids"][:1] + 5  # wherever they begin
    (loss, mine), (expected, theirs) = (
        trained(model, batch | {"use_cache": False}) for model in both
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    theirs = renamed(theirs)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        close(gradient, theirs[name], tolerance=2e-4, floor=1e-2)


@pytest.mark.parametrize("case", ONE_EACH)
def test_each_sequence_is_as_alone(case):
    """With its images, and of PaliGemma with a prompt of its own that is seen both ways; other
    sequences leave no gradient in it.
    """
    model = make(case).ours
    whole, alone = with_images(pair(case))
    with torch.no_grad():
        close(model(**whole).logits, torch.cat([model(**batch).logits for batch in alone], 1))
    counts = [int((batch["labels"] != -100).sum()) for batch in alone]
    loss, gradients = trained(model, whole)
    model.zero_grad()
    expected = sums([model(**batch).loss for batch in alone], counts)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    expected.backward()
    assert gradients
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(gradients[name], parameter.grad, tolerance=2e-4, floor=1e-2)


@pytest.mark.parametrize("fusion", ["merge", "prepend"])
def test_our_own_fusions(fusion):
    model = tiny.model(
        **{"fusion": fusion} | ({} if fusion == "merge" else {"vision_feature": "last"})
    )
    rows = [
        [*[tiny.IMAGE] * tiny.PATCHES, *tokens(3)],
        tokens(4, 5),
        [5, *[tiny.IMAGE] * tiny.PATCHES, *tokens(2)],
    ]
    pixels, row = tiny.images(2), [token for row in rows for token in row]
    with torch.no_grad():
        got = model(torch.tensor([row]), pixels, position_ids=positions(*map(len, rows))).logits
        alone = [
            model(torch.tensor([row]), pixel).logits
            for row, pixel in zip(rows, (pixels[:1], None, pixels[1:]), strict=True)
        ]
    close(got, torch.cat(alone, 1))
    if fusion == "prepend":
        with pytest.raises(ValueError, match="position_ids"):
            model(torch.tensor([tokens(4)]), pixels[:1], position_ids=positions(2, 2))


def test_added_cross_attention():
    model = tiny.crossed()
    pixels, mask = tiny.images(2), torch.zeros(1, 9, 2, 1)
    mask[:, 1:4, 0], mask[:, 6:, 1] = (
        1,
        1,
    )  # four positions and the first image, two without, three and the second
    row, place = torch.tensor([tokens(9)]), positions(4, 2, 3)
    with torch.no_grad():
        got = model(row, pixels, position_ids=place, cross_attention_mask=mask).logits
        first = model(row[:, :4], pixels[:1], cross_attention_mask=mask[:, :4, :1]).logits
        alone = [first, model(row[:, 4:6]).logits, model(row[:, 6:], pixels[1:]).logits]
    close(got, torch.cat(alone, 1))
    for missing in ({}, {"cross_attention_mask": mask[:, :6]}):
        with pytest.raises(ValueError, match="cross_attention_mask"):
            model(row, pixels, position_ids=place, **missing)


@pytest.mark.parametrize("reference", ["hf", "meta"])
def test_llama_vision(reference):
    """As transformers, and the way it was trained each sequence is as alone."""
    ours, theirs = pairs.make("mllama")
    ours.reference = reference
    image = TILED_IMAGE
    rows = [([image, *tokens(4)], [1]), (tokens(3, 4), []), ([5, image, *tokens(3, 6)], [3])]
    lengths = [len(row) for row, _ in rows]
    batch = batches.tiled(ours, ([token for row, _ in rows for token in row], [1, 3]))
    mask = batch["cross_attention_mask"]
    for length, start in zip(
        lengths, (0, lengths[0], sum(lengths[:2])), strict=True
    ):  # the processor's goes on to the row's end
        own = (batch["input_ids"][0, start : start + length] == image).cumsum(0) > 0
        mask[0, start : start + length][~own] = 0
    del batch["attention_mask"]
    batch |= {
        "position_ids": positions(*lengths),
        "labels": batch["input_ids"].masked_fill(batch["input_ids"] == image, -100),
    }
    if reference == "hf":
        (loss, mine), (expected, stock) = (
            trained(model, batch | {"use_cache": False}) for model in (ours, theirs)
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        stock = pairs.renamed(stock)
        for name, gradient in mine.items():
            close(gradient, stock[name], tolerance=2e-4, floor=1e-2)
        return
    alone, tiles = [], 0
    with torch.no_grad():
        for (row, ratios), start in zip(rows, (0, lengths[0], sum(lengths[:2])), strict=True):
            one = batches.tiled(ours, (row, ratios))
            if ratios:
                one["pixel_values"] = batch["pixel_values"][:, tiles : tiles + 1]
                one["cross_attention_mask"] = mask[:, start : start + len(row), tiles : tiles + 1]
                tiles += 1
            alone.append(ours(**one).logits)
        close(ours(**batch).logits, torch.cat(alone, 1))


FLATTENED = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)


def flattened() -> dict[str, torch.Tensor | int]:
    return FLATTENED([{"input_ids": tokens(length, length)} for length in LENGTHS])


def test_positions_in_bytes():
    """Their differences wrap around; of 256 and more the next sequence would look like the present
    one going on.
    """
    model = pair("llama").ours
    row, place = torch.tensor([tokens(260)]), positions(256, 4)
    with torch.no_grad():
        for part in (slice(254, None), slice(None)):
            expected = model(row[:, part], position_ids=place[:, part]).logits
            close(model(row[:, part], position_ids=place[:, part].to(torch.uint8)).logits, expected)


def test_what_describes_packed_rows_takes_the_place_of_positions():
    model, batch = pair("llama").ours, flattened()
    lengths = {
        name: batch[name]
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    }
    row = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        expected = model(**row, position_ids=batch["position_ids"]).logits
        for described in (
            batch,
            lengths,
            {"cu_seq_lens_q": batch["cu_seq_lens_q"].long()},
            {"seq_idx": batch["seq_idx"]},
        ):
            close(model(**row | described).logits, expected)
        two = {
            "input_ids": row["input_ids"].view(2, 11),
            "cu_seq_lens_q": torch.tensor([0, 7, 11, 12, 13, 22]),
        }
        close(
            model(**two).logits,
            model(
                two["input_ids"], position_ids=torch.cat([positions(7, 4), positions(1, 1, 9)])
            ).logits,
        )
        one = {
            "cu_seq_lens_q": torch.tensor([0, 22]),
            "seq_idx": torch.zeros(1, 22, dtype=torch.int),
        }
        close(model(**row, **one).logits, model(**row).logits)


@pytest.mark.parametrize(
    ("error", "named", "change"),
    [
        (
            ValueError,
            "cu_seq_lens_q",
            {"cu_seq_lens_q": torch.tensor([0, 7, 13, 22], dtype=torch.int32)},
        ),  # other than position_ids
        (
            ValueError,
            "cu_seq_lens_k",
            {"cu_seq_lens_k": torch.tensor([0, 7, 12, 22], dtype=torch.int32)},
        ),  # than cu_seq_lens_q
        (ValueError, "seq_idx", {"seq_idx": torch.zeros(1, 22, dtype=torch.int32)}),
        (
            ValueError,
            "cu_seq_lens_q",
            {"cu_seq_lens_q": torch.tensor([0, 7, 12, 13, 21], dtype=torch.int32)},
        ),
        (
            ValueError,
            "cu_seq_lens_q",
            {"cu_seq_lens_q": torch.tensor([0, 12, 7, 13, 22], dtype=torch.int32)},
        ),
        (ValueError, "cu_seq_lens_q", {"cu_seq_lens_q": torch.zeros(2, 2, dtype=torch.int32)}),
        (TypeError, "cu_seq_lens_q", {"cu_seq_lens_q": [0, 22]}),
        (TypeError, "seq_idx", {"seq_idx": torch.zeros(1, 22)}),
        (ValueError, "seq_idx", {"seq_idx": torch.zeros(1, 21, dtype=torch.int32)}),
        (ValueError, "max_length_q", {"max_length_q": 8}),
        (TypeError, "max_length_k", {"max_length_k": 9.0}),
        (ValueError, "position_ids", {"position_ids": positions(11, 11)}),
        (ValueError, "position_ids", {"position_ids": positions(7, 5, 1, 9).expand(2, -1)}),
        (ValueError, "attention_mask", {"attention_mask": torch.ones(1, 22)}),
        (ValueError, "cache", {"cache": DynamicCache()}),
        (ValueError, "use_cache", {"use_cache": True}),
        (
            ValueError,
            "cu_seq_lens_q",
            {
                "input_ids": torch.ones(2, 11, dtype=torch.long),
                "position_ids": None,
                "seq_idx": None,
            },
        ),
    ],
)
def test_contradictions_are_refused(error, named, change):
    with pytest.raises(error, match=named):
        pair("llama").ours(**flattened() | change)


def test_a_length_alone_is_refused():
    with pytest.raises(ValueError, match="max_length_k"):
        pair("llama").ours(torch.tensor([tokens(4)]), max_length_k=4)
    model, (whole, _) = pair("paligemma").ours, with_images(pair("paligemma"))
    with pytest.raises(ValueError, match="prefix_length"):
        model(**whole | {"token_type_ids": None, "prefix_length": torch.tensor([4])})


def test_with_a_cache_or_a_mask_positions_are_positions_alone():
    """As in transformers. By default there is no cache of packed rows."""
    both, batch = pair("llama"), packed()
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        assert both.ours(**batch).cache is None
        assert both.ours(**batch | {"position_ids": torch.arange(length)[None]}).cache is not None
        for more in (
            {"use_cache": True},
            {"attention_mask": torch.ones(1, length)},
            {"past_key_values": DynamicCache()},
        ):
            expected = both.theirs(**batch, **more).logits
            close(
                both.ours(
                    **batch,
                    **more
                    | ({"past_key_values": DynamicCache()} if "past_key_values" in more else {}),
                ).logits,
                expected,
            )
        assert (expected - both.ours(**batch).logits).abs().max() > 0.1
        gap = batch | {
            "position_ids": torch.arange(length)[None] + 6 * (torch.arange(length) > 9)
        }  # by default not taken for packed
        for more in ({}, {"use_cache": False}):
            close(both.ours(**gap, **more).logits, both.theirs(**gap, **more).logits)


@pytest.mark.parametrize("case", ["llama", "paligemma"])
def test_it_compiles_in_one_graph(case):
    """The same graph serves rows of one sequence and of several: values are not read, so by default
    there is no cache of either.
    """
    model, (whole, _) = make(case).ours, with_images(pair(case))
    length = whole["input_ids"].shape[1]
    calls = [
        whole,
        whole | {"position_ids": torch.arange(length)[None]},
        whole | {"position_ids": whole["position_ids"] + 1},
    ]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in calls if case == "llama" else calls[:1]:
            got = compiled(**batch)
            torch.testing.assert_close(got.loss, model(**batch).loss)
            assert got.cache is None
    torch._dynamo.reset()


def test_what_describes_packed_rows_compiles():
    model, batch = pair("llama").ours, flattened()
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(
            **batch | {"position_ids": None}
        )
        torch.testing.assert_close(got.loss, model(**batch).loss)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_activations(reentrant):
    model, batch = make("llama").ours, packed()
    loss, expected = trained(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, gradients = trained(model, batch)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("kind", ["lora", "peft"])
def test_adapters(kind):
    model, (whole, alone) = make("llava, clip, -2").ours, with_images(pair("llava, clip, -2"))
    if kind == "lora":
        lora.convert_linears_to_lora(model, rank=2, target_module_names=["q_proj", "down_proj"])
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False),
        )
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    loss, _ = trained(model, whole)
    counts = [int((batch["labels"] != -100).sum()) for batch in alone]
    with torch.no_grad():
        torch.testing.assert_close(
            loss, sums([model(**batch).loss for batch in alone], counts), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("case", ["llama", "gemma"])
def test_transformers_trainer(case, tmp_path):
    """Ten steps with the collator that packs: the losses of stock transformers."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(2, 14, (40,), generator=generator).tolist()
    data = [{"input_ids": tokens(size, seed)} for seed, size in enumerate(sizes)]

    def losses(model) -> list[float]:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=10,
            per_device_train_batch_size=4,
            learning_rate=0.001,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=FLATTENED)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    ours, theirs = (losses(model) for model in make(case))
    assert len(ours) == 10 and ours[-1] < ours[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
