"""Reading what people and other programs wrote: every way in which a text can be wrong is one ValueError.

JSON of a million brackets ends Python's parser in RecursionError; YAML says an impossible date by ValueError, and a
few lines of aliases within aliases stand for more values than memory holds. Readers turn the ValueError of this
module into an error of their own that names the file.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import yaml

# Values that a file may stand for, aliases resolved. A person writes thousands.
_MOST_VALUES = 200_000


def parse_json(text: bytes | str) -> Any:
    """JSON, or ValueError with what is wrong."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: bytes | str) -> Any:
    """YAML of plain values, or ValueError with what is wrong."""
    try:
        content = yaml.safe_load(text)
        _count(content, {})
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply, or within itself") from None
    except (TypeError, AttributeError, OverflowError, IndexError, KeyError) as error:
        # PyYAML's constructors of dates, numbers and sets trust what its patterns let through.
        raise ValueError(f"a value cannot be read ({error})") from error
    return content


def _count(value: Any, known: dict[int, int]) -> int:
    """Number of values that a value stands for, each alias counted as what it names."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in known:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
        if known[id(value)] > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    return known[id(value)]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies below a folder, symbolic links followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that no file can have
        return False


def is_file(path: Path) -> bool:
    """Whether there is such a file. A name longer than any file's is none; a folder that may not be looked into raises.

    Raises:
        OSError: it cannot be told.
    """
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
