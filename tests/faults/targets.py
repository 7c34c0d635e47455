"""What is fuzzed: every reader of something that another process or person wrote, with valid examples to damage.

A target takes bytes and must either accept them or raise a TrefoilError; what it accepts must hold up to use. Anything
else (another error, a hang, a wrong row) is a defect.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.faults.mutations import damage_bytes, damage_json, damage_yaml

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader.

    Args:
        name: of the target and of its folder of the corpus.
        seeds: valid texts.
        damage: makes a case of a seed.
        run: reads a case; raises a TrefoilError or holds up.
        share: of all cases.
    """

    name: str
    seeds: tuple[bytes, ...]
    damage: Damage
    run: Callable[[bytes], None]
    share: float


class WrongRow(AssertionError):
    """A reader accepted what it must not, or gave something else than it was given."""


def make_targets(folder: Path, names: tuple[str, ...] | None = None) -> dict[str, Target]:
    """The targets, with their examples made in `folder`; only those of `names` if given."""
    made = {}
    for make in (
        dataset_json,
        log_file,
        recipe_json,
        sweep_space,
        rollout_plan,
        ingest_spec,
        artifact_manifest,
        artifact_signature,
        checkpoint_index,
        checkpoint_state,
        checkpoint_manifest,
        delta,
        journal_lines,
        sent_state,
        registry_record,
        program,
        scorer_rows,
    ):
        if names is None or make.__name__ in names:
            made[make.__name__] = make(folder / make.__name__)
    return made


def dataset_json(folder: Path) -> Target:
    """The description of a log; what is accepted can be read through, and every row is in the files."""
    from pipeline.config import LoaderConfig
    from pipeline.data.layout import feature_layout
    from pipeline.data.loader import Loader
    from pipeline.data.logs import DESCRIPTION, Dataset
    from tests.data.logs import write_log

    write_log(folder / "log", {"hf": 12, "sr": 6, "rp": 3})
    path = folder / "log" / DESCRIPTION
    seed = path.read_bytes()
    config = LoaderConfig(requests_per_batch=8, lanes=2, window=4, prefetch_batches=0)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        dataset = Dataset.open(folder / "log")
        for feature in dataset.schema.features:
            dataset.numeric_moments(feature.name)
        layout = feature_layout(dataset.schema, surfaces=dataset.schema.surfaces, tasks=dataset.schema.tasks)
        loader = Loader(dataset, layout, config, days=None, seed=0, rank=0, world_size=1)
        seen: Counter[tuple[str, int]] = Counter()
        for batch in loader.batches(0):
            names = [dataset.schema.surfaces[i] for i in batch.inputs.surface_of_request.tolist()]
            seen.update(key for key in zip(names, batch.request_id.tolist(), strict=True) if key[1] >= 0)
        described = sum(p.requests for p in dataset.description.partitions)
        if not len(seen) == sum(seen.values()) == described:
            raise WrongRow(f"{described} requests became {sum(seen.values())}, {len(seen)} of them different")

    return Target(name="dataset_json", seeds=(seed,), damage=damage_json, run=run, share=0.04)


def log_file(folder: Path) -> Target:
    """A Parquet file of a log, read as training reads it."""
    from pipeline.data.check import check_columns, check_table
    from pipeline.data.logs import Dataset, check_file
    from pipeline.data.rowgroups import open_parquet, read_row_group
    from tests.data.logs import write_log

    write_log(folder / "log", {"hf": 12})
    dataset = Dataset.open(folder / "log")
    file = dataset.partitions("hf")[0].files[0]
    path = dataset.root / file.path
    names = [f.name for f in dataset.schema.select(surface="hf")] + list(dataset.schema.tasks)
    with pq.ParquetFile(path) as sound:
        whole = [sound.read_row_group(i, columns=names) for i in range(sound.num_row_groups)]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        check_file(dataset.root, file)
        opened = open_parquet(dataset.root, file.path)
        try:
            check_columns(opened.schema_arrow, dataset.schema, "hf", names, file=file.path)
            for group, count in enumerate(file.row_group_rows):
                table = read_row_group(opened, group, names, count, path=file.path)
                check_table(table, dataset.schema, "hf", file=file.path, row_group=group)
                if not table.equals(whole[group]):
                    raise WrongRow("a damaged file was read as other rows")
        finally:
            opened.close()

    return Target(name="log_file", seeds=(path.read_bytes(),), damage=damage_bytes, run=run, share=0.12)


