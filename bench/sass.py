"""What a CUDA kernel costs, read from its machine code (SASS): registers, local memory, and the cost of its row loops.

No GPU is needed. ``kernels(fastppo/_C.so)`` takes the compiled kernels of every architecture out of the very library
that users get; NVIDIA's ``cuobjdump`` and ``nvdisasm`` (packages of the ``dev`` extra) print them, and this file reads
what they print.

How a row loop is found
    Instructions fall into basic blocks, these make a graph, and an edge back to a block that dominates its start is a
    loop (its *body*: all blocks that reach that edge without passing the header). A row loop is a loop in whose own
    blocks global memory is read or written, and inside of which no other loop does so. A loop over rows around a loop
    over a row is none; nor is a loop over partial sums in shared memory.

What one turn of it costs
    A body has more than one way through: rows that are not aligned are read one element at a time, a dtype or an
    estimator is chosen by a switch. A way counts when it goes from the header back to it with all global accesses 16
    bytes wide, a load if the loop has any, and a store if it has any. Blocks with narrower accesses, or that call a
    64-bit division, are left out where the rest still has such a way; a loop that then has none is *narrow*. Accesses
    `beside` are as good as wide ones: a mask of 8 bools is 8 bytes. Each instruction counts one issue slot, predicated
    or not. Three ways are of interest:
    dearest   the one with the most instructions (or operations of some kind) per byte moved
    quick     the one with the fewest instructions: rows begin on 16 bytes and no batch is done again, no optional
              argument is there. What loops over a vocabulary nearly always take
    shifted   of those that load the most, the one with the fewest instructions: rows that begin elsewhere (an odd
              vocabulary), whose vectors are put together from two loads. It does the quick way's work, so it is counted
              per byte of that

Operations are counted by the unit that runs them, because that is what has a rate:
    special   exponentials, reciprocals, and conversions between integers and floats: 16 per clock and multiprocessor
    integer   adds, logic, shifts, compares, selects, minima; floats' compares run there too: 64 per clock
    fma       float32 and packed float16 arithmetic, integer multiply-adds: 128 per clock (64 on an A100)
    double    float64
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

# --- NVIDIA's tools ---------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Return ``cuobjdump`` or ``nvdisasm``: of NVIDIA's package, which knows every architecture, else on PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for program in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(program)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is needed to read machine code: pip install nvidia-cuda-{name}")
    return found


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


# --- instructions -----------------------------------------------------------------------------------------------------

SPECIAL = {"MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO", "BREV"}
FMA = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2", "IMAD", "IDP", "FSWZADD"}
DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
# What takes an issue slot and none of the units above: memory, control, uniform registers and their like.
CONTROL = """
    BAR BMOV BRA BREAK BRX BRXU BSSY BSYNC CALL CCTL DEPBAR ELECT ERRBAR EXIT FENCE JMP JMX KILL LEPC MEMBAR NANOSLEEP
    NOP PREEXIT RET RPCMOV WARPSYNC YIELD ACQBULK CGAERRBAR UCGABAR_ARV UCGABAR_WAIT B2R R2B LDGDEPBAR SYNCS
    ENDCOLLECTIVE"""
OTHER = {
    *CONTROL.split(),
    "CS2R",
    "S2R",
    "S2UR",
    "R2UR",
    "VOTE",
    "VOTEU",
    "MATCH",
    "REDUX",
    "CREDUX",
    "SHFL",
    "LDC",
    "LDCU",
    "ULDC",
}
GLOBAL_LOADS, GLOBAL_STORES = {"LDG", "LDGSTS"}, {"STG"}
GLOBAL_ATOMICS = {"ATOM", "ATOMG", "RED", "REDG"}
GENERIC = {
    "LD",
    "ST",
}  # an address whose kind the compiler could not tell: as slow as global memory, so counted there
LOCAL = {"LDL", "STL"}
SHARED = {"LDS", "STS", "LDSM"}
MEMORY = GLOBAL_LOADS | GLOBAL_STORES | GLOBAL_ATOMICS | GENERIC | LOCAL | SHARED | {"ATOMS"}

# Accesses beside 16-byte ones that a row loop may have: (instruction, bytes).
Beside = frozenset[tuple[str, int]]
NOTHING: Beside = frozenset()
MASK: Beside = frozenset({("LDG", 8)})  # 8 bools


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    predicate: str  # "" or like "@!P0"
    opcode: str  # with its modifiers: "LDG.E.128.CONSTANT"
    operands: str

    @functools.cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @functools.cached_property
    def unit(self) -> str:
        name = self.name
        if name in SPECIAL:
            return "special"
        if name in DOUBLE:
            return "double"
        if name in FMA:
            return "fma"
        if name in OTHER or name in MEMORY or (name.startswith("U") and name != "UNDEF"):
            return "other"
        return "integer"

    @functools.cached_property
    def is_global(self) -> bool:
        return self.name in GLOBAL_LOADS | GLOBAL_STORES | GLOBAL_ATOMICS | GENERIC

    @functools.cached_property
    def width(self) -> int:
        """Bytes that one thread moves."""
        for modifier in reversed(self.opcode.split(".")):
            if modifier in WIDTHS:
                return WIDTHS[modifier]
        return 4

    @property
    def targets(self) -> list[str]:
        return re.findall(r"`\(([^)]+)\)", self.operands) or re.findall(r"\.L_x_\d+", self.operands)

    @property
    def is_conditional(self) -> bool:
        # A predicate in front, or among the operands as in "BRA.U !UP0, `(.L_x_1)".
        return bool(self.predicate) or bool(re.match(r"[!~]?U?[PR]", self.operands))


WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


# --- blocks and loops -------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Instructions that are run one after the other; `next` are places in the list of blocks."""

    instructions: list[Instruction]
    next: list[int] = field(default_factory=list)

    @functools.cached_property
    def accesses(self) -> list[Instruction]:
        return [one for one in self.instructions if one.is_global]

    @functools.cached_property
    def cost(self) -> Cost:
        return cost_of(self.instructions)

    @functools.cached_property
    def calls(self) -> bool:
        return any(one.name == "CALL" for one in self.instructions)

    def is_narrow(self, beside: Beside) -> bool:
        return any(one.width < 16 and (one.name, one.width) not in beside for one in self.accesses)


