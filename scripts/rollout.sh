#!/usr/bin/env bash
# The staged rollout from nothing, on simulated logs: costs, plan, waves, gates, promotion, and a regression that is
# planted on one surface, caught and rolled back while the others stay. Eight minutes of processor time.
# Usage: scripts/rollout.sh [FOLDER]; with the environment's bin on PATH, as `make rollout` has it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-rollout}
export TREFOIL_HOME=$folder/runs
export COLUMNS=${COLUMNS:-120}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
logs=$folder/logs
plan=$folder/plan.yaml

say() { printf '\n== %s\n' "$*"; }
with_alias() { # surfaces that have a version with this alias, one a line
  trefoil rollout status --json | python -c '
import json, sys
print(*(s for s, a in json.load(sys.stdin)["aliases"].items() if sys.argv[1] in a), sep="\n")' "$1"
}
promote_all() {
  for surface in $(with_alias challenger); do
    trefoil rollout promote "$surface" --plan "$plan" --reason "$1"
  done
}
run() { trefoil rollout run --plan "$plan" --data "$logs" "$@"; }

if [ ! -e "$logs/dataset.json" ]; then
  say "Three surfaces; Related Pins has long histories and many candidates"
  trefoil simulate --out "$logs" --requests 24000 --days 8 --users 1500 \
    --surfaces.1.volume 0.35 --surfaces.2.candidates 32 --surfaces.2.history 128
fi
if [ ! -e "$plan" ]; then
  say "What surfaces cost, and the waves that follow"
  # Small logs know little: margins are as wide as two evaluation days can tell from nothing.
  trefoil rollout plan --recipe demo_staged --data "$logs" --out "$plan" \
    --auc-margin 0.03 --ne-margin 0.03 --calibration 0.8 1.25 --slice-calibration 0.65 1.5 \
    --drift-ignored ad_age_days tenure_days history_events item advertiser user
fi
say "Wave 0: the separate models, as they serve today"
run --wave 0 --promote
say "Wave 1: the cheap pair"
run --wave 1
promote_all "report of wave 1 read"
say "Wave 2: the expensive surface joins, started from wave 1"
run --wave 2
say "The canary: a later day, challengers beside champions"
trefoil rollout replay --plan "$plan" --data "$logs"
promote_all "report of wave 2 read, canary quiet"
trefoil rollout status
victim=$(with_alias previous | head -n 1)
say "The probabilities of $victim go wrong: $victim is rolled back, the others stay"
trefoil rollout replay --plan "$plan" --data "$logs" --fault "$victim:scores*2.5"
say "What serves now, and how it came to"
trefoil rollout status
trefoil rollout history
cat <<END

Reports: $TREFOIL_HOME/rollout/wave-*/report.html
Every decision with its evidence is a run in MLflow: TREFOIL_HOME=$TREFOIL_HOME make ui
END
