import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllama import MllamaImageProcessor
from mllama.hf.processors.auto import load_processor
from mllama.hf.processors.chat import with_answers
from mllama.hf.processors.paligemma import PaliGemmaProcessor
from mllama.hf.processors.square import CroppedImageProcessor, SquareImageProcessor
from mllama.hf.processors.tiled import TiledImageProcessor, TiledProcessor
from mllama.processing.conversation import encode_messages
from mllama.processing.prompt import CHAT_TEMPLATE
from processing import templates

S = 28
SIZE = {"size": {"height": S, "width": S}}
LLAVA_TEMPLATE = (  # as the LLaVA folders' is
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ "
    "'<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ "
    "content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] | trim + '\n' }}{% endfor %}"
)


@pytest.fixture
def make(make_tokenizer, make_llama_tokenizer, llama_template):
    """make(family): its processor, or a tokenizer."""

    def build(family: str):
        if family == "llava":
            return MllamaImageProcessor(make_tokenizer(), 16, S)
        if family == "clip":
            tokenizer = make_tokenizer(adds_bos=True)
            tokenizer.add_tokens(["<image>"], special_tokens=True)
            images = CLIPImageProcessorPil(size={"shortest_edge": S}, crop_size=SIZE["size"])
            return LlavaProcessor(
                images,
                tokenizer,
                7,
                "default",
                chat_template=LLAVA_TEMPLATE,
                num_additional_image_tokens=1,
            )
        if family == "mllama":
            return TiledProcessor(
                TiledImageProcessor(**SIZE),
                make_llama_tokenizer(adds_bos=True),
                chat_template=llama_template,
            )
        if family == "paligemma":
            return PaliGemmaProcessor(
                SquareImageProcessor(**SIZE, image_seq_length=4), make_tokenizer()
            )
        if family == "siglip":
            return SiglipImageProcessorPil(**SIZE)
        return make_llama_tokenizer(adds_bos=True, chat_template=TEXT_TEMPLATE)

    return build


def read(processor, batch) -> str:
    return processor.decode(batch["input_ids"][0])


# ---- load_processor
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llava", MllamaImageProcessor),
        ("clip", MllamaImageProcessor),
        ("mllama", TiledProcessor),
        ("paligemma", PaliGemmaProcessor),
        ("siglip", SquareImageProcessor),
    ],
)
def test_families(make, tmp_path, family, kind):
    make(family).save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    assert type(processor) is kind and type(load_processor(str(tmp_path))) is kind
    if family == "clip":
        assert (
            type(processor.image_processor) is CroppedImageProcessor
            and processor.image_seq_length == 16
        )


def test_text_models(make, tmp_path):
    make("text").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert type(load_processor(tmp_path)) is type(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("mllama", "MllamaImageProcessor"),
        ("paligemma", "SiglipImageProcessor"),
        ("siglip_vision_model", "SiglipImageProcessor"),
    ],
)
def test_older_folders_by_model_type(
    make, make_llama_tokenizer, make_tokenizer, tmp_path, model_type, kind
):
    expected = {
        "mllama": TiledProcessor,
        "paligemma": PaliGemmaProcessor,
        "siglip_vision_model": SquareImageProcessor,
    }[model_type]
    (make_llama_tokenizer() if model_type == "mllama" else make_tokenizer()).save_pretrained(
        tmp_path
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**SIZE, "image_processor_type": kind, "image_seq_length": 4})
    )
    assert type(load_processor(tmp_path)) is expected


@pytest.mark.parametrize(
    "name", ["Qwen2VLProcessor", "CLIPProcessor", "os.system", 5, ["LlavaProcessor"]]
)
def test_refuses_other_families(tmp_path, name):
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": name, "image_processor": {"do_resize": True}})
    )
    with pytest.raises(
        ValueError, match="LlavaProcessor, MllamaProcessor, PaliGemmaProcessor, SiglipProcessor"
    ):
        load_processor(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor"})
    )
    with pytest.raises(ValueError, match="holds a ViTImageProcessor"):
        load_processor(tmp_path)


NO_OBJECT = ["", "[1]", "null", "5", '"a"', "{", "[" * 100000, "\x00"]
NO_SETTINGS = ['{"image_processor": 5}', '{"image_processor_type": []}']


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (name, content)
        for name in ("processor_config.json", "preprocessor_config.json", "config.json")
        for content in NO_OBJECT
    ]
    + [
        (name, content)
        for name in ("processor_config.json", "preprocessor_config.json")
        for content in NO_SETTINGS
    ],
)
def test_broken_files(make, tmp_path, name, content):
    make("mllama").save_pretrained(tmp_path)
    if name != "processor_config.json":
        (tmp_path / "processor_config.json").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mllama", {"size": {"height": 10**9, "width": 10**9}}),
        ("mllama", {"max_image_tiles": 10**9}),
        ("mllama", {"max_image_tiles": "4"}),
        ("mllama", {"size": "large"}),
        ("paligemma", {"image_seq_length": 10**12}),
        ("clip", {"crop_size": {"height": 10**9, "width": 10**9}}),
        ("clip", {"crop_size": {"height": -5, "width": -5}}),
        ("clip", {"crop_size": None, "do_center_crop": False}),
    ],
    ids=str,
)
def test_hostile_settings(make, tmp_path, family, changes):
    make(family).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"].update(changes)
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"size|max_image_tiles|image_seq_length|tokens|'<='"):
        load_processor(tmp_path)


