#!/usr/bin/env bash
# Runs the tests in the same virtual environment as launch/local.sh; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/venv.sh
.venv/bin/python -m ruff check pagoda_jax experiments tests
exec .venv/bin/python -m pytest "$@"
