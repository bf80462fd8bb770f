"""Meta's own folders: tensors and logits equal to Meta's reference code, from one file and from
parallel shards; hostile folders.
"""

import json
import os
import pickle
import re
import zipfile

import pytest
import torch
from transformers import LlamaForCausalLM

import meta_reference
import tiny
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.loading import match
from mllama.checkpoints.meta import reader as meta
from mllama.checkpoints.meta import source as meta_source
from mllama.checkpoints.meta import weight_maps as meta_maps
from mllama.checkpoints.meta.source import MetaSource
from mllama.checkpoints.sources import Header
from mllama.hf.config_objects import config_object
from mllama.weights.rows import to_file
from tiny.sizes import META_ENCODER as ENCODER

PARAMS = {
    "grouped": {
        "dim": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 520,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 32,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "all heads": {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": 96,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "multiple_of": 16,
    },
    "more layers": {
        "dim": 96,
        "n_layers": 5,
        "n_heads": 6,
        "n_kv_heads": 2,
        "vocab_size": 640,
        "ffn_dim_multiplier": 1.0,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
}


def text_reference(params: dict) -> torch.nn.Module:
    code = meta_reference.load("model")
    return tiny.randomize(
        code.Transformer(code.ModelArgs(**params, max_seq_len=16, max_batch_size=2))
    ).eval()


def write(folder, model: torch.nn.Module, params: dict, count: int = 1):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number, part in enumerate(meta_reference.shards(model, count)):
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    return folder


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_text_logits_equal_metas(tmp_path, params, count):
    reference = text_reference(params)
    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "meta", reference, params, count)
    )
    tokens = torch.randint(0, params["vocab_size"], (2, 12))
    with torch.no_grad():
        tiny.close(model(input_ids=tokens).logits, reference(tokens, 0))
    assert model.dtype == torch.float32 and model.config.model_type == "llama"


def test_mappings_are_given_back(tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(meta_source, "_MAPPED", 1)
    monkeypatch.setattr(
        meta_source, "_load", lambda path, load=meta_source._load: loads.append(path) or load(path)
    )
    reference = text_reference(PARAMS["grouped"])
    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path, reference, PARAMS["grouped"], 2)
    )
    written = to_file(meta_maps.text_weight_map(model.spec), model.state_dict())
    assert len(loads) > 20 and all(
        torch.equal(written[name], tensor) for name, tensor in reference.state_dict().items()
    )


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_writes_what_it_read(tmp_path, params):
    reference = text_reference(params)
    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "meta", reference, params)
    )
    written = to_file(meta_maps.text_weight_map(model.spec), model.state_dict())
    assert written.keys() == reference.state_dict().keys()
    assert all(
        torch.equal(written[name], tensor) for name, tensor in reference.state_dict().items()
    )


def test_saved_folder_is_hugging_faces(tmp_path):
    reference = text_reference(PARAMS["grouped"])
    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "meta", reference, PARAMS["grouped"], 2), dtype="bfloat16"
    )
    model.save_pretrained(tmp_path / "saved")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    tokens = torch.randint(0, 520, (1, 12))
    with torch.no_grad():
        tiny.close(stock(tokens).logits, model.float()(input_ids=tokens).logits)
    assert (
        stock.generation_config.eos_token_id == [265, 272, 273] and stock.config.bos_token_id == 264
    )


VISION_PARAMS = PARAMS["grouped"] | {
    "n_layers": 5,
    "vision_chunk_size": 28,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2,
}


@pytest.fixture
def small_encoder(monkeypatch):
    """Another encoder than the released one, in place of the constants."""
    changed = {
        "hidden_size": ENCODER["width"],
        "intermediate_size": 4 * ENCODER["width"],
        "num_hidden_layers": ENCODER["layers"],
        "num_global_layers": ENCODER["n_global_layers"],
        "attention_heads": ENCODER["heads"],
        "intermediate_layers_indices": ENCODER["return_intermediate"],
    }
    monkeypatch.setattr(meta, "VISION", meta.VISION | changed)


def vision_reference(**changed) -> torch.nn.Module:
    return tiny.randomize(
        meta_reference.vision_model(VISION_PARAMS | changed | {"max_seq_len": 16}, **ENCODER)
    ).eval()


