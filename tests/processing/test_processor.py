import json

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from tokenizers import normalizers
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllama import MllamaImageProcessor

N, S = 16, 32  # 4 x 4 patches of 8 pixels
QUESTION = "How many circles?"
RUN = "<image>" * N


def random_image(seed=0, size=(50, 37)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def messages(*content, role="user"):
    return [
        {
            "role": role,
            "content": [
                part if isinstance(part, dict) else {"type": "text", "text": part}
                for part in content
            ],
        }
    ]


def part(image):
    return {"type": "image", "image": image}


def text_of(processor, batch):
    return [
        processor.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.fixture
def processor(make_tokenizer):
    return MllamaImageProcessor(make_tokenizer(), N, S)


# ---- layout and calls
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_layout_and_output(make_tokenizer, bos):
    processor = MllamaImageProcessor(make_tokenizer(bos), N, S)
    batch = processor([QUESTION], [random_image()], padding=True)
    assert text_of(processor, batch) == [RUN + "<bos>" * bos + QUESTION + "\n"]
    assert sorted(batch.keys()) == ["attention_mask", "input_ids", "pixel_values"]
    assert (
        batch["input_ids"].dtype == torch.int64
        and (batch["input_ids"] == processor.image_token_id).sum() == N
    )
    assert (
        batch["pixel_values"].shape == (1, 3, S, S) and batch["pixel_values"].dtype == torch.float32
    )
    assert (
        processor.IMAGE_TOKEN == "<image>"
        and processor.image_seq_length == N
        and processor.image_size == S
    )


def test_every_way_to_call_it(processor):
    image, expected = random_image(), processor([QUESTION], [random_image()])
    calls = [
        processor(images=image, text=QUESTION, return_tensors="pt"),
        processor(QUESTION, image),
        processor(QUESTION, np.array(image)),
        processor([QUESTION], [[image]], padding="longest", truncation=True),
        processor(image, QUESTION),  # transformers' order
        processor([image], [QUESTION]),
        processor(text=["<image><bos>" + QUESTION + "\n"], images=[image]),
        processor(["<bos>" + QUESTION], [image]),
    ]
    for batch in calls:
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_images_from_files(processor, tmp_path):
    random_image().save(tmp_path / "a.png")
    expected = processor(QUESTION, random_image())
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), [str(tmp_path / "a.png")]):
        assert torch.equal(processor(QUESTION, path)["pixel_values"], expected["pixel_values"])
    assert torch.equal(processor(tmp_path / "a.png", QUESTION)["input_ids"], expected["input_ids"])


def test_placeholders_and_pixel_values_never_disagree(processor, monkeypatch):
    double = {"pixel_values": torch.zeros(2, 3, S, S)}
    monkeypatch.setattr(
        type(processor.image_processor), "__call__", lambda self, images, **kwargs: double
    )
    with pytest.raises(ValueError, match="pixel_values 2"):
        processor(QUESTION, random_image())


def test_text_alone_and_images_alone(processor):
    batch = processor("hello")
    assert text_of(processor, batch) == ["<bos>hello\n"] and list(batch) == [
        "input_ids",
        "attention_mask",
    ]
    assert text_of(processor, processor(["hello", "a b c"], None)) == [
        "<bos>hello\n",
        "<bos>a b c\n",
    ]
    images = processor(images=[random_image(0), random_image(1)])
    assert list(images) == ["pixel_values"] and images["pixel_values"].shape == (2, 3, S, S)
    assert torch.equal(processor(random_image(1))["pixel_values"], images["pixel_values"][1:])


def test_several_images(processor):
    images = [random_image(seed) for seed in range(3)]
    pixels = torch.cat([processor(images=image)["pixel_values"] for image in images])
    for text, given, expected in [
        ("a", images, [RUN * 3 + "<bos>a\n"]),
        (["a <image> b <image>", "<image>c"], images, [f"a {RUN} b {RUN}", RUN + "c"]),
        (
            ["a", "b <image>", "c"],
            [images[:2], images[2:], None],
            [RUN * 2 + "<bos>a\n", "b " + RUN, "<bos>c\n"],
        ),
        (["a", "b", "c"], images, [RUN + "<bos>a\n", RUN + "<bos>b\n", RUN + "<bos>c\n"]),
    ]:
        batch = processor(text, given)
        assert text_of(processor, batch) == expected
        assert torch.equal(batch["pixel_values"], pixels)


