"""mllama: `model` is a folder or a GGUF file, `weights` a format of `mllama.optimize`, "file", or
"dense" for a model that is not packed. A folder with a config.json alone gets random weights.
"""

import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import torch
from image_inputs import random_tiles, tiled_prompt, timed_prompt
from on_device import has_weights, random_weights, with_memory
from photos import NEXT_QUESTION, QUESTION, Photos
from serve import serve
from torch import nn
from transformers import AutoConfig

from mllama import MllamaForConditionalGeneration, optimize
from mllama.device import choose_dtype
from mllama.fusion.base import ModelInputs
from mllama.nn.kv_cache import KVCache
from mllama.nn.packed import PackedLinear
from mllama.processing.auto import load_preprocessor
from mllama.runtime.completion import Generation
from mllama.runtime.questions import encode
from mllama.runtime.session import Session

NO_END: tuple[int, ...] = ()


class Mllama:
    def __init__(self, arguments: Namespace):
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(0)
        self.device = torch.device(arguments.device)
        dense = arguments.weights == "dense"
        plain = arguments.weights == "f32" or (dense and self.device.type == "cpu")
        self.dtype = torch.float32 if plain else choose_dtype(self.device, 1 << 30)
        packed = {} if dense else {"weights": arguments.weights}
        if has_weights(arguments.model):
            self.model = MllamaForConditionalGeneration.from_pretrained(
                arguments.model, dtype=self.dtype, **packed
            ).to(self.device)
        else:
            config = AutoConfig.from_pretrained(arguments.model)
            self.model = random_weights(
                lambda: MllamaForConditionalGeneration(config), self.device, self.dtype
            )
            if packed:
                optimize(self.model, **packed)
        self.model.eval()
        self.session = Session(self.model)
        self.text = self.model.spec.text
        self.bytes = read_bytes(self.model, images=False)
        self.photos = Photos()
        if self.model.spec.has_tiles:
            self.processor = load_preprocessor(Path(arguments.model))

    def decode(self, prompt: int, tokens: int) -> dict:
        return self.batch(prompt, tokens, 1)

    def batch(self, prompt: int, tokens: int, rows: int) -> dict:
        self.session.reset()
        ids = {"input_ids": self._ids(rows, prompt)}
        made = self.session.generate(ids, max_new_tokens=tokens + 1, eos_token_id=NO_END)
        read = self.bytes * tokens
        return {"seconds": made.timings.decode.seconds, "tokens": tokens * rows, "bytes": read}

    def prefill(self, tokens: int) -> dict:
        self.session.reset()
        ids = {"input_ids": self._ids(1, tokens)}
        made = self.session.generate(ids, max_new_tokens=1, eos_token_id=NO_END)
        return {"seconds": made.timings.first_token_seconds, "tokens": tokens}

    def generate(self, prompt: int, tokens: int) -> dict:
        """transformers' `generate`, from a prompt to the last token."""
        ids, start = self._ids(1, prompt), time.perf_counter()
        self.model.generation_config.eos_token_id = None  # no token ends it
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        assert made.shape[1] == prompt + tokens
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def answer(self, prompt: int, tokens: int) -> dict:
        """The same by a session."""
        self.session.reset()
        ids, start = self._ids(1, prompt), time.perf_counter()
        self.session.generate({"input_ids": ids}, max_new_tokens=tokens, eos_token_id=NO_END)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def deep(self, depth: int, tokens: int) -> dict:
        """Decode after `depth` positions (a multiple of 64) of random keys and values."""
        return self._deep(depth, tokens, None, self.dtype.itemsize)

    def deep_int8(self, depth: int, tokens: int) -> dict:
        return self._deep(depth, tokens, torch.int8, 8.5 / 8)

    @torch.inference_mode()
    def _deep(self, depth: int, tokens: int, dtype: torch.dtype | None, value_bytes: float) -> dict:
        layers, heads = self.text.num_hidden_layers, self.text.num_key_value_heads
        shape = (2, 1, 64, heads, self.text.head_dim)
        some = torch.randn(shape, device=self.device).to(self.dtype)
        cache = KVCache(layers, depth + tokens + 1, dtype)
        for layer in range(layers):
            cache.update(layer, *some.repeat(1, 1, depth // 64, 1, 1))
        ids = self._ids(1, 1)
        for step in range(tokens + 1):
            if step == 1:
                start = time.perf_counter()
            output = self.model.compute(ModelInputs(ids, cache=cache, logits_to_keep=1))
            ids = output.logits[:, -1:].argmax(-1)
        seconds = time.perf_counter() - start
        keys = int(layers * some.numel() * (depth // 64) * value_bytes)
        return {"seconds": seconds, "tokens": tokens, "bytes": (self.bytes + keys) * tokens}

    def photo(self, side: int, tokens: int) -> dict:
        """An image of side x side pixels and a question, then one more question about it."""
        self.session.reset()
        path = self.photos.new(side)
        prepared, made = self._ask(path, QUESTION, tokens + 1)
        prepared_next, following = self._ask(path, NEXT_QUESTION, 1)
        found = made.timings
        return {
            "seconds": found.decode.seconds,
            "tokens": tokens,
            "bytes": read_bytes(self.model, images=True) * tokens,
            "more": {
                "prepare_seconds": prepared,
                "encoder_seconds": found.image.seconds,
                "prompt_seconds": found.prompt.seconds,
                "prompt_tokens": made.num_prompt_tokens,
                "first_token_seconds": prepared + found.first_token_seconds,
                "next_question_seconds": prepared_next + following.timings.first_token_seconds,
            },
        }

    def _ask(self, path: Path, question: str, tokens: int) -> tuple[float, Generation]:
        """The seconds that text and image took to become tensors, and what was generated."""
        start = time.perf_counter()
        inputs = encode(self.processor, str(path), question)
        prepared = time.perf_counter() - start
        return prepared, self.session.generate(inputs, max_new_tokens=tokens, eos_token_id=NO_END)

    def tiles(self, tiles: int, tokens: int) -> dict:
        """An image of some tiles, already tensors, and a question, up to the first token."""
        self.session.reset()
        inputs, start = tiled_prompt(self.model.config, tiles, tokens), time.perf_counter()
        self.session.generate(inputs, max_new_tokens=1, eos_token_id=NO_END)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "more": {"first_token_seconds": seconds}}

    @torch.inference_mode()
    def encode(self, tiles: int) -> dict:
        """The vision encoder alone, on an image of some tiles; tokens are its outputs."""
        tower = self.model.vision_tower
        inputs = random_tiles(tower.config, tiles)
        start = time.perf_counter()
        tower(**inputs, reference=self.model.reference)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens": tiles * tower.tokens_per_tile,
            "more": {"encoder_seconds": seconds},
        }

    @torch.inference_mode()
    def see(self, tokens: int) -> dict:
        """Prefill of an image and some tokens of text."""
        return timed_prompt(self.model, self.dtype, tokens)

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(self.text.vocab_size // 2, (rows, length), device=self.device)


def read_bytes(model: nn.Module, images: bool) -> int:
    """Bytes of the weights that a token reads: those of the decoder's products. Layers that attend
    to images do nothing without one, and the images' keys and values are computed before.
    """
    cross = model.spec.text.cross_attention_layers
    parts: list[tuple[str, nn.Module]] = [("lm_head", model.lm_head)]
    for i, layer in enumerate(model.language_model.layers):
        if i in cross and not images:
            continue
        skipped = ("cross_attn.k_proj", "cross_attn.v_proj") if i in cross else ()
        parts += [part for part in layer.named_modules() if part[0] not in skipped]
    weights = [
        module.packed if isinstance(module, PackedLinear) else module.weight
        for _, module in parts
        if isinstance(module, (PackedLinear, nn.Linear))
    ]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def load(arguments: Namespace) -> tuple[dict, dict]:
    engine = Mllama(arguments)
    names = ["decode", "batch", "prefill", "answer", "generate", "deep", "deep_int8"]
    if engine.model.spec.has_tiles:
        names += ["encode", "photo", "tiles"]
    elif engine.model.spec.encoder is not None:
        names.append("see")
    actions = {name: getattr(engine, name) for name in names}
    return {"version": version("mllama")}, with_memory(actions, engine.device)


if __name__ == "__main__":
    serve(load)
