"""Row groups of one surface, decoded, checked and prepared; what becomes of bad ones and of very long requests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import LoaderConfig
from pipeline.data.assemble import prepare
from pipeline.data.block import Jagged, RequestBlock, block_of, columns_of, offsets, take_rows
from pipeline.data.check import check_columns, value_faults
from pipeline.data.columns import Column, columns_of_table
from pipeline.data.layout import FeatureLayout
from pipeline.data.logs import Dataset, arrow_schema
from pipeline.errors import DataError


@dataclass
class LeftOut:
    """What a loader left out by choice, counted since it was made.

    Args:
        report: JSON lines, one for each row group in quarantine, are appended to this file; None writes none.
        row_groups: faults by (file, row group); a row group that cannot be read is left out whole.
        requests: requests of those row groups that this rank would have had, counted in each epoch.
        candidates: candidates past `max_candidates` that this rank dropped, counted in each epoch.
    """

    report: Path | None = None
    row_groups: dict[tuple[str, int], DataError] = field(default_factory=dict)
    requests: int = 0
    candidates: int = 0

    def add(self, surface: str, file: str, row_group: int, requests: int, fault: DataError) -> None:
        """Count a row group, once, and report it."""
        if (file, row_group) in self.row_groups:
            return
        self.row_groups[file, row_group] = fault
        if self.report is not None:
            line = {
                "surface": surface,
                "file": file,
                "row_group": row_group,
                "column": fault.column,
                "requests": requests,
                "problem": fault.problem,
            }
            self.report.parent.mkdir(parents=True, exist_ok=True)
            with self.report.open("a") as report:
                report.write(json.dumps(line) + "\n")


class RowGroups:
    """Decoded row groups of one surface.

    Args:
        dataset: the log.
        layout: which columns the model reads.
        config: how batches are made.
        surface: whose files these are.
        days: the days to read; None reads all.
        left_out: counts what is left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: FeatureLayout,
        config: LoaderConfig,
        *,
        surface: str,
        days: tuple[str, ...] | None,
        left_out: LeftOut,
    ) -> None:
        self.root = dataset.root
        self.schema = dataset.schema
        self.layout = layout
        self.config = config
        self.surface = surface
        self.left_out = left_out
        files = [f for p in dataset.partitions(surface, days) for f in p.files]
        self.columns = columns_of(self.schema, surface, layout.features, layout.tasks)
        self._expected = arrow_schema(self.schema, surface)
        self.rows = tuple(n for f in files for n in f.row_group_rows)
        self._groups = {f.path: len(f.row_group_rows) for f in files}
        self._index = [(f.path, g) for f in files for g in range(len(f.row_group_rows))]
        sizes = [v.size for v in self.schema.vocabularies]
        self._id_type = torch.int32 if max(sizes, default=0) < 2**31 else torch.int64
        self._history_length = min(config.history_length or self.schema.history_length, self.schema.history_length)

    def empty(self) -> RequestBlock:
        """A prepared block without a request."""
        return self._prepared(columns_of_table(self._expected.empty_table().select(self.columns)), 0)

    def read(self, units: Iterable[int]) -> dict[int, RequestBlock]:
        """All requests of row groups, prepared; those in quarantine are empty. Each file is opened once.

        Raises:
            DataError: a file is gone, damaged, or holds what it must not, and bad input is to raise.
        """
        by_file: dict[str, list[int]] = {}
        for unit in units:
            by_file.setdefault(self._index[unit][0], []).append(unit)
        found: dict[int, RequestBlock] = {}
        for path, own in by_file.items():
            try:
                with closing(open_parquet(self.root, path)) as file:
                    if not file.schema_arrow.equals(self._expected):
                        check_columns(file.schema_arrow, self.schema, self.surface, self.columns, file=path)
                    if file.num_row_groups > self._groups[path]:
                        raise DataError(
                            f"the file has {file.num_row_groups} row groups, dataset.json names {self._groups[path]}; "
                            "write the log anew",
                            file=path,
                        )
                    for unit in own:
                        found[unit] = self._read_one(file, unit)
            except DataError as fault:
                for unit in own:
                    if unit not in found:
                        found[unit] = self._quarantine(unit, fault)
        return found

    def _read_one(self, file: pq.ParquetFile, unit: int) -> RequestBlock:
        path, group = self._index[unit]
        try:
            table = read_row_group(file, group, self.columns, self.rows[unit], path=path)
            columns = columns_of_table(table)
            for fault in value_faults(columns, self.schema, self.surface, file=path, row_group=group):
                raise fault
        except DataError as fault:
            return self._quarantine(unit, fault)
        return self._prepared(columns, table.num_rows)

    def _prepared(self, columns: dict[str, Column], rows: int) -> RequestBlock:
        block = newest(block_of(columns, self.schema, rows), self._history_length)
        return prepare(block, self.layout, self._id_type)

    def _quarantine(self, unit: int, fault: DataError) -> RequestBlock:
        if self.config.bad_input == "raise":
            raise fault
        path, group = self._index[unit]
        self.left_out.add(self.surface, path, group, self.rows[unit], fault)
        return self.empty()

    def count_left_out(self, requests: int) -> None:
        """Count requests of row groups in quarantine that this rank would have had."""
        self.left_out.requests += requests

    def bound(self, block: RequestBlock) -> tuple[RequestBlock, np.ndarray | None]:
        """Prepared requests with at most `max_candidates` candidates each; and into how many rows each went, if any
        was split."""
        most = self.config.max_candidates
        if most is None or not len(block) or int(block.candidate_counts.max()) <= most:
            return block, None
        if self.config.past_max_candidates == "cap":
            capped, dropped = cap(block, most)
            self.left_out.candidates += dropped
            return capped, None
        return split(block, most)


