"""`python -m mllama.dropin`: the folder for PYTHONPATH, scripts, and the older command lines."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

import mllama
import mllama.dropin
from mllama import api
from mllama.assets import EMBEDDED
from mllama.dropin.__main__ import main
from mllama.dropin.commands import COMMANDS

ROOT = Path(__file__).parent.parent.parent
VARIABLES = (
    "MODEL_PATH PROMPT IMAGE_FILE_PATH MAX_TOKENS_TO_GENERATE TEMPERATURE TOP_P DO_SAMPLE ONLY_CPU"
    " COMET_API_KEY COMET_PROJECT_NAME COMET_WORKSPACE"
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No variable of the commands' in the environment."""
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of `python -m mllama.dropin`."""
    monkeypatch.setenv("TQDM_DISABLE", "")

    def call(*arguments) -> tuple[int, str, str]:
        api._say.cache_clear()
        capsys.readouterr()  # what fixtures wrote
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's help
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_file(monkeypatch, capsys):
    """run_file(path, *arguments) -> stdout of a file of the repository, run from its root."""

    def call(path: str, *arguments) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        captured = capsys.readouterr()
        assert end.value.code == 0, captured.err
        return captured.out

    return call


def expected(folder, image, prompt: str, **options) -> str:
    model, processor = mllama.load(folder, device="cpu")
    return mllama.ask(image, prompt, model, processor, **options)


def read(out: str) -> tuple[str, str]:
    """(the prompt, the answer without blanks around it) of what inference.py printed."""
    prompt, answer = out.removeprefix("User Input: ").split("\nAI Response: ")
    return prompt, answer.strip()


# ---- the folder and scripts


@pytest.fixture
def folder(tmp_path):
    """Scripts side by side in a folder that is not the current one."""
    place = tmp_path / "scripts"
    place.mkdir()
    (place / "model.py").write_text("NAME = 'my own'\n")
    (place / "script.py").write_text(
        "import importlib.util, model, sys\n"
        "class Here: pass\n"
        "if __name__ == '__main__':\n"
        "    import pickle\n"
        "    assert pickle.loads(pickle.dumps(Here())).__class__ is Here\n"
        "    print(model.NAME, importlib.util.find_spec('siglip').origin)\n"
        "    print(sys.argv[1:], sys.path[0], __file__)\n"
        "    sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1])\n"
    )
    return place


def test_a_script_runs_as_python_runs_it(run_python, folder, tmp_path):
    ended = run_python("-m", "mllama.dropin", cwd=tmp_path)
    assert (ended.stdout, ended.stderr) == (f"{mllama.dropin.FOLDER}\n", "")
    given = (folder / "script.py", 3, "--flag", "a b")
    told = run_python("-m", "mllama.dropin", *given, cwd=tmp_path)
    plain = run_python(*given, cwd=tmp_path, path=ended.stdout.strip())
    said = (
        f"my own {Path(mllama.dropin.FOLDER) / 'siglip.py'}\n"  # files beside the script win
        f"['3', '--flag', 'a b'] {folder} {folder / 'script.py'}\n"
    )
    for done in (told, plain):
        assert (done.returncode, done.stdout, done.stderr) == (3, said, "")


def test_what_a_script_raises_is_shown(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "inference.py").write_text("raise KeyError('what')\n")
    monkeypatch.chdir(folder)
    with pytest.raises(KeyError, match="what"):  # also one that has a command's name
        main(["inference.py"])


def test_a_file_beside_a_notebook_wins(run_python, folder):
    path = "import sys\nsys.path = [*sys.path[1:], '']\n"  # as IPython has it
    imports = "import mllama.dropin, model, siglip\nprint(model.NAME, siglip.SiglipModel.__name__)"
    assert run_python("-c", path + imports, cwd=folder).stdout == "my own SiglipModel\n"


def test_what_is_no_script_and_help(run, tmp_path):
    for name in ("nowhere.py", str(tmp_path), "elsewhere/inference.py", "--folder"):
        code, out, err = run(name)
        assert (code, out, err.count("\n")) == (2, "", 1) and name in err
    code, out, _ = run("--help")
    assert code == 0 and all(f"  {Path(path).stem} " in out and path in out for path in COMMANDS)


# ---- Inference/Inference.py


@pytest.mark.parametrize("family", ["mllama", "llava, siglip"])
def test_an_image_and_a_prompt(run, family_folder, image_file, family):
    folder = family_folder(family)
    asked = ["Inference", "--image", image_file, "--prompt=-How many?", "--max-new-tokens", 12]
    answer = expected(folder, image_file, "-How many?", max_new_tokens=12)
    assert run(*asked, "--cpu", "--model-id", folder)[:2] == (0, answer + "\n")
    torch.manual_seed(0)
    options = ["--model-id", folder, "--temperature", 2, "--top-p", 0.99]
    assert len({run(*asked, *options)[1] for _ in range(4)}) > 1


def test_its_defaults(run, monkeypatch):
    monkeypatch.setattr("mllama.cli.main", lambda arguments: print(*arguments))
    said = (
        "generate --model-id=meta-llama/Llama-3.2-11B-Vision-Instruct --max-new-tokens=128"
        " --temperature=0.0 --top-p=1.0 --dtype=auto --image a.png --prompt b\n"
    )
    assert run("Inference/Inference.py", "--image", "a.png", "--prompt", "b")[1] == said


def test_the_cat_of_the_readmes(run_file):
    options = ["--image", "examples/cat.jpg", "--prompt", "What is this?", "--cpu"]
    options += ["--dtype", "float32", "--max-new-tokens", 8, "--model-id", EMBEDDED]
    answer = expected(None, ROOT / "examples/cat.jpg", "What is this?", max_new_tokens=8)
    assert run_file("Inference/Inference.py", *options) == answer + "\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("Inference --image none.png --prompt a --model-id {vlm}", "none.png"),
        ("Inference --image {image} --prompt a --model-id /nowhere", "/nowhere"),
        ("Inference --image {image} --model-id {vlm}", "--prompt"),
        ("Inference --image {image} --prompt a --model-id {llama}", "pictures|images"),
        ("inference", "--prompt"),
        ("inference --prompt a --top_k 5", "--top_k"),
        ("inference --prompt a --do_sample yes", "--do_sample"),
        ("inference --prompt a --only_cpu 1", "--only_cpu"),
        ("inference --prompt a --max_tokens_to_generate 0", "--max_tokens_to_generate"),
        ("inference --prompt a --temperature hot", "--temperature"),
        ("inference --prompt a --top_p 2", "--top_p"),
        ("inference --prompt a --image_file_path none.png", "none.png"),
        ("inference --prompt a --model_path /nowhere", "/nowhere"),
        ("dev/get_tokenizer.py some/where folder", "offline"),
        ("get_tokenizer", "google/paligemma-3b-pt-224"),
        ("Inference --image a --prompt b --hf-weights c", "--hf-weights"),
    ],
)
def test_errors_are_one_line(run, monkeypatch, image_file, family_folder, arguments, named):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"image": image_file, "vlm": family_folder("mllama"), "llama": family_folder("llama")}
    code, out, err = run(*(word.format(**places) for word in arguments.split()))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert any(name in err for name in named.split("|")), err


# ---- inference.py and its launcher


def test_variables_and_options(run, monkeypatch, image_file, model_folder):
    options = ["--model_path", model_folder, "--image_file_path", image_file]
    options += ["--max_tokens_to_generate=5", "--prompt", "1, 2"]
    asked = ("1, 2", expected(model_folder, image_file, "1, 2", max_new_tokens=5))
    assert read(run("inference", *options, "--only_cpu")[1]) == asked
    variables = {"PROMPT": "else", "DO_SAMPLE": "False", "ONLY_CPU": "True", "TOP_P": ""}
    for name, value in (variables | {"TEMPERATURE": "0.5"}).items():
        monkeypatch.setenv(name, value)
    code, out, err = run("dev/launch_inference.sh", *options)
    assert read(out) == asked and "temperature" in err  # which has no effect


def test_sampling_is_transformers(run, model_folder, image_file):
    options = ["--model_path", model_folder, "--image_file_path", image_file, "--only_cpu"]
    options += ["--max_tokens_to_generate", 6, "--prompt", "a", "--temperature", 3]
    torch.manual_seed(7)
    out = run("inference", *options, "--do_sample", "True")[1]
    torch.manual_seed(7)
    sampling = {"max_new_tokens": 6, "do_sample": True, "temperature": 3, "top_p": 0.9, "top_k": 0}
    assert read(out) == ("a", expected(model_folder, image_file, "a", **sampling))
    greedy = expected(model_folder, image_file, "a", max_new_tokens=6)
    assert read(out)[1] != greedy and read(run("inference", *options)[1])[1] == greedy


def test_in_text_alone_and_not_logged(run, monkeypatch, family_folder):
    for name in ("COMET_API_KEY", "COMET_PROJECT_NAME", "COMET_WORKSPACE"):
        monkeypatch.setenv(name, "given")
    folder = family_folder("llama")
    options = ["--model_path", folder, "--max_tokens_to_generate", 4, "--only_cpu=True"]
    code, out, err = run("inference", *options, "--prompt", "a b c")
    assert read(out) == ("a b c", expected(folder, None, "a b c", max_new_tokens=4))
    assert code == 0 and "Comet" in err
    assert run("inference", "--help")[0] == 0


def test_the_launcher(run_python, tmp_path):
    """From any folder, by every shell, with the variables' values as they are."""
    shutil.copytree(ROOT / "dev", tmp_path / "dev")  # on its own
    tell = tmp_path / "tell"  # in Python's place
    tell.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    tell.chmod(0o755)
    env = {"PYTHON": str(tell)}
    for script, cwd in (
        ("dev/launch_inference.sh", ROOT),
        ("launch_inference.sh", ROOT / "dev"),
        (ROOT / "dev" / "launch_inference.sh", tmp_path),
        ("dev/launch_inference.sh", tmp_path),
    ):
        for shell in filter(shutil.which, ("sh", "dash", "bash")):
            done = run_python(script, cwd=cwd, program=shell, env=env)
            program, *options = done.stdout.splitlines()
            given = dict(option.removeprefix("--").split("=", 1) for option in options)
            assert (cwd / program).is_file() and given.pop("prompt") == "How many circles?"
            assert (cwd / given.pop("image_file_path")).is_file() or cwd == tmp_path
            assert list(given.values()) == ["", "100", "0.8", "0.9", "False", "False"]
    changed = env | {"PROMPT": 'a  "b" $c', "TOP_P": "1", "IMAGE_FILE_PATH": ""}
    arguments = ("launch_inference.sh", "--only_cpu=True")
    told = run_python(*arguments, cwd=ROOT / "dev", program="sh", env=changed).stdout.splitlines()
    assert told[2:4] == ['--prompt=a  "b" $c', "--image_file_path="]
    assert "--top_p=1" in told and told[-1] == "--only_cpu=True"


