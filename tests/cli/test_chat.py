"""`mllama chat`."""

import json
import shutil

import pytest
import torch
from PIL import Image

import mllama
from helpers import answer
from mllama.model.model import VisionLanguageModel
from mllama.runtime.completion import Row
from mllama.runtime.questions import encode
from processing import templates


def test_chat_answers_in_the_light_of_what_was_said(run, loaded, options, image_file):
    processor = loaded[1]
    inputs = encode(processor, image_file, "How many circles?")
    first = answer(*loaded, inputs, max_new_tokens=8)
    # The answer stays the tokens that it was.
    rest = processor.tokenizer.encode("<eos>a b c\n", add_special_tokens=False)
    ids = inputs["input_ids"][0].tolist() + first.token_ids + rest
    inputs = inputs | {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    second = answer(*loaded, inputs, max_new_tokens=8)
    code, out, _ = run(
        "chat", image_file, *options, stdin="How many circles?\n\n a b c \n/exit\nWhat color?\n"
    )
    expected = [first.text, second.text]
    assert (code, [line.strip() for line in out.splitlines()]) == (0, expected)


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(run, options, image_file):
    code, _, err = run("chat", image_file, *options, stdin=f"{'a b c d ' * 20}\n" * 8)
    assert (code, err.count("\n")) == (0, 1)


def test_a_bad_question_does_not_end_the_chat(run, options, image_file):
    _, plain, _ = run("chat", image_file, *options, stdin="How many circles?\na b c\n")
    bad = f"what <image>?\n{'a b c d ' * 2000}\nwhat \udcff?\n"
    code, out, err = run("chat", image_file, *options, stdin=f"How many circles?\n{bad}a b c\n")
    assert (code, out) == (0, plain)
    _, placeholder, length, text = err.splitlines()
    assert (
        "must not contain '<image>'" in placeholder
        and "answer included" in length
        and "no valid UTF-8" in text
    )


def test_an_image_for_a_text_model_is_refused_before_any_question(run, family_folder, image_file):
    code, out, err = run("chat", image_file, "--model", family_folder("llama"), stdin="a\nb\n")
    assert (code, out, err) == (2, "", "mllama: error: this model takes no images, got 1\n")


def test_a_chat_goes_on_after_bytes_that_are_no_text(run, options, image_file):
    code, out, err = run("chat", image_file, *options, stdin=b"\xff\nHow many?\n")
    assert code == 0 and out.strip() and "no valid UTF-8" in err


@pytest.mark.parametrize(
    ("family", "imaged"),
    [
        ("llama", False),
        ("llava, clip", True),
        ("llava, clip", False),
        ("mllama", True),
        ("mllama", False),
    ],
)
def test_every_family_remembers_what_was_said(run, family_folder, image_file, family, imaged):
    folder, image = family_folder(family), image_file if imaged else None
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    turns = []
    for question in ("How many circles?", "a b c"):
        turns.append(
            (
                question,
                answer(
                    model, processor, encode(processor, image, question, turns), max_new_tokens=8
                ).text,
            )
        )
    options = ["--model", folder, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 8]
    code, out, _ = run(
        "chat", *([image] if imaged else []), *options, stdin="How many circles?\na b c\n"
    )
    assert (code, out.split()) == (0, " ".join(answer for _, answer in turns).split())


def prefills(run, *arguments, **options) -> tuple[list[str], list[int], int]:
    """A command's lines, the tokens that each prompt computed, and the images that were encoded."""
    passes, images = [], []
    compute, encode_images = VisionLanguageModel.compute, VisionLanguageModel.encode_images

    def computed(self, inputs):
        passes.append(inputs.shape[1])
        return compute(self, inputs)

    def encoded(self, inputs):
        images.append(inputs)
        return encode_images(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionLanguageModel, "compute", computed)
        patch.setattr(VisionLanguageModel, "encode_images", encoded)
        code, out, _ = run(*arguments, **options)
    assert code == 0
    return out.splitlines(), [tokens for tokens in passes if tokens > 1], len(images)


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("llava, siglip", None),
        ("llava, clip", templates.LLAVA),
        ("mllama", templates.LLAMA_VISION),
        ("llama", templates.CHATML),
    ],
)
def test_no_turn_and_no_image_is_computed_twice(
    run, family_folder, image_file, tmp_path, family, template
):
    folder = shutil.copytree(family_folder(family), tmp_path / "model")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    options = ["--model", folder, "--dtype", "float32", "--max-new-tokens", 8, "--json"]
    questions = ["How many circles?", "a b c", "What colour is it?"]  # the context has no room
    image = None if family == "llama" else image_file
    shown = [] if image is None else [image]
    lines, tokens, images = prefills(run, "chat", *shown, *options, stdin="\n".join(questions))
    assert len(lines) == len(tokens) == len(questions) and images == len(shown)
    processor = mllama.load(folder, dtype="float32", device="cpu")[1]
    first = encode(processor, image, questions[0])["input_ids"].shape[1]
    assert tokens[0] == first
    for question, count in zip(questions[1:], tokens[1:], strict=True):
        alone = encode(processor, None, question)["input_ids"].shape[1]
        assert count <= alone + 8  # the answer's end, and what the template writes there