def blocks_of(lines: list[str]) -> tuple[list[Block], dict[str, int]]:
    """Return the basic blocks of one section, and which block each label names."""
    labels: dict[str, int] = {}
    blocks: list[Block] = [Block([])]

    def start() -> None:
        if blocks[-1].instructions:
            blocks.append(Block([]))

    for line in lines:
        match = LINE.match(line)
        if match:
            address, predicate, opcode, operands = match.groups()
            one = Instruction(int(address, 16), (predicate or "").strip(), opcode, operands)
            blocks[-1].instructions.append(one)
            if one.name in ("BRA", "BRX", "BRXU", "JMP", "JMX", "EXIT", "RET", "BSYNC", "CALL", "KILL"):
                start()
        elif label := re.match(r"([.$\w]+):\s*$", line.strip()):
            start()
            labels[label.group(1)] = len(blocks) - 1
    if not blocks[-1].instructions:
        labels = {name: place for name, place in labels.items() if place < len(blocks) - 1}
        blocks.pop()
    # Where threads that went apart meet again: BSSY names the place, BSYNC with the same register goes there.
    meetings: dict[str, set[int]] = {}
    for block in blocks:
        for one in block.instructions:
            if one.name == "BSSY":
                register = one.operands.partition(",")[0].strip()
                meetings.setdefault(register, set()).update(labels[t] for t in one.targets if t in labels)
    for place, block in enumerate(blocks):
        last = block.instructions[-1]
        following = [place + 1] if place + 1 < len(blocks) else []
        targets = [labels[target] for target in last.targets if target in labels]
        if last.name in ("EXIT", "RET", "KILL"):
            block.next = following if last.predicate else []
        elif last.name in ("BRA", "JMP", "BRX", "BRXU", "JMX"):
            block.next = targets + (following if last.is_conditional and last.name in ("BRA", "JMP") else [])
        elif last.name == "BSYNC":
            places = meetings.get(last.operands.strip(), set())
            block.next = following if not places or set(following) & places else sorted(places)
        else:
            block.next = following
    return blocks, labels


