"""What the compiled code of a kernel says: tensor instructions, their share of the main loop, spills. Pure text.

Reads the listing of `nvdisasm -c` for one kernel. Loops are found in the graph of jumps, not by the order of addresses:
the compiler moves what is rarely run (a wait that spins) behind the end, and a jump back from there is no loop.
The path of threads that left their warp (`BRA.DIV`) is not followed, since whole warps never take it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

#: Kinds of tensor instruction: fields of an address in registers, of a warpgroup, of tensor memory.
MMA_SYNC, WGMMA, TCGEN05 = "mma.sync", "wgmma", "tcgen05"

_TENSOR: Final = re.compile(r"(?P<memory>UTC)?[BDHIOQ](?P<group>G)?MMA(?=\.|$)")
_LABEL: Final = re.compile(r"(\.L\w+):")
_INSTRUCTION: Final = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER: Final = re.compile(r"\bR(\d+)\b")
_WIDE: Final = re.compile(r"\.(64|128|256)(?=\.|$)")
#: A register that is written: the first operand of all but these, of jumps, and of compares to predicates.
_WRITTEN: Final = re.compile(r"R(\d+)\b")
_STORES: Final = frozenset(("ST", "STG", "STS", "STSM", "STL", "STAS", "RED", "REDG", "LDGSTS"))
_TARGET: Final = re.compile(r"`\(([^)]+)\)")

#: Kind of instruction -> the names that it has before the first dot; whatever is in none of them is INTEGER.
_KINDS: Final[dict[str, str]] = {
    "float": (
        "FADD FADD2 FFMA FFMA2 FFMA32I FMUL FMUL2 FMNMX FMNMX3 FSEL FSET FSETP FCHK FSWZADD "
        "HADD2 HFMA2 HMUL2 HMNMX2 HSET2 HSETP2 DADD DFMA DMUL DSETP"
    ),
    "special": "MUFU",
    "convert": "F2F F2FP F2I F2IP FRND I2F I2FP I2I I2IP",
    "global": "LD LDG LDGSTS ST STG RED REDG ATOM ATOMG UBLKCP UTMALDG UTMASTG",
    "shared": "LDS LDSM STS STSM STAS ATOMS LDTM STTM UTCCP",
    "spill": "LDL STL",
    "exchange": "SHFL VOTE VOTEU REDUX CREDUX MATCH",
    "sync": (
        "BAR DEPBAR LDGDEPBAR LDSDEPBAR ARRIVES SYNCS WARPSYNC WARPGROUP WARPGROUPSET MEMBAR FENCE ERRBAR CCTL UTCBAR "
        "UTMACMDFLUSH NANOSLEEP YIELD BMOV BSSY BSYNC ELECT"
    ),
    "control": "BRA BRX BRXU JMP JMX JMXU CALL RET EXIT KILL",
}
_KIND_OF: Final = {name: kind for kind, names in _KINDS.items() for name in names.split()}
#: Kinds of tensor instruction are one kind here; addresses, compares, moves and selections are INTEGER.
TENSOR, INTEGER = "tensor", "integer"
#: All kinds, in the order in which a table shows them.
KINDS: Final = (TENSOR, *_KINDS, INTEGER)


@dataclass(frozen=True)
class Loop:
    """The innermost loop with the most tensor instructions, in instructions of one warp.

    Attributes:
        instructions: how many one pass has, all branches counted.
        tensor: tensor instructions among them.
        spills: loads and stores of spilled registers among them.
    """

    instructions: int
    tensor: int
    spills: int


@dataclass(frozen=True)
class Body:
    """One innermost loop, whatever it does, in instructions of one warp.

    Attributes:
        kinds: kind of instruction (`KINDS`) -> how many one pass has; those with none are left out.
        barriers: barriers of the whole block among them.
        waits: whether it loads into registers from global memory what the same pass uses.
        ahead: whether it loads so what a later pass uses.
        copies: whether it copies from global to shared memory while it goes on.
        tensor: tensor instruction with its shape and types -> how many.
    """

    kinds: Mapping[str, int]
    barriers: int
    waits: bool
    copies: bool
    tensor: Mapping[str, int]
    ahead: bool = False

    @property
    def instructions(self) -> int:
        """How many one pass has."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Code:
    """What one kernel's instructions are.

    Attributes:
        instructions: how many the whole kernel has, without padding.
        tensor: tensor instruction with its shape and types -> how often it is in the kernel.
        spill_stores: stores to local memory, where registers that do not fit go.
        spill_loads: loads from there.
        loop: the main loop; None where no loop has a tensor instruction (the compiler may unroll it whole).
        bodies: the innermost loops in the order of their code, but for those that only wait.
        kinds: kind of instruction -> how often it is in the kernel.
    """

    instructions: int
    tensor: Mapping[str, int]
    spill_stores: int
    spill_loads: int
    loop: Loop | None
    bodies: tuple[Body, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)


