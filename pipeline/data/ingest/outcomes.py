"""What a spec reads of an impression before its outcome is there; a spec that does is refused."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from pipeline.data.ingest.spec import IngestSpec
from pipeline.errors import unknown


def outcome_problems(spec: IngestSpec) -> Iterator[str]:
    """What the spec reads before the outcome is there, one sentence each."""
    made_from = {c: task for task, expression in spec.tasks.items() for c in _columns(spec, expression)}
    read_at_request = dict(_read_at_request(spec))
    reads = {where: _columns(spec, expression) for where, expression in read_at_request.items()}
    for where, columns in reads.items():
        for column in sorted(columns & made_from.keys()):
            yield (
                f"{where}: reads {column!r}, which task {made_from[column]!r} is made from, and no outcome is known at "
                "its request; leave it out, or name in known_at_request what of it is known before (such as a duration)"
            )
    everything = set().union(*(_columns(spec, e, through_known=True) for e in read_at_request.values()))
    for name in spec.known_at_request:
        if name not in everything:
            yield "known_at_request: " + unknown("column that a feature or key reads", name, sorted(everything))


def _read_at_request(spec: IngestSpec) -> Iterator[tuple[str, str]]:
    """Expressions on the log whose values a request already has. The others are outcomes, or count once known."""
    yield "user", spec.user
    yield "item", spec.item
    yield from ((f"features.{i} ({f.name})", f.column) for i, f in enumerate(spec.features) if f.table is None)
    yield from ((f"tables.{n}.log_key", t.log_key) for n, t in spec.tables.items())
    single = {"surface.column": spec.surface.column, "request.id": spec.request.id}
    yield from ((name, e) for name, e in single.items() if e is not None)


def _columns(spec: IngestSpec, expression: str, *, through_known: bool = False) -> set[str]:
    """Columns that an expression reads, and those that these were derived from; not what is known at the request."""
    known = set() if through_known else set(spec.known_at_request)
    derived = {n: _named(e) for n, e in spec.log.derive.items()}
    if spec.log.explode is not None:
        derived.setdefault(spec.log.explode.name, {spec.log.explode.column})
    found: set[str] = set()
    coming = _named(expression)
    while coming:
        name = coming.pop()
        if name not in found and name not in known:
            found.add(name)
            coming |= derived.get(name, set())
    return found


def _named(expression: str) -> set[str]:
    try:
        return {expression, *pl.sql_expr(expression).meta.root_names()}
    except pl.exceptions.PolarsError:
        return {expression}  # a column's name that is no SQL
