"""What tests of runs share."""

import gc
import importlib

import pytest
from torch import distributed

from training.runs import settings_of, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(model_folder, data, tmp_path):
    return settings_of(model_folder, data, tmp_path / "run")


@pytest.fixture(scope="module")
def forking():
    """For `training.runs.start_two`: forked processes inherit what is slow to import, and need not
    look at the objects of this one.
    """
    if not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    for slow in ("torch.distributed.checkpoint", "torch.distributed.fsdp", "matplotlib.pyplot"):
        importlib.import_module(slow)
    gc.freeze()
    yield
    gc.unfreeze()
