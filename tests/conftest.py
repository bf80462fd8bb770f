"""Fixtures that tests of several folders share."""

import functools
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import family_folders
import mllama
import twins
from mllama import MllamaImageProcessor

WORDS = [
    "How many circles?",
    "What colour is it?",
    "two red three blue, describe the picture: hello a b c d",
]


# Whole programs, trainings and products of families and options: `make test-quick` leaves them out.
SLOW = (
    "checkpoints/test_memory.py",
    "checkpoints/test_smollm2.py",
    "cli/test_verify.py",
    "dropin",
    "families/test_config_fields.py",
    "families/test_packed.py",
    "families/test_training.py",
    "lora/test_models.py",
    "runtime/test_real_models.py",
    "test_benchmarks.py",
    "test_embedded.py",
    "test_examples.py",
    "test_import.py",
    "test_readme.py",
    "test_training_run.py",
    "test_types.py",
    "training",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files and folders in SLOW."""
    here = Path(__file__).parent
    slow = [here / name for name in SLOW]
    for item in items:
        if any(place == item.path or place in item.path.parents for place in slow):
            item.add_marker(pytest.mark.slow)


def pytest_report_header() -> str:
    """What the run is under: what docs/compatibility.md tells apart."""
    names = ("torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "pillow", "numpy")
    found = [
        f"{name} {metadata.version(name)}"
        for name in names
        if find_spec("PIL" if name == "pillow" else name)
    ]
    return f"mllama of {Path(mllama.__file__).parent}; Python {platform.python_version()}, {', '.join(found)}"


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(bos, adds_bos, pad): bytes and a few merges, <eos>; <bos> if asked, which it
    may put into every text itself; <pad>.
    """

    def make(bos: bool = True, adds_bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<eos>"] + ["<bos>"] * bos + ["<pad>"] * pad,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(WORDS, trainer)
        if adds_bos:
            tokens = [("<bos>", backend.token_to_id("<bos>"))]
            backend.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=tokens
            )
        named = (
            {"eos_token": "<eos>"}
            | ({"bos_token": "<bos>"} if bos else {})
            | ({"pad_token": "<pad>"} if pad else {})
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **named)

    return make


@pytest.fixture(scope="session")
def model_folder(make_tokenizer, tmp_path_factory):
    """A model folder: tiny, with random weights, and with its processor."""
    processor = MllamaImageProcessor(
        make_tokenizer(bos=False), twins.PATCHES, twins.VISION["image_size"]
    )
    tokenizer = processor.tokenizer
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    folder = tmp_path_factory.mktemp("model")
    twins.model(text=sizes | ends, image_token_index=processor.image_token_id).save_pretrained(
        folder
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_folder(make_tokenizer, model_folder, tmp_path_factory):
    """family_folder(family): a folder of `family_folders.MAKERS`, or "llava, siglip", written once."""

    @functools.cache
    def make(family: str):
        return (
            model_folder
            if family == "llava, siglip"
            else family_folders.write(family, make_tokenizer, tmp_path_factory.mktemp("family"))
        )

    return make


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory):
    """A picture file: a red circle on white."""
    picture = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(picture).ellipse((10, 5, 40, 35), fill="red")
    path = tmp_path_factory.mktemp("pictures") / "circle.png"
    picture.save(path)
    return path
