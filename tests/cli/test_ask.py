"""`mllama ask`."""

import json

import pytest

import mllama


def test_ask_streams_the_answer(run, loaded, options, picture_file, model_folder):
    code, out, err = run("ask", picture_file, "How many circles?", *options)
    assert (code, out.strip()) == (0, mllama.ask(picture_file, "How many circles?", *loaded, max_new_tokens=8))
    assert err == f"mllama: {model_folder} in float32 on cpu\n"


def test_ask_json_is_one_object(run, loaded, options, picture_file, model_folder):
    code, out, _ = run("ask", picture_file, "How many circles?", "--json", *options)
    said = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and said.pop("seconds") > 0 and 1 <= said.pop("tokens") <= 8
    assert said == {
        "picture": str(picture_file),
        "question": "How many circles?",
        "answer": mllama.ask(picture_file, "How many circles?", *loaded, max_new_tokens=8),
        "model": str(model_folder),
        "dtype": "float32",
        "device": "cpu",
    }


def test_a_seed_repeats_a_sampled_answer(run, options, picture_file):
    sampled = ["ask", picture_file, "How many?", "--temperature", "3", "--top-k", "200", "--top-p", "0.99", *options]
    first, again, other = (run(*sampled, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_json_is_ascii(run, options, picture_file, tmp_path):
    named = tmp_path / "Bild-é.png"
    named.write_bytes(picture_file.read_bytes())
    code, out, _ = run("ask", named, "How many?", "--json", *options)
    assert code == 0 and out.isascii() and json.loads(out)["picture"] == str(named)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_error_of_generation_is_one_line(run, options, picture_file, monkeypatch, more):
    def fail(*args, **kwargs):
        raise ValueError("no memory for this")

    monkeypatch.setattr("mllama.text.decoder.Decoder.forward", fail)
    assert run("ask", picture_file, "How many?", *options, *more) == (2, "", "mllama: error: no memory for this\n")


def test_paligemmas_prefix(run, family_folder, picture_file):
    folder = family_folder("paligemma")
    code, out, _ = run("ask", picture_file, "detect circle", "--model", folder, "--dtype", "float32", "--max-new-tokens", 8)
    loaded = mllama.load(folder, dtype="float32")
    assert (code, out.strip()) == (0, mllama.ask(picture_file, "detect circle", *loaded, max_new_tokens=8))
