"""PTX text to a list of instructions: the subset that Triton's NVPTX back end prints for one kernel.

A program is the body of the only `.entry`, its statements in order, each with the line of the PTX file and the Triton
source line of the last `.loc` before it. Inline assembly needs no case of its own: its `{ ... }` is a scope, and the
registers declared inside are renamed so that two copies of a block do not share them.

Nothing is skipped in silence: an unknown directive, operand or register is a `PtxError` that names its line.
Not here: what an instruction means (integer, floating, convert, transfer, warp), how threads run (machine).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "u16": 16, "u32": 32, "u64": 64, "s32": 32, "s64": 64}
"""Bits of a register by the type it was declared with."""

DEBUG_INFO = ("loc", "file", "pragma")
"""Directives that carry no meaning for execution."""


class PtxError(Exception):
    """The program cannot be run, or did what no correct program does; the message names the PTX line."""


@dataclass(frozen=True)
class Instruction:
    """One statement: `@guard opcode operands;`.

    opcode: with all its modifiers, e.g. `ld.shared.v4.b32`.
    operands: top-level operands as text; `{...}` and `[...]` stay whole.
    guard: the predicate register, or None; negated: whether `@!`.
    line: line in the PTX text, from 1; source: `file:line` of the Triton source, where debug information says so.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int
    source: str

    def where(self) -> str:
        """Return the place for a message: `PTX line 12 (kernel.py:3): add.s32`."""
        origin = f" ({self.source})" if self.source else ""
        return f"PTX line {self.line}{origin}: {self.opcode}"


@dataclass
class Program:
    """A parsed kernel.

    params: name -> type (`u64`, `u32`, ...) in the order of the launch; threads: per CTA (`.reqntid`).
    widths: bits of every declared register, by name or by prefix (`%r` stands for `%r0`, `%r1`, ...).
    labels: name -> index into `instructions`.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    params: dict[str, str]
    threads: int
    widths: dict[str, int] = field(default_factory=dict)

    def width(self, register: str) -> int | None:
        """Return the bits of a register, None where it was not declared."""
        if register in self.widths:
            return self.widths[register]
        prefix = re.fullmatch(r"(%[a-z]+)\d+", register)
        return self.widths.get(prefix.group(1)) if prefix else None


def parse(ptx: str) -> Program:
    """Parse the only kernel of a PTX module. Raises PtxError that names the line of what it does not know."""
    entries = list(re.finditer(r"\.entry\s+[\w$]+\s*\((?P<params>[^)]*)\)(?P<hints>[^{]*)\{", ptx))
    if len(entries) != 1:
        raise PtxError(f"a module with one .entry is expected, this one has {len(entries)}")
    entry = entries[0]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry["hints"])
    if threads is None:
        raise PtxError("the kernel has no .reqntid: how many threads a CTA has is not known")
    params = {}
    for declaration in filter(None, (p.strip() for p in entry["params"].split(","))):
        match = re.fullmatch(r"\.param\s+\.(\w+).*?([\w$]+)", declaration)
        if match is None:
            raise PtxError(f"cannot read the parameter {declaration!r}")
        params[match.group(2)] = match.group(1)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', ptx, re.MULTILINE))
    body = _Body(ptx, entry.end(), files)
    program = Program([], {}, params, int(threads.group(1)), body.widths)
    for kind, text, line in body.statements():
        if kind == "label":
            program.labels[text] = len(program.instructions)
        else:
            program.instructions.append(body.instruction(text, line))
    return program


class _Body:
    """Cuts a kernel's body into statements and keeps the scopes of inline assembly apart."""

    def __init__(self, ptx: str, start: int, files: dict[str, str]) -> None:
        self.text, self.start, self.files = ptx, start, files
        self.widths: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0
        self.source = ""

    def statements(self) -> Iterator[tuple[str, str, int]]:
        """Yield ("label" or "instruction", text, line) up to the brace that closes the kernel."""
        line = self.text.count("\n", 0, self.start) + 1
        pending = ""
        for text in self.text[self.start :].split("\n"):
            rest = text.partition("//")[0].strip()
            while rest:
                if not pending:
                    found, rest = self._scope_or_directive(rest, line)
                    if found == "end":
                        return
                    if found == "label":
                        label, _, rest = rest.partition(":")
                        yield "label", label.strip(), line
                    rest = rest.strip()
                    if found:
                        continue
                head, semicolon, tail = rest.partition(";")
                pending, rest = f"{pending} {head}".strip(), tail.strip()
                if semicolon:
                    if pending.startswith(".reg"):
                        self._declare(pending, line)
                    elif pending:
                        yield "instruction", pending, line
                    pending = ""
            line += 1
        raise PtxError("the kernel's body is not closed")

    def _scope_or_directive(self, rest: str, line: int) -> tuple[str, str]:
        """Consume what may stand where a statement begins; "" means that a statement does."""
        if rest[0] == "{":
            self.scopes.append({})
            self.opened += 1
            return "scope", rest[1:]
        if rest[0] == "}":
            self.scopes.pop()
            return ("scope", rest[1:]) if self.scopes else ("end", "")
        if rest[0] == ".":
            name = re.match(r"\.(\w+)", rest)
            if name and name.group(1) in DEBUG_INFO:
                self._locate(rest)
                return "directive", rest.partition(";")[2] if name.group(1) == "pragma" else ""
            if not rest.startswith(".reg"):
                raise PtxError(f"PTX line {line}: unknown directive {rest!r}")
        if re.match(r"[\w$]+:", rest):
            return "label", rest
        return "", rest

    def _locate(self, directive: str) -> None:
        place = re.search(r"inlined_at (\d+) (\d+)", directive) or re.match(r"\.loc\s+(\d+)\s+(\d+)", directive)
        if place and place.group(2) != "0":
            self.source = f"{self.files.get(place.group(1), '?')}:{place.group(2)}"

    def _declare(self, statement: str, line: int) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        if match is None or match.group(1) not in WIDTHS:
            raise PtxError(f"PTX line {line}: cannot read the declaration {statement!r}")
        for declared in (n.strip() for n in match.group(2).split(",")):
            name = re.sub(r"<\d+>$", "", declared)
            if len(self.scopes) > 1:
                self.scopes[-1][name] = name = f"{name}@{self.opened}"
            self.widths[name] = WIDTHS[match.group(1)]

    def instruction(self, statement: str, line: int) -> Instruction:
        """Read one statement, registers renamed by the scopes that are open."""
        match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement, re.DOTALL)
        if match is None:
            raise PtxError(f"PTX line {line}: cannot read {statement!r}")
        negation, guard, opcode, operands = match.groups()
        cut = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", operands or "")
        named = tuple(self._rename(o.strip()) for o in cut if o.strip())
        return Instruction(opcode, named, guard and self._rename(guard), negation == "!", line, self.source)

    def _rename(self, operand: str) -> str:
        for scope in reversed(self.scopes):
            for name, unique in scope.items():
                operand = re.sub(rf"(?<![\w%$@]){re.escape(name)}(?![\w@])", unique, operand)
        return operand


def items(vector: str) -> list[str]:
    """Return the registers of `{a, b}` or of a single operand."""
    return [part.strip() for part in vector.strip("{} ").split(",")]
