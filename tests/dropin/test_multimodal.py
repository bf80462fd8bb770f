"""`MllamaForConditionalGeneration` of older scripts: its calls, its cache, its placeholders, and
equality with the package's model.
"""

import copy
import inspect
import warnings

import pytest
import torch

import twins
from dropin import older
from mllama import MllamaConfig
from mllama import MllamaForConditionalGeneration as PackageModel
from mllama.dropin import _placeholders
from mllama.dropin._cache import KVCache
from mllama.dropin._multimodal import MllamaForConditionalGeneration, MultiModalProjector

TEXT = twins.tokens(6)
EXACT = {"rtol": 0, "atol": 0}


def own(model: MllamaForConditionalGeneration) -> PackageModel:
    """The package's model of the same weights."""
    same = PackageModel(MllamaConfig(**model.config.to_dict())).eval()
    same.load_state_dict(model.state_dict())
    return same


def test_the_order_of_arguments():
    names = list(inspect.signature(MllamaForConditionalGeneration.forward).parameters)
    assert names[1:9] == [
        "input_ids",
        "pixel_values",
        "attention_mask",
        "labels",
        "kv_cache",
        "position_ids",
        "image_mask",
        "inputs_embeds",
    ]
    assert set(inspect.signature(PackageModel.forward).parameters) <= set(names)


def test_it_computes_what_the_package_computes():
    model, ids, pictures = older.model(), older.prompt(*TEXT), twins.pictures(1)
    same, labels = own(model), ids.masked_fill(ids == older.IMAGE, -100)
    assert isinstance(model, PackageModel) and model.state_dict().keys() == same.state_dict().keys()
    output, expected = model(ids, pictures, None, labels), same(ids, pictures, labels=labels)
    assert (
        output["logits"].shape == (1, 10, twins.VOCABULARY)
        and output["logits"].dtype == torch.float32
    )
    torch.testing.assert_close(output["logits"], expected.logits, **EXACT)
    torch.testing.assert_close(output["loss"], expected.loss, **EXACT)
    assert output.logits is output["logits"] and output.loss is output["loss"]
    output["loss"].backward()
    expected.loss.backward()
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, **EXACT)


def test_what_is_not_there_reads_as_none():
    output = older.model()(torch.tensor([TEXT]), use_cache=False)
    assert output["loss"] is None and output["kv_cache"] is None and output.kv_cache is None
    with pytest.raises(KeyError):
        output["nothing"]
    assert output[0] is output.logits and output[:1] == (output.logits,)
    assert (
        "kv_cache" not in output and output.get("kv_cache", 3) == 3 and output.get("loss") is None
    )
    cache = KVCache()
    output = older.model()(torch.tensor([TEXT]), kv_cache=cache)
    assert (
        "kv_cache" in output
        and output.get("kv_cache") is cache
        and output.get("logits") is output.logits
    )


@pytest.mark.parametrize("image_token_index", [None, 97], ids=["by its runs", "said"])
def test_another_picture_changes_the_logits(image_token_index):
    model = older.model(image_token_index=image_token_index)
    for image in (97,) if image_token_index else (older.IMAGE, twins.VOCABULARY, 97):
        ids = older.prompt(*TEXT, image=image)
        first, second = (model(ids, twins.pictures(1, seed))["logits"] for seed in (1, 2))
        assert (first - second).abs().max() > 0.1


def test_two_prompts_of_two_lengths_padded_on_either_side():
    model, pictures = older.model(), twins.pictures(2)
    rows = [older.prompt(*TEXT)[0].tolist(), older.prompt(*TEXT[:2])[0].tolist()]
    for side in ("left", "right"):
        batch = twins.batch(*rows, side=side)
        logits = model(**batch, pixel_values=pictures)["logits"]
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row]), pictures[index : index + 1])["logits"][0]
            torch.testing.assert_close(logits[index][batch["attention_mask"][index] == 1], alone)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, None], ids=str)
