"""SigLIP + Llama, PaliGemma and Gemma of older scripts against the package and transformers."""

import copy
import os
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GemmaConfig, PaliGemmaConfig

import mllama
import tiny
from dropin import toys
from dropin.toys import IMAGE, close, prompt, whole, whole_config
from mllama.dropin.config import LLAMA32Config, MLLAMAConfig
from mllama.dropin.layers import KVCache
from mllama.dropin.multimodal import (
    GemmaForCausalLM,
    MllamaForConditionalGeneration,
    MultiModalProjector,
    PaliGemmaForConditionalGeneration,
    load_strictly,
    load_tolerantly,
)
from mllama.dropin.processing import MllamaImageProcessor, PaliGemmaProcessor, paligemmaProcessor
from mllama.dropin.text import Llama3ForCausalLM
from mllama.dropin.vision import SiglipModel, SiglipVisionConfig
from tiny import stock

WORDS = tiny.tokens(6)
GREEDY = {"do_sample": False, "eos_token_id": None}


def logits(model, *args, **kwargs) -> torch.Tensor:
    return model(*args, **kwargs)["logits"]


def images(count: int = 1, seed: int = 1) -> torch.Tensor:
    return tiny.images(count, seed)


# ---- MLLAMAConfig


def test_a_config_without_arguments_is_llama_3_2_1b_and_siglip_base():
    config = MLLAMAConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.hidden_size, text.n_layers) == (128256, 2048, 16)
    assert (vision.hidden_size, vision.image_size, text.num_image_tokens) == (768, 224, 196)
    assert (config.dtype, config.image_token_index) == (torch.float16, None)


def test_what_scripts_read_from_a_config():
    config = whole_config(projection_dim=512, pad_token_index=7)
    assert config.projection_dim == 64  # one linear layer: the decoder's width
    assert (config.vocab_size, config.hidden_size, config.pad_token_index) == (99, 64, 7)
    assert (config.text_config.n_heads, config.text_config.num_image_tokens) == (4, 4)
    assert whole_config(image_token_index=5).image_token_index == 5
    further = {"n_kv_heads": 8, "head_dim": 16, "rope_theta": 500000.0}  # of READMEs
    assert whole_config(text=further).text_config.n_kv_groups == 2


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        (SiglipVisionConfig(**tiny.VISION), LLAMA32Config(**toys.TEXT)),
        (SimpleNamespace(**tiny.VISION), SimpleNamespace(**toys.TEXT)),
        (
            transformers.SiglipVisionConfig(**tiny.VISION),
            transformers.LlamaConfig(**LLAMA32Config(**toys.TEXT).to_dict()),
        ),
    ],
    ids=["older", "plain objects", "transformers'"],
)
def test_objects_in_place_of_dicts(vision, text):
    config, expected = MLLAMAConfig(vision, text), whole_config()
    for part in ("vision_config", "text_config"):
        for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
            assert getattr(getattr(config, part), name) == getattr(getattr(expected, part), name)
    assert config.text_config is not text and config.text_config.num_image_tokens == 4


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: MLLAMAConfig(tiny.VISION, 3), TypeError),
        (lambda: whole_config(text={"n_heads": 3}), ValueError),
        (lambda: whole_config(image_token_index=-1), ValueError),
    ],
)
def test_configs_that_cannot_be(call, error):
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("token", [None, 97])
def test_what_is_written_the_package_reads(token, tmp_path):
    config = whole_config(image_token_index=token, projection_dim=512)
    config.save_pretrained(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read) is mllama.MllamaConfig and read.projector == "linear"
    assert (read.image_token_index, read.projection_dim) == (token, 64)
    text = config.text_config
    assert read.text_config.rope_parameters == text.rope_parameters
    assert read.text_config.max_position_embeddings == text.context_length
    assert read.text_config.eos_token_id is None
    same = MLLAMAConfig.from_pretrained(tmp_path)
    assert type(same) is mllama.MllamaConfig and same.image_token_index == token
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same.to_dict()["image_token_index"] == token


def test_the_packages_folders(model_folder):
    config = MLLAMAConfig.from_pretrained(model_folder)
    assert (config.projector, config.projection_dim) == ("mlp", 64)
    model = MllamaForConditionalGeneration.from_pretrained(model_folder, config=config)
    assert not any(parameter.is_meta for parameter in model.parameters())


