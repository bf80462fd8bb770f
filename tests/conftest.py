"""Fixtures that tests of several folders share."""

import os

# Two workers share the cores: threads that spin while they wait cost the other one three quarters
# of its time. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import functools
import itertools
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image, ImageDraw

import devices
import emulated
import mllama
from tiny import folders, tokenizers

# Whole programs, trainings and products of families and options: `make test-quick` leaves them out.
SLOW = (
    "checkpoints/test_devices.py",
    "checkpoints/test_formats.py",
    "checkpoints/test_hostile.py",
    "checkpoints/test_memory.py",
    "checkpoints/test_smollm2.py",
    "cli/test_convert.py",
    "cli/test_quantize.py",
    "cli/test_streams.py",
    "cli/test_terminal.py",
    "cli/test_verify.py",
    "data",
    "dropin",
    "evaluate/test_run.py",
    "families/test_attention_masks.py",
    "families/test_config_fields.py",
    "families/test_defaults.py",
    "families/test_folders.py",
    "families/test_generate.py",
    "families/test_packed.py",
    "families/test_placeholders.py",
    "families/test_resizing.py",
    "families/test_training.py",
    "fusion/test_prepend.py",
    "hf/test_fusing.py",
    "hf/test_modeling.py",
    "lora/test_models.py",
    "processing/test_meta.py",
    "runtime/test_real_models.py",
    "test_benchmarks.py",
    "test_cuda_build.py",
    "test_embedded.py",
    "test_examples.py",
    "test_import.py",
    "test_readme.py",
    "test_shapes.py",
    "test_simd.py",
    "test_training_run.py",
    "test_types.py",
    "training",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device, --architecture and --library (devices.py)."""
    parser.addoption(
        "--device", choices=devices.CHOICES, default="cpu", help="where operators are tested"
    )
    parser.addoption(
        "--architecture",
        type=int,
        choices=emulated.ARCHITECTURES,
        default=80,
        help="of the device that --device=emulated or ptx stands for",
    )
    parser.addoption(
        "--library", type=Path, help="what --device=emulated or ptx loads; the built one by default"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device before test files are imported."""
    options = (config.getoption(name) for name in ("device", "architecture", "library"))
    devices.choose(*options)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Import test files with the default device that their tests have."""
    with devices.default_for(collector.path):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Run tests with it."""
    with devices.default_for(item.path):
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files and folders in SLOW, and those that the device does not run."""
    slow = {Path(__file__).parent / name for name in SLOW}
    for path, tests in itertools.groupby(items, lambda item: item.path):
        marks = [pytest.mark.slow] if slow & {path, *path.parents} else []
        if reason := devices.skip_reason(path):
            marks.append(pytest.mark.skip(reason=reason))
        for item, mark in itertools.product(tests, marks):
            item.add_marker(mark)


def pytest_report_header() -> str:
    """What the run is under: what docs/compatibility.md tells apart."""
    names = ("torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "pillow", "numpy")
    found = [
        f"{name} {metadata.version(name)}"
        for name in names
        if find_spec("PIL" if name == "pillow" else name)
    ]
    found = ", ".join([f"Python {platform.python_version()}", *found])
    return f"mllama of {Path(mllama.__file__).parent}; {found}"


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_environment():
    """What commands run by a test leave in the environment does not reach the programs that later
    tests start.
    """
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def _same_schedules():
    """Emulated threads run in the same orders in every test, whichever tests ran before it."""
    if devices.is_emulated():
        emulated.set_options()
        emulated.take_counters()


@pytest.fixture(autouse=True, scope="module")
def _one_thread(request):
    """Tiny models do not pay for threads. Operators are tested with the machine's."""
    threads = torch.get_num_threads()
    if request.path.parent.name != "ops":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(bos, adds_bos, pad): `tiny.tokenizers.make`."""
    return tokenizers.make


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """family_folder(family): a folder of `tiny.folders.MAKERS`, written once."""

    @functools.cache
    def make(family: str) -> Path:
        return folders.write(family, tmp_path_factory.mktemp("family"))

    return make


@pytest.fixture(scope="session")
def model_folder(family_folder):
    """A model folder: ours, with its processor."""
    return family_folder("llava, siglip")


@pytest.fixture(scope="session")
def image_file(tmp_path_factory):
    """An image file: a red circle on white."""
    image = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(image).ellipse((10, 5, 40, 35), fill="red")
    path = tmp_path_factory.mktemp("images") / "circle.png"
    image.save(path)
    return path
