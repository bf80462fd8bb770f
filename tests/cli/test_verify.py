"""`mllama verify`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllama
import tiny
from mllama.cli import verify
from tiny import stock

FAMILIES = ["llama", "gemma", "llava, siglip", "llava, clip", "paligemma", "mllama"]
SEEN = ["patches", "vision encoder", "projector"]
OWN = ["cached = uncached", "batched = single"]


def verified(run, folder, *options) -> tuple[int, dict]:
    code, out, _ = run("verify", folder, "--json", *options)
    return code, json.loads(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_transformers(run, family_folder, family):
    code, said = verified(run, family_folder(family))
    stages = [row["stage"] for row in said["checks"]]
    layers = [f"layer {number}" for number in range(5 if family == "mllama" else 2)]
    assert stages == (SEEN if "llama" != family != "gemma" else []) + [
        "embeddings",
        *layers,
        "logits",
        *OWN,
    ]
    assert (
        code == 0
        and said["ok"]
        and all(row["ok"] and row["difference"] < 1e-5 for row in said["checks"])
    )
    assert ('reference="hf"' in said["against"]) == (family == "mllama")


def test_a_siglip(run, family_folder):
    code, said = verified(run, family_folder("siglip"))
    stages = [row["stage"] for row in said["checks"]]
    assert (code, stages) == (
        0,
        [
            "patches",
            "embeddings",
            "layer 0",
            "layer 1",
            "layer 2",
            "last hidden state",
            "pooler output",
        ],
    )


@pytest.mark.parametrize("token", [None, tiny.IMAGE])
@pytest.mark.parametrize("fusion", ["prepend", "cross_attention"])
def test_other_fusions_agree_with_themselves(run, fusion, token, tmp_path):
    tiny.model(fusion=fusion, image_token_index=token).save_pretrained(tmp_path)
    code, said = verified(run, tmp_path)
    assert (code, [row["stage"] for row in said["checks"]]) == (0, OWN)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", ["paligemma", "mllama", "siglip"])
def test_half_precision_is_measured_by_transformers_own_error(run, family_folder, family, seed):
    code, said = verified(run, family_folder(family), "--dtype", "bfloat16", "--seed", seed)
    least = torch.finfo(torch.bfloat16).eps
    assert code == 0 and all(least <= row["allowed"] < 0.2 for row in said["checks"])


def test_half_precision_of_what_transformers_does_not_read_is_measured_by_its_own_error(
    run, tmp_path
):
    tiny.model(vision_feature="last").save_pretrained(tmp_path)
    code, said = verified(run, tmp_path, "--dtype", "bfloat16")
    assert (code, [row["stage"] for row in said["checks"]]) == (0, OWN)
    assert all(torch.finfo(torch.bfloat16).eps < row["allowed"] < 0.2 for row in said["checks"])


def test_both_references_are_cached_and_batched_alike(run, family_folder):
    assert [
        verified(run, family_folder("mllama"), "--reference", name)[0] for name in ("meta", "hf")
    ] == [0, 0]


def swap_rows(model) -> None:
    """What a file of rotating neighbours is when nobody permutes it."""
    weight = model.language_model.layers[1].self_attn.k_proj.weight
    weight.copy_(weight.unflatten(0, (2, 8, 2)).transpose(1, 2).flatten(0, 2).clone())


def swap_norms(model) -> None:
    layer = model.vision_tower.encoder.layers[0]
    layer.layer_norm1, layer.layer_norm2 = layer.layer_norm2, layer.layer_norm1


def scale_norm(model) -> None:
    model.language_model.layers[1].input_layernorm.weight.mul_(1.3)


def swap_gate_and_up(model) -> None:
    mlp = model.language_model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def drop_layer(model) -> None:
    layer = model.language_model.layers[1]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


@pytest.fixture
def tampered(monkeypatch):
    """tampered(change): what is loaded from here on is changed."""
    load = mllama.MllamaForConditionalGeneration.from_pretrained

    def apply(change) -> None:
        def changed(*args, **options):
            model = load(*args, **options)
            with torch.no_grad():
                change(model)
            return model

        monkeypatch.setattr(mllama.MllamaForConditionalGeneration, "from_pretrained", changed)

    return apply


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tamper", "first"),
    [
        (swap_rows, "layer 1"),
        (swap_norms, "vision encoder"),
        (scale_norm, "layer 1"),
        (swap_gate_and_up, "layer 1"),
        (drop_layer, "layer 1"),
    ],
)
def test_a_wrong_weight_fails_from_its_stage_on(run, model_folder, tampered, tamper, first, dtype):
    tampered(tamper)
    code, said = verified(run, model_folder, "--dtype", dtype)
    wrong = [row["stage"] for row in said["checks"] if not row["ok"]]
    assert (code, said["ok"], wrong[0], wrong[-1]) == (1, False, first, "logits")
    code, out, _ = run("verify", model_folder, "--dtype", dtype)
    assert code == 1 and [
        line.split()[-1] for line in out.splitlines() if line.startswith(first)
    ] == ["FAIL"]


def test_a_cache_that_differs_fails(run, model_folder, monkeypatch):
    def uncut(sample, start, end):
        return {"input_ids": sample.inputs["input_ids"][:, start : end or 1] * 0 + 1}

    monkeypatch.setattr(
        "mllama.model.samples.Sample.cut",
        lambda sample, start, end: uncut(sample, max(start - 1, 0), end),
    )
    code, said = verified(run, model_folder)
    assert code == 1 and [row["stage"] for row in said["checks"] if not row["ok"]] == [
        "cached = uncached"
    ]


def test_what_transformers_does_not_read_is_compared_with_itself(run, tmp_path):
    tiny.model(vision_feature="last").save_pretrained(tmp_path)
    code, said = verified(run, tmp_path)
    assert (
        code == 0
        and [row["stage"] for row in said["checks"]] == OWN
        and "itself alone: stock transformers has no" in said["against"]
    )


def test_float32_goes_by_the_worst_element_and_half_precision_by_the_root_mean_square():
    expected = torch.tensor([[3.0, 4.0], [100.0, 30.0], [0.0, 0.0]])
    found = expected + torch.tensor([[0.0, -0.5], [0.0, 0.0], [0.0, 0.0]])
    worst, square = verify.Measure.of(torch.float32), verify.Measure.of(torch.bfloat16)
    assert worst.difference(found[None], expected) == pytest.approx(
        0.5 / float(expected.mean())
    )  # the row's own largest is less
    assert worst.difference(
        expected + torch.tensor([[0.0], [10.0], [0.0]]), expected
    ) == pytest.approx(0.1)
    rows = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    assert square.difference(rows + torch.tensor([[0.0, 0.0], [0.6, 0.8]]), rows) == pytest.approx(
        0.1 / 2**0.5
    )
    for measure in (worst, square):
        assert measure.difference(torch.ones(3, 1), torch.ones(2, 1)) == float("inf")
        assert not verify.Check(
            "logits", measure.difference(torch.full((1, 1), float("nan")), torch.ones(1, 1)), 1.0
        ).ok


def test_verify_refuses_what_is_not_there(run):
    code, out, err = run("verify", "nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_weights_that_do_not_fit_are_told_before_transformers_runs(run, family_folder, tmp_path):
    shutil.copytree(family_folder("llama"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    code, out, err = run("verify", tmp_path)
    assert (code, out, err.count("\n")) == (
        2,
        "",
        1,
    ) and "model.norm.weight is float32 [7], the model takes floating [64]" in err


def test_transformers_is_given_the_rotary_scaling_of_a_gguf_file(run, make_tokenizer, tmp_path):
    pytest.importorskip("gguf")
    tiny.randomize(stock.llama(vocab_size=320, rope_scaling=dict(tiny.LLAMA3))).save_pretrained(
        tmp_path / "hf"
    )
    make_tokenizer().save_pretrained(tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "a.gguf", "--to", "gguf")[0] == 0
    code, said = verified(run, tmp_path / "a.gguf")
    assert (
        code == 0
        and "stock transformers" in said["against"]
        and "logits" in [row["stage"] for row in said["checks"]]
    )
