"""`make test-gpu`: every test that needs a GPU, within ten minutes, and one summary.

The operators' tests on their CUDA kernels, how kernels are launched, tiny models, and
compute-sanitizer on a call of each kernel. It needs mllama with CUDA kernels and a CUDA build of
torch, and exits with 1 if there is none, or no GPU, or anything fails. What is skipped is listed.
"""

import argparse
import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Beside the operators' tests: what makes its tensors on `devices.tensor_device()`.
OTHERS = (
    "tests/cuda",
    "tests/nn/test_offload.py",
    "tests/runtime/test_decode_graph.py",
    "tests/training/test_amp.py",
)
EVERY_KERNEL = "tests/cuda/test_every_kernel.py"
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
# Of our kernels' mangled names. initcheck gets no filter: what it does not see written is
# uninitialized to it.
OURS = ("--kernel-regex", "kns=6mllama", "--error-exitcode", "1")
TOOLS = {"memcheck": OURS, "racecheck": OURS, "initcheck": ()}


@dataclass
class Outcome:
    """Of one step.

    Attributes:
        status: PASSED, FAILED or SKIPPED.
        detail: in a line.
        skipped: reasons, and how many tests each kept from running.
    """

    status: str
    detail: str
    skipped: Counter[str] = field(default_factory=Counter)


Step = tuple[str, float, Callable[[float], Outcome]]  # name, most seconds, what runs in them


def main(argv: list[str] | None = None) -> int:
    """Run the steps, print the summary; return the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for everything (default: 10)")
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help="test processes on the GPU")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes must be above 0 and finite, got {arguments.minutes}")
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    if reason := why_not():
        print(f"make test-gpu: {reason}. Nothing was tested.", file=sys.stderr)
        return 1
    print("\n".join(facts()), flush=True)
    end, found = time.monotonic() + 60 * arguments.minutes, []
    for name, seconds, run in steps(arguments.workers):
        start = time.monotonic()
        left = min(seconds, end - start)
        print(f"\n== {name}", flush=True)
        outcome = run(left) if left > 5 else Outcome(FAILED, "not run: no time was left")
        found.append((name, time.monotonic() - start, outcome))
    print("\n" + "\n".join(summary(found)))
    return int(any(outcome.status == FAILED for _, _, outcome in found))


def why_not() -> str | None:
    """Why nothing can be tested here; None if it can."""
    import torch

    from mllama import _ext

    if not torch.cuda.is_available():
        return f"there is no GPU: torch {torch.__version__} finds no CUDA device"
    try:
        module = _ext.load()
    except _ext.OpsUnavailable as error:
        return str(error)
    if module is None:
        return "MLLAMA_DISABLE_OPS=1 disables the kernels"
    if not module.build_info()["cuda_operators"]:
        return "mllama was built without CUDA kernels (MLLAMA_CUDA=ON builds them; it needs nvcc)"
    return None


def facts() -> Iterator[str]:
    """What the results are of."""
    import torch

    from mllama import _ext

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}"
    built = _ext.load().build_info()
    yield f"torch {torch.__version__}; kernels of CUDA {built['cuda_toolkit']}"


def steps(workers: int) -> Iterator[Step]:
    """All steps, in the order in which time is given to them."""
    options = ["--device=cuda", *(["-n", str(workers)] if workers > 1 else [])]
    others = [*options, *OTHERS]
    yield "kernels' launches and tiny models", 180, lambda left: run_tests(others, left)
    yield "operators", 300, lambda left: run_tests([*options, "tests/ops"], left)
    for tool in TOOLS:
        yield tool, 150, lambda left, tool=tool: sanitize(tool, left)


def run_tests(arguments: list[str], seconds: float) -> Outcome:
    """Run pytest, which prints its failures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        code, _ = run([*command, f"--junitxml={report}"], seconds)
        if code is None:
            return Outcome(FAILED, f"did not end in {seconds:.0f} s")
        with contextlib.suppress(OSError, ElementTree.ParseError):
            return read_report(report, code)
    return Outcome(FAILED, f"pytest ended with {code}")


def read_report(report: Path, code: int) -> Outcome:
    """The outcome that pytest's JUnit file tells."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failed, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "skipped"))
    failed += int(suite.get("errors", 0))
    reasons = Counter(one.get("message") or "no reason" for one in suite.iter("skipped"))
    detail = f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"
    passed = code == 0 and total > skipped
    return Outcome(PASSED if passed else FAILED, detail, reasons)


def sanitize(tool: str, seconds: float) -> Outcome:
    """Run a tool of compute-sanitizer on a call of each kernel."""
    if (program := find_sanitizer()) is None:
        return Outcome(SKIPPED, "there is no compute-sanitizer (it comes with the CUDA toolkit)")
    tests = [sys.executable, "-m", "pytest", "-q", "--device=cuda", EVERY_KERNEL]
    options = ["--tool", tool, "--report-api-errors", "no", *TOOLS[tool]]
    # Each tensor has an allocation of its own, with bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, output = run([program, *options, *tests], seconds, environment)
    return read_sanitizer(output, code, seconds)


def read_sanitizer(output: str, code: int | None, seconds: float) -> Outcome:
    """The outcome that compute-sanitizer's and pytest's output tell."""
    if "Device not supported" in output:
        return Outcome(SKIPPED, "compute-sanitizer does not support this device or its driver")
    if code is None:
        return Outcome(FAILED, f"did not end in {seconds:.0f} s")
    ours = len(re.findall(r"^=+(?!=| +Host Frame).*mllama::", output, re.M))
    said = re.search(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output, re.M)
    passed = re.search(r"\b(\d+) passed", output)
    detail = f"{said[1] if said else 'no summary'}; {ours} lines name our kernels"
    if passed:
        detail += f"; {passed[1]} tests passed"
    good = code == 0 and said and passed and not ours
    return Outcome(PASSED if good else FAILED, detail)


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    places = [f"{folder}/{sub}" for folder in folders for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *places]))


def run(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit code (None: it took too long and was stopped) and output, which is printed too."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children end with it
        )
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where Ctrl-C ends this process
            if process.returncode is None:
                os.killpg(process.pid, 9)
                process.wait()
        output.seek(0)
        text = output.read()
    lines = text.splitlines()
    print("\n".join(lines if len(lines) < 200 else [*lines[:100], "...", *lines[-100:]]))
    return code, text


def summary(found: list[tuple[str, float, Outcome]]) -> Iterator[str]:
    """A line for each step, then what was skipped and why."""
    width = max(len(name) for name, _, _ in found)
    for name, seconds, outcome in found:
        yield f"{name:{width}}  {outcome.status}  {seconds:4.0f} s  {outcome.detail}"
    for name, _, outcome in found:
        for reason, count in outcome.skipped.most_common():
            yield f"skipped in {name}: {count} x {reason}"


if __name__ == "__main__":
    sys.exit(main())
