"""Llama-3.2-11B-Vision: answers about an image, and its encoder alone; their tables in README.md.
By itself, since its files take 30 GB and minutes to write.
"""

from collections.abc import Iterable, Mapping
from typing import Any

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
    # mistral.rs has the whole model in bfloat16 in memory before it packs it.
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
_STAGES = {
    "load": "load_seconds",
    "preprocessing": "prepare_seconds",
    "encoder": "encoder_seconds",
    "prompt": "prompt_seconds",
    "first token": "first_token_seconds",
    "next question": "next_question_seconds",
}


def vision_tables(groups: Mapping[str, Any]) -> Iterable[str]:
    """Lines of README.md: seconds by stage, then those of the encoder alone."""
    for group in (groups[name] for name in (ANSWERS, QUARTER) if name in groups):
        title = f"{group['model']}, seconds"
        yield _line(title, "weights", "image", *_STAGES, "tokens/s", "memory, GB")
        yield _line(*["---"] * (5 + len(_STAGES)))
        for row in group["rows"]:
            stages = [_number(row.get(name), 2) for name in _STAGES.values()]
            rate, peak = row.get("tokens_per_second"), row["peak_gb"]
            rest = _number(rate, 1), _number(peak, 1)
            yield _line(_engine(row), row["precision"], row["case"], *stages, *rest)
        yield ""
    if group := groups.get(ENCODER):
        cases = list(dict.fromkeys(row["case"] for row in group["rows"]))
        yield _line(f"{group['model']}, seconds", "weights", *cases)
        yield _line(*["---"] * (2 + len(cases)))
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in group["rows"]:
            own = found.setdefault((_engine(row), row["precision"]), {})
            own[row["case"]] = row["encoder_seconds"]
        for contender, seconds in found.items():
            yield _line(*contender, *(_number(seconds.get(case), 2) for case in cases))


def _engine(row: Mapping[str, Any]) -> str:
    ours = row["engine"] == MLLAMA.name
    return row["engine"] if ours else f"{row['engine']} {row['version']}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
