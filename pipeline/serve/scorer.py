"""Rows in, calibrated probabilities out, in the order of the rows.

The one way to an artifact's scores: parity, profile, MLflow and the command line all call it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from pipeline.data.assemble import assemble_inputs
from pipeline.data.block import RequestBlock
from pipeline.errors import ArtifactError, DataError
from pipeline.serve.artifact import COMPILED, MODEL, ArtifactInfo, open_artifact
from pipeline.serve.program import serving_tensors
from pipeline.serve.rows import Requests, Rows, as_arrow, to_requests
from pipeline.serve.signature import Signature

Program = Callable[[dict[str, Tensor]], Tensor]


class Scorer:
    """Scores rows of one surface. Holds no state between calls, so that threads may share one.

    Args:
        signature: of the artifact.
        program: named tensors to probabilities [C, T].
        past_limit: what to do with more requests than `signature.max_requests`: run them in parts, or refuse.
    """

    def __init__(
        self, signature: Signature, program: Program, *, past_limit: Literal["split", "refuse"] = "split"
    ) -> None:
        self.signature = signature
        self.program = program
        self.past_limit = past_limit

    @classmethod
    def open(cls, artifact: str | Path | ArtifactInfo, *, past_limit: Literal["split", "refuse"] = "split") -> Scorer:
        """Check an artifact and load its program, the compiled one if there is one.

        Raises:
            ArtifactError: it is missing, damaged or changed, of another version, or cannot be loaded here.
        """
        info = artifact if isinstance(artifact, ArtifactInfo) else open_artifact(artifact)
        return cls(info.signature, load_program(info.path, info.signature), past_limit=past_limit)

    def score(self, rows: Rows) -> pa.Table:
        """One float32 column a task, in the order of the rows; lists of one entry a candidate for grouped rows.

        Args:
            rows: grouped or flat rows (see `pipeline.serve.rows`), as an Arrow table, a pandas or Polars frame
                or the path of a Parquet file.

        Raises:
            DataError: a column is missing, of another type, or holds what it must not; more requests than the
                artifact's bound where that is refused.
        """
        table, source = as_arrow(rows)
        requests = to_requests(table, self.signature, source)
        return self._result(requests, self.score_block(requests.block))

    def score_frame(self, rows: Rows) -> pl.DataFrame:
        """`score` as a Polars frame."""
        frame = pl.from_arrow(self.score(rows))
        assert isinstance(frame, pl.DataFrame), "a table becomes a frame"
        return frame

    def score_block(self, block: RequestBlock) -> np.ndarray:
        """Probabilities of checked requests, float32 [C, T]; never more than the bound of requests at a time."""
        limit = self.signature.max_requests
        if len(block) > limit and self.past_limit == "refuse":
            raise DataError(f"{len(block)} requests are more than the artifact's bound of {limit}; send fewer at once")
        parts = [self._run(block.slice(i, i + limit)) for i in range(0, len(block), limit)]
        return np.concatenate([np.empty((0, len(self.signature.tasks)), np.float32), *parts])

    def _run(self, block: RequestBlock) -> np.ndarray:
        if not int(block.candidate_counts.sum()):
            return np.empty((0, len(self.signature.tasks)), np.float32)
        layout = self.signature.layout
        with torch.inference_mode():
            inputs = assemble_inputs({self.signature.surface: block}, layout)
            return self.program(serving_tensors(inputs, layout)).numpy()

    def _result(self, requests: Requests, scores_CT: np.ndarray) -> pa.Table:
        if requests.order is None:
            offsets = pa.array(np.concatenate([[0], np.cumsum(requests.block.candidate_counts.numpy())]), pa.int32())
            columns = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in scores_CT.T]
        else:
            back = np.empty_like(scores_CT)
            back[requests.order] = scores_CT
            columns = [pa.array(column) for column in back.T]
        return pa.table(dict(zip(self.signature.tasks, columns, strict=True)))


def load_program(folder: Path, signature: Signature) -> Program:
    """The program of a checked artifact.

    Raises:
        ArtifactError: this version of torch cannot load it.
    """
    import torchrec.sparse.jagged_tensor  # noqa: F401  registers the fbgemm operators

    names = [i.name for i in signature.inputs]
    try:
        if (folder / COMPILED).is_file():
            compiled = torch._inductor.aoti_load_package(str(folder / COMPILED))
            return lambda tensors: compiled({n: tensors[n] for n in names})
        return _callable(torch.export.load(folder / MODEL), names)
    except Exception as error:  # whatever torch raises for a program of another version
        raise ArtifactError(f"{folder / MODEL} cannot be loaded by torch {torch.__version__}: {error}") from error


def _callable(program: ExportedProgram, names: list[str]) -> Program:
    """The bare graph as a function: `program.module()` checks input bounds by algebra at every call (10 ms)."""
    lifted: list[Tensor] = []
    inputs: list[str] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
        elif spec.target in program.state_dict:
            lifted.append(program.state_dict[spec.target])
        else:
            lifted.append(program.constants[str(spec.target)])
    if inputs != [f"inputs_{name}" for name in names]:
        raise ArtifactError(f"the program takes {inputs}, the signature names {names}")
    graph = program.graph_module

    def run(tensors: dict[str, Tensor]) -> Tensor:
        return graph(*lifted, *(tensors[name] for name in names))[0]

    return run