def test_code_of_a_folder_is_not_run(make, tmp_path):
    make("text").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError):
        load_processor(tmp_path)


def test_nothing_is_loaded_from_elsewhere(make, monkeypatch, tmp_path):
    make("mllama").save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    settings["audio_tokenizer"] = {
        "audio_tokenizer_class": "DacModel",
        "audio_tokenizer_name_or_path": str(tmp_path / "elsewhere"),
    }
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(settings))
    (tmp_path / "model" / "audio_tokenizer_config.json").write_text(
        json.dumps(settings["audio_tokenizer"])
    )
    assert not hasattr(load_processor(tmp_path / "model"), "audio_tokenizer")


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model"):
        load_processor(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        load_processor(tmp_path)
    with pytest.raises(TypeError, match="path.*int"):
        load_processor(5)


def test_other_formats_go_to_their_readers(monkeypatch, tmp_path):
    for name in ("load_meta_processor", "load_gguf_tokenizer"):
        monkeypatch.setattr(
            f"mllama.hf.processors.auto.{name}", lambda path, name=name: (name, path)
        )
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "a.gguf"
    file.touch()
    assert load_processor(file) == load_processor(tmp_path / "one") == ("load_gguf_tokenizer", file)
    (tmp_path / "one" / "params.json").touch()
    assert load_processor(tmp_path / "one") == ("load_meta_processor", tmp_path / "one")


# ---- encode_messages
# ---------------------------------------------------------------------------------------------


def user(*parts):
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else part for part in parts
        ],
    }


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llava", "<image>" * 16 + "<bos>a b\n"),
        ("clip", "<bos>USER: " + "<image>" * 16 + "\na b ASSISTANT:"),
        (
            "mllama",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>a b<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("paligemma", "<image>" * 4 + "<bos>a b\n"),
    ],
)
def test_one_question(make, noise, tmp_path, family, expected):
    make(family).save_pretrained(tmp_path / "model")
    processor, image = load_processor(tmp_path / "model"), noise()
    image.save(tmp_path / "a.png")
    batch = encode_messages(processor, [{"role": "user", "content": "a b"}], [image])
    assert read(processor, batch) == expected
    place = {"type": "image"}
    for messages, images in [
        ([user(place, "a b")], [image]),
        ([user({**place, "image": np.array(image)}, "a b")], []),
        ([user({**place, "path": str(tmp_path / "a.png")}, "a b")], []),
        ([user({**place, "url": str(tmp_path / "a.png")}, "a b")], ()),
    ]:
        same = encode_messages(processor, messages, images)
        assert set(same) == set(batch) and all(
            torch.equal(same[name], batch[name]) for name in batch
        )
        assert all(isinstance(value, torch.Tensor) for value in batch.values())
    if family in ("clip", "mllama"):
        stock = AutoProcessor.from_pretrained(tmp_path / "model")
        options = {
            "add_generation_prompt": True,
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
        }
        theirs = stock.apply_chat_template([user({**place, "image": image}, "a b")], **options)
        assert set(theirs) == set(batch) and all(
            torch.equal(theirs[name], batch[name]) for name in batch
        )


@pytest.mark.parametrize("family", ["llava", "clip", "mllama", "paligemma", "text"])
def test_text_alone(make, tmp_path, family):
    make(family).save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    batch = encode_messages(processor, [{"role": "user", "content": "a b"}])
    assert (
        "a b" in read(processor, batch)
        and "pixel_values" not in batch
        and batch["input_ids"].shape[0] == 1
    )
    bos = getattr(processor, "tokenizer", processor).bos_token_id
    assert (batch["input_ids"] == bos).sum() == 1


def test_llama_takes_no_token_types(make_llama_tokenizer):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    for template in (TEXT_TEMPLATE, None):
        tokenizer = make_llama_tokenizer(chat_template=template, model_input_names=names)
        assert set(encode_messages(tokenizer, [user("a")])) == {"input_ids", "attention_mask"}
    processor = TiledProcessor(TiledImageProcessor(**SIZE), tokenizer)
    assert set(encode_messages(processor, [user("a")])) == {"input_ids", "attention_mask"}


