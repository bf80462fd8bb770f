"""PTX, which nvcc makes of a kernel with its inline assembly, to C++ on the emulator.

python scripts/ptx2cpp.py KERNELS.ptx KERNELS.cpp [PATTERN]

Each entry whose name, with its template's arguments, has the regular expression PATTERN becomes a
function with the symbol of the kernel that it was made from, and a linker takes it instead of the
kernel's own template, which is a weak symbol.
"""

import re
import subprocess
import sys
from pathlib import Path

from ptx_instructions import Instructions, c_type, name, split

REGISTERS = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t"}
REGISTERS |= {"f16": "uint16_t", "f32": "float", "f64": "double"}
VARIABLE = re.compile(r"\.(shared|local) \.align (\d+) \.\w(\d+) (\S+?)(?:\[(\d+)\])?")
# Instructions that the emulator checks: errors name their lines in the source.
CHECKED = re.compile(r"(@\S+ )?(ld(?!\.param)|st|atom|bar|shfl|vote|mma|cp|trap)")
ENTRY = re.compile(r"\.entry (\S+)\(\s*(.*?)\)\s*(?:\.\w+ [\d, ]+\s*)*\{\n(.*?)\n\}\n", re.S)


def source_name(symbol: str) -> str:
    """The variable's name in its source: the last part of the mangled one."""
    for length in range(1, len(symbol)):
        if symbol[:-length].endswith(str(length)):
            return symbol[-length:]
    return symbol


class Entry(Instructions):
    """One kernel: its declarations and statements in C++."""

    def __init__(self, symbol: str, parameters: str, shared: dict[str, tuple[int, int]]):
        super().__init__(symbol)
        self.shared = dict(shared)
        self.statements: list[str] = []
        self.arguments: list[str] = []
        for i, declaration in enumerate(split(parameters)):
            words = declaration.split()
            array = re.fullmatch(r"(\S+)\[(\d+)\]", words[-1])
            self.parameters.append(array[1] if array else words[-1])
            kind = f"Bytes<{array[2]}>" if array else c_type(words[1][1:])
            self.arguments.append(f"{kind} p{i}")

    def declare(self, declaration: str) -> None:
        """Note registers, and variables in local and shared memory."""
        words = declaration.split(None, 2)
        if words[0] == ".reg":
            for part in split(words[2]):
                several = re.fullmatch(r"(%\w+)<(\d+)>", part)
                count = range(int(several[2])) if several else [""]
                for i in count:
                    register = f"{several[1]}{i}" if several else part
                    self.registers[register] = REGISTERS[words[1][1:]]
            return
        variable = VARIABLE.fullmatch(declaration)
        assert variable, declaration
        space, align, width, symbol, count = variable.groups()
        size = int(width) // 8 * int(count or 1)
        if space == "local":
            self.local[symbol] = size
        else:
            self.shared[symbol] = (size, int(align))

    def read(self, body: str, files: dict[str, str]) -> None:
        """Translate the statements of a body."""
        here = last = ""
        body = re.sub(r"^\s*(\.loc \d+ \d+ \d+).*$", r"\1;", body, flags=re.M)
        for part in re.split(r";|(?<=:)\s", body):
            text = " ".join(part.replace("\n", " ").split()).lstrip("{} ")
            text = text if text.count("}") == text.count("{") else text.rstrip("} ")
            if not text or text.startswith((".pragma", ".branchtargets")):
                continue
            if text.startswith(".loc "):
                file, line = text.split()[1:3]
                here = f'\n#line {line} "{files[file]}"\n'
            elif text.startswith("."):
                self.declare(text)
            elif text.endswith(":"):
                self.statements.append(f"{name(text[:-1])}:; ")
            else:
                if here != last and CHECKED.match(text):
                    self.statements.append(here)
                    last = here
                self.statements.append(self._guarded(text) + " ")

    def _guarded(self, text: str) -> str:
        guard = ""
        if text.startswith("@"):
            register, text = text[1:].split(None, 1)
            guard = f"if ({self.value(register, 'pred')}) "
        return f"{guard}{{ {self.statement(text)} }}"

    def code(self) -> str:
        """The function."""
        lines = [
            f'extern "C" __attribute__((visibility("hidden"))) void {self.symbol}('
            f"{', '.join(self.arguments)}) {{",
            "static const char places[kVariables] = {};",
            "[[maybe_unused]] unsigned char* variables[kVariables] = {",
        ]
        for i, (symbol, (size, align)) in enumerate(self.shared.items()):
            lines.append(
                f'shared_variable(&places[{i}], {size}, {align}, "{source_name(symbol)}"),'
            )
        lines.append("};")
        for symbol, size in self.local.items():
            lines.append(f"alignas(16) unsigned char {name(symbol)}[{size}];")
        for c in sorted(set(self.registers.values())):
            names = [name(register) for register, kind in self.registers.items() if kind == c]
            lines.append(f"{c} {', '.join(names)};")
        return "\n".join(lines) + "".join(self.statements) + "\n}\n"


def demangled(symbols: list[str]) -> list[str]:
    """The names, with their templates' arguments."""
    text = "\n".join(symbols)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def translate(ptx: str, pattern: str = "") -> str:
    """The C++ file of a PTX file's entries whose name has the regular expression."""
    ptx = re.sub(r"[ \t]+", " ", re.sub(r"//.*", "", ptx))
    files = dict(re.findall(r'^ ?\.file (\d+) "([^"]+)"', ptx, re.M))
    outside = ENTRY.sub("", ptx)
    dynamic = re.findall(r"\.extern \.shared \.align (\d+) \.b8 (\S+)\[\];", outside)
    shared = {symbol: (0, int(align)) for align, symbol in dynamic}
    for match in re.finditer(rf"^ ?{VARIABLE.pattern};", outside, re.M):
        _, align, width, symbol, count = match.groups()
        shared[symbol] = (int(width) // 8 * int(count or 1), int(align))
    functions, entries = [], ENTRY.findall(ptx)
    names = demangled([symbol for symbol, _, _ in entries])
    for full_name, (symbol, parameters, body) in zip(names, entries, strict=True):
        if not re.search(pattern, full_name):
            continue
        entry = Entry(symbol, parameters, shared)
        entry.read(body, files)
        functions.append(entry.code())
    head = '#include "emulator/ptx.h"\n\nusing namespace mllama::emulator;'
    return "\n".join([head, *functions])


if __name__ == "__main__":
    source, target, *pattern = sys.argv[1:]
    Path(target).write_text(translate(Path(source).read_text(), *pattern))
