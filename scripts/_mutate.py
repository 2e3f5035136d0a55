"""Mutations of valid files that keep enough of their structure to get past the first check.

Each takes the bytes of a valid file and a seeded generator, and returns other bytes. A mutation of a JSON file changes
one value of its tree, one of a safetensors file its header or the values of a tensor, one of a GGUF file a number or a
string of its header; and each kind may lose its end, a byte or its sense altogether.
Not here: what reads them (fuzz.py).
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

Mutation = Callable[[bytes, random.Random], bytes]

_DEEP = json.loads("[" * 150 + "]" * 150)
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**31 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, 4.0, 1e308,
    float("nan"), float("inf"), "", "x", "4", "true", "\x00", "\x1b[2J\x07", "[/red]", "../../etc/passwd", "/dev/zero",
    "a\nb: c", "--- ", "re:(a+)+$", "re:(", "(a|a)*b", "*", "model.layers.0.mlp.down_proj", "lm_head", "os.path", ".os",
    "kernels-community/x", "org/name", "\u202e", "\ud800", "x" * 5000, [], {}, [None], [[]], ["x", 1], {"": {}},
    {"x": [1]}, _DEEP,
)  # fmt: skip
_INTS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, -1.0, 65504.0)


def raw(data: bytes, r: random.Random) -> bytes:
    """Flip, overwrite, drop, double or cut bytes."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        at = r.randrange(len(out) + 1)
        match r.randrange(6):
            case 0 if out:
                out[at % len(out)] ^= 1 << r.randrange(8)
            case 1:
                out[at : at + 4] = r.randbytes(4)
            case 2:
                del out[at : at + r.choice((1, 7, 400))]
            case 3:
                out[at:at] = out[at : at + r.choice((1, 16, 200))]
            case 4:
                del out[at:]
            case _:
                out[at:at] = r.choice((b"\0", b"\xff\xfe", b"{", b"]", b'"', b"\n", b"\x1b[2J"))
    return bytes(out)


def json_file(data: bytes, r: random.Random) -> bytes:
    """Change one to three values of the tree."""
    return json.dumps(tree(json.loads(data), r)).encode()


def yaml_file(data: bytes, r: random.Random) -> bytes:
    """Change values of a YAML object; sometimes write an anchor and its alias."""
    text = yaml.safe_dump(tree(yaml.safe_load(data), r), allow_unicode=True).encode(errors="replace")
    return text + r.choice((b"", b"", b"", b"x: &a [1]\ny: *a\n", b"? [a]\n: 1\n", b"--- \nbits: 3\n"))


def json_lines(data: bytes, r: random.Random) -> bytes:
    """Change the object in one line."""
    rows = data.splitlines()
    i = r.randrange(len(rows))
    rows[i] = json_file(rows[i], r)
    return b"\n".join(rows) + b"\n"


def tree(value: Any, r: random.Random) -> Any:
    """Return a JSON value with some of its parts exchanged, dropped or renamed."""
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return r.choice(NASTY)
        holder, key = r.choice(places)
        match r.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(r.choice(NASTY))[:60]] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.insert(key, holder[key])
            case 3 if isinstance(holder[key], int | float) and abs(holder[key]) < 1e300:
                holder[key] = r.choice(
                    (holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, str(holder[key]))
                )
            case 4:
                holder[key] = r.choice(list(_values(value)))
            case _:
                holder[key] = copy.deepcopy(r.choice(NASTY))  # what is put in may be changed in its turn
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from _places(part)


def _values(value: Any) -> Any:
    return (json.loads(json.dumps(holder[key])) for holder, key in _places(value))


def safetensors_file(data: bytes, r: random.Random) -> bytes:
    """Change the header, the values of a tensor, or which tensors there are."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [n for n in header if n != "__metadata__"]
    name = r.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    match r.randrange(9):
        case 0:
            header = tree(header, r)
        case 1:
            header[name] = tree(entry, r)
        case 2:
            header[r.choice((name + "x", name.removeprefix("model."), "model." + name, r.choice(names)))] = header.pop(
                name
            )
        case 3:
            entry["shape"] = r.choice((entry["shape"][::-1], [*entry["shape"], 1], [(end - begin)], [0], []))
        case 4:
            entry["dtype"] = r.choice(("F32", "F16", "BF16", "I32", "I64", "U8", "F8_E4M3", "F4", "X"))
        case 5:  # another order of the tensors' data: same sizes change places
            other = r.choice([n for n in names if _size(header[n]) == end - begin])
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
        case 6:
            _overwrite(body, begin, end, entry["dtype"], r)
        case 7:
            header[f"extra.{r.randrange(3)}"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
        case _:
            kept = body[:begin] + body[end:]
            header = {n: e for n, e in header.items() if n != name}
            for n in header:
                if n != "__metadata__" and header[n]["data_offsets"][0] >= end:
                    header[n]["data_offsets"] = [x - (end - begin) for x in header[n]["data_offsets"]]
            body = kept
    text = json.dumps(header).encode(errors="replace")
    stated = r.choice((len(text),) * 20 + _INTS)
    return struct.pack("<Q", stated) + text + bytes(body)


def _size(entry: dict[str, Any]) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]


def _overwrite(body: bytearray, begin: int, end: int, dtype: str, r: random.Random) -> None:
    """Put odd values where a tensor lies: floats that are none, indices that point nowhere."""
    for _ in range(r.choice((1, 4, 100))):
        word = (
            struct.pack("<f", r.choice(_FLOATS))
            if dtype == "F32"
            else struct.pack("<i", r.choice((-1, 0, 9999, 2**31 - 1)))
        )
        if dtype == "BF16":
            word = struct.pack("<f", r.choice(_FLOATS))[2:]
        elif dtype == "F16":
            word = struct.pack("<H", r.choice((0, 0x8000, 0x7C00, 0x7E00, 0x7BFF, 1)))
        if end - begin >= len(word):
            at = begin + r.randrange((end - begin) // len(word)) * len(word)
            body[at : at + len(word)] = word


def gguf_file(data: bytes, r: random.Random) -> bytes:
    """Overwrite numbers and strings of the first kilobytes, where keys and tensor entries lie."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 4))):
        at = r.randrange(min(len(out), r.choice((24, 200, 2000, 6000))))
        match r.randrange(5):
            case 0:
                out[at : at + 8] = struct.pack("<Q", r.choice(_INTS))
            case 1:
                out[at : at + 4] = struct.pack("<I", r.choice(_INTS) % 2**32)
            case 2:
                out[at] = r.randrange(256)
            case 3:
                out[at : at + 3] = b"\xff\x1b["
            case _:
                del out[at : at + r.choice((1, 8, 100))]
    return bytes(out)
