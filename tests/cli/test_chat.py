"""`mllama chat`."""

import pytest

import mllama
from mllama import api


def test_chat_answers_in_the_light_of_what_was_said(run, loaded, options, picture_file):
    first = api.answer(*loaded, api.encode(loaded[1], picture_file, "How many circles?"), max_new_tokens=8).text
    turns = [("How many circles?", first)]
    second = api.answer(*loaded, api.encode(loaded[1], picture_file, "a b c", turns), max_new_tokens=8).text
    code, out, _ = run("chat", picture_file, *options, stdin="How many circles?\n\n a b c \n/exit\nWhat colour?\n")
    assert (code, [line.strip() for line in out.splitlines()]) == (0, [first, second])


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(run, options, picture_file):
    code, _, err = run("chat", picture_file, *options, stdin=f"{'a b c d ' * 20}\n" * 8)
    assert (code, err.count("\n")) == (0, 1)


def test_a_bad_question_does_not_end_the_chat(run, options, picture_file):
    _, plain, _ = run("chat", picture_file, *options, stdin="How many circles?\na b c\n")
    bad = f"what <image>?\n{'a b c d ' * 2000}\nwhat \udcff?\n"
    code, out, err = run("chat", picture_file, *options, stdin=f"How many circles?\n{bad}a b c\n")
    assert (code, out) == (0, plain)
    _, placeholder, length, text = err.splitlines()
    assert "must not contain '<image>'" in placeholder and "answer included" in length and "no valid UTF-8" in text


def test_a_picture_for_a_text_model_is_refused_before_any_question(run, family_folder, picture_file):
    code, out, err = run("chat", picture_file, "--model", family_folder("llama"), stdin="a\nb\n")
    assert (code, out, err) == (2, "", "mllama: error: this model takes no pictures, got 1\n")


def test_a_chat_goes_on_after_bytes_that_are_no_text(run, options, picture_file):
    code, out, err = run("chat", picture_file, *options, stdin=b"\xff\nHow many?\n")
    assert code == 0 and out.strip() and "no valid UTF-8" in err


@pytest.mark.parametrize(
    ("family", "pictured"), [("llama", False), ("llava, clip", True), ("llava, clip", False), ("mllama", True), ("mllama", False)]
)
def test_every_family_remembers_what_was_said(run, family_folder, picture_file, family, pictured):
    folder, picture = family_folder(family), picture_file if pictured else None
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    turns = []
    for question in ("How many circles?", "a b c"):
        turns.append((question, api.answer(model, processor, api.encode(processor, picture, question, turns), max_new_tokens=8).text))
    options = ["--model", folder, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 8]
    code, out, _ = run("chat", *([picture] if pictured else []), *options, stdin="How many circles?\na b c\n")
    assert (code, out.split()) == (0, " ".join(answer for _, answer in turns).split())


def test_without_a_chat_template_every_question_stands_alone(run, family_folder, picture_file):
    folder = family_folder("paligemma")
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    answers = [mllama.ask(picture_file, question, model, processor, max_new_tokens=8) for question in ("caption en", "detect circle")]
    options = ["--model", folder, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 8]
    code, out, _ = run("chat", picture_file, *options, stdin="caption en\ndetect circle\n")
    assert (code, out.split()) == (0, " ".join(answers).split())
