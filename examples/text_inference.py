"""Ask a text model: `python examples/text_inference.py "Name three rivers." --model FOLDER`."""

import argparse

import mllama


def main(arguments: list[str] | None = None) -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(description="Ask a text model.")
    parser.add_argument("prompt", nargs="?", default="Name three rivers.")
    parser.add_argument(
        "--model",
        required=True,
        help="a model folder, a GGUF file or an id on the hub; the embedded model needs an image",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=50)
    options = parser.parse_args(arguments)
    model, processor = mllama.load(options.model)
    sampling = {"temperature": options.temperature, "top_k": options.top_k}
    length = options.max_new_tokens
    print(mllama.ask(None, options.prompt, model, processor, max_new_tokens=length, **sampling))


if __name__ == "__main__":
    main()
