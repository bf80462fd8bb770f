"""fuse: two models as one, of the same parameters."""

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig

import mllama
import tiny
from mllama.cli import main
from mllama.processing.conversation import encode_messages

OPTIONS = {
    "merge": {"image_token_index": 200},
    "prepend": {"num_image_tokens": 2, "image_pooling": "learned", "projector": "linear"},
    "cross_attention": {"cross_attention_every": 2},
}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def text(**options) -> mllama.MllamaForConditionalGeneration:
    config = LlamaConfig(**tiny.TEXT | {"num_hidden_layers": 5, "pad_token_id": 3} | options)
    return tiny.randomize(mllama.MllamaForConditionalGeneration(config)).eval()


def vision() -> mllama.SiglipModel:
    return tiny.randomize(mllama.SiglipModel(SiglipVisionConfig(**tiny.VISION)), seed=1).eval()


IDS = torch.tensor([tiny.tokens(6), tiny.tokens(6, 5)])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fusion", OPTIONS)
def test_parameters_are_shared(fusion, tied):
    llama, siglip = text(tie_word_embeddings=tied), vision()
    before = llama(IDS).logits
    model = mllama.fuse(llama, siglip, fusion, **OPTIONS[fusion])
    ours = dict(model.named_parameters())
    shared = {
        id(parameter) for parameter in [*llama.parameters(), *siglip.vision_tower.parameters()]
    }
    assert shared < {id(parameter) for parameter in ours.values()}
    new = {name for name, parameter in ours.items() if id(parameter) not in shared}
    added = (
        {name for name in ours if "layers.2." in name or "layers.5." in name}
        if fusion == "cross_attention"
        else set()
    )
    assert {name for name in new if name.startswith("language_model")} == added
    assert {name.split(".")[0] for name in new} <= {
        "multi_modal_projector",
        "image_pooling",
        "language_model",
    }
    assert not any(parameter.is_meta for parameter in ours.values())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert (
        not model.training
        and model.generation_config.to_dict() == llama.generation_config.to_dict()
    )
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before) and torch.equal(llama(IDS).logits, before)
        assert torch.equal(
            model.vision_tower(tiny.images(1)).last_hidden_state,
            siglip(tiny.images(1)).last_hidden_state,
        )
    assert torch.equal(
        model.generate(IDS, **GREEDY), llama.generate(IDS, **GREEDY)
    )  # either finds its layers in its cache


@pytest.mark.parametrize("fusion", OPTIONS)
def test_what_is_new_can_be_trained_alone(fusion):
    llama, siglip = text(), vision()
    kept = {name: value.clone() for name, value in llama.state_dict().items()}
    model = mllama.fuse(llama, siglip, fusion, **OPTIONS[fusion])
    model.requires_grad_(False)
    for name, module in model.named_children():
        module.requires_grad_(name in ("multi_modal_projector", "image_pooling"))
    for index in model.spec.text.cross_attention_layers or ():
        model.language_model.layers[index].requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    words = torch.cat([torch.full((2, tiny.PATCHES), 200), IDS], 1) if fusion == "merge" else IDS
    labels, optimizer, losses = (
        words.masked_fill(words == 200, -100),
        torch.optim.AdamW(trained, lr=3e-2),
        [],
    )
    for _ in range(8):
        losses.append(model(words, tiny.images(2), labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, kept[name]) for name, value in llama.state_dict().items())


