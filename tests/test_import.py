"""What happens before there is a model: lazy imports, and a compiled module that is missing,
broken, stale or wrongly asked.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import helpers
import mllama
from compiled_module import python, replaced
from mllama import _ext
from mllama.ops import _dispatch

IMAGES = Path(__file__).parent.parent / "examples" / "pictures"
HEAVY = ("torch", "transformers", "numpy", "PIL", "safetensors")


def test_the_package_and_the_help_import_nothing_heavy():
    run = python(f"""
import mllama
mllama.__version__, dir(mllama)
from mllama.cli import main
for arguments in (["--help"], ["ask", "--help"], ["--version"], ["ask", "--top-k", "x"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print(*(name for name in {HEAVY} if name in sys.modules))
""")
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "", run.stdout + run.stderr


def test_public_names_exist_and_others_are_refused():
    assert all(getattr(mllama, name) is not None for name in mllama.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loads'; its public names are .*load"):
        mllama.loads  # noqa: B018


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_without_the_compiled_module_there_is_one_error_with_its_cure(kind, tmp_path):
    file = tmp_path / "_C.so"
    file.write_bytes(b"not a library")
    cause = (
        "the compiled module mllama._C is not there"
        if kind == "missing"
        else f"mllama._C cannot be loaded: {file}"
    )
    run = python(
        replaced(None if kind == "missing" else str(file))
        + """
import json
from mllama import cli
from mllama._ext import OpsUnavailable

said = []
for name in ("ops", "load"):
    try:
        getattr(__import__("mllama"), name)
    except OpsUnavailable as error:
        said.append(str(error))
print(json.dumps(said))
sys.stdout.flush()
cli.main(["info"])  # describes a broken installation too
sys.exit(cli.main(["ask", "image.png", "How many?"]))
"""
    )
    said, *info = run.stdout.splitlines()
    import_ops, import_load = json.loads(said)
    assert import_ops == import_load and import_ops.startswith(cause)
    assert "pip install" in import_ops and "MLLAMA_DISABLE_OPS=1" in import_ops
    assert any(cause in line for line in info)
    assert (run.returncode, run.stderr) == (2, f"mllama: error: {import_ops}\n")


def test_references_need_no_replaced():
    run = python(
        replaced(None)
        + "import torch, mllama\nprint(mllama.ops.swiglu(torch.ones(1), torch.ones(1)).item())",
        MLLAMA_DISABLE_OPS="1",
    )
    assert run.returncode == 0 and run.stdout.startswith("0.731"), run.stderr


def test_disable_ops_takes_0_and_1(monkeypatch):
    monkeypatch.setenv("MLLAMA_DISABLE_OPS", "yes")
    with pytest.raises(ValueError, match="MLLAMA_DISABLE_OPS.*yes"):
        _ext.disabled()


@helpers.needs_kernels
def test_an_unknown_instruction_set_is_one_value_error():
    code = """
try:
    import mllama.ops
except ValueError as error:
    print(error)
from mllama.cli import main
sys.exit(main(["ask", "image.png", "How many?"]))
"""
    run = python(code, MLLAMA_CPU_ISA="avx9")
    assert re.fullmatch("MLLAMA_CPU_ISA: .* got 'avx9'\n", run.stdout)
    assert (run.returncode, run.stderr) == (2, f"mllama: error: {run.stdout}")


@helpers.needs_kernels
def test_a_module_of_older_sources_is_told():
    with pytest.raises(_ext.OpsUnavailable, match="rms_norm_of_tomorrow"):
        _dispatch.register("rms_norm_of_tomorrow", fake=torch.empty_like)


TRANSFORMERS_FREE = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ImportError("transformers is not installed")

sys.meta_path.insert(0, Refuse())
"""


def test_asking_needs_no_transformers(tmp_path):
    images = str(IMAGES / "photograph.jpg"), str(IMAGES / "drawn.png")
    run = python(
        TRANSFORMERS_FREE
        + f"""
import io
import mllama
from mllama.cli import main

star, drawn = {images!r}
print(mllama.ask(star, "What colour is the star?"))
print(mllama.ask(drawn, ["How many objects are there?", "Where is the star?"], max_new_tokens=9))
print(mllama.ask(star, "What colour is the star?", temperature=0.5, top_p=0.9) != "")
assert main(["ask", star, "What colour is the star?"]) == 0
sys.stdin = io.StringIO("What colour is the star?\\nHow many objects are there?\\n")
assert main(["chat", star]) == 0
assert main(["info", "--json"]) == 0
assert "transformers" not in sys.modules
"""
    )
    assert run.returncode == 0, run.stderr
    *said, info = run.stdout.splitlines()
    assert said == ["red", "['3', 'top']", "True", "red", "red", "3"]
    assert json.loads(info)["transformers"]


def test_a_gguf_model_chats_without_transformers(family_folder, tmp_path):
    pytest.importorskip("gguf")
    from mllama.cli import main

    file = tmp_path / "model.gguf"
    assert main(["convert", str(family_folder("llama")), str(file), "--to", "gguf"]) == 0
    run = python(
        TRANSFORMERS_FREE
        + f"""
import io
from mllama.cli import main
sys.stdin = io.StringIO("a b c\\nd\\n")
sys.exit(main(["chat", "--model", {str(file)!r}, "--max-new-tokens", "4", "--json"]))
"""
    )
    assert run.returncode == 0, run.stderr
    assert [json.loads(line)["tokens"] for line in run.stdout.splitlines()] == [4, 4]


def test_what_a_session_does_not_have_goes_through_transformers():
    image = str(IMAGES / "photograph.jpg")
    run = python(
        f"""
import mllama
print(mllama.ask({image!r}, "What colour is the star?", num_beams=2))
print("transformers" in sys.modules)
"""
    )
    assert run.stdout.splitlines() == ["red", "True"], run.stderr


def test_processing_and_checkpoints_work_without_transformers():
    run = python("""
sys.modules["transformers"] = None
import importlib, pkgutil, mllama.processing
for module in pkgutil.iter_modules(mllama.processing.__path__):
    importlib.import_module(f"mllama.processing.{module.name}")
from mllama.assets import EMBEDDED
from mllama.checkpoints import open_checkpoint
from mllama.processing.auto import load_preprocessor
from mllama.processing.conversation import encode_messages
batch = encode_messages(load_preprocessor(EMBEDDED), [{"role": "user", "content": "What is it?"}])
assert batch["input_ids"].shape[1] > 3
assert open_checkpoint(EMBEDDED).family.name == "llava"
assert "mllama.hf" not in sys.modules
""")
    assert run.returncode == 0, run.stderr


def test_processors_import_no_models_of_transformers():
    run = python("""
import mllama.hf.processors.llava
names = [name for name in sys.modules if name.startswith("transformers.models.")]
models = [name for name in names if ".modeling_" in name and ".auto." not in name]
assert not models, models
""")
    assert run.returncode == 0, run.stderr
