"""Arguments are checked once, at construction, so that `step_time` need not."""

from __future__ import annotations

import math

from pagedkv.errors import ConfigError

__all__ = [
    "require_bits",
    "require_fraction",
    "require_non_negative",
    "require_non_negative_int",
    "require_positive",
    "require_positive_int",
]

_KNOWN_BITS = (4, 8, 16, 32)


def require_positive_int(name: str, value: int) -> None:
    """Raise `ConfigError` unless `value` is an int (no bool) of at least 1."""
    if not _is_int(value) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


def require_non_negative_int(name: str, value: int) -> None:
    """Raise `ConfigError` unless `value` is an int (no bool) of at least 0."""
    if not _is_int(value) or value < 0:
        raise ConfigError(f"{name} must be an integer of at least 0, got {value!r}")


def require_positive(name: str, value: float) -> None:
    """Raise `ConfigError` unless `value` is a finite number above 0."""
    if not _is_finite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")


def require_non_negative(name: str, value: float) -> None:
    """Raise `ConfigError` unless `value` is a finite number of at least 0."""
    if not _is_finite(value) or value < 0:
        raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}")


def require_fraction(name: str, value: float) -> None:
    """Raise `ConfigError` unless 0 < `value` <= 1."""
    if not _is_finite(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be above 0 and at most 1, got {value!r}")


def require_bits(name: str, value: int) -> None:
    """Raise `ConfigError` unless `value` is a width that weights and K/V are stored in: 4, 8, 16 or 32 bits."""
    if not _is_int(value) or value not in _KNOWN_BITS:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, _KNOWN_BITS))}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
