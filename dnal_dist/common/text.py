"""Numbers as text: amounts, percentages, durations, bytes."""

import math
import re
from collections import Counter

UNITS = {f"{prefix}{end}": base**power for end, base in (("B", 1000), ("iB", 1024)) for power, prefix in enumerate("KMGT", 1)}


def bytes_of(text: str) -> int:
    """80GB, 24GiB or 500MB as bytes. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    if not found or not float(found[1]):
        from dnal_dist.common.errors import InputError  # which needs this module

        raise InputError(f"--device-memory {text}: expected an amount such as 80GB, 24GiB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])


def spaced(number: int) -> str:
    """Thousands apart: 1 234 567."""
    return f"{number:,}".replace(",", " ")


def short(number: float) -> str:
    """Bytes in three digits and a unit, 2.42 MB."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while number >= 999.5 and unit != "TB":
        number, unit = number / 1000, next(units)
    return f"{number:.3g} {unit}"


def amount(count: float, like: float | None = None) -> str:
    """Three digits and a unit, 2.42 M; in the unit of `like` where that stays readable."""
    for reference in (count if like is None else like, count):
        units = ((1e9, " G"), (1e6, " M"), (1e3, " k"))
        scale, unit = next((u for u in units if reference >= 0.9995 * u[0]), (1, ""))
        if count / scale >= 0.01:
            break
    return f"{count / scale:.3g}{unit}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %" if share == 0 or share >= 0.001 else f"{100 * share:.2g} %"


def spread(mean: float, std: float | None) -> str:
    """A mean and, if there is one, its standard deviation, in one unit and to the same digit, the third of the mean or the first of
    the deviation: 0.198 ± 0.012 M."""
    if std is None or not mean:
        return amount(mean)
    unit = amount(mean).partition(" ")[2]
    scale = {"G": 1e9, "M": 1e6, "k": 1e3}.get(unit, 1)
    digits = max(0, 2 - math.floor(math.log10(mean / scale)), -math.floor(math.log10(std / scale)) if std else 0)
    return f"{mean / scale:.{digits}f} ± {std / scale:.{digits}f} {unit}".rstrip()


def percents(mean: float, std: float | None, digits: int = 2) -> str:
    """Likewise, for shares: 99.27 ± 0.15 %."""
    return percent(mean, digits) if std is None else f"{100 * mean:.{digits}f} ± {100 * std:.{digits}f} %"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def fewer(ratio: float) -> str:
    return f"{1 / ratio:,.{0 if ratio < 0.01 else 1}f}x fewer" if ratio else "nothing left"


def counted(messages: list[str]) -> list[str]:
    """Each message once, in order, with how often it came."""
    return [message if n == 1 else f"{message} ({n:,} times)" for message, n in Counter(messages).items()]


def printable(words: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in words)
