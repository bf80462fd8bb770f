"""Llama-3.2-Vision as a whole: against stock transformers, and against Meta's reference code."""

import math

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import convert_sparse_cross_attention_mask_to_dense, get_cross_attention_token_mask

import meta_reference
import twins
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints import engine, meta

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
PARAMS = {
    "dim": 64,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 28,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2,
    "max_seq_len": 16,
}
TOWER = {"width": 32, "layers": 4, "heads": 2, "n_global_layers": 2, "return_intermediate": [1, 3]}


def metas_twin(reference: torch.nn.Module, params: dict, tower: dict) -> MllamaForConditionalGeneration:
    """Ours with the reference's weights."""
    crossed = [layer + place for place, layer in enumerate(reference.text_model.fusion_schedule)]
    weights = reference.state_dict()
    inner = weights["text_model.layers.0.feed_forward.w1.weight"].shape[0]
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.MllamaConfig(
        text_config=MllamaTextConfig(
            vocab_size=params["vocab_size"],
            hidden_size=params["dim"],
            intermediate_size=inner,
            num_hidden_layers=params["n_layers"] + len(crossed),
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params["n_kv_heads"],
            cross_attention_layers=crossed,
            rope_parameters=scaled | {"rope_theta": params["rope_theta"], "original_max_position_embeddings": 8192},
            pad_token_id=0,
        ).to_dict(),
        vision_config=MllamaVisionConfig(
            hidden_size=tower["width"],
            intermediate_size=4 * tower["width"],
            num_hidden_layers=tower["layers"],
            num_global_layers=tower["n_global_layers"],
            attention_heads=tower["heads"],
            image_size=params["vision_chunk_size"],
            intermediate_layers_indices=tower["return_intermediate"],
            vision_output_dim=(1 + len(tower["return_intermediate"])) * tower["width"],
        ).to_dict(),
        image_token_index=params["vocab_size"],
    )
    moves, unknown, _ = engine.plan(meta.vision_table(config), weights)
    assert not unknown
    ours = MllamaForConditionalGeneration(config).eval()
    translated = {}
    for move in moves:
        translated |= zip(move.ours, move.row.read([weights[name] for name in move.theirs]), strict=True)
    torch.nn.Module.load_state_dict(ours, translated)
    return ours


@pytest.mark.parametrize(
    ("params", "tower"),
    [
        ({}, {}),
        ({"n_heads": 2, "n_kv_heads": 2, "dim": 96, "n_layers": 3, "vision_num_cross_attention_layers": 1}, {"heads": 1, "layers": 4}),
        ({"n_kv_heads": 1, "vision_chunk_size": 42}, {"width": 64, "return_intermediate": [0, 2, 3]}),
    ],
    ids=["grouped", "all heads", "larger tiles"],
)
def test_features_and_logits_equal_metas(params, tower):
    """A row with two pictures, one with a single one after text, one without."""
    params, tower = PARAMS | params, TOWER | tower
    reference = twins.randomise(meta_reference.vision_model(params, **tower)).eval()
    ours = metas_twin(reference, params, tower)
    ratios = torch.tensor([[[1, 1], [2, 2]], [[1, 3], [1, 1]], [[1, 1], [1, 1]]])
    filled = torch.arange(4) < ratios.prod(-1)[..., None]
    present = torch.tensor([[True, True], [True, False], [False, False]])
    size = params["vision_chunk_size"]
    images = torch.randn(3, 2, 4, 3, size, size) * (filled & present[..., None])[..., None, None, None]
    spans, mask = [[[1, 6], [6, -1]], [[3, -1]], []], torch.zeros(3, 12, 2, 4)
    for row, pictures in enumerate(spans):
        for picture, (start, end) in enumerate(pictures):
            mask[row, start : 12 if end == -1 else end, picture] = filled[row, picture].float()
    tokens = torch.randint(3, params["vocab_size"], (3, 12))
    for row, column in ((0, 1), (0, 6), (1, 3)):
        tokens[row, column] = params["vocab_size"]  # the placeholder
    ids = torch.tensor([[RATIOS.index(ratio) + 1 for ratio in row] for row in ratios.tolist()])
    with torch.no_grad():
        features, logits = meta_reference.vision_logits(reference, tokens, images, ratios, spans)
        got = ours.vision_tower(images, ids, filled).last_hidden_state
        assert (got - features).abs().max() <= 1e-4 * features.abs().max()
        inputs = {"aspect_ratio_ids": ids * present, "aspect_ratio_mask": filled, "cross_attention_mask": mask}
        got = ours(tokens, images, **inputs).logits
        assert (got - logits).abs().max() <= 1e-4 * logits.abs().max()
        ours.reference = "hf"
        assert (ours(tokens, images, **inputs).logits - logits).abs().max() > 1e-2 * logits.abs().max()


