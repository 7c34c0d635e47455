"""Batches straight from Parquet: all surfaces interleaved, the same order for every number of ranks.

The loader's whole state is (epoch, step): every batch is a pure function of these, the data set, the seed and
the settings below. Nothing has to be replayed to resume, and a resumed run may have another number of ranks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from functools import partial

from pipeline.config import LoaderConfig
from pipeline.data.assemble import assemble_batch
from pipeline.data.batch import Batch
from pipeline.data.block import columns_of
from pipeline.data.layout import FeatureLayout
from pipeline.data.logs import Dataset
from pipeline.data.order import Schedule, SurfaceOrder, natural_weights
from pipeline.data.stream import RowGroups, SurfaceReader
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
    ) -> None:
        if world_size > config.lanes:
            raise ConfigError(
                f"{world_size} ranks share {config.lanes} lanes; raise loader.lanes to at least {world_size} "
                "(this changes the order of data)"
            )
        self.dataset = dataset
        self.layout = layout
        self.config = config
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._groups = {s: self._row_groups(s, days) for s in layout.surfaces}
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

    def _row_groups(self, surface: str, days: tuple[str, ...] | None) -> RowGroups:
        schema = self.dataset.schema
        partitions = self.dataset.partitions(surface, days)
        return RowGroups(
            root=self.dataset.root,
            schema=schema,
            surface=surface,
            partitions=partitions,
            columns=columns_of(schema, surface, self.layout.features, self.layout.tasks),
            history_length=min(self.config.history_length or schema.history_length, schema.history_length),
        )

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same on every rank; known before the first file is read."""
        return self.schedule.steps

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from `first_step` to its end.

        Raises:
            DataError: a file is gone, damaged, or holds what it must not.
        """
        made = self._make(epoch, first_step)
        return _ahead(made, self.config.prefetch_batches) if self.config.prefetch_batches else made

    def _make(self, epoch: int, first_step: int) -> Iterator[Batch]:
        readers = {
            s: SurfaceReader(self._groups[s], partial(self.order, s, epoch), rank=self.rank, world_size=self.world_size)
            for s in self.layout.surfaces
        }
        for step in range(first_step, self.steps):
            yield assemble_batch(
                {s: reader.read(*self.schedule.span(s, step)) for s, reader in readers.items()}, self.layout
            )

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


def _ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
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
