#!/usr/bin/env bash
# Runs the tests in the same virtual environment as launch/local.sh, in one process more than there are cores (four at
# most, and one for every 7 GB of memory), as some tests wait for other processes or for clocks; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/venv.sh
.venv/bin/python -m ruff check pagoda_jax experiments tests
count=$(.venv/bin/python -c 'import os
memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
print(max(1, min(4, os.cpu_count() + 1, int(memory / 7e9))))')
exec .venv/bin/python -m pytest -n "$count" --dist=loadfile --no-loadscope-reorder "$@"
