"""The ingest job for TorchX; see `torchx run ingest --help`."""

from dataclasses import replace

from torchx import specs

from torchx_specs.launch import at_least, single


def ingest(
    *flags: str,
    spec: str,
    out: str,
    workers: int = 1,
    h: str = "cpu8",
    image: str = "trefoil:latest",
    python: str = "python",
    max_retries: int = 0,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
) -> specs.AppDef:
    """Turn flat impression logs into a Trefoil log; workers on many nodes share its buckets.

    For example: torchx run --scheduler local_cwd ingest --spec my_logs.yaml --out logs

    Args:
        flags: further flags, after --, as `trefoil ingest` takes them
        spec: the YAML file that describes the flat logs, as the job sees it
        out: folder of the log to write, shared by all workers
        workers: nodes that each take buckets nobody is at; one of them writes the log
        h: named resource of a node: cpu8, a100x8, h100x8, h200x8 or any other that is registered
        image: container image, where the scheduler runs containers
        python: interpreter to run, as the job sees it
        max_retries: times that the scheduler starts the job again (local_cwd never does)
        env: variables of the job, such as MLFLOW_TRACKING_URI=http://mlflow:5000
        mounts: volumes in containers, such as type=volume,src=logs,dst=/logs,readonly
    """
    at_least(1, workers=workers)
    app = single(
        "ingest",
        out,
        [spec, "--out", out, *(("--workers", str(workers)) if workers > 1 else ()), *flags],
        image=image,
        h=h,
        python=python,
        env=env,
        mounts=mounts,
        max_retries=max_retries,
    )
    return replace(app, roles=[replace(app.roles[0], num_replicas=workers)])