VOCABULARY = 99
PICTURE = VOCABULARY  # the placeholder's id: the first of the eight rows behind the vocabulary
SIZES = {
    "grouped": ({}, {}),
    "all heads": (
        {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3, "cross_attention_layers": [2]},
        {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "image_size": 24, "attention_heads": 1},
    ),
    "one kv head": (
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, "cross_attention_layers": [1, 2, 4]},
        {"hidden_size": 48, "attention_heads": 3, "intermediate_layers_indices": [1], "vision_output_dim": 96, "num_global_layers": 1},
    ),
}


def pair(text: dict | None = None, vision: dict | None = None, seed: int = 0):
    """Stock transformers' model, random everywhere, and ours with the same weights."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    sizes = twins.TEXT | {
        "num_hidden_layers": 5,
        "cross_attention_layers": [1, 3],
        "bos_token_id": 1,
        "pad_token_id": 0,
        "rope_scaling": rope,
    }
    tower = {name: size for name, size in twins.VISION.items() if name != "num_attention_heads"} | {
        "attention_heads": 2,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 96,
    }
    vision = MllamaVisionConfig(**tower | (vision or {}))
    if text and "vision_output_dim" not in text:
        vision.vision_output_dim = vision.hidden_size * (1 + len(vision.intermediate_layers_indices))
    config = transformers.MllamaConfig(
        text_config=MllamaTextConfig(**sizes | (text or {})).to_dict(), vision_config=vision.to_dict(), image_token_index=PICTURE
    )
    theirs = twins.randomise(transformers.MllamaForConditionalGeneration(config), seed).eval()
    ours = MllamaForConditionalGeneration(config, reference="hf").eval()
    names = {"model.vision_model.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector.linear.", "model.": ""}
    weights = {}
    for name, value in theirs.state_dict().items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(old, "") + name.removeprefix(old)] = value
    torch.nn.Module.load_state_dict(ours, weights)
    return ours, theirs


def inputs(model, *rows: tuple[list[int], list[int]], side: str = "left", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A batch as the processor makes it.

    Args:
        model: whose config it fits.
        rows: ids with placeholders, and the aspect ratio id of each picture.
        side: where shorter rows are padded.
        dtype: of the pixels.
    """
    vision = model.config.vision_config
    batch = twins.batch(*(ids for ids, _ in rows), side=side)
    most = max(len(ratios) for _, ratios in rows)
    if not most:
        return batch
    tiles = [[math.prod(vision.supported_aspect_ratios[ratio - 1]) for ratio in ratios] for _, ratios in rows]
    ratios = torch.tensor([ratios + [0] * (most - len(ratios)) for _, ratios in rows])
    filled = torch.tensor(
        [[[place < count for place in range(vision.max_num_tiles)] for count in row + [1] * (most - len(row))] for row in tiles]
    )
    pixels = torch.randn(*filled.shape, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(5))
    pixels = pixels * (filled & (ratios > 0)[..., None])[..., None, None, None]
    spans = [get_cross_attention_token_mask(row, PICTURE) for row in batch["input_ids"].tolist()]
    length = batch["input_ids"].shape[1]
    mask = torch.from_numpy(convert_sparse_cross_attention_mask_to_dense(spans, tiles, vision.max_num_tiles, length))
    return batch | {
        "pixel_values": pixels.to(dtype),
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": filled.long(),
        "cross_attention_mask": mask,
    }


ROWS = {
    "one": (([PICTURE, *twins.tokens(6)], [1]),),
    "text before it": (([*twins.tokens(3), PICTURE, *twins.tokens(4)], [3]),),
    "two": (([5, PICTURE, *twins.tokens(3), PICTURE, *twins.tokens(3)], [2, 1]), ([PICTURE, PICTURE, *twins.tokens(3)], [1, 3])),
    "mixed": (([*twins.tokens(2), PICTURE, *twins.tokens(4)], [2]), (twins.tokens(5), []), ([PICTURE, 7, PICTURE, 9], [3, 1])),
    "none": ((twins.tokens(6), []), (twins.tokens(4), [])),
}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Tokens counted without padding, which transformers' forward does not do by itself."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def stock_logits(theirs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return theirs(**batch, position_ids=positions(batch["attention_mask"])).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", SIZES)
def test_logits_equal_transformers(sizes, side):
    ours, theirs = pair(*SIZES[sizes])
    for case, rows in ROWS.items():
        batch = inputs(ours, *rows, side=side)
        with torch.no_grad():
            expected, got = stock_logits(theirs, batch), ours(**batch).logits
        real = batch["attention_mask"].bool()
        assert got.shape == expected.shape
        assert (got - expected)[real].abs().max() <= 1e-4 * expected[real].abs().max(), case


