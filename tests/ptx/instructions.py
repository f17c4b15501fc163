"""PTX as Triton writes it for sm_90: its text as instructions, and what each does to registers.

A register is a NumPy array over the lanes that run together: its bits, unsigned integers, or bool
for a predicate. An instruction becomes a function of these lanes (`machine.Lanes`), made once when
the kernel is read. What is not understood is a Fault then: nothing is skipped, nothing guessed.
"""

import functools
import re

import numpy as np


class Fault(Exception):  # noqa: N818, it is what GPUs call it
    """What a GPU would not do, or not do the same way every time, or what is not known here."""


BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPES = {
    "pred": np.dtype(bool),
    **{
        f"{name}{bits}": np.dtype(f"{kind}{bits // 8}")
        for name, kind in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
        for bits in BITS
        if f"{name}{bits}" != "f8"
    },
}
HALF = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}
"""Types of 16-bit floats, one or two in a register, and the bits they are kept as."""

_WIDTHS = {"p": 1, "rs": 16, "h": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}


def width_of(register):
    """Bits of a register, by its name; 1 for a predicate."""
    return _WIDTHS[re.match(r"%([a-z]+)\d+$", register).group(1)]


class Kernel:
    """An entry of PTX: its parameters in order, its instructions, and the registers it reads."""

    def __init__(self, ptx, shared):
        head, body = ptx[ptx.index(".entry") :].split("\n{\n", 1)
        body = body.split("\n}", 1)[0]
        self.name = re.match(r"\.entry\s+(\w+)", head).group(1)
        self.parameters = re.findall(r"\.param\s+\.\w+\s[^,\n]*?(\w+_param_\d+)", head)
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", head).group(1))
        self.shared = max(-(-shared // 16) * 16, 16)
        """Bytes of shared memory."""
        self.code = []
        labels, line = {}, 0
        for text in body.split("\n"):
            text = text.split("//")[0].strip().replace("shared::cta", "shared")
            if match := re.match(r"\.loc\s+\d+\s+(\d+)", text):
                line = int(match.group(1))
            elif text.endswith(":"):
                labels[text[:-1]] = len(self.code)
            elif text and not text.startswith("."):
                parts = filter(None, map(str.strip, text.split(";")))
                self.code += [Instruction(part, line) for part in parts]
        for instruction in self.code:
            if instruction.op == "bra":
                instruction.target = labels[instruction.arguments[0]]
        registers = re.compile(r"%[a-z]+\d+")
        written = {
            name
            for i in self.code
            if i.op not in ("st", "stmatrix", "bra") and i.arguments and not i.guard
            for name in registers.findall(i.arguments[0])
        }
        self.undefined = set(registers.findall(body)) - written
        """Registers that a lane may read without having written them: LLVM's undef."""

    def __repr__(self):
        return self.name


class Instruction:
    """One instruction: `@!guard op.modifiers.types arguments`."""

    def __init__(self, text, line):
        match = re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z]\w*)([\w.:]*)\s*(.*)$", text, re.S)
        if match is None:
            raise Fault(f"no instruction: {text}")
        negated, self.guard, self.op, suffixes, arguments = match.groups()
        self.text, self.line, self.negated = text, line, negated == "!"
        suffixes = suffixes.split(".")[1:]
        self.types = [s for s in suffixes if s in DTYPES or s in HALF]
        self.type = self.types[0] if self.types else None
        self.modifiers = [s for s in suffixes if s not in self.types]
        self.arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", arguments)
        self.target = None
        """Where a branch goes, in the kernel's code."""
        if self.op not in _BUILDERS:
            self.is_unknown()
        self.run = _BUILDERS[self.op](self)

    def __repr__(self):
        return f"`{self.text}` (line {self.line})"

    @property
    def is_seen_by_others(self):
        """Whether other threads may see when it runs."""
        memory = self.op in ("ld", "st", "atom", "red") and "param" not in self.modifiers
        return memory or self.op in ("ldmatrix", "stmatrix", "bar", "fence", "membar")

    @property
    def is_barrier(self):
        """Whether all threads of a CTA wait here for each other."""
        return self.op == "bar" and "warp" not in self.modifiers

    def allow(self, *modifiers):
        """Refuses modifiers that are not among these."""
        if not set(self.modifiers) <= set(modifiers):
            self.is_unknown()

    def is_unknown(self):
        raise Fault(f"unknown instruction {self}")


_BUILDERS = {}


def builds(*ops):
    """The decorated function makes what instructions of these names do to lanes."""

    def register(build):
        _BUILDERS.update(dict.fromkeys(ops, build))
        return build

    return register


