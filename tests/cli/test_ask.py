"""`mllama ask`."""

import json
import shutil

import pytest

import mllama
from helpers import answer
from mllama.runtime.questions import encode


def test_ask_streams_the_answer(run, loaded, options, image_file, model_folder):
    code, out, err = run("ask", image_file, "How many circles?", *options)
    assert (code, out.strip()) == (
        0,
        mllama.ask(image_file, "How many circles?", *loaded, max_new_tokens=8),
    )
    assert err == f"mllama: {model_folder} in float32 on cpu\n"


def test_ask_json_is_one_object(run, loaded, options, image_file, model_folder):
    code, out, _ = run("ask", image_file, "How many circles?", "--json", *options)
    said = json.loads(out)
    assert (
        code == 0
        and out.count("\n") == 1
        and said.pop("seconds") > 0
        and 1 <= said.pop("tokens") <= 8
    )
    assert said == {
        "image": str(image_file),
        "question": "How many circles?",
        "answer": mllama.ask(image_file, "How many circles?", *loaded, max_new_tokens=8),
        "model": str(model_folder),
        "dtype": "float32",
        "device": "cpu",
        "weights": "f32",
    }


def test_a_seed_repeats_a_sampled_answer(run, options, image_file):
    sampled = [
        "ask",
        image_file,
        "How many?",
        "--temperature",
        "3",
        "--top-k",
        "200",
        "--top-p",
        "0.99",
        *options,
    ]
    first, again, other = (run(*sampled, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_json_is_ascii(run, options, image_file, tmp_path):
    named = tmp_path / "Bild-é.png"
    named.write_bytes(image_file.read_bytes())
    code, out, _ = run("ask", named, "How many?", "--json", *options)
    assert code == 0 and out.isascii() and json.loads(out)["image"] == str(named)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_error_of_generation_is_one_line(run, options, image_file, monkeypatch, more):
    def fail(*args, **kwargs):
        raise ValueError("no memory for this")

    monkeypatch.setattr("mllama.text.decoder.Decoder.forward", fail)
    assert run("ask", image_file, "How many?", *options, *more) == (
        2,
        "",
        "mllama: error: no memory for this\n",
    )


def test_paligemmas_prefix(run, family_folder, image_file):
    folder = family_folder("paligemma")
    code, out, _ = run(
        "ask",
        image_file,
        "detect circle",
        "--model",
        folder,
        "--dtype",
        "float32",
        "--max-new-tokens",
        8,
    )
    loaded = mllama.load(folder, dtype="float32")
    assert (code, out.strip()) == (
        0,
        mllama.ask(image_file, "detect circle", *loaded, max_new_tokens=8),
    )


def test_several_images_and_words_between_options(run, family_folder, image_file):
    folder = family_folder("mllama")
    loaded = mllama.load(folder, dtype="float32", device="cpu")
    expected = mllama.ask([image_file, image_file], "What changed?", *loaded, max_new_tokens=8)
    options = ["--model-id", folder, "--dtype", "float32", "--max-new-tokens", 8]
    code, out, _ = run("ask", image_file, image_file, *options, "What changed?")
    assert (code, out.strip()) == (0, expected)
    assert (
        json.loads(run("ask", image_file, image_file, "What changed?", "--json", *options)[1])[
            "image"
        ]
        == [str(image_file)] * 2
    )


def test_dash_is_stdin(run, loaded, options, image_file):
    expected = mllama.ask(image_file, "How many circles?", *loaded, max_new_tokens=8)
    assert run("ask", image_file, "-", *options, stdin="How many circles?\n")[:2] == (
        0,
        expected + "\n",
    )
    assert run("ask", "-", "How many circles?", *options, stdin=image_file.read_bytes())[:2] == (
        0,
        expected + "\n",
    )
    code, out, err = run("ask", "-", "-", *options, stdin="a")
    assert (code, out, err.count("\n")) == (2, "", 1) and "once" in err


def test_a_question_in_text_alone(run, family_folder):
    folder = family_folder("llama")
    expected = mllama.ask(
        None, "a b c", *mllama.load(folder, dtype="float32", device="cpu"), max_new_tokens=8
    )
    code, out, _ = run(
        "ask", "-", "--model", folder, "--dtype", "float32", "--max-new-tokens", 8, stdin="a b c\n"
    )
    assert (code, out.strip()) == (0, expected)


def test_a_system_prompt(run, family_folder):
    folder = family_folder("llama")
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    expected = answer(
        model, processor, encode(processor, None, "a b c", system="be brief"), max_new_tokens=8
    ).text
    options = ["--model", folder, "--dtype", "float32", "--max-new-tokens", 8]
    assert (
        run("ask", "a b c", "--system", "be brief", *options)[1].strip()
        == expected
        != run("ask", "a b c", *options)[1].strip()
    )


def test_a_model_that_searches_beams(run, family_folder, tmp_path):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "beams")
    settings = json.loads((folder / "generation_config.json").read_text()) | {"num_beams": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    expected = mllama.ask(
        None, "a b c", *mllama.load(folder, dtype="float32", device="cpu"), max_new_tokens=8
    )
    options = ["--model", folder, "--dtype", "float32", "--max-new-tokens", 8]
    assert run("ask", "a b c", *options)[:2] == (0, expected + "\n")
    assert json.loads(run("ask", "a b c", "--json", *options)[1])["answer"] == expected


def test_timings(run, options, image_file):
    code, out, err = run("ask", image_file, "How many circles?", "--timings", *options)
    plain = run("ask", image_file, "How many circles?", *options)
    assert (code, out) == (0, plain[1]) and err.startswith(plain[2])
    rows = [line.split() for line in err[len(plain[2]) :].splitlines()]
    assert [row[0] for row in rows] == ["load", "image", "prompt", "decode", "total", "first"]
    code, out, err = run("ask", image_file, "How many circles?", "--timings", "--json", *options)
    said = json.loads(out)
    timings = said["timings"]
    assert (code, err.count("\n"), timings["images"], timings["reused_tokens"]) == (0, 1, 1, 0)
    assert str(timings["prompt_tokens"]) in rows[2] and timings["decode_tokens"] == 7
    assert round(timings["total_seconds"], 3) == said["seconds"]
    stages = timings["image_seconds"] + timings["prompt_seconds"]
    assert 0 < stages <= timings["first_token_seconds"] + 2e-6
    assert timings["first_token_seconds"] < timings["total_seconds"] and timings["load_seconds"] > 0
    rate = timings["decode_tokens"] / timings["decode_seconds"]
    assert timings["decode_tokens_per_second"] == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["How many?", "IMAGE"], "swapped"),
        (["IMAGE"], "QUESTION is missing"),
        (["IMAGE", "IMAGE"], "QUESTION is missing"),
        (["How many?"], "about an image and no others"),
        (["https://localhost/a.png", "How many?"], "--allow-urls"),
        (["IMAGE", "?", "--seed", "5"], "--seed has no effect"),
        (["IMAGE", "?", "--temperature", "0", "--top-k", "4"], "--top-k has no effect"),
        (["IMAGE", "?", "--reference", "meta"], "--reference meta"),
        (["IMAGE", "?", "--system", " "], "system prompt is empty"),
    ],
)
def test_what_changes_nothing_is_refused(run, image_file, arguments, said):
    code, out, err = run(
        "ask", *(image_file if argument == "IMAGE" else argument for argument in arguments)
    )
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


