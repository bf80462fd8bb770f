"""--prompt-lookup and --draft-model: the same answers."""

import json
import shutil

import pytest

from mllama.api import open_session

GREEDY = ["--dtype", "float32", "--max-new-tokens", 16]
REPEATED = "a b c d a b c d a b c d a b"


@pytest.fixture
def llama(family_folder):
    return family_folder("llama")


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


@pytest.mark.parametrize("command", [["ask", REPEATED], ["generate", "--prompt", REPEATED]])
def test_answers_are_the_same(run, llama, copy, command):
    command = [*command, "--model", llama, *GREEDY]
    plain = run(*command)
    for drafting in (["--prompt-lookup", 5], ["--draft-model", copy]):
        assert run(*command, *drafting) == plain
        said = json.loads(run(*command, *drafting, "--json", "--timings")[1])
        timings = said["timings"]
        assert said["answer"] == plain[1].strip()
        assert 0 <= timings["accepted_tokens"] <= timings["drafted_tokens"]
        passes = timings["decode_tokens"] - timings["accepted_tokens"]
        assert timings["tokens_per_pass"] == pytest.approx(timings["decode_tokens"] / passes)


def test_the_table_tells_of_drafts(run, llama, copy):
    command = ["generate", "--prompt", REPEATED, "--model", llama, *GREEDY, "--timings"]
    drafted = run(*command, "--draft-model", copy)[2].splitlines()[-3]
    assert "accepted" in drafted and "a pass" in drafted
    assert "accepted" not in run(*command)[2]


def test_a_chat(run, llama, copy):
    lines = f"{REPEATED}\na b c\n"
    plain = run("chat", "--model", llama, *GREEDY, stdin=lines)
    for drafting in (["--prompt-lookup", 15], ["--draft-model", copy]):
        assert run("chat", "--model", llama, *GREEDY, *drafting, stdin=lines) == plain


def test_an_image_and_a_draft_model_of_text(run, family_folder, llama, image_file):
    with pytest.raises(ValueError, match="draft_model"):  # another vocabulary
        open_session(family_folder("llava, siglip"), draft_model=llama)
    command = ["ask", image_file, "How many circles?", "--model", family_folder("llava, siglip")]
    assert run(*command, *GREEDY, "--prompt-lookup", 3) == run(*command, *GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        ["--prompt-lookup", 0],
        ["--prompt-lookup", 16],
        ["--prompt-lookup", "x"],
        ["--prompt-lookup", 3, "--draft-model", "MODEL"],
        ["--prompt-lookup", 3, "--runtime", "transformers"],
        ["--draft-model", "MODEL", "--runtime", "transformers"],
        ["--draft-model", "/nowhere/at/all"],
    ],
    ids=str,
)
def test_what_is_refused(run, llama, options):
    options = [llama if option == "MODEL" else option for option in options]
    code, out, err = run("generate", "--prompt", "a", "--model", llama, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_models_that_do_not_fit(llama, copy, family_folder):
    other = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["o"], vocabulary["z"] = vocabulary["z"], vocabulary["o"]
    (copy / "tokenizer.json").write_text(json.dumps(other))
    for draft in (copy, family_folder("llava, siglip"), family_folder("siglip")):
        with pytest.raises(ValueError, match="draft_model|decoder"):
            open_session(llama, draft_model=draft)
    with pytest.raises(TypeError, match="drafts"):
        open_session(llama, drafts=3)


def test_a_model_that_searches_beams(copy, llama):
    settings = json.loads((copy / "generation_config.json").read_text()) | {"num_beams": 2}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    for options in ({"prompt_lookup_tokens": 3}, {"draft_model": llama}, {"kv_cache": "int8"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            open_session(copy, **options)
