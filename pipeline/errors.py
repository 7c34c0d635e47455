"""Errors of Trefoil: every one says what is wrong, where, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class TrefoilError(Exception):
    """Base of all errors that a user of Trefoil can cause and mend. Its text never holds a password,
    and can be printed."""

    def __str__(self) -> str:
        text = without_passwords(super().__str__())
        # Half a character out of damaged JSON cannot be printed.
        return text.encode(errors="backslashreplace").decode()


_USER_INFO = re.compile(r"(?<=://)[^\s/?#@'\"]*@")
_SECRET_FIELD = re.compile(r"(?i)([?&;](?:[\w-]*(?:password|passwd|pwd|token|secret|key|signature|sig))=)[^&;\s'\"]+")


def without_passwords(text: object) -> str:
    """Text in which addresses lack user, password and secret fields: other libraries' errors quote them whole.

    >>> without_passwords("no answer from https://ada:secret@mlflow:5000/api?token=abc")
    'no answer from https://***@mlflow:5000/api?token=***'
    """
    return _SECRET_FIELD.sub(r"\1***", _USER_INFO.sub("***@", str(text)))


class ConfigError(TrefoilError):
    """A run was configured in a way that cannot work."""


class SchemaError(TrefoilError):
    """A data set's description contradicts itself or what a model asks of it."""


class DataError(TrefoilError):
    """A log file holds what it must not, or lacks what it must hold.

    Args:
        problem: what is wrong and what to do, in one sentence.
        file: path of the offending file, if one is to blame.
        row_group: index of the Parquet row group inside the file.
        column: name of the offending column.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        row_group: int | None = None,
        column: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = file
        self.row_group = row_group
        self.column = column
        where = [
            f"{name} {value}"
            for name, value in (("file", file), ("row group", row_group), ("column", column))
            if value is not None
        ]
        super().__init__(f"{problem} ({', '.join(where)})" if where else problem)


class CheckpointError(TrefoilError):
    """A checkpoint is missing, incomplete, or of another model."""


class ArtifactError(TrefoilError):
    """A serving artifact is missing, damaged, or disagrees with its trainer."""


class RegistryError(TrefoilError):
    """The model registry cannot do what was asked; it is left as it was."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist: names the nearest one that does.

    >>> unknown("surface", "hff", ["hf", "sr"])
    "unknown surface 'hff'; did you mean 'hf'? Known: hf, sr"
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}Known: {', '.join(names) or 'none'}"
