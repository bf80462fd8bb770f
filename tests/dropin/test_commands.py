"""The older command lines: what they print, what they refuse, and what Comet is told."""

import runpy
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

import mllama
from mllama import api
from mllama.assets import EMBEDDED
from mllama.dropin.__main__ import main
from mllama.hf.answering import generate
from mllama.runtime.questions import encode

ROOT = Path(__file__).parent.parent.parent
OLDER = ROOT / "examples" / "older"
VARIABLES = (
    "MODEL_PATH PROMPT IMAGE_FILE_PATH MAX_TOKENS_TO_GENERATE TEMPERATURE TOP_P DO_SAMPLE ONLY_CPU"
    " COMET_API_KEY COMET_PROJECT_NAME COMET_WORKSPACE"
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No variable of the commands' in the environment, no file of Comet's here or at home."""
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "comet_ml", None)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of `python -m mllama.dropin`."""
    monkeypatch.setenv("TQDM_DISABLE", "")

    def call(*arguments) -> tuple[int, str, str]:
        api._say.cache_clear()
        capsys.readouterr()  # what fixtures wrote
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse and fire
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def expected(folder, picture, prompt: str, **options) -> str:
    model, processor = mllama.load(folder, device="cpu")
    return mllama.ask(picture, prompt, model, processor, **options)


def test_an_interrupt_while_a_command_is_imported(run, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert run("inference", "--prompt", "a") == (130, "", "")


# ---- Inference/Inference.py


@pytest.mark.parametrize("family", ["mllama", "llava, siglip"])
def test_a_picture_and_a_prompt(run, family_folder, picture_file, family):
    options = ["--max-new-tokens", 12, "--cpu"]
    asked = ["Inference", "--image", picture_file, "--prompt", "How many?"]
    code, out, err = run(*asked, "--model-id", family_folder(family), *options)
    assert (code, out) == (
        0,
        expected(family_folder(family), picture_file, "How many?", max_new_tokens=12) + "\n",
    )
    assert run(*asked, "--hf-weights", family_folder(family), *options)[:2] == (0, out)
    torch.manual_seed(0)
    sampled = {
        run(
            *asked,
            "--model-id",
            family_folder(family),
            *options,
            "--temperature",
            2,
            "--top-p",
            0.99,
        )[1]
        for _ in range(4)
    }
    assert len(sampled) > 1


def test_it_runs_by_its_path(run_python, family_folder, picture_file):
    options = [
        "--model-id",
        family_folder("mllama"),
        "--max-new-tokens",
        12,
        "--cpu",
        "--dtype",
        "float32",
    ]
    ended = run_python(
        "Inference/Inference.py",
        "--image",
        picture_file,
        "--prompt=-How many?",
        *options,
        cwd=OLDER,
    )
    answer = expected(family_folder("mllama"), picture_file, "-How many?", max_new_tokens=12)
    assert (ended.returncode, ended.stdout) == (0, answer + "\n")


def test_its_defaults(run, monkeypatch, picture_file):
    monkeypatch.setattr("mllama.cli.main", lambda arguments: print(*arguments))
    run("Inference", "--image", "a.png", "--prompt", "b c")
    assert run("Inference/Inference.py", "--image", "a.png", "--prompt", "b c")[1] == (
        "generate --model-id=meta-llama/Llama-3.2-11B-Vision-Instruct --prompt=b c --image=a.png --max-new-tokens=128 --temperature=0.0"
        " --top-p=1.0 --dtype=auto\n"
    )


def test_its_errors_are_one_line(run, picture_file, family_folder):
    folder = family_folder("mllama")
    for arguments, said in (
        (
            ["--image", "none.png", "--prompt", "a", "--model-id", folder],
            "no such picture: none.png",
        ),
        (["--image", picture_file, "--prompt", "a", "--model-id", "/nowhere"], "no model folder"),
        (["--image", picture_file, "--prompt", " ", "--model-id", folder], "--prompt"),
        (
            ["--image", picture_file, "--prompt", "a", "--model-id", folder, "--max-new-tokens", 0],
            "--max-new-tokens",
        ),
        (
            ["--image", picture_file, "--prompt", "a", "--model-id", family_folder("llama")],
            "no pictures",
        ),
    ):
        code, out, err = run("Inference", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err, err


# ---- inference.py and its launcher


@pytest.fixture
def fire():
    return pytest.importorskip("fire", reason="fire is not installed (pip install 'mllama[older]')")


def read(out: str) -> tuple[str, str]:
    """(the prompt, the answer without what is blank around it) of what inference.py printed."""
    prompt, answer = out.removeprefix("User Input: ").split("\nAI Response: ")
    return prompt, answer.strip()


@pytest.mark.usefixtures("fire")
def test_the_launcher_answers(run_python, picture_file, family_folder):
    variables = {
        "MODEL_PATH": str(family_folder("paligemma")),
        "PROMPT": "de, 'a' $b",
        "IMAGE_FILE_PATH": str(picture_file),
    }
    variables |= {"MAX_TOKENS_TO_GENERATE": "9", "ONLY_CPU": "True"}
    ended = run_python("launch_inference.sh", cwd=OLDER / "dev", program="sh", env=variables)
    answer = expected(family_folder("paligemma"), picture_file, "de, 'a' $b", max_new_tokens=9)
    assert ended.returncode == 0 and read(ended.stdout) == ("de, 'a' $b", answer)


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_the_launcher_calls_inference_py(run_python, tmp_path, shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    tell = {"PYTHON": str(tmp_path / "tell")}  # in Python's place
    Path(tell["PYTHON"]).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    Path(tell["PYTHON"]).chmod(0o755)
    script, *options = run_python(
        "dev/launch_inference.sh", cwd=OLDER, program=shell, env=tell
    ).stdout.splitlines()
    assert Path(script).resolve() == OLDER / "inference.py"
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    assert (
        Path(given.pop("image_file_path")).is_file() and given.pop("prompt") == "How many circles?"
    )
    assert list(given.values()) == ["", "100", "0.8", "0.9", "False", "False"]
    changed = tell | {"PROMPT": 'a  "b" $c', "TOP_P": "1", "IMAGE_FILE_PATH": ""}
    told = run_python(
        "launch_inference.sh", "--only_cpu=True", cwd=OLDER / "dev", program=shell, env=changed
    ).stdout.splitlines()
    assert (
        told[2:4] == ['--prompt=a  "b" $c', "--image_file_path="]
        and "--top_p=1" in told
        and told[-1] == "--only_cpu=True"
    )


@pytest.mark.usefixtures("fire")
def test_variables_and_options(run, monkeypatch, picture_file, model_folder):
    """By name, from anywhere: variables first, options over them."""
    answer = expected(model_folder, picture_file, "1, 2", max_new_tokens=5)
    options = [
        "--model_path",
        model_folder,
        "--image_file_path",
        picture_file,
        "--max_tokens_to_generate=5",
    ]
    assert read(run("inference", *options, "--prompt", "1, 2", "--only_cpu")[1]) == ("1, 2", answer)
    for name, value in {
        "PROMPT": "else",
        "DO_SAMPLE": "False",
        "ONLY_CPU": "True",
        "TEMPERATURE": "0.5",
        "TOP_P": "",
    }.items():
        monkeypatch.setenv(name, value)
    assert read(run("dev/launch_inference.sh", *options, "--prompt=1, 2")[1]) == ("1, 2", answer)


@pytest.mark.usefixtures("fire")
def test_sampling_is_transformers(run, model_folder, picture_file):
    options = [
        "--model_path",
        model_folder,
        "--image_file_path",
        picture_file,
        "--max_tokens_to_generate",
        6,
        "--only_cpu",
    ]
    torch.manual_seed(7)
    code, out, _ = run(
        "inference", *options, "--prompt", "a", "--do_sample", "True", "--temperature", 3
    )
    torch.manual_seed(7)
    sampling = {"max_new_tokens": 6, "do_sample": True, "temperature": 3, "top_p": 0.9, "top_k": 0}
    assert (code, read(out)) == (0, ("a", expected(model_folder, picture_file, "a", **sampling)))
    greedy = expected(model_folder, picture_file, "a", max_new_tokens=6)
    assert read(out)[1] != greedy and read(
        run("inference", *options, "--prompt", "a", "--temperature", 3)[1]
    ) == ("a", greedy)


@pytest.mark.usefixtures("fire")
def test_in_text_alone(run, family_folder):
    folder = family_folder("llama")
    code, out, _ = run(
        "inference",
        "--model_path",
        folder,
        "--prompt",
        "a b c",
        "--max_tokens_to_generate",
        4,
        "--only_cpu=True",
    )
    assert (code, read(out)) == (0, ("a b c", expected(folder, None, "a b c", max_new_tokens=4)))


@pytest.mark.usefixtures("fire")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt is missing"),
        (["--prompt", "a", "--top_k", "5"], "there is no option --top_k"),
        (["--prompt", "a", "--do_sample", "yes"], "--do_sample must be True or False, got 'yes'"),
        (["--prompt", "a", "--only_cpu", "1"], "--only_cpu must be True or False, got 1"),
        (["--prompt", "a", "--do_sample", "[]"], "--do_sample must be True or False, got []"),
        (
            ["--prompt", "a", "--max_tokens_to_generate", "0"],
            "--max_tokens_to_generate must be a whole number of at least 1, got '0'",
        ),
        (["--prompt", "a", "--max_tokens_to_generate", "many"], "at least 1, got 'many'"),
        (["--prompt", "a", "--max_tokens_to_generate", "True"], "at least 1, got 'True'"),
        (["--prompt", "a", "--image_file_path", "none.png"], "no such picture: none.png"),
        (["--prompt", "a", "--model_path", "/nowhere"], "no model folder"),
        (
            ["--prompt", "a", "--do_sample", "True", "--temperature", "hot"],
            "--temperature must be a number of at least 0, got 'hot'",
        ),
        (
            ["--prompt", "a", "--do_sample", "True", "--top_p", "2"],
            "--top_p must be a number above 0 and at most 1, got '2'",
        ),
    ],
)
def test_what_it_refuses_is_one_line(run, arguments, message):
    code, out, err = run("inference", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err


@pytest.mark.usefixtures("fire")
def test_help_lists_the_options(run):
    code, out, err = run("inference", "--help")
    assert code == 0 and all(
        f"--{name}" in out + err for name in ("model_path", "max_tokens_to_generate", "only_cpu")
    )


def test_without_fire_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fire", None)
    code, out, err = run("inference", "--prompt", "a")
    assert (code, out, err.count("\n")) == (2, "", 1) and "pip install 'mllama[older]'" in err


# ---- Comet


@pytest.fixture
def comet(monkeypatch):
    """A stand-in for comet_ml: the calls of its experiments, as (method, arguments, options)."""
    calls = []

    class Experiment:
        def __init__(self, *args, **kwargs):
            calls.append(("Experiment", args, kwargs))

        def __getattr__(self, method):
            return lambda *args, **kwargs: calls.append((method, args, kwargs))

    module = types.ModuleType("comet_ml")
    module.Experiment = Experiment
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    return calls


@pytest.mark.usefixtures("fire")
@pytest.mark.parametrize("how", ["variables", "file", "home"])
def test_comet_is_told_where_it_is_set_up(
    run, monkeypatch, comet, model_folder, picture_file, tmp_path, how
):
    if how == "variables":
        for name in ("COMET_API_KEY", "COMET_PROJECT_NAME", "COMET_WORKSPACE"):
            monkeypatch.setenv(name, "given")
    else:
        (tmp_path / ".comet.config").write_text("[comet]\napi_key=given\n")
    if how == "home":
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
    options = [
        "--model_path",
        model_folder,
        "--image_file_path",
        picture_file,
        "--max_tokens_to_generate",
        5,
        "--only_cpu",
    ]
    code, out, _ = run("inference", *options, "--prompt", "How many?")
    answer = expected(model_folder, picture_file, "How many?", max_new_tokens=5)
    assert (code, read(out)) == (0, ("How many?", answer))
    assert comet[0] == ("Experiment", (), {}) and comet[-1] == ("end", (), {})
    texts = {
        kwargs["metadata"]["name"]: args[0]
        for method, args, kwargs in comet
        if method == "log_text"
    }
    values = {
        kwargs["name"]: args[0] for method, args, kwargs in comet if method == "log_histogram_3d"
    }
    (picture,) = [args[0] for method, args, _ in comet if method == "log_image"]
    model, processor = mllama.load(model_folder, device="cpu")
    inputs = encode(processor, picture_file, "How many?")
    assert texts["input_ids"] == str(inputs["input_ids"].tolist()) and texts[
        "attention_mask"
    ] == str(inputs["attention_mask"].tolist())
    assert texts["decoded tokens"] == answer
    output = generate(
        model, inputs, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    assert texts["encoded tokens"] == str(
        output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    )
    assert (values["pixel_values"] == inputs["pixel_values"].numpy()).all()
    assert (values["logits"] == torch.cat(output.logits).numpy()).all() and values["logits"].shape[
        1
    ] == model.config.text_config.vocab_size
    assert isinstance(picture, Image.Image) and picture.size == (60, 40)


@pytest.mark.usefixtures("fire")
def test_otherwise_nothing_is_sent_and_nothing_said(run, monkeypatch, comet, model_folder):
    options = [
        "--model_path",
        model_folder,
        "--max_tokens_to_generate",
        2,
        "--only_cpu",
        "--prompt",
        "a",
    ]
    code, out, err = run("inference", *options)
    assert code == 0 and comet == [] and "omet" not in out + err  # not set up
    monkeypatch.setenv("COMET_API_KEY", "of another project")
    assert run("inference", *options)[:2] == (0, out) and comet == []
    for name in ("COMET_PROJECT_NAME", "COMET_WORKSPACE"):
        monkeypatch.setenv(name, "given")
    monkeypatch.setitem(sys.modules, "comet_ml", None)  # not installed
    assert run("inference", *options) == (code, out, err)


# ---- dev/get_tokenizer.py


def test_a_model_is_fetched_with_metas_tokenizer(run, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("mllama.checkpoints.hub.model_info", lambda model_id, **options: None)
    monkeypatch.setattr(
        "mllama.checkpoints.hub.snapshot_download",
        lambda name, **options: asked.update(options) or options["local_dir"],
    )
    assert run("get_tokenizer", "some/where", tmp_path)[:2] == (0, f"{tmp_path}\n")
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "original/tokenizer.model",
        "original/params.json",
        "a.bin",
    ]
    patterns = {kind: asked[kind] for kind in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:4]


def test_without_arguments_paligemma_is_fetched(run, monkeypatch):
    """As the READMEs of such projects say."""
    asked = []
    monkeypatch.setattr("mllama.checkpoints.hub.model_info", lambda model_id, **options: None)
    monkeypatch.setattr(
        "mllama.checkpoints.hub.snapshot_download",
        lambda name, **options: asked.append((name, options["local_dir"])) or options["local_dir"],
    )
    folder = "models/paligemma-weights/paligemma-3b-pt-224"
    assert run("get_tokenizer")[:2] == (0, f"{folder}\n") and asked == [
        ("google/paligemma-3b-pt-224", folder)
    ]
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run("get_tokenizer")
    assert (code, out, err.count("\n")) == (2, "", 1) and "google/paligemma-3b-pt-224" in err


# ---- the commands of older READMEs, from the repository's root


@pytest.fixture
def run_file(monkeypatch, capsys):
    """run_file(path, *arguments) -> stdout of a Python file of the repository, run from its root."""

    def call(path: str, *arguments) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        captured = capsys.readouterr()
        assert end.value.code == 0, captured.err
        return captured.out

    return call


@pytest.mark.usefixtures("fire")
def test_dev_inference(run_file):
    drawn = "examples/pictures/drawn.png"
    out = run_file(
        "dev/inference.py",
        "--prompt",
        "How many circles?",
        "--image_file_path",
        drawn,
        "--only_cpu",
        "True",
    )
    assert read(out) == ("How many circles?", expected(None, ROOT / drawn, "How many circles?"))


def test_the_launcher_runs_from_any_folder(run_python, tmp_path):
    shutil.copytree(ROOT / "dev", tmp_path / "dev")  # on its own
    tell = tmp_path / "tell"  # in Python's place
    tell.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    tell.chmod(0o755)
    for script, cwd in (
        ("dev/launch_inference.sh", ROOT),
        ("launch_inference.sh", ROOT / "dev"),
        (ROOT / "dev" / "launch_inference.sh", tmp_path),
        ("dev/launch_inference.sh", tmp_path),
    ):
        program, *options = run_python(
            script, cwd=cwd, program="sh", env={"PYTHON": str(tell)}
        ).stdout.splitlines()
        picture = next(
            option for option in options if option.startswith("--image_file_path")
        ).split("=")[1]
        assert (cwd / program).is_file() and ((cwd / picture).is_file() or cwd == tmp_path)


def test_the_cat_of_the_readmes(run_file):
    cat = ROOT / "examples" / "cat.jpg"
    assert (
        cat.stat().st_size < 60_000 and "cat.jpg" in (ROOT / "examples" / "README.md").read_text()
    )
    options = [
        "--image",
        "examples/cat.jpg",
        "--prompt",
        "What is this?",
        "--cpu",
        "--dtype",
        "float32",
        "--max-new-tokens",
        8,
    ]
    out = run_file("Inference/Inference.py", *options, "--model-id", EMBEDDED)
    assert out == expected(None, cat, "What is this?", max_new_tokens=8) + "\n"


def test_what_cannot_be_fetched_is_one_line(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run("dev/get_tokenizer.py", "some/where", "folder")
    assert (code, out, err.count("\n")) == (2, "", 1) and "offline" in err
    assert run("get_tokenizer", "some/where")[0] == 2


def test_the_files_of_older_paths_call_the_same(run_python, tmp_path):
    ended = run_python(OLDER / "dev" / "get_tokenizer.py", "--help", cwd=tmp_path)
    assert ended.returncode == 0 and "usage: mllama download" in ended.stdout