def recipe_json(folder: Path) -> Target:
    """A run's config.json; nothing that it says is left unread, and it reads back as it was."""
    from pipeline.config import config_from_json, config_to_json
    from tests.train.runs import tiny_config

    seed = config_to_json(tiny_config())

    def run(data: bytes) -> None:
        config = config_from_json(data, source="fuzz.json")
        text = config_to_json(config)
        if config_to_json(config_from_json(text, source="again.json")) != text:
            raise WrongRow("a configuration reads back as another")
        if unread := _unread(json.loads(data), json.loads(text), ""):
            raise WrongRow(f"field {unread} is silently left out")

    return Target(name="recipe_json", seeds=(seed,), damage=damage_json, run=run, share=0.38)


def _unread(given: Any, kept: Any, place: str) -> str | None:
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                return f"{place}.{name}"
            if found := _unread(value, kept[name], f"{place}.{name}"):
                return found
    return None


def sweep_space(folder: Path) -> Target:
    from pipeline.sweep.space import read_space
    from tests.sweep.test_study import CONFIG, SPACE

    folder.mkdir(parents=True)

    def run(data: bytes) -> None:
        (folder / "space.yaml").write_bytes(data)
        read_space(folder / "space.yaml", CONFIG)

    return Target(name="sweep_space", seeds=(SPACE.encode(),), damage=damage_yaml, run=run, share=0.05)


def rollout_plan(folder: Path) -> Target:
    """A plan; what is accepted is written and read back as the same."""
    from pipeline.rollout.plan import plan_text, read_plan
    from tests.rollout.plans import plan

    folder.mkdir(parents=True)
    seed = plan_text(plan()).encode()

    def run(data: bytes) -> None:
        (folder / "plan.yaml").write_bytes(data)
        found = read_plan(folder / "plan.yaml")
        (folder / "again.yaml").write_text(plan_text(found), encoding="utf-8")
        if read_plan(folder / "again.yaml").digest != found.digest:
            raise WrongRow("a plan reads back as another")

    return Target(name="rollout_plan", seeds=(seed,), damage=damage_yaml, run=run, share=0.015)


def ingest_spec(folder: Path) -> Target:
    from pipeline.data.ingest import load_spec
    from tests.data.ingest_logs import CAUSAL, spec_with

    folder.mkdir(parents=True)
    specs = Path(__file__).parents[2] / "pipeline" / "data" / "specs"
    seeds = (
        yaml.safe_dump(spec_with(causal=CAUSAL)).encode(),
        *(path.read_bytes() for path in sorted(specs.glob("*.yaml"))),
    )

    def run(data: bytes) -> None:
        (folder / "spec.yaml").write_bytes(data)
        load_spec(folder / "spec.yaml", {"root": str(folder)})

    return Target(name="ingest_spec", seeds=seeds, damage=damage_yaml, run=run, share=0.008)


