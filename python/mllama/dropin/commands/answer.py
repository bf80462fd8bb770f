"""`inference.py`: one answer about a picture, or from text alone; options by fire, spelt with
underscores.
"""

import inspect
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable

from mllama.api import check_images, load_quietly, say_loaded
from mllama.cli import quieten, run_told
from mllama.cli._parser import number
from mllama.dropin.commands._comet import start_experiment
from mllama.hf.answering import GenerateSession, TextPieces, generate
from mllama.processing.image import load_picture
from mllama.runtime.questions import check_question, encode


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_told(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    try:
        import fire
    except ImportError as error:
        raise ImportError("inference.py needs fire: pip install 'mllama[older]'") from error
    quieten()
    as_written = fire.decorators.SetParseFn(
        str, "model_path", "prompt", "image_file_path"
    )  # fire would read "1, 2" as a tuple
    help_wanted = not {"-h", "--help"}.isdisjoint(
        arguments
    )  # fire would hand it on as an unknown option
    fire.Fire(
        as_written(inference),
        command=["--", "--help"] if help_wanted else arguments,
        name="inference.py",
    )


def inference(
    model_path: str = "",
    prompt: str = "",
    image_file_path: str = "",
    max_tokens_to_generate: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    do_sample: bool = False,
    only_cpu: bool = False,
    **unknown,
) -> None:
    """Print what the model says to a prompt, about a picture or without one.

    Args:
        model_path: a model folder, a GGUF file or an id on the hub; without it, the embedded model.
        prompt: put through the model's chat template.
        image_file_path: the picture.
        max_tokens_to_generate: the longest answer.
        temperature: of sampling.
        top_p: of sampling: from the likeliest tokens that add up to it.
        do_sample: True or False; False takes the likeliest token, whatever temperature and top_p
            are.
        only_cpu: True or False; the CPU even where there is a GPU.
        unknown: not so: any other option is an error.
    """
    if unknown:  # fire would tell of them once the answer is there
        raise ValueError(
            f"there is no option {', '.join(f'--{name}' for name in unknown)} (see --help)"
        )
    if not prompt:
        raise ValueError("--prompt is missing; give the question")
    check_question(prompt)
    longest = _number("max_tokens_to_generate", max_tokens_to_generate, number(int, 1))
    sampling = _truth("do_sample", do_sample)
    device = "cpu" if _truth("only_cpu", only_cpu) else "auto"
    picture = (
        load_picture(image_file_path) if image_file_path else None
    )  # before the model: an error should not take its time
    options = {"max_new_tokens": longest, "do_sample": sampling}
    if sampling:
        options["temperature"] = _number("temperature", temperature, number(float, 0))
        options["top_p"] = _number("top_p", top_p, number(float, 0, 1, above=True))
        options["top_k"] = 0
    else:
        _note_unused(temperature=temperature, top_p=top_p)
    experiment = start_experiment()
    model, processor = load_quietly(model_path or None, "auto", device)
    session = GenerateSession(model, processor)
    check_images(session, [] if picture is None else [picture])
    inputs = encode(processor, picture, prompt)

    begun = False

    def write(text: str) -> None:
        nonlocal begun
        if not begun:
            begun = True
            say_loaded(model_path or None, model)
            print("User Input:", prompt)
            print("AI Response:", end=" ")
        print(text, end="", flush=bool(text))

    pieces = TextPieces(session.tokenizer, write)
    kept = {"return_dict_in_generate": True, "output_logits": experiment is not None}
    output = generate(model, inputs, streamer=pieces, **options, **kept)
    print()
    if experiment is not None:
        experiment.log(options, inputs, output, picture, pieces.text.strip())


def _note_unused(**given) -> None:
    """Tell of sampling options without do_sample; not refused, since launch_inference.sh always
    gives them.
    """
    defaults = inspect.signature(inference).parameters
    unused = [f"--{name}" for name, value in given.items() if value != defaults[name].default]
    if unused:
        print(
            f"mllama: {' and '.join(unused)}: no effect without --do_sample True", file=sys.stderr
        )


def _number(name: str, value, parse: Callable[[str], float]) -> float:
    """As the other command lines read and refuse it; fire has made of it what it looked like."""
    try:
        return parse(str(value))
    except ArgumentTypeError as error:
        raise ValueError(f"--{name} {error}") from None


def _truth(name: str, value) -> bool:
    """True and False, also as the words: shell scripts hand these over in quotes."""
    words = {True: True, False: False, "True": True, "False": False}
    if not isinstance(value, (bool, str)) or value not in words:
        raise ValueError(f"--{name} must be True or False, got {value!r}")
    return words[value]
