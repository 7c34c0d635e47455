"""The checksum that a description carries of itself: `{"sha256": "...", ...}`, of all that follows it.

A flipped digit in `dataset.json` mostly leaves a valid description of another log. Who edits one by hand takes the
line away; damage cannot, as any other name in its place is an unknown field.
"""

from __future__ import annotations

import hashlib
import re

_SEAL = re.compile(rb'\{\s*"sha256": "([0-9a-f]{64})",')


def sealed(text: bytes) -> bytes:
    """A JSON object with its checksum before all other fields."""
    assert text.startswith(b"{"), "a description is a JSON object"
    return b'{\n "sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'",' + text[1:]


def unsealed(text: bytes) -> bytes:
    """The JSON object without its checksum; one that has none is given back as it is.

    Raises:
        ValueError: the checksum is not that of the rest.
    """
    seal = _SEAL.match(text)
    if seal is None:
        return text
    rest = b"{" + text[seal.end() :]
    if hashlib.sha256(rest).hexdigest().encode() != seal[1]:
        raise ValueError(
            "its checksum is another, so it was damaged or edited; restore it or write the log anew. After an edit "
            'on purpose, remove the line "sha256"'
        )
    return rest