# ---- calls


def test_it_computes_what_the_package_computes():
    model, ids = whole(), prompt(*WORDS)
    same = mllama.MllamaForConditionalGeneration(mllama.MllamaConfig(**model.config.to_dict()))
    same.load_state_dict(model.state_dict())
    labels = ids.masked_fill(ids == IMAGE, -100)
    output = model(ids, images(), None, labels)
    expected = same.eval()(ids, images(), labels=labels)
    close(output["logits"], expected.logits, 0)
    close(output["loss"], expected.loss, 0)
    output.loss.backward()
    expected.loss.backward()
    for name, parameter in same.named_parameters():
        close(model.get_parameter(name).grad, parameter.grad, 0)


def test_what_is_not_there_reads_as_none():
    output = whole()(torch.tensor([WORDS]), use_cache=False)
    assert output["loss"] is None and output["kv_cache"] is None and output[0] is output.logits
    assert "kv_cache" not in output and output.get("kv_cache", 3) == 3
    with pytest.raises(KeyError):
        output["nothing"]
    cache = KVCache()
    output = whole()(torch.tensor([WORDS]), kv_cache=cache)
    assert "kv_cache" in output and output.get("kv_cache") is output.kv_cache is cache


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, None], ids=str)
@pytest.mark.parametrize("again", [True, False], ids=["the image again", "no image"])
def test_token_by_token(dtype, again):
    model, ids, cache = whole(), prompt(*WORDS), KVCache()
    mask = None if dtype is None else torch.ones(1, ids.shape[1], dtype=dtype)
    output = model(ids, images(), mask, kv_cache=cache)
    for _ in range(6):
        token = output["logits"][:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        mask = None if mask is None else torch.cat([mask, torch.ones(1, 1, dtype=dtype)], 1)
        output = model(token, images() if again else None, mask, kv_cache=cache)
        close(output["logits"][:, -1], logits(model, ids, images(), mask)[:, -1], 1e-4)
    assert output["kv_cache"] is cache and cache.num_items() == ids.shape[1]
    options = GREEDY | {"pixel_values": images(), "max_new_tokens": 6}
    assert torch.equal(model.generate(prompt(*WORDS), **options), ids)


def test_generate():
    model, ids = whole(), prompt(*WORDS)
    options = GREEDY | {"pixel_values": images(), "max_new_tokens": 4}
    plain, cache = model.generate(ids, **options), KVCache()
    assert torch.equal(model.generate(ids, kv_cache=cache, **options), plain)
    assert cache.num_items() == ids.shape[1] + 3
    assert torch.equal(model.generate(ids, use_cache=False, **options), plain)
    beams = model.generate(input_ids=ids, num_beams=2, **options)
    assert torch.equal(beams[:, :10], ids)


def test_two_names_of_one_cache():
    for name in ("cache", "past_key_values"):
        for call in (whole(), whole().generate):
            with pytest.raises(ValueError, match=name):
                call(torch.tensor([WORDS]), kv_cache=KVCache(), **{name: KVCache()})


def test_calls_that_are_not_kept():
    model, ids = whole(), torch.tensor([WORDS])
    for call in (
        lambda: model.forward(ids, kv_cache=KVCache()),
        lambda: model(ids, image_mask=ids),
        lambda: model.text_config,
        lambda: model.vision_model,
        lambda: model._merge_input_ids_with_image_features(ids, ids, ids, ids),
    ):
        with pytest.raises((TypeError, AttributeError)):
            call()


def test_embeddings_and_positions():
    model, ids = whole(), torch.tensor([WORDS])
    expected = logits(model, ids)
    close(logits(model, inputs_embeds=model.get_input_embeddings()(ids)), expected, 0)
    close(logits(model, ids, position_ids=torch.arange(6)[None]), expected, 0)


# ---- which id is the placeholder


@pytest.mark.parametrize("image", [IMAGE, tiny.VOCAB_SIZE, 97])
@pytest.mark.parametrize("said", [True, False])
def test_another_image_changes_the_logits(image, said):
    model = whole(image_token_index=image if said else None)
    for words in (WORDS, [*WORDS, 5, 5, 5, 5]):  # an answer that repeats itself is no placeholder
        ids = prompt(*words, image=image)
        first, second = (logits(model, ids, images(seed=seed)) for seed in (1, 2))
        assert (first - second).abs().max() > 0.1


def test_several_images_in_a_prompt():
    model, run = whole(), [IMAGE] * tiny.PATCHES
    for row in (run + run + WORDS, run + WORDS[:3] + run + WORDS[3:]):
        first, second = (
            logits(model, torch.tensor([row]), x) for x in (images(2), images(2).flip(0))
        )
        assert (first - second).abs().max() > 0.1


def test_an_image_without_placeholders_is_not_used_and_a_warning_says_so(tmp_path):
    model, ids = whole(), torch.randint(0, 97, (1, 64))
    with pytest.warns(UserWarning, match="pixel_values"):
        close(logits(model, ids, images()), logits(model, ids), 0)
    model.save_pretrained(tmp_path)  # without the id
    read = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert read.config.image_token_index is None


@pytest.mark.parametrize("times", [1, 5])
def test_one_that_was_not_expanded_is_refused(times):
    with pytest.raises(ValueError, match="placeholders"):
        whole()(torch.tensor([[IMAGE] * times + WORDS]), images())


def test_ids_that_do_not_go_with_the_images():
    model = whole(image_token_index=90)
    with pytest.raises(ValueError, match="placeholders"):
        model(prompt(*WORDS, image=91), images())
    model.config.image_token_index = 91
    assert logits(model, prompt(*WORDS, image=91), images()).shape == (1, 10, 99)
    with pytest.raises(ValueError, match="placeholders"):
        whole()(prompt(*WORDS), images(2))
    with pytest.raises((ValueError, IndexError)):
        whole()(prompt(*WORDS))


def test_what_the_first_prompt_tells_is_kept(tmp_path):
    model = whole()
    two = torch.tensor([[97] * 4 + WORDS + [5] * 4])  # either id could be it
    with pytest.raises(ValueError, match="image_token_index"):
        model(two, images())
    model(prompt(*WORDS, image=97), images())
    assert model.config.image_token_index == 97
    first, second = (logits(model, two, images(seed=seed)) for seed in (1, 2))
    assert (first - second).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).image_token_index == 97


