"""Batches straight from Parquet: all surfaces interleaved, the same order for every number of ranks.

The loader's whole state is (epoch, step): every batch is a pure function of these, the data set, the seed and
the settings below. Nothing has to be replayed to resume, and a resumed run may have another number of ranks.

Memory of a rank, in bytes, for each surface: at most

    block + groups          between loads, and
    2 * block + groups      while the next block is loaded, where
    block  = lanes_of_rank * window * request_bytes
    groups = lanes_of_rank * (1 + ceil(window / row_group_requests)) * row_group_requests * request_bytes

or the whole surface, if that is less; to which come `prefetch_batches + 1` batches. `lanes_of_rank` is
ceil(lanes / world_size); `request_bytes` is that of the decoded columns, about
8 * (ids and numbers of a request) + 8 * candidates * (candidate columns) + 28 * (history events).
`Loader.bytes` says what is held now; freed memory up to `memory.KEPT_BYTES` stays with the process. Fewer lanes,
smaller windows or smaller row groups need less.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path

from pipeline.config import LoaderConfig
from pipeline.data.assemble import join_batch
from pipeline.data.batch import Batch
from pipeline.data.layout import FeatureLayout
from pipeline.data.logs import Dataset
from pipeline.data.memory import keep_freed_memory
from pipeline.data.order import Schedule, SurfaceOrder, natural_weights
from pipeline.data.rowgroups import LeftOut, RowGroups
from pipeline.data.stream import SurfaceReader
from pipeline.errors import ConfigError, DataError


class Loader:
    """Batches of one rank.

    Args:
        dataset: the log.
        layout: which columns the model reads.
        config: how batches are made.
        days: days to read, in any order; None reads all.
        seed: of the run; with `config`, it fixes the order.
        rank, world_size: this process among those that share each global batch.
        quarantine_report: file that gets a line of JSON for each row group left out (`config.bad_input`); the ranks
            may share it, and then it can name a row group once for each.

    Attributes:
        waited_s: seconds for which the consumer has waited for batches, all epochs together.
        left_out: row groups in quarantine, and requests and candidates left out with or without them.

    Raises:
        ConfigError: more ranks than lanes, or weights that do not fit the surfaces.
        DataError: a day that the log does not have, or no request at all.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: FeatureLayout,
        config: LoaderConfig,
        *,
        days: tuple[str, ...] | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        quarantine_report: Path | None = None,
    ) -> None:
        if world_size > config.lanes:
            raise ConfigError(
                f"{world_size} ranks share {config.lanes} lanes; raise loader.lanes to at least {world_size} "
                "(this changes the order of data)"
            )
        keep_freed_memory()
        self.dataset = dataset
        self.layout = layout
        self.config = config
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.waited_s = 0.0
        self.left_out = LeftOut(quarantine_report)
        self._readers: dict[str, SurfaceReader] = {}
        self._groups = {
            s: RowGroups(dataset, layout, config, surface=s, days=days, left_out=self.left_out) for s in layout.surfaces
        }
        self.sizes = {s: sum(g.rows) for s, g in self._groups.items()}
        if not any(self.sizes.values()):
            raise DataError(
                f"no surface of {', '.join(layout.surfaces)} has a request on {', '.join(days or dataset.days)}",
                file=str(dataset.root),
            )
        weights = config.surface_weights
        if config.temperature is not None:
            weights = {**dict.fromkeys(self.sizes, 1.0), **natural_weights(self.sizes, config.temperature)}
        self.schedule = Schedule(
            sizes=self.sizes,
            requests_per_batch=config.requests_per_batch,
            weights=weights,
            exhaustion=config.exhaustion,
        )

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same on every rank; known before the first file is read."""
        return self.schedule.steps

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Batches of an epoch from `first_step` to its end.

        Raises:
            DataError: a file is gone, damaged, or holds what it must not.
        """
        made = self._make(epoch, first_step)
        return self._timed(_ahead(made, self.config.prefetch_batches) if self.config.prefetch_batches else made)

    def _timed(self, batches: Generator[Batch]) -> Generator[Batch]:
        with closing(batches):
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.waited_s += time.perf_counter() - start
                if batch is None:
                    return
                yield batch

    def _make(self, epoch: int, first_step: int) -> Generator[Batch]:
        self._readers = readers = {
            s: SurfaceReader(self._groups[s], partial(self.order, s, epoch), rank=self.rank, world_size=self.world_size)
            for s in self.layout.surfaces
        }
        for step in range(first_step, self.steps):
            yield join_batch([r.read(*self.schedule.span(s, step)) for s, r in readers.items()], self.layout)

    @property
    def bytes(self) -> int:
        """Size of the decoded rows that the epoch in progress holds; batches made ahead are not counted."""
        return sum(reader.bytes for reader in self._readers.values())

    def order(self, surface: str, epoch: int, repeat: int = 0) -> SurfaceOrder:
        """The order of a surface's requests in one pass over it."""
        return SurfaceOrder(
            surface=surface,
            unit_rows=self._groups[surface].rows,
            seed=self.seed,
            epoch=epoch,
            repeat=repeat,
            lanes=self.config.lanes,
            window=self.config.window,
            shuffle=self.config.shuffle,
        )


class _End:
    """Last entry of the queue: how the making ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _ahead(batches: Generator[Batch], depth: int) -> Generator[Batch]:
    """The same batches, made in a thread up to `depth` ahead. Arrow and torch release the interpreter's lock."""
    made: queue.Queue[Batch | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: Batch | _End) -> None:
        while not stop.is_set():
            try:
                return made.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(_End(None))
        except BaseException as error:  # noqa: BLE001  handed to the consumer, who raises it
            put(_End(error))

    thread = threading.Thread(target=work, name="trefoil-loader", daemon=True)
    thread.start()
    try:
        while True:
            entry = made.get()
            if isinstance(entry, _End):
                if entry.error is not None:
                    raise entry.error
                return
            yield entry
    finally:
        stop.set()
        thread.join()