def open_parquet(root: Path, path: str) -> pq.ParquetFile:
    """Open a file of a log.

    Raises:
        DataError: the file is gone or is not Parquet.
    """
    try:
        return pq.ParquetFile(root / path, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise DataError("the file is gone; write the log anew or restore it", file=path) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file cannot be decoded: {error}", file=path) from error


def read_row_group(file: pq.ParquetFile, group: int, columns: list[str], rows: int, *, path: str) -> pa.Table:
    """Decode columns of a row group on one thread.

    Raises:
        DataError: it is not there, cannot be decoded, or has another number of rows.
    """
    if group >= file.num_row_groups:
        raise DataError(
            f"the file has {file.num_row_groups} row groups, dataset.json says more; write the log anew",
            file=path,
            row_group=group,
        )
    try:
        table = file.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the row group cannot be decoded: {error}", file=path, row_group=group) from error
    if table.num_rows != rows:
        raise DataError(
            f"the row group has {table.num_rows} requests, dataset.json says {rows}; write the log anew",
            file=path,
            row_group=group,
        )
    return table


def newest(block: RequestBlock, length: int) -> RequestBlock:
    """The block with histories cut to their newest `length` events."""
    if not block.history or not block.history_lengths.numel() or int(block.history_lengths.max()) <= length:
        return block
    kept = block.history_lengths.clamp_max(length)
    index = _stretches(offsets(block.history_lengths)[1:] - kept, kept)
    history = {k: torch.index_select(v, 0, index) for k, v in block.history.items()}
    return replace(block, history=history, history_lengths=kept)


def cap(block: RequestBlock, most: int) -> tuple[RequestBlock, int]:
    """The requests with their first `most` candidates, and how many candidates were dropped."""
    kept = block.candidate_counts.clamp_max(most)
    index = _stretches(offsets(block.candidate_counts)[:-1], kept)
    lists = {
        k: Jagged(take_rows(j.values, j.lengths, index.int()), j.lengths[index])
        for k, j in block.candidate_lists.items()
    }
    candidates = {k: v[index] for k, v in block.candidates.items()}
    capped = RequestBlock(block.scalars, block.lists, kept, candidates, lists, block.history_lengths, block.history)
    return capped, int(block.candidate_counts.sum() - kept.sum())


def split(block: RequestBlock, most: int) -> tuple[RequestBlock, np.ndarray]:
    """The requests with at most `most` candidates each, longer ones as several rows that follow each other and
    repeat the request's features and history; and the number of rows of each."""
    counts = block.candidate_counts
    pieces = ((counts + most - 1) // most).clamp_min(1)
    owner = torch.repeat_interleave(torch.arange(len(block)), pieces).int()
    piece = torch.arange(owner.numel()) - offsets(pieces)[:-1][owner]
    divided = replace(
        block,
        scalars={k: v[owner] for k, v in block.scalars.items()},
        lists={k: v.take(owner) for k, v in block.lists.items()},
        candidate_counts=(counts[owner] - piece * most).clamp_max(most),
        history_lengths=block.history_lengths[owner],
        history={k: take_rows(v, block.history_lengths, owner) for k, v in block.history.items()},
    )
    return divided, pieces.numpy()


def _stretches(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Entries [start, start + length) of each row, row after row."""
    ends = torch.cumsum(lengths, 0)
    total = int(ends[-1]) if ends.numel() else 0
    shift = starts - (ends - lengths)
    return torch.repeat_interleave(shift, lengths, output_size=total) + torch.arange(total)
