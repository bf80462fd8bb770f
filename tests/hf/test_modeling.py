"""The model against stock transformers' LLaVA with the same weights, its loss and gradients, and
what it refuses.
"""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

import tiny
from mllama import MllamaConfig, MllamaForConditionalGeneration
from tiny import models, pairs

IMAGE = [tiny.IMAGE] * tiny.PATCHES
ROWS = {
    "one image": ([IMAGE + tiny.tokens(6)], 1),
    "several images in a row": (
        [tiny.tokens(2) + IMAGE + tiny.tokens(3) + IMAGE + IMAGE + tiny.tokens(2, 5)],
        3,
    ),
    "a row without an image": (
        [
            IMAGE + tiny.tokens(6),
            tiny.tokens(4, 7),
            tiny.tokens(3) + IMAGE + IMAGE + tiny.tokens(2),
        ],
        3,
    ),
    "no image": ([tiny.tokens(6), tiny.tokens(3, 4)], 0),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ROWS)
def test_logits_equal_the_twins(case, side, tied):
    rows, images = ROWS[case]
    ours = tiny.model(text={"tie_word_embeddings": tied})
    inputs = tiny.batch(*rows, side=side)
    if images:
        inputs["pixel_values"] = tiny.images(images)
    with torch.no_grad():
        seen = inputs["attention_mask"].bool()
        tiny.close(ours(**inputs).logits[seen], tiny.twin(ours)(**inputs).logits[seen])


@pytest.mark.parametrize(
    "text",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 24},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_scaling": tiny.LLAMA3, "rope_theta": 100.0},
    ],
    ids=[
        "as many key heads",
        "one key head, biases",
        "head size of its own",
        "linear rope",
        "llama3 rope",
    ],
)
def test_other_decoders_equal_the_twins(text):
    ours = tiny.model(text=text)
    inputs = tiny.batch(IMAGE + tiny.tokens(24)) | {"pixel_values": tiny.images(1)}
    with torch.no_grad():
        tiny.close(ours(**inputs).logits, tiny.twin(ours)(**inputs).logits)


def test_an_image_size_that_is_no_multiple_of_the_patch_equals_the_twins():
    ours = tiny.model(vision={"image_size": 21})
    inputs = tiny.batch(IMAGE + tiny.tokens(3)) | {"pixel_values": torch.randn(1, 3, 21, 21)}
    with torch.no_grad():
        tiny.close(ours(**inputs).logits, tiny.twin(ours)(**inputs).logits)


def test_hidden_states_and_attentions_equal_the_twins():
    ours = tiny.model()
    theirs = tiny.twin(ours)
    theirs.set_attn_implementation("eager")
    inputs = tiny.batch(IMAGE + tiny.tokens(5)) | {"pixel_values": tiny.images(1)}
    with torch.no_grad():
        got = ours(**inputs, output_hidden_states=True, output_attentions=True)
        expected = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for state, reference in zip(got.hidden_states, expected.hidden_states, strict=True):
        tiny.close(state, reference)
    for weights, reference in zip(got.attentions, expected.attentions, strict=True):
        tiny.close(weights, reference)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 9))
    tiny.close(
        got.image_hidden_states,
        torch.stack(list(expected.image_hidden_states)).view(1, tiny.PATCHES, -1),
    )
    assert [tuple(weights.shape) for weights in got.image_attentions] == [(1, 2, 4, 4)] * 2
    torch.testing.assert_close(got.image_attentions[0].sum(-1), torch.ones(1, 2, 4))


def test_every_gradient_equals_the_twins():
    ours = tiny.model()
    theirs = tiny.twin(ours)
    inputs = tiny.batch(*ROWS["a row without an image"][0], side="right") | {
        "pixel_values": tiny.images(3)
    }
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == tiny.IMAGE) | (inputs["attention_mask"] == 0), -100
    )
    loss, reference = ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "post_layernorm" in name:
            assert parameter.grad is None
        else:
            tiny.close(
                parameter.grad, expected[models.twin_name(name)].grad, floor=1e-3
            )  # a key's bias has none but rounding


