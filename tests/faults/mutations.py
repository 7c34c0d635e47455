"""Damage for fuzzing: to bytes, and to documents (JSON, YAML) that stay well-formed while what they say does not."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

# Values that have broken parsers before: bounds, texts that are numbers or paths, things that are not there.
NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "0",
    "nan",
    "a" * 300,
    "\x00",
    "\ud800",
    "é\u202e",
    "../../etc/passwd",
    "/etc/passwd",
    "hf",
    "click",
    "item",
    "2026-02-30",
    "2026-01-01",
    "x) + read_csv('/etc/passwd'",
    "${root}",
    "${nothing}",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"": ""},
)
# Pieces of text that mean something to some parser.
PIECES: tuple[bytes, ...] = (
    b"!!python/object/apply:os.system ['touch ran']",
    b"!!python/name:os.system",
    b"!!binary x",
    b"!!timestamp 2026-13-45",
    b"2026-13-45",
    b"&a [*a]",
    b"&a {x: *a}",
    b"*b",
    b"<<: {a: 1}",
    b"<<: [1]",
    b"? [1, 2]\n: 3\n",
    b"{[1]: 2}",
    b"1:99:99",
    b"0x",
    b"0o9",
    b"1_0e",
    b".inf",
    b"=",
    b"---\n",
    b"%YAML 9.9\n---\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 2000,
    b"1e999999",
    b"-",
    b"\\ud800",
    b"//",
    b"#",
    b"\t",
)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of the bytes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0 if found:
                found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + rng.randint(1, 16)]
            case 2:
                found[at:at] = rng.choice(PIECES)
            case 3:
                del found[at:]
            case 4:
                other = rng.randrange(len(found) + 1)
                found[at:at] = found[other : other + rng.randint(1, 64)]
            case _:
                found[at : at + 4] = rng.randbytes(rng.randint(1, 4))
    return bytes(found)


def damage_document(content: Any, rng: random.Random) -> Any:
    """One to three changes of what a document says."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _change(content, rng)
    return content


def _change(content: Any, rng: random.Random) -> Any:
    places = list(_places(content))
    if not places:
        return copy.deepcopy(rng.choice(NASTY))
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other_holder, other_key = rng.choice(places)
            holder[key] = copy.deepcopy(other_holder[other_key])
        case 2 if isinstance(holder, dict):
            holder[rng.choice(("", "extra", str(key) + "s", "__class__"))] = copy.deepcopy(rng.choice(NASTY))
        case 3 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case _:
            holder[key] = _near(holder[key], rng) if rng.random() < 0.4 else copy.deepcopy(rng.choice(NASTY))
    return content


def _near(value: Any, rng: random.Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 1000, float(value), str(value)))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, value * 1e300, int(value) if math.isfinite(value) else 0, str(value)))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), value * 2, [value], "../" + value, "/" + value))
    if isinstance(value, list):
        return rng.choice((value * 2, value[::-1], value[:-1], dict(enumerate(value)), [value]))
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.values()), {}))
    return copy.deepcopy(rng.choice(NASTY))


def _places(content: Any) -> Any:
    """(holder, key) of every value inside a document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Damage to what a JSON text says, or to its bytes."""
    if rng.random() < 0.75:
        return json.dumps(damage_document(json.loads(data), rng), default=str).encode("utf-8", "surrogatepass")
    return damage_bytes(data, rng)


def damage_yaml(data: bytes, rng: random.Random) -> bytes:
    """Damage to what a YAML text says, or to its bytes; JSON is YAML, but for numbers such as NaN."""
    import yaml

    if rng.random() < 0.6:
        content = damage_document(yaml.safe_load(data), rng)
        try:
            return yaml.safe_dump(content, sort_keys=False, allow_unicode=rng.random() < 0.5).encode()
        except (yaml.YAMLError, UnicodeEncodeError):
            return json.dumps(content, default=str).encode("utf-8", "surrogatepass")
    return damage_bytes(data, rng)