@pytest.mark.parametrize("again", [True, False], ids=["the picture again", "no picture"])
def test_token_by_token_with_a_cache(dtype, again):
    model, ids, pictures, cache = older.model(), older.prompt(*TEXT), twins.pictures(1), KVCache()
    mask = None if dtype is None else torch.ones(1, ids.shape[1], dtype=dtype)
    output = model(input_ids=ids, pixel_values=pictures, attention_mask=mask, kv_cache=cache)
    assert output["kv_cache"] is cache and cache.num_items() == ids.shape[1]
    for _ in range(6):
        token = output["logits"][:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        mask = None if mask is None else torch.cat([mask, torch.ones(1, 1, dtype=dtype)], 1)
        output = model(
            input_ids=token,
            pixel_values=pictures if again else None,
            attention_mask=mask,
            kv_cache=cache,
        )
        whole = model(ids, pictures, mask)["logits"]
        torch.testing.assert_close(output["logits"][:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)
    assert cache.num_items() == ids.shape[1]
    generated = model.generate(
        older.prompt(*TEXT),
        pixel_values=pictures,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(generated, ids)


def test_two_names_of_one_cache_are_refused():
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match=f"kv_cache and {name} are two names"):
            older.model()(torch.tensor([TEXT]), kv_cache=KVCache(), **{name: KVCache()})


def test_embeddings_in_place_of_ids_and_positions():
    model, ids = older.model(), torch.tensor([TEXT])
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds)["logits"], model(ids)["logits"], **EXACT)
    positions = torch.arange(len(TEXT))[None]
    torch.testing.assert_close(
        model(ids, position_ids=positions, image_mask=ids > 0)["logits"],
        model(ids)["logits"],
        **EXACT,
    )


class TestPlaceholders:
    def test_a_prompt_of_random_ids_runs_and_a_warning_says_what_is_not_seen(self):
        model, ids = older.model(), torch.randint(0, 97, (1, 64))
        with pytest.warns(
            UserWarning, match="pixel_values are not looked at: .* runs of 4, as the processor"
        ):
            output = model(input_ids=ids, pixel_values=twins.pictures(1))
        torch.testing.assert_close(output["logits"], model(ids)["logits"], **EXACT)

    @pytest.mark.parametrize("image", [older.IMAGE, twins.VOCABULARY])
    @pytest.mark.parametrize("times", [1, 3, 5])
    def test_one_that_was_not_expanded_is_refused(self, image, times):
        ids = torch.tensor([[image] * times + TEXT])
        said = f"input_ids hold {image}, which no text has, .* expand each <image> with the processor, MllamaImageProcessor.tokenizer, 4"
        with pytest.raises(ValueError, match=said):
            older.model()(ids, twins.pictures(1))

    def test_so_is_one_that_a_processor_put_into_the_vocabulary(self, monkeypatch):
        monkeypatch.setattr(_placeholders, "_GIVEN", set())
        _placeholders.remember(97)
        with pytest.raises(ValueError, match="input_ids hold 97"):
            older.model()(torch.tensor([[97, *TEXT]]), twins.pictures(1))
        assert (
            older.model()(older.prompt(*TEXT, image=97), twins.pictures(1))["logits"]
            .isfinite()
            .all()
        )

    def test_an_answer_that_repeats_itself_is_no_placeholder(self):
        ids, changed = older.prompt(*TEXT, 5, 5, 5, 5), twins.pictures(1, seed=3)
        model = older.model()
        assert not torch.equal(
            model(ids, twins.pictures(1))["logits"], model(ids, changed)["logits"]
        )

    def test_what_was_said_goes_before_what_is_found(self):
        model = older.model(image_token_index=90)
        with pytest.raises(
            ValueError, match="hold 0 picture placeholders.*expand each <image> with the processor"
        ):
            model(older.prompt(*TEXT, image=91), twins.pictures(1))
        model.image_token_index = 91
        assert model.config.image_token_index == model.image_token_index == 91
        assert model(older.prompt(*TEXT, image=91), twins.pictures(1))["logits"].shape == (
            1,
            10,
            99,
        )

    def test_several_pictures_in_a_prompt(self):
        model, run = older.model(), [older.IMAGE] * twins.PATCHES
        for ids in (
            torch.tensor([run + run + TEXT]),
            torch.tensor([run + TEXT[:3] + run + TEXT[3:]]),
        ):
            pictures = twins.pictures(2)
            first, second = (
                model(ids, pixels)["logits"] for pixels in (pictures, pictures.flip(0))
            )
            assert (first - second).abs().max() > 0.1

    def test_two_pictures_for_one_placeholder_are_refused(self):
        with pytest.raises(ValueError, match="hold 4 picture placeholders, but 2 pictures"):
            older.model()(older.prompt(*TEXT), twins.pictures(2))

    def test_ids_outside_the_vocabulary_are_refused_without_a_picture(self):
        with pytest.raises(IndexError, match="within the vocabulary"):
            older.model()(older.prompt(*TEXT))


