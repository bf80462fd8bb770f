"""Sizes of the tiny models."""

IMAGE = 97  # the placeholder's id
VOCAB_SIZE = 99
PATCHES = 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ENDS = {"bos_token_id": None, "eos_token_id": None}
TEXT = SIZES | ENDS | {"rope_theta": 500000.0}

# Changes of a decoder's sizes.
WIDE = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
ODD = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 1,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
FACTORS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3"} | FACTORS
LLAMA32 = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}  # as released
# Shorter than every row, and softcaps that the scores of these small models reach.
WINDOWS = {"sliding_window": 5, "query_pre_attn_scalar": 24}
SOFTCAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
MIXED_LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]

# Changes of an encoder's sizes.
PARTIAL = {
    "image_size": 23,
    "patch_size": 7,
    "hidden_size": 48,
    "num_attention_heads": 3,
}  # 3 x 3 patches, two pixels left over
SMALL = {"image_size": 12, "patch_size": 6, "num_hidden_layers": 2, "intermediate_size": 33}

# Llama-3.2-Vision.
TILED_IMAGE = VOCAB_SIZE  # the placeholder's id: the first of the eight rows behind the vocabulary
CROSSED_TEXT = TEXT | {
    "num_hidden_layers": 5,
    "cross_attention_layers": [1, 3],
    "bos_token_id": 1,
    "pad_token_id": 0,
    "rope_scaling": LLAMA3,
}
META_ENCODER = {
    "width": 32,
    "layers": 4,
    "heads": 2,
    "n_global_layers": 2,
    "return_intermediate": [1, 3],
}


def tiled_vision(**changes) -> dict:
    """Sizes of Llama-3.2-Vision's encoder: its own names, and an output width that fits them."""
    sizes = {name: size for name, size in VISION.items() if name != "num_attention_heads"}
    sizes |= {
        "attention_heads": 2,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0, 2],
    } | changes
    width = sizes["hidden_size"] * (1 + len(sizes["intermediate_layers_indices"]))
    return {"vision_output_dim": width} | sizes
