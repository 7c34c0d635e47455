"""What a run refuses before its first step, and what it says of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from pipeline.config import ShardingConfig
from pipeline.data.logs import Dataset
from pipeline.errors import CheckpointError, ConfigError, DataError, TrefoilError
from pipeline.job import ConsoleReporter
from pipeline.tracking import Tracker
from pipeline.train import checkpoint
from pipeline.train.sharding import describe_plan, joined
from pipeline.train.trainer import Trainer
from tests.data.logs import rewrite, write_log
from tests.train.runs import Recorder, tiny_config, train


def build(root: Path, folder: Path, **changes: Any) -> None:
    with joined() as ranks:
        Trainer(tiny_config(**changes), Dataset.open(root), ranks, folder)


def without_training_days(root: Path, surface: str) -> None:
    """Take a surface's first day out of the description."""

    def change(description: dict[str, Any]) -> None:
        description["partitions"] = [
            p for p in description["partitions"] if (p["surface"], p["date"]) != (surface, "2026-01-01")
        ]

    rewrite(root, change)


def test_a_surface_without_training_requests_is_named(tmp_path: Path) -> None:
    write_log(tmp_path / "data", {"hf": 60, "sr": 30, "rp": 12})
    without_training_days(tmp_path / "data", "rp")
    with pytest.raises(DataError, match="surface 'rp' has no request on the training days 2026-01-01 to 2026-01-01"):
        build(tmp_path / "data", tmp_path / "run")


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ({"item": ("diagonal",)}, "unknown sharding type 'diagonal'"),
        ({"item": ("grid_shard",)}, "table 'item': sequences cannot lie grid_shard"),
        ({"user": ("column_wise",)}, "table 'user': column_wise splits the row that rowwise_adagrad averages over"),
        ({"itme": ("row_wise",)}, "sharding.tables: unknown table 'itme'; did you mean 'item'"),
    ],
)
def test_sharding_that_cannot_work_is_refused(
    log: Path, tmp_path: Path, sharding: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(log, tmp_path, sharding=ShardingConfig(tables=sharding))


def test_the_plan_names_every_table_once(log: Path, tmp_path: Path) -> None:
    with joined() as ranks:
        config = tiny_config(sharding=ShardingConfig(tables={"item": ("row_wise",)}))
        trainer = Trainer(config, Dataset.open(log), ranks, tmp_path)
        rows = {row["table"]: row for row in describe_plan(trainer.model.plan, config.optimizer)}
    assert sorted(rows) == ["country", "item", "query", "topic", "user"]
    assert (rows["item"]["sharding"], rows["item"]["rows"], rows["item"]["dim"]) == ("row_wise", 40, 8)
    assert rows["user"]["kernel"] == "fused"


def test_steps_report_losses_rates_and_waiting(log: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    with joined() as ranks:
        trainer = Trainer(tiny_config(log_steps=2), Dataset.open(log), ranks, tmp_path / "checkpoints", recorder)
        trainer.train()
        steps = trainer.loader.steps
    assert [s["step"] for s in recorder.steps] == [*range(2, steps, 2), steps]
    for step in recorder.steps:
        assert 0 < step["train/click/loss"] < 2
        assert 0 <= step["train/wait_share"] <= 1
        assert step["train/impressions_per_second"] > 0
    assert recorder.steps[-1]["train/dense_lr"] == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(), log, tmp_path_factory.mktemp("run"))["checkpoint"]


def resume(log: Path, path: Path, folder: Path, **changes: Any) -> None:
    with joined() as ranks:
        Trainer(tiny_config(**changes), Dataset.open(log), ranks, folder).resume(path)


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(
    log: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be resumed by this run: config\.seed differ"):
        resume(log, trained, tmp_path, seed=5)
    write_log(tmp_path / "other", {"hf": 60, "sr": 30, "rp": 12}, seed=1)
    with pytest.raises(CheckpointError, match=r"dataset, .*differ|dataset differ"):
        resume(tmp_path / "other", trained, tmp_path)


def damaged(trained: Path, folder: Path, name: str) -> Path:
    import shutil

    copy = folder / trained.name
    shutil.copytree(trained, copy)
    (copy / name).unlink()
    return copy


@pytest.mark.parametrize(
    ("name", "message"), [("state.json", "holds no state.json"), (".metadata", "damaged: .metadata is missing")]
)
def test_a_damaged_checkpoint_is_one_clear_error(trained: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TrefoilError, match=message):
        checkpoint.read_state(damaged(trained, tmp_path, name))


def test_the_newest_checkpoint_is_found_and_half_written_ones_are_not(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for name in ("epoch-0-step-00000090", "epoch-1-step-00000003", ".epoch-2-step-00000001.writing", "other"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch-1-step-00000003"


def test_a_run_of_nothing_but_one_surface_trains(log: Path, tmp_path: Path) -> None:
    result = train(replace(tiny_config(), surfaces=("sr",)), log, tmp_path)
    assert len(result["losses"]) > 0
    assert {row["surface"] for row in result["predictions"]} == {"sr"}


def test_the_start_tells_and_records_plan_optimizers_types_and_pipelined_modules(log: Path, tmp_path: Path) -> None:
    said, records = StringIO(), {}

    class Records:
        def log_text(self, text: str, name: str) -> None:
            records[name] = json.loads(text)

    config = tiny_config(sharding=ShardingConfig(tables={"item": ("row_wise",)}, exchange="fp16"))
    with joined() as ranks:
        trainer = Trainer(config, Dataset.open(log), ranks, tmp_path)
        ConsoleReporter(Console(file=said, width=200), cast(Tracker, Records())).plan(trainer)
    row = next(line for line in said.getvalue().splitlines() if " item " in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "sequences", "item", "40", "8", "float32", "row_wise", "fused", "rowwise_adagrad", "0.05", "[0]"
    ]  # fmt: skip
    modules = [f"model.embeddings.{m}" for m in ("request_bags", "candidate_bags", "sequences")]
    assert f"embeddings travel as fp16; pipelined: {', '.join(modules)}" in said.getvalue()
    plan = records["sharding_plan.json"]
    assert (plan["exchange"], plan["dense_optimizer"], plan["pipelined"]) == ("fp16", "adam", modules)
    assert [t["table"] for t in plan["tables"]].count("item") == 1