class TestHelpers:
    def test_merging(self):
        model, ids, pictures = older.model(), older.prompt(*TEXT), twins.pictures(1)
        features = model.multi_modal_projector(model.vision_model(pictures))
        embeds = model.get_input_embeddings()(ids.masked_fill(ids == older.IMAGE, 0))
        merged, mask = model._merge_input_ids_with_image_features(features, embeds, ids, None)
        torch.testing.assert_close(merged[:, :4], features, **EXACT)
        torch.testing.assert_close(merged[:, 4:], embeds[:, 4:], **EXACT)
        assert torch.equal(mask, torch.ones_like(ids)) and not torch.equal(merged, embeds)
        torch.testing.assert_close(
            model(inputs_embeds=merged, attention_mask=mask)["logits"],
            model(ids, pictures)["logits"],
        )
        given = torch.ones(1, 10)
        given[0, -1] = 0
        same = model._merge_input_ids_with_image_features(features, embeds, ids, given)[1]
        assert torch.equal(same, given) and same is not given

    @pytest.mark.parametrize("shape", [(1, 5, 64), (1, 4, 65), (2, 4, 64)])
    def test_features_of_another_shape_are_not_merged(self, shape):
        ids = older.prompt(*TEXT)
        with pytest.raises(ValueError, match="features"):
            older.model()._merge_input_ids_with_image_features(
                torch.randn(shape), torch.zeros(1, 10, 64), ids, None
            )

    def test_merging_text_alone(self):
        model, ids = older.model(), torch.tensor([TEXT])
        embeds, features = model.get_input_embeddings()(ids), torch.randn(1, 4, 64)
        with pytest.warns(UserWarning, match="not looked at"):
            merged, _ = model._merge_input_ids_with_image_features(features, embeds, ids, None)
        assert torch.equal(merged, embeds) and merged is not embeds

    @pytest.mark.parametrize("ignore_index", [-100, 3])
    def test_the_loss_with_masking(self, ignore_index):
        model, ids = older.model(ignore_index=ignore_index), older.prompt(*TEXT)
        logits, labels = torch.randn(1, 10, twins.VOCABULARY), ids.clone()
        labels[0, 5] = ignore_index
        kept = [3, 5, 6, 7, 8]  # whose next id is text and has a label
        expected = torch.nn.functional.cross_entropy(
            logits[0, kept], ids[0, [place + 1 for place in kept]]
        )
        torch.testing.assert_close(model._compute_loss_with_masking(logits, labels, ids), expected)

    def test_ignore_index_is_honoured_by_forward(self):
        model = older.model(ignore_index=3)
        ids = torch.tensor([TEXT])
        labels = ids.clone()
        labels[0, 2] = 3
        logits = model(ids)["logits"]
        kept = [0, 2, 3, 4]
        expected = torch.nn.functional.cross_entropy(
            logits[0, kept], ids[0, [place + 1 for place in kept]]
        )
        torch.testing.assert_close(model(ids, labels=labels)["loss"], expected)

    def test_parts_as_scripts_call_them(self):
        model, pictures = older.model(), twins.pictures(2)
        features = model.vision_model(pictures)
        torch.testing.assert_close(
            features, model.vision_tower(pictures).last_hidden_state, **EXACT
        )
        assert features.shape == (2, 4, 32) and model.multi_modal_projector.linear(
            features
        ).shape == (2, 4, 64)
        assert (
            model.vocab_size == 99
            and model.ignore_index == -100
            and model.image_token_index == 128256
        )
        assert (
            model.text_config is model.config.text_config
            and model.vision_config is model.config.vision_config
        )
        for parameter in model.vision_model.parameters():
            parameter.requires_grad = False
        assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())

    def test_the_projector_alone(self):
        projector = MultiModalProjector(older.config())
        assert list(inspect.signature(MultiModalProjector).parameters) == ["config"]
        assert {name: tuple(value.shape) for name, value in projector.state_dict().items()} == {
            "linear.weight": (64, 32),
            "linear.bias": (64,),
        }
        assert projector(torch.randn(2, 4, 32)).shape == (2, 4, 64)


