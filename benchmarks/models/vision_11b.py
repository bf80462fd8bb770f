"""Llama-3.2-11B-Vision: answers about an image, and its encoder alone. By themselves, since the
files take 40 GB and minutes to write.
"""

from benchmarks.models.engines import MISTRALRS, MLLAMA, TRANSFORMERS
from benchmarks.models.files import Files
from benchmarks.models.groups import Case, Contender, Group

MODEL = "Llama-3.2-11B-Vision's shapes"
ANSWERS, QUARTER, ENCODER = NAMES = "11b-int4", "11b-quarter", "11b-encoder"
PACKED = Contender(MLLAMA, "int4", "file", Files.vision_packed)
CASES = (
    Case("text alone", "decode", {"prompt": 16, "tokens": 32}),
    Case("560 x 560, one tile", "photo", {"side": 560, "tokens": 32}),
    Case("1,120 x 1,120, four tiles", "photo", {"side": 1120, "tokens": 32}),
)
TILES = Case("one tile", "encode", {"tiles": 1}), Case("four tiles", "encode", {"tiles": 4})
VISION_GROUPS = (
    Group(
        ANSWERS,
        MODEL,
        "int4",
        (PACKED, Contender(MLLAMA, "int4, packed while loading", "int4", Files.vision)),
        CASES,
        alone=True,
    ),
    # mistral.rs has the whole model in float32 in memory before it packs it.
    Group(
        QUARTER,
        "with 10 of its 40 decoder layers",
        "int4",
        (
            Contender(MLLAMA, "int4, packed while loading", "int4", Files.vision_quarter),
            Contender(MISTRALRS, "Q4K, packed while loading", "Q4K", Files.vision_quarter),
        ),
        CASES,
        alone=True,
    ),
    Group(
        ENCODER,
        "its encoder alone",
        "",
        (
            Contender(MLLAMA, "int8", "int8", Files.encoder),
            Contender(MLLAMA, "bf16", "bf16", Files.encoder),
            Contender(MLLAMA, "f32", "f32", Files.encoder),
            Contender(TRANSFORMERS, "bf16", "bf16", Files.encoder),
            Contender(TRANSFORMERS, "f32", "f32", Files.encoder),
        ),
        TILES,
    ),
)
# A smoke run, under the same names.
QUICK_VISION = (
    Group(
        ANSWERS,
        "three layers of 64",
        "int4",
        (PACKED,),
        (
            Case("text alone", "decode", {"prompt": 4, "tokens": 2}),
            Case("one tile", "photo", {"side": 28, "tokens": 2}),
            Case("four tiles", "photo", {"side": 56, "tokens": 2}),
        ),
        alone=True,
    ),
    Group(ENCODER, "encoder of 64", "", VISION_GROUPS[2].contenders[2::2], TILES),
)