def dominators(blocks: list[Block], entry: int = 0) -> list[set[int]]:
    """Return, for each block, those that every way from the entry to it passes."""
    before: list[list[int]] = [[] for _ in blocks]
    for place, block in enumerate(blocks):
        for other in block.next:
            before[other].append(place)
    order = reachable(blocks, entry)
    result = [set(order) for _ in blocks]
    result[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for place in order:
            if place == entry:
                continue
            sets = [result[other] for other in before[place] if other in order]
            merged = set.intersection(*sets) | {place} if sets else {place}
            if merged != result[place]:
                result[place], changed = merged, True
    return result


def reachable(blocks: list[Block], entry: int) -> dict[int, None]:
    """Return the blocks that can be reached, in an order that has each before those it leads to, loops aside."""
    seen: set[int] = set()
    finished: list[int] = []
    stack = [(entry, iter(blocks[entry].next))]
    seen.add(entry)
    while stack:
        place, following = stack[-1]
        for other in following:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(blocks[other].next)))
                break
        else:
            finished.append(place)
            stack.pop()
    return dict.fromkeys(reversed(finished))


@dataclass(frozen=True)
class Cost:
    """Of one thread and one turn of a loop."""

    slots: float = 0
    special: float = 0
    integer: float = 0
    fma: float = 0
    double: float = 0
    loaded: float = 0
    stored: float = 0
    shared: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    @property
    def moved(self) -> float:
        """Bytes to and from global memory."""
        return self.loaded + self.stored

    def per_byte(self, unit: str) -> float:
        return getattr(self, unit) / self.moved


def cost_of(instructions: Iterable[Instruction]) -> Cost:
    counts = dict.fromkeys((f.name for f in fields(Cost)), 0)
    for one in instructions:
        counts["slots"] += 1
        if one.unit != "other":
            counts[one.unit] += 1
        if one.name in GLOBAL_LOADS or one.name == "LD":
            counts["loaded"] += one.width
        if one.name in GLOBAL_STORES or one.name == "ST":
            counts["stored"] += one.width
        if one.name in SHARED or one.name == "LDGSTS":
            counts["shared"] += one.width
    return Cost(**counts)


