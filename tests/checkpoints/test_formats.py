"""Every format's table and config against what stock transformers saves: all is read, and what is written stock reads back the same."""

import json

import pytest
import torch

import stock
from mllama.checkpoints import FORMATS
from mllama.checkpoints.engine import plan, to_file
from mllama.checkpoints.files import save_weights, write_json
from mllama.checkpoints.sources import open_safetensors


def read_folder(folder, form):
    """(config, the tensors under our names) of a folder."""
    config = form.from_file(json.loads((folder / "config.json").read_text()))
    with open_safetensors(folder) as source:
        moves, unknown, twice = plan(form.table(config), source.headers())
        assert not unknown and not twice
        values = {}
        for move in moves:
            values |= zip(move.ours, move.row.read([source.read(name).clone() for name in move.theirs]), strict=True)
    return config, values


@pytest.mark.parametrize("case", stock.MAKERS)
def test_stock_reads_what_is_written_of_what_stock_wrote(case, tmp_path):
    model, form = stock.make(case), FORMATS[case.split(",")[0]]
    model.save_pretrained(tmp_path / "stock")
    config, values = read_folder(tmp_path / "stock", form)
    assert {name.split(".")[0] for name in values} <= {"language_model", "lm_head", "vision_tower", "multi_modal_projector", "head"}

    (tmp_path / "ours").mkdir()
    save_weights(tmp_path / "ours", to_file(form.table(config), values), "100KB")
    write_json(tmp_path / "ours" / "config.json", form.to_file(config))
    part = model.vision_model if case == "siglip" else model
    again, report = type(part).from_pretrained(tmp_path / "ours", output_loading_info=True)
    if case != "llava, siglip":  # stock gives its tower a pooling head that LLaVA has no use for
        assert not any(report.values()), report
        assert again.state_dict().keys() == part.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, part.state_dict()[name]), name
    assert read_folder(tmp_path / "ours", FORMATS["siglip_vision_model"] if case == "siglip" else form)[1].keys() == values.keys()
