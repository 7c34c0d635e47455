"""For the reference: doctests of a docstring are shown as code, under whichever heading. mkdocstrings loads this."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

# Doctests that stand under no heading, up to the next empty line.
BARE = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)


def as_sections(text: str) -> str:
    """A docstring whose doctests are sections of Google's style."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return BARE.sub(lambda found: "Examples:\n" + textwrap.indent(found[0], "    "), text)


class Examples(griffe.Extension):
    """Turns the docstrings that griffe has read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_sections(obj.docstring.value)