def test_vision_feature_last_is_taken_after_the_encoders_norm():
    model = tiny.model(vision_feature="last")
    pixels = tiny.images(2)
    with torch.no_grad():
        encoded = model.vision_tower(pixels, output_hidden_states=True)
        torch.testing.assert_close(
            encoded.last_hidden_state, model.vision_tower.post_layernorm(encoded.hidden_states[-1])
        )
        torch.testing.assert_close(
            model.get_image_features(pixels), model.multi_modal_projector(encoded.last_hidden_state)
        )


def test_another_image_changes_the_logits():
    model = tiny.model()
    inputs = tiny.batch(IMAGE + tiny.tokens(3))
    with torch.no_grad():
        one, other = (
            model(**inputs, pixel_values=tiny.images(1, seed)).logits[:, -1] for seed in (1, 2)
        )
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("token", [tiny.IMAGE, 5000], ids=["in the vocabulary", "beyond it"])
def test_the_placeholder_is_told_from_its_runs(token):
    told, given = tiny.model(image_token_index=None), tiny.model()
    rows = ROWS["a row without an image"][0]
    inputs = tiny.batch(*rows) | {"pixel_values": tiny.images(3)}
    with torch.no_grad():
        expected = given(**inputs).logits
        inputs["input_ids"] = inputs["input_ids"].masked_fill(
            inputs["input_ids"] == tiny.IMAGE, token
        )
        assert torch.equal(told(**inputs).logits, expected)


def test_features_computed_before_are_taken():
    model = tiny.model()
    inputs = tiny.batch(IMAGE + tiny.tokens(3), IMAGE + tiny.tokens(5))
    pixels = tiny.images(2)
    with torch.no_grad():
        features = model.get_image_features(pixels)
        assert torch.equal(
            model(**inputs, image_features=features).logits,
            model(**inputs, pixel_values=pixels).logits,
        )


def test_batched_equals_single():
    model = tiny.model()
    rows, pixels = ROWS["a row without an image"][0], tiny.images(3)
    with torch.no_grad():
        for side in ("left", "right"):
            batched = model(**tiny.batch(*rows, side=side), pixel_values=pixels).logits
            for index, (row, images) in enumerate(
                zip(rows, (pixels[:1], None, pixels[1:]), strict=True)
            ):
                place = slice(-len(row), None) if side == "left" else slice(0, len(row))
                single = model(**tiny.batch(row), pixel_values=images).logits[0]
                torch.testing.assert_close(batched[index, place], single, rtol=1e-4, atol=1e-4)


def test_cached_equals_uncached_token_by_token():
    model = tiny.model()
    row = IMAGE + tiny.tokens(7)
    inputs = tiny.batch(row, row[:-3])
    pixels = tiny.images(2)
    with torch.no_grad():
        whole = model(**inputs, pixel_values=pixels).logits
        cache = DynamicCache(config=model.config)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        length = 8
        part = model(
            ids[:, :length], pixels, mask[:, :length].float(), past_key_values=cache
        ).logits
        seen = mask.bool()
        torch.testing.assert_close(
            part[seen[:, :length]], whole[:, :length][seen[:, :length]], rtol=1e-4, atol=1e-4
        )
        for step in range(
            length, ids.shape[1]
        ):  # pixel values given again are ignored; a float mask grows by ones
            output = model(
                ids[:, step : step + 1], pixels, mask[:, : step + 1].float(), past_key_values=cache
            )
            assert output.image_hidden_states is None
            torch.testing.assert_close(output.logits[:, 0], whole[:, step], rtol=1e-4, atol=1e-4)


