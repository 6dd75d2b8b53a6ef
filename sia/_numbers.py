"""Numbers of the caller: NumPy's and torch's are taken as the Python numbers that they hold."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def python_value(value: Any) -> Any:
    """Return a Python scalar for a NumPy scalar or 0-d array or tensor, other values unchanged."""
    scalar = isinstance(value, np.generic) or (
        isinstance(value, np.ndarray | Tensor) and value.ndim == 0
    )
    held = value.item() if scalar else value
    return float(held) if isinstance(held, np.longdouble) else held


def as_number(value: Any) -> float:
    """Return the number as an int or float, and NaN for everything that is none."""
    number = python_value(value)
    return number if isinstance(number, int | float) and not isinstance(number, bool) else math.nan


def whole_number(name: str, value: Any, minimum: int | None = None) -> int:
    """Return the number as an int.

    Raises:
        ValueError: If it is not whole, or below the minimum.
    """
    number = as_number(value)
    if not isinstance(number, int) or (minimum is not None and number < minimum):
        least = "" if minimum is None else f" of at least {minimum}"
        raise ValueError(f"{name} must be a whole number{least}, got {python_value(value)!r}")
    return number


def finite_number(name: str, value: Any, minimum: float = -math.inf) -> float:
    """Return a finite number.

    Raises:
        ValueError: If it is NaN, infinite, no number, or below the minimum.
    """
    number = as_number(value)
    if not (is_finite(number) and number >= minimum):
        least = "" if math.isinf(minimum) else f" of at least {minimum:g}"
        raise ValueError(f"{name} must be a finite number{least}, got {python_value(value)!r}")
    return number


def is_finite(number: float) -> bool:
    """Return whether a number is finite as a float; an int may be too large for one."""
    return abs(number) <= sys.float_info.max


def seeded_generator(seed: Any) -> torch.Generator:
    """Return a generator of torch with this seed, any whole number."""
    return torch.Generator().manual_seed(whole_number("seed", seed) % 2**63)


def row_numbers(name: str, value: Any, count: int, rows: str) -> list[int]:
    """Return `count` whole numbers from one for all, or one for each of the `rows`.

    Raises:
        ValueError: If there are more or fewer, or one is not whole.
    """
    numbers = value.tolist() if isinstance(value, np.ndarray | Tensor) else value
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        return [whole_number(name, numbers)] * count
    if len(numbers) != count:
        raise ValueError(
            f"{name} must be one number, or one for each of the {count} {rows}, got {len(numbers)}"
        )
    return [whole_number(name, number) for number in numbers]
