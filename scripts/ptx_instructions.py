"""PTX instructions, one at a time, to C++ on the emulator, for ptx2cpp.py.

Semantics are those of the PTX manual; csrc/emulator/ptx.h has what does not fit one expression.
Only what mllama's kernels need has a rule: the rest is an error.
"""

import re
from collections.abc import Callable

SPECIAL = {"tid": "thread_index", "ntid": "block_size", "ctaid": "block_index"}
SPECIAL |= {"nctaid": "grid_size"}
BINARY = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "rem": "%", "mul": "*"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<"}
COMPARISONS |= {"ls": "<=", "hi": ">", "hs": ">="}
# True where an operand is NaN: the opposite comparison, negated.
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
# To an integer: to the nearest, to zero, down, up.
ROUNDINGS = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
SPACES = ("param", "shared", "global", "local")


def bits(type_: str) -> int:
    """How many the type has."""
    found = re.search(r"\d+", type_)
    assert found, type_
    return int(found[0])


def c_type(type_: str) -> str:
    """The C++ type of a PTX type."""
    if type_ == "pred":
        return "bool"
    if type_ in ("f32", "f64"):
        return {"f32": "float", "f64": "double"}[type_]
    return f"{'int' if type_[0] == 's' else 'uint'}{bits(type_)}_t"


def are_integers(*c_types: str) -> bool:
    """Whether values of the C++ types become each other's by a cast."""
    return all("int" in c for c in c_types)


def unsigned(type_: str) -> str:
    """The C++ type that wraps around."""
    return f"uint{bits(type_)}_t"


def split(text: str) -> list[str]:
    """Operands, with those in braces or brackets whole."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def listed(operand: str) -> list[str]:
    """The registers of {a, b, ...}, or the one register."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def name(register: str) -> str:
    """A C++ name."""
    return re.sub(r"[^\w]", "_", register.replace("%", "r_").replace("$", "l_"))


