"""Quantities as people write them: bytes with binary or decimal suffixes, seconds, counts; and results as JSON."""

import json
import re
from math import isfinite
from typing import Any

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_BYTE_SUFFIXES = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Bytes from `"512MiB"`, `"4 GB"`, `"1.5g"` or a plain integer.

    Raises:
        ValueError: the text is not a quantity of bytes.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"expected a quantity of bytes, found {text}; give a positive one such as '512MiB'")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    factor = _BYTE_SUFFIXES.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"expected a quantity of bytes such as '512MiB' or '4GB', found {text!r}")
    return round(float(match.group(1)) * factor)


_SECOND_SUFFIXES = {"s": 1.0, "min": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """Seconds from `"30s"`, `"5 min"` or `"1.5h"`.

    Raises:
        ValueError: the text is not a time.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    factor = _SECOND_SUFFIXES.get(match.group(2)) if match else None
    if match is None or factor is None:
        raise ValueError(f"expected a time such as '30s', '5min' or '1h', found {text!r}")
    return float(match.group(1)) * factor


def format_bytes(nbytes: float) -> str:
    """`1536` → `'1.50 KiB'`; three significant digits, binary units."""
    magnitude = abs(nbytes)
    for unit, factor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            value = nbytes / factor
            digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"


def format_count(number: float) -> str:
    """`62_400_000` → `'62.4 M'`."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f}"


def format_seconds(seconds: float) -> str:
    """`3723` → `'1 h 02 min'`; `75` → `'1 min 15 s'`; `0.25` → `'0.25 s'`; `0.0025` → `'2.5 ms'`."""
    if seconds >= 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest:02d} min"
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    if 0 < seconds < 0.01:
        return f"{seconds * 1e3:.2g} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def json_text(found: Any) -> str:
    """A result as JSON that every parser reads: a number that is not finite is null there."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not isfinite(value) else value

    return json.dumps(finite(found), indent=2, allow_nan=False)


def align(offset: int, boundary: int) -> int:
    """The smallest multiple of `boundary` that is at least `offset`."""
    return -(-offset // boundary) * boundary