@pytest.mark.parametrize("kind", [MllamaImageProcessor, paligemmaProcessor, PaliGemmaProcessor])
@pytest.mark.parametrize("inside", [True, False], ids=["in the vocabulary", "outside of it"])
def test_the_processor_alone_knows_the_id(kind, inside, make_tokenizer):
    processor = kind(make_tokenizer(), tiny.PATCHES, tiny.VISION["image_size"])
    vocabulary = len(processor.tokenizer) if inside else processor.image_token_id
    model = whole(text={"vocab_size": vocabulary})
    red, white = (Image.new("RGB", (20, 30), color) for color in ("red", "white"))
    prompts = ["hello", "hello, what color is it?"]
    same, other = (logits(model, **processor(prompts, [red, x])) for x in (red, white))
    close(same[0], other[0])
    assert (same[1] - other[1]).abs().max() > 0.1
    batch, cache, said = processor(["hello"], [red]), KVCache(), []
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(8):
        ids = logits(model, ids, batch["pixel Value"], mask, kv_cache=cache)[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones(1, 1)], 1)
        said.append(int(ids))
    assert model.generate(**batch, max_new_tokens=8, **GREEDY)[0, -8:].tolist() == said


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_the_loss_without_placeholders_and_ignored_labels(ignore_index):
    model, ids = whole(ignore_index=ignore_index), prompt(*WORDS)
    labels = ids.clone()
    labels[0, 5] = ignore_index
    places = torch.tensor([3, 5, 6, 7, 8])  # the next id is text and has a label
    output = model(ids, images(), labels=labels)
    expected = nn.functional.cross_entropy(output["logits"][0, places], ids[0, places + 1])
    close(output["loss"], expected)


def test_parts():
    model, pixels = whole(), images(2)
    features = model.vision_tower(pixels).last_hidden_state
    assert model.multi_modal_projector.linear(features).shape == (2, 4, 64)
    assert model.vocab_size == 99
    assert MultiModalProjector(whole_config())(features).shape == (2, 4, 64)