def operand(text, type_):
    """A function of lanes that gives an operand's values, of a type of PTX."""
    type_ = HALF.get(type_, type_)
    dtype = DTYPES[type_]
    if re.match(r"%[a-z]+\d+$", text):
        if width_of(text) not in (1, 8 * dtype.itemsize):
            raise Fault(f"{text} is used as {type_}")
        return lambda lanes: lanes.read(text).view(dtype)
    if text.startswith("%"):
        return lambda lanes: lanes.special(text).astype(dtype)
    if text == "global_smem":
        number = dtype.type(0)
    elif match := re.match(r"0([fd])([0-9A-Fa-f]+)$", text):
        number = BITS[{"f": 32, "d": 64}[match.group(1)]](int(match.group(2), 16)).view(dtype)
    elif type_ == "pred":
        number = bool(int(text))
    else:
        bits = int(text.rstrip("U"), 0) & (1 << 8 * dtype.itemsize) - 1
        number = BITS[8 * dtype.itemsize](bits).view(dtype)
    return lambda lanes: lanes.full(number)


def address(text, type_):
    """A function of lanes that gives the addresses of an operand [base + offset]."""
    base, _, offset = text.strip("[] ").partition("+")
    base, offset = operand(base.strip(), type_), DTYPES[type_].type(int(offset or "0", 0))
    return lambda lanes: base(lanes) + offset if offset else base(lanes)


def names(text):
    """The registers of an operand, one or {several}."""
    return [name.strip() for name in text.strip("{} ").split(",")]


def computing(i, function, *types):
    """An instruction that writes a function of operands of these types to its first argument."""
    to, *sources = i.arguments
    sources = [operand(text, type_) for text, type_ in zip(sources, types, strict=True)]
    return lambda lanes: lanes.write(to, function(*(source(lanes) for source in sources)))


# Numbers of 16 bits


def widened(bits, type_):
    """16-bit floats as float64, two for each register of a type that ends in x2."""
    if type_.startswith("bf16"):
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def narrowed(values, type_):
    """Registers of 16-bit floats, rounded once, to nearest even, from float64."""
    values = np.asarray(values, np.float64)
    if type_.startswith("f16"):
        bits = values.astype(np.float16).view(np.uint16)
    else:
        # Whole multiples of the last of 8 digits, or of the smallest subnormal.
        exponent = np.maximum(np.frexp(values)[1] - 8, -133)
        values = np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        bits = np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    return np.ascontiguousarray(bits).view(BITS[32 if type_.endswith("x2") else 16]).reshape(-1)


# Arithmetic


def _quotient(a, b):
    if np.any(b == 0):
        raise Fault("division by zero")
    return (a - np.fmod(a, b)) // b


_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


_FLOAT32 = {"div": np.divide, "min": np.fmin, "max": np.fmax}
"""Of floats: of a number and NaN, the number is the greater and the smaller. div.full may be two
units of the last place off; here it is none."""


@builds(*_BINARY)
def _binary(i):
    function, type_ = _BINARY[i.op], i.type
    if "wide" in i.modifiers:
        return _wide(i)
    i.allow("lo", "rn", "full")
    floating = type_ in HALF or type_[0] == "f"
    if floating and i.op not in ("add", "sub", "mul"):
        if type_ != "f32" or i.op not in _FLOAT32:
            i.is_unknown()
        function = _FLOAT32[i.op]
    if type_ in HALF:

        def rounded(a, b):
            return narrowed(function(widened(a, type_), widened(b, type_)), type_)

        return computing(i, rounded, type_, type_)
    return computing(i, function, type_, type_)


@builds("mad")
def _wide(i):
    """mul.wide and mad.wide, and mad.lo: the product is in twice as many bits, or in as many."""
    i.allow("wide", "lo")
    wide = f"{i.type[0]}{2 * int(i.type[1:])}" if "wide" in i.modifiers else i.type
    dtype = DTYPES[wide]

    def product(a, b):
        return a.astype(dtype) * b.astype(dtype)

    if i.op == "mul":
        return computing(i, product, i.type, i.type)
    return computing(i, lambda a, b, c: product(a, b) + c, i.type, i.type, wide)


@builds("fma")
def _fma(i):
    i.allow("rn")
    if i.type == "f64":
        return computing(i, lambda a, b, c: a * b + c, "f64", "f64", "f64")
    if i.type != "f32":
        i.is_unknown()
    # The product is exact in float64, where the sum is rounded a first time.
    return computing(
        i,
        lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
        *("f32", "f32", "f32"),
    )


_UNARY = {"neg": np.negative, "not": np.invert, "abs": np.abs}


@builds(*_UNARY)
def _unary(i):
    i.allow()
    if i.type in HALF:
        i.is_unknown()
    return computing(i, _UNARY[i.op], i.type)


