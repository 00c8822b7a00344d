#!/bin/sh
# Runs the model of this bundle on this machine and writes results.json beside this script.
# Usage: run_local.sh [--threads N] [--out FILE]     PYTHON names the interpreter (default: python3).
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import numpy' 2>/dev/null; then
    echo "error: $python must be a Python 3.8 or newer with numpy. Run: $python -m pip install numpy, or set PYTHON." >&2
    exit 8
fi
exec "$python" "$here/runner.py" "$@"
