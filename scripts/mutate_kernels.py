"""Mutation test of the CUDA kernels: whether the tests that run on the CPU notice mistakes.

python scripts/mutate_kernels.py [KERNEL ...]

Each mutant of kernel_mutants.py is one changed kernel, linked with what build/emulated has of the
others, and run on its operator's tests. It is caught if a test fails: because the emulator's
checker names the mistake, values are wrong, the process ends, or the tests do not. Without a change
the same tests must pass. Exits with 1 unless all are built and 9 of 10 caught.
"""

import argparse
import collections
import importlib
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernel_mutants import MUTANTS, SOURCES, Mutant

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build/emulated"
LIBRARY = "libmllama_emulated.so"
SECONDS = 900  # after which tests are stopped; each operator's take less than a tenth of it
# The most important of what a kernel's tests are; -x ends them with the first failure.
_ATTENTION = ("tests/cuda/test_attention_variants.py", "tests/ops/test_attention.py")
TESTS = {
    "attention": ("tests/cuda/test_decode.py", *_ATTENTION),
    "attention_backward": _ATTENTION,
    "packed_linear": (
        "tests/cuda/test_packed_linear.py",
        "tests/ops/test_packed_linear.py",
        "tests/ops/test_packed_gguf.py",
    ),
    "select_token": ("tests/cuda/test_select_token.py", "tests/ops/test_select_token.py"),
    "decode": ("tests/cuda/test_decode.py",),
}
CHECKER = re.compile(r"\(order \w+, copies \w+, seed \d+\)|were never written|impossible size")


def tests_of(kernel: str) -> tuple[str, ...]:
    return TESTS.get(kernel, (f"tests/ops/test_{kernel}.py",))


class Build:
    """The commands that made build/emulated, repeated for one kernel from another source."""

    def __init__(self) -> None:
        if not (BUILD / "build.ninja").exists():
            sys.exit(f"{BUILD} is not configured: run make test-mutations")
        ninja = [str(Path(sys.executable).parent / "ninja"), "-C", str(BUILD)]
        subprocess.run([*ninja, "mllama_emulated"], check=True, stdout=subprocess.DEVNULL)
        listed = [*ninja, "-t", "commands", "mllama_emulated"]
        done = subprocess.run(listed, check=True, capture_output=True, text=True)
        commands = [shlex.split(line) for line in done.stdout.splitlines()]
        self.compile = {Path(c[-1]).stem: c for c in commands if c[-1].endswith(".cu")}
        (self.link,) = (c for c in commands if LIBRARY in c)

    def library(self, mutant: Mutant, folder: Path) -> Path:
        """The library with the mutant, in a folder that is found before the sources."""
        changed = folder / "kernels/cuda" / mutant.file
        changed.parent.mkdir(parents=True)
        changed.write_text(mutant.text())
        command = list(self.compile[mutant.kernel])
        unchanged, made = command[command.index("-o") + 1], str(folder / "kernel.o")
        del command[command.index("-MD") :]
        source = changed if changed.suffix == ".cu" else SOURCES / f"{mutant.kernel}.cu"
        self._run([*command, "-w", "-iquote", str(folder), "-o", made, "-c", str(source)])
        # In the first one's place: of inline functions that several objects have, the linker
        # takes the first.
        link = self.link[self.link.index("&&") + 1 : -2]
        link.remove(unchanged)
        link.insert(next(i for i, word in enumerate(link) if word.endswith(".cu.o")), made)
        library = folder / LIBRARY
        link[link.index(LIBRARY)] = str(library)
        self._run(link)
        return library

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, cwd=BUILD, check=True)


def how_caught(kernel: str, library: Path) -> str | None:
    """checker, values, crash or endless; None if all tests pass."""
    with tempfile.NamedTemporaryFile("r") as output:
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--library={library}"]
        arguments = (["--device=emulated", *options, *tests_of(kernel)], output.name)
        process = multiprocessing.get_context("fork").Process(target=_run_pytest, args=arguments)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            return "endless"
        text = output.read()
    if process.exitcode == 0:
        return None
    if process.exitcode < 0:
        return "crash"
    if process.exitcode != 1:  # pytest itself has failed
        raise RuntimeError(text)
    failures = [line for line in text.splitlines() if line.startswith("E ")]
    return "checker" if any(map(CHECKER.search, failures)) else "values"


def _run_pytest(arguments: list[str], output: str) -> None:
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os._exit(pytest.main(arguments))


def load_what_tests_import() -> None:
    """Once, before processes are forked: it takes most of a test's time."""
    os.environ["OMP_WAIT_POLICY"] = "passive"  # as tests/conftest.py, before torch is there
    for module in ("torch._dynamo", "transformers.models.gemma.modeling_gemma"):
        importlib.import_module(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kernels = list(dict.fromkeys(mutant.kernel for mutant in MUTANTS))
    parser.add_argument("kernels", nargs="*", choices=[*kernels, []], metavar="KERNEL")
    chosen = parser.parse_args().kernels or kernels
    build = Build()
    load_what_tests_import()
    for tests in dict.fromkeys(map(tests_of, chosen)):
        kernel = next(kernel for kernel in chosen if tests_of(kernel) == tests)
        if how := how_caught(kernel, BUILD / LIBRARY):
            sys.exit(f"{', '.join(tests)} fail without a mutant ({how})")
    counts: dict[str, collections.Counter] = {kernel: collections.Counter() for kernel in chosen}
    for mutant in MUTANTS:
        if mutant.kernel not in chosen:
            continue
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            try:
                library = build.library(mutant, Path(folder))
                how = how_caught(mutant.kernel, library) or "SURVIVED"
            except subprocess.CalledProcessError:
                how = "NOT BUILT"
        counts[mutant.kernel][how] += 1
        print(f"{how:9} {mutant.kernel}, {mutant.file}: {mutant.mistake}", flush=True)
    report(counts)


def report(counts: dict[str, collections.Counter]) -> None:
    ways = ("checker", "values", "crash", "endless", "SURVIVED", "NOT BUILT")
    total: collections.Counter = sum(counts.values(), collections.Counter())
    print("| kernel | mutants |", " | ".join(ways), "|")
    for kernel, found in (*counts.items(), ("all", total)):
        print(f"| {kernel} | {found.total()} |", " | ".join(str(found[way]) for way in ways), "|")
    if total["NOT BUILT"] or total["SURVIVED"] > total.total() / 10:
        sys.exit(1)


if __name__ == "__main__":
    main()
