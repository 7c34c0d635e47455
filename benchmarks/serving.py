"""Serving: request-level broadcasting, compiled against eager, quantised tables, one surface against the whole.

    python -m benchmarks.serving [--quick] [--run CHECKPOINT DATA]...

One thread, processor time (so that neighbours on the machine weigh less), rounds interleaved. The model is that of the
recipe `demo` on simulated logs with histories of 128 events, untrained: times do not depend on the weights' values.

- `speedup_cN_h128`: rows of requests with N candidates each through the whole scorer (from Arrow, compiled),
  as requests, over the same rows each as a request of its own; `max_abs_diff` is the largest difference of the two.
- `eager_p99_over_compiled_p99`: the eager model of the surface over the compiled artifact, 200 candidates of one
  request; `*_ms` are percentiles of each, beside the uncompiled artifact and the whole unified model in eager mode.
- `fp32_over_int8_bytes`, `fp32_over_int4_bytes`: bytes of all tables of the surface; `fp32_over_int8_time` likewise.
- `surface_over_separate_latency`: the surface's artifact out of the unified model over that of a model of this surface
  alone with the same blocks and settings, 64 candidates, medians of ratios within rounds.
- `whole_over_surface_flops`: operations of the unified model over the artifact's, on the same request.
- With `--run`: for each surface of a trained checkpoint and each type of table values, AUC and calibration on the log's
  last day less the trainer's, and the largest difference of a probability. Left out where no run is given.

What it does not show: a GPU, concurrent callers, real traffic's popular ids, latency under load.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.common import Report, interleaved, median_ratio, ratio_interval
from pipeline.config import RunConfig
from pipeline.data.assemble import assemble_inputs
from pipeline.data.block import RequestBlock, block_from_arrow, columns_of
from pipeline.data.logs import Dataset, arrow_schema
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.recipes.demo import demo
from pipeline.schema import REQUEST_ID, DatasetSchema, Level
from pipeline.serve import parity
from pipeline.serve.example import made_up_requests
from pipeline.serve.export import example_tensors, serving_model, signature_of
from pipeline.serve.program import compile_program, export_program, input_specs, save_program
from pipeline.serve.pruning import flops, table_shapes
from pipeline.serve.rows import to_requests
from pipeline.serve.runtime import CompiledProgram, GraphProgram, load_program
from pipeline.serve.scorer import Scorer, bounded
from pipeline.serve.signature import Signature
from pipeline.serve.tables import TableDtype
from pipeline.serve.trained import TrainedModel
from pipeline.train import checkpoint as checkpoints
from pipeline.train.build import build_model
from pipeline.train.model_plan import ModelPlan
from pipeline.train.quiet import quiet_dependencies

SURFACE, HISTORY = "hf", 128
CANDIDATES = (1, 8, 64, 512)
ROWS = 512  # of a speed-up: as many requests as that makes
CPU = torch.device("cpu")
DTYPES: tuple[TableDtype, ...] = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Made:
    """An untrained surface's artifact in memory, and the eager model that it came from."""

    signature: Signature
    eager: torch.nn.Module
    graph: GraphProgram
    compiled: CompiledProgram | None
    table_bytes: int
    dense_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; under a minute on an idle machine")
    parser.add_argument("--run", nargs=2, action="append", default=[], metavar=("CHECKPOINT", "DATA"), type=Path)
    args = parser.parse_args()
    rounds, calls = (5, 200) if args.quick else (15, 1000)
    torch.set_num_threads(1)
    quiet_dependencies()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        log = simulate(at / "log", SimulationConfig.tiny(history=HISTORY))
        config = demo()
        unified = make(config, log.schema, "int8", at, compile=True)
        alone = make(replace(config, surfaces=(SURFACE,)), log.schema, "int8", at, compile=True)
        plain = {d: make(config, log.schema, d, at) for d in ("fp32", "int4")}
        figures = broadcasting(unified, rounds) | latency(unified, config, log.schema, calls)
        figures |= sizes(unified, plain, rounds) | against_separate(unified, alone, rounds)
        for checkpoint, data in args.run:
            figures |= quantised(checkpoint, Dataset.open(data))
    settings = {"quick": args.quick, "rounds": rounds, "calls": calls, "surface": SURFACE, "history": HISTORY}
    settings["runs"] = [str(data.name) for _, data in args.run]
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}
    Report("serving", settings).finish(rounded)


def plan_of(config: RunConfig, schema: DatasetSchema, keep: tuple[str, ...]) -> ModelPlan:
    moments = {f.name: (0.0, 1.0) for f in schema.features}
    return ModelPlan(config=config, schema=schema, moments=moments, keep=keep)


