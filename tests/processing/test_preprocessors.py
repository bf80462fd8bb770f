"""What the core makes of a model's folder, against this package's processors on transformers and
against stock transformers.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from mllama.assets import EMBEDDED
from mllama.hf.processors.auto import load_processor
from mllama.processing.auto import load_preprocessor
from mllama.processing.conversation import encode_batch, encode_messages
from mllama.processing.text_tokenizer import load_tokenizer
from tiny.folders import MAKERS

FAMILIES = [family for family in MAKERS if family not in ("llava, siglip", "siglip")]
TEXTS = ["How many circles?", " two  red\n\nÄpfel 123 <eos> x", ""]


@pytest.fixture(scope="module")
def folders(family_folder):
    """folders(family): the folder of a family, or the embedded model's."""
    return lambda family: EMBEDDED if family == "embedded" else family_folder(family)


def equal(ours, theirs):
    theirs = {name: torch.as_tensor(value) for name, value in theirs.items()}
    assert {name: value.dtype for name, value in ours.items()} == {
        name: value.dtype for name, value in theirs.items()
    }
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def user(text, *images):
    return [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": image} for image in images),
                {"type": "text", "text": text},
            ],
        }
    ]


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
def test_conversations(folders, noise, family):
    core, stock = load_preprocessor(folders(family)), load_processor(folders(family))
    takes_images = family not in ("llama", "gemma")
    shapes = [(50, 37), (200, 31), (16, 90), (64, 64)]
    images = [noise(*shape, seed) for seed, shape in enumerate(shapes)] * takes_images
    for text in TEXTS[:2]:
        equal(encode_messages(core, user(text)), encode_messages(stock, user(text)))
        one = user(text, *images[:1])
        equal(encode_messages(core, one), encode_messages(stock, one))
    rows = [user("a b", *images[:1]), user("How many red circles?", *images[1:3]), user("c")]
    equal(encode_batch(core, rows, [[]] * 3), encode_batch(stock, rows, [[]] * 3))


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
def test_tokenizers(folders, family):
    core = load_tokenizer(folders(family))
    stock = AutoTokenizer.from_pretrained(folders(family))
    assert len(core) == len(stock)
    for name in ("bos", "eos", "pad"):
        assert getattr(core, f"{name}_token") == getattr(stock, f"{name}_token")
        assert getattr(core, f"{name}_token_id") == getattr(stock, f"{name}_token_id")
    assert core.special_tokens_map == stock.special_tokens_map
    assert core.chat_template == stock.chat_template
    for text in TEXTS:
        for special in (True, False):
            ids = core.encode(text, add_special_tokens=special)
            assert ids == stock.encode(text, add_special_tokens=special)
            decoded = core.decode(ids, skip_special_tokens=special)
            assert decoded == stock.decode(ids, skip_special_tokens=special)
    for side in ("left", "right") if stock.pad_token else ():
        theirs = stock(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        ours = core.pad([core.encode(text) for text in TEXTS], side)
        equal(ours, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("family", ["llava, clip", "mllama", "embedded"])
def test_stock_processors(folders, noise, family):
    core = load_preprocessor(folders(family))
    stock = AutoProcessor.from_pretrained(folders(family))
    image, text = noise(91, 60), "What color is it?"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = stock.apply_chat_template(messages, add_generation_prompt=True)
    options = {"add_special_tokens": False} if family == "mllama" else {}  # its prompt has BOS
    theirs = stock(text=prompt, images=image, return_tensors="pt", **options)
    ours = encode_messages(core, messages, [image])
    equal(ours, {name: theirs[name] for name in ours})


def test_stock_paligemma(folders, noise):
    core = load_preprocessor(folders("paligemma"))
    stock = AutoProcessor.from_pretrained(folders("paligemma"))
    image = noise(91, 60)
    theirs = stock(text="caption en", images=image, return_tensors="pt")
    ours = core(["caption en"], [image])
    equal(ours, {name: theirs[name] for name in ours})


def test_siglip_alone(folders, noise):
    core, images = load_preprocessor(folders("siglip")), [noise(50, 37), noise(8, 200)]
    theirs = load_processor(folders("siglip"))(images, return_tensors="pt")
    equal(core(images), theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 48, "crop_size": 40},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 31, "width": 31}},  # filled up
        {"do_center_crop": False, "size": {"height": 32, "width": 32}},
        {"do_rescale": False, "resample": 2},
        {"do_normalize": False, "rescale_factor": 0.01},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    ],
)
def test_spellings_of_image_settings(folders, noise, tmp_path, changes):
    shutil.copytree(folders("llava, clip"), tmp_path / "clip")
    file = tmp_path / "clip" / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"] |= changes
    file.write_text(json.dumps(settings))
    core, stock = load_preprocessor(tmp_path / "clip"), load_processor(tmp_path / "clip")
    for shape in [(50, 37), (21, 90), (33, 33)]:
        images = [noise(*shape)]
        equal(core(["<image>"], images), stock(["<image>"], images))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("special_tokens_map.json", {"bos_token": {"content": "<new>", "lstrip": True}}),
        ("added_tokens.json", {"<added>": 400}),
        ("tokenizer_config.json", {"bos_token": "<s>", "extra_special_tokens": ["<a>", "<b>"]}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<a>"], "add_bos_token": True}),
        ("tokenizer_config.json", {"extra_special_tokens": {"boi_token": "<boi>"}}),
        (
            "tokenizer_config.json",
            {
                "eos_token": {"__type": "AddedToken", "content": "<e>"},
                "added_tokens_decoder": {"320": {"content": "<e>", "special": True}},
                "split_special_tokens": True,
            },
        ),
        (
            "tokenizer_config.json",
            {
                "chat_template": [
                    {"name": "default", "template": "a"},
                    {"name": "b", "template": ""},
                ]
            },
        ),
        ("chat_template.jinja", "{{ bos_token }}x"),
        ("additional_chat_templates/other.jinja", "other"),
    ],
)
def test_spellings_of_tokenizers(make_tokenizer, tmp_path, file, content):
    make_tokenizer().save_pretrained(tmp_path)
    place = tmp_path / file
    place.parent.mkdir(exist_ok=True)
    if file == "tokenizer_config.json":
        content = json.loads(place.read_text()) | content
    place.write_text(content if isinstance(content, str) else json.dumps(content))
    if file == "special_tokens_map.json":  # what folders of then do not have
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings.pop("bos_token")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    core, stock = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert core.special_tokens_map == stock.special_tokens_map
    assert core.chat_template == stock.chat_template
    assert core.backend.get_vocab() == stock.get_vocab()
    for text in ["a <added> b<new>", " <a><b> <boi>c", "d <s>  <e>x"]:
        assert core.encode(text) == stock.encode(text)
        ids = core.encode(text)
        assert core.decode(ids, True) == stock.decode(ids, skip_special_tokens=True)


