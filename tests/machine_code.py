"""What nvcc made of the CUDA kernels in a compiled module: cuobjdump reads it, without a GPU."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)")


@dataclass
class Kernel:
    """One kernel's code for one architecture."""

    name: str  # with its template arguments: "rope<f16, 8>"
    architecture: int
    registers: int
    local_bytes: int  # of a thread: what does not fit its registers
    instructions: Counter = field(default_factory=Counter)  # by the first word: HMMA, LDGSTS ...

    def __str__(self) -> str:
        return f"{self.name} for sm_{self.architecture}"


def cuobjdump() -> str | None:
    """The program, which runs nvdisasm: of a CUDA toolkit, or PyPI's of these names."""
    installed = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")
    return shutil.which(
        "cuobjdump", path=os.pathsep.join([os.environ["PATH"], *map(str, installed)])
    )


def kernels(module: Path) -> list[Kernel]:
    """The kernels in a module, or in an object of one, for each architecture."""
    found = {}
    for key, line in _lines(module, "-res-usage"):
        if numbers := RESOURCES.search(line):
            registers, stack, local = map(int, numbers.groups())
            found[key] = Kernel(key[1], key[0], registers, stack + local)
    for key, line in _lines(module, "-sass"):
        if word := INSTRUCTION.match(line):
            found[key].instructions[word[1]] += 1
    for kernel, name in zip(found.values(), _names(symbol for _, symbol in found), strict=True):
        kernel.name = name
    return list(found.values())


def _lines(module: Path, option: str) -> Iterator[tuple[tuple[int, str], str]]:
    """What cuobjdump prints about functions: (architecture, symbol), line."""
    architecture, symbol = 0, ""
    command = [cuobjdump(), option, str(module)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.match(r"arch = sm_(\d+)", line):
                architecture = int(found[1])
            elif found := re.match(r"\s+Function(?: :)? (\w+)", line):
                symbol = found[1]
            else:
                yield (architecture, symbol), line
    assert process.returncode == 0, command


def _names(symbols: Iterable[str]) -> list[str]:
    """Names of the templates, without namespaces, results and parameters."""
    made = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return [
        re.sub(r"mllama::|cuda::|kernels::", "", line.removeprefix("void ").partition(">(")[0])
        + ">"
        for line in made.stdout.splitlines()
    ]
