"""scripts/convert_lo_ra.py."""

import pytest
import torch
from safetensors.torch import load_file

import mllama
import tiny
from mllama import MllamaForConditionalGeneration
from scripts.convert_lo_ra import main


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tiny.tokens(5)])).logits


def test_adapted_trained_and_merged(model_folder, tmp_path, capsys):
    file, merged = tmp_path / "adapters.safetensors", tmp_path / "merged"
    main(
        [
            "adapt",
            str(model_folder),
            str(file),
            "--rank",
            "2",
            "--alpha",
            "6",
            "--targets",
            "q_proj",
            "down_proj",
        ]
    )
    assert capsys.readouterr().out.startswith(
        f"{file}: 4 layers, 1,152 parameters that learn beside "
    )
    assert {name.split(".")[0] for name in load_file(file)} == {"language_model"}

    model = MllamaForConditionalGeneration.from_pretrained(model_folder)
    plain = logits(model)
    mllama.load_lora(model, file)
    assert {
        (layer.rank, layer.alpha)
        for layer in model.modules()
        if isinstance(layer, mllama.Linear_LORA)
    } == {(2, 6)}
    torch.testing.assert_close(logits(model), plain)
    for parameter in mllama.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    mllama.save_lora(model, file)

    main(["merge", str(model_folder), str(file), str(merged)])
    assert capsys.readouterr().out == f"{merged}: the llava with its adapters merged\n"
    found, processor = mllama.load(merged, dtype="float32")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(found), plain, atol=1e-2)
    assert type(processor) is type(mllama.load_processor(model_folder))


def test_all_of_a_model_without_a_processor(tmp_path, capsys):
    folder, file = tmp_path / "model", tmp_path / "adapters.safetensors"
    tiny.model().save_pretrained(folder)
    main(["adapt", str(folder), str(file), "--part", ""])
    assert {name.split(".")[0] for name in load_file(file)} == {
        "language_model",
        "lm_head",
        "multi_modal_projector",
        "vision_tower",
    }
    main(["merge", str(folder), str(file), str(tmp_path / "merged")])
    assert "no tokenizer or processor is written" in capsys.readouterr().err
    assert (
        logits(MllamaForConditionalGeneration.from_pretrained(tmp_path / "merged")).isfinite().all()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["adapt", "{folder}", "{tmp}/a.safetensors", "--part", "decoder"],
            "the model has no decoder; its parts are vision_tower,",
        ),
        (
            ["adapt", "{folder}", "{tmp}/a.safetensors", "--targets", "W_query"],
            "no linear layer is called W_query; there are down_proj,",
        ),
        (["adapt", "{folder}", "{tmp}/a.safetensors", "--rank", "0"], "rank"),
        (["adapt", "{tmp}/absent", "{tmp}/a.safetensors"], "absent"),
        (["merge", "{tmp}/absent", "{tmp}/a.safetensors", "{tmp}/merged"], "absent"),
        (
            ["merge", "{folder}", "{tmp}/a.safetensors", "{tmp}/merged"],
            "a.safetensors is no file of adapters",
        ),
        (["merge", "{folder}", "{tmp}/a.safetensors", "{folder}"], "exists and is not empty"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    model_folder, tmp_path, capsys, arguments, said
):
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(folder=model_folder, tmp=tmp_path) for argument in arguments])
    assert str(stopped.value).startswith("convert_lo_ra: error: ") and said in str(stopped.value)
    assert (
        "\n" not in str(stopped.value)
        and not capsys.readouterr().err
        and not any(tmp_path.iterdir())
    )