def write_sentencepiece(folder, model_type: str, **settings) -> None:
    """A tokenizer in Llama 2's layout, whose settings may name another class."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters += list("\u2581abc") + ["\u2581a", "ab"]
    merges = [("\u2581", "a"), ("a", "b")]
    vocabulary = {token: place for place, token in enumerate(letters)}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Replace("\u2581", " ")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    backend.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": None, "legacy": False}),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True, "legacy": True}),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
        ("gemma2", {"tokenizer_class": "GemmaTokenizer"}),
        ("gemma3_text", {"tokenizer_class": None}),
        ("llava", {"tokenizer_class": "LlamaTokenizer"}),
        ("llava", {"tokenizer_class": "GemmaTokenizer"}),
    ],
)
def test_classes_with_a_pipeline_of_their_own(tmp_path, model_type, settings):
    write_sentencepiece(tmp_path, model_type, **settings)
    core, stock = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert core.special_tokens_map == stock.special_tokens_map
    for text in ["ab c", "<s>ab ä</s> a", "  b"]:
        ids = core.encode(text)
        assert ids == stock.encode(text) and core.decode(ids) == stock.decode(ids)


def test_refused_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ValueError, match="tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"height": -1, "width": 1}}, "size"),
        ({"size": {"longest_edge": 5}}, "size"),
        ({"resample": 1}, "resample"),
        ({"image_std": 0}, "image_std"),
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
    ],
)
def test_refused_settings(folders, tmp_path, changes, name):
    settings = json.loads((folders("siglip") / "preprocessor_config.json").read_text()) | changes
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(ValueError, match=name):
        load_preprocessor(tmp_path)


def test_wrong_processors():
    for wrong in (None, object(), np.zeros(3)):
        with pytest.raises(TypeError, match="processor"):
            encode_messages(wrong, user("a"))
