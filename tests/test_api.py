"""`mllama.load` and `mllama.ask`."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import mllama
import tiny
from helpers import answer, counted_images
from mllama import api, device
from mllama.hf.answering import GenerateSession, generate
from mllama.processing.conversation import encode_messages
from mllama.runtime.questions import encode, encode_questions, tokenizer_of

IMAGES = Path(__file__).parent.parent / "examples" / "pictures"


@pytest.fixture(scope="module")
def loaded(model_folder):
    return mllama.load(model_folder, dtype="float32", device="cpu")


def test_load_gives_what_was_asked_for_and_says_so_once(model_folder, capsys):
    api._say.cache_clear()
    for _ in range(2):
        model, processor = mllama.load(str(model_folder), dtype=torch.bfloat16, device="cpu")
    assert isinstance(model, mllama.MllamaForConditionalGeneration) and isinstance(
        processor, mllama.MllamaImageProcessor
    )
    assert (model.training, model.dtype, model.device) == (
        False,
        torch.bfloat16,
        torch.device("cpu"),
    )
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"mllama: {model_folder} in bfloat16 on cpu\n")


@pytest.mark.parametrize(
    ("features", "large", "dtype"),
    [
        (["avx2"], True, torch.float32),
        (["avx512_bf16"], True, torch.bfloat16),
        (["avx512_bf16"], False, torch.float32),
    ],
)
def test_load_chooses_the_dtype_by_the_cpu_and_the_size(
    model_folder, monkeypatch, features, large, dtype
):
    monkeypatch.setattr("mllama.device.cpu_features", lambda: features)
    if large:
        monkeypatch.setattr("mllama.device.SMALL_MODEL", 0)
    assert mllama.load(model_folder, device="cpu")[0].dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"path": IMAGES}, FileNotFoundError, "pictures has no config.json"),
        ({"path": 5}, TypeError, "path"),
        ({"path": ""}, ValueError, "path is empty"),
        ({"dtype": "int8"}, ValueError, "dtype"),
        ({"dtype": torch.float64}, ValueError, "dtype"),
        ({"device": "abacus"}, ValueError, "device 'abacus'"),
        ({"device": "cpu:1"}, ValueError, "device 'cpu:1'"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99'"),
    ],
)
def test_load_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        mllama.load(**arguments)


def test_load_refuses_a_folder_without_processor(loaded, tmp_path):
    loaded[0].save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no preprocessor_config.json"):
        mllama.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("tokenizer.json", ValueError, "cannot be read"),
        ("processor_config.json", ValueError, "processor_config.json is no JSON"),
    ],
)
def test_load_refuses_a_broken_processor(model_folder, tmp_path, file, error, message):
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    (folder / file).write_text("{")
    with pytest.raises(error, match=f"{folder}.* {message}"):
        mllama.load(folder)


FAMILIES = ["llama", "gemma", "llava, siglip", "llava, clip", "paligemma", "mllama"]
TEXT = ["llama", "gemma"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_and_asked(family_folder, image_file, family):
    model, processor = mllama.load(family_folder(family), dtype="float32", device="cpu")
    assert isinstance(model, mllama.MllamaForConditionalGeneration)
    image = None if family in TEXT else image_file
    inputs = encode(processor, image, "How many circles?")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
    expected = tokenizer_of(processor).decode(ids, skip_special_tokens=True).strip()
    assert (
        expected
        and mllama.ask(image, "How many circles?", model, processor, max_new_tokens=8) == expected
    )
    if family in TEXT:
        with pytest.raises(ValueError, match="takes no images"):
            mllama.ask(image_file, "How many circles?", model, processor)
    else:
        assert mllama.ask(None, "How many circles?", model, processor, max_new_tokens=8) != expected


def test_paligemma_is_asked_by_prefix(family_folder, image_file):
    processor = mllama.load(family_folder("paligemma"), device="cpu")[1]
    inputs = encode(processor, image_file, "detect circle")
    assert (
        processor.tokenizer.decode(inputs["input_ids"][0])
        == "<image>" * tiny.PATCHES + "<bos>detect circle\n"
    )
    assert not inputs["token_type_ids"].any()


def test_a_siglip_comes_with_its_image_processor(family_folder, image_file):
    model, processor = mllama.load(family_folder("siglip"), device="cpu")
    assert isinstance(model, mllama.SiglipModel)
    with torch.inference_mode():
        assert model(
            **processor(Image.open(image_file), return_tensors="pt")
        ).pooler_output.shape == (1, tiny.VISION["hidden_size"])
    with pytest.raises(ValueError, match="decoder"):
        mllama.ask(image_file, "How many?", model, processor)


def test_the_reference_is_passed_on(family_folder):
    assert [
        mllama.load(family_folder("mllama"), reference=name)[0].reference for name in ("meta", "hf")
    ] == ["meta", "hf"]
    with pytest.raises(ValueError, match="reference.*google"):
        mllama.load(family_folder("mllama"), reference="google")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_the_dtype_goes_by_the_cuda_device(monkeypatch, capability, dtype):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert device.choose_dtype(torch.device("cuda"), 0) == dtype
    assert device.choose_dtype(torch.device("mps"), 2**40) == torch.float32


def test_a_chat_template_that_fails_is_a_value_error(model_folder, image_file):
    processor = mllama.MllamaImageProcessor.from_pretrained(model_folder)
    processor.chat_template = "{{ raise_exception('no images here') }}"
    with pytest.raises(ValueError, match="chat template fails: no images here"):
        encode(processor, image_file, "How many?")


def test_ask_is_greedy_generation_from_the_processors_layout(loaded, image_file):
    model, processor = loaded
    with Image.open(image_file) as image:
        inputs = processor(["How many circles?"], [image])
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert expected
        assert (
            mllama.ask(image, "How many circles?", model, processor, max_new_tokens=12) == expected
        )
    for temperature in (0, 1e-40):
        assert (
            mllama.ask(
                image_file,
                "How many circles?",
                *loaded,
                max_new_tokens=12,
                temperature=temperature,
                top_k=5,
            )
            == expected
        )


def test_ask_samples_when_told_to(loaded, image_file):
    answers = set()
    for seed in range(8):
        torch.manual_seed(seed)
        answers.add(
            mllama.ask(image_file, "How many circles?", *loaded, max_new_tokens=4, temperature=5.0)
        )
    assert len(answers) > 1


def test_a_model_that_accelerate_offloads(model_folder, image_file):
    accelerate = pytest.importorskip("accelerate")
    model, processor = mllama.load(model_folder)
    given = image_file, "How many circles?", model, processor
    expected = mllama.ask(*given, max_new_tokens=6)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert mllama.ask(*given, max_new_tokens=6) == expected


def test_stop_strings_are_read_by_the_processors_tokenizer(loaded, image_file):
    whole = mllama.ask(image_file, "How many circles?", *loaded, max_new_tokens=12)
    stop = whole[3]
    for questions in ("How many circles?", ["How many circles?"] * 2):
        answers = mllama.ask(image_file, questions, *loaded, max_new_tokens=12, stop_strings=[stop])
        for each in [answers] if isinstance(answers, str) else answers:
            assert len(each) < len(whole) and whole.startswith(each) and stop in each


def test_an_answer_ends_where_the_context_does(loaded, image_file):
    inputs = encode(loaded[1], image_file, "a b c d " * 60)
    room = 512 - inputs["input_ids"].shape[1]
    assert 0 < room < 300
    assert len(answer(*loaded, inputs, max_new_tokens=1000, min_new_tokens=room).token_ids) == room


@pytest.mark.parametrize(
    ("image", "question", "error", "message"),
    [
        (5, "How many?", TypeError, "image"),
        ("nowhere.png", "How many?", FileNotFoundError, "nowhere.png"),
        (__file__, "How many?", ValueError, "cannot read the image"),
        ("circle", 3, TypeError, "question"),
        ("circle", " \n", ValueError, "question is empty"),
        ("circle", "what <image>?", ValueError, "question"),
        ("circle", "what \udcff?", ValueError, r"question is no valid UTF-8 text, at '\\udcff'"),
        ("circle", "a b c d " * 200, ValueError, "this model takes 512, answer included"),
    ],
)
def test_ask_refuses(loaded, image_file, image, question, error, message):
    with pytest.raises(error, match=message):
        mllama.ask(image_file if image == "circle" else image, question, *loaded)


def test_ask_refuses_half_a_pair(loaded, image_file):
    for half in ({"model": loaded[0]}, {"processor": loaded[1]}):
        with pytest.raises(ValueError, match="model and processor"):
            mllama.ask(image_file, "How many?", **half)


def test_ask_refuses_what_is_no_model_or_no_processor(loaded, image_file):
    model, processor = loaded
    for arguments, name in (
        ((5, processor), "model"),
        ((processor, model), "model"),
        ((model, 5), "processor"),
    ):
        with pytest.raises(TypeError, match=name):
            mllama.ask(image_file, "How many?", *arguments)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"max_new_tokens": "5"}, TypeError, "max_new_tokens"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"num_beams": 0}, ValueError, "num_beams"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"top_p": "most"}, TypeError, "top_p"),
        ({"top_k": 2.5}, TypeError, "top_k"),
        ({"do_sample": "no"}, TypeError, "do_sample"),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id"),
    ],
)
def test_ask_refuses_options(loaded, image_file, option, error, message):
    with pytest.raises(error, match=message):
        mllama.ask(image_file, "How many?", *loaded, **option)


def test_ask_about_several_images(family_folder, image_file):
    model, processor = mllama.load(family_folder("mllama"), dtype="float32", device="cpu")
    other = Image.open(image_file).transpose(Image.Transpose.ROTATE_90)
    inputs = encode_messages(
        processor, [{"role": "user", "content": "What changed?"}], [image_file, other]
    )
    expected = answer(model, processor, inputs, max_new_tokens=8).text
    asked = {"model": model, "processor": processor, "max_new_tokens": 8}
    assert mllama.ask([image_file, other], "What changed?", **asked) == expected
    assert mllama.ask(image_file, "What changed?", **asked) != expected


@pytest.mark.parametrize("family", FAMILIES)
def test_several_questions_are_answered_as_each_alone(family_folder, image_file, family):
    model, processor = mllama.load(family_folder(family), dtype="float32", device="cpu")
    asked = {"model": model, "processor": processor, "max_new_tokens": 8}
    questions = ["How many circles?", "a b c d a b c d", "What color is it?"]
    image = None if family in TEXT else image_file
    alone = [mllama.ask(image, question, **asked) for question in questions]
    assert mllama.ask(image, questions, **asked) == alone and len(set(alone)) > 1
    if family not in TEXT:
        with open(image_file, "rb") as file:
            assert mllama.ask(file, questions, **asked) == alone
        each = [Image.open(image_file).rotate(90), None, [image_file]]
        assert mllama.ask(each, questions, **asked) == [
            mllama.ask(*pair, **asked) for pair in zip(each, questions, strict=True)
        ]


def test_answers_of_a_batch_end_where_each_alone_does(loaded, image_file):
    model, processor = loaded
    questions = ["How many circles?", "What color is it?"]
    inputs = encode_questions(processor, [[image_file]] * 2, questions)
    session = GenerateSession(model, processor)
    plain = session.generate(inputs, max_new_tokens=8).completions
    first = tokens_of(model, inputs)[0]
    end = next(token for number, token in enumerate(first) if number and token != first[0])
    ended = session.generate(inputs, max_new_tokens=8, eos_token_id=end).completions
    assert len(plain[0].token_ids) == 8
    assert ended[0].token_ids == first[: first.index(end) + 1]
    as_tensor = session.generate(inputs, max_new_tokens=8, eos_token_id=torch.tensor([end]))
    assert as_tensor.completions == ended


def test_texts_of_a_batch_are_told_of_at_its_end(loaded, image_file):
    model, processor = loaded
    questions = ["How many circles?", "What colour is it?"]
    inputs, told = encode_questions(processor, [[image_file]] * 2, questions), []
    found = GenerateSession(model, processor).generate(
        inputs, max_new_tokens=4, on_text=lambda row, text: told.append((row, text))
    )
    assert told == [(row, answer.text) for row, answer in enumerate(found.completions)]


def tokens_of(model, inputs) -> list[list[int]]:
    return generate(model, inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_system_prompt_is_written_by_the_template(family_folder):
    processor = mllama.load(family_folder("llama"), device="cpu")[1]
    assert (
        processor.decode(encode(processor, None, "a", system="b c")["input_ids"][0])
        == "system: b c\nuser: a\n"
    )
    processor.chat_template = (
        "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match="system"):
        encode(processor, None, "a", system="b c")
    with pytest.raises(ValueError, match="no chat template"):
        encode(mllama.load(family_folder("paligemma"), device="cpu")[1], None, "a", system="b c")


@pytest.mark.parametrize(
    "pair",
    [
        ("How many?", "FILE"),
        ("How many?", "IMAGE"),
        ("How many?", "BYTES"),
        (["How many?", "Where?"], "FILE"),
    ],
)
def test_swapped_arguments_are_told(loaded, image_file, pair):
    forms = {
        "FILE": str(image_file),
        "IMAGE": Image.open(image_file),
        "BYTES": image_file.read_bytes(),
    }
    with pytest.raises(ValueError, match="swapped"):
        mllama.ask(pair[0], forms[pair[1]], *loaded)


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"temprature": 0.5}, "temperature"),
        ({"pixel_values": 0}, "pixel_values"),
        ({"top_n": 1}, "top_"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(loaded, image_file, option, near):
    with pytest.raises(
        TypeError, match=f"{next(iter(option))}.*{near}" if near not in option else near
    ):
        mllama.ask(image_file, "How many?", *loaded, **option)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2},
        {"output_scores": True},
        {"do_sample": False, "temperature": 0.5},
        {"do_sample": False, "top_k": 5},
    ],
)
def test_options_without_effect_are_refused(loaded, image_file, options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        mllama.ask(image_file, "How many?", *loaded, **options)


def test_urls_take_permission(loaded):
    with pytest.raises(ValueError, match="allow_urls"):
        mllama.ask("https://localhost/a.png", "How many?", *loaded)
    with pytest.raises(TypeError, match="allow_urls"):
        mllama.ask("https://localhost/a.png", "How many?", *loaded, allow_urls="yes")
    with pytest.raises(ValueError, match="cannot download"):
        mllama.ask("http://127.0.0.1:9/a.png", "How many?", *loaded, allow_urls=True)


def test_as_many_images_as_questions(loaded, image_file):
    with pytest.raises(ValueError, match="2 for 3"):
        mllama.ask([image_file] * 2, ["a", "b", "c"], *loaded)
    with pytest.raises(ValueError, match="empty"):
        mllama.ask(image_file, [], *loaded)
    with pytest.raises(TypeError, match="question"):
        mllama.ask(image_file, ["a", 5], *loaded)


def test_the_embedded_model_says_what_it_cannot_do(capsys):
    api._say.cache_clear()
    api._embedded.cache_clear()
    with pytest.raises(ValueError, match="about an image and no others"):
        mllama.ask(None, "What is the capital of France?")
    assert "its answers mean nothing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="about an image and no others"):
        mllama.ask(None, "What is the capital of France?", *mllama.load())


@pytest.mark.parametrize("family", ["llava, siglip", "llava, clip", "paligemma", "mllama"])
def test_questions_about_an_image_encode_it_once(family, family_folder, image_file):
    model, processor = mllama.load(family_folder(family), dtype="float32", device="cpu")
    questions, options = ["How many?", "a b"], {"max_new_tokens": 6}

    def ask(question):
        return mllama.ask(image_file, question, model, processor, **options)

    expected = [
        answer(model, processor, encode(processor, image_file, question), **options).text
        for question in questions
    ]
    with counted_images(model) as images:
        assert [ask(question) for question in questions] == expected == ask(questions)
        assert images.call_count == 0  # by the answers that were expected
    parameter = next(model.vision_tower.parameters())
    parameter.data.mul_(-2)  # a step of training
    with counted_images(model) as images:
        changed = [ask(question) for question in questions]
        assert images.call_count == 1
    hook = model.vision_tower.register_forward_hook(lambda module, given, output: None)
    with counted_images(model) as images:
        assert [ask(question) for question in questions] == changed
        assert images.call_count == 2  # hooks want to see it
    hook.remove()


def test_options_of_generate_alone_get_the_pixels(loaded, image_file):
    with counted_images(loaded[0]) as images:
        for _ in range(2):
            mllama.ask(image_file, "a b", *loaded, max_new_tokens=4, num_beams=2)
        assert images.call_count == 2


def test_the_embedded_model_encodes_an_image_once():
    model = api._embedded(False)[0]
    picture = IMAGES / "drawn.png"
    mllama.ask(picture, "How many objects are there?")
    with counted_images(model) as images:
        mllama.ask(picture, "Where is the star?")
        assert images.call_count == 0