def artifact_manifest(folder: Path) -> Target:
    """The manifest of an artifact; what it accepts lies in the folder and is what it says."""
    from pipeline.serve.artifact import MANIFEST, check_folder, write_manifest

    folder.mkdir(parents=True)
    for name in ("model.pt2", "signature.json"):
        (folder / name).write_bytes(name.encode())
    write_manifest(folder, {"torch": "2.13.0"})
    seed = (folder / MANIFEST).read_bytes()

    def run(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        manifest, _ = check_folder(folder, ("model.pt2",), what="artifact")
        for name in manifest.files:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise WrongRow(f"{name} lies outside")

    return Target(name="artifact_manifest", seeds=(seed,), damage=damage_json, run=run, share=0.12)


def artifact_signature(folder: Path) -> Target:
    """The signature of an artifact; what is accepted can be asked for its columns."""
    from pipeline.schema import Level
    from pipeline.serve.signature import read_signature, signature_to_json

    folder.mkdir(parents=True)
    seed = signature_to_json(_signature())

    def run(data: bytes) -> None:
        (folder / "signature.json").write_bytes(data)
        found = read_signature(folder / "signature.json")
        for level in Level:
            found.columns(level)
        assert found.single_ids is not None
        assert found.sizes is not None
        assert found.bulk_checked is not None

    return Target(name="artifact_signature", seeds=(seed,), damage=damage_json, run=run, share=0.05)


def _task_and_plan() -> Any:
    from pipeline.train.build import model_plan
    from tests.data.logs import schema
    from tests.train.runs import tiny_config

    of = schema()
    moments = {f.name: (0.0, 1.0) for f in of.features if f.vocabulary is None}
    return model_plan(tiny_config(), of, moments)


def _served(surface: str = "hf") -> Any:
    import torch

    from pipeline.serve.export import serving_model
    from pipeline.train.build import build_task

    plan = replace(_task_and_plan(), keep=(surface,))
    torch.manual_seed(0)
    return plan, serving_model(plan, build_task(plan, table_device=torch.device("cpu")).model, "fp32")


def _signature() -> Any:
    from pipeline.serve.export import example_tensors, signature_of
    from pipeline.serve.program import input_specs

    plan, served = _served()
    signature = signature_of(plan, served, "hf", 6)
    return replace(signature, inputs=input_specs(example_tensors(signature)))


def checkpoint_index(folder: Path) -> Target:
    """DCP's index, a pickle: nothing it names is called."""
    import torch
    import torch.distributed.checkpoint as dcp

    from pipeline.train.checkpoint.files import HashedFiles
    from pipeline.train.checkpoint.shards import Reader, Writer

    tensors = {"a": torch.arange(6.0).view(2, 3), "b": {"c": torch.ones(4)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        dcp.save(tensors, storage_writer=Writer(str(folder), HashedFiles()), no_dist=True)
    seed = (folder / ".metadata").read_bytes()

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "ran",)

    def damage(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.05:
            return pickle.dumps(Bomb())
        return damage_bytes(data, rng)

    def run(data: bytes) -> None:
        (folder / ".metadata").write_bytes(data)
        try:
            metadata = Reader(str(folder)).read_metadata()
        finally:
            if (folder / "ran").exists():
                raise WrongRow("the index ran code")
        for entry in metadata.storage_data.values():
            if "/" in entry.relative_path:
                raise WrongRow("the index names a file outside")

    return Target(name="checkpoint_index", seeds=(seed,), damage=damage, run=run, share=0.004)


def checkpoint_state(folder: Path) -> Target:
    """A checkpoint's state.json; what is accepted names its own folder and describes a model."""
    from pipeline.train.checkpoint.state import CheckpointState, read_state, state_to_json

    folder.mkdir(parents=True)
    plan = _task_and_plan()
    state = CheckpointState(
        format_version=3,
        config=plan.config,
        schema=plan.schema,
        moments=dict(plan.moments),
        dataset="0" * 16,
        training_days=("2026-01-01",),
        epoch=0,
        step=3,
        days_done={},
    )
    for name in (".metadata", "manifest.json"):
        (folder / name).write_bytes(b"{}")

    def run(data: bytes) -> None:
        (folder / "state.json").write_bytes(data)
        found = read_state(folder)
        if "/" in found.name or found.plan.config != found.config:
            raise WrongRow("the state names a folder elsewhere")

    return Target(name="checkpoint_state", seeds=(state_to_json(state),), damage=damage_json, run=run, share=0.04)


def checkpoint_manifest(folder: Path) -> Target:
    from pipeline.train.checkpoint.files import MANIFEST, digest, verify, write_manifest

    folder.mkdir(parents=True)
    for name in ("rank-0.safetensors", ".metadata", "state.json"):
        (folder / name).write_bytes(name.encode())
    write_manifest(folder, {p.name: digest(p) for p in folder.iterdir()})
    seed = (folder / MANIFEST).read_bytes()

    def run(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        verify(folder)

    return Target(name="checkpoint_manifest", seeds=(seed,), damage=damage_json, run=run, share=0.08)


def delta(folder: Path) -> Target:
    """A delta's description and tensors, applied to weights; it gives what it promises or nothing."""
    import torch

    from pipeline.serve.artifact import write_manifest
    from pipeline.serve.delta import DELTA, TENSORS, changed_tensors, read_delta, weights_digest, write_delta
    from pipeline.serve.tables import is_table

    folder.mkdir(parents=True)
    name = "tables.rows_4"
    assert is_table(name)
    base = {name: torch.zeros(5, 4), "dense": torch.ones(3)}
    new = {name: base[name].clone().index_fill_(0, torch.tensor([1, 3]), 2.0), "dense": torch.zeros(3)}
    write_delta(folder, surface="hf", dtype="fp32", base=base, new=new)
    description, tensors = (folder / DELTA).read_bytes(), (folder / TENSORS).read_bytes()
    state, result = weights_digest(base), weights_digest(new)

    def damage(data: bytes, rng: random.Random) -> bytes:
        text, _, rest = data.partition(b"\0\0")
        return (
            damage_json(text, rng) + b"\0\0" + rest if rng.random() < 0.5 else text + b"\0\0" + damage_bytes(rest, rng)
        )

    def run(data: bytes) -> None:
        text, _, rest = data.partition(b"\0\0")
        (folder / DELTA).write_bytes(text)
        (folder / TENSORS).write_bytes(rest)
        write_manifest(folder, {})
        found = read_delta(folder)
        changed = changed_tensors(folder, found, base, state)
        if weights_digest({**base, **changed}) != found.result:
            raise WrongRow("a delta gives other weights than it promises")

    assert result != state
    return Target(name="delta", seeds=(description + b"\0\0" + tensors,), damage=damage, run=run, share=0.02)


def journal_lines(folder: Path) -> Target:
    from pipeline.tracking.journal import JOURNAL, Journal, entries

    writer = Journal(folder)
    writer.append("run", key="k", name="n", experiment="e", parent=None, uri=None)
    writer.append("metrics", step=1, values={"a": 1.0})
    writer.append("finished", status="FINISHED")
    writer.close()
    seed = (folder / JOURNAL).read_bytes()

    def damage(data: bytes, rng: random.Random) -> bytes:
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = damage_json(lines[at], rng) + (b"\n" if rng.random() < 0.9 else b"")
        return b"".join(lines)

    def run(data: bytes) -> None:
        (folder / JOURNAL).write_bytes(data)
        for entry, _ in entries(folder):
            if not isinstance(entry["kind"], str) or not isinstance(entry["ms"], int):
                raise WrongRow("an entry without kind and time was taken")

    return Target(name="journal_lines", seeds=(seed,), damage=damage, run=run, share=0.05)


def sent_state(folder: Path) -> Target:
    from pipeline.tracking.journal import STATE, State, read_state, write_state

    folder.mkdir(parents=True)
    write_state(folder, State(offset=120, run_id="abc"))

    def run(data: bytes) -> None:
        (folder / STATE).write_bytes(data)
        found = read_state(folder)
        if not isinstance(found.offset, int) or found.offset < 0:
            raise WrongRow("a state without an offset was taken")

    return Target(name="sent_state", seeds=((folder / STATE).read_bytes(),), damage=damage_json, run=run, share=0.03)


def registry_record(folder: Path) -> Target:
    """A change as it stands in the registry's tags."""
    from pipeline.rollout import audit
    from tests.rollout.models import evidence

    record = audit.begin(
        "promote", "hf", {"champion": 1}, {"champion": 2}, actor="a", evidence=evidence("hf"), reason="r"
    )

    def run(data: bytes) -> None:
        found = audit.load_record(data.decode("utf-8", "replace"), where="tag")
        assert found.age_s is not None
        assert audit.load_record(audit.dump(found), where="tag") == found

    seed = audit.dump(record).encode()
    return Target(name="registry_record", seeds=(seed,), damage=damage_json, run=run, share=0.05)


def program(folder: Path) -> Target:
    """An artifact's program: whatever is in its archive, vetting it ends in a graph of ours or an ArtifactError."""
    import zipfile

    from pipeline.serve.export import example_tensors
    from pipeline.serve.program import export_program, save_program
    from pipeline.serve.vetting import vet_program

    folder.mkdir(parents=True)
    _, served = _served()
    save_program(export_program(served, example_tensors(_signature())), folder / "model.pt2")
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        parts = {n: archive.read(n) for n in archive.namelist()}
    graph = next(n for n in parts if n.endswith("models/model.json"))
    whole = (folder / "model.pt2").read_bytes()

    def damage(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return damage_bytes(data, rng)
        changed = dict(parts)
        name = graph if rng.random() < 0.7 else rng.choice(list(parts))
        changed[name] = damage_json(parts[name], rng) if name.endswith(".json") else damage_bytes(parts[name], rng)
        if rng.random() < 0.1:
            changed[rng.choice(("model/data/aotinductor/model/x.so", "version", "model/extra/x"))] = b"x"
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for n, content in changed.items():
                archive.writestr(n, content)
        return out.getvalue()

    def run(data: bytes) -> None:
        (folder / "case.pt2").write_bytes(data)
        vet_program(folder / "case.pt2")

    return Target(name="program", seeds=(whole,), damage=damage, run=run, share=0.002)


def scorer_rows(folder: Path) -> Target:
    """Rows for a scorer, as bytes of an Arrow stream: refused, or scored the same in another order of rows."""
    import torch

    from pipeline.serve.example import made_up_requests
    from pipeline.serve.scorer import Scorer

    folder.mkdir(parents=True)
    _, served = _served()
    signature = _signature()

    class Eager:
        device = torch.device("cpu")

        def __call__(self, tensors: Any) -> Any:
            return served(dict(tensors))

    scorer = Scorer(signature, Eager())  # type: ignore[arg-type]
    grouped = made_up_requests(signature.schema, "hf", candidates=[3, 1, 2, 0], history=[2, 0, 5, 1])
    flat = _flat(grouped, signature)

    def damage(data: bytes, rng: random.Random) -> bytes:
        return _to_bytes(_damage_table(_from_bytes(data), rng))

    def run(data: bytes) -> None:
        table = _from_bytes(data)
        found = scorer.score(table)
        if found.num_rows != table.num_rows:
            raise WrongRow("another number of rows came back")
        order = np.random.default_rng(0).permutation(table.num_rows)
        again = scorer.score(table.take(pa.array(order)))
        for task in signature.tasks:
            first, second = found[task].take(pa.array(order)).to_pylist(), again[task].to_pylist()
            for a, b in zip(_numbers(first), _numbers(second), strict=True):
                if not (0 <= a <= 1 and abs(a - b) < 1e-5):
                    raise WrongRow(f"a row's probability is {a}, and {b} in another order")

    seeds = (_to_bytes(grouped), _to_bytes(flat))
    return Target(name="scorer_rows", seeds=seeds, damage=damage, run=run, share=0.002)


def _numbers(values: list[Any]) -> list[float]:
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def _flat(table: pa.Table, signature: Any) -> pa.Table:
    from pipeline.schema import Level

    candidate = list(signature.columns(Level.CANDIDATE))
    rows = []
    for row in table.to_pylist():
        for i in range(len(row[candidate[0]])):
            rows.append({n: v[i] if n in candidate else v for n, v in row.items()})
    fields = [pa.field(f.name, f.type.value_type if f.name in candidate else f.type) for f in table.schema]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as stream:
        return stream.read_all()


def _damage_table(table: pa.Table, rng: random.Random) -> pa.Table:
    """Columns dropped, of other types, with nulls, swapped, out of range; rows doubled, dropped and shuffled."""
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(table.column_names)
        at = table.column_names.index(name)
        values = table[name].to_pylist()
        match rng.randrange(8):
            case 0 if table.num_columns > 1:
                table = table.drop_columns([name])
            case 1 if values:
                table = _with(table, at, name, _replaced(values, rng))
            case 2:
                table = table.take(pa.array([rng.randrange(table.num_rows) for _ in range(table.num_rows)], pa.int64()))
            case 3:
                table = table.slice(rng.randrange(table.num_rows + 1))
            case 4:
                other = rng.choice(table.column_names)
                table = table.set_column(at, name, table[other])
            case 5:
                kind = rng.choice(
                    (pa.string(), pa.int8(), pa.float64(), pa.bool_(), pa.null(), pa.large_list(pa.int64()))
                )
                try:
                    table = table.set_column(at, name, table[name].cast(kind))
                except pa.ArrowException:
                    table = table.set_column(at, name, pa.nulls(table.num_rows, kind))
            case 6:
                table = pa.concat_tables([table, table.slice(0, rng.randint(0, table.num_rows))])
            case _:
                table = table.append_column(f"extra{table.num_columns}", pa.nulls(table.num_rows))
        if table.num_rows == 0:
            break
    return table


def _replaced(values: list[Any], rng: random.Random) -> list[Any]:
    i = rng.randrange(len(values))
    value = values[i]
    nasty = rng.choice((None, -1, 0, 10**6, 2**62, -(2**40), float("nan"), float("inf"), 1e30, 0.5))
    if isinstance(value, list):
        at = rng.randrange(len(value) + 1)
        value = rng.choice((None, [], [*value, nasty], [*value[:at], nasty, *value[at + 1 :]], value[:at]))
    else:
        value = nasty
    return [*values[:i], value, *values[i + 1 :]]


def _with(table: pa.Table, at: int, name: str, values: list[Any]) -> pa.Table:
    try:
        return table.set_column(at, name, pa.array(values, table.schema.field(at).type))
    except (pa.ArrowException, OverflowError, TypeError):
        try:
            return table.set_column(at, name, pa.array(values))
        except (pa.ArrowException, OverflowError, TypeError):
            return table