@dataclass
class Loop:
    """A row loop."""

    blocks: list[Block]  # of the whole section
    header: int
    body: set[int]
    latches: list[int]

    @property
    def first(self) -> int:
        return min(self.blocks[place].instructions[0].address for place in self.body)

    @property
    def last(self) -> int:
        return max(self.blocks[place].instructions[-1].address for place in self.body)

    @functools.cached_property
    def accesses(self) -> list[Instruction]:
        return [one for place in sorted(self.body) for one in self.blocks[place].accesses]

    @functools.cached_property
    def order(self) -> list[int]:
        """The body, each block before those it leads to."""
        return [place for place in reachable(self.blocks, self.header) if place in self.body]

    @functools.cached_property
    def known(self) -> dict[object, Any]:
        return {}

    def ways(self, beside: Beside = NOTHING) -> set[int]:
        """Return the blocks that count (see the top), or none where every way has narrow accesses."""
        if beside not in self.known:
            kept = {place for place in self.body if not self.blocks[place].is_narrow(beside)}
            calling = {place for place in kept if self.blocks[place].calls}
            choices = (
                allowed for allowed in (kept - calling, kept) if self.heaviest(allowed, lambda cost: 0)
            )
            self.known[beside] = next(choices, set())
        return self.known[beside]

    def is_vector(self, beside: Beside = NOTHING) -> bool:
        return bool(self.ways(beside))

    def dearest(self, unit: str = "slots", beside: Beside = NOTHING) -> Cost:
        """Return the cost of the way that takes the most of a unit per byte moved.

        An extreme of a ratio of two sums over a way: Dinkelbach's method, which asks again and again for the way with
        the largest sum of unit - ratio * bytes.
        """
        if (unit, beside) not in self.known:
            # Every byte weighs at first: the way that moves the most is as good a start as any.
            best, ratio = self.way(beside, lambda cost: cost.moved), 0.0

            def excess(cost: Cost) -> float:
                return getattr(cost, unit) - ratio * cost.moved

            while best.per_byte(unit) - ratio > 1e-9:
                ratio = best.per_byte(unit)
                best = self.way(beside, excess)
            self.known[unit, beside] = best
        return self.known[unit, beside]

    def quick(self, beside: Beside = NOTHING) -> Cost:
        return self.way(beside, lambda cost: -cost.slots)

    def shifted(self, beside: Beside = NOTHING) -> Cost:
        """What the way of unaligned rows takes, with the bytes of the quick one."""
        most = 1e6  # instructions to a byte
        found = self.way(beside, lambda cost: most * cost.loaded - cost.slots)
        quick = self.quick(beside)
        return replace(found, loaded=quick.loaded, stored=quick.stored)

    def in_flight(self, beside: Beside = NOTHING) -> int:
        """Return the bytes that a thread has asked for before it waits for any of them, in a turn of the quick way."""
        way = self.heaviest(self.ways(beside), lambda cost: -cost.slots)
        assert way is not None, "a narrow loop has no cost"
        return bytes_in_flight([one for place in way for one in self.blocks[place].instructions])

    def way(self, beside: Beside, weight: Callable[[Cost], float]) -> Cost:
        found = self.heaviest(self.ways(beside), weight)
        assert found is not None, "a narrow loop has no cost"
        return sum((self.blocks[place].cost for place in found), Cost())

    def heaviest(self, allowed: set[int], weight: Callable[[Cost], float]) -> list[int] | None:
        """Return the way around the loop with the largest sum of weights that counts.

        A way is known by where it is and by whether it has made a 16-byte load, and a store: where the loop has any, it
        must. Loops inside, which have no accesses of their own, are gone through once.
        """
        if self.header not in allowed:
            return None
        loads = any(one.name in GLOBAL_LOADS and one.width >= 16 for one in self.accesses)
        stores = any(one.name in GLOBAL_STORES for one in self.accesses)
        if not loads and not any(one.name in GLOBAL_STORES and one.width >= 16 for one in self.accesses):
            return None
        before: dict[int, list[int]] = {place: [] for place in allowed}
        for place in allowed:
            for other in self.blocks[place].next:
                if other in before and other not in (self.header, place):
                    before[other].append(place)
        # By block and what was met on the way: the sum, and where it came from.
        State = tuple[int, bool, bool]  # noqa: N806
        best: dict[State, tuple[float, State | None]] = {}
        for place in self.order:
            if place not in allowed:
                continue
            block = self.blocks[place]
            wide = any(one.name in GLOBAL_LOADS and one.width >= 16 for one in block.accesses)
            store = any(one.name in GLOBAL_STORES for one in block.accesses)
            own = weight(block.cost)
            if place == self.header:
                best[place, wide, store] = (own, None)
            for other in before[place]:
                for had_wide in (False, True):
                    for had_store in (False, True):
                        if (found := best.get((other, had_wide, had_store))) is None:
                            continue
                        state = (place, had_wide or wide, had_store or store)
                        if state not in best or best[state][0] < found[0] + own:
                            best[state] = (found[0] + own, (other, had_wide, had_store))
        ends = [s for s in best if s[0] in self.latches and s[1] >= loads and s[2] >= stores]
        if not ends:
            return None
        way: list[int] = []
        at: State | None = max(ends, key=lambda end: best[end][0])
        while at is not None:
            way.append(at[0])
            at = best[at][1]
        return way[::-1]


