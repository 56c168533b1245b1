"""Random damage to bytes, JSON and safetensors files."""

import json
import math
from random import Random
from typing import Any


NESTED = "\0nested\0"  # placeholder for 100,000 nested lists, which json.dumps cannot write
NUMBERS = (0, 1, -1, 2, 3, 0.5, 1e-45, 1e308, -1e308, 10**9, 2**31, 2**63, 10**30, math.nan, math.inf, -math.inf)
TEXTS = ("", "1", "x" * 10**6, "\x1b[31m\x00\u202e\ud800", "../../x", "/dev/stdin", "binaryvit", "float16", NESTED)
OTHERS = (None, True, False, [], {}, [[]], [1] * 100_000, {"a": 1}, [None], {"": {"": []}})


def mutate_bytes(rng: Random, content: bytes, donor: bytes) -> bytes:
    """
    Args:
        donor: another file, whose beginning is put before.
    """
    edit = rng.choice([flip_bits, flip_bits, exchange, truncate, insert, blank, repeat, exchange_header])
    return edit(rng, content, donor)


def some_range(rng: Random, content: bytes) -> tuple[int, int]:
    """A range of bytes, most often short. Three in five lie anywhere, the others at the beginning, in the header."""
    length = int(2 ** rng.uniform(0, math.log2(len(content) + 1)))
    anywhere = rng.randrange(len(content) + 1)
    start = rng.choice([0, rng.randrange(min(len(content), 64) + 1), anywhere, anywhere, anywhere])
    return start, min(start + length, len(content))


def flip_bits(rng: Random, content: bytes, donor: bytes) -> bytes:
    mutant = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 16])):
        if mutant:
            start, _ = some_range(rng, content[:-1])
            mutant[start] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def exchange(rng: Random, content: bytes, donor: bytes) -> bytes:
    (a, b), (c, d) = sorted([some_range(rng, content), some_range(rng, content)])
    c = max(b, c)
    d = max(c, d)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def truncate(rng: Random, content: bytes, donor: bytes) -> bytes:
    return content[: rng.choice([rng.randrange(len(content) + 1), rng.randrange(17), len(content) - 1])]


def insert(rng: Random, content: bytes, donor: bytes) -> bytes:
    start, _ = some_range(rng, content)
    return content[:start] + rng.randbytes(rng.choice([1, 8, 1000])) + content[start:]


def blank(rng: Random, content: bytes, donor: bytes) -> bytes:
    start, end = some_range(rng, content)
    return content[:start] + rng.choice([b"\0", b"\xff"]) * (end - start) + content[end:]


def repeat(rng: Random, content: bytes, donor: bytes) -> bytes:
    start, end = some_range(rng, content)
    return content[:end] * rng.choice([1, 2]) + content[start:end] + content[end:]


def exchange_header(rng: Random, content: bytes, donor: bytes) -> bytes:
    length = rng.choice([8, 64, 1024])
    return donor[:length] + content[length:]


def mutate_json(rng: Random, text: str) -> bytes:
    """A JSON document with a few edits of its keys and values, or of its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, text.encode(), b"\x89PNG\r\n\x1a\n" + bytes(1024))
    document = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        document = edit(rng, document)
    return write_json(document)


def write_json(document: Any) -> bytes:
    written = json.dumps(document).replace(json.dumps(NESTED), "[" * 100_000 + "]" * 100_000)
    return written.encode("utf-8", "surrogatepass")


def edit(rng: Random, document: Any) -> Any:
    """One edit somewhere in a document."""
    containers = [(None, None), *places(document)]
    parent, key = rng.choice(containers) if rng.random() < 0.97 else (None, None)
    if parent is None:
        return document if containers[1:] and rng.random() < 0.9 else rng.choice(OTHERS)
    if rng.random() < 0.15:
        del parent[key]
    elif rng.random() < 0.1 and isinstance(parent, dict):
        parent[rng.choice([*TEXTS, *parent])] = parent.pop(key)
    elif rng.random() < 0.1:
        other, other_key = rng.choice(containers[1:])
        if key in range(len(parent)) if isinstance(parent, list) else key in parent:
            parent[key] = json.loads(json.dumps(other[other_key]))
    else:
        parent[key] = changed(rng, parent[key])
    return document


def places(document: Any) -> list[tuple[Any, Any]]:
    """All pairs of a container in the document and one of its keys or indices."""
    found = []
    if not isinstance(document, (dict, list)):
        return found
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        found.append((document, key))
        if not isinstance(value, list) or len(value) < 1000:
            found += places(value)
    return found


def changed(rng: Random, value: Any) -> Any:
    """Another value. Half of them have the same type."""
    if isinstance(value, bool):
        return rng.choice([not value, *OTHERS])
    if isinstance(value, (int, float)) and rng.random() < 0.6:
        return rng.choice([value + 1, -value, value * 1000, value * 2, value / 2, float(value), str(value), *NUMBERS])
    if isinstance(value, list) and rng.random() < 0.5:
        return rng.choice([value[1:], value + value[:1], value * 100, [value], value[::-1]])
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice([value.upper(), value + "\n", value * 2, value[1:], [value]])
    return rng.choice([*NUMBERS, *TEXTS, *OTHERS])


def mutate_safetensors(rng: Random, content: bytes, donor: bytes) -> bytes:
    """Edit the JSON header or any bytes."""
    if rng.random() < 0.6:
        return mutate_bytes(rng, content, donor)
    length = int.from_bytes(content[:8], "little")
    header = mutate_json(rng, content[8 : 8 + length].decode())
    told = rng.choice([len(header)] * 8 + [0, 2**63, len(header) + 1])
    return told.to_bytes(8, "little") + header + content[8 + length :]
