"""Weight files of older scripts' models: their tensors' names, and this package's."""

from mllama.weights.rows import Drop, Rename, Table

_DECODER, _LAYER = "language_model.model", "language_model.model.trf_blocks.{}"
_OURS = "language_model.layers.{}"

# Feed-forward blocks come as three linear layers, or as two bare parameters each and a layer.
_TEXT = (
    Drop(f"{_LAYER}.att.rotary_emb.inv_freq"),
    Rename("language_model.embed_tokens.*", f"{_DECODER}.tok_emb.*"),
    *(
        Rename(f"{_OURS}.{ours}.*", f"{_LAYER}.{theirs}.*")
        for ours, theirs in (
            ("self_attn.q_proj", "att.W_query"),
            ("self_attn.k_proj", "att.W_key"),
            ("self_attn.v_proj", "att.W_value"),
            ("self_attn.o_proj", "att.out_proj"),
            ("input_layernorm", "norm1"),
            ("post_attention_layernorm", "norm2"),
        )
    ),
    *(
        Rename(
            f"{_OURS}.mlp.{part}_proj.{kind}",
            f"{_LAYER}.ff.swiglu.{letter}_{part}",
            also=(f"{_LAYER}.ff.swiglu.{letter}_{part}.{kind}",),
        )
        for part in ("gate", "up")
        for kind, letter in (("weight", "w"), ("bias", "b"))
    ),
    Rename(f"{_OURS}.mlp.gate_proj.*", f"{_LAYER}.ff.fc1.*"),
    Rename(f"{_OURS}.mlp.up_proj.*", f"{_LAYER}.ff.fc2.*"),
    Rename(f"{_OURS}.mlp.down_proj.*", f"{_LAYER}.ff.fc3.*", also=(f"{_LAYER}.ff.w_down.*",)),
    Rename("language_model.norm.*", f"{_DECODER}.final_norm.*"),
    Rename("lm_head.*", "language_model.lm_head.*"),
)

_TOWERS = ("vision_model.vision_model", "vision_model")


def _tower(ours: str, *theirs: str) -> Rename:
    first, *others = [f"{tower}.{name}" for name in theirs for tower in _TOWERS]
    return Rename(f"vision_tower.{ours}", first, also=others)


_VISION = (
    *(
        Drop(f"{tower}.{name}.position_ids")
        for tower in _TOWERS
        for name in ("embedding", "embeddings")
    ),
    _tower("embeddings.*", "embedding.*", "embeddings.*"),
    _tower("encoder.layers.{}.layer_norm1.*", "encoder.layers.{}.layernorm1.*"),
    _tower("encoder.layers.{}.layer_norm2.*", "encoder.layers.{}.layernorm2.*"),
    _tower("encoder.layers.*", "encoder.layers.*"),
    _tower("post_layernorm.*", "layernorm.*", "post_layernorm.*"),
)

TABLE: Table = (*_TEXT, *_VISION)
"""Between `MllamaForConditionalGeneration`'s tensors and older files', of all ages; the projector's
names are the same.
"""
