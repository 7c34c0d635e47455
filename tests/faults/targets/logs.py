"""What a log is made of and made from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from tests.faults.mutations import damage_bytes, damage_json, damage_yaml
from tests.faults.targets.base import Target, WrongRow


def dataset_json(folder: Path) -> Target:
    """The description of a log; what is accepted can be read through, and every row is in the files."""
    from pipeline.config import LoaderConfig
    from pipeline.data.layout import feature_layout
    from pipeline.data.loader import Loader
    from pipeline.data.logs import DESCRIPTION, Dataset
    from pipeline.data.seal import unsealed
    from tests.data.logs import write_log

    write_log(folder / "log", {"hf": 12, "sr": 6, "rp": 3})
    path = folder / "log" / DESCRIPTION
    # Past its checksum, which would find all damage; and with it.
    seeds = unsealed(path.read_bytes()), path.read_bytes()
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

    return Target(name="dataset_json", seeds=seeds, damage=damage_json, run=run, share=0.04)


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


def ingest_spec(folder: Path) -> Target:
    from pipeline.data.ingest import load_spec
    from tests.data.ingest_logs import CAUSAL, spec_with

    folder.mkdir(parents=True)
    specs = Path(__file__).parents[3] / "pipeline" / "data" / "specs"
    seeds = (
        yaml.safe_dump(spec_with(causal=CAUSAL)).encode(),
        *(path.read_bytes() for path in sorted(specs.glob("*.yaml"))),
    )

    def run(data: bytes) -> None:
        (folder / "spec.yaml").write_bytes(data)
        load_spec(folder / "spec.yaml", {"root": str(folder)})

    return Target(name="ingest_spec", seeds=seeds, damage=damage_yaml, run=run, share=0.008)
