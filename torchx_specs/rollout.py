"""One wave of a rollout for TorchX; see `torchx run rollout --help`."""

from torchx import specs

from torchx_specs.launch import at_least, single


def rollout(
    *flags: str,
    plan: str,
    data: str,
    wave: int,
    out: str | None = None,
    h: str = "cpu8",
    image: str = "trefoil:latest",
    python: str = "python",
    max_retries: int = 0,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
) -> specs.AppDef:
    """Train a wave step by step, measure it and let the gates decide; what passes becomes challenger.

    For example: torchx run --scheduler local_cwd rollout --plan plan.yaml --data logs --wave 1

    Args:
        flags: further flags, after --, as `trefoil rollout run` takes them: -- --promote
        plan: the plan that `trefoil rollout plan` wrote, as the job sees it
        data: folder of the log that it was made for, as the job sees it
        wave: number of the wave; 0 for the separate models
        out: folder of the rollout, the same for all waves; none given takes TREFOIL_HOME/rollout
        h: named resource of the node: cpu8, a100x8, h100x8, h200x8 or any other that is registered
        image: container image, where the scheduler runs containers
        python: interpreter to run, as the job sees it
        max_retries: times that the scheduler starts the job again, which then goes on (local_cwd never does)
        env: variables of the job, such as MLFLOW_TRACKING_URI=http://mlflow:5000
        mounts: volumes in containers, such as type=volume,src=logs,dst=/logs,readonly
    """
    at_least(0, wave=wave)
    place = [] if out is None else ["--out", out]
    return single(
        "rollout",
        f"wave-{wave}",
        ["run", "--plan", plan, "--data", data, "--wave", str(wave), *place, *flags],
        image=image,
        h=h,
        python=python,
        env=env,
        mounts=mounts,
        max_retries=max_retries,
    )
