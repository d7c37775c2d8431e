#!/usr/bin/env bash
# Runs the tests in the same virtual environment as launch/local.sh, in as many processes as there are cores (four at
# most); arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/venv.sh
.venv/bin/python -m ruff check pagoda_jax experiments tests
exec .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