# ---- weights


@pytest.mark.parametrize("given", [{"text": {"dtype": "bfloat16"}}, {"dtype": torch.float16}])
def test_weights_are_drawn_in_the_configs_dtype(given):
    model = MllamaForConditionalGeneration(whole_config(**given))
    assert torch.get_default_dtype() == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == model.config.dtype
        drawn = not name.endswith("bias") and "norm" not in name
        assert (0 < parameter.float().std() < 1) if drawn else parameter.unique().numel() == 1
    assert logits(model.eval(), prompt(*WORDS), images()).dtype == model.config.dtype
    with torch.device("meta"):
        meta = MllamaForConditionalGeneration(whole_config())
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_tie_weights_ties_and_what_transformers_calls_does_not(tmp_path):
    model = whole()
    model.resize_token_embeddings(120)
    assert model.vocab_size == 120
    model.save_pretrained(tmp_path)
    read = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    for one in (model, read):
        assert one.lm_head.weight is not one.get_input_embeddings().weight
    close(read.lm_head.weight, model.lm_head.weight, 0)
    read.tie_weights()
    assert read.lm_head.weight is read.get_input_embeddings().weight


def test_folders(tmp_path):
    model, given = whole(), (prompt(*WORDS), images())
    model.save_pretrained(tmp_path)
    for kind in (mllama.MllamaForConditionalGeneration, MllamaForConditionalGeneration):
        close(logits(kind.from_pretrained(tmp_path), *given), logits(model, *given), 0)