def test_a_full_context_is_made_room_in_for_several_turns(run, family_folder, tmp_path):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(templates.CHATML)
    options = ["--model", folder, "--dtype", "float32", "--max-new-tokens", 4, "--json"]
    lines, tokens, _ = prefills(run, "chat", *options, stdin="\n".join(map(str, range(1000, 1024))))
    assert len(lines) == len(tokens) == 24
    long = [number for number, count in enumerate(tokens[1:], 1) if count > 100]
    assert 2 <= len(long) <= 12 and min(b - a for a, b in zip(long, long[1:], strict=False)) > 1


def test_a_new_conversation_about_the_same_image_does_not_encode_it_again(
    run, family_folder, image_file
):
    options = ["--model", family_folder("llava, siglip"), "--dtype", "float32", "--json"]
    lines = f"a b\n/reset\nc d\n/image {image_file}\na b\n"
    answers, _, images = prefills(run, "chat", image_file, *options, stdin=lines)
    answers = [json.loads(line)["answer"] for line in answers]
    assert len(answers) == 3 and answers[0] == answers[2] and images == 1


def test_without_a_chat_template_every_question_stands_alone(run, family_folder, image_file):
    folder = family_folder("paligemma")
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    answers = [
        mllama.ask(image_file, question, model, processor, max_new_tokens=8)
        for question in ("caption en", "detect circle")
    ]
    options = ["--model", folder, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 8]
    code, out, _ = run("chat", image_file, *options, stdin="caption en\ndetect circle\n")
    assert (code, out.split()) == (0, " ".join(answers).split())


def test_commands_are_no_questions(run, options, image_file, tmp_path, loaded):
    saved, turned = tmp_path / "talk.json", tmp_path / "a b.png"
    Image.open(image_file).rotate(90).save(turned)
    lines = [
        "/help",
        "/foo bar",
        "How many circles?",
        "/image nowhere.png",
        f"/image {turned}",
        "How many circles?",
        f"/save {saved}",
    ]
    lines += [f"/save {image_file}", "/reset", "/reset now", "a b c", "/exit", "What color?"]
    code, out, err = run("chat", image_file, *options, stdin="\n".join(lines))
    asked = [(image_file, "How many circles?"), (turned, "How many circles?"), (turned, "a b c")]
    assert (code, [line.strip() for line in out.splitlines()]) == (
        0,
        [mllama.ask(*pair, *loaded, max_new_tokens=8) for pair in asked],
    )
    for said in (
        "/system TEXT",
        "no command /foo",
        "no such image: nowhere.png",
        f"{image_file} exists",
        "/reset takes nothing",
    ):
        assert said in err
    content = json.loads(saved.read_text())
    assert content["images"] == [str(turned)] and [
        message["role"] for message in content["messages"]
    ] == ["user", "assistant"]


def test_what_the_context_has_no_room_for_is_saved_all_the_same(run, options, image_file, tmp_path):
    run(
        "chat",
        image_file,
        *options,
        stdin=f"{'a b c d ' * 20}\n" * 5 + f"/image -\n/save {tmp_path / 'talk.json'}\n",
    )
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 10


def test_a_system_prompt_in_a_chat(run, family_folder):
    folder = family_folder("llama")
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    ask = lambda system: (  # noqa: E731
        answer(model, processor, encode(processor, None, "a", system=system), max_new_tokens=8).text
    )
    options = [
        "--model",
        folder,
        "--dtype",
        "float32",
        "--max-new-tokens",
        8,
        "--json",
        "--system",
        "b c",
    ]
    code, out, err = run(
        "chat", *options, stdin="a\n/reset\n/system d\na\n/reset\n/system\na\n/image x.png\n"
    )
    assert code == 0 and [json.loads(line)["answer"] for line in out.splitlines()] == [
        ask("b c"),
        ask("d"),
        ask(None),
    ]
    code, out, err = run("chat", "--model", family_folder("paligemma"), "--system", "a")
    assert (code, out, err.count("\n")) == (2, "", 1) and "no chat template" in err


def test_an_interrupt_stops_the_answer_and_keeps_the_conversation(
    run, family_folder, monkeypatch, tmp_path
):
    folder, take = family_folder("llama"), Row.take
    left = [3]  # tokens until Ctrl-C, once

    def interrupted(self, *arguments):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        take(self, *arguments)

    monkeypatch.setattr(Row, "take", interrupted)
    options = ["--model", folder, "--dtype", "float32", "--max-new-tokens", 8, "--json"]
    code, out, _ = run(
        "chat", *options, stdin=f"How many circles?\na b c\n/save {tmp_path / 'talk.json'}\n"
    )
    first, second = map(json.loads, out.splitlines())
    assert (code, first["stopped"], first["tokens"], second["stopped"]) == (0, True, 3, False)
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    turns = [("How many circles?", first["answer"])]
    assert (
        second["answer"]
        == answer(model, processor, encode(processor, None, "a b c", turns), max_new_tokens=8).text
    )
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 4


def test_timings_of_every_answer(run, options, image_file):
    lines = "How many circles?\na b c\n"
    out = run("chat", image_file, *options, "--timings", "--json", stdin=lines)[1]
    first, second = (json.loads(line)["timings"] for line in out.splitlines())
    assert (first["images"], first["reused_tokens"]) == (1, 0)
    assert second["images"] == 0 and 0 < second["reused_tokens"] < second["prompt_tokens"]
    err = run("chat", image_file, *options, "--timings", stdin=lines)[2]
    assert [line.split()[0] for line in err.splitlines()].count("decode") == 2


def test_an_interrupt_at_the_prompt_ends_the_chat(run, family_folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("chat", "--model", family_folder("llama"), "--dtype", "float32")[:2] == (130, "")