@builds("sqrt")
def _root(i):
    i.allow("rn")
    if i.type != "f32":
        i.is_unknown()
    return computing(i, np.sqrt, "f32")


@builds("shl", "shr")
def _shift(i):
    i.allow()
    dtype = DTYPES[i.type]
    bits = 8 * dtype.itemsize

    def shifted(value, by):
        if i.op == "shr" and dtype.kind == "i":
            return value >> np.minimum(by, bits - 1).astype(dtype)
        there = by < bits
        by = np.where(there, by, 0).astype(dtype)
        return np.where(there, value << by if i.op == "shl" else value >> by, dtype.type(0))

    return computing(i, shifted, i.type, "u32")


@builds("bfe")
def _bit_field(i):
    i.allow()
    first, count = int(i.arguments.pop(2), 0), int(i.arguments.pop(2), 0)
    if i.type not in ("u32", "s32") or count < 1 or first + count > 32:
        i.is_unknown()
    dtype = DTYPES[i.type]
    left, right = np.uint32(32 - first - count), dtype.type(32 - count)
    return computing(i, lambda value: (value << left).view(dtype) >> right, "u32")


@builds("prmt")
def _permute(i):
    i.allow()
    selector = int(i.arguments.pop().rstrip("U"), 0)
    chosen = [selector >> 4 * k & 15 for k in range(4)]
    if max(chosen) > 7:
        i.is_unknown()  # copies of a sign

    def permuted(a, b):
        chosen_bytes = np.stack([a, b], 1).view(np.uint8)[:, chosen]
        return np.ascontiguousarray(chosen_bytes).view(np.uint32).reshape(-1)

    return computing(i, permuted, "b32", "b32")


