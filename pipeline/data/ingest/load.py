"""Reading a spec: parameters filled in, every problem reported at once with its path and a way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo, available_timezones

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.data.ingest.outcomes import outcome_problems
from pipeline.data.ingest.spec import FeatureSpec, IngestSpec
from pipeline.errors import ConfigError, unknown
from pipeline.schema import HISTORY_ITEM, RESERVED
from pipeline.texts import parse_yaml

_NAME = re.compile(r"[A-Za-z]\w*")  # names that begin with _ are those of our own columns
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")


def shipped_specs() -> tuple[str, ...]:
    """Names of the specs that come with Trefoil."""
    folder = resources.files("pipeline.data") / "specs"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_spec(spec: str | Path, params: Mapping[str, str] | None = None) -> IngestSpec:
    """Read a spec and fill in its parameters.

    Args:
        spec: path of a YAML file, or the name of a shipped spec.
        params: values for the spec's `parameters`.

    Raises:
        ConfigError: no such spec, not YAML, unknown or missing parameters, or fields that do not make sense;
            all of these of one kind in one message.
    """
    text = _text(spec)
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"spec {spec} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"spec {spec} must be a mapping of fields, such as `log:` and `tasks:`")
    filled = _fill(raw, _parameters(str(spec), raw, params or {}), str(spec))
    try:
        result = IngestSpec.model_validate(filled)
    except ValidationError as error:
        lines = [_sentence(e["loc"], e["type"], e["msg"]) for e in error.errors()]
        raise ConfigError(f"spec {spec} is not valid:\n  - " + "\n  - ".join(lines)) from error
    if problems := list(_problems(result)):
        raise ConfigError(f"spec {spec} contradicts itself:\n  - " + "\n  - ".join(problems))
    return result


def _text(spec: str | Path) -> bytes:
    path = Path(spec)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"there is no spec file {path}; shipped specs are: {', '.join(shipped_specs())}")
        return path.read_bytes()
    if str(spec) not in shipped_specs():
        raise ConfigError(unknown("shipped spec", str(spec), shipped_specs()) + " (or give the path of a .yaml file)")
    return (resources.files("pipeline.data") / "specs" / f"{spec}.yaml").read_bytes()


def _parameters(spec: str, raw: dict[str, Any], params: Mapping[str, str]) -> dict[str, Any]:
    declared = raw.get("parameters") or {}
    if not isinstance(declared, dict):
        return {}  # the model says what is wrong
    problems = [unknown("parameter", p, declared) for p in params if p not in declared]
    values: dict[str, Any] = {}
    for name, how in declared.items():
        how = how if isinstance(how, dict) else {}
        if name in params:
            values[name] = yaml.safe_load(params[name]) if how.get("default") is not None else params[name]
        elif "default" in how:
            values[name] = how["default"]
        else:
            hint = f" ({how['help']})" if how.get("help") else ""
            problems.append(f"parameter {name!r}{hint} is required: give {name}=VALUE")
    if problems:
        raise ConfigError(f"spec {spec}:\n  - " + "\n  - ".join(problems))
    return values


def _fill(node: Any, values: Mapping[str, Any], spec: str) -> Any:
    if isinstance(node, dict):
        return {str(k): v if k == "parameters" else _fill(v, values, spec) for k, v in node.items()}
    if isinstance(node, list):
        return [_fill(v, values, spec) for v in node]
    if isinstance(node, date):
        return node.isoformat()  # YAML reads an unquoted 2026-01-31 as a date
    if not isinstance(node, str):
        return node
    for name in _PLACEHOLDER.findall(node):
        if name not in values:
            raise ConfigError(f"spec {spec}: " + unknown("parameter", name, values))
    whole = _PLACEHOLDER.fullmatch(node)
    return values[whole[1]] if whole else _PLACEHOLDER.sub(lambda m: str(values[m[1]]), node)


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that holds the field at `loc`, for naming its fields."""
    model: Any = IngestSpec
    for part in loc[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
        while not isinstance(model, type) or hasattr(model, "__origin__"):
            models = [a for a in get_args(model) if a not in (type(None), str)]
            if not models:
                return None
            model = models[-1]
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _sentence(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    path = ".".join(str(p) for p in loc)
    model = _model_at(loc) if kind == "extra_forbidden" else None
    if model is not None:
        return f"{path}: {unknown('field', str(loc[-1]), model.model_fields)}"
    if loc == ("label_delay_s",) and kind == "missing":
        message = "state how many seconds pass until an outcome is known; there is no default"
    return f"{path}: {message}"


def _problems(spec: IngestSpec) -> Iterator[str]:
    if spec.days.timezone not in available_timezones():
        yield "days.timezone: " + unknown("time zone", spec.days.timezone, available_timezones())[:200]
    for field in ("first", "last", "candidates_from"):
        if (day := getattr(spec.days, field)) is not None and not _is_day(day):
            yield f"days.{field}: {day!r} is not a day such as 2026-01-31"
    if (spec.request.id is None) == (spec.request.gap_s is None):
        yield "request: give exactly one of id and gap_s"
    if spec.surface.column is None and set(spec.surface.map) != {"all"}:
        yield "surface.map: without surface.column it holds the one value 'all', such as {all: hf}"
    names = [f.name for f in spec.features]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"features: {name!r} is declared more than once"
    for i, f in enumerate(spec.features):
        yield from _feature_problems(spec, f, f"features.{i} ({f.name})")
    for name, v in spec.vocabularies.items():
        if v.method != "index" and v.size is None:
            yield f"vocabularies.{name}.size: method {v.method} needs a size"
        if name in {f.name for f in spec.features if f.buckets is not None}:
            yield f"vocabularies.{name}: the bucketised feature of this name has a vocabulary of its own; rename one"
    yield from outcome_problems(spec)
    yield from _history_problems(spec)
    yield from _causal_problems(spec)


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _feature_problems(spec: IngestSpec, f: FeatureSpec, at: str) -> Iterator[str]:
    if not _NAME.fullmatch(f.name):
        yield f"{at}.name: a name is letters, digits and _, and begins with a letter"
    if f.name in RESERVED or f.name in spec.tasks:
        yield f"{at}: the name is taken by a column that every log has or by a task"
    if sum((f.vocabulary is not None, f.numeric, f.buckets is not None)) != 1:
        yield f"{at}: give exactly one of vocabulary, numeric and buckets"
    if f.vocabulary is not None and f.vocabulary not in spec.vocabularies:
        yield f"{at}.vocabulary: " + unknown("vocabulary", f.vocabulary, spec.vocabularies)
    if f.table is not None and f.table not in spec.tables:
        yield f"{at}.table: " + unknown("table", f.table, spec.tables)
    if f.is_multi and f.vocabulary is None:
        yield f"{at}: only features with a vocabulary can hold several values"
    if (f.log1p or f.age) and f.vocabulary is not None:
        yield f"{at}: log1p and age are for numbers"
    if f.buckets is not None and (not f.buckets or sorted(set(f.buckets)) != f.buckets):
        yield f"{at}.buckets: edges must rise"
    for s in f.surfaces or ():
        if s not in spec.surfaces:
            yield f"{at}.surfaces: " + unknown("surface", s, spec.surfaces)


def _history_problems(spec: IngestSpec) -> Iterator[str]:
    if spec.history is None:
        return
    known = {f.name: f for f in spec.features if f.level == "candidate" and f.vocabulary_name and not f.is_multi}
    if HISTORY_ITEM not in spec.history.features:
        yield f"history.features: {HISTORY_ITEM} must name the candidate feature of the item"
    for name, feature in spec.history.features.items():
        if feature not in known:
            yield f"history.features.{name}: " + unknown("single-valued categorical candidate feature", feature, known)
        elif name == HISTORY_ITEM and (known[feature].column != spec.item or known[feature].table):
            yield f"history.features.{name}: feature {feature!r} must have the column of `item`, {spec.item!r}"


def _causal_problems(spec: IngestSpec) -> Iterator[str]:
    keys = {f.name: f for f in spec.features if f.vocabulary_name}
    names: list[str] = []
    for i, r in enumerate(spec.causal.rates):
        at = f"causal.rates.{i} ({r.name})"
        names.append(r.name)
        for k in r.keys:
            if k not in ("user", "surface") and k not in keys:
                yield f"{at}.keys: " + unknown("key", k, ["user", "surface", *keys])
        if len([k for k in r.keys if k in keys and keys[k].is_multi]) > 1:
            yield f"{at}.keys: at most one key can be multi-valued"
        if not set(r.keys) - {"surface"}:
            yield f"{at}.keys: the surface alone is the base rate; name another key"
        yield from (f"{at}.tasks: " + unknown("task", t, spec.tasks) for t in r.tasks or () if t not in spec.tasks)
    similarity = spec.causal.similarity
    if similarity is not None:
        names.append(similarity.name)
        for t in similarity.tasks or ():
            if t not in spec.tasks:
                yield "causal.similarity.tasks: " + unknown("task", t, spec.tasks)
        if spec.history is None or spec.history.earlier is None:
            yield "causal.similarity: item vectors come from history.earlier, which the spec does not have"
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"causal: {name!r} is declared more than once"


def timezone(spec: IngestSpec) -> ZoneInfo:
    """The time zone of the spec's days."""
    return ZoneInfo(spec.days.timezone)