def test_padding(processor, make_tokenizer):
    texts = ["a", "a b c d"]
    batch = processor(texts)
    assert (
        batch["attention_mask"][0, 0] == 0
        and batch["input_ids"][0, 0] == processor.tokenizer.pad_token_id
    )  # the tokenizer's side
    assert processor(texts, padding_side="right")["attention_mask"][0, -1] == 0
    assert processor(texts, padding="max_length", max_length=40)["input_ids"].shape == (2, 40)
    ragged = processor(texts, [random_image(), random_image()], padding=False, return_tensors=None)
    assert len(ragged["input_ids"][0]) < len(ragged["input_ids"][1]) and isinstance(
        ragged["pixel_values"], np.ndarray
    )
    arrays = processor(texts, [random_image(), random_image()], return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray) and isinstance(
        arrays["pixel_values"], np.ndarray
    )
    without = MllamaImageProcessor(make_tokenizer(pad=False), N, S)
    assert without(texts)["input_ids"][0, 0] == without.tokenizer.eos_token_id


def test_truncation_never_cuts_an_image(processor):
    batch = processor(
        "a b c d a b c d", random_image(), truncation=True, max_length=N + 3, padding=False
    )
    assert batch["input_ids"].shape == (1, N + 3)
    for side in ("right", "left"):
        processor.tokenizer.truncation_side = side
        with pytest.raises(ValueError, match="max_length"):
            processor("a <image> b", random_image(), truncation=True, max_length=N - 1)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_never_doubled(make_tokenizer, adds_bos):
    # A tokenizer that has a template of its own keeps its habits.
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    tokenizer.chat_template = (
        "{% for part in messages[0]['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    )
    processor = MllamaImageProcessor(tokenizer, N, S)
    own = "<bos>" * adds_bos
    for text, images, expected in [
        ("a", random_image(), RUN + "<bos>a\n"),
        ("a", None, "<bos>a\n"),
        ("<image>a", random_image(), own + RUN + "a"),
        ("<bos><image>a", random_image(), "<bos>" + RUN + "a"),
        ("<image><bos>a", random_image(), RUN + "<bos>a"),
    ]:
        assert text_of(processor, processor(text, images, add_special_tokens=True)) == [expected]
    batch = processor(["<image>a", "b", "<image><bos>c"], [random_image()] * 2)
    assert text_of(processor, batch) == [own + RUN + "a", "<bos>b\n", RUN + "<bos>c"]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            lambda: {"text": "a <image>", "images": [random_image(), random_image()]},
            ValueError,
            r"hold 1 <image> .* got 2 image",
        ),
        (lambda: {"text": "a <image>"}, ValueError, r"hold 1 <image> .* got 0 image"),
        (
            lambda: {"text": ["a", "b"], "images": random_image()},
            ValueError,
            "1 image.* for 2 prompts",
        ),
        (lambda: {}, ValueError, "give text, images, or both"),
        (lambda: {"text": []}, ValueError, "text is an empty list"),
        (lambda: {"text": 5, "images": random_image()}, TypeError, "text"),
        (
            lambda: {"text": random_image(), "images": random_image()},
            TypeError,
            r"processor\(text=\.\.\., images=\.\.\.\)",
        ),
        (lambda: {"text": "a", "images": 5}, TypeError, "got int"),
        (lambda: {"text": "a", "images": ["no/such.png"]}, FileNotFoundError, "no/such.png"),
        (lambda: {"text": "a", "videos": [1]}, TypeError, "no videos and no audio"),
        (
            lambda: {"text": "a", "images": [np.zeros((2, 9, 9, 3), np.uint8)]},
            ValueError,
            r"got shape \(2, 9, 9, 3\): use list",
        ),
        (
            lambda: {"text": ["a"], "images": [[torch.zeros(2, 3, 9, 9)]]},
            ValueError,
            r"got shape \(2, 3, 9, 9\): use list",
        ),
        (
            lambda: {"text": ["a"], "images": [[[random_image(), random_image()]]]},
            ValueError,
            "images are nested too deeply",
        ),
        (
            lambda: {"text": "a", "images": random_image(), "image_mean": "x"},
            ValueError,
            "image_mean",
        ),
        (
            lambda: {"text": "a", "images": random_image(), "image_std": [0, 1, 1]},
            ValueError,
            "image_std",
        ),
        (
            lambda: {"images": random_image(), "images_kwargs": {"image_mean": [0, 1]}},
            ValueError,
            "image_mean",
        ),
    ],
)
def test_bad_calls(processor, arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        processor(**arguments())
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_image_token": 0}, ValueError, "num_image_token"),
        ({"num_image_token": 16.0}, TypeError, "num_image_token"),
        ({"image_size": -1}, ValueError, "image_size"),
        ({"image_size": True}, TypeError, "image_size"),
        ({"image_std": (1, 1, 0)}, ValueError, "image_std"),
        ({"image_mean": "x"}, ValueError, "image_mean"),
        ({"image_mean": [0, 1]}, ValueError, "image_mean"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, ValueError, "image_mean"),
        ({"image_token": ""}, ValueError, "image_token"),
        ({"image_token": None}, TypeError, "image_token"),
        ({"tokenizer": "gpt2"}, TypeError, "Received a str for argument tokenizer"),
    ],
)
def test_bad_construction(make_tokenizer, arguments, error, match):
    with pytest.raises(error, match=match):
        MllamaImageProcessor(
            **{"tokenizer": make_tokenizer(), "num_image_token": N, "image_size": S, **arguments}
        )