@builds("selp")
def _select(i):
    i.allow()
    return computing(i, lambda a, b, p: np.where(p, a, b), i.type, i.type, "pred")


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@builds("setp")
def _compare(i):
    """Writes a predicate, or two of a pair of 16-bit floats; `and`, `or`, `xor` with another."""
    to, first, second, *other = i.arguments
    comparison, *logic = i.modifiers
    first, second = operand(first, i.type), operand(second, i.type)
    other = [operand(text, "pred") for text in other]
    floating = i.type in HALF or i.type[0] == "f"
    pair = to.split("|")
    if len(logic) != len(other) or not set(logic) <= set(_LOGIC):
        i.is_unknown()
    if len(pair) != (2 if str(i.type).endswith("x2") else 1):
        i.is_unknown()

    def holds(a, b):
        if not floating:
            return _COMPARISONS[comparison](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if comparison in ("num", "nan"):
            return unordered if comparison == "nan" else ~unordered
        result = _COMPARISONS[comparison[:2]](a, b)
        return result | unordered if comparison.endswith("u") else result & ~unordered

    def compare(lanes):
        a, b = first(lanes), second(lanes)
        if i.type in HALF:
            a, b = widened(a, i.type), widened(b, i.type)
        result = holds(a, b)
        for function, predicate in zip(logic, other, strict=True):
            result = _LOGIC[function](result, predicate(lanes))
        for k, name in enumerate(pair):
            lanes.write(name, result[k :: len(pair)].copy())

    return compare


@builds("mov")
def _move(i):
    """Between registers, or {parts} and their whole."""
    i.allow()
    to, source = i.arguments
    dtype = DTYPES[HALF.get(i.type, i.type)]
    if to.startswith("{"):
        parts, whole = names(to), operand(source, i.type)
        part = BITS[8 * dtype.itemsize // len(parts)]

        def split(lanes):
            values = whole(lanes).view(part).reshape(-1, len(parts))
            for k, name in enumerate(parts):
                if name != "_":
                    lanes.write(name, values[:, k].copy())

        return split
    if source.startswith("{"):
        parts = names(source)
        parts = [operand(text, f"b{8 * dtype.itemsize // len(parts)}") for text in parts]
        return lambda lanes: lanes.write(
            to, np.stack([part(lanes) for part in parts], 1).view(dtype).reshape(-1)
        )
    return computing(i, np.copy, i.type)


@builds("cvt")
def _convert(i):
    i.allow("rn")
    to, source = i.types
    if to in HALF:
        if source != "f32":
            i.is_unknown()
        if to.endswith("x2"):  # the first operand is the upper half
            return computing(i, lambda a, b: narrowed(np.stack([b, a], 1), to), "f32", "f32")
        return computing(i, lambda a: narrowed(a, to), "f32")
    if source in HALF:
        return computing(i, lambda a: widened(a, source).astype(DTYPES[to]), source)
    if source[0] == "f" and to[0] != "f":
        i.is_unknown()  # whole numbers of others
    return computing(i, lambda a: a.astype(DTYPES[to]), source)


@builds("shfl")
def _shuffle(i):
    """Lanes of a warp read each other's registers."""
    how = i.modifiers[1]
    if i.modifiers not in (["sync", "bfly"], ["sync", "idx"]) or i.arguments[3:] != ["31", "-1"]:
        i.is_unknown()
    del i.arguments[3:]
    lane = np.arange(32)

    def shuffled(value, by):
        by = by.reshape(-1, 32).astype(np.int64)
        other = lane ^ by if how == "bfly" else by % 32
        return np.take_along_axis(value.reshape(-1, 32), other, 1).reshape(-1)

    return computing(i, shuffled, "b32", "u32")


# Memory


@builds("ld", "st")
def _access(i):
    i.allow("global", "shared", "param", "v2", "v4", "nc")
    space = next((m for m in i.modifiers if m in ("global", "shared", "param")), None)
    if i.op == "ld" and space == "param":
        return _parameter(i)
    loads, width = i.op == "ld", DTYPES[i.type].itemsize
    registers, where = i.arguments if loads else reversed(i.arguments)
    registers = names(registers)
    vector = next((int(m[1:]) for m in i.modifiers if m in ("v2", "v4")), 1)
    if space not in ("global", "shared") or len(registers) != vector:
        i.is_unknown()
    at = address(where, "u64" if space == "global" else "u32")
    values = [] if loads else [operand(name, f"b{8 * width}") for name in registers]

    def access(lanes):
        memory = lanes.memory if space == "global" else lanes.shared
        if not loads:
            memory.store(lanes, at(lanes), width, [value(lanes) for value in values], i)
            return
        for name, value in zip(
            registers, memory.load(lanes, at(lanes), width, vector, i), strict=True
        ):
            lanes.write(name, value)

    return access


def _parameter(i):
    to, name = i.arguments
    name, dtype = name.strip("[] "), DTYPES[i.type]
    wide = np.dtype(f"{dtype.kind}{width_of(to) // 8}")  # a load extends to the register

    def load(lanes):
        bits = lanes.launch.parameters[name].tobytes()
        lanes.write(to, lanes.full(np.frombuffer(bits, dtype, 1)[0].astype(wide)))

    return load


_ORDERS = ("relaxed", "acquire", "release", "acq_rel")


@builds("atom", "red")
def _atomic_add(i):
    i.allow("global", "gpu", "add", *_ORDERS)
    if not {"global", "add"} <= set(i.modifiers) or i.type in HALF:
        i.is_unknown()
    order = next((m for m in i.modifiers if m in _ORDERS), "relaxed")
    to = i.arguments[0] if i.op == "atom" else None
    at, value = address(i.arguments[-2], "u64"), operand(i.arguments[-1], i.type)

    def add(lanes):
        before = lanes.memory.add(lanes, at(lanes), value(lanes), order, i)
        if to:
            lanes.write(to, before)

    return add


@builds("ldmatrix", "stmatrix")
def _matrix(i):
    """Matrices of 8 x 8 elements of 16 bits: lane 8 k + r has the address of row r of matrix k.

    Lane l holds two neighbours of row l // 4 or, transposed, of column l // 4.
    """
    if i.modifiers[:3] != ["sync", "aligned", "m8n8"]:
        i.is_unknown()
    loads, transposed = i.op == "ldmatrix", "trans" in i.modifiers
    registers, where = i.arguments if loads else reversed(i.arguments)
    registers, at = names(registers), address(where, "u32")
    values = [] if loads else [operand(name, "b32") for name in registers]
    lane = np.arange(32)

    def matrix(lanes):
        rows = at(lanes).reshape(-1, 32)
        for k, name in enumerate(registers):
            halves = []
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                if transposed:
                    row, column = column, row
                places = rows[:, 8 * k + row] + (2 * column).astype(np.uint32)
                halves.append(places.reshape(-1))
            if loads:
                parts = [lanes.shared.load(lanes, place, 2, 1, i)[0] for place in halves]
                lanes.write(name, np.stack(parts, 1).view(np.uint32).reshape(-1))
            else:
                pairs = values[k](lanes).view(np.uint16).reshape(-1, 2)
                for half, place in enumerate(halves):
                    lanes.shared.store(lanes, place, 2, [pairs[:, half]], i)

    return matrix


@builds("bra", "ret", "bar", "fence", "membar")
def _control(i):
    """What machine.py does by itself."""
    if i.op == "ret" and i.guard:
        i.is_unknown()
    barriers = (["sync"], ["0"]), (["warp", "sync"], ["-1"])
    if i.op == "bar" and (i.modifiers, i.arguments) not in barriers:
        i.is_unknown()


@functools.lru_cache(maxsize=1024)
def kernel_of(ptx, shared):
    """The kernel of a text of PTX, with bytes of shared memory."""
    return Kernel(ptx, shared)