def test_a_filled_cache_takes_a_new_image():
    model = tiny.model()
    first, second = IMAGE + tiny.tokens(4), tiny.tokens(2, 5) + IMAGE + tiny.tokens(3, 6)
    pixels = tiny.images(2)
    with torch.no_grad():
        whole = model(**tiny.batch(first + second), pixel_values=pixels).logits
        cache = model(**tiny.batch(first), pixel_values=pixels[:1], use_cache=True).past_key_values
        part = model(torch.tensor([second]), pixels[1:], past_key_values=cache).logits
    torch.testing.assert_close(part, whole[:, len(first) :], rtol=1e-4, atol=1e-4)


def test_inputs_embeds_equal_input_ids():
    model = tiny.model()
    inputs = tiny.batch(tiny.tokens(5), tiny.tokens(3))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        got = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        assert torch.equal(got, model(**inputs).logits)


def test_logits_to_keep():
    model = tiny.model()
    inputs = tiny.batch(tiny.tokens(5))
    with torch.no_grad():
        whole = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
        torch.testing.assert_close(
            model(**inputs, logits_to_keep=torch.tensor([1, 3])).logits, whole[:, [1, 3]]
        )


def test_outputs_are_read_by_name_key_and_place():
    model = tiny.model()
    inputs = tiny.batch(tiny.tokens(5))
    with torch.no_grad():
        output = model(**inputs, labels=inputs["input_ids"])
        assert output["loss"] is output.loss and output["logits"] is output.logits
        assert output[0] is output.loss
        assert isinstance(model(**inputs, return_dict=False), tuple)
        assert output.past_key_values.get_seq_length() == 5
        assert "past_key_values" not in model(**inputs, use_cache=False)
        model.train()
        assert "past_key_values" not in model(**inputs)


def test_image_and_padding_positions_are_never_trained():
    model = tiny.model()
    rows = [IMAGE + tiny.tokens(6), tiny.tokens(2) + IMAGE + tiny.tokens(2)]
    inputs = tiny.batch(*rows) | {"pixel_values": tiny.images(2)}
    with torch.no_grad():
        output = model(**inputs, labels=inputs["input_ids"])
    scores, targets = output.logits[:, :-1], inputs["input_ids"][:, 1:]
    mask = inputs["attention_mask"].bool()
    trained = (targets != tiny.IMAGE) & mask[:, 1:] & mask[:, :-1]
    torch.testing.assert_close(output.loss, cross_entropy(scores[trained], targets[trained]))


def test_a_rows_loss_does_not_depend_on_its_padding():
    model = tiny.model()
    row, longer = tiny.tokens(4), tiny.tokens(9, 3)
    with torch.no_grad():
        ids = torch.tensor([row])
        single = model(ids, labels=ids).loss
        for side in ("left", "right"):
            inputs = tiny.batch(row, longer, side=side)
            labels = inputs["input_ids"].clone()
            labels[1] = -100
            torch.testing.assert_close(model(**inputs, labels=labels).loss, single)


def test_ignore_index_and_the_number_of_items():
    model = tiny.model(ignore_index=-7)
    ids = torch.tensor([tiny.tokens(6)])
    labels = ids.clone()
    labels[0, :3] = -7
    with torch.no_grad():
        scores = model(ids).logits[0, 2:-1]
        expected = cross_entropy(scores, ids[0, 3:])
        torch.testing.assert_close(model(ids, labels=labels).loss, expected)
        for items in (6, torch.tensor(6)):
            torch.testing.assert_close(
                model(ids, labels=labels, num_items_in_batch=items).loss, expected * 3 / 6
            )
        with pytest.raises(ValueError, match="labels"):
            model(ids, labels=torch.full_like(ids, -7))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_stay_near(kind):
    model = tiny.model()
    inputs = tiny.batch(IMAGE + tiny.tokens(5), IMAGE + tiny.tokens(3)) | {
        "pixel_values": tiny.images(2)
    }
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        output = model.to(kind)(**inputs, labels=inputs["input_ids"])
    assert output.logits.dtype == kind and output.loss.dtype == torch.float32
    assert (output.logits.float() - expected)[seen].abs().max() < 0.05 * expected.abs().max()
    assert model.language_model.rotary[0].frequencies.dtype == torch.float32