# ---- the tokenizer
# ---------------------------------------------------------------------------------------------


def test_image_token_is_added_once(make_tokenizer):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    first = MllamaImageProcessor(tokenizer, N, S)
    assert len(tokenizer) == size + 1 and first.image_token_id == size
    assert (
        MllamaImageProcessor(tokenizer, N, S).image_token_id == size and len(tokenizer) == size + 1
    )
    assert first.decode([size], skip_special_tokens=True) == "" and first.batch_decode(
        [[size]]
    ) == ["<image>"]
    assert {"input_ids", "pixel_values"} <= set(first.model_input_names)


def test_location_tokens(make_tokenizer):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    MllamaImageProcessor(tokenizer, N, S, location_tokens=True)
    assert len(tokenizer) == size + 1 + 1024 + 128
    assert tokenizer.convert_ids_to_tokens(tokenizer("<loc0007><seg127>")["input_ids"]) == [
        "<loc0007>",
        "<seg127>",
    ]


def test_location_tokens_of_a_tokenizer_that_puts_a_space_before_a_text(make_tokenizer):
    """As Llama 2's does: a token that it normalized would be found behind a space alone, and
    swallow it.
    """
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    MllamaImageProcessor(tokenizer, N, S, location_tokens=True)
    assert {"<loc0007>", "<seg127>"} < set(
        tokenizer.convert_ids_to_tokens(tokenizer("a<loc0007><seg127> b")["input_ids"])
    )


# ---- pixel values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 37), (640, 480), (31, 333), (32, 32), (1, 1)])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"resample": 2},
        {"do_normalize": False},
        {"do_resize": False},
        {"size": {"height": 8, "width": 40}},
    ],
    ids=str,
)
def test_pixel_values_are_stock(processor, size, overrides):
    stock = SiglipImageProcessorPil(size={"height": S, "width": S})
    image = random_image(size=size)
    expected = stock(image, return_tensors="pt", **overrides)["pixel_values"]
    assert torch.equal(processor(images=image, **overrides)["pixel_values"], expected)
    assert torch.equal(
        processor.image_processor(image, return_tensors="pt", **overrides)["pixel_values"], expected
    )


def test_mean_and_deviation(make_tokenizer):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    processor = MllamaImageProcessor(make_tokenizer(), N, S, image_mean=mean, image_std=std)
    stock = SiglipImageProcessorPil(
        size={"height": S, "width": S}, image_mean=list(mean), image_std=list(std)
    )
    assert torch.equal(
        processor(images=random_image())["pixel_values"],
        stock(random_image(), return_tensors="pt")["pixel_values"],
    )


# ---- chat template
# ---------------------------------------------------------------------------------------------