@pytest.mark.parametrize("sizes", SIZES)
def test_half_precision_is_as_near_as_transformers(sizes):
    ours, theirs = pair(*SIZES[sizes])
    batches = [inputs(ours, *rows) for rows in ROWS.values()]
    with torch.no_grad():
        exact = [stock_logits(theirs, batch) for batch in batches]
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
        errors = torch.zeros(2)
        for batch, wanted in zip(batches, exact, strict=True):
            real = batch["attention_mask"].bool()
            for place, logits in enumerate((ours(**batch).logits, stock_logits(theirs, batch))):
                errors[place] += (logits.float() - wanted)[real].square().sum()
    assert errors[0].sqrt() <= 1.2 * errors[1].sqrt()


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_cached_equals_uncached(reference):
    """In steps of any size, with the second picture given when it comes up."""
    ours, _ = pair()
    ours.reference = reference
    batch = inputs(ours, *ROWS["two"], side="right")
    with torch.no_grad():
        whole = ours(**batch).logits
        cache, got = DynamicCache(), []
        for start, end in ((0, 2), (2, 3), (3, 7), (7, 9)):
            step = {"input_ids": batch["input_ids"][:, start:end], "attention_mask": batch["attention_mask"][:, :end]}
            step["cross_attention_mask"] = batch["cross_attention_mask"][:, start:end]
            if start == 0:
                step |= {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
            got.append(ours(**step, past_key_values=cache).logits)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(got, 1)[real], whole[real], rtol=1e-4, atol=1e-4)


def test_a_picture_may_come_to_a_filled_cache():
    ours, _ = pair()
    ours.reference = "meta"
    row = [PICTURE, *twins.tokens(4), PICTURE, *twins.tokens(3)]
    batch = inputs(ours, (row, [2, 6]))
    pictures = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    with torch.no_grad():
        whole = ours(**batch).logits
        first = ours(
            batch["input_ids"][:, :5],
            **{name: batch[name][:, :1] for name in pictures},
            cross_attention_mask=batch["cross_attention_mask"][:, :5, :1],
        )
        second = ours(
            batch["input_ids"][:, 5:],
            **{name: batch[name][:, 1:] for name in pictures},
            cross_attention_mask=batch["cross_attention_mask"][:, 5:],
            past_key_values=first.past_key_values,
        )
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)


GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.mark.parametrize("rows", ROWS)
def test_greedy_and_beams_equal_transformers(models, rows):
    ours, theirs = models
    batch = inputs(ours, *ROWS[rows])
    greedy = ours.generate(**batch, **GREEDY)
    assert torch.equal(greedy, theirs.generate(**batch, **GREEDY))
    assert (greedy[:, -8:] != greedy[:, -8:-7]).any()  # not one token over and over
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_ways_of_generating_agree(models, reference):
    ours, _ = models
    ours.reference = reference
    for rows in ("two", "mixed", "none"):
        batch = inputs(ours, *ROWS[rows])
        greedy = ours.generate(**batch, **GREEDY)
        for options in (
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"past_key_values": StaticCache(config=ours.config, max_cache_len=40)},
            {"past_key_values": DynamicCache(config=ours.config)},
        ):
            assert torch.equal(ours.generate(**batch, **GREEDY, **options), greedy), (rows, options)
    batch = inputs(ours, *ROWS["text before it"])  # these take one row
    greedy = ours.generate(**batch, **GREEDY)
    assistant = pair(seed=1)[0]
    assert torch.equal(ours.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2), greedy)
    assert torch.equal(ours.generate(**batch, **GREEDY, assistant_model=assistant), greedy)
    ours.reference = "hf"


def test_a_conversation_goes_on_from_its_cache(models):
    """A second question, with a second picture, given to the cache of the first."""
    ours, theirs = models
    first = inputs(ours, *ROWS["text before it"])
    answers = [model.generate(**first, **GREEDY, return_dict_in_generate=True) for model in models]
    row = [*answers[0].sequences[0].tolist(), 4, 8, 15]
    whole = inputs(ours, (row, [3]))
    expected = ours.generate(**whole | {"pixel_values": first["pixel_values"]}, **GREEDY)
    for model, answer in zip(models, answers, strict=True):
        batch = {name: whole[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
        assert torch.equal(model.generate(**batch, **GREEDY, past_key_values=answer.past_key_values), expected)
