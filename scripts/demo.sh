#!/usr/bin/env bash
# The main job from nothing: simulated logs, two ranks under TorchX, a table, and artifacts in the registry.
# Usage: scripts/demo.sh [FOLDER]; with the environment's bin on PATH, as `make demo` has it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-demo}
export TREFOIL_HOME=$folder/runs
export COLUMNS=${COLUMNS:-120}

if [ ! -e "$folder/logs/dataset.json" ]; then
  trefoil simulate --out "$folder/logs"
fi
run=$TREFOIL_HOME/demo-$(date -u +%Y%m%dT%H%M%S)
# torchx waits for a local job, streams its output, and fails if the job fails.
torchx run --scheduler local_cwd -cfg "log_dir=$folder/torchx" torchx_specs/train.py:train \
  --recipe demo --data "$folder/logs" --run_dir "$run" --register True --nproc 2 --python "$(command -v python)"

cat <<END

The run is in $run.
Where to look next:
  trefoil recipes                        what else can be trained
  TREFOIL_HOME=$TREFOIL_HOME make ui     runs, curves and registered models in MLflow's pages
  trefoil train --recipe demo --data $folder/logs --nproc 2 --epochs 2    the same without TorchX, one field changed
END
