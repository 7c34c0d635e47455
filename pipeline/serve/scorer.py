"""Rows in, calibrated probabilities out, in the order of the rows.

The one way to an artifact's scores: parity, profile, MLflow and the command line all call it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from pipeline.data.block import RequestBlock
from pipeline.data.rowgroups import split
from pipeline.errors import DataError
from pipeline.progress import Progress, untold
from pipeline.serve.artifact import PREPROCESSING, VOCABULARIES, ArtifactInfo, open_artifact
from pipeline.serve.delta import changed_tensors, read_delta
from pipeline.serve.example import made_up_requests
from pipeline.serve.raw import RawRows
from pipeline.serve.rows import Requests, Rows, as_arrow, to_requests
from pipeline.serve.runtime import Program, load_program
from pipeline.serve.signature import Signature

PastLimit = Literal["split", "refuse"]
_WARM_UP = 3


class Scorer:
    """Scores rows of one surface. Threads may share one; a call sees one version of the weights from end to end.

    Args:
        signature: of the artifact.
        program: named tensors to probabilities [C, T].
        past_limit: what to do with more requests than `signature.max_requests`: run them in parts, or refuse.
        raw: turns raw rows into rows of ids, where the artifact carries the rules.
    """

    def __init__(
        self,
        signature: Signature,
        program: Program,
        *,
        past_limit: PastLimit = "split",
        raw: RawRows | None = None,
    ) -> None:
        self.signature = signature
        self._raw = raw
        self.past_limit = past_limit
        # Program and the digest of its weights: one reference, so that a change of weights is one assignment.
        self._live = (program, signature.weights)
        self._changing = threading.Lock()

    @classmethod
    def open(
        cls,
        artifact: str | Path | ArtifactInfo,
        *,
        past_limit: PastLimit = "split",
        device: torch.device | None = None,
        warm_up: bool = False,
    ) -> Scorer:
        """Check an artifact and load its program, the compiled one if there is one.

        Args:
            artifact: its folder, or the opened artifact.
            past_limit: see the class.
            device: where to run; None is the CPU.
            warm_up: score a few made-up requests first, so that the first caller does not pay for first calls.

        Raises:
            ArtifactError: it is missing, damaged or changed, of another version, or cannot be loaded here.
        """
        info = artifact if isinstance(artifact, ArtifactInfo) else open_artifact(artifact)
        program = load_program(info.path, info.signature, device=device)
        raw = None
        if PREPROCESSING in info.manifest.files:
            signature = info.signature
            raw = RawRows.open(info.path / PREPROCESSING, info.path / VOCABULARIES, signature.schema, signature.surface)
        scorer = cls(info.signature, program, past_limit=past_limit, raw=raw)
        if warm_up:
            scorer.warm_up()
        return scorer

    @property
    def program(self) -> Program:
        """What calls that begin now run."""
        return self._live[0]

    @property
    def weights(self) -> str:
        """Digest of the weights that calls that begin now see."""
        return self._live[1]

    def apply(self, delta: str | Path) -> None:
        """Take fresh weights. Calls that have begun end with the old ones; those that begin later see the new ones.

        Changed tables are held twice until calls that have begun are over.

        Args:
            delta: folder, made by `trefoil export --delta-from`.

        Raises:
            ArtifactError: it is missing, damaged, or starts from other weights; the scorer goes on as it was.
        """
        with self._changing:
            program, state = self._live
            found = read_delta(Path(delta))
            changed = changed_tensors(Path(delta), found, program.tensors(), state)
            self._live = (program.with_tensors(changed), found.result)

    def warm_up(self) -> None:
        """Score a few made-up requests of the largest history."""
        history = [self.signature.history_length, 0]
        table = made_up_requests(self.signature.schema, self.signature.surface, candidates=[8, 2], history=history)
        for _ in range(_WARM_UP):
            self.score(table)

    def score(self, rows: Rows, *, keys: Literal["ids", "raw"] = "ids", progress: Progress = untold) -> pa.Table:
        """One float32 column a task, in the order of the rows; lists of one entry a candidate for grouped rows.

        Args:
            rows: see `pipeline.serve.rows`.
            keys: whether feature columns hold ids and numbers as in the log, or raw values (`pipeline.serve.raw`).
            progress: told of the candidates that are scored.

        Raises:
            DataError: the rows are not what the artifact wants, or are refused because they are too many.
        """
        table, source = as_arrow(rows)
        if keys == "raw":
            if self._raw is None:
                raise DataError(
                    "the artifact carries no rules for raw values: export it with --data and a log that "
                    "`trefoil ingest` made"
                )
            table = self._raw.encode(table, source)
        requests = to_requests(table, self.signature, source)
        return self._result(requests, self.score_block(requests.block, progress))

    def score_frame(
        self, rows: Rows, *, keys: Literal["ids", "raw"] = "ids", progress: Progress = untold
    ) -> pl.DataFrame:
        """`score` as a Polars frame."""
        frame = pl.from_arrow(self.score(rows, keys=keys, progress=progress))
        assert isinstance(frame, pl.DataFrame), "a table becomes a frame"
        return frame

    def score_block(self, block: RequestBlock, progress: Progress = untold) -> np.ndarray:
        """Probabilities of checked requests, float32 [C, T]; never more at a time than the artifact's bounds."""
        limit = self.signature.max_requests
        if len(block) > limit and self.past_limit == "refuse":
            raise DataError(f"{len(block)} requests are more than the artifact's bound of {limit}; send fewer at once")
        program = self.program  # read once: all parts of this call run with the same weights
        parts, done, candidates = [], 0, int(block.candidate_counts.sum())
        for part in bounded(block, limit, self.signature.max_candidates):
            parts.append(self.run(part, program))
            done += len(parts[-1])
            progress(done, candidates, "scoring")
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, len(self.signature.tasks)), np.float32), *parts])

    def run(self, block: RequestBlock, program: Program | None = None) -> np.ndarray:
        """Probabilities of one run of the program, whatever its bounds; see `score_block`."""
        program = program or self.program
        if not int(block.candidate_counts.sum()):
            return np.empty((0, len(self.signature.tasks)), np.float32)
        with torch.inference_mode():
            tensors = self.signature.tensors.tensors(block)
            if program.device.type != "cpu":
                tensors = {name: tensor.to(program.device) for name, tensor in tensors.items()}
            return program(tensors).cpu().numpy()

    def _result(self, requests: Requests, scores_CT: np.ndarray) -> pa.Table:
        if requests.order is not None:
            back = np.empty_like(scores_CT)
            back[requests.order] = scores_CT
            scores_CT = back
        columns: list[pa.Array] = [pa.array(np.ascontiguousarray(column)) for column in scores_CT.T]
        if requests.grouped:
            offsets = pa.array(np.concatenate([[0], np.cumsum(requests.block.candidate_counts.numpy())]), pa.int32())
            columns = [pa.ListArray.from_arrays(offsets, column) for column in columns]
        return pa.table(dict(zip(self.signature.tasks, columns, strict=True)))


def bounded(block: RequestBlock, max_requests: int, max_candidates: int) -> Iterator[RequestBlock]:
    """Parts of a block, in order, each of at most `max_requests` requests and `max_candidates` candidate slots.

    Slots are requests times the most candidates of one of them, which is what a program's memory grows with. A request
    that has more by itself becomes several; its history is then encoded once for each, 1 in `max_candidates`.
    """
    counts = block.candidate_counts.numpy()
    most = int(counts.max()) if counts.size else 0
    if counts.size <= max_requests and counts.size * most <= max_candidates:
        yield block
        return
    if most > max_candidates:
        block, _ = split(block, max_candidates)
        counts = block.candidate_counts.numpy()
    start = 0
    while start < counts.size:
        widest = np.maximum.accumulate(counts[start : start + max_requests])
        fits = widest * np.arange(1, widest.size + 1) <= max_candidates
        # Slots never fall as requests are added, so the fitting ones come first; one always fits.
        stop = start + int(fits.sum())
        yield block.slice(start, stop)
        start = stop
