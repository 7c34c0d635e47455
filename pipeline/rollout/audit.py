"""Who changed what serves, when, and on which evidence: records kept in the registry itself, beside the aliases.

A change is written down before its first alias moves (the *intent*) and after the last one did (the *record*), as tags
of the registered model. So whoever comes next, on any machine, sees what was under way when a process died.
"""

from __future__ import annotations

import socket
import time
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.errors import RegistryError
from pipeline.tracking.names import user_name

Action = Literal["register", "nominate", "promote", "rollback", "withdraw"]
Outcome = Literal["done", "completed by recovery", "undone by recovery"]
INTENT = "trefoil.intent"
EVIDENCE = "trefoil.evidence"
_RECORD = "trefoil.audit."
_STRICT = ConfigDict(extra="forbid")


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a decision rests on, short enough to stand at the version that it judges.

    Args:
        surface: that was judged.
        artifact: digest of the artifact that was judged.
        dataset: fingerprint of the log that it was judged on.
        plan: digest of the plan whose thresholds decided.
        wave: of the plan.
        champion: version that it was compared with; None where there was none.
        passed: whether every gate passed.
        run: MLflow run that holds it whole.
        sha256: of the whole, `evidence.json` of that run.
    """

    surface: str
    artifact: str
    dataset: str
    plan: str
    wave: int
    champion: int | None
    passed: bool
    run: str
    sha256: str


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Record:
    """One change of a surface's aliases.

    Args:
        id: unique, sorts by time.
        time: ISO, UTC.
        actor: who asked for it.
        host: machine that it was made on.
        action: what was asked for.
        surface: whose aliases.
        before: version by alias.
        after: version by alias, as it was to become.
        evidence: that it rests on; None for changes that need none.
        reason: in words.
        outcome: whether the process that began it also ended it.
    """

    id: str
    time: str
    actor: str
    host: str
    action: Action
    surface: str
    before: dict[str, int]
    after: dict[str, int]
    evidence: Evidence | None = None
    reason: str = ""
    outcome: Outcome = "done"

    @property
    def tag(self) -> str:
        """Name of the tag that keeps it."""
        return _RECORD + self.id

    @property
    def age_s(self) -> float:
        """Seconds since it was begun."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.time)).total_seconds()

    def ended(self, outcome: Outcome) -> Record:
        """The record with how it ended; an undone change leaves the aliases as they were."""
        return replace(self, outcome=outcome, after=self.before if outcome == "undone by recovery" else self.after)


_RECORDS = TypeAdapter(Record)
_EVIDENCE = TypeAdapter(Evidence)


def begin(
    action: Action,
    surface: str,
    before: dict[str, int],
    after: dict[str, int],
    *,
    actor: str | None,
    evidence: Evidence | None,
    reason: str,
) -> Record:
    """The record of a change that is about to be made."""
    return Record(
        id=f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}",
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        actor=actor or user_name(),
        host=socket.gethostname(),
        action=action,
        surface=surface,
        before=dict(before),
        after=dict(after),
        evidence=evidence,
        reason=reason,
    )


def dump(record: Record | Evidence) -> str:
    """As a tag's value."""
    adapter: TypeAdapter = _RECORDS if isinstance(record, Record) else _EVIDENCE
    return adapter.dump_json(record, exclude_defaults=True).decode()


def load_record(text: str, *, where: str) -> Record:
    """A record read back.

    Raises:
        RegistryError: the tag was written by someone else.
    """
    record: Record = _load(_RECORDS, text, where)
    try:
        record.age_s  # noqa: B018  a time without a zone cannot be held against ours
    except (ValueError, TypeError) as error:
        raise RegistryError(f"the tag {where} of the registry is damaged: time: {error}") from error
    return record


def load_evidence(text: str, *, where: str) -> Evidence:
    """Evidence read back.

    Raises:
        RegistryError: the tag was written by someone else.
    """
    return _load(_EVIDENCE, text, where)


def records(tags: dict[str, str]) -> list[Record]:
    """The records among a registered model's tags, oldest first."""
    return [load_record(tags[name], where=name) for name in sorted(tags) if name.startswith(_RECORD)]


def _load(adapter: TypeAdapter, text: str, where: str):  # type: ignore[no-untyped-def]
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise RegistryError(f"the tag {where} of the registry is damaged: {error.errors()[0]['msg']}") from error