def bytes_in_flight(way: list[Instruction]) -> int:
    """Return the most bytes of 16-byte loads that are under way at once, where a use of one waits for it alone."""
    most = 0
    waiting: dict[int, int] = {}  # first register -> bytes
    for one in way * 2:  # the second turn sees what the first has left under way
        numbers = [int(n) for n in re.findall(r"\bR(\d+)", one.operands)]
        for register in [r for r, b in waiting.items() if any(r <= n < r + max(b // 4, 1) for n in numbers)]:
            del waiting[register]
        if one.name == "LDG" and one.width >= 16 and numbers:
            waiting[numbers[0]] = one.width
        most = max(most, sum(waiting.values()))
    return most


def loops_of(blocks: list[Block]) -> list[Loop]:
    """Return the row loops."""
    above = dominators(blocks)
    bodies: dict[int, tuple[set[int], list[int]]] = {}
    before: list[list[int]] = [[] for _ in blocks]
    live = reachable(blocks, 0)
    for place in live:
        for other in blocks[place].next:
            before[other].append(place)
    for place in live:
        for header in blocks[place].next:
            if header in above[place]:
                body, latches = bodies.setdefault(header, ({header}, []))
                latches.append(place)
                stack = [place]
                while stack:
                    one = stack.pop()
                    if one not in body:
                        body.add(one)
                        stack += before[one]

    def touches(places: set[int]) -> bool:
        return any(blocks[place].accesses for place in places)

    found = []
    for header, (body, latches) in sorted(bodies.items()):
        inner = [other for h, (other, _) in bodies.items() if h != header and h in body and other < body]
        own = body.difference(*inner)
        if touches(own) and not any(touches(other) for other in inner):
            found.append(Loop(blocks, header, body, latches))
    return found


# --- kernels ----------------------------------------------------------------------------------------------------------

BLOCK_SHARED = 1 << 10  # the system's own share of shared memory per block


@dataclass
class Kernel:
    """One kernel, compiled for one architecture."""

    arch: str  # "sm_90"
    symbol: str
    registers: int
    stack: int  # bytes of local memory: spills and arrays that are indexed at run time
    shared: int  # bytes, static
    threads: int  # of a block, from __launch_bounds__; 0: none given
    instructions: list[Instruction]
    blocks: list[Block]

    @functools.cached_property
    def demangled(self) -> str:
        import torch

        return torch._C._demangle(self.symbol)

    @functools.cached_property
    def name(self) -> str:
        """Name with template arguments: ``logprobs_kernel<__nv_bfloat16, 256>``."""
        text = self.demangled.removeprefix("void ")
        depth = 0
        for place, letter in enumerate(text):  # up to the list of parameters
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0 and not text.startswith("(anonymous", place):
                text = text[:place]
                break
        head, bracket, rest = text.partition("<")
        return head.rpartition("::")[2] + bracket + rest.replace("fastppo::cuda::", "")

    @property
    def base(self) -> str:
        return self.name.partition("<")[0]

    @functools.cached_property
    def loops(self) -> list[Loop]:
        return loops_of(self.blocks)

    def uses_local_memory(self) -> bool:
        return self.stack > 0 or any(one.name in LOCAL for one in self.instructions)


def kernels(library: Path, archs: Iterable[str] | None = None) -> list[Kernel]:
    """Return the kernels in a library, object or cubin, of the architectures asked for (default: all)."""
    library = Path(library).resolve()
    usage = resources(output_of([tool("cuobjdump"), "--dump-resource-usage", str(library)]))
    with tempfile.TemporaryDirectory() as folder:
        if library.suffix == ".cubin":
            cubins = [library]
        else:
            subprocess.run(
                [tool("cuobjdump"), "--extract-elf", "all", str(library)],
                cwd=folder,
                check=True,
                capture_output=True,
            )
            cubins = sorted(Path(folder).glob("*.cubin"))
        if archs is not None and library.suffix != ".cubin":
            cubins = [one for one in cubins if one.name.split(".")[-2] in archs]
        with ThreadPoolExecutor(max_workers=2) as pool:
            texts = list(pool.map(lambda one: output_of([tool("nvdisasm"), str(one)]), cubins))
    return [kernel for text in texts for kernel in parse(text, usage)]


def resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Read ``cuobjdump --dump-resource-usage``: by architecture and symbol."""
    found, arch, symbol = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.match(r" Function (\S+):$", line):
            symbol = match.group(1)
        elif symbol and "REG:" in line:
            found[arch, symbol] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            symbol = ""
    return found


def parse(text: str, usage: dict[tuple[str, str], dict[str, int]]) -> list[Kernel]:
    """Read what nvdisasm prints of one cubin."""
    match = re.search(r"\.target\s+(sm_\w+)", text)
    arch = match.group(1) if match else ""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("//---"):
            lines = sections.setdefault(line.strip("/- "), [])
        else:
            lines.append(line)
    found = []
    for name, lines in sections.items():
        if not name.startswith(".text."):
            continue
        symbol = name.removeprefix(".text.")
        # A cubin by itself says "sm_90" as its architecture in one version of the tool and nothing in another.
        facts = next((f for (a, s), f in usage.items() if s == symbol and a in (arch, "")), {})
        blocks, _ = blocks_of(lines)
        found.append(
            Kernel(
                arch=arch,
                symbol=symbol,
                registers=facts["REG"],
                stack=facts["STACK"] + facts["LOCAL"],
                # From 9.0 on, a size that is not 0 has the system's own share in it.
                shared=facts["SHARED"]
                - (BLOCK_SHARED if facts["SHARED"] >= BLOCK_SHARED and arch != "sm_80" else 0),
                threads=threads_of(sections.get(f".nv.info.{symbol}", [])),
                instructions=[one for block in blocks for one in block.instructions],
                blocks=blocks,
            )
        )
    return found


def threads_of(info: list[str]) -> int:
    """Read the product of EIATTR_MAX_THREADS: what __launch_bounds__ promised."""
    text = "\n".join(info)
    _, found, after = text.partition("EIATTR_MAX_THREADS")
    sizes = re.findall(r"\.word\s+0x([0-9a-f]+)", after)[:3] if found else []
    return math.prod(int(size, 16) for size in sizes) if sizes else 0


# --- how many blocks fit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has room for: CUDA programming guide, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536


# docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html
ROOM = {
    "sm_80": Multiprocessor(warps=64, blocks=32, shared=164 << 10),
    "sm_86": Multiprocessor(warps=48, blocks=16, shared=100 << 10),
    "sm_89": Multiprocessor(warps=48, blocks=24, shared=100 << 10),
    "sm_90": Multiprocessor(warps=64, blocks=32, shared=228 << 10),
    "sm_100": Multiprocessor(warps=64, blocks=32, shared=228 << 10),
    "sm_103": Multiprocessor(warps=64, blocks=32, shared=228 << 10),
    "sm_120": Multiprocessor(warps=48, blocks=24, shared=100 << 10),
}


def resident_blocks(
    room: Multiprocessor, threads: int, registers: int, static_shared: int, dynamic_shared: int = 0
) -> int:
    """Return how many blocks a multiprocessor holds at once; registers come in steps of 256 a warp, memory of 128."""
    warps = -(-threads // 32)
    by_registers = room.registers // (-(-registers * 32 // 256) * 256) // warps
    shared = -(-(static_shared + dynamic_shared) // 128) * 128 + BLOCK_SHARED
    return min(room.blocks, room.warps // warps, by_registers, room.shared // shared)


def occupancy(kernel: Kernel, dynamic_shared: int = 0) -> float:
    """Return the share of a multiprocessor's warps that can be resident; 0 where __launch_bounds__ says no size."""
    if kernel.threads == 0:
        return 0.0
    room = ROOM[kernel.arch.rstrip("af")]
    blocks = resident_blocks(room, kernel.threads, kernel.registers, kernel.shared, dynamic_shared)
    return blocks * -(-kernel.threads // 32) / room.warps


# --- a look ----------------------------------------------------------------------------------------------------------


UNITS = ("slots", "special", "integer", "fma", "double")


def describe(kernel: Kernel, beside: Beside = MASK) -> str:
    """Return a few lines on a kernel and its row loops, for a person."""
    lines = [
        f"{kernel.arch} {kernel.name}: {kernel.registers} registers, {kernel.stack} bytes of local memory, "
        f"{kernel.shared} of shared, {kernel.threads} threads, occupancy "
        f"{occupancy(kernel):.0%}, {len(kernel.instructions)} instructions"
    ]
    for loop in kernel.loops:
        place = f"  {loop.first:#06x}..{loop.last:#06x}"
        if not loop.is_vector(beside):
            widths = sorted({(one.name, one.width) for one in loop.accesses})
            lines.append(f"{place} narrow: " + ", ".join(f"{name} of {width}" for name, width in widths))
            continue
        quick = loop.quick(beside)
        ways = {
            "quick": dict.fromkeys(UNITS, quick),
            "shifted": {unit: loop.shifted(beside) for unit in UNITS},
            "dearest": {unit: loop.dearest(unit, beside) for unit in UNITS},
        }
        lines.append(
            f"{place} {quick.loaded:.0f} bytes in, {quick.stored:.0f} out, {loop.in_flight(beside)} in flight; "
            "per 2 bytes:"
        )
        for name, costs in ways.items():
            rates = ", ".join(f"{2 * cost.per_byte(unit):.2f} {unit}" for unit, cost in costs.items())
            lines.append(f"    {name:8} {rates}")
    return "\n".join(lines)


def main() -> None:
    """Print every kernel of the built library, or of the libraries, objects and cubins named."""
    import sys

    import torch  # noqa: F401  _C is linked to it

    from fastppo import _C

    files = [Path(argument) for argument in sys.argv[1:]] or [Path(_C.__file__)]
    for kernel in (kernel for file in files for kernel in kernels(file)):
        print(describe(kernel))


if __name__ == "__main__":
    main()
