"""Llama-3.2-Vision as a whole against Meta's reference code: features and logits."""

import pytest
import torch
import transformers
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

import meta_reference
import tiny
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.meta import weight_maps as meta_maps
from mllama.families import compose
from mllama.weights import rows as engine
from tiny.sizes import META_ENCODER as ENCODER

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


def metas_twin(
    reference: torch.nn.Module, params: dict, encoder: dict
) -> MllamaForConditionalGeneration:
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
            rope_parameters=scaled
            | {"rope_theta": params["rope_theta"], "original_max_position_embeddings": 8192},
            pad_token_id=0,
        ).to_dict(),
        vision_config=MllamaVisionConfig(
            hidden_size=encoder["width"],
            intermediate_size=4 * encoder["width"],
            num_hidden_layers=encoder["layers"],
            num_global_layers=encoder["n_global_layers"],
            attention_heads=encoder["heads"],
            image_size=params["vision_chunk_size"],
            intermediate_layers_indices=encoder["return_intermediate"],
            vision_output_dim=(1 + len(encoder["return_intermediate"])) * encoder["width"],
        ).to_dict(),
        image_token_index=params["vocab_size"],
    )
    moves, unknown, _ = engine.plan_moves(
        meta_maps.vision_weight_map(compose(config.to_dict())), weights
    )
    assert not unknown
    ours = MllamaForConditionalGeneration(config).eval()
    translated = {}
    for move in moves:
        translated |= zip(
            move.ours, move.row.read([weights[name] for name in move.theirs]), strict=True
        )
    torch.nn.Module.load_state_dict(ours, translated)
    return ours


@pytest.mark.parametrize(
    ("params", "encoder"),
    [
        ({}, {}),
        (
            {
                "n_heads": 2,
                "n_kv_heads": 2,
                "dim": 96,
                "n_layers": 3,
                "vision_num_cross_attention_layers": 1,
            },
            {"heads": 1, "layers": 4},
        ),
        (
            {"n_kv_heads": 1, "vision_chunk_size": 42},
            {"width": 64, "return_intermediate": [0, 2, 3]},
        ),
    ],
    ids=["grouped", "all heads", "larger tiles"],
)
def test_features_and_logits_equal_metas(params, encoder):
    """A row with two images, one with a single one after text, one without."""
    params, encoder = PARAMS | params, ENCODER | encoder
    reference = tiny.randomize(meta_reference.vision_model(params, **encoder)).eval()
    ours = metas_twin(reference, params, encoder)
    ratios = torch.tensor([[[1, 1], [2, 2]], [[1, 3], [1, 1]], [[1, 1], [1, 1]]])
    filled = torch.arange(4) < ratios.prod(-1)[..., None]
    present = torch.tensor([[True, True], [True, False], [False, False]])
    size = params["vision_chunk_size"]
    images = (
        torch.randn(3, 2, 4, 3, size, size) * (filled & present[..., None])[..., None, None, None]
    )
    spans, mask = [[[1, 6], [6, -1]], [[3, -1]], []], torch.zeros(3, 12, 2, 4)
    for row, places in enumerate(spans):
        for index, (start, end) in enumerate(places):
            mask[row, start : 12 if end == -1 else end, index] = filled[row, index].float()
    tokens = torch.randint(3, params["vocab_size"], (3, 12))
    for row, column in ((0, 1), (0, 6), (1, 3)):
        tokens[row, column] = params["vocab_size"]  # the placeholder
    ids = torch.tensor([[RATIOS.index(ratio) + 1 for ratio in row] for row in ratios.tolist()])
    with torch.no_grad():
        features, logits = meta_reference.vision_logits(reference, tokens, images, ratios, spans)
        got = ours.vision_tower(images, ids, filled).last_hidden_state
        assert (got - features).abs().max() <= 1e-4 * features.abs().max()
        inputs = {
            "aspect_ratio_ids": ids * present,
            "aspect_ratio_mask": filled,
            "cross_attention_mask": mask,
        }
        got = ours(tokens, images, **inputs).logits
        assert (got - logits).abs().max() <= 1e-4 * logits.abs().max()
        ours.reference = "hf"
        assert (
            ours(tokens, images, **inputs).logits - logits
        ).abs().max() > 1e-2 * logits.abs().max()
