"""What all parts of a configuration share."""

from __future__ import annotations

from pydantic import ConfigDict

# A field that nobody knows is an error, not a knob that turns nothing.
STRICT = ConfigDict(extra="forbid")