def images_seen(
    model: MllamaForConditionalGeneration, reference: torch.nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of ours and of the reference for text, an image of two tiles, and more text."""
    size = model.config.vision_config.image_size
    tokens = torch.randint(0, 500, (1, 12))
    tokens[0, 3] = model.config.image_token_index
    images = torch.randn(1, 1, 4, 3, size, size)
    images[:, :, 2:] = 0
    filled = torch.tensor([[[1, 1, 0, 0]]])
    mask = torch.zeros(1, 12, 1, 4, dtype=torch.long)
    mask[0, 3:] = filled[0]
    with torch.no_grad():
        ours = model(
            tokens,
            images,
            aspect_ratio_ids=torch.tensor([[5]]),
            aspect_ratio_mask=filled,
            cross_attention_mask=mask,
        ).logits
        theirs = meta_reference.vision_logits(
            reference, tokens, images, torch.tensor([[[2, 1]]]), [[[3, -1]]]
        )[1]
    return ours, theirs


@pytest.mark.parametrize("count", [1, 2])
def test_vision_logits_equal_metas(tmp_path, small_encoder, count):
    reference = vision_reference()
    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "meta", reference, VISION_PARAMS, count)
    )
    assert (
        model.config.text_config.cross_attention_layers == [1, 5]
        and model.config.image_token_index == 520
    )
    tiny.close(*images_seen(model, reference))
    model.save_pretrained(tmp_path / "saved")
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_positions_for_other_tiles_are_interpolated(tmp_path, small_encoder):
    """The shards have positions for tiles of 28 pixels and are used with 56, as Meta's code loads
    them.
    """
    weights = vision_reference().state_dict()
    params = VISION_PARAMS | {"vision_chunk_size": 56}
    reference = vision_reference(**params)
    reference.load_state_dict(dict(weights))
    write(tmp_path / "meta", reference, params)
    torch.save(weights, tmp_path / "meta" / "consolidated.00.pth")
    model = MllamaForConditionalGeneration.from_pretrained(tmp_path / "meta")
    tiny.close(*images_seen(model, reference))

    (tmp_path / "meta" / "params.json").write_text(
        json.dumps(VISION_PARAMS | {"vision_chunk_size": 560})
    )
    with pytest.raises(ValueError, match="vision_chunk_size 560"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path / "meta")


def test_vision_writes_what_it_read(tmp_path, small_encoder):
    reference = vision_reference()
    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "meta", reference, VISION_PARAMS)
    )
    written = to_file(meta_maps.vision_weight_map(model.spec), model.state_dict())
    original = reference.state_dict()
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        if name.endswith(
            ("gated_positional_embedding", "tile_pos_embed.embedding")
        ):  # no image has these tiles
            tensor = tensor.clone()
            tensor[1, 2:] = tensor[2, 1:] = tensor[3, 1:] = 0
        assert torch.equal(written[name], tensor), name

    with torch.no_grad():  # tile 0 of one aspect ratio alone
        model.vision_tower.pre_tile_positional_embedding.embedding.weight[1, 0] += 1
    with pytest.raises(ValueError, match="Meta's layout cannot hold that"):
        to_file(meta_maps.vision_weight_map(model.spec), model.state_dict())


def test_encoder_that_is_not_the_released_one(tmp_path):
    with pytest.raises(ValueError) as raised:
        MllamaForConditionalGeneration.from_pretrained(
            write(tmp_path / "meta", vision_reference(), VISION_PARAMS)
        )
    for wrong in (
        "conv1._linear.weight is [32, 588], not [1280, 588]",
        "there are 4 vision_model.vision_encoder.transformer.resblocks, not 32",
    ):
        assert wrong in str(raised.value)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"vision_chunk_size": 13}, "vision_chunk_size 13 makes 0 patches"),
        ({"vision_max_num_chunks": 10**9}, "gated_positional_embedding is [4, 4, 5, 32]"),
        (
            {"vision_num_cross_attention_layers": 3},
            "there are 2 text_model.cross_attention_layers, not 3",
        ),
        (
            {"vision_num_cross_attention_layers": 10**9},
            "there are 2 text_model.cross_attention_layers, not 5",
        ),
    ],
)
def test_vision_params_that_cannot_be(tmp_path, small_encoder, params, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        MllamaForConditionalGeneration.from_pretrained(
            write(tmp_path / "meta", vision_reference(), VISION_PARAMS | params)
        )


RELEASED = {
    "1B": {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
    },
    "3B": {
        "dim": 3072,
        "n_layers": 28,
        "n_heads": 24,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": 256,
    },
    "8B": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
    },
    "405B": {
        "dim": 16384,
        "n_layers": 126,
        "n_heads": 128,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.2,
        "multiple_of": 4096,
    },
    "11B": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
        "vision_chunk_size": 560,
        "vision_max_num_chunks": 4,
        "vision_num_cross_attention_layers": 8,
    },
    "90B": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 4096,
        "vision_chunk_size": 560,
        "vision_max_num_chunks": 4,
        "vision_num_cross_attention_layers": 20,
    },
}


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes_fit_metas_code(tmp_path, monkeypatch, size):
    """Every tensor of Meta's model has its place in ours, in its shape, and the other way round: on
    the meta device, at full size.
    """
    params = RELEASED[size] | {
        "vocab_size": 128256,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }
    vision = "vision_chunk_size" in params
    code = meta_reference.load("multimodal.model" if vision else "model")
    with torch.device("meta"):
        arguments = meta_reference.load("args").ModelArgs(**params, max_seq_len=1, max_batch_size=1)
        reference = (code.CrossAttentionTransformer if vision else code.Transformer)(arguments)
    headers = {
        name: Header(tuple(tensor.shape), torch.bfloat16)
        for name, tensor in reference.state_dict().items()
    }

    class Headers(MetaSource):
        def __init__(self, where, paths):
            self._headers, self.mapped = headers, False

        def same(self, name, other):
            return params["dim"] < 4096  # as released: 1B and 3B are tied

        def read(self, name):
            raise AssertionError("only headers are read")

    (tmp_path / "params.json").write_text(json.dumps(params))
    (tmp_path / "consolidated.00.pth").touch()
    monkeypatch.setattr(meta, "MetaSource", Headers)
    opened = meta.open_meta(tmp_path)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config_object(opened.config))
    report = match(
        model.state_dict(), headers, opened.weight_map, model.get_expanded_tied_weights_keys()
    )
    assert report.problems() == "" and not report.lacking
    assert sum(map(len, (move.theirs for move in report.moves))) == len(headers)


# A small folder without Meta's code: what is refused is the same.
SMALL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "vocab_size": 20,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def small_weights(tied: bool = False) -> dict[str, torch.Tensor]:
    weights = {
        "tok_embeddings.weight": torch.randn(20, 32),
        "norm.weight": torch.randn(32),
        "rope.freqs": torch.randn(8),
    }
    for layer in range(2):
        shapes = {"wq": (32, 32), "wk": (16, 32), "wv": (16, 32), "wo": (32, 32)}
        weights |= {
            f"layers.{layer}.attention.{name}.weight": torch.randn(shape)
            for name, shape in shapes.items()
        }
        shapes = {"w1": (96, 32), "w2": (32, 96), "w3": (96, 32)}
        weights |= {
            f"layers.{layer}.feed_forward.{name}.weight": torch.randn(shape)
            for name, shape in shapes.items()
        }
        weights |= {
            f"layers.{layer}.{name}.weight": torch.randn(32)
            for name in ("attention_norm", "ffn_norm")
        }
    return weights | {
        "output.weight": weights["tok_embeddings.weight"].clone() if tied else torch.randn(20, 32)
    }


@pytest.fixture
def small(tmp_path):
    """small(params, weights, name) -> the folder, with what is given in place of its own."""

    def make(
        params: dict | None = None, weights: dict | None = None, name: str = "consolidated.00.pth"
    ):
        (tmp_path / "params.json").write_text(json.dumps(SMALL | (params or {})))
        torch.save(small_weights() if weights is None else weights, tmp_path / name)
        return tmp_path

    return make


def test_one_file_without_a_number(small):
    model = MllamaForConditionalGeneration.from_pretrained(small(name="consolidated.pth"))
    assert (
        model.config.tie_word_embeddings is False and model.generation_config.eos_token_id is None
    )


def test_heads_that_are_equal_are_tied(small):
    weights = small_weights(tied=True)
    model = MllamaForConditionalGeneration.from_pretrained(small(weights=weights))
    assert (
        model.config.tie_word_embeddings
        and model.lm_head.weight is model.get_input_embeddings().weight
    )
    del weights["output.weight"]
    assert MllamaForConditionalGeneration.from_pretrained(
        small(weights=weights)
    ).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("dim", "layers", "factor"),
    [(2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8.0), (2048, 28, 8.0)],
    ids=["1B", "3B", "8B", "neither"],
)
def test_rope_factor_by_size(tmp_path, dim, layers, factor):
    (tmp_path / "params.json").write_text(
        json.dumps(SMALL | {"dim": dim, "n_layers": layers, "use_scaled_rope": True})
    )
    arguments = meta._text_arguments(meta._Params(tmp_path / "params.json"))
    assert (
        arguments["rope_parameters"]["factor"] == factor
        and arguments["max_position_embeddings"] == 131072
    )


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple", "inner"),
    [
        (2048, 1.5, 256, 8192),
        (3072, 1.0, 256, 8192),
        (4096, 1.3, 1024, 14336),
        (8192, 1.3, 4096, 28672),
        (16384, 1.2, 4096, 53248),
    ],
)
def test_inner_width_of_released_models(tmp_path, dim, multiplier, multiple, inner):
    given = SMALL | {"dim": dim, "ffn_dim_multiplier": multiplier, "multiple_of": multiple}
    (tmp_path / "params.json").write_text(json.dumps(given))
    assert (
        meta._text_arguments(meta._Params(tmp_path / "params.json"))["intermediate_size"] == inner
    )


@pytest.mark.parametrize(
    ("self_layers", "cross_layers", "expected"),
    [
        (32, 8, [3, 8, 13, 18, 23, 28, 33, 38]),
        (80, 20, list(range(3, 99, 5))),
        (5, 2, [1, 5]),
        (5, 4, [0, 3, 6]),
        (2, 2, [0, 2]),
    ],
)
def test_fusion_schedule(self_layers, cross_layers, expected):
    assert [
        layer + place for place, layer in enumerate(sorted(meta._fusion(self_layers, cross_layers)))
    ] == expected


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"dim": 10**12}, "dim"),
        ({"dim": 64}, "tok_embeddings.weight is [20, 32]"),
        ({"dim": True}, "dim"),
        ({"n_layers": 10**9}, "there are 2 layers, not 1000000000"),
        ({"n_layers": 0}, "n_layers"),
        ({"n_layers": "2"}, "n_layers"),
        ({"n_heads": 3}, "do not divide one another"),
        ({"n_heads": 32}, "do not divide one another"),
        ({"n_kv_heads": 2}, "layers.0.attention.wk.weight is [16, 32]"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 21}, "tok_embeddings.weight is [20, 32]"),
        ({"vocab_size": None}, "has no vocab_size; it is not of a Llama 3"),
        ({"rope_theta": None}, "has no rope_theta; it is not of a Llama 3"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": 1e9}, "layers.0.feed_forward.w1.weight is [96, 32]"),
        ({"multiple_of": 128}, "layers.0.feed_forward.w1.weight is [96, 32]"),
        ({"use_scaled_rope": 1}, "use_scaled_rope"),
        ({"model": [1]}, "model"),
        (
            {"vision_chunk_size": 560, "vision_num_cross_attention_layers": 8},
            "there is no text_model.tok_embeddings.weight",
        ),
        ({"vision_chunk_size": 560}, "has no vision_num_cross_attention_layers"),
        (
            {
                "vision_chunk_size": 560,
                "vision_num_cross_attention_layers": 10**9,
                "vision_max_num_chunks": 10**9,
                "n_layers": 10**9,
            },
            "there are 0 text_model.layers, not 1000000000",
        ),
    ],
)
def test_params_that_cannot_be(small, params, error):
    with pytest.raises(ValueError, match=re.escape(error)) as raised:
        MllamaForConditionalGeneration.from_pretrained(small(params))
    assert str(small()) in str(raised.value)


def test_params_that_are_no_json(small):
    folder = small()
    for content in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        (folder / "params.json").write_bytes(content)
        with pytest.raises(ValueError, match="params.json"):
            MllamaForConditionalGeneration.from_pretrained(folder)


def halves(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    axes = {name: meta_source._axis(name) for name in weights}
    return [
        {
            name: value if axes[name] is None else value.chunk(2, axes[name])[half].clone()
            for name, value in weights.items()
        }
        for half in (0, 1)
    ]


def test_shards_that_do_not_belong_together(small):
    folder = small()
    one, other = halves(small_weights())
    torch.save(one, folder / "consolidated.00.pth")
    torch.save(other, folder / "consolidated.01.pth")
    MllamaForConditionalGeneration.from_pretrained(folder)

    for wrong in (
        other | {"norm.weight": torch.ones(33)},
        other | {"norm.weight": torch.ones(32, dtype=torch.float16)},
        other | {"more": torch.ones(1)},
        {name: value for name, value in other.items() if name != "layers.1.attention.wq.weight"},
    ):
        torch.save(wrong, folder / "consolidated.01.pth")
        with pytest.raises(ValueError, match="consolidated.01.pth.*consolidated.00.pth"):
            MllamaForConditionalGeneration.from_pretrained(folder)

    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(
        ValueError, match=re.escape("tok_embeddings.weight is [10, 32], not [20, 32]")
    ):
        MllamaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ([], "has params.json but no consolidated.00.pth"),
        (["00", "02"], "but no consolidated.01.pth"),
        (["01"], "but no consolidated.00.pth"),
        (["0"], "but no consolidated.00.pth"),
        (["00", "00 (1)"], "but no consolidated.01.pth"),
    ],
)
def test_shards_that_are_not_there(small, names, error):
    folder = small()
    (folder / "consolidated.00.pth").rename(folder / "weights")
    for name in names:
        (folder / f"consolidated.{name}.pth").write_bytes((folder / "weights").read_bytes())
    with pytest.raises(FileNotFoundError, match=re.escape(error)):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_shards_outside_the_folder_are_not_opened(small, tmp_path_factory):
    folder = small()
    outside = tmp_path_factory.mktemp("outside") / "weights"
    (folder / "consolidated.00.pth").rename(outside)
    (folder / "consolidated.00.pth").symlink_to(outside)
    with pytest.raises(ValueError, match="lies outside the folder"):
        MllamaForConditionalGeneration.from_pretrained(folder)


class Runs:
    """What a pickle could do: make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The same archive with its pickle changed, or compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


HOSTILE = {
    "a pickle that opens a file": (
        lambda path: torch.save({"a": Runs(path.with_name("made"))}, path),
        "something else than tensors (io.open)",
    ),
    "a module": (
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
        "something else than tensors (torch.nn.modules.linear.Linear)",
    ),
    "a bare pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        "is no archive that torch.save wrote",
    ),
    "the older format": (
        lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
        "is no archive that torch.save wrote",
    ),
    "noise": (
        lambda path: path.write_bytes(os.urandom(4096)),
        "is no archive that torch.save wrote",
    ),
    "nothing": (lambda path: path.write_bytes(b""), "is no archive that torch.save wrote"),
    "half a file": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "is no archive that torch.save wrote",
    ),
    "an archive of nothing": (
        lambda path: zipfile.ZipFile(path, "w").close(),
        "is no archive that torch.save wrote",
    ),
    "compressed": (
        lambda path: rewritten(path, bytes, zipfile.ZIP_DEFLATED),
        "is compressed, which torch.save never does",
    ),
    "a pickle cut off": (
        lambda path: rewritten(path, lambda content: content[:-20]),
        "consolidated.00.pth",
    ),
    "a list": (
        lambda path: torch.save([torch.ones(1)], path),
        "must hold dense tensors by their names",
    ),
    "nested": (
        lambda path: torch.save({"model": {"a": torch.ones(1)}}, path),
        "must hold dense tensors by their names",
    ),
    "numbers for names": (
        lambda path: torch.save({1: torch.ones(1)}, path),
        "must hold dense tensors by their names",
    ),
    "sparse": (
        lambda path: torch.save({"a": torch.ones(2).to_sparse()}, path),
        "must hold dense tensors by their names",
    ),
    "without data": (
        lambda path: torch.save({"a": torch.ones(2, device="meta")}, path),
        "must hold dense tensors by their names",
    ),
    "one number expanded": (
        lambda path: torch.save({"a": torch.ones(1).expand(10**12)}, path),
        "claims more tensors than its",
    ),
    "one tensor many times": (
        lambda path: torch.save(dict.fromkeys(map(str, range(10_000)), torch.ones(1000)), path),
        "claims more tensors than its",
    ),
    "a storage beyond the end": (
        lambda path: (
            torch.save({"a": torch.ones(300)}, path),
            rewritten(path, lambda pkl: pkl.replace(b"M,\x01", b"J\0\0\0\x10")),
        ),
        "is no archive that torch.save wrote",
    ),
    "integers": (
        lambda path: torch.save(
            {name: value.int() for name, value in small_weights().items()}, path
        ),
        "int32 [20, 32]",
    ),
    "a number for a head": (
        lambda path: torch.save(small_weights() | {"output.weight": torch.tensor(1.0)}, path),
        "output.weight is float32 []",
    ),
    "another's tensors": (
        lambda path: torch.save(small_weights() | {"more.weight": torch.ones(2)}, path),
        "unexpected (1): more.weight",
    ),
}


@pytest.mark.parametrize(("make", "error"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_weights(small, make, error):
    folder = small()
    make(folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match=re.escape(error)) as raised:
        MllamaForConditionalGeneration.from_pretrained(folder)
    assert "weights_only" not in str(raised.value) and len(str(raised.value)) < 2000
    assert not (folder / "made").exists()
