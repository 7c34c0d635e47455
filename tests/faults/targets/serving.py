"""What is served: artifacts, their programs, deltas, and the rows to score."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.faults.mutations import damage_bytes, damage_json
from tests.faults.targets.base import Target, WrongRow, task_and_plan


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
    seed = signature_to_json(small_signature())

    def run(data: bytes) -> None:
        (folder / "signature.json").write_bytes(data)
        found = read_signature(folder / "signature.json")
        for level in Level:
            found.columns(level)
        assert found.single_ids is not None
        assert found.sizes is not None
        assert found.bulk_checked is not None

    return Target(name="artifact_signature", seeds=(seed,), damage=damage_json, run=run, share=0.05)


def served_model(surface: str = "hf") -> Any:
    """The plan and the serving model of a surface, untrained."""
    import torch

    from pipeline.serve.export import serving_model
    from pipeline.train.build import build_task

    plan = replace(task_and_plan(), keep=(surface,))
    torch.manual_seed(0)
    return plan, serving_model(plan, build_task(plan, table_device=torch.device("cpu")).model, "fp32")


def small_signature() -> Any:
    """The signature of its artifact."""
    from pipeline.serve.export import example_tensors, signature_of
    from pipeline.serve.program import input_specs

    plan, served = served_model()
    signature = signature_of(plan, served, "hf", 6)
    return replace(signature, inputs=input_specs(example_tensors(signature)))


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


def program(folder: Path) -> Target:
    """An artifact's program: whatever is in its archive, vetting it ends in a graph of ours or an ArtifactError."""
    import zipfile

    from pipeline.serve.export import example_tensors
    from pipeline.serve.program import export_program, save_program
    from pipeline.serve.vetting import vet_program

    folder.mkdir(parents=True)
    _, served = served_model()
    save_program(export_program(served, example_tensors(small_signature())), folder / "model.pt2")
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
    _, served = served_model()
    signature = small_signature()

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
