"""JSON files of a checkpoint: typed access whose errors name key, value and file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ExportError


class JsonObject:
    """One JSON object of a file. A key that is absent or null takes the default, where there is one."""

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self._prefix = prefix

    def error(self, key: str, problem: str) -> ExportError:
        value = f"is {json.dumps(self.values[key])}" if key in self.values else "is missing"
        return ExportError(f"{self.path}: {self._prefix}{key} {value}; {problem}")

    def section(self, key: str) -> "JsonObject":
        """The object under `key`."""
        if not isinstance(self.values.get(key), dict):
            raise self.error(key, "it must be an object")
        return JsonObject(self.values[key], self.path, f"{self._prefix}{key}.")

    def integer(self, key: str, minimum: int, default: int | None = None) -> int:
        """An integer of at least `minimum`."""
        wanted = f"an integer of at least {minimum}"
        return self._get(key, default, lambda value: is_integer(value) and value >= minimum, wanted)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        wanted = (
            f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
        )
        return float(self._get(key, default, lambda value: is_number(value) and low <= value <= high, wanted))

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        wanted = "a number above 0"
        return float(self._get(key, default, lambda value: is_number(value) and value > 0, wanted))

    def boolean(self, key: str, default: bool) -> bool:
        return self._get(key, default, lambda value: isinstance(value, bool), "true or false")

    def _get(self, key: str, default: Any, valid: Callable[[Any], bool], wanted: str) -> Any:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None or not valid(value):
            raise self.error(key, f"it must be {wanted}")
        return value


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of 64 bits, as every count and id is; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def read_json_object(path: Path, remedy: str = "download it again") -> JsonObject:
    """Reads the file `path`, which must hold one JSON object; else `remedy` is what errors advise.

    Raises:
        ExportError: no such file, unreadable, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file; a Hugging Face checkpoint has one") from None
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not JSON ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise ExportError(f"{path}: holds no JSON object; {remedy}")
    return JsonObject(values, path)
