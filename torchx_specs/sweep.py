"""The search over a recipe's fields for TorchX; see `torchx run sweep --help`."""

from dataclasses import replace

from torchx import specs

from torchx_specs.launch import at_least, single


def sweep(
    *flags: str,
    recipe: str,
    data: str,
    space: str,
    study: str,
    trials: int,
    workers: int = 1,
    h: str = "cpu8",
    image: str = "trefoil:latest",
    python: str = "python",
    max_retries: int = 0,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
) -> specs.AppDef:
    """Search a recipe's fields by Optuna; workers on many nodes share the trials of one study.

    For example: torchx run --scheduler local_cwd sweep --recipe demo --data logs --space s.yaml --study s --trials 9

    Args:
        flags: further flags, after --, as `trefoil sweep` takes them: -- --folds 2 --nproc 8
        recipe: a shipped recipe (see `trefoil recipes`), path/to/file.py:function or a run's config.json
        data: folder of the log, as the job sees it
        space: YAML file of the fields to search, as the job sees it
        study: folder of the study, shared by all workers; one that exists is gone on with
        trials: trials to finish, by all workers together
        workers: nodes that take trials, each one at a time
        h: named resource of a node: cpu8, a100x8, h100x8, h200x8 or any other that is registered
        image: container image, where the scheduler runs containers
        python: interpreter to run, as the job sees it
        max_retries: times that the scheduler starts the job again (local_cwd never does)
        env: variables of the job, such as MLFLOW_TRACKING_URI=http://mlflow:5000
        mounts: volumes in containers, such as type=volume,src=logs,dst=/logs,readonly
    """
    at_least(1, trials=trials, workers=workers)
    app = single(
        "sweep",
        study,
        [
            *("--recipe", recipe, "--data", data, "--space", space, "--study", study, "--trials", str(trials)),
            *flags,
        ],
        image=image,
        h=h,
        python=python,
        env=env,
        mounts=mounts,
        max_retries=max_retries,
    )
    return replace(app, roles=[replace(app.roles[0], num_replicas=workers)])
