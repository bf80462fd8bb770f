"""Asks a language model in text alone: `python examples/text_inference.py "Name three rivers."
--model FOLDER`.
"""

import argparse

import mllama


def main(arguments: list[str] | None = None) -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(description="Ask a language model in text alone.")
    parser.add_argument("prompt", nargs="?", default="Name three rivers.")
    parser.add_argument(
        "--model",
        required=True,
        help="a model folder, a GGUF file or an id on the hub; the embedded model needs an image",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--top-k", type=int, default=50)
    asked = parser.parse_args(arguments)
    model, processor = mllama.load(asked.model)
    sampling = {"temperature": asked.temperature, "top_k": asked.top_k}
    print(
        mllama.ask(
            None, asked.prompt, model, processor, max_new_tokens=asked.max_new_tokens, **sampling
        )
    )


if __name__ == "__main__":
    main()