class TestWeights:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_they_are_made_in_the_configs_dtype(self, dtype):
        model = MllamaForConditionalGeneration(older.config(text={"dtype": dtype}))
        assert {parameter.dtype for parameter in model.parameters()} == {
            dtype
        } and torch.get_default_dtype() == torch.float32
        output = model.eval()(older.prompt(*TEXT), twins.pictures(1))  # float32 pixels
        assert output["logits"].dtype == dtype and output["logits"].isfinite().all()

    def test_every_parameter_is_drawn(self):
        model = MllamaForConditionalGeneration(older.config())
        for name, parameter in model.named_parameters():
            assert not parameter.is_meta and parameter.isfinite().all()
            if name.endswith("bias"):
                assert not parameter.any()
            elif "norm" in name:
                assert bool((parameter == 1).all()), name
            else:
                assert 0 < parameter.std() < 1, name

    def test_the_same_seed_draws_the_same(self):
        first, second = (
            torch.manual_seed(3) and MllamaForConditionalGeneration(older.config())
            for _ in range(2)
        )
        assert all(
            torch.equal(value, second.state_dict()[name])
            for name, value in first.state_dict().items()
        )

    def test_on_the_meta_device_nothing_is_drawn(self):
        with torch.device("meta"):
            assert all(
                parameter.is_meta
                for parameter in MllamaForConditionalGeneration(older.config()).parameters()
            )

    def test_tie_weights_ties(self):
        model = older.model()
        assert model.lm_head.weight is not model.get_input_embeddings().weight
        model.tie_weights()
        assert (
            model.lm_head.weight is model.get_input_embeddings().weight
            and model.config.tie_word_embeddings
        )

    def test_what_transformers_calls_ties_nothing(self, tmp_path):
        model = older.model()
        model.resize_token_embeddings(120)
        assert (
            model.lm_head.weight is not model.get_input_embeddings().weight
            and model.vocab_size == 120
        )
        model.save_pretrained(tmp_path)
        read = MllamaForConditionalGeneration.from_pretrained(tmp_path)
        assert read.lm_head.weight is not read.get_input_embeddings().weight
        read.load_state_dict(model.state_dict(), assign=True)
        assert (
            torch.equal(read.lm_head.weight, model.lm_head.weight)
            and not read.config.tie_word_embeddings
        )

    def test_folders_are_the_packages(self, tmp_path):
        model, ids, pictures = older.model(), older.prompt(*TEXT), twins.pictures(1)
        model.save_pretrained(tmp_path)
        for kind in (PackageModel, MllamaForConditionalGeneration):
            torch.testing.assert_close(
                kind.from_pretrained(tmp_path)(ids, pictures)["logits"],
                model(ids, pictures)["logits"],
                **EXACT,
            )

    def test_a_folder_without_the_placeholders_id_still_warns(self, tmp_path):
        older.model().save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="not looked at"):
            MllamaForConditionalGeneration.from_pretrained(tmp_path)(
                torch.tensor([TEXT]), twins.pictures(1)
            )

    def test_half_and_gradient_checkpointing(self):
        model, ids = older.model(), older.prompt(*TEXT)
        labels = ids.masked_fill(ids == older.IMAGE, -100)
        plain = copy.deepcopy(model).train()
        plain(ids, twins.pictures(1), labels=labels)["loss"].backward()
        model.gradient_checkpointing_enable()
        model.train()(ids, twins.pictures(1), labels=labels)["loss"].backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
        assert model.half().eval()(ids, twins.pictures(1))["logits"].dtype == torch.float16


def test_generate_as_readmes_call_it():
    model, ids = older.model(), older.prompt(*TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in ({"temperature": 0.7}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 2}):
            generated = model.generate(
                input_ids=ids,
                pixel_values=twins.pictures(1),
                attention_mask=torch.ones_like(ids),
                max_new_tokens=5,
                **options,
            )
            assert generated.shape[1] <= 15 and torch.equal(generated[:, :10], ids)


def test_generate_with_a_kv_cache():
    model, ids, cache = older.model(), torch.tensor([TEXT]), KVCache()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, kv_cache=cache, **options), model.generate(ids, **options)
    )
    assert cache.num_items() == len(TEXT) + 3
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(ids, kv_cache=cache, past_key_values=cache, **options)


def test_the_config_can_be_updated():
    model = older.model()
    model.config.update({"batch_size": 8, "compile_mode": None})
    model.config.use_cuda_kernels = False
    assert model.config.batch_size == 8
