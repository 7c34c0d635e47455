"""From configurations to models: what is built, what is refused, and what a pruned model keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchrec.modules.mc_modules import LRU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from components.names import keep_surfaces
from pipeline.config import (
    DaysConfig,
    HistoryConfig,
    LoaderConfig,
    MixtureConfig,
    ModelConfig,
    ProjectionConfig,
    RunConfig,
    config_from_json,
    config_to_json,
    flat_config,
)
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError, DataError, SchemaError
from pipeline.recipes import SHIPPED, find
from pipeline.train.build import build_body, build_model
from pipeline.train.days import split_days
from pipeline.train.model_plan import ModelPlan, model_plan
from pipeline.train.pipelining import compile_blocks
from tests.data.logs import write_log
from tests.train.runs import tiny_config

MOMENTS = dict.fromkeys(("hour", "price", "match"), (0.0, 1.0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_log(tmp_path_factory.mktemp("log") / "data", {"hf": 30, "sr": 20, "rp": 10})[0]


def plan_of(dataset: Dataset, **changes: object) -> ModelPlan:
    return model_plan(tiny_config(**changes), dataset.schema, MOMENTS)


def variant(**changes: object) -> ModelConfig:
    return replace(tiny_config().model, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        variant(),
        variant(history=HistoryConfig(kind="target", width=8)),
        variant(history=HistoryConfig(kind="attention", width=8)),
        variant(history=HistoryConfig(kind="attention", width=8, few_candidates=True)),
        variant(history=HistoryConfig(kind="din", width=8, unit=(8, 4), unit_activation="sigmoid")),
        variant(history=HistoryConfig(kind="mean", width=8), projection=ProjectionConfig(kind="linear", width=8)),
        variant(history=HistoryConfig(kind="none")),
        variant(projection=ProjectionConfig(kind="none")),
        variant(mixture=MixtureConfig(kind="shared_bottom", hidden=(8,))),
        variant(mixture=MixtureConfig(kind="none"), towers="shared", late_fusion=False, calibration="global"),
        variant(mixture=MixtureConfig(kind="ple", experts=2, hidden=(8,)), towers="residual"),
        variant(mixture=MixtureConfig(kind="none"), towers="star", deep=(), late_fusion=False),
        variant(calibration="monotone"),
        variant(calibration="none", cross_layers=0),
        variant(deep=(), late_fusion=False),
        variant(table_dims={"country": 4}),
    ],
)
def test_every_variant_gives_finite_logits_and_gradients_to_all_parameters(
    dataset: Dataset, model: ModelConfig
) -> None:
    plan = plan_of(dataset, model=model)
    built = build_model(plan, table_device=CPU)
    loader = Loader(dataset, plan.layout, LoaderConfig(requests_per_batch=60), days=None, seed=0)
    batch = next(iter(loader.batches(0)))
    outputs = built(batch.inputs)
    assert outputs.logits.shape == outputs.calibrated.shape == (batch.labels.shape[0], 2)
    assert torch.isfinite(outputs.calibrated).all()
    total = outputs.logits.sum()
    if outputs.calibrated.requires_grad:
        total = total + outputs.calibrated.sum()
    total.backward()
    # DDP needs every parameter in the graph, whichever surfaces a rank's rows are of.
    assert [n for n, p in built.named_parameters() if p.grad is None] == []


def test_star_and_a_mixture_by_task_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="reads one vector a row"):
        tiny_config(model=variant(towers="star"))


@pytest.mark.parametrize("surface", ["hf", "sr", "rp"])
@pytest.mark.parametrize(
    "model", [variant(), variant(mixture=MixtureConfig(kind="ple", experts=2, hidden=(8,)), towers="residual")]
)
def test_a_pruned_model_scores_its_surface_as_the_whole_one(dataset: Dataset, surface: str, model: ModelConfig) -> None:
    plan = plan_of(dataset, model=model)
    torch.manual_seed(0)
    whole = build_model(plan, table_device=CPU)
    pruned_plan = replace(plan, keep=(surface,))
    pruned = build_model(pruned_plan, table_device=CPU)
    names = set(pruned.state_dict())
    kept = {n: v for n, v in keep_surfaces(whole.state_dict(), keep=[surface]).items() if n in names}
    pruned.load_state_dict(kept)  # strict: nothing of the pruned model is missing
    assert not [n for n in names if "surface_" in n and f"surface_{surface}" not in n]
    config = LoaderConfig(requests_per_batch=1000)
    batches = [next(iter(Loader(dataset, p.layout, config, days=None, seed=0).batches(0))) for p in (plan, pruned_plan)]
    position = plan.layout.surfaces.index(surface)
    counts = batches[0].inputs.candidates_per_surface
    rows = slice(sum(counts[:position]), sum(counts[: position + 1]))
    torch.testing.assert_close(pruned(batches[1].inputs).calibrated, whole(batches[0].inputs).calibrated[rows])


def test_tables_of_other_surfaces_features_are_pruned(dataset: Dataset) -> None:
    tables = {
        n.split(".")[-2]
        for n, _ in build_model(replace(plan_of(dataset), keep=("hf",)), table_device=CPU).embeddings.named_parameters()
    }
    assert tables == {"user", "country", "topic", "item"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"surfaces": ("hf", "srr")}, SchemaError, "unknown surface 'srr'; did you mean 'sr'"),
        ({"tasks": ("clik",)}, SchemaError, "unknown task 'clik'; did you mean 'click'"),
        ({"exclude": ("contry",)}, SchemaError, "did you mean 'country'"),
        ({"model": ModelConfig(table_dims={"item": 4})}, ConfigError, "table_dims: unknown pooled table 'item'"),
    ],
)
def test_what_the_log_does_not_have_is_named(
    dataset: Dataset, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_of(dataset, **changes)


def test_all_problems_of_a_configuration_come_together() -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig(
            name="bad",
            surfaces=(),
            tasks=("click",),
            task_weights={"clik": 1.0},
            epochs=0,
            loader=LoaderConfig(requests_per_batch=0, surface_weights={"hf": 1.0}, temperature=2.0),
            model=ModelConfig(history=HistoryConfig(width=10, heads=4)),
            days=DaysConfig(first="2026-01-02", last="2026-01-01"),
        )
    for part in (
        "epochs is 0",
        "loader.requests_per_batch is 0",
        "surfaces is empty",
        "did you mean 'click'",
        "surface_weights: unknown surface 'hf'",
        "temperature are both given",
        "is after days.last",
        "not a multiple of model.history.heads 4",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_is_whole_and_survives_json(name: str) -> None:
    config = find(name)()
    assert config_from_json(config_to_json(config), source="test") == config
    assert flat_config(config)["loader.requests_per_batch"] == str(config.loader.requests_per_batch)


def test_recipes_of_ones_own_and_unknown_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from pipeline.recipes.demo import demo\ndef mine():\n    return demo()\n")
    assert find(f"{path}:mine")() == find("demo")()
    with pytest.raises(ConfigError, match="unknown function 'mien'; did you mean 'mine'"):
        find(f"{path}:mien")
    with pytest.raises(ConfigError, match="there is no file"):
        find(f"{tmp_path}/none.py:mine")
    with pytest.raises(ConfigError, match="unknown recipe 'kuairnd'; did you mean 'kuairand'"):
        find("kuairnd")


def test_damaged_configurations_name_the_field() -> None:
    text = config_to_json(find("demo")()).replace(b'"epochs": 2', b'"epochs": "two"')
    with pytest.raises(ConfigError, match="epochs: Input should be a valid integer"):
        config_from_json(text, source="config.json")


def test_features_are_left_out_by_pattern(dataset: Dataset) -> None:
    layout = plan_of(dataset, exclude=("p*", "query")).layout
    assert "price" not in layout.features
    assert "query" not in layout.features
    assert {"user", "country", "match"} <= layout.features


def test_days_are_split_by_time(dataset: Dataset) -> None:
    split = split_days(dataset, DaysConfig(validation=0, test=1))
    assert (split.train, split.validation, split.test) == (("2026-01-01",), (), ("2026-01-02",))
    with pytest.raises(ConfigError, match="none is left to train on"):
        split_days(dataset, DaysConfig(validation=1, test=1))
    with pytest.raises(DataError, match="unknown day '2026-01-03'"):
        split_days(dataset, DaysConfig(last="2026-01-03"))


def test_ids_find_their_rows_as_the_recipe_says_or_not_at_all(dataset: Dataset) -> None:
    ids = {v.name: v.method for v in dataset.schema.vocabularies}
    assert plan_of(dataset, model=variant(ids=ids)).layout == plan_of(dataset).layout
    assert set(ids.values()) == {"given"}
    wrong = {"item": "hash", "user": "managed", "itm": "given"}
    with pytest.raises(ConfigError) as caught:
        plan_of(dataset, model=variant(ids=wrong))
    message = str(caught.value)
    assert "table 'item' shall find its rows by 'hash', and the log's ids are of method 'given'" in message
    assert "table 'user' cannot be managed: on CPU FBGEMM 1.8 cannot reset the rows that are evicted" in message
    assert "unknown table 'itm'; did you mean 'item'" in message


def test_managed_collision_still_cannot_be_trained_and_resumed_here() -> None:
    """The reasons for which the recipe's word `managed` is refused; when this fails, a new version may do it."""
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::reset_weight_momentum", "CPU")
    module = MCHManagedCollisionModule(
        zch_size=4, device=CPU, eviction_policy=LRU_EvictionPolicy(), eviction_interval=3, input_hash_size=100
    )
    module({"item": JaggedTensor(values=torch.tensor([70, 71]), lengths=torch.ones(2, dtype=torch.int64))})
    assert module._current_history_buffer_offset == 2
    assert not [name for name in module.state_dict() if "history" in name]


def test_blocks_that_eat_tensors_alone_are_compiled_and_keep_their_names(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    body = build_body(plan)
    assert compile_blocks(body) == ["history.encoder.layers.0.feed", "history.projection", "trunk.cross", "trunk.deep"]
    assert list(body.state_dict()) == list(build_body(plan).state_dict())
