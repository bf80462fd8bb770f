"""`mllama convert`: what it writes is read by stock transformers and by us, and nothing is lost
when it fails.
"""

import base64
import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import meta_reference
import mllama
import tiny
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.meta import reader as meta

PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 516,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
VISION = {
    "vision_chunk_size": 28,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 1,
}
ENCODER = {"width": 32, "layers": 2, "heads": 2, "n_global_layers": 1, "return_intermediate": [1]}
IDS = torch.tensor([[260, 3, 259, 400, 12]])


def write(folder, model: torch.nn.Module, params: dict):
    """A folder of Meta's, in half precision, which gguf's f16 holds exactly."""
    folder.mkdir()
    torch.save(
        {name: tensor.half() for name, tensor in model.state_dict().items()},
        folder / "consolidated.00.pth",
    )
    (folder / "params.json").write_text(json.dumps(params))
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello"]
    (folder / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    return folder


@pytest.fixture
def metas(tmp_path):
    """A text model's folder as Meta ships it."""
    code = meta_reference.load("model")
    return write(
        tmp_path / "metas",
        tiny.randomize(code.Transformer(code.ModelArgs(**PARAMS, max_seq_len=8, max_batch_size=1))),
        PARAMS,
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(input_ids=IDS).logits


def test_metas_text_folder_to_hugging_faces(run, metas, tmp_path):
    code, out, err = run("convert", metas, tmp_path / "hf", "--to", "hf")
    assert (code, out, err) == (0, f"{tmp_path / 'hf'}: a llama in float16\n", "")
    ours, stock = (
        mllama.MllamaForConditionalGeneration.from_pretrained(metas),
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
    )
    torch.testing.assert_close(logits(stock), logits(ours), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("hello")["input_ids"] == [260, 259]
    assert "<|start_header_id|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )


def test_to_gguf_and_back(run, metas, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (pip install 'mllama[convert]')")
    code, out, _ = run("convert", metas, tmp_path / "a.gguf", "--to", "gguf")
    assert (code, out) == (0, f"{tmp_path / 'a.gguf'}: the decoder of a llama in f16\n")
    code, out, _ = run(
        "convert", tmp_path / "a.gguf", tmp_path / "back", "--to", "hf", "--dtype", "float32"
    )
    assert (code, out) == (0, f"{tmp_path / 'back'}: a llama in float32\n")
    ours, back = (
        mllama.MllamaForConditionalGeneration.from_pretrained(path)
        for path in (metas, tmp_path / "back")
    )
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("hello")["input_ids"] == [260, 259]


def test_metas_vision_folder_to_hugging_faces(run, tmp_path, monkeypatch):
    changed = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
    }
    monkeypatch.setattr(
        meta, "VISION", meta.VISION | changed | {"intermediate_layers_indices": [1]}
    )
    reference = meta_reference.vision_model(PARAMS | VISION | {"max_seq_len": 8}, **ENCODER)
    folder = write(tmp_path / "metas", tiny.randomize(reference), PARAMS | VISION)
    code, out, err = run("convert", folder, tmp_path / "hf", "--to", "hf", "--dtype", "bfloat16")
    assert (code, out, err) == (0, f"{tmp_path / 'hf'}: a mllama in bfloat16\n", "")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    ours = mllama.MllamaForConditionalGeneration.from_pretrained(
        folder, dtype="bfloat16", reference="hf"
    )
    torch.testing.assert_close(logits(stock), logits(ours), rtol=1e-4, atol=1e-4)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert (
        processor.image_processor.size["height"] == 28
        and processor.tokenizer.convert_tokens_to_ids("<|image|>") == 516
    )

    code, _, err = run("convert", folder, tmp_path / "a.gguf", "--to", "gguf")
    assert code == 2 and "cross" in err and not (tmp_path / "a.gguf").exists()


def test_llava_where_the_shape_allows(run, model_folder, metas, tmp_path):
    code, out, _ = run("convert", model_folder, tmp_path / "llava", "--to", "llava")
    assert (code, out) == (0, f"{tmp_path / 'llava'}: a llava in float32\n")
    assert (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").config.model_type == "llava"
    )
    assert (tmp_path / "llava" / "tokenizer.json").exists()

    mllama.MllamaForConditionalGeneration(tiny.config(vision_feature="last")).save_pretrained(
        tmp_path / "last"
    )
    for source, kind in ((tmp_path / "last", "siglip_llama"), (metas, "llama")):
        code, _, err = run("convert", source, tmp_path / "no", "--to", "llava")
        assert (
            code == 2
            and f"holds a {kind}, which cannot be written as LLaVA" in err
            and not (tmp_path / "no").exists()
        )


def test_writes_over_nothing_unless_told(run, metas, tmp_path):
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "notes.txt").write_text("mine")
    code, _, err = run("convert", metas, full, "--to", "hf")
    assert (
        code == 2
        and err == f"mllama: error: {full} exists and is not empty; --force writes over it\n"
    )
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert run("convert", metas, full, "--to", "hf", "--force")[0] == 0
    assert (full / "notes.txt").read_text() == "mine" and (full / "model.safetensors").exists()
    assert run("convert", metas, empty, "--to", "hf")[0] == 0

    (tmp_path / "a.gguf").write_text("mine")
    code, _, err = run("convert", metas, tmp_path / "a.gguf", "--to", "gguf")
    assert (
        code == 2
        and err == f"mllama: error: {tmp_path / 'a.gguf'} exists; --force writes over it\n"
    )
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_several_chat_templates_are_written_over(run, family_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(family_folder("llama"))
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    shutil.copytree(family_folder("llama"), tmp_path / "several")
    tokenizer.save_pretrained(tmp_path / "several")
    for source, several in (("several", True), ("several", True), (family_folder("gemma"), False)):
        assert run("convert", tmp_path / source, tmp_path / "hf", "--to", "hf", "--force")[0] == 0
        assert (tmp_path / "hf" / "additional_chat_templates").exists() == several


def test_no_processor_of_the_model_before_stays(run, family_folder, tmp_path):
    assert run("convert", family_folder("llava, clip"), tmp_path / "hf", "--to", "hf")[0] == 0
    assert (tmp_path / "hf" / "chat_template.jinja").exists() and (
        tmp_path / "hf" / "processor_config.json"
    ).exists()
    assert run("convert", family_folder("gemma"), tmp_path / "hf", "--to", "hf", "--force")[0] == 0
    assert run("convert", family_folder("gemma"), tmp_path / "fresh", "--to", "hf")[0] == 0
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        path.name for path in (tmp_path / "fresh").iterdir()
    }


@pytest.mark.parametrize(
    ("target", "options", "error"),
    [
        ("out", ["--to", "gguf"], "OUT"),
        ("folder.gguf", ["--to", "gguf", "--force"], "OUT"),
        ("file", ["--to", "hf", "--force"], "OUT"),
        (
            "out",
            ["--to", "hf", "--dtype", "q8_0"],
            "--to hf takes --dtype auto, float32, bfloat16, float16, got q8_0",
        ),
        (
            "out.gguf",
            ["--to", "gguf", "--dtype", "float16"],
            "--to gguf takes --dtype f16, bf16, q8_0, q4_0, q4_k, got float16",
        ),
    ],
)
def test_what_it_does_not_take(run, metas, tmp_path, target, options, error):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "file").touch()
    code, _, err = run("convert", metas, tmp_path / target, *options)
    assert code == 2 and error in err and err.count("\n") == 1
    assert not (tmp_path / target).exists() or target in ("folder.gguf", "file")


@pytest.mark.parametrize(
    ("family", "formats"),
    [
        ("llama", ("hf", "gguf", "hf", "gguf")),
        ("gemma", ("gguf", "hf")),
        ("mllama", ("hf",)),
        ("paligemma", ("hf",)),
        ("llava, siglip", ("llava",)),
    ],
)
def test_several_ends_of_generation_survive(run, family_folder, tmp_path, family, formats):
    source = tmp_path / "source"
    shutil.copytree(family_folder(family), source)
    said = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(said | {"eos_token_id": [7, 0, 9]}))
    for number, kind in enumerate(formats):
        target = tmp_path / f"{number}{'.gguf' if kind == 'gguf' else ''}"
        assert run("convert", source, target, "--to", kind)[0] == 0
        source = target
        with (opened := open_checkpoint(source)).source:
            assert opened.generation["eos_token_id"] == [7, 0, 9]


def test_a_failure_leaves_nothing(run, metas, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    code, _, err = run("convert", metas, tmp_path / "hf", "--to", "hf")
    assert (code, err) == (2, "mllama: error: disk full\n")
    (metas / "consolidated.00.pth").write_bytes(b"broken")
    code, _, err = run("convert", metas, tmp_path / "hf", "--to", "hf")
    assert code == 2 and "is no archive that torch.save wrote" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_model_without_its_tokenizer(run, metas, tmp_path):
    (metas / "tokenizer.model").unlink()
    code, _, err = run("convert", metas, tmp_path / "hf", "--to", "hf")
    assert (
        code == 0
        and err.startswith("mllama: no tokenizer or processor is written: ")
        and not (tmp_path / "hf" / "tokenizer.json").exists()
    )
    code, _, err = run("convert", metas, tmp_path / "a.gguf", "--to", "gguf")
    assert code == 2 and "tokenizer" in err