def test_conversations(make, noise):
    processor, place = make("mllama"), {"type": "image"}
    messages = [
        user("a", place, "b"),
        {"role": "assistant", "content": "c"},
        user({**place, "image": noise(60, 20)}, "d", place),
    ]
    images = [noise(seed=1), noise(10, 90, 2)]
    batch = encode_messages(processor, messages, images)
    assert read(processor, batch).count("<|image|>") == 3 and "a<|image|>b<|eot_id|>" in read(
        processor, batch
    )
    expected = processor.image_processor([images[0], noise(60, 20), images[1]], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert (
        messages[2]["content"][0]["image"] is not None and len(messages[0]["content"]) == 3
    )  # the caller's, unchanged


def test_placeholders_written_in_the_text(make, noise):
    processor, image = make("mllama"), noise()
    expected = encode_messages(processor, [user({"type": "image"}, "a")], [image])
    batch = encode_messages(processor, [{"role": "user", "content": "<|image|>a"}], [image])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_templates_for_text_get_strings(make, noise, make_llama_tokenizer):
    processor = TiledProcessor(
        TiledImageProcessor(**SIZE), make_llama_tokenizer(), chat_template=TEXT_TEMPLATE
    )
    batch = encode_messages(processor, [user("a ", {"type": "image"}, "b")], [noise()])
    assert read(processor, batch) == "<|begin_of_text|>user: a <|image|>b\n"
    assert (
        read(make("text"), encode_messages(make("text"), [user("a ", "b")]))
        == "<|begin_of_text|>user: a b\n"
    )


JSON_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{{ message['content'] if "
    "message['content'] is string else message['content'] | tojson }}{{ '\n' }}{% endfor %}"
)
CALLED = [
    user("a"),
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    },
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": None},
    user("b"),
]


@pytest.mark.parametrize("family", ["llava", "clip", "mllama", "paligemma", "text"])
def test_an_assistant_without_content(make, tmp_path, family):
    make(family).save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    if family == "paligemma":
        processor.chat_template = CHAT_TEMPLATE
    said = [turn if turn.get("content") else turn | {"content": ""} for turn in CALLED]
    assert read(processor, encode_messages(processor, CALLED)) == read(
        processor, encode_messages(processor, said)
    )
    assert processor.apply_chat_template(CALLED, tokenize=False) == processor.apply_chat_template(
        said, tokenize=False
    )


@pytest.mark.parametrize(
    "template",
    [
        LLAVA_TEMPLATE,
        TEXT_TEMPLATE,
        templates.LLAMA_VISION,
        templates.CHATML,
        CHAT_TEMPLATE,
        JSON_TEMPLATE,
    ],
)
def test_texts_and_lists_of_parts_are_one(make, make_llama_tokenizer, template):
    """Some templates read one of the two alone: LLaVA's writes nothing of a text, Meta's the Python
    form of a system message's list, LFM2's a list as JSON.
    """
    messages = [
        {"role": role, "content": f" {role} {number} "}
        for number, role in enumerate(("system", "user", "assistant"))
    ]
    lists = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    for processor in (
        MllamaImageProcessor(make_llama_tokenizer(), 16, S, chat_template=template),
        with_answers(make_llama_tokenizer()),
    ):
        options = {"tokenize": False, "chat_template": template}
        written = processor.apply_chat_template(messages, **options)
        assert all(turn["content"].strip() in written for turn in messages)
        for other in (lists, [messages[0], *lists[1:]], [lists[0], *messages[1:]]):
            assert processor.apply_chat_template(other, **options) == written


def test_image_url_parts(make, noise, tmp_path):
    noise().save(tmp_path / "a.png")
    for processor in (make("llava"), make("mllama")):
        wanted = encode_messages(
            processor, [user({"type": "image", "path": str(tmp_path / "a.png")}, "a")]
        )
        for address in (str(tmp_path / "a.png"), {"url": str(tmp_path / "a.png")}):
            found = encode_messages(
                processor, [user({"type": "image_url", "image_url": address}, "a")]
            )
            assert set(found) == set(wanted) and all(
                torch.equal(found[name], wanted[name]) for name in wanted
            )


def test_no_template(make, make_llama_tokenizer, noise):
    processor = TiledProcessor(TiledImageProcessor(**SIZE), make_llama_tokenizer())
    assert (
        read(processor, encode_messages(processor, [user("a")], [noise()]))
        == "<|image|><|begin_of_text|>a"
    )
    tokenizer = make_llama_tokenizer(adds_bos=True)
    assert read(tokenizer, encode_messages(tokenizer, [user("a")])) == "<|begin_of_text|>a"
    with pytest.raises(ValueError, match="chat template"):
        encode_messages(processor, [user("a"), user("b")])


@pytest.mark.parametrize(
    ("family", "messages", "images", "error", "match"),
    [
        ("mllama", [], 0, ValueError, "messages is empty"),
        ("mllama", ["a"], 0, TypeError, "message 0"),
        ("mllama", [{"role": "user"}], 0, TypeError, "content of message 0"),
        ("mllama", [{"role": "user", "content": ["a"]}], 0, TypeError, "content of message 0"),
        ("mllama", [user({"type": "video"})], 0, ValueError, "type"),
        ("mllama", [user({"type": "text"})], 0, TypeError, "must hold a str as text, got NoneType"),
        (
            "mllama",
            [user({"type": "image"})],
            0,
            ValueError,
            r"places for 1 image\(s\), but 0 came",
        ),
        (
            "mllama",
            [user({"type": "image"})],
            2,
            ValueError,
            r"places for 1 image\(s\), but 2 came",
        ),
        (
            "mllama",
            [user({"type": "image", "image": Image.new("RGB", (9, 9))})],
            1,
            ValueError,
            r"places for 1 image\(s\), but 2 came",
        ),
        (
            "mllama",
            [user({"type": "image", "image": "a", "path": "b"})],
            0,
            ValueError,
            "must bring one image, got 2",
        ),
        (
            "mllama",
            [user({"type": "image", "path": "no/such.png"})],
            0,
            FileNotFoundError,
            "no such image",
        ),
        (
            "mllama",
            [user({"type": "image", "url": "https://x.org/a.png"})],
            0,
            ValueError,
            "allow_urls",
        ),
        ("mllama", [{"content": "a"}], 0, ValueError, "role"),
        ("text", [user("a")], 1, ValueError, "takes no images, got 1"),
        ("siglip", [user("a")], 0, TypeError, "processor"),
    ],
)
def test_bad_messages(make, noise, family, messages, images, error, match):
    with pytest.raises(error, match=match):
        encode_messages(make(family), messages, [noise()] * images)


@pytest.mark.parametrize("family", ["llava", "mllama", "paligemma"])
@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({}, ValueError, "text"),
        ({"text": []}, ValueError, "text"),
        ({"text": [None]}, TypeError, "text"),
        ({"text": 5}, TypeError, "text"),
        ({"images": []}, ValueError, "image|image"),
        ({"images": [None]}, (TypeError, ValueError), "image"),
        ({"text": ["PLACE a"]}, ValueError, "<"),
        ({"text": ["PLACE PLACE a"], "images": [["noise"]]}, ValueError, "<"),
        ({"text": ["PLACE a"], "images": [["noise", "noise"]]}, ValueError, "<"),
        ({"text": ["a"], "padding": "longst"}, ValueError, "padding"),
        ({"text": ["a"], "truncation": True, "max_length": -1}, ValueError, "max_length"),
        ({"text": ["a"], "return_tensors": "xx"}, ValueError, "return_tensors"),
        ({"text": ["PLACE a"], "images": [["noise"]], "size": "x"}, TypeError, "size"),
    ],
    ids=str,
)
def test_bad_calls_name_the_argument(make, noise, family, arguments, error, named):
    place = "<|image|>" if family == "mllama" else "<image>"
    given = {name: value for name, value in arguments.items() if name not in ("text", "images")}
    if "text" in arguments:
        text = arguments["text"]
        given["text"] = (
            [part.replace("PLACE", place) if isinstance(part, str) else part for part in text]
            if isinstance(text, list)
            else text
        )
    if "images" in arguments:
        given["images"] = [
            [noise() for _ in row] if isinstance(row, list) else row for row in arguments["images"]
        ]
    with pytest.raises(error, match=named) as raised:
        make(family)(**given)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_images_must_be_a_list(make, noise):
    with pytest.raises(TypeError, match="images.*Image"):
        encode_messages(make("mllama"), [user("a")], noise())


@pytest.mark.parametrize("family", ["llava", "clip", "mllama", "paligemma"])
def test_hostile_images(make, monkeypatch, tmp_path, noise, family):
    make(family).save_pretrained(tmp_path / "model")
    processor = load_processor(tmp_path / "model")
    noise(300, 200).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no image")
    for name in ("broken.png", "text.png", "model"):
        with pytest.raises(ValueError, match="cannot read the image|is a folder"):
            encode_messages(processor, [user("a")], [tmp_path / name])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50000)
    with pytest.raises(ValueError, match="300 x 200.*50000"):
        encode_messages(processor, [user("a")], [tmp_path / "whole.png"])
    for size in ((1, 1), (1, 3000), (3000, 1)):
        assert (
            encode_messages(processor, [user("a")], [Image.new("CMYK", size)])["pixel_values"]
            .isfinite()
            .all()
        )