def test_training_under_autocast():
    model = tiny.model().train()
    inputs = tiny.batch(IMAGE + tiny.tokens(5)) | {"pixel_values": tiny.images(1)}
    exact = model(**inputs, labels=inputs["input_ids"]).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for n, p in model.named_parameters()
        if "post_layernorm" not in n
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_activations_changes_no_gradient(reentrant):
    model = tiny.model(vision_feature="last").train()
    inputs = tiny.batch(IMAGE + tiny.tokens(5)) | {"pixel_values": tiny.images(1)}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    pixels = inputs["pixel_values"].requires_grad_(
        reentrant
    )  # the reentrant kind needs an input that asks for a gradient
    model(**inputs | {"pixel_values": pixels}, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resizing_the_vocabulary(tied):
    model = tiny.model(text={"tie_word_embeddings": tied})
    ids = torch.tensor([tiny.tokens(4)])
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(tiny.VOCAB_SIZE + 10)
        after = model(ids).logits
    assert model.config.vocab_size == after.shape[-1] == tiny.VOCAB_SIZE + 10
    torch.testing.assert_close(after[..., : tiny.VOCAB_SIZE], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    with torch.no_grad():
        assert (
            model.resize_token_embeddings(50).weight.shape[0] == model.lm_head.weight.shape[0] == 50
        )


def test_embeddings_can_be_replaced():
    model = tiny.model(text={"tie_word_embeddings": True})
    fresh = torch.nn.Embedding(tiny.VOCAB_SIZE, 64)
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh
    model.tie_weights()
    assert model.get_output_embeddings().weight is fresh.weight


def test_fresh_weights():
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(tiny.config())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.015 < parameter.std() < 0.025, name


def test_a_model_on_the_meta_device_knows_its_rotary_frequencies():
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(tiny.config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.load_state_dict(tiny.model().state_dict(), assign=True)
    ids = torch.tensor([tiny.tokens(4)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny.model()(ids).logits)


ONE_LAYER = {"text": {"num_hidden_layers": 1}, "vision": {"num_hidden_layers": 1}}


def test_the_decoder_compiles_in_one_graph():
    model = tiny.model(**ONE_LAYER)
    decoder = torch.compile(model.language_model, fullgraph=True, backend="aot_eager")
    inputs = tiny.batch(tiny.tokens(6), tiny.tokens(4))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    got = decoder(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    expected = model.language_model(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), embeds),
        torch.autograd.grad(expected.sum(), embeds),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_whole_model_compiles_in_one_graph():
    model = tiny.model(**ONE_LAYER)
    inputs = tiny.batch(IMAGE + tiny.tokens(6)) | {"pixel_values": tiny.images(1)}
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(
            **inputs, labels=inputs["input_ids"], use_cache=False
        )
        expected = model(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)


def test_windows_compile_in_one_graph_onto_a_static_cache():
    model = pairs.pair("gemma2").ours
    ids = torch.tensor([tiny.tokens(9)])
    cache = StaticCache(config=model.config, max_cache_len=16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(ids[:, :8], past_key_values=cache)
        got = compiled(ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)


def test_a_deep_copy_is_a_model_of_its_own():
    model = tiny.model()
    copied = copy.deepcopy(model)
    ids = torch.tensor([tiny.tokens(4)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, copied(ids).logits)
        copied.lm_head.weight.zero_()
        assert model(ids).logits.any()


def test_lora_by_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    )
    inputs = tiny.batch(IMAGE + tiny.tokens(4)) | {"pixel_values": tiny.images(1)}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 4 and all(parameter.grad is not None for parameter in trained)


def test_transformers_trainer_trains_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    inputs = tiny.batch(IMAGE + tiny.tokens(4))
    example = {name: value[0] for name, value in inputs.items()} | {
        "labels": inputs["input_ids"][0],
        "pixel_values": tiny.images(1),
    }

    def collate(examples):
        stacked = {
            name: torch.stack([e[name] for e in examples]) for name in inputs | {"labels": None}
        }
        return stacked | {"pixel_values": torch.cat([e["pixel_values"] for e in examples])}

    def trainer(steps, **options):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        return Trainer(
            tiny.model(),
            arguments,
            train_dataset=[example] * 4,
            eval_dataset=[example] * 2,
            data_collator=collate,
        )

    whole = trainer(4)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), two in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, msg=name)


IDS = torch.tensor([IMAGE + [1, 2, 3]])


@pytest.mark.parametrize(
    ("error", "named", "inputs"),
    [
        (ValueError, "exactly one of input_ids and inputs_embeds", {}),
        (
            ValueError,
            "exactly one of input_ids and inputs_embeds",
            {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 7, 64)},
        ),
        (TypeError, "input_ids", {"input_ids": IDS.float()}),
        (TypeError, "input_ids", {"input_ids": [[1, 2]]}),
        (ValueError, "input_ids", {"input_ids": IDS[0]}),
        (ValueError, "input_ids", {"input_ids": IDS[:, :0]}),
        (IndexError, "vocabulary", {"input_ids": torch.tensor([[1, 99]])}),
        (IndexError, "vocabulary", {"input_ids": torch.tensor([[1, -1]])}),
        (ValueError, "inputs_embeds", {"inputs_embeds": torch.zeros(1, 7, 63)}),
        (
            ValueError,
            "4 image placeholders, but 2 images give 8 features",
            {"input_ids": IDS, "pixel_values": tiny.images(2)},
        ),
        (ValueError, "4 image placeholders, but 0 images give 0 features", {"input_ids": IDS}),
        (
            ValueError,
            "0 image placeholders, but 1 images give 4",
            {"input_ids": IDS[:, 4:], "pixel_values": tiny.images(1)},
        ),
        (
            ValueError,
            "1 image placeholders.*processor",
            {"input_ids": IDS[:, 3:], "pixel_values": tiny.images(1)},
        ),
        (
            ValueError,
            "pixel_values must be",
            {"input_ids": IDS, "pixel_values": torch.zeros(1, 3, 16, 8)},
        ),
        (
            ValueError,
            "pixel_values must be",
            {"input_ids": IDS, "pixel_values": torch.zeros(3, 16, 16)},
        ),
        (
            TypeError,
            "pixel_values",
            {"input_ids": IDS, "pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)},
        ),
        (TypeError, "pixel_values", {"input_ids": IDS, "pixel_values": "cat.png"}),
        (
            ValueError,
            "not both",
            {
                "input_ids": IDS,
                "pixel_values": tiny.images(1),
                "image_features": torch.zeros(1, 4, 64),
            },
        ),
        (
            ValueError,
            "image_features must be",
            {"input_ids": IDS, "image_features": torch.zeros(1, 4, 63)},
        ),
        (
            ValueError,
            "1 images give 3 features",
            {"input_ids": IDS, "image_features": torch.zeros(1, 3, 64)},
        ),
        (
            ValueError,
            "0 image placeholders",
            {"inputs_embeds": torch.zeros(1, 7, 64), "pixel_values": tiny.images(1)},
        ),
        (
            ValueError,
            "attention_mask",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 3, 3)},
        ),
        (
            TypeError,
            "attention_mask of 4",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 1, 3, 3).long()},
        ),
        (
            TypeError,
            "attention_mask of 4",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 1, 3, 3).double()},
        ),
        (
            ValueError,
            "attention_mask of 4",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 1, 3, 4)},
        ),
        (
            ValueError,
            "attention_mask of 4",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 2, 3, 3)},
        ),
        (
            ValueError,
            "attention_mask of 4",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 1, 2, 3)},
        ),
        (
            ValueError,
            "attention_mask of 4",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(2, 1, 3, 3)},
        ),
        (
            ValueError,
            "0 cached and 3 new tokens, got 4",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 4)},
        ),
        (
            ValueError,
            "attention_mask",
            {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(2, 3)},
        ),
        (TypeError, "attention_mask", {"input_ids": IDS[:, 4:], "attention_mask": [[1, 1, 1]]}),
        (
            ValueError,
            "position_ids",
            {"input_ids": IDS[:, 4:], "position_ids": torch.zeros(1, 2, dtype=torch.long)},
        ),
        (TypeError, "position_ids", {"input_ids": IDS[:, 4:], "position_ids": [[0, 1, 2]]}),
        (TypeError, "inputs_embeds", {"inputs_embeds": torch.zeros(1, 7, 64, dtype=torch.long)}),
        (ValueError, "at least one token", {"inputs_embeds": torch.zeros(1, 0, 64)}),
        (TypeError, "labels", {"input_ids": IDS[:, 4:], "labels": IDS[:, 4:] > 0}),
        (TypeError, "cache", {"input_ids": IDS[:, 4:], "past_key_values": ()}),
        (ValueError, "labels", {"input_ids": IDS[:, 4:], "labels": IDS}),
        (TypeError, "labels", {"input_ids": IDS[:, 4:], "labels": IDS[:, 4:].float()}),
        (ValueError, "labels", {"input_ids": IDS[:, 4:], "labels": torch.tensor([[1, 99, 1]])}),
        (ValueError, "labels", {"input_ids": IDS[:, 4:], "labels": torch.tensor([[1, -1, 1]])}),
        (
            ValueError,
            "logits_to_keep",
            {"input_ids": IDS[:, 4:], "labels": IDS[:, 4:], "logits_to_keep": 1},
        ),
    ],
)
def test_bad_inputs_are_refused(error, named, inputs):
    with pytest.raises(error, match=named):
        tiny.model()(**inputs)


