"""The training run: the vision encoder on dense labels, then the decoder on its features, then all
parameters.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .build import DenseHeads, build_model
from .curve import draw_curve
from .dataset import Batch, batches
from .evaluation import evaluate, held_out_cases, summary
from .fast import bfloat16_products
from .tokenizer import build_tokenizer

STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # optimizer state of a parameter


@dataclass
class Plan:
    """Hyperparameters of a run. Lengths are numbers of images."""

    pictures: int = 84_000
    tower: float = 0.36  # fraction of the images that train the encoder only
    frozen: float = 0.1  # fraction after that, with the encoder frozen
    batch: int = 16
    turns: int = 14
    rate: float = 2e-3
    decoder_rate: float = 2e-3
    joint_rate: float = 0.8  # of the encoder in the last phase, as a fraction of `rate`
    warmup: int = 1600
    decay: float = 0.4  # fraction of the images at the end over which the rate decays to 0
    weight_decay: float = 0.02
    dense_weight: float = 0.4  # weight of the dense loss relative to the answers' loss
    average: float = 0.998  # decay per step of the weight average, which is exported
    muon: bool = True  # Muon for the matrices inside the layers, AdamW for the rest
    seed: int = 0

    def phase(self, seen: int) -> str:
        """Phase after `seen` images: "tower", "frozen" or "joint"."""
        share = seen / self.pictures
        return (
            "tower"
            if share < self.tower
            else "frozen"
            if share < self.tower + self.frozen
            else "joint"
        )

    def factor(self, seen: int) -> float:
        """Learning rate factor after `seen` images: warm-up, constant, cosine decay to 0."""
        left = (self.pictures - seen) / (self.decay * self.pictures)
        fall = 1.0 if left >= 1 else 0.5 - 0.5 * math.cos(math.pi * max(0.0, left))
        return min(1.0, (seen + self.batch) / self.warmup) * fall


class Run:
    """A training run in a folder, saved as safetensors and JSON."""

    def __init__(
        self, plan: Plan, folder: Path, resume: bool = False, check_pictures: int = 150
    ) -> None:
        self.plan, self.folder, self.check_pictures = plan, Path(folder), check_pictures
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(plan.seed)
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer)
        config = self.model.config
        self.patches = config.text_config.num_image_tokens
        self.heads = DenseHeads(config.vision_config.hidden_size)
        self.seen, self.steps, self.seconds = 0, 0, 0.0
        self.history: list[dict] = []
        self.parameters = {
            **{
                f"model.{name}": p
                for name, p in self.model.named_parameters()
                if "post_layernorm" not in name
            },
            **{f"heads.{name}": p for name, p in self.heads.named_parameters()},
        }
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        groups = self._groups()
        self.optimizers = [
            torch.optim.AdamW(
                [g for g in groups if not g["muon"]], lr=plan.rate, betas=(0.9, 0.98), eps=1e-8
            )
        ]
        if plan.muon:
            matrices = [g for g in groups if g["muon"]]
            self.optimizers.append(
                torch.optim.Muon(
                    matrices, lr=plan.rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"
                )
            )
        if resume and (self.folder / "state.json").exists():
            self._load()
        bfloat16_products(self.model)

    def _groups(self) -> list[dict]:
        """Parameter groups: encoder and the rest, each with and without weight decay."""
        groups = []
        for part in ("tower", "decoder"):
            chosen = [
                (n, p)
                for n, p in self.parameters.items()
                if (("vision_tower" in n or n.startswith("heads.")) == (part == "tower"))
            ]
            matrices = [p for n, p in chosen if p.dim() == 2 and ".layers." in n]
            inside = {id(p) for p in matrices}
            others = [
                p for n, p in chosen if p.dim() >= 2 and "embed" not in n and id(p) not in inside
            ]
            plain = [p for n, p in chosen if p.dim() < 2 or "embed" in n]
            decay, muon = self.plan.weight_decay, self.plan.muon
            for group, rate, use_muon in (
                (matrices, decay, muon),
                (others, decay, False),
                (plain, 0.0, False),
            ):
                groups.append(
                    {"params": group, "part": part, "weight_decay": rate, "muon": use_muon}
                )
        return groups

    # -- one step

    def step(self, batch: Batch) -> dict:
        """Train on one batch and return metrics."""
        phase = self.plan.phase(self.seen)
        self.model.train()
        pixels = (batch.pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
        with torch.set_grad_enabled(phase != "frozen"):
            features = self.model.vision_tower(pixels, final_norm=False).last_hidden_state
            dense, right = self.heads(features, batch.classes, batch.offsets)
        loss, shown = (
            (
                dense
                if phase == "tower"
                else dense * self.plan.dense_weight
                if phase == "joint"
                else 0.0
            ),
            {},
        )
        if phase != "tower":
            answers, accuracy = self._answers(features, batch)
            loss = loss + answers
            shown = {"answers": answers.item(), "tokens": accuracy}
        self._set_rates(phase)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(
            [p for p in self.parameters.values() if p.grad is not None], 1.0
        )
        for optimizer in self.optimizers:
            optimizer.step()
        self.seen += len(pixels)
        self.steps += 1
        keep = min(self.plan.average, 1 - 1 / (1 + self.steps / 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()),
                [p.detach() for p in self.parameters.values()],
                1 - keep,
            )
        return {"phase": phase, "dense": dense.item(), **shown, "norm": float(norm), "right": right}

    def _answers(self, features: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """Cross entropy of the answers' tokens; logits are computed for these only."""
        image = self.model.multi_modal_projector(features)
        words = self.model.language_model.embed_tokens(batch.input_ids[:, self.patches :])
        hidden = self.model.language_model(
            inputs_embeds=torch.cat([image, words], dim=1), attention_mask=batch.attention_mask
        )
        wanted = batch.labels[:, 1:]
        known = wanted != -100
        logits = self.model.lm_head(hidden.last_hidden_state[:, :-1][known]).float()
        return nn.functional.cross_entropy(logits, wanted[known]), float(
            (logits.argmax(-1) == wanted[known]).float().mean()
        )

    def _set_rates(self, phase: str) -> None:
        factor = self.plan.factor(self.seen)
        start = (self.plan.tower) * self.plan.pictures  # the decoder has a warm-up of its own
        warm = min(1.0, max(0.0, self.seen - start + self.plan.batch) / self.plan.warmup)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if group["part"] == "tower":
                group["lr"] = (
                    self.plan.rate * factor * (self.plan.joint_rate if phase == "joint" else 1.0)
                )
            else:
                group["lr"] = self.plan.decoder_rate * factor * warm

    # -- the loop

    def train(
        self, progress, save_every: float = 120.0, check_every: float = 900.0, workers: int = 1
    ) -> None:
        """Train to the end of the plan.

        Args:
            progress: a tqdm bar.
            save_every, check_every: seconds.
            workers: processes that draw images.
        """
        plan = self.plan
        source = batches(
            plan.seed, plan.batch, plan.pictures, self.seen // plan.batch, plan.turns, workers
        )
        saved = checked = time.monotonic()
        smooth: dict[str, float] = {}
        stopping: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
        while self.seen < plan.pictures and not stopping:
            began = time.monotonic()
            shown = self.step(next(source))
            self.seconds += min(5.0, time.monotonic() - began)  # do not count pauses of the process
            flat = {k: v for k, v in shown.items() if isinstance(v, float)} | {
                f"patch {k}": v for k, v in shown["right"].items()
            }
            for name, value in flat.items():
                smooth[name] = value if name not in smooth else 0.97 * smooth[name] + 0.03 * value
            progress.update(plan.batch)
            if self.steps % 25 == 0:
                names = (
                    "dense",
                    "answers",
                    "tokens",
                    "patch shape",
                    "patch color",
                    "patch character",
                )
                progress.set_postfix_str(
                    shown["phase"]
                    + " "
                    + " ".join(f"{n.split()[-1]} {smooth[n]:.3f}" for n in names if n in smooth)
                )
                row = {
                    "pictures": self.seen,
                    "seconds": round(self.seconds),
                    "phase": shown["phase"],
                }
                self.history.append(row | {n: round(v, 4) for n, v in smooth.items()})
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
            if time.monotonic() - checked > check_every:
                if shown["phase"] != "tower":
                    self.check(progress)
                checked = time.monotonic()
        self.save()
        if not stopping:
            self.check(progress, pictures=400)

    def check(self, progress, pictures: int | None = None) -> dict:
        """Accuracy of the averaged weights on a few held-out images, appended to checks.jsonl."""
        with self._averaged():
            figures = evaluate(
                self.model, self.tokenizer, held_out_cases(pictures or self.check_pictures)
            )
        figures |= {"pictures": self.seen, "seconds": round(self.seconds)}
        with open(self.folder / "checks.jsonl", "a") as file:
            file.write(json.dumps(figures) + "\n")
        progress.write(f"{self.seen} images, {self.seconds:.0f} s: {summary(figures)}")
        return figures

    @contextmanager
    def _averaged(self):
        """Context manager: the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            kept = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(kept)

    # -- files

    def save(self) -> None:
        """Write everything that resuming needs, atomically."""
        tensors = {f"now.{n}": p.detach() for n, p in self.parameters.items()} | {
            f"average.{n}": a for n, a in self.average.items()
        }
        for name, p in self.parameters.items():
            state = next((o.state[p] for o in self.optimizers if p in o.state), {})
            for key in STATE:
                if key in state:
                    tensors[f"state.{key}.{name}"] = torch.as_tensor(
                        state[key], dtype=torch.float32
                    )
        aside = self.folder / "state.safetensors.part"
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, aside)
        os.replace(aside, self.folder / "state.safetensors")
        state = {
            "plan": asdict(self.plan),
            "seen": self.seen,
            "steps": self.steps,
            "seconds": self.seconds,
            "history": self.history,
        }
        aside = self.folder / "state.json.part"
        aside.write_text(json.dumps(state))
        os.replace(aside, self.folder / "state.json")
        draw_curve(self.history, self.folder / "loss.png")

    def _load(self) -> None:
        state = json.loads((self.folder / "state.json").read_text())
        self.seen, self.steps, self.seconds, self.history = (
            state["seen"],
            state["steps"],
            state["seconds"],
            state["history"],
        )
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"now.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                state = {
                    key: tensors[f"state.{key}.{name}"].clone()
                    for key in STATE
                    if f"state.{key}.{name}" in tensors
                }
                if state:
                    owner = next(
                        o
                        for o in self.optimizers
                        if any(p is q for g in o.param_groups for q in g["params"])
                    )
                    owner.state[p] = state

    def export(self, folder: Path) -> None:
        """Write the averaged weights in bfloat16, with tokenizer and processor files, as a model
        folder.
        """
        from mllama.hf.processors.llava import MllamaImageProcessor

        folder = Path(folder)
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        model = build_model(self.tokenizer)
        model.load_state_dict(
            {
                n.removeprefix("model."): a
                for n, a in self.average.items()
                if n.startswith("model.")
            },
            strict=False,
        )
        model.tie_weights()
        model.to(torch.bfloat16).eval().save_pretrained(aside)
        size = model.config.vision_config.image_size
        MllamaImageProcessor(self.tokenizer, self.patches, size).save_pretrained(aside)
        folder.mkdir(parents=True, exist_ok=True)
        for file in aside.iterdir():
            os.replace(file, folder / file.name)
        aside.rmdir()
