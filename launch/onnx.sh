#!/usr/bin/env bash
# Adds generator.onnx to a folder of `pagoda export` or `pagoda publish`: bash launch/onnx.sh FOLDER [--speed]
# In a virtual environment of its own, .venv-onnx, as jax2onnx wants an older orbax-checkpoint than training does.
# PYTHON names the interpreter (default: python3.11 or a newer python3).
set -euo pipefail
if (($# < 1)); then
  echo "usage: bash launch/onnx.sh FOLDER [--speed]" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wanted="jax2onnx==0.17.1 onnxruntime>=1.20"
venv=${ONNX_VENV:-$here/.venv-onnx}
if [[ "$(cat "$venv/wanted" 2>/dev/null)" != "$wanted" ]]; then
  echo "making $venv (once; a few minutes)" >&2
  rm -rf "$venv"
  "${PYTHON:-$(command -v python3.11 || command -v python3)}" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $wanted
  echo "$wanted" > "$venv/wanted"
fi
PYTHONPATH="$here" JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pagoda_jax.use.to_onnx "$@"