def test_chat_template_gives_the_layout(processor):
    image = random_image()
    plain = processor([QUESTION], [image])
    for content in ((part(image), QUESTION), (QUESTION, part(image))):
        batch = processor.apply_chat_template(
            messages(*content), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
    written = processor.apply_chat_template(messages(part(image), QUESTION))
    assert written == f"<image><bos>{QUESTION}\n"
    assert torch.equal(processor(written, image)["input_ids"], plain["input_ids"])
    assert (
        processor.apply_chat_template([{"role": "user", "content": f"<image>\n{QUESTION}"}])
        == written
    )
    ids = processor.apply_chat_template(messages(part(image), QUESTION), tokenize=True)
    assert torch.equal(ids, plain["input_ids"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x <image> y", "<image><bos>x  y\n"),
        ([{"type": "text", "text": "x <image> y"}], "<image><bos>x  y\n"),
        (
            [
                {"type": "image"},
                {"type": "text", "text": "x"},
                {"type": "text", "text": "<image>y"},
            ],
            "<image><image><bos>xy\n",
        ),
    ],
)
def test_chat_template_moves_written_images_to_the_front(processor, content, expected):
    assert processor.apply_chat_template([{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize("text", ["<ima<image>ge> hi", "<im<image><image>age>"])
@pytest.mark.parametrize("as_part", [False, True])
def test_chat_template_refuses_nested_images(processor, text, as_part):
    content = [{"type": "text", "text": text}] if as_part else text
    with pytest.raises(TemplateError, match="one <image> inside another"):
        processor.apply_chat_template([{"role": "user", "content": content}])


def test_chat_template_of_several_turns(make_tokenizer):
    for bos in (True, False):
        processor = MllamaImageProcessor(make_tokenizer(bos), N, S)
        turns = (
            messages(part(random_image()), "a")
            + messages("b", role="assistant")
            + messages(part(random_image(1)), "c")
        )
        assert (
            processor.apply_chat_template(turns)
            == "<image><image>" + "<bos>" * bos + "a\nb<eos>c\n"
        )
        text_only = messages("a") + messages("b", role="assistant")
        batch = processor.apply_chat_template(text_only, tokenize=True, return_dict=True)
        assert (
            text_of(processor, batch) == ["<bos>" * bos + "a\nb<eos>"]
            and "pixel_values" not in batch
        )


def test_chat_template_of_a_batch(processor):
    conversations = [
        messages(part(random_image()), "a"),
        messages("a b c d"),
        messages(part(random_image(1)), part(random_image(2)), "d"),
    ]
    batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
    assert text_of(processor, batch) == [RUN + "<bos>a\n", "<bos>a b c d\n", RUN * 2 + "<bos>d\n"]
    assert batch["pixel_values"].shape == (3, 3, S, S)


def test_chat_template_marks_the_answers(processor):
    turns = messages(part(random_image()), "a b") + messages("c d", role="assistant")
    batch = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = [
        token
        for token, mark in zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True)
        if mark
    ]
    assert processor.decode(answer) == "c d<eos>"


def test_a_template_that_forgets_the_image(processor):
    with pytest.raises(ValueError, match="prompt 0.*<image>"):
        processor.apply_chat_template(
            messages(part(random_image()), "a"),
            chat_template="nothing",
            tokenize=True,
            return_dict=True,
        )


# ---- on disk
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "adds_bos"), [(True, False), (True, True), (False, False)])
def test_stock_autoprocessor_gives_the_same(make_tokenizer, tmp_path, bos, adds_bos):
    processor = MllamaImageProcessor(make_tokenizer(bos, adds_bos), N, S, location_tokens=True)
    written = processor.save_pretrained(tmp_path)
    names = [
        "chat_template.jinja",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [str(tmp_path / name) for name in names] == written and sorted(
        path.name for path in tmp_path.iterdir()
    ) == names
    on_disk = (tmp_path / "processor_config.json").read_text() + (
        tmp_path / "tokenizer_config.json"
    ).read_text()
    assert "MllamaImageProcessor" not in on_disk and "SquareImageProcessor" not in on_disk
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == "LlavaProcessor" and settings["patch_size"] == S // 4
    assert (
        settings["vision_feature_select_strategy"] == "full"
        and settings["num_additional_image_tokens"] == 0
    )

    stock, again = (
        AutoProcessor.from_pretrained(tmp_path),
        MllamaImageProcessor.from_pretrained(tmp_path),
    )
    assert type(stock) is LlavaProcessor and type(stock.image_processor) is SiglipImageProcessorPil
    asked = messages(part(random_image()), QUESTION)
    turns = (
        asked + messages("two", role="assistant") + messages(part(random_image(1)), "What color?")
    )
    for conversation in (asked, turns, [asked, turns], messages("no image")):
        # The stock processor has no padding by default, and refuses images beside prompts without
        # any.
        padded = {
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
            "processor_kwargs": {"padding": True},
        }
        expected = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
        for other in (
            stock.apply_chat_template(conversation, **padded),
            again.apply_chat_template(conversation, **padded),
        ):
            assert set(other) == set(expected) and all(
                torch.equal(other[name], expected[name]) for name in expected
            )
    assert torch.equal(
        again([QUESTION], [random_image()])["input_ids"],
        processor([QUESTION], [random_image()])["input_ids"],
    )
    assert (again.image_seq_length, again.image_size, again.image_token_id) == (
        N,
        S,
        processor.image_token_id,
    )


def test_saving_again_changes_nothing(processor, tmp_path):
    processor.save_pretrained(tmp_path / "a")
    MllamaImageProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


@pytest.mark.parametrize("strategy", ["full", "default", None])
@pytest.mark.parametrize(
    "image_processor",
    [
        SiglipImageProcessorPil(
            size={"height": 30, "width": 30}, image_mean=[0.4, 0.5, 0.6], resample=2
        ),
        CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 30, "width": 30}),
    ],
    ids=["siglip", "clip", "clip padded"],
)
def test_reads_other_llava_folders(make_tokenizer, tmp_path, strategy, image_processor):
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = (
        "USER: {% for part in messages[0]['content'] if part['type'] == 'image' %}<image>"
        "{% endfor %}\nASSISTANT:"
    )
    stock = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=template,
    )
    stock.save_pretrained(tmp_path)
    ours = MllamaImageProcessor.from_pretrained(tmp_path)
    assert ours.image_seq_length == 17 - (strategy == "default")
    for text in ("<image>a b", "a", "<image>\n<image>"):
        images = [random_image(seed) for seed in range(text.count("<image>"))] or None
        batch, expected = (
            ours(text, images, as_is=True),
            stock(images=images, text=text, return_tensors="pt"),
        )
        assert set(batch) == set(expected) and all(
            torch.equal(batch[name], expected[name]) for name in expected
        )
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (
        tmp_path / "processor_config.json"
    ).read_text()


