"""Hostile variants of the files of a checkpoint: lengths, names, shapes and JSON that a loader must survive."""

import json
import struct
from random import Random

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
    10**400,
)
VALUES = (
    *NUMBERS, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None, "", "x", "../x", "/etc/passwd", "F32",
    "\x00", "\ud83d\ude00", "a" * 5000, [], {}, [1], ["x"], [[]], {"a": 1}, {"type": "linear"},
    [2**31, 2**33], [2**62, 4],
)  # fmt: skip
FILE_NAMES = (
    "../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", ".hidden.safetensors", "model.bin",
    "a\x00.safetensors", "model.safetensors/", "~/x.safetensors", "..\\x.safetensors", "\u2024\u2024/x.safetensors",
    "con.safetensors", "x" * 300 + ".safetensors", "file:///etc/passwd", "http://a/b.safetensors", "$HOME.safetensors",
)  # fmt: skip


def mutate_bytes(generator: Random, data: bytes, reach: int = 1000) -> bytes:
    """Some bytes of the beginning overwritten, inserted, removed or repeated, or the end cut off."""
    result = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(min(len(result), reach) + 1)
        kind = generator.randrange(5)
        if kind == 0:
            result[at : at + 1] = bytes([generator.randrange(256)])
        elif kind == 1:
            result[at:at] = generator.choice((b"{", b"[", b'"', b",", b"\\", b"\xff", b"0" * 50, b'"a":{', b"[" * 2000))
        elif kind == 2:
            del result[at : at + generator.randint(1, 30)]
        elif kind == 3:
            result[at:at] = result[at : at + generator.randint(1, 60)]
        else:
            del result[generator.randrange(len(result) + 1) :]
    return bytes(result)


def mutate_value(generator: Random, value: object, values: tuple = VALUES) -> object:
    """One place of a JSON value replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key, result = generator.choice(list(value)), dict(value)
        kind = generator.randrange(6)
        if kind == 0:
            del result[key]
        elif kind == 1:
            result[generator.choice(("extra", "__proto__", "auto_map", "", "a" * 2000, "../x"))] = result[key]
        elif kind == 2:
            result[key] = generator.choice(values)
        else:
            result[key] = mutate_value(generator, result[key], values)
        return result
    if isinstance(value, list) and value and generator.random() < 0.8:
        result, at = list(value), generator.randrange(len(value))
        result[at] = mutate_value(generator, result[at], values)
        return result if generator.random() < 0.7 else result * generator.choice((0, 2, 3))
    return generator.choice(values)


def to_json(generator: Random, value: object) -> bytes:
    """As JSON, at times with a key twice, or deep nesting instead of a value."""
    text = json.dumps(value)
    kind = generator.random()
    if kind < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    elif kind < 0.08:
        text = text.replace(": ", ": " + "[" * 3000, 1)
    elif kind < 0.1:
        text = "[" * generator.choice((10, 2000, 200_000))
    return text.encode(errors="surrogatepass")


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def mutate_safetensors(generator: Random, data: bytes) -> bytes:
    """Lengths of the header, its JSON, shapes, dtypes, offsets, names; or any byte of it."""
    kind = generator.random()
    if kind < 0.15:
        length = generator.choice(
            [*(n % 2**64 for n in NUMBERS), len(data), len(data) - 8, len(data) - 7, 10**8, 10**9]
        )
        return struct.pack("<Q", length) + data[8:]
    if kind < 0.35:
        return mutate_bytes(generator, data)
    header, body = split_safetensors(data)
    for _ in range(generator.randint(1, 3)):
        header = mutate_header(generator, header)
    text = to_json(generator, header)
    if generator.random() < 0.2:
        body = body[: generator.randrange(len(body) + 1)] + bytes(generator.choice((0, 1, 4096)))
    return struct.pack("<Q", len(text)) + text + body


def mutate_header(generator: Random, header: dict) -> dict:
    if not isinstance(header, dict) or not header or generator.random() < 0.2:
        return mutate_value(generator, header)
    result, name = dict(header), generator.choice(list(header))
    entry = dict(result[name]) if isinstance(result[name], dict) else {}
    kind = generator.randrange(6)
    if kind == 0:
        entry["shape"] = [generator.choice(NUMBERS) for _ in range(generator.randint(0, 4))]
    elif kind == 1:
        entry["data_offsets"] = [generator.choice(NUMBERS) for _ in range(generator.choice((1, 2, 2, 2, 3)))]
    elif kind == 2:
        entry["dtype"] = generator.choice(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U8", "C64", "F4", "x", 3))
    elif kind == 3:
        other = generator.choice(list(header))
        entry["data_offsets"] = header[other].get("data_offsets", [0, 0]) if isinstance(header[other], dict) else [0, 0]
    elif kind == 4:
        result[generator.choice(("__metadata__", "x", "model.layers.99.weight", "../x", ""))] = entry
    else:
        entry |= {"shape": [0], "data_offsets": [0, 0]}
    result[name] = entry
    return result
