"""λ: one number for all parameters, or one for each pattern of their names."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from mas_fast.checks import bullets

# Steps compute in float32, where a larger λ is inf, and inf times 0 is nan.
LARGEST = 3.4028234e38

Lam = float | Mapping[str, float]


def checked_lam(value: object) -> float | dict[str, float]:
    """Return λ as a float, or as a dict of its own.

    Raises:
        TypeError: It is, or holds, no real number, or a pattern is no string.
        ValueError: A number is negative, not finite, or too large for float32.
    """
    if not isinstance(value, Mapping):
        return _checked_number(value, "lam")
    wrong = [pattern for pattern in value if not isinstance(pattern, str)]
    if wrong:
        raise TypeError(f"lam must have patterns of type str, got {wrong}")
    return {pattern: _checked_number(number, f"lam[{pattern!r}]") for pattern, number in value.items()}


def lams_of(lam: Lam, names: Iterable[str]) -> dict[str, float]:
    """Return λ of each parameter: that of the first pattern that matches its name.

    Raises:
        ValueError: No pattern matches; all such names are listed.
    """
    if not isinstance(lam, Mapping):
        return dict.fromkeys(names, lam)
    found, missing = {}, []
    for name in names:
        number = next((number for pattern, number in lam.items() if fnmatchcase(name, pattern)), None)
        if number is None:
            missing.append(repr(name))
        else:
            found[name] = number
    if missing:
        raise ValueError(
            f"lam must have a pattern for every parameter with an omega, got none of {list(lam)} for:"
            f'{bullets(missing)}\nadd "*" as the last pattern for all others'
        )
    return found


def _checked_number(value: object, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a real number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{argument} must be finite and at least 0, got {number}")
    if number > LARGEST:
        raise ValueError(f"{argument} must fit into float32, got {number}")
    return number
