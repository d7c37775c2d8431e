#!/usr/bin/env bash
# Runs an experiment on this machine, in a virtual environment of its own (.venv in the checkout).
#   bash launch/local.sh --config=experiments/mnist.py --workdir=runs/mnist
# Everything after the script's name goes to `pagoda run`; --dry_run prints what would be done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ " $* " == *" --dry_run "* ]]; then
  args=("${@/--dry_run/}")
  echo "would make .venv from requirements.lock (unless it is there) and run:"
  echo ".venv/bin/python -m pagoda_jax.main run ${args[*]}"
  exit 0
fi
bash launch/venv.sh
exec .venv/bin/python -m pagoda_jax.main run "$@"