def kind(opcode: str) -> str:
    """Return what an instruction does, one of `KINDS`."""
    if tensor_kind(opcode):
        return TENSOR
    return _KIND_OF.get(opcode.split(".")[0], INTEGER)


def tensor_kind(opcode: str) -> str:
    """Return which unit an opcode drives (`mma.sync`, `wgmma` or `tcgen05`), or nothing for any other instruction."""
    match = _TENSOR.match(opcode)
    if match is None:
        return ""
    return TCGEN05 if match["memory"] else WGMMA if match["group"] else MMA_SYNC


def read(listing: str) -> Code:
    """Return what a listing says.

    Args:
        listing: one kernel, as `nvdisasm -c` writes it.

    Raises:
        ValueError: it has no instruction, jumps to a label that it lacks, or to a computed address.
    """
    code = _Listing(listing)
    opcodes = code.opcodes
    tensor = [i for i, opcode in enumerate(opcodes) if tensor_kind(opcode)]
    stores = {i for i, opcode in enumerate(opcodes) if opcode.split(".")[0] == "STL"}
    loads = {i for i, opcode in enumerate(opcodes) if opcode.split(".")[0] == "LDL"}
    main: Loop | None = None
    for body in _innermost(code.successors, tensor):
        loop = Loop(len(body), len(body.intersection(tensor)), len(body & (stores | loads)))
        if main is None or (loop.tensor, loop.instructions) > (main.tensor, main.instructions):
            main = loop
    return Code(
        instructions=sum(opcode != "NOP" for opcode in opcodes),
        tensor=dict(sorted(Counter(opcodes[i] for i in tensor).items())),
        spill_stores=len(stores),
        spill_loads=len(loads),
        loop=main,
        bodies=tuple(_bodies(code)),
        kinds=_counted(opcode for opcode in opcodes if opcode != "NOP"),
    )


def _counted(opcodes: Iterable[str]) -> dict[str, int]:
    counts = Counter(map(kind, opcodes))
    return {name: counts[name] for name in KINDS if counts[name]}


def _bodies(code: _Listing) -> Iterator[Body]:
    """Yield the innermost loops by their first instruction; one that only waits for a barrier to turn is none."""
    bases = [opcode.split(".")[0] for opcode in code.opcodes]
    loops = [
        body
        for body in _loops(set(range(len(bases))), code.successors)
        if not {bases[i] for i in body} <= {"SYNCS", "BRA", "NANOSLEEP", "YIELD", "NOP"}
    ]
    for body in sorted((one for one in loops if not any(other < one for other in loops)), key=min):
        opcodes = [code.opcodes[i] for i in sorted(body) if code.opcodes[i] != "NOP"]
        used = [code.uses_in(i, body) for i in body if bases[i] in ("LD", "LDG")]
        yield Body(
            kinds=_counted(opcodes),
            barriers=sum(bases[i] == "BAR" for i in body),
            waits=any(used),
            ahead=not all(used),
            copies=any(bases[i] in ("LDGSTS", "UBLKCP", "UTMALDG") for i in body),
            tensor=dict(sorted(Counter(opcode for opcode in opcodes if tensor_kind(opcode)).items())),
        )


def to_json(code: Code) -> str:
    """Return `code` as one line."""
    return json.dumps(asdict(code))


def from_json(text: str) -> Code:
    """Undo `to_json`."""
    raw = json.loads(text)
    loop, bodies = raw["loop"] and Loop(**raw["loop"]), tuple(Body(**body) for body in raw["bodies"])
    return Code(**raw | {"loop": loop, "bodies": bodies})