def make(config: RunConfig, schema: DatasetSchema, dtype: TableDtype, folder: Path, *, compile: bool = False) -> Made:
    """The surface's artifact, with weights of a fixed seed."""
    plan = plan_of(config, schema, (SURFACE,))
    torch.manual_seed(0)
    eager = build_model(plan, table_device=CPU).eval()
    served = serving_model(plan, eager, dtype)
    signature = signature_of(plan, served, SURFACE, HISTORY)
    example = example_tensors(signature)
    program = export_program(served, example)
    signature = replace(signature, inputs=input_specs(example), max_requests=64)
    at = Path(tempfile.mkdtemp(dir=folder))
    if compile:
        compile_program(program, at / "model.aoti.pt2")
    save_program(program, at / "model.pt2")
    graph, compiled = load_program(at, signature, compiled=False), load_program(at, signature) if compile else None
    assert isinstance(graph, GraphProgram)
    assert compiled is None or isinstance(compiled, CompiledProgram)
    dense = sum(4 * p.numel() for p in served.body.parameters())
    return Made(signature, eager, graph, compiled, served.tables.bytes, dense)


def requests_of(signature: Signature, requests: int, candidates: int) -> pa.Table:
    return made_up_requests(
        signature.schema, signature.surface, candidates=[candidates] * requests, history=[HISTORY] * requests
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def broadcasting(made: Made, rounds: int) -> dict[str, Any]:
    """The same rows as requests and each on its own."""
    assert made.compiled is not None, "made with compiled code"
    scorer = Scorer(made.signature, made.compiled)
    found: dict[str, Any] = {}
    differences = []
    for candidates in CANDIDATES:
        rows = flat(made.signature, requests_of(made.signature, max(ROWS // candidates, 1), candidates))
        own = rows.set_column(rows.column_names.index(REQUEST_ID), REQUEST_ID, pa.array(np.arange(rows.num_rows)))
        together, apart = (np.stack([c.to_numpy() for c in scorer.score(t).columns]) for t in (rows, own))
        differences.append(float(np.abs(together - apart).max()))
        sides = {"plain": own, "broadcast": rows}
        times = interleaved({k: lambda t=t: seconds(lambda: scorer.score(t)) for k, t in sides.items()}, rounds)
        name = f"speedup_c{candidates}_h{HISTORY}"
        found[name] = median_ratio(times["plain"], times["broadcast"])
        found[f"{name}_interval"] = ratio_interval(times["plain"], times["broadcast"])
        found[f"candidates_per_second_c{candidates}_h{HISTORY}"] = rows.num_rows / float(np.median(times["broadcast"]))
    return found | {"max_abs_diff": max(differences)}


def flat(signature: Signature, table: pa.Table) -> pa.Table:
    """One row a candidate, the request's columns repeated."""
    candidate = signature.columns(Level.CANDIDATE)
    first = table[next(iter(candidate))].combine_chunks()
    owner = pa.array(np.repeat(np.arange(table.num_rows), np.diff(first.offsets.to_numpy())))
    return pa.table(
        {n: table[n].combine_chunks().flatten() if n in candidate else table[n].take(owner) for n in table.column_names}
    )


def latency(made: Made, config: RunConfig, schema: DatasetSchema, calls: int) -> dict[str, Any]:
    """200 candidates of one request, eager and compiled; the whole unified model beside them."""
    assert made.compiled is not None, "made with compiled code"
    compiled = made.compiled
    block = to_requests(requests_of(made.signature, 1, 200), made.signature, "rows").block
    tensors = made.signature.tensors.tensors(block)
    inputs = assemble_inputs({SURFACE: block}, made.signature.layout)
    plan = plan_of(config, schema, config.surfaces)
    whole = build_model(plan, table_device=CPU).eval()
    whole_inputs = assemble_inputs({**empty(plan), SURFACE: block}, plan.layout)
    sides: dict[str, Callable[[], object]] = {
        "whole": lambda: whole(whole_inputs),
        "eager": lambda: made.eager(inputs),
        "graph": lambda: made.graph(tensors),
        "compiled": lambda: compiled(tensors),
    }
    with torch.inference_mode():
        for run in sides.values():
            for _ in range(10):
                run()
        times = interleaved({k: lambda run=run: 1000 * seconds(run) for k, run in sides.items()}, calls)
        counted = {k: flops(sides[k]) for k in ("whole", "graph")}
    found: dict[str, Any] = {
        f"{k}_p{p}_ms": float(np.percentile(values, p)) for k, values in times.items() for p in (50, 90, 99)
    }
    return found | {
        "eager_p50_over_compiled_p50": found["eager_p50_ms"] / found["compiled_p50_ms"],
        "eager_p99_over_compiled_p99": found["eager_p99_ms"] / found["compiled_p99_ms"],
        "whole_p99_over_compiled_p99": found["whole_p99_ms"] / found["compiled_p99_ms"],
        "whole_over_surface_flops": counted["whole"] / counted["graph"],
        "flops_c200_h128": counted["graph"],
    }


def empty(plan: ModelPlan) -> dict[str, RequestBlock]:
    """No request of any surface."""
    return {
        s: block_from_arrow(
            arrow_schema(plan.schema, s).empty_table().select(columns_of(plan.schema, s, plan.layout.features, ())),
            plan.schema,
        )
        for s in plan.keep
    }


def sizes(int8: Made, others: dict[TableDtype, Made], rounds: int) -> dict[str, Any]:
    """Bytes of tables, and time of the uncompiled program by type."""
    fp32 = others["fp32"]
    block = to_requests(requests_of(int8.signature, 1, 200), int8.signature, "rows").block
    made = {"int8": int8, **others}
    tensors = int8.signature.tensors.tensors(block)
    with torch.inference_mode():
        times = interleaved(
            {k: lambda m=m: sum(seconds(lambda: m.graph(tensors)) for _ in range(10)) for k, m in made.items()}, rounds
        )
    return {
        "fp32_over_int8_bytes": fp32.table_bytes / int8.table_bytes,
        "fp32_over_int4_bytes": fp32.table_bytes / others["int4"].table_bytes,
        "fp32_over_int8_artifact_bytes": (fp32.table_bytes + fp32.dense_bytes) / (int8.table_bytes + int8.dense_bytes),
        **{f"fp32_over_{name}_time": median_ratio(times["fp32"], times[name]) for name in ("int8", "int4")},
        **{f"fp32_over_{name}_time_interval": ratio_interval(times["fp32"], times[name]) for name in ("int8", "int4")},
    }


def against_separate(unified: Made, alone: Made, rounds: int) -> dict[str, Any]:
    """The surface's artifact out of the unified model, and that of a model of its own."""
    runs: dict[str, Callable[[], float]] = {}
    for name, made in (("unified", unified), ("alone", alone)):
        assert made.compiled is not None, "made with compiled code"
        program = made.compiled
        block = to_requests(requests_of(made.signature, 1, 64), made.signature, "rows").block
        tensors = made.signature.tensors.tensors(block)
        runs[name] = lambda p=program, t=tensors: float(np.median([seconds(lambda: p(t)) for _ in range(50)]))
    with torch.inference_mode():
        times = interleaved(runs, rounds)
    return {
        "surface_over_separate_latency": median_ratio(times["unified"], times["alone"]),
        "surface_over_separate_latency_interval": ratio_interval(times["unified"], times["alone"]),
    }


def quantised(checkpoint: Path, log: Dataset) -> dict[str, Any]:
    """What quantisation costs on a log's last day: AUC and calibration against the trainer's.

    The packed model runs in eager mode; that the exported program is the packed model, each export checks.
    """
    state = checkpoints.read_state(checkpoint)
    trained, tasks, name = TrainedModel(checkpoint, state), state.config.tasks, log.root.name
    found: dict[str, Any] = {}
    for surface in state.config.surfaces:
        rows = parity.held_out(log, surface, log.days[-1:], 10**9)
        plan = replace(state.plan, keep=(surface,))
        model = checkpoints.load_task(checkpoint, plan).model
        length = state.config.loader.history_length or state.schema.history_length
        for dtype in DTYPES:
            served = serving_model(plan, model, dtype)
            signature = signature_of(plan, served, surface, min(length, state.schema.history_length))
            block = to_requests(rows, signature, "rows").block
            if dtype == DTYPES[0]:
                expected = trained.scores(surface, block)
                base = parity.judge(rows, surface, tasks, expected)
            with torch.inference_mode():
                parts = [served(signature.tensors.tensors(b)) for b in bounded(block, 256, signature.max_candidates)]
            got = torch.cat(parts).numpy()
            judged = parity.judge(rows, surface, tasks, got)
            found[f"{name}_{surface}_{dtype}_largest_difference"] = float(np.abs(got - expected).max())
            found[f"{name}_{surface}_fp32_over_{dtype}_bytes"] = (
                sum(4 * r * d for r, d in table_shapes(model).values()) / served.tables.bytes
            )
            for task in tasks:
                before, after = base[task].values, judged[task].values
                found[f"{name}_{surface}_{task}_{dtype}_auc_cost"] = before["auc"] - after["auc"]
                shift = after["calibration"] / before["calibration"] - 1
                found[f"{name}_{surface}_{task}_{dtype}_calibration_shift"] = shift
    for dtype in DTYPES:
        for what in ("auc_cost", "calibration_shift"):
            of = [abs(v) for k, v in found.items() if k.endswith(f"_{dtype}_{what}")]
            found[f"{name}_{dtype}_worst_{what}"] = max(of)
    return found


if __name__ == "__main__":
    main()
