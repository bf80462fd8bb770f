"""Files made to harm: each is refused with a clear error, nothing outside the folder is read, no
memory taken for what they claim.
"""

import copy
import json
import os
import struct
import time

import pytest
import torch

from mllama import MllamaForConditionalGeneration, SiglipModel
from mllama.checkpoints.files import CONFIG, INDEX, WEIGHTS
from tiny import stock
from tiny.folders import change


@pytest.fixture
def llama(tmp_path):
    """A small Llama's folder."""
    stock.make("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refuse(folder, match: str | None = None, error=ValueError) -> str:
    with pytest.raises(error, match=match) as caught:
        MllamaForConditionalGeneration.from_pretrained(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, "generation_config.json", WEIGHTS])
def test_a_link_out_of_the_folder_is_refused(name, llama, tmp_path):
    os.replace(llama / name, tmp_path / name)
    (llama / name).symlink_to(tmp_path / name)
    refuse(llama, "outside the folder")
    (llama / name).unlink()
    (llama / name).symlink_to(os.path.relpath(tmp_path / name, llama))
    refuse(llama, "outside the folder")


def test_a_shard_or_an_index_that_leads_out_is_refused(tmp_path):
    folder = tmp_path / "model"
    stock.make("llama").save_pretrained(folder, max_shard_size="100KB")
    for name in (INDEX, next(folder.glob("model-*")).name):
        os.replace(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        refuse(folder, "outside the folder")
        (folder / name).unlink()
        os.replace(tmp_path / name, folder / name)
    MllamaForConditionalGeneration.from_pretrained(folder)


def test_a_link_inside_the_folder_and_a_link_to_the_folder_are_followed(llama, tmp_path):
    os.replace(llama / WEIGHTS, llama / "weights")
    (llama / WEIGHTS).symlink_to("weights")
    (tmp_path / "link").symlink_to(llama)
    MllamaForConditionalGeneration.from_pretrained(tmp_path / "link")


def test_a_folder_only_named_like_a_cache_has_no_blobs_elsewhere(llama, tmp_path):
    snapshot = tmp_path / "blobs" / "snapshots" / "x"
    snapshot.parent.mkdir(parents=True)
    os.replace(llama, snapshot)
    os.replace(snapshot / CONFIG, tmp_path / "blobs" / "config")
    (snapshot / CONFIG).symlink_to("../../config")
    refuse(snapshot, "outside the folder")


@pytest.mark.parametrize("name", [CONFIG, "generation_config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "dangling", "loop"])
def test_what_is_no_ordinary_file_is_refused_at_once(name, kind, llama):
    (llama / name).unlink()
    if kind == "folder":
        (llama / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(llama / name)
    else:
        (llama / name).symlink_to(
            {"device": "/dev/zero", "dangling": "nowhere", "loop": name}[kind]
        )
    start = time.monotonic()
    if name == "generation_config.json" and kind in ("dangling", "loop"):
        MllamaForConditionalGeneration.from_pretrained(llama)  # as if it were not there
    else:
        refuse(llama, error=(ValueError, FileNotFoundError))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", [CONFIG, "generation_config.json", INDEX])
def test_a_huge_json_file_is_not_read(name, llama):
    if name == INDEX:
        (llama / WEIGHTS).unlink()
    with open(llama / name, "wb") as file:
        file.truncate(2**40)  # bytes, none of them on the disk
    refuse(llama, "at most")


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "a length beyond the file": safetensors({}, length=2**40),
    "the largest length": safetensors({}, length=2**64 - 1),
    "no JSON": safetensors(b"{" * 64),
    "deep JSON": safetensors(b"[" * 100000),
    "no UTF-8": safetensors(b'{"\xff": 1}'),
    "no object": safetensors([1]),
    "data beyond the file": safetensors({"a": tensor([4], [0, 16])}, b"\0" * 8),
    "data left over": safetensors({"a": tensor([1], [0, 4])}, b"\0" * 8),
    "a hole": safetensors({"a": tensor([1], [0, 4]), "b": tensor([1], [8, 12])}, b"\0" * 12),
    "an overlap": safetensors({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}, b"\0" * 12),
    "offsets reversed": safetensors({"a": tensor([1], [4, 0])}, b"\0" * 4),
    "a shape larger than its data": safetensors({"a": tensor([1024], [0, 4])}, b"\0" * 4),
    "a shape whose product overflows": safetensors({"a": tensor([2**32, 2**32], [0, 0])}),
    "a negative shape": safetensors({"a": tensor([-1], [0, 4])}, b"\0" * 4),
    "an unknown type": safetensors({"a": tensor([1], [0, 4], "F31")}, b"\0" * 4),
    "a type torch has not": safetensors({"a": tensor([2], [0, 1], "F4")}, b"\0"),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_files_that_lie_are_refused(case, llama):
    (llama / WEIGHTS).write_bytes(HEADERS[case])
    assert str(llama) in refuse(llama, "is not a valid safetensors file|which is not known")


def test_a_huge_shape_of_no_elements_is_refused(llama):
    name = "model.norm.weight"
    header = {name: tensor([2**63 - 1, 0], [0, 0])} | {
        str(other): tensor([0], [0, 0]) for other in range(9)
    }
    (llama / WEIGHTS).write_bytes(safetensors(header))
    refuse(llama, rf"{name} is float32 \[9223372036854775807, 0\], the model takes floating \[64\]")


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\ud800"])
def test_names_that_a_terminal_would_act_on_are_escaped(name, tmp_path):
    stock.make("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    change(
        tmp_path,
        lambda content: content["weight_map"].update({name: "model-00001-of-00006.safetensors"}),
        INDEX,
    )
    assert repr(name) in refuse(tmp_path, "its files do not hold")
    change(tmp_path, lambda content: content["weight_map"].update({"lm_head.weight": name}), INDEX)
    assert repr(name) in refuse(tmp_path)


def test_many_unexpected_tensors_make_a_short_error(llama):
    header = {f"surprise.{number}": tensor([0], [0, 0]) for number in range(20000)}
    (llama / WEIGHTS).write_bytes(safetensors(header))
    assert len(refuse(llama, r"unexpected \(20000\)")) < 10000


HOSTILE = [
    None,
    -1,
    0,
    2**31,
    2**63,
    1.5,
    float("nan"),
    "x",
    [],
    {},
    [[1]],
    [2**40] * 3,
    {"a": 1},
    True,
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "case",
    ["llama, factor 8", "siglip_vision_model", "llava, clip, 2, tied", "paligemma", "mllama"],
)
def test_any_value_of_any_field_loads_or_is_refused(case, tmp_path):
    """One value per field, others in another family; never another error, never for long."""
    stock.make(case).save_pretrained(tmp_path)
    load = SiglipModel if case.startswith("siglip") else MllamaForConditionalGeneration
    content = json.loads((tmp_path / CONFIG).read_text())
    places = [None, *(name for name in content if name.endswith("_config"))]
    tried = 0
    for place in places:
        fields = content if place is None else content[place]
        for number, field in enumerate(
            [
                *fields,
                "num_labels",
                "rope_scaling",
                "quantization_config",
                "torch_dtype",
                "id2label",
            ]
        ):
            value = HOSTILE[(7 * number + len(case)) % len(HOSTILE)]
            changed = copy.deepcopy(content)
            (changed if place is None else changed[place])[field] = value
            (tmp_path / CONFIG).write_text(json.dumps(changed))
            start = time.monotonic()
            try:
                model = load.from_pretrained(tmp_path)
            except ValueError:
                pass
            else:
                assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
            assert time.monotonic() - start < 10, (place, field, value)
            tried += 1
    assert tried >= 20


@pytest.mark.parametrize(
    ("case", "edit", "named"),
    [
        (
            "mllama",
            lambda c: c["vision_config"].update(num_global_layers=10**6),
            "vision_config: num_global_layers is 1000000",
        ),
        (
            "mllama",
            lambda c: c["text_config"].update(num_hidden_layers=10**6),
            "text_config: num_hidden_layers",
        ),
        (
            "mllama",
            lambda c: c["vision_config"].update(
                max_num_tiles=10**6, supported_aspect_ratios=[[1, 1]] * 1000
            ),
            "max_num_tiles",
        ),
        (
            "mllama",
            lambda c: c["text_config"].update(cross_attention_layers=[0, 10**9]),
            "cross_attention_layers",
        ),
        (
            "mllama",
            lambda c: c["vision_config"].update(intermediate_layers_indices=[-1]),
            "intermediate_layers_indices",
        ),
        ("llama", lambda c: c.update(num_hidden_layers=10**6), "num_hidden_layers"),
        ("llama", lambda c: c.update(num_labels=10**9), "num_labels"),
        ("llama", lambda c: c.update(to_dict=3), "to_dict"),
        (
            "llama",
            lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
            "rope_type",
        ),
        (
            "llama",
            lambda c: c.update(auto_map={"AutoModel": "x.Y"}, num_attention_heads=0),
            "num_attention_heads",
        ),
        ("paligemma", lambda c: c["vision_config"].update(patch_size=0), "patch_size"),
        (
            "paligemma",
            lambda c: c["text_config"].update(num_labels=10**9),
            "text_config: num_labels",
        ),
        ("paligemma", lambda c: c.update(text_config=[]), "text_config"),
        ("llava, clip, 2, tied", lambda c: c["text_config"].update(model_type="qwen2"), "'qwen2'"),
        (
            "llava, clip, 2, tied",
            lambda c: c["vision_config"].update(model_type="pixtral"),
            "'pixtral'",
        ),
        ("siglip", lambda c: c["vision_config"].update(image_size=2**40), "image_size"),
    ],
)
def test_hostile_configs_are_refused_by_name(case, edit, named, tmp_path):
    stock.make(case).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    edit(content)
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=named):
        (SiglipModel if case == "siglip" else MllamaForConditionalGeneration).from_pretrained(
            tmp_path
        )


def test_fields_that_steer_code_are_left_out_at_every_depth(tmp_path):
    stock.make("llava, clip, 2, tied").save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    steering = {
        "_attn_implementation_internal": "x/y",
        "auto_map": {"AutoModel": "evil.Model"},
        "trust_remote_code": True,
    }
    for part in (content, content["text_config"], content["vision_config"]):
        part |= steering
    (tmp_path / CONFIG).write_text(json.dumps(content))
    config = MllamaForConditionalGeneration.from_pretrained(tmp_path).config
    for part in (config, config.text_config, config.vision_config):
        assert (
            part._attn_implementation in (None, "eager")
            and not hasattr(part, "auto_map")
            and not hasattr(part, "trust_remote_code")
        )
