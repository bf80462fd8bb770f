"""transformers' own classes: `model` is a folder, `weights` is "f32" or "bf16". A folder with a
config.json alone gets random weights.
"""

import time
from argparse import Namespace

import torch
import transformers
from image_inputs import random_tiles, tiled_prompt, timed_prompt
from on_device import has_weights, random_weights, with_memory
from serve import serve

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Transformers:
    def __init__(self, arguments: Namespace):
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(0)
        self.dtype = DTYPES[arguments.weights]
        config = transformers.AutoConfig.from_pretrained(arguments.model)
        auto = (
            transformers.AutoModelForImageTextToText
            if hasattr(config, "vision_config")
            else transformers.AutoModelForCausalLM
        )
        self.device = torch.device(arguments.device)
        if has_weights(arguments.model):
            self.model = auto.from_pretrained(arguments.model, dtype=self.dtype).to(self.device)
        else:
            self.model = random_weights(
                lambda: auto.from_config(config, dtype=self.dtype), self.device, self.dtype
            )
        self.model.eval()
        self.config = self.model.config
        self.bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())  # tied

    def decode(self, prompt: int, tokens: int) -> dict:
        return self.batch(prompt, tokens, 1)

    def batch(self, prompt: int, tokens: int, rows: int) -> dict:
        cache = transformers.DynamicCache(config=self.config)
        with torch.inference_mode():
            self.model(self._ids(rows, prompt), past_key_values=cache, logits_to_keep=1)
        return self._steps(cache, tokens, rows)

    def static(self, prompt: int, tokens: int) -> dict:
        """Decode by `generate` with a static cache, which compiles the model on a GPU: the time of
        all tokens less that of one.
        """
        first, whole = (self._generate_static(prompt, count) for count in (1, tokens + 1))
        read = self.bytes * tokens
        return {"seconds": whole - first, "tokens": tokens, "bytes": read}

    def _generate_static(self, prompt: int, tokens: int) -> float:
        ids = self._ids(1, prompt)
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **length
            )[0, -1].item()
        return time.perf_counter() - start

    def tiles(self, tiles: int, tokens: int) -> dict:
        """An image of some tiles, already tensors, and a question, up to the first token."""
        inputs, start = tiled_prompt(self.config, tiles, tokens), time.perf_counter()
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        with torch.inference_mode():
            self.model(**inputs, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "more": {"first_token_seconds": seconds}}

    def prefill(self, tokens: int) -> dict:
        ids, start = self._ids(1, tokens), time.perf_counter()
        with torch.inference_mode():
            self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def generate(self, prompt: int, tokens: int) -> dict:
        ids, start = self._ids(1, prompt), time.perf_counter()
        self.model.generation_config.eos_token_id = None  # no token ends it
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        assert made.shape[1] == prompt + tokens
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def deep(self, depth: int, tokens: int) -> dict:
        """Decode after `depth` positions (a multiple of 64) of random keys and values."""
        cache = transformers.DynamicCache(config=self.config)
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        some = torch.randn(2, 1, heads, 64, size, device=self.device).to(self.dtype)
        for layer in range(self.config.num_hidden_layers):
            cache.update(*some.repeat(1, 1, 1, depth // 64, 1), layer)
        keys = self.config.num_hidden_layers * some.nbytes * (depth // 64)
        answer = self._steps(cache, tokens, 1)
        return answer | {"bytes": answer["bytes"] + keys * tokens}

    @torch.inference_mode()
    def encode(self, tiles: int) -> dict:
        """Llama-3.2-Vision's encoder alone, on an image of some tiles; tokens are its outputs."""
        tower = self.model.model.vision_model
        inputs = random_tiles(tower.config, tiles)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        start = time.perf_counter()
        features = tower(**inputs).last_hidden_state  # (1, 1, tiles, tokens, hidden)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens": tiles * features.shape[3],
            "more": {"encoder_seconds": seconds},
        }

    @torch.inference_mode()
    def see(self, tokens: int) -> dict:
        """Prefill of an image and some tokens of text."""
        return timed_prompt(self.model, self.dtype, tokens)

    @torch.inference_mode()
    def _steps(self, cache: transformers.DynamicCache, tokens: int, rows: int) -> dict:
        ids = self._ids(rows, 1)
        for step in range(tokens + 1):
            if step == 1:
                start = time.perf_counter()
            ids = self.model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        ids.tolist()  # waits for the device
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens * rows, "bytes": self.bytes * tokens}

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        vocabulary = self.config.get_text_config().vocab_size
        return torch.randint(vocabulary // 2, (rows, length), device=self.device)


def load(arguments: Namespace) -> tuple[dict, dict]:
    engine = Transformers(arguments)
    version = f"{transformers.__version__}, torch {torch.__version__}"
    if engine.config.model_type == "mllama":
        names = ("encode", "tiles", "static")
        actions = {name: getattr(engine, name) for name in names}
        return {"version": version}, with_memory(actions, engine.device)
    if hasattr(engine.config, "vision_config"):
        return {"version": version}, {"see": engine.see}
    names = ("decode", "batch", "static", "prefill", "generate", "deep")
    actions = {name: getattr(engine, name) for name in names} | {"answer": engine.generate}
    return {"version": version}, with_memory(actions, engine.device)


if __name__ == "__main__":
    serve(load)