def test_the_launcher_answers(run_python):
    variables = {"MAX_TOKENS_TO_GENERATE": "9", "ONLY_CPU": "True"}
    ended = run_python("launch_inference.sh", cwd=ROOT / "dev", program="sh", env=variables)
    drawn, prompt = ROOT / "examples/pictures/drawn.png", "How many circles?"
    assert ended.returncode == 0, ended.stderr
    assert read(ended.stdout) == (prompt, expected(None, drawn, prompt, max_new_tokens=9))


# ---- dev/get_tokenizer.py


def test_what_is_fetched(run, monkeypatch, tmp_path):
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return options["local_dir"]

    monkeypatch.setattr("mllama.checkpoints.hub.model_info", lambda model_id, **options: None)
    monkeypatch.setattr("mllama.checkpoints.hub.snapshot_download", fetch)
    assert run("get_tokenizer", "some/where", tmp_path)[:2] == (0, f"{tmp_path}\n")
    files = ["config.json", "model-00001-of-00002.safetensors", "original/tokenizer.model", "a.bin"]
    patterns = {kind: asked[0][1][kind] for kind in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:3]
    folder = "models/paligemma-weights/paligemma-3b-pt-224"
    assert run("get_tokenizer")[:2] == (0, f"{folder}\n")
    assert (asked[1][0], asked[1][1]["local_dir"]) == ("google/paligemma-3b-pt-224", folder)


@pytest.mark.parametrize(
    "path",
    [
        "Inference/Inference.py",
        "dev/inference.py",
        "dev/get_tokenizer.py",
        "examples/older/inference.py",
        "scripts/convert_lo_ra.py",
    ],
)
def test_the_files_of_older_paths(run_file, path):
    assert "usage: " in run_file(path, "--help")
