"""Files of a bucket as rows that an engine can carry from machine to machine.

A row is (bucket, name, part, data): some bytes of the file `name` that `bucket` needs next. Events and answers of
many buckets reach a bucket as one such file each, just as `read_bucket` finds them on one machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

SCHEMA = "bucket int, name string, part int, data binary"
_ARROW = pa.schema([("bucket", pa.int32()), ("name", pa.string()), ("part", pa.int32()), ("data", pa.binary())])
_PART_BYTES = 8 << 20
_BUCKET = re.compile(r"/_bucket=(\d+)/")


def take(folder: Path, prefixes: tuple[str, ...], bucket: int) -> Iterator[pa.RecordBatch]:
    """The files under some folders of a bucket's work, each addressed to the bucket that its path names.

    Args:
        folder: of the bucket's work.
        prefixes: beginnings of the names of folders to take.
        bucket: whose work it is; files whose path names no bucket stay with it.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(prefixes):
            continue
        named = _BUCKET.search(name)
        target = bucket if named is None else int(named[1])
        with path.open("rb") as file:
            part = 0
            while (data := file.read(_PART_BYTES)) or not part:
                yield pa.RecordBatch.from_arrays(
                    [pa.array([v], f.type) for v, f in zip((target, name, part, data), _ARROW, strict=True)],
                    schema=_ARROW,
                )
                part += 1


def lay(batches: Iterable[pa.RecordBatch], root: Path) -> list[int]:
    """Write rows, a file's parts in order, to `root/BUCKET/NAME`; the buckets that came."""
    buckets: set[int] = set()
    for batch in batches:
        for row in batch.to_pylist():
            path = root / str(row["bucket"]) / row["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(row["data"])
            buckets.add(row["bucket"])
    return sorted(buckets)
