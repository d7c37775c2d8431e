#!/usr/bin/env bash
# Makes .venv in the checkout from the locked requirements; does nothing where it is up to date.
# PYTHON names the interpreter (default: python3.11 or a newer python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/requirements.lock
if cmp -s requirements.lock "$stamp"; then exit 0; fi
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [[ -z $python ]] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "launch/venv.sh: needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
  exit 1
fi
echo "making .venv from requirements.lock (once; a minute or two)" >&2
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
cp requirements.lock "$stamp"
