"""`mllama quantize`: what it writes opens as it was packed; the report's numbers are those of the
two models; nothing is lost when it fails.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import meta_reference
import mllama
import tiny
from checkpoints.test_memory import save_zeros
from cli.test_convert import PARAMS, write
from helpers import needs_kernels
from mllama import MllamaForConditionalGeneration
from mllama.quant.report import cross_entropy, perplexity

pytestmark = needs_kernels
TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 12
REPORT = "quantization_report.json"


def load(folder, **options) -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration.from_pretrained(folder, **options)


def equal(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("family", ["llama", "llava, siglip", "paligemma", "mllama"])
def test_what_it_writes(run, family_folder, text, tmp_path, family):
    source, target = family_folder(family), tmp_path / "out"
    code, out, _ = run("quantize", source, target, "--text", text)
    assert code == 0 and out.startswith(f"{target}: weights packed as int4\n")
    assert "perplexity" in out and "language_model.layers." in out
    assert equal(load(target), load(source, weights="int4"))
    model, processor = mllama.load(target)
    assert model.packed_weights == "int4"
    assert type(processor) is type(mllama.load(source)[1])


def test_the_report(run, family_folder, text, tmp_path):
    source, target = family_folder("llama"), tmp_path / "out"
    code, out, _ = run("quantize", source, target, "--weights", "int8", "--text", text, "--json")
    found = json.loads(out)
    assert code == 0 and json.loads((target / REPORT).read_text()) == found
    assert found["weights"] == "int8" and found["calibrated"] is False
    dense, packed = load(source), load(target)
    tokenizer = mllama.load(source)[1]
    ids = torch.tensor([tokenizer.encode(TEXT, add_special_tokens=False)])
    ids = ids[:, : ids.shape[1] // 512 * 512 or None].view(-1, min(512, ids.shape[1]))
    assert found["tokens"] == ids.numel()
    with torch.no_grad():
        expected, logits = (model(input_ids=ids).logits for model in (dense, packed))
    close = {"rel": 1e-3}
    for name, model in (("source", dense), ("packed", packed)):
        value = found["perplexity"][name]
        assert value == pytest.approx(perplexity(cross_entropy(model, ids)), **close)
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        assert value == pytest.approx(loss.exp().item(), **close)
    assert found["logits"]["max_error"] == pytest.approx(
        (logits - expected).abs().max().item(), rel=1e-2
    )
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert found["logits"]["kl_divergence"] == pytest.approx(divergence.mean().item(), rel=2e-2)
    assert len(found["layers"]) == 7 * dense.spec.text.num_hidden_layers + 1
    assert all(0 < error < 0.05 for error in found["layers"].values())
    layers = packed.language_model.layers
    stored = sum(m.packed.nbytes for m in layers.modules() if hasattr(m, "packed"))
    assert found["bytes"]["after"]["decoder"]["int8"] == stored
    dense_bytes = sum(p.nbytes for n, p in layers.named_parameters() if "norm" in n)
    assert found["bytes"]["after"]["decoder"]["f32"] == dense_bytes + 4 * 64  # the last norm
    parts = {"embeddings": dense.lm_head.weight.numel() * 4}
    assert sum(found["bytes"]["before"]["embeddings"].values()) == parts["embeddings"]


def test_a_gguf_file_keeps_its_blocks(run, family_folder, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    assert run("convert", family_folder("llama"), path, "--to", "gguf", "--dtype", "q8_0")[0] == 0
    code, out, _ = run("quantize", path, tmp_path / "out", "--weights", "file", "--json")
    sizes = json.loads(out)["bytes"]
    assert code == 0 and sizes["before"]["decoder"]["q8_0"] == sizes["after"]["decoder"]["int8"]
    assert equal(load(tmp_path / "out"), load(path, weights="file"))


def test_metas_files(run, tmp_path):
    code = meta_reference.load("model")
    model = code.Transformer(code.ModelArgs(**PARAMS, max_seq_len=8, max_batch_size=1))
    metas = write(tmp_path / "metas", tiny.randomize(model), PARAMS)
    assert run("quantize", metas, tmp_path / "out", "--no-report")[0] == 0
    assert equal(load(tmp_path / "out"), load(metas, weights="int4"))
    assert not (tmp_path / "out" / REPORT).exists()


def test_calibration_lowers_the_error_on_other_text(run, text, tmp_path):
    """Of the layers of the embedded model's decoder, whose weights were trained. Its logits say
    little without an image.
    """
    from mllama.assets import EMBEDDED

    errors = {}
    (tmp_path / "known.txt").write_text(
        "what color is the star? red. how many objects are there? three. where is the circle? "
        "top left. is there a blue square? yes. what shape is green? a triangle. " * 8
    )
    (tmp_path / "other.txt").write_text(
        "is the circle red? no, it is blue. what is at the bottom? a yellow diamond. " * 4
    )
    for name, more in (("plain", []), ("calibrated", ["--calibrate", tmp_path / "known.txt"])):
        command = ["quantize", EMBEDDED, tmp_path / name, "--text", tmp_path / "other.txt"]
        code, out, err = run(*command, "--json", *more)
        assert code == 0, err
        found = json.loads(out)
        assert found["calibrated"] is bool(more)
        layers = [e for n, e in found["layers"].items() if n.startswith("language_model.")]
        errors[name] = sum(layers) / len(layers)
    assert errors["calibrated"] < 0.9 * errors["plain"]


def test_writes_over_nothing_unless_told(run, family_folder, tmp_path):
    source, target = family_folder("llama"), tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    command = ["quantize", source, target, "--no-report"]
    assert run(*command)[0] == 2
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    assert run(*command, "--force")[0] == 0
    assert run(*command, "--force", "--weights", "int8")[0] == 0
    assert load(target).packed_weights == "int8"
    assert (target / "notes.txt").read_text() == "mine"
    assert run("quantize", source, target / "notes.txt")[0] == 2
    before = {path.name: path.read_bytes() for path in Path(source).iterdir()}
    code, _, err = run("quantize", source, source, "--force", "--no-report")
    assert code == 2 and "OUT" in err
    assert {path.name: path.read_bytes() for path in Path(source).iterdir()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--text", "TEXT", "--no-report"], "text"),
        (["--text", "SHORT"], "short"),
        (["--text", "BROKEN"], "UTF-8"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--calibrate", "TEXT", "--weights", "int8"], "calibration"),
        (["--calibrate", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_it_does_not_take(run, family_folder, tmp_path, text, options, named):
    (tmp_path / "short").write_text("a")
    (tmp_path / "broken").write_bytes(b"\xff\xfe\xff")
    files = {"TEXT": text, "SHORT": tmp_path / "short", "BROKEN": tmp_path / "broken"}
    options = [files.get(word, word) for word in options]
    code, _, err = run("quantize", family_folder("llama"), tmp_path / "out", *options)
    assert code == 2 and named in err and not (tmp_path / "out").exists()


def test_an_image_encoder(run, family_folder, tmp_path):
    code, _, _ = run("quantize", family_folder("siglip"), tmp_path / "out", "--weights", "int8")
    found = json.loads((tmp_path / "out/quantization_report.json").read_text())
    assert code == 0 and "tokenizer" in found["skipped"]
    assert found["bytes"]["after"]["vision encoder"].keys() == {"int8", "f32"}


def test_sources_that_cannot_be_packed(run, family_folder, tmp_path, text):
    options = ["--no-report", "--calibrate", text]
    assert run("quantize", family_folder("siglip"), tmp_path / "out", *options)[0] == 2
    assert run("quantize", family_folder("llama"), tmp_path / "packed", "--no-report")[0] == 0
    for command in (
        ["quantize", tmp_path / "packed", tmp_path / "out"],
        ["convert", tmp_path / "packed", tmp_path / "out", "--to", "hf"],
    ):
        code, _, err = run(*command)
        assert code == 2 and "packed" in err
    assert not (tmp_path / "out").exists()


def test_other_commands_on_what_it_writes(run, family_folder, tmp_path):
    folder = tmp_path / "packed"
    assert run("quantize", family_folder("llama"), folder, "--no-report")[0] == 0
    code, out, _ = run("ask", "a b", "--model", folder, "--max-new-tokens", 2, "--json")
    assert code == 0 and json.loads(out)["weights"] == "int4"
    assert run("ask", "a", "--model", folder, "--weights", "int8")[0] == 2
    assert run("verify", folder)[0] == 2
    options = ["--prompt", "a", "--model", folder, "--max-new-tokens", 2]
    assert run("generate", *options)[0] == 0
    assert run("generate", *options, "--runtime", "transformers")[0] == 2


def test_a_failure_leaves_nothing(run, family_folder, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("mllama.hf.quantizing._report", fail)
    assert run("quantize", family_folder("llama"), tmp_path / "out")[0] == 2
    assert list(tmp_path.iterdir()) == []


CHILD = """
    import re, sys, threading
    import torch
    from mllama.hf.quantizing import quantize

    torch.zeros(1) + 1
    def resident():
        return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
    peak = before = resident()
    done = threading.Event()
    def sample():
        global peak
        while not done.wait(0.001):
            peak = max(peak, resident())
    thread = threading.Thread(target=sample)
    thread.start()
    quantize(*sys.argv[1:], report=False)
    done.set()
    thread.join()
    print(1024 * (peak - before))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_has_the_packed_weights_and_one_layer(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    config = LlamaConfig(**sizes, vocab_size=8000, num_hidden_layers=6, tie_word_embeddings=True)
    save_zeros(config, tmp_path / "dense", "100MB")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path / "dense", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    dense, written = (
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        for name in ("dense", "out")
    )
    largest = 8000 * 1024 * 4
    assert dense > 200e6 and int(done.stdout.split()[-1]) < 1.1 * written + 2 * largest
