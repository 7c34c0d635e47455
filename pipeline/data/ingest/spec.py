"""The ingest spec: what a flat impression log means, as checked objects.

A spec is YAML; `pipeline.data.ingest.load` reads it. Fields named `column`, `log_key`, `key`, and so on hold
an expression of Polars' SQL (often only a column's name), evaluated on the file's columns. docs/data.md
is the reference with examples.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Expression = Annotated[str, Field(min_length=1)]
Surfaces = list[str] | None
Statistic = Literal["rate", "count", "ewma", "last", "recency"]
STATISTICS: tuple[Statistic, ...] = ("rate", "count", "ewma", "last", "recency")


class Model(BaseModel):
    """Base: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Parameter(Model):
    """A value that the caller gives as `name=value`; without a default it is required."""

    default: str | int | float | None = None
    help: str = ""


class Explode(Model):
    """Turn one row that holds a list of impressions into one row an impression.

    Args:
        column: the column that holds the list.
        separator: what separates the entries when the column is text.
        name: column of the entry.
        position: column of the entry's place in the list, from 0.
    """

    column: str
    separator: str | None = None
    name: str
    position: str | None = None


class Files(Model):
    """Flat files of one shape.

    Args:
        files: paths or globs, relative to the current folder; `${parameter}` is replaced.
        format: csv or parquet; by the file's ending when left out.
        separator, quote, header, column_names, null_values: for CSV. `column_names` names the columns of
            files without a header.
        types: types of CSV columns where guessing from the first rows is not enough.
        explode: a list column to turn into rows; comes before `derive`.
        derive: new columns by expression, in order; a later one may use an earlier one.
    """

    files: list[str] = Field(min_length=1)
    format: Literal["csv", "parquet"] | None = None
    separator: str = ","
    quote: str | None = '"'
    header: bool = True
    column_names: list[str] | None = None
    null_values: list[str] = []
    types: dict[str, Literal["int", "float", "text"]] = {}
    explode: Explode | None = None
    derive: dict[str, Expression] = {}


class Table(Files):
    """A side table, small enough for memory, one row a key.

    Args:
        key: expression on the table's columns.
        log_key: expression on the log's columns that names the row.
    """

    key: Expression
    log_key: Expression


class Time(Model):
    """When an impression happened.

    Args:
        column: a number since 1970 in `unit`, or text in `format`.
        unit: of the number.
        format: strftime format of the text; it is then local time of `days.timezone`.
    """

    column: Expression
    unit: Literal["s", "ms", "us"] = "ms"
    format: str | None = None


class Surface(Model):
    """Which product surface a row is of.

    Args:
        column: expression; left out when the log is all of one surface (`map` then has one value, "all").
        map: raw value to surface. Their order is the canonical order of surfaces.
        others: rows of other values are never candidates; `history` lets them feed histories and rates,
            `drop` drops them.
    """

    column: Expression | None = None
    map: dict[str, str] = Field(min_length=1)
    others: Literal["history", "drop"]


class Request(Model):
    """What makes one request. Requests never reach over midnight.

    Args:
        id: expression for the request's id; ids that are not whole numbers are hashed to 63 bits.
        gap_s: without `id`: rows of one user and surface belong together while no more than this many
            seconds lie between neighbours; 0 makes each impression a request of its own.
        position: expression for an impression's place within the request; else order of time and item.
    """

    id: Expression | None = None
    gap_s: float | None = Field(default=None, ge=0)
    position: Expression | None = None


class Days(Model):
    """Which days are read, in local time.

    Args:
        timezone: IANA name; a day begins at its midnight.
        first, last: ISO days; rows outside are dropped. None has no bound.
        candidates_from: earlier days feed histories and rates only.
    """

    timezone: str
    first: str | None = None
    last: str | None = None
    candidates_from: str | None = None


class VocabularySpec(Model):
    """An id space.

    Args:
        method: `index` (a stored list of keys, id 0 unknown), `hash` (1 + hash mod size-1; 0 unknown) or
            `given` (ids as they come, below `size`).
        size: number of ids. Left out with `index`: as many as the data hold. Given with `index`: later
            keys than fit become unknown.
    """

    method: Literal["index", "hash", "given"]
    size: int | None = Field(default=None, ge=2)


class Age(Model):
    """Time between a date or time of the item and the request, never negative.

    Args:
        unit: of the age.
        format: strftime format where the column is text, in local time; else it is milliseconds since 1970.
    """

    unit: Literal["day", "hour"] = "day"
    format: str | None = None


class FeatureSpec(Model):
    """One column of the log to be. Exactly one of `vocabulary`, `numeric` and `buckets` says what it is.

    Args:
        name: of the column.
        level: request (the value of the request's first impression) or candidate.
        column: expression on the log's columns, or on those of `table`.
        table: side table to look the value up in.
        vocabulary: makes it categorical.
        multi_valued: the column holds lists of keys.
        separator: the column holds keys as text with this between them; implies `multi_valued`.
        numeric: makes it a number.
        buckets: rising edges; makes it categorical, id 1 + the number of edges at or below the value.
        log1p: take log(1 + value) of a number at least 0.
        age: the column is a point in time, the value how long ago that is.
        surfaces: those that have the feature; all when left out.
    """

    name: str
    level: Literal["request", "candidate"]
    column: Expression
    table: str | None = None
    vocabulary: str | None = None
    multi_valued: bool = False
    separator: str | None = None
    numeric: bool = False
    buckets: list[float] | None = None
    log1p: bool = False
    age: Age | None = None
    surfaces: Surfaces = None

    @property
    def is_multi(self) -> bool:
        return self.multi_valued or self.separator is not None

    @property
    def vocabulary_name(self) -> str | None:
        """The id space; a bucketised number has one of its own, by its own name."""
        return self.name if self.buckets is not None else self.vocabulary