class _Listing:
    """The instructions of a listing, and which may follow each."""

    def __init__(self, listing: str) -> None:
        self.opcodes: list[str] = []
        self._guarded: list[bool] = []
        self._operands: list[str] = []
        self._labels: dict[str, int] = {}
        for line in listing.splitlines():
            if match := _LABEL.match(line):
                self._labels[match[1]] = len(self.opcodes)
            elif match := _INSTRUCTION.match(line):
                self._guarded.append(match[1] is not None)
                self.opcodes.append(match[2])
                self._operands.append(match[3].strip())
        if not self.opcodes:
            raise ValueError("the listing has no instruction")
        count = len(self.opcodes)
        self.successors = [[to for to in self._next(i) if to < count] for i in range(count)]

    def _next(self, i: int) -> list[int]:
        """Return what may run after instruction `i`. A barrier's end (BSYNC) is placed where its threads go on."""
        base, _, kind = self.opcodes[i].partition(".")
        operands = self._operands[i]
        if base in ("EXIT", "RET", "KILL"):
            return [i + 1] if self._guarded[i] else []
        if base in ("BRX", "BRXU", "JMP", "JMX", "JMXU"):
            raise ValueError(f"{self.opcodes[i]} {operands}: a jump to a computed address, loops cannot be told")
        if base == "BRA" and kind != "DIV":
            always = not self._guarded[i] and operands.startswith("`")
            return [self._target(operands)] + ([] if always else [i + 1])
        if base == "CALL" and operands.startswith("`(.L"):  # a jump inside the kernel; others return
            return [self._target(operands), i + 1]
        return [i + 1]

    def uses_in(self, load: int, body: Collection[int]) -> bool:
        """Whether a later instruction of a loop's pass, in the order of addresses, reads what `load` gives.

        One that writes a register first ends its use, and one that moves it is none: compilers move what they carry to
        the next pass at the end of this one. How many registers an operand has is told by the load alone.
        """
        wide, first = _WIDE.search(self.opcodes[load]), _WRITTEN.match(self._operands[load])
        if first is None:
            return False
        live = {int(first[1]) + i for i in range(int(wide[1]) // 32 if wide else 1)}
        for i in sorted(one for one in body if one > load):
            opcode, operands = self.opcodes[i], self._operands[i]
            written = None if opcode.split(".")[0] in _STORES else _WRITTEN.match(operands)
            sources = _REGISTER.findall(operands[written.end() :] if written else operands)
            if live.intersection(map(int, sources)):
                if written is None or not opcode.startswith(("MOV", "IMAD.MOV")):
                    return True
                live.add(int(written[1]))
            elif written is not None:
                live.discard(int(written[1]))
        return False

    def _target(self, operands: str) -> int:
        match = _TARGET.search(operands)
        if match is None or match[1] not in self._labels:
            raise ValueError(f"a jump to {operands or 'nowhere'}, which the listing does not have")
        return self._labels[match[1]]


def _innermost(successors: list[list[int]], wanted: Collection[int]) -> list[set[int]]:
    """Return the bodies of all loops in which a wanted instruction is, and in no smaller one."""
    bodies = list(_loops(set(range(len(successors))), successors))
    innermost = []
    for i in wanted:
        body = min((one for one in bodies if i in one), key=len, default=None)
        if body is not None and body not in innermost:
            innermost.append(body)
    return innermost


def _loops(nodes: set[int], successors: list[list[int]]) -> Iterator[set[int]]:
    """Yield the body of each loop among `nodes`, outer ones first."""
    todo = [nodes]
    while todo:
        for body in _cycles(todo.pop(), successors):
            yield body
            entries = {to for i in range(len(successors)) if i not in body for to in successors[i] if to in body}
            todo.append(body - {min(entries or body)})  # without its head a loop holds the inner ones only


def _cycles(nodes: set[int], successors: list[list[int]]) -> list[set[int]]:
    """Return the strongly connected parts of a graph that have a cycle (Tarjan's algorithm, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    open_: set[int] = set()
    bodies = []
    for root in sorted(nodes):
        if root in order:
            continue
        path: list[tuple[int, Iterator[int]]] = [(root, iter(successors[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        open_.add(root)
        while path:
            at, following = path[-1]
            for to in following:
                if to in nodes and to not in order:
                    order[to] = low[to] = len(order)
                    stack.append(to)
                    open_.add(to)
                    path.append((to, iter(successors[to])))
                    break
                if to in open_:
                    low[at] = min(low[at], order[to])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[at])
                if low[at] == order[at]:
                    body = {stack.pop()}
                    while at not in body:
                        body.add(stack.pop())
                    open_ -= body
                    if len(body) > 1 or at in successors[at]:
                        bodies.append(body)
    return bodies