def test_new_parts_start_as_a_new_models(tmp_path):
    torch.manual_seed(0)
    llama, siglip = (
        text(hidden_size=128, initializer_range=0.5).to(torch.bfloat16),
        vision().to(torch.bfloat16),
    )
    model = mllama.fuse(llama, siglip, "cross_attention").train()
    layer = model.language_model.layers[4]
    assert {parameter.dtype for parameter in model.parameters()} == {
        torch.bfloat16
    } and model.config.dtype == torch.bfloat16
    for weight in (
        model.multi_modal_projector.linear_1.weight,
        layer.cross_attn.q_proj.weight,
        layer.mlp.up_proj.weight,
    ):
        assert 0.45 < weight.float().std() < 0.55
    assert (
        not model.multi_modal_projector.linear_1.bias.any() and not layer.cross_attn_attn_gate.any()
    )
    assert (layer.input_layernorm.weight == 1).all() and (layer.cross_attn.q_norm.weight == 1).all()
    assert layer.training and model.config.get_text_config().pad_token_id == 3
    model.save_pretrained(tmp_path)
    read = mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(
        torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize(("fusion", "placeholders"), [("prepend", 3), ("cross_attention", 1)])
def test_a_saved_model_is_asked(make_tokenizer, image_file, fusion, placeholders, tmp_path):
    """With a placeholder per visual token, or one per image that is a word of the vocabulary."""
    processor = mllama.MllamaImageProcessor(
        make_tokenizer(), placeholders, tiny.VISION["image_size"]
    )
    options = OPTIONS[fusion] | ({"num_image_tokens": placeholders} if fusion == "prepend" else {})
    llama = text(vocab_size=len(processor.tokenizer), eos_token_id=None)
    model = mllama.fuse(
        llama, vision(), fusion, **options | {"image_token_index": processor.image_token_id}
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, read = mllama.load(tmp_path, dtype="float32", device="cpu")
    for images in ([image_file], [image_file, image_file]):
        inputs = read("What is it?", images)
        assert (inputs["input_ids"] == read.image_token_id).sum() == placeholders * len(images)
        said = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        assert len(said) == 5
        if len(images) == 1:
            answer = mllama.ask(image_file, "What is it?", model, read, max_new_tokens=5)
            assert answer == read.decode(said, skip_special_tokens=True).strip()


def test_the_text_may_come_from_a_gguf_file(make_tokenizer, tmp_path):
    pytest.importorskip("gguf", reason="the optional library of GGUF files")
    from mllama.hf.gguf import save_gguf

    tokenizer = make_tokenizer()
    save_gguf(text(vocab_size=len(tokenizer)), tokenizer, tmp_path / "text.gguf")
    llama = mllama.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "text.gguf", dtype="float32"
    )
    model = mllama.fuse(llama, vision(), "cross_attention")
    with torch.no_grad():
        assert torch.equal(model(IDS, tiny.images(2)).logits, llama(IDS).logits)


def test_what_does_not_fit_is_refused():
    llama, siglip = text(), vision()
    gemma = mllama.MllamaForConditionalGeneration(GemmaConfig(**tiny.TEXT, head_dim=16))
    for wrong, error, named in (
        (
            (LlamaForCausalLM(llama.config), siglip),
            TypeError,
            "text_model must be an MllamaForConditionalGeneration, got LlamaForCausalLM",
        ),
        ((gemma, siglip), ValueError, "text_model must be a Llama"),
        ((tiny.model(), siglip), ValueError, "got 'siglip_llama'"),
        (
            (llama, llama),
            TypeError,
            "vision_model must be a SiglipModel, got MllamaForConditionalGeneration",
        ),
        (
            (llama, vision().half()),
            ValueError,
            "must have one dtype, got torch.float32 and torch.float16",
        ),
        ((llama, vision().to("meta")), ValueError, "must have one device, got cpu and meta"),
        ((llama, siglip, "add"), ValueError, "fusion must be one of"),
        (
            (llama, siglip, "cross_attention", {"cross_attention_every": 6}),
            ValueError,
            "at most the text model's 5 layers",
        ),
        (
            (llama, siglip, "prepend", {"num_image_token": 6}),
            TypeError,
            "fuse got options it does not know: num_image_token; they are",
        ),
        ((llama, siglip, "prepend", {"hidden_size": 6}), TypeError, "hidden_size"),
    ):
        first, options = (wrong[:-1], wrong[-1]) if isinstance(wrong[-1], dict) else (wrong, {})
        with pytest.raises(error, match=named):
            mllama.fuse(*first, **options)


@pytest.mark.parametrize("fusion", OPTIONS)
def test_the_processor_is_made_of_both_folders(family_folder, image_file, fusion, tmp_path, capsys):
    llama = mllama.MllamaForConditionalGeneration.from_pretrained(
        family_folder("llama"), dtype="float32"
    )
    siglip = mllama.SiglipModel.from_pretrained(family_folder("siglip"), dtype="float32")
    options = {
        name: value for name, value in OPTIONS[fusion].items() if name != "image_token_index"
    }
    model = mllama.fuse(llama, siglip, fusion, **options)
    model.save_pretrained(tmp_path)
    read, processor = mllama.load(tmp_path, dtype="float32", device="cpu")

    tokenizer, images = (
        mllama.load_processor(family_folder("llama")),
        mllama.load_processor(family_folder("siglip")),
    )
    messages = [{"role": "user", "content": "What is it?"}]
    inputs = encode_messages(processor, messages, [image_file])
    assert torch.equal(
        inputs["pixel_values"], images([image_file], return_tensors="pt")["pixel_values"]
    )
    places = inputs["input_ids"] == processor.image_token_id
    assert places.sum() == (tiny.PATCHES if fusion == "merge" else 0)
    assert torch.equal(
        inputs["input_ids"][~places][None], encode_messages(tokenizer, messages)["input_ids"]
    )
    with torch.no_grad():
        assert torch.equal(read(**inputs).logits, model(**inputs).logits)

    answer = mllama.ask(image_file, "What is it?", read, processor, max_new_tokens=5)
    said = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(said, skip_special_tokens=True).strip()
    assert (
        main(
            [
                "ask",
                str(image_file),
                "What is it?",
                "--model",
                str(tmp_path),
                "--dtype",
                "float32",
                "--max-new-tokens",
                "5",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == answer

    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "path": str(image_file)}, {"type": "text", "text": "a"}],
        }
    ]
    batch = mllama.chat_labels(processor, [[*talk, {"role": "assistant", "content": "b"}]])
    assert (
        torch.equal(batch["pixel_values"], inputs["pixel_values"]) and read(**batch).loss.isfinite()
    )


def test_a_processor_of_another_tokenizer(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<photo>"], special_tokens=True)
    llama, place = text(vocab_size=len(tokenizer)), len(tokenizer) - 1
    model = mllama.fuse(llama, vision(), tokenizer=tokenizer, image_token_index=place)
    assert model.processor.image_token == "<photo>" and model.processor.image_token_id == place
    assert mllama.fuse(llama, vision()).processor is None  # made in memory: there is no tokenizer
    with pytest.warns(UserWarning, match="image_token_index"):
        assert (
            mllama.fuse(llama, vision(), tokenizer=tokenizer, image_token_index=9).processor is None
        )
    with pytest.raises(TypeError, match="tokenizer"):
        mllama.fuse(llama, vision(), tokenizer="a")