class Earlier(Files):
    """What users saw before the log begins, with unknown outcomes.

    Args:
        user: expression.
        items: a list column, or text with `item_separator`; oldest first.
        item_separator: see `items`.
        last_time: expression, milliseconds since 1970, of the newest event. All events of the user get
            this time, the latest that each can have. Without it nothing is known but that they came before
            the user's first impression: they get the latest time that the label delay lets that see.
    """

    user: Expression
    items: Expression
    item_separator: str | None = None
    last_time: Expression | None = None


class History(Model):
    """The user's earlier impressions.

    Args:
        length: the most events of a request.
        features: history column to the candidate feature it repeats; `history_item` is required.
        where: only impressions for which this expression on the log holds (such as `click = 1`) are events.
            It may name outcomes: events count only once their label delay has passed.
        earlier: optional table of the time before the log.
    """

    length: int = Field(ge=1)
    features: dict[str, str]
    where: Expression | None = None
    earlier: Earlier | None = None


class Rate(Model):
    """Features made from earlier outcomes of rows that agree with a candidate in `keys`.

    Args:
        name: prefix of the features.
        keys: any of "user", "surface" and categorical features.
        tasks: all when left out.
        statistics: `rate` (residual against the surface's base rate, shrunk to 0), `count` (log(1 + events)),
            `ewma` (of residuals, starting at 0), `last` (outcome of the newest event), `recency`
            (log(1 + seconds since the newest event)).
        strength: events of residual 0 that `rate` is shrunk with.
        ewma_weight: weight of the newest event.
    """

    name: str
    keys: list[str] = Field(min_length=1)
    tasks: list[str] | None = None
    statistics: list[Statistic] = list(STATISTICS)
    strength: float = Field(default=5.0, gt=0)
    ewma_weight: float = Field(default=0.2, gt=0, le=1)


class Session(Model):
    """Place in the session: `session_position` earlier impressions of the session and the log of seconds
    since the user's last impression, `session_recency`. No outcome enters, so no label delay applies.

    Args:
        gap_s: a pause longer than this begins a session.
    """

    gap_s: float = Field(gt=0)


class Similarity(Model):
    """Rate of the user's earlier outcomes, each weighted by how alike its item is to the candidate.

    Likeness is the cosine of item vectors, which come from `history.earlier` alone (items that the same
    users saw): nothing of the log's own days enters them.

    Args:
        name: prefix of the features.
        dimension: of the vectors.
        power: weight = max(cosine, 0) ** power.
        events: how many of the user's newest known events are weighed.
        strength: total weight of events of residual 0 that the rate is shrunk with.
        tasks: all when left out.
    """

    name: str = "similar"
    dimension: int = Field(default=32, ge=2)
    power: float = Field(default=2.0, gt=0)
    events: int = Field(default=50, ge=1)
    strength: float = Field(default=1.0, gt=0)
    tasks: list[str] | None = None


class Causal(Model):
    """Features from labels, point in time.

    Args:
        base_resolution_s: base rates are known up to the last full step of this length.
        rates, session, similarity: the features.
    """

    base_resolution_s: int = Field(default=60, ge=1)
    rates: list[Rate] = []
    session: Session | None = None
    similarity: Similarity | None = None


class IngestSpec(Model):
    """A whole spec. `label_delay_s` has no default: how long an outcome takes to be known must be stated.

    Columns that tasks are made from hold outcomes, which features may not read, but for those that `known_at_request`
    names: what a derived column of that name came from is not looked at.
    """

    name: str
    description: str = ""
    parameters: dict[str, Parameter] = {}
    log: Files
    tables: dict[str, Table] = {}
    user: Expression
    item: Expression
    time: Time
    surface: Surface
    request: Request
    tasks: dict[str, Expression] = Field(min_length=1)
    known_at_request: list[str] = []
    weight: Expression | None = None
    label_delay_s: float = Field(ge=0)
    days: Days
    vocabularies: dict[str, VocabularySpec] = {}
    features: list[FeatureSpec] = []
    history: History | None = None
    causal: Causal = Causal()

    @property
    def surfaces(self) -> tuple[str, ...]:
        """Surface names in canonical order."""
        return tuple(dict.fromkeys(self.surface.map.values()))

    @property
    def delay_ms(self) -> int:
        return round(self.label_delay_s * 1000)

    def feature(self, name: str) -> FeatureSpec:
        """The feature called `name`; cross-checks have made sure that it exists."""
        return next(f for f in self.features if f.name == name)


class TurnedSpec(IngestSpec):
    """A spec by which outcomes from a time on read 1 less what they are, and 1 where there is none; see `find_leaks`.

    Args:
        turned_from_ms: milliseconds since 1970.
    """

    turned_from_ms: int