def test_refuses_other_families(make_tokenizer, processor, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tiled = LlavaProcessor(
        MllamaImageProcessorPil(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
    )
    tiled.save_pretrained(tmp_path / "tiled")
    with pytest.raises(ValueError, match="holds a MllamaImageProcessor"):
        MllamaImageProcessor.from_pretrained(tmp_path / "tiled")

    (tmp_path / "gemma").mkdir()  # as older folders are: no processor_config.json
    older = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "size": {"height": S, "width": S},
    }
    (tmp_path / "gemma" / "preprocessor_config.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="holds a PaliGemmaProcessor"):
        MllamaImageProcessor.from_pretrained(tmp_path / "gemma")
    with pytest.raises(OSError):
        MllamaImageProcessor.from_pretrained(tmp_path)

    processor.save_pretrained(tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "processor_config.json").read_text())
    for changes, match in [
        ({"processor_class": "MllamaProcessor"}, "holds a MllamaProcessor"),
        ({"patch_size": None}, "patch_size within it"),
        ({"patch_size": 33}, "patch_size within it"),
        (
            {
                "image_processor": {
                    **settings["image_processor"],
                    "size": {"height": 32, "width": 16},
                }
            },
            "square size",
        ),
    ]:
        (tmp_path / "ours" / "processor_config.json").write_text(
            json.dumps({**settings, **changes})
        )
        with pytest.raises(ValueError, match=match):
            MllamaImageProcessor.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("tokens", [1, 15, 16, 5000])
def test_any_number_of_placeholders_is_written(make_tokenizer, tokens, tmp_path):
    MllamaImageProcessor(make_tokenizer(), tokens, S).save_pretrained(tmp_path)
    for read in (
        MllamaImageProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        ids = read(text="<image>a", images=[random_image()], return_tensors="pt")["input_ids"]
        assert (ids == read.image_token_id).sum() == tokens