def test_a_mask_too_short_to_find_placeholders_by_is_refused():
    with pytest.raises(ValueError, match="attention_mask"):
        tiny.model(image_token_index=None)(IDS, tiny.images(1), torch.ones(1, 3))


def test_an_image_that_spills_into_the_next_row_is_refused():
    ids = torch.tensor([IMAGE + [tiny.IMAGE], IMAGE[1:] + [1, 2]])
    with pytest.raises(ValueError, match=r"\[5, 3\]"):
        tiny.model()(ids, tiny.images(2))


def test_a_lone_unexpanded_placeholder_is_refused_when_its_id_is_not_known():
    ids = torch.tensor([[90, *tiny.tokens(5)]])
    with pytest.raises(ValueError, match="placeholders"):
        tiny.model(image_token_index=None)(ids, tiny.images(1))


def test_a_placeholder_that_two_ids_could_be_is_refused():
    ids = torch.tensor([[90] * 4 + [91] * 4 + [1]])
    with pytest.raises(ValueError, match="set config.image_token_index"):
        tiny.model(image_token_index=None)(ids, tiny.images(1))


def test_a_config_of_another_family_is_refused():
    with pytest.raises(TypeError):
        MllamaForConditionalGeneration({"text_config": {}})
    assert MllamaForConditionalGeneration.config_class is MllamaConfig


def test_empty_batches_and_no_images():
    model = tiny.model()
    assert model(input_ids=IDS[:0]).logits.shape == (0, 7, model.config.text_config.vocab_size)
    none, text = tiny.images(1)[:0], IDS[:, 4:]
    torch.testing.assert_close(
        model(input_ids=text, pixel_values=none).logits, model(input_ids=text).logits
    )
