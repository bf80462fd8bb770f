"""mistral.rs: `model` is a folder, `weights` a format that it quantizes to while loading."""

import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

from mistralrs import ChatCompletionRequest, MultimodalArchitecture, Runner, Which
from photos import NEXT_QUESTION, QUESTION, Photos
from serve import serve


class MistralRs:
    def __init__(self, arguments: Namespace):
        model = Which.MultimodalPlain(model_id=arguments.model, arch=MultimodalArchitecture.VLlama)
        self.runner = Runner(which=model, in_situ_quant=arguments.weights, token_source="none")
        self.photos = Photos()

    def decode(self, prompt: int, tokens: int) -> dict:
        times = self._ask("a" * prompt, tokens + 1)
        return {"seconds": times[-1] - times[0], "tokens": len(times) - 1}

    def photo(self, side: int, tokens: int) -> dict:
        """An image of side x side pixels and a question, then one more question about it.

        Of each the first token only: 0.9.5 ends with an error at the second one after an image.
        """
        path = self.photos.new(side)
        first, following = (self._ask(text, 1, path)[0] for text in (QUESTION, NEXT_QUESTION))
        return {"more": {"first_token_seconds": first, "next_question_seconds": following}}

    def _ask(self, text: str, tokens: int, path: Path | None = None) -> list[float]:
        """Seconds until each token."""
        content: object = text
        if path is not None:
            image = {"type": "image_url", "image_url": {"url": str(path)}}
            content = [image, {"type": "text", "text": f"<|image|>{text}"}]
        start = time.perf_counter()
        chunks = self.runner.send_chat_completion_request(
            ChatCompletionRequest(
                messages=[{"role": "user", "content": content}],
                model="default",
                max_tokens=tokens,
                temperature=0.0,
                ignore_eos=True,
                stream=True,
            )
        )
        return [time.perf_counter() - start for _ in chunks]


def load(arguments: Namespace) -> tuple[dict, dict]:
    engine = MistralRs(arguments)
    actions = {name: getattr(engine, name) for name in ("decode", "photo")}
    return {"version": version("mistralrs")}, actions


if __name__ == "__main__":
    serve(load)
