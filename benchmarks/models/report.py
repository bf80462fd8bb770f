"""Results as a file and as README.md's table; each equals the other (tests/test_benchmarks.py)."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.models.vision_11b import ANSWERS, ENCODER, NAMES, QUARTER
from mllama.checkpoints.files import write_file

RESULTS = Path(__file__).parents[1] / "results"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- bench-models: begin -->", "<!-- bench-models: end -->"
PEERS = ("llama.cpp", "OpenVINO", "ONNX Runtime", "transformers")
OURS = "mllama"
# Of an answer about an image, by what the table calls them.
STAGES = {
    "load": "load_seconds",
    "preprocessing": "prepare_seconds",
    "encoder": "encoder_seconds",
    "prompt": "prompt_seconds",
    "first token": "first_token_seconds",
    "next question": "next_question_seconds",
}


def path_for(processor: str, kind: str = "models") -> Path:
    """The results of a machine: models-<processor>.json."""
    return RESULTS / f"{kind}-{re.sub('[^a-z0-9]+', '-', processor.lower()).strip('-')}.json"


def save(path: Path, facts: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
    """Write groups to a file of results, all at once; those of the same machine that it has already
    and that were not measured now stay.
    """
    before = json.loads(path.read_text())["groups"] if path.exists() else {}
    content = {**facts, "groups": before | dict(groups)}

    def write(aside: Path) -> None:
        aside.write_text(json.dumps(content, indent=1) + "\n")

    write_file(path, write)


def newest() -> dict[str, Any] | None:
    """The results that were measured last, on whichever machine; None without any."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("models-*.json")]
    return max(found, key=lambda content: content["date"], default=None)


def table(content: Mapping[str, Any] | None) -> str:
    """README.md's text between BEGIN and END."""
    if content is None:
        return "\n"
    parts = [_head(content), "", *_rows(content), "", *_vision(content["groups"]), ""]
    parts += _starts(content)
    if picture := content.get("picture"):
        parts += ["", f"![Tokens per second of each engine](benchmarks/results/{picture})"]
    return re.sub("\n\n+", "\n\n", "\n".join(["", *parts, "", ""]))


def write_readme(content: Mapping[str, Any] | None) -> None:
    """Replace README.md's text between BEGIN and END."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table(content) + END + rest.split(END)[1])


def _head(content: Mapping[str, Any]) -> str:
    roofs = [group["roofs"] for group in content["groups"].values() if "roofs" in group]
    reads = [roof["read_gb_per_second"] for roof in roofs]
    versions = {
        row["engine"]: row["version"]
        for group in content["groups"].values()
        for row in group["rows"]
        if "engine" in row
    }
    peers = ", ".join(f"{name} {versions[name]}" for name in PEERS if name in versions)
    text = (
        "Whole models, in tokens per second, against other engines with as many bits per weight: "
        f"`make bench-models` on {content['machine']}, {content['date'][:10]}. The ratio "
        f"is to the fastest one{f' of {peers}' if peers else ''}. "
        "[benchmarks/README.md](benchmarks/README.md) explains the workloads."
    )
    if reads:
        text += (
            f" Memory was read at {min(reads):.0f} to {max(reads):.0f} GB/s in the same run; "
            "shares are of its speed just before and after a measurement."
        )
    command = "make bench-models"  # stays on one line
    text = text.replace(command, command.replace(" ", "\0"))
    whole = textwrap.fill(text, 100, break_on_hyphens=False)
    return whole.replace("\0", " ")


def _rows(content: Mapping[str, Any]) -> Iterable[str]:
    """A line for each case of each group."""
    yield _line("model", "weights", "workload", "mllama", "share of read speed", *PEERS, "ratio")
    yield _line(*["---"] * (6 + len(PEERS)))
    for name, group in content["groups"].items():
        if name in NAMES:
            continue
        for case in dict.fromkeys(row["case"] for row in group["rows"] if "engine" in row):
            rows = [row for row in group["rows"] if row["case"] == case]
            ours = _best(rows, OURS)
            peers = [_best(rows, name) for name in PEERS]
            others = [peer["tokens_per_second"] for peer in peers if peer]
            share = f"{ours['share_of_read']:.0%}" if ours and "share_of_read" in ours else ""
            ratio = f"{ours['tokens_per_second'] / max(others):.2f}" if ours and others else ""
            cells = [_rate(ours), share, *map(_rate, peers), ratio]
            yield _line(group["model"], group["bits"], case, *cells)


def _starts(content: Mapping[str, Any]) -> Iterable[str]:
    """A line for each cold start."""
    rows = content["groups"].get("cold", {"rows": []})["rows"]
    if rows:
        yield _line("cold start", "seconds to the first text")
        yield _line("---", "---")
    for row in rows:
        yield _line(row["case"], f"{row['seconds']:.2f}")


def _vision(groups: Mapping[str, Any]) -> Iterable[str]:
    """Lines of README.md: seconds by stage, then those of the encoder alone."""
    for group in (groups[name] for name in (ANSWERS, QUARTER) if name in groups):
        title = f"{group['model']}, seconds"
        yield _line(title, "weights", "image", *STAGES, "tokens/s", "memory, GB")
        yield _line(*["---"] * (5 + len(STAGES)))
        for row in group["rows"]:
            stages = [_number(row.get(name), 2) for name in STAGES.values()]
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
    ours = row["engine"] == OURS
    return row["engine"] if ours else f"{row['engine']} {row['version']}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _best(rows: Iterable[Mapping[str, Any]], engine: str) -> Mapping[str, Any] | None:
    own = [row for row in rows if row["engine"] == engine]
    return max(own, key=lambda row: row["tokens_per_second"], default=None)


def _rate(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    rate = row["tokens_per_second"]
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
