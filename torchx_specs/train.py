"""The training job for TorchX; see `torchx run train --help`."""

from torchx import specs

from torchx_specs.launch import DEFAULT_RUN_DIR, processes, ranks, resource_of


def train(
    *overrides: str,
    recipe: str,
    data: str,
    run_dir: str = DEFAULT_RUN_DIR,
    register: bool = False,
    j: str | None = None,
    nproc: int = 0,
    h: str = "cpu8",
    image: str = "trefoil:latest",
    python: str = "python",
    max_restarts: int = 0,
    max_retries: int = 0,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
) -> specs.AppDef:
    """Train a recipe on one or many nodes, then score its validation and test days.

    For example: torchx run --scheduler local_cwd train --recipe demo --data logs --nproc 2 -- --epochs 2

    Args:
        overrides: fields of the recipe, after --, as `trefoil train` takes them: -- --epochs 2 --seed 1
        recipe: a shipped recipe (see `trefoil recipes`) or path/to/file.py:function
        data: folder of the log, as the job sees it
        run_dir: folder of the run, the same for every node; one that holds checkpoints is gone on with
        register: True to export every surface afterwards and register it as challenger
        j: nodes and processes on each, such as 2x8, or 1:2x8 to go on with one when a node is lost
        nproc: processes on a single node; with neither given, one for each of its GPUs, or one
        h: named resource of a node: cpu8, a100x8, h100x8, h200x8 or any other that is registered
        image: container image, where the scheduler runs containers
        python: interpreter to run, as the job sees it
        max_restarts: times that torchrun starts all ranks again, from their last checkpoint, after one has failed
        max_retries: times that the scheduler starts the job again (local_cwd never does)
        env: variables for every rank, such as MLFLOW_TRACKING_URI=http://mlflow:5000,LOGLEVEL=INFO
        mounts: volumes in containers, such as type=volume,src=logs,dst=/logs,readonly
    """
    resource = resource_of(h)
    size = processes(j, nproc, resource)
    return ranks(
        "train",
        recipe,
        ["--recipe", recipe, "--data", data, "--run-dir", run_dir]
        + (["--register"] if register else [])
        + list(overrides),
        size=size,
        image=image,
        resource=resource,
        python=python,
        env=env,
        mounts=mounts,
        max_restarts=max_restarts,
        max_retries=max_retries,
    )
