"""Two processes under torchrun: adapters and models of wrapped and sharded models, and training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from training import two_processes

pytest.importorskip("peft")
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("run")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        TESTS / "training/two_processes.py",
        folder,
    ]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_adapters_and_models_of_wrapped_models(results):
    folder, found = results
    for each in found:
        values = each["adapters"] | each["whole models"]
        assert (
            len(values) == 5 * 3 + 4 * 2 + 1
            and [name for name, equal in values.items() if not equal] == []
        )


@pytest.mark.parametrize("kind", two_processes.KINDS)
def test_two_processes_learn_what_one_does_of_all_rows(kind, results, tmp_path):
    folder, (first, second) = results
    expected = two_processes.losses(kind, tmp_path, 4)
    assert first["trained"][kind] == second["trained"][kind] == pytest.approx(expected, rel=1e-4)
    written = {path.name for path in (folder / f"trained {kind}/checkpoint-2").iterdir()}
    assert ("adapter_config.json" in written) is (kind != "full") and (
        "config.json" in written
    ) is (kind == "full")
