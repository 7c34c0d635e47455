"""trefoil rollout plan"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.common import console, finish, parse

DESCRIPTION = """Measure what each surface's separate model and the unified one cost, and plan the waves.

The plan is a file to read, edit and review; everything that decides later stands in it.

Example:  trefoil rollout plan --recipe demo_staged --data logs --out plan.yaml"""


@dataclass(frozen=True, kw_only=True)
class Args:
    recipe: str
    """Recipe of the unified model."""
    data: Path
    """Folder of the log."""
    out: Path = Path("plan.yaml")
    """File to write; must not exist."""
    evaluation_days: int = 2
    """Days that the gates judge on."""
    replay_days: int = 1
    """Last days of the log, which the canary replays."""
    matched_within: float = 1.4
    """Greatest ratio of costs that match: one budget must fit surfaces that join together."""
    auc_margin: float = 0.01
    """The most AUC that a challenger may lose, by the far end of its interval."""
    ne_margin: float = 0.02
    """The most NE that a challenger may lose, by the far end of its interval."""
    calibration: tuple[float, float] = (0.9, 1.1)
    """Bounds of the overall ratio of predicted to observed."""
    slice_calibration: tuple[float, float] = (0.8, 1.25)
    """Bounds that the interval of each slice's ratio must reach into."""
    slice_positives: int = 30
    """Slices with fewer positives are shown, not judged."""
    cost_growth: float = 1.5
    """The most that a surface's cost may grow over its separate model's."""
    cost_gain: float = 0.9
    """A cost at most this share of the champion's counts as better."""
    unique_users: int = 64
    """The fewest unique users that one run of an artifact must take."""
    coverage_drop: float = 0.05
    """The most that the share of present values of a feature may fall."""
    drift: float = 0.25
    """The most that a feature's population stability index may be."""
    drift_ignored: tuple[str, ...] = ()
    """Features that move by design, such as ages."""
    share: float = 0.5
    """Share of users that a candidate serves in the canary."""
    alpha: float = 0.05
    """Chance that the canary stops a harmless candidate."""
    loss_margin: float = 0.002
    """Harm in mean log loss that the canary lets pass."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing but errors, and with --json the result."""


def main(argv: list[str]) -> int:
    args = parse(Args, argv, verb="rollout plan", description=DESCRIPTION)
    from pipeline.errors import ConfigError
    from pipeline.rollout.driver.planning import make_plan
    from pipeline.rollout.plan import CanaryPlan, Thresholds, write_plan

    if args.out.exists():
        raise ConfigError(f"{args.out} already exists; a reviewed plan is not written over, give another --out")
    out = console(args)
    thresholds = Thresholds(
        auc_margin=args.auc_margin,
        ne_margin=args.ne_margin,
        calibration=args.calibration,
        slice_calibration=args.slice_calibration,
        slice_positives=args.slice_positives,
        cost_growth=args.cost_growth,
        cost_gain=args.cost_gain,
        p99_ms={},
        unique_users=args.unique_users,
        coverage_drop=args.coverage_drop,
        drift=args.drift,
        drift_ignored=args.drift_ignored,
    )
    canary = CanaryPlan(
        share=args.share,
        salt="canary",
        looks=12,
        alpha=args.alpha,
        loss_margin=args.loss_margin,
        calibration=args.slice_calibration,
    )
    plan, staging = make_plan(
        args.recipe,
        args.data,
        evaluation_days=args.evaluation_days,
        replay_days=args.replay_days,
        matched_within=args.matched_within,
        thresholds=thresholds,
        canary=canary,
        console=out,
    )
    write_plan(args.out, plan)
    out.print(f"cost: {plan.measure}", soft_wrap=True)
    for surface, of in plan.surfaces.items():
        out.print(
            f"  {surface}: {of.candidates} candidates, {of.history} events; separate model {of.separate_ms:.3g} ms, "
            f"unified {of.unified_ms:.3g} ms"
        )
    groups = " | ".join(", ".join(group) for group in staging.groups)
    out.print(f"matched within a factor of {args.matched_within:g}: {groups}")
    if staging.pointless:
        out.print(staging.pointless, style="yellow", soft_wrap=True)
    for number, wave in enumerate(plan.waves, 1):
        costs = ", ".join(f"{s} {ms:.3g}" for s, ms in wave.predicted_ms.items())
        out.print(f"wave {number}: {', '.join(wave.surfaces)}; predicted ms: {costs}", style="bold")
        out.print(f"  {wave.why}", soft_wrap=True)
    out.print(f"wrote {args.out}; read it, then `trefoil rollout run --plan {args.out} --data {args.data} --wave 0`")
    return finish(
        {
            "plan": str(args.out),
            "digest": plan.digest,
            "groups": staging.groups,
            "waves": [wave.surfaces for wave in plan.waves],
            "pointless": staging.pointless,
        },
        args.json,
    )