class Instructions:
    """The rules, with the names that one kernel has."""

    def __init__(self, symbol: str):
        self.symbol = symbol
        self.shared: dict[str, tuple[int, int]] = {}  # name -> bytes (0: dynamic), alignment
        self.local: dict[str, int] = {}  # name -> bytes
        self.registers: dict[str, str] = {}  # name -> C++ type
        self.parameters: list[str] = []

    # ---- operands

    def value(self, operand: str, type_: str) -> str:
        """An operand as a C++ value of the type."""
        c = c_type(type_)
        if operand.startswith("!"):
            return f"!{name(operand[1:])}"
        if special := re.fullmatch(r"%(n?tid|n?ctaid)\.([xyz])", operand):
            return f"{SPECIAL[special[1]]}.{special[2]}"
        if operand == "%laneid":
            return "lane_index()"
        if operand == "WARP_SZ":
            return "32"
        if operand in self.registers:
            return self._register(operand, c)
        if operand in self.parameters:
            return f"address_of(p{self.parameters.index(operand)})"
        if operand in self.local:
            return f"address_of({name(operand)})"
        if operand in self.shared:
            return f"{c}({list(self.shared).index(operand)}u << kVariableBits)"
        if number := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]{8,16})", operand):
            return f"as<{c}>(0x{number[1]}{'u' if c == 'float' else 'ull'})"
        if type_ == "pred":
            return "false" if operand == "0" else "true"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
            return f"{c}({operand}{'ull' if bits(type_) == 64 else ''})"
        raise SystemExit(f"{self.symbol}: no rule for the operand {operand}")

    def _register(self, register: str, c: str) -> str:
        """A register as a C++ value of the type c."""
        own = self.registers[register]
        if own == c:
            return name(register)
        return f"{c}({name(register)})" if are_integers(own, c) else f"as<{c}>({name(register)})"

    def set(self, register: str, type_: str, value: str) -> str:
        """A statement that gives a register a value of the type."""
        if register == "_":
            return f"(void)({value});"
        c, own = c_type(type_), self.registers[register]
        if own == c or (are_integers(own, c) and bits(own) == bits(c)):
            return f"{name(register)} = {value};"
        if are_integers(own, c):
            return f"{name(register)} = {c}({value});"
        return f"put({name(register)}, {c}({value}));"

    def address(self, operand: str, space: str) -> str:
        """A pointer to bytes, of [base + offset]."""
        base, _, offset = operand.strip("[]").partition("+")
        offset = offset or "0"
        if base in self.parameters:
            return f"pointer(address_of(p{self.parameters.index(base)}) + {offset})"
        if space == "shared":
            return f"shared({self.value(base, 'u32')} + uint32_t({offset}), variables)"
        return f"pointer({self.value(base, 'u64')} + int64_t({offset}))"

    # ---- instructions

    def statement(self, instruction: str) -> str:
        """One instruction in C++."""
        opcode, _, rest = instruction.partition(" ")
        words, operands = opcode.split("."), split(rest)
        rule: Callable | None = getattr(self, f"_{words[0]}", None)
        if rule is None and words[0] in BINARY:
            rule = self._binary
        if rule is None:
            raise SystemExit(f"{self.symbol}: no rule for {instruction}")
        return rule(words, operands, words[-1])

    def _access(self, words, memory: str, registers: str, type_: str, each: Callable) -> str:
        """The statements of `each` register, after a check of all."""
        space = next((word for word in words if word in SPACES), "")
        names = listed(registers)
        size = len(names) * bits(type_) // 8
        function = {"ld": "check_load", "st": "check_store"}[words[0]]
        check = "" if space == "param" else f"{function}(at, {size}); "
        return f"auto* at = {self.address(memory, space)}; {check}" + " ".join(
            each(register, i) for i, register in enumerate(names)
        )

    def _ld(self, words, o, t):
        def load(register, i):
            return self.set(register, t, f"fetch<{c_type(t)}>(at, {i})")

        return self._access(words, o[1], o[0], t, load)

    def _st(self, words, o, t):
        def store(register, i):
            return f"keep<{c_type(t)}>(at, {i}, {self.value(register, t)});"

        return self._access(words, o[0], o[1], t, store)

    def _mov(self, words, o, t):
        half = f"b{bits(t) // 2}" if t != "pred" else t
        if "{" in o[1]:
            low, high = (self.value(part, half) for part in listed(o[1]))
            return self.set(o[0], t, f"{low} | {unsigned(t)}({high}) << {bits(half)}")
        if "{" in o[0]:
            low, high = listed(o[0])
            whole = self.value(o[1], t)
            return self.set(low, half, whole) + self.set(high, half, f"{whole} >> {bits(half)}")
        return self.set(o[0], t, self.value(o[1], t))

    def _cvta(self, words, o, t):
        value = self.value(o[1], "u64")
        if "shared" in words:
            function = "shared_offset" if "to" in words else "address_of_shared"
            value = f"{function}({value}, variables)"
        return self.set(o[0], "u64", value)

    def _cvt(self, words, o, t):
        to, from_ = words[-2:]
        if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
            high, low = (self.value(part, "f32") for part in o[1:])
            half = f"bits_of_{to.removesuffix('x2')}"
            return self.set(o[0], "b32", f"{half}({low}) | uint32_t({half}({high})) << 16")
        if to in ("bf16", "f16"):
            return self.set(o[0], "b16", f"bits_of_{to}({self.value(o[1], 'f32')})")
        if from_ in ("bf16", "f16"):
            return self.set(o[0], "f32", f"from_{from_}({self.value(o[1], 'b16')})")
        value = self.value(o[1], from_)
        if "sat" in words:
            value = f"saturated({value})"
        for word in words:
            if word in ROUNDINGS:
                value = f"{ROUNDINGS[word]}({value})"
        if from_[0] == "f" and to[0] != "f":
            assert ROUNDINGS.keys() & set(words), words
            value = f"truncated<{c_type(to)}>({value})"
        return self.set(o[0], to, value)

    def _setp(self, words, o, t):
        a, b = self.value(o[1], t), self.value(o[2], t)
        if words[1] in UNORDERED:
            result = f"!({a} {UNORDERED[words[1]]} {b})"
        elif words[1] == "ne" and t[0] == "f":
            result = f"({a} < {b} || {a} > {b})"
        elif words[1] in ("num", "nan"):
            result = f"{'!' if words[1] == 'num' else ''}({a} != {a} || {b} != {b})"
        else:
            result = f"{a} {COMPARISONS[words[1]]} {b}"
        if len(o) > 3:
            result = f"({result}) {BINARY[words[2]]} {self.value(o[3], 'pred')}"
        return self.set(o[0], "pred", result)

    def _selp(self, words, o, t):
        chosen = f"{self.value(o[3], 'pred')} ? {self.value(o[1], t)} : {self.value(o[2], t)}"
        return self.set(o[0], t, chosen)

    def _binary(self, words, o, t):
        a, b, sign = self.value(o[1], t), self.value(o[2], t), BINARY[words[0]]
        if words[0] == "mul" and "wide" in words:
            wide = f"{t[0]}{2 * bits(t)}"
            return self.set(o[0], wide, f"{c_type(wide)}({a}) * {c_type(wide)}({b})")
        if words[0] == "mul" and "hi" in words:
            return self.set(o[0], t, f"high_product({a}, {b})")
        if t in ("pred", "f32", "f64") or sign in "%&|^":
            return self.set(o[0], t, f"{a} {sign} {b}")
        return self.set(o[0], t, f"{unsigned(t)}({a}) {sign} {unsigned(t)}({b})")

    def _shl(self, words, o, t):
        return self.set(o[0], t, f"shifted_left({self.value(o[1], t)}, {self.value(o[2], 'u32')})")

    def _shr(self, words, o, t):
        right = f"shifted_right({self.value(o[1], t)}, {self.value(o[2], 'u32')})"
        return self.set(o[0], t, right)

    def _div(self, words, o, t):
        return self.set(o[0], t, f"{self.value(o[1], t)} / {self.value(o[2], t)}")

    def _not(self, words, o, t):
        return self.set(o[0], t, f"{'!' if t == 'pred' else '~'}{self.value(o[1], t)}")

    def _neg(self, words, o, t):
        return self.set(o[0], t, f"-{self.value(o[1], t)}")

    def _copysign(self, words, o, t):
        return self.set(o[0], t, f"std::copysign({self.value(o[2], t)}, {self.value(o[1], t)})")

    def _abs(self, words, o, t):
        return self.set(o[0], t, f"std::abs({self.value(o[1], t)})")

    def _fma(self, words, o, t):
        function = "fma_down" if "rm" in words else "std::fma"
        return self.set(o[0], t, f"{function}({', '.join(self.value(v, t) for v in o[1:])})")

    def _mad(self, words, o, t):
        if "wide" in words:
            wide = f"{t[0]}{2 * bits(t)}"
            a, b, c = (
                f"{c_type(wide)}({self.value(v, kind)})"
                for v, kind in zip(o[1:], (t, t, wide), strict=True)
            )
            return self.set(o[0], wide, f"{a} * {b} + {c}")
        assert "lo" in words, words
        a, b, c = (f"{unsigned(t)}({self.value(v, t)})" for v in o[1:])
        return self.set(o[0], t, f"{a} * {b} + {c}")

    def _min(self, words, o, t):
        function = f"std::f{words[0]}" if t[0] == "f" else f"std::{words[0]}"
        return self.set(o[0], t, f"{function}({self.value(o[1], t)}, {self.value(o[2], t)})")

    _max = _min

    def _function(self, words, o, t):
        return self.set(o[0], t, f"ptx_{words[0]}({self.value(o[1], t)})")

    def _bits(self, words, o, t):
        kinds = [t] * (2 if words[0] in ("bfi", "prmt") else 1) + ["u32"] * 2
        arguments = ", ".join(self.value(v, kind) for v, kind in zip(o[1:], kinds, strict=False))
        return self.set(o[0], t, f"ptx_{words[0]}({arguments})")

    _bfi = _bfe = _prmt = _bits
    _ex2 = _lg2 = _rcp = _rsqrt = _sqrt = _function

    # ---- threads

    def _bar(self, words, o, t):
        if words[1] == "warp":
            return f"warp_barrier({self.value(o[0], 'u32')}, Where::current());"
        assert o == ["0"], o
        return "block_barrier(Reduction::none, 0, Where::current());"

    def _shfl(self, words, o, t):
        to, value, by, clamp, mask = o
        arguments = ", ".join(self.value(v, "u32") for v in (mask, value, by, clamp))
        return self.set(to.split("|")[0], t, f"shuffle_{words[2]}({arguments})")

    def _vote(self, words, o, t):
        predicate, mask = self.value(o[1], "pred"), self.value(o[2], "u32")
        return self.set(o[0], t, f"vote_{words[2]}({mask}, {predicate})")

    def _atom(self, words, o, t):
        operation = words[-2]
        change = {"add": "old + v", "max": "std::max(old, v)", "exch": "v"}[operation]
        c = c_type(t)
        return (
            f"auto* at = reinterpret_cast<{c}*>({self.address(o[1], 'global')}); "
            f"{c} v = {self.value(o[2], t)}; "
            + self.set(o[0], t, f"update(at, [=](auto old) {{ return {c}({change}); }})")
        )

    def _fence(self, words, o, t):
        return "fence();"

    _membar = _fence

    def _bra(self, words, o, t):
        return f"goto {name(o[0])};"

    def _ret(self, words, o, t):
        return "return;"

    def _trap(self, words, o, t):
        return 'stop("trap");'

    # ---- asynchronous copies and matrices

    def _cp(self, words, o, t):
        if "commit_group" in words:
            return "commit_copies();"
        if "wait_group" in words:
            return f"wait_for_copies({o[0]});"
        valid = self.value(o[3], "u32") if len(o) > 3 else o[2]
        return (
            f"copy_async({self.address(o[0], 'shared')}, {self.address(o[1], 'global')}, {o[2]}, "
            f"{valid});"
        )

    def _ldmatrix(self, words, o, t):
        names, transposed = listed(o[0]), str("trans" in words).lower()
        return (
            f"uint32_t m[4]; ldmatrix(m, {self.address(o[1], 'shared')}, {len(names)}, "
            f"{transposed}, Where::current()); "
            + " ".join(self.set(register, "b32", f"m[{i}]") for i, register in enumerate(names))
        )

    def _mma(self, words, o, t):
        d, a, b, c = map(listed, o)
        (shape,) = (word for word in words if word.startswith("m16n8k"))
        codes = words.count("s8") == 2
        kind, function = ("s32", "mma_codes") if codes else ("f32", "mma")
        assert {"row", "col"} <= set(words) and words.count(kind) == 2, words
        registers = [", ".join(self.value(register, "u32") for register in part) for part in (a, b)]
        sums = ", ".join(self.value(register, kind) for register in c)
        is_bf16 = str("bf16" in words).lower()
        return (
            f"{c_type(kind)} d[4] = {{{sums}}}; {function}(d, {{{{{registers[0]}}}, "
            f"{{{registers[1]}}}, {shape.removeprefix('m16n8k')}, {is_bf16}}}, Where::current()); "
            + " ".join(self.set(register, kind, f"d[{i}]") for i, register in enumerate(d))
        )

    def _dp4a(self, words, o, t):
        assert words.count("s32") == 2, words
        a, b, c = (self.value(operand, "s32") for operand in o[1:])
        return self.set(o[0], "s32", f"__dp4a({a}, {b}, {c})")
