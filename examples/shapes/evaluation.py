"""Accuracy by kind of question on held-out images."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from PIL import Image

from .dataset import held_out, pixels_of
from .drawing import SHAPES
from .palette import COLORS
from .questions import KINDS, Turn

TARGET_KINDS = ("color", "shape", "where", "exists")


@dataclass
class Case:
    """One image with its questions and its number of objects."""

    image: Image.Image
    turns: list[Turn]
    objects: int
    background: str = "flat"


def held_out_cases(count: int, seed: int = 0, turns: int = 8) -> list[Case]:
    """Cases from the generator's held-out seeds."""
    return [
        Case(scene.image, asked, len(scene.objects), scene.background)
        for scene, asked in held_out(count, seed, turns)
    ]


def named_objects(sentence: str) -> Counter:
    """The (color, shape) pairs and texts that a description names, as a multiset."""
    pairs = re.findall(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", sentence.lower())
    texts = re.findall(r"\bthe (number|word) (\w+)", sentence.lower())
    return Counter(pairs) + Counter(texts)


def is_right(turn: Turn, answer: str) -> bool:
    """Whether an answer equals the expected one. Descriptions must name the same objects."""
    if turn.kind == "describe":
        return named_objects(answer) == named_objects(turn.answer)
    return answer.strip().lower().rstrip(".") == turn.answer


@torch.no_grad()
def answer_all(
    model, tokenizer, cases: list[Case], batch: int = 64, new_tokens: int = 44
) -> list[list[str]]:
    """Greedy answers to every question of every case, each asked separately."""
    model.eval()
    config = model.config
    size, patches = config.vision_config.image_size, config.text_config.num_image_tokens
    image = tokenizer.convert_tokens_to_ids("<image>")
    dtype = model.get_input_embeddings().weight.dtype
    jobs = [(c, t) for c, case in enumerate(cases) for t in range(len(case.turns))]
    # Descriptions and texts are long: batch them together, so that short answers need not wait.
    jobs.sort(key=lambda job: cases[job[0]].turns[job[1]].kind in ("describe", "number", "word"))
    answers = [[""] * len(case.turns) for case in cases]
    features: dict[int, torch.Tensor] = {}
    for start in range(0, len(cases), batch):
        pixels = torch.stack(
            [
                torch.from_numpy(pixels_of(case.image, size).copy())
                for case in cases[start : start + batch]
            ]
        )
        encoded = model.get_image_features(
            (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype)
        )
        features |= {start + i: row for i, row in enumerate(encoded)}
    for start in range(0, len(jobs), batch):
        chosen = jobs[start : start + batch]
        texts = [
            tokenizer(cases[c].turns[t].question + "\n", add_special_tokens=False)["input_ids"]
            for c, t in chosen
        ]
        longest = max(map(len, texts))
        ids = torch.tensor(
            [
                [tokenizer.pad_token_id] * (longest - len(text)) + [image] * patches + text
                for text in texts
            ]
        )
        made = model.generate(
            input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(),
            image_features=torch.stack([features[c] for c, _ in chosen]),
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for (c, t), row in zip(chosen, made[:, ids.shape[1] :], strict=True):
            answers[c][t] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def evaluate(model, tokenizer, cases: list[Case], mistakes: list | None = None) -> dict:
    """Accuracy by kind: on all images, on images of one to three objects, and over the four target
    kinds on the latter.

    If given, `mistakes` receives (case, turn, answer) of every wrong answer.
    """
    given = answer_all(model, tokenizer, cases)
    right, few = defaultdict(list), defaultdict(list)
    for case, answers in zip(cases, given, strict=True):
        for turn, answer in zip(case.turns, answers, strict=True):
            good = is_right(turn, answer)
            right[turn.kind].append(good)
            if 1 <= case.objects <= 3:
                few[turn.kind].append(good)
                if turn.kind in TARGET_KINDS:
                    few["target"].append(good)
            if not good and mistakes is not None:
                mistakes.append((case, turn, answer))

    def share(flags: list[bool]) -> dict:
        return {"share": round(sum(flags) / len(flags), 4), "questions": len(flags)}

    return {
        "held_out_pictures": len(cases),
        "target": share(few.pop("target", [False])),
        "one_to_three_objects": {kind: share(few[kind]) for kind in KINDS if few[kind]},
        "all": {kind: share(right[kind]) for kind in KINDS if right[kind]},
    }


def summary(figures: dict) -> str:
    """The figures in one line."""
    kinds = " ".join(
        f"{kind} {value['share']:.0%}" for kind, value in figures["one_to_three_objects"].items()
    )
    rest = " ".join(f"{kind} {value['share']:.0%}" for kind, value in figures["all"].items())
    return f"target {figures['target']['share']:.1%} ({kinds}); all ({rest})"