@pytest.mark.parametrize("command", ["ask", "generate"])
def test_an_image_is_kept_in_files(run, options, image_file, tmp_path, command):
    folder = tmp_path / "images"
    words = ["ask", image_file, "How many?"]
    if command == "generate":
        words = ["generate", "--prompt", "How many?", "--image", image_file]
    expected = run(*words, *options)
    for _ in range(2):
        assert run(*words, *options, "--image-cache", folder) == expected
        (file,) = folder.iterdir()
    written = file.stat().st_ino
    run(*words[:-1], *words[-1:], *options, "--image-cache", folder, "--temperature", "2")
    assert [file.stat().st_ino for file in folder.iterdir()] == [written]


def test_an_image_cache_without_effect_is_refused(
    run, options, family_folder, image_file, tmp_path
):
    given = ["--image-cache", tmp_path / "images"]
    code, _, err = run("ask", "a b", "--model", family_folder("llama"), *given)
    assert (code, err.count("\n")) == (2, 1) and "image_cache" in err
    stock = ["--prompt", "a", "--image", image_file, "--runtime", "transformers"]
    code, _, err = run("generate", *stock, *options, *given)
    assert (code, err.count("\n")) == (2, 1) and "--image-cache" in err
    code, _, err = run("ask", image_file, "a b", *options, "--image-cache", image_file)
    assert (code, err.count("\n")) == (2, 1) and str(image_file) in err