class Older(nn.Module):
    """The three parts as older files name them."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = SiglipModel(SiglipVisionConfig(**tiny.VISION))
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = Llama3ForCausalLM(config.text_config)

    def forward(self, pixel_values: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        features = self.multi_modal_projector(self.vision_model(pixel_values))
        embeds = self.language_model.model.tok_emb(text)
        return self.language_model(None, torch.cat([features, embeds], 1))[0]


PLAIN_VIT = {
    "vision_model.vision_model.": "vision_model.",
    ".embedding.": ".embeddings.",
    "vision_model.layernorm": "vision_model.post_layernorm",
}


@pytest.mark.parametrize("names", [{}, PLAIN_VIT], ids=["plain", "another tower"])
@pytest.mark.parametrize("lora", [False, True])
def test_older_weight_files(names, lora, tmp_path):
    older, model = Older(whole_config()), MllamaForConditionalGeneration(whole_config()).eval()
    if lora:
        mllama.convert_linears_to_lora(older.language_model)
        mllama.convert_linears_to_lora(model.language_model)
        model.lm_head = mllama.Linear_LORA.around(model.lm_head, 4, 16)
    tiny.randomize(older, seed=5).eval()
    state = older.state_dict()
    for before, after in names.items():
        state = {name.replace(before, after): value for name, value in state.items()}
    state["language_model.model.trf_blocks.0.att.rotary_emb.inv_freq"] = torch.ones(8)
    state["vision_model.vision_model.embedding.position_ids"] = torch.arange(4)[None]
    save_file(state, tmp_path / "older.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = model.load_state_dict(load_file(tmp_path / "older.safetensors"))
    assert not report.missing_keys and not report.unexpected_keys
    close(logits(model, prompt(*WORDS), images()), older(images(), torch.tensor([WORDS])), 1e-4)


def test_weight_files_that_do_not_fit():
    model, state = whole(), Older(whole_config()).state_dict()
    fused = {"language_model.model.trf_blocks.0.ff.swiglu.w_gate": torch.ones(96, 64)}
    with pytest.warns(UserWarning, match="swiglu"):
        report = model.load_state_dict(state | fused, strict=False)
    assert len(report.unexpected_keys) == 1
    head = {"language_model.lm_head.weight": torch.ones(99, 64)}
    with pytest.warns(UserWarning, match="1 of 61"):
        model.load_state_dict({f"x.{name}": t for name, t in state.items()} | head, strict=False)
    assert bool((model.lm_head.weight == 1).all())
    with pytest.warns(UserWarning, match="0 of 0"):
        model.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state | {"language_model.model.final_norm.weight": torch.ones(3)})
    with pytest.raises(TypeError, match="state_dict"):
        model.load_state_dict("ckpt.pt")


def test_names_of_the_model_itself_and_adapters_alone():
    model, same = whole(), MllamaForConditionalGeneration(whole_config())
    same.load_state_dict(model.state_dict())
    close(same.state_dict(), model.state_dict(), 0)
    mllama.convert_linears_to_lora(same.language_model)
    adapters = {name: t + 1 for name, t in same.state_dict().items() if "lora_" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(adapters, strict=False)
    assert all(torch.equal(same.state_dict()[name], t) for name, t in adapters.items())


# ---- modeling_gemma

SIZES = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
IDS = prompt(*WORDS, image=tiny.IMAGE)


def paligemma(**options) -> PaliGemmaForConditionalGeneration:
    given = {"text_config": SIZES, "image_token_index": tiny.IMAGE, "projection_dim": 64} | options
    config = PaliGemmaConfig(vision_config=tiny.VISION, hidden_size=64, **given)
    return tiny.randomize(PaliGemmaForConditionalGeneration(config)).eval()


def test_what_scripts_read_from_paligemmas_config():
    text = GemmaConfig(**SIZES, rope_theta=5000.0)
    config = paligemma(text_config=text).config
    assert config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert config.text_config.num_image_tokens == config.vision_config.num_image_tokens == 4


@pytest.mark.parametrize("text", [SIZES, GemmaConfig(**SIZES)], ids=["dict", "config"])
def test_paligemma_is_stock_transformers(text, tmp_path):
    ours, types, mask = paligemma(text_config=text), torch.zeros_like(IDS), torch.ones(1, 10)
    ours.save_pretrained(tmp_path)
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    expected = theirs(IDS, images(), mask, token_type_ids=types).logits
    found = logits(ours, IDS, images(), mask, kv_cache=KVCache())
    close(found, expected, 1e-4)
    one_way = mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path)(IDS, images()).logits
    assert (found[:, 0] - one_way[:, 0]).abs().max() > 0.1  # the first position sees the last
    read = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    close(logits(read, IDS, images()), expected, 1e-4)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight


def test_paligemma_token_by_token():
    ours, cache, ids, mask, said = paligemma(), KVCache(), IDS, torch.ones(1, 10), []
    for _ in range(5):
        ids = logits(ours, ids, images(), mask, kv_cache=cache)[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones(1, 1)], 1)
        said.append(int(ids))
    options = GREEDY | {"max_new_tokens": 5}
    for given in (
        {"pixel_values": images()},
        {"pixel_values": images(), "token_type_ids": torch.zeros_like(IDS)},
        {"image_features": ours.get_image_features(images())},
    ):
        assert ours.generate(IDS, **given, **options)[0, 10:].tolist() == said
    with pytest.raises(ValueError, match="pixel_value"):
        ours.generate(IDS, pixel_value=images(), **options)


def test_paligemmas_labels_are_not_seen_before_they_are_said():
    ours, changed = paligemma(), IDS.clone()
    changed[0, -1] = 1 + (changed[0, -1] % 90)
    first, second = (logits(ours, ids, images(), labels=IDS) for ids in (IDS, changed))
    close(first[:, :-1], second[:, :-1])
    token = int(IDS[0, 6])
    loss = paligemma(ignore_index=token)(IDS, images(), labels=IDS)["loss"]
    close(loss, ours(IDS, images(), labels=IDS.masked_fill(token == IDS, -100))["loss"], 0)


def test_gemma_is_stock_transformers():
    ours = tiny.randomize(GemmaForCausalLM(GemmaConfig(**SIZES))).eval()
    theirs = transformers.GemmaForCausalLM(ours.config).eval()
    weights = ours.state_dict().items()
    theirs.load_state_dict({n.replace("language_model.", "model."): t for n, t in weights})
    ids, cache = torch.tensor([WORDS]), KVCache()
    close(logits(ours, ids, kv_cache=cache), theirs(ids).logits, 1e-4)
    embeds, again = ours.get_input_embeddings()(ids[:, :1]), torch.cat([ids, ids[:, :1]], 1)
    step = logits(ours, inputs_embeds=embeds, kv_cache=cache)
    close(step, theirs(again).logits[:, -1:], 1e-4)


# ---- load_hf_model

LOADERS = pytest.mark.parametrize("load", [load_strictly, load_tolerantly])


@pytest.fixture
def broken(family_folder, tmp_path):
    """broken(edit): a copy of the SigLIP + Llama folder whose tensors were changed."""

    def make(edit):
        for file in family_folder("llava, siglip").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path)

    return make


@LOADERS
@pytest.mark.parametrize("family", ["llava, siglip", "mllama", "llama", "gemma", "paligemma"])
def test_loaded_models_take_a_kv_cache(family, load, family_folder, capsys):
    model, tokenizer = load(str(family_folder(family)), "cpu")
    kinds = {"gemma": GemmaForCausalLM, "paligemma": PaliGemmaForConditionalGeneration}
    assert type(model) is kinds.get(family, MllamaForConditionalGeneration)
    assert not model.training and tokenizer.padding_side == "right"
    said = capsys.readouterr().out
    assert "converted: " in said and "skipped" not in said and "missing" not in said
    cache, ids = KVCache(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        token = logits(model, ids, kv_cache=cache)[:, -1:].argmax(-1)
        step = logits(model, token, None, torch.ones(1, 4), kv_cache=cache)
        types = {"token_type_ids": torch.tensor([[0, 0, 0, 1]])} if family == "paligemma" else {}
        again = logits(model, torch.cat([ids, token], 1), **types)
    close(step[:, -1], again[:, -1], 1e-4)
    own, options = mllama.load_hf_model(family_folder(family))[0], GREEDY | {"max_new_tokens": 6}
    inputs = {"input_ids": ids}
    if family == "mllama":
        inputs["pixel_values"] = torch.randn(1, 1, 4, 3, 16, 16)
        inputs["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
        inputs["cross_attention_mask"] = torch.ones(1, 3, 1, 4)
    elif family in ("llava, siglip", "paligemma"):
        assert model.config.text_config.num_image_tokens == tiny.PATCHES
        inputs = {
            "input_ids": prompt(5, 6, image=model.config.image_token_index),
            "pixel_values": images(),
        }
    assert torch.equal(model.generate(**inputs, **options), own.generate(**inputs, **options))


def test_a_siglip_alone_and_no_model(tmp_path, make_tokenizer):
    stock.make("siglip").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert type(load_strictly(tmp_path)[0]) is mllama.SiglipModel
    for load in (load_strictly, load_tolerantly):
        with pytest.raises(FileNotFoundError):
            load(str(tmp_path / "nothing"), "cpu")


def test_leftovers_and_a_head_that_is_not_there(broken, capsys):
    def edit(tensors):
        tensors["surprise"] = torch.zeros(1)
        del tensors["language_model.model.norm.weight"], tensors["language_model.lm_head.weight"]

    path = broken(edit)
    with pytest.raises(ValueError, match="surprise"):
        load_strictly(path)
    model, _ = load_tolerantly(path)
    assert bool((model.language_model.norm.weight == 1).all())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    said = capsys.readouterr().out
    assert all(name in said for name in ("surprise", "language_model.norm.weight", "tied: lm_head"))


@pytest.mark.skipif(os.environ.get("MLLAMA_LARGE_TESTS") != "1", reason="needs 8 GB and minutes")
def test_the_size_that_readmes_build(run_python, tmp_path):
    script = """
import resource, torch, mllama.dropin
from model import MLLAMAConfig, MllamaForConditionalGeneration
text = {"vocab_size": 128256, "hidden_size": 4096, "n_heads": 32, "n_layers": 16}
config = MLLAMAConfig({"hidden_size": 768}, text | {"hidden_dim": 8192})
model = MllamaForConditionalGeneration(config).eval()
ids = torch.tensor([[128256] * config.text_config.num_image_tokens + [5] * 16])
with torch.no_grad():
    logits = model(ids, torch.randn(1, 3, 224, 224))["logits"]
assert logits.shape == (1, 212, 128256) and logits.isfinite().all()
assert logits.dtype == torch.float16
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 24e9 / 2**10
"""
    done = run_python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
