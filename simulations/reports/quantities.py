"""Numbers as people read them: three significant digits, a fitting unit, thousands apart."""

from __future__ import annotations

import math

__all__ = ["UNDEFINED", "time_unit", "to_count", "to_duration", "to_rate", "to_share"]

UNDEFINED = "-"


def to_duration(seconds: float | None) -> str:
    """Three significant digits in µs, ms or s; a dash where undefined.

    >>> to_duration(0.030395), to_duration(0.99996), to_duration(1789.8), to_duration(0.0), to_duration(None)
    ('30.4 ms', '1.00 s', '1,790 s', '0 s', '-')
    """
    if seconds is None or math.isnan(seconds):
        return UNDEFINED
    rounded = float(f"{seconds:.3g}")
    if rounded == 0:
        return "0 s"
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if abs(rounded) * factor >= 1:
            return f"{_to_digits(seconds * factor)} {unit}"
    return f"{_to_digits(seconds * 1e6)} µs"


def to_rate(per_second: float | None) -> str:
    """Three significant digits without a unit; a dash where undefined.

    >>> to_rate(5.587), to_rate(1220.27), to_rate(None)
    ('5.59', '1,220', '-')
    """
    return UNDEFINED if per_second is None or math.isnan(per_second) else _to_digits(per_second)


def to_share(share: float | None) -> str:
    """A share of one in percent; a dash where undefined.

    >>> to_share(0.1218), to_share(0.0004), to_share(0.0), to_share(None)
    ('12.2 %', '0.04 %', '0 %', '-')
    """
    if share is None or math.isnan(share):
        return UNDEFINED
    percent = 100 * share
    if percent == 0 or percent >= 99.95:
        return f"{percent:.0f} %"
    return f"{percent:.2f} %" if abs(percent) < 1 else f"{percent:.1f} %"


def to_count(number: float | None) -> str:
    """A whole number, thousands apart; a dash where undefined.

    >>> to_count(12424297), to_count(None)
    ('12,424,297', '-')
    """
    return UNDEFINED if number is None else f"{int(number):,}"


def time_unit(span_s: float) -> tuple[float, str]:
    """The unit in which to mark an axis that spans so many seconds: its length in seconds, and its name.

    >>> time_unit(600), time_unit(1800), time_unit(86400)
    ((1.0, 's'), (60.0, 'min'), (3600.0, 'h'))
    """
    if span_s <= 600:
        return 1.0, "s"
    return (60.0, "min") if span_s <= 3 * 3600 else (3600.0, "h")


def _to_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    return f"{value:,.0f}" if abs(rounded) >= 100 else f"{value:#.3g}"
