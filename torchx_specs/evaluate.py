"""The evaluation job for TorchX; see `torchx run evaluate --help`."""

from torchx import specs

from torchx_specs.launch import single


def evaluate(
    *flags: str,
    checkpoint: str,
    data: str,
    h: str = "cpu8",
    image: str = "trefoil:latest",
    python: str = "python",
    max_retries: int = 0,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
) -> specs.AppDef:
    """Score a log's days with a checkpoint, per surface and task, with intervals.

    For example: torchx run --scheduler local_cwd evaluate --checkpoint runs/a/checkpoints/100 --data logs

    Args:
        flags: further flags, after --, as `trefoil evaluate` takes them
        checkpoint: folder of the checkpoint, as the job sees it
        data: folder of the log, as the job sees it
        h: named resource of the node: cpu8, a100x8, h100x8, h200x8 or any other that is registered
        image: container image, where the scheduler runs containers
        python: interpreter to run, as the job sees it
        max_retries: times that the scheduler starts the job again (local_cwd never does)
        env: variables of the job, such as MLFLOW_TRACKING_URI=http://mlflow:5000
        mounts: volumes in containers, such as type=volume,src=logs,dst=/logs,readonly
    """
    return single(
        "evaluate",
        data,
        ["--checkpoint", checkpoint, "--data", data, *flags],
        image=image,
        h=h,
        python=python,
        env=env,
        mounts=mounts,
        max_retries=max_retries,
    )
