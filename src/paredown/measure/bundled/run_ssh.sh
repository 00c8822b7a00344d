#!/bin/sh
# Copies this bundle to a machine that ssh reaches, runs it there, and brings results.json back beside this script.
# Usage: run_ssh.sh HOST [THREADS]
# REMOTE_PYTHON: interpreter there (default python3). READINGS: readings of a series (default 200). PAUSE: seconds of rest
# before a disturbed series is repeated (default 10).
# Needs ssh without a password prompt; there: tar, Python 3.8 or newer, numpy and the model's runtime.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
host=${1:-}
threads=${2:-1}
python=${REMOTE_PYTHON:-python3}

fail() { # code, message
    echo "error: $2" >&2
    exit "$1"
}

case $host in
'' | -* | *[!A-Za-z0-9_.@:%-]*) fail 2 "HOST must be a name or address that ssh takes. Got '$host'. Usage: run_ssh.sh HOST [THREADS]." ;;
esac
case $threads in
'' | *[!0-9]* | 0*) fail 2 "THREADS must be a whole number from 1. Got '$threads'." ;;
esac
case ${READINGS:-200}${PAUSE:-10} in
*[!0-9]*) fail 2 "READINGS and PAUSE must be whole numbers. Got '${READINGS:-}' and '${PAUSE:-}'." ;;
esac
case $python in
-* | *[!A-Za-z0-9_./-]*) fail 2 "REMOTE_PYTHON must be a plain path. Got '$python'." ;;
esac
command -v ssh >/dev/null 2>&1 || fail 8 "ssh is not installed here. Install openssh-client, or copy this folder to the device and run run_local.sh there."

there() { ssh -o BatchMode=yes -o ConnectTimeout=15 -- "$host" "$@"; }

there 'echo ready' >/dev/null || fail 8 "ssh does not reach $host without a password. Try: ssh $host; then ssh-copy-id $host, and run this again."
folder=$(there 'mktemp -d /tmp/paredown.XXXXXX') || fail 8 "no folder could be made in /tmp on $host. Free space there: ssh $host df -h /tmp."
case $folder in
/tmp/paredown.*[!A-Za-z0-9.]*) fail 8 "$host answered with an odd folder name." ;;
/tmp/paredown.?*) ;;
*) fail 8 "$host answered with an odd folder name. Its login shell must print nothing of its own." ;;
esac
trap 'there "rm -rf $folder" >/dev/null 2>&1 || true' EXIT

tar -C "$here" --exclude ./results.json -cf - . | there "tar -C $folder -xf -" || fail 8 "the bundle could not be copied to $host:$folder. Free space there: ssh $host df -h /tmp."
there "$python -c 'import sys, numpy; sys.exit(sys.version_info < (3, 8))'" || fail 8 "$host must have Python 3.8 or newer with numpy as '$python'. Install it there, or set REMOTE_PYTHON."
code=0
there "$python $folder/runner.py --threads $threads --readings ${READINGS:-200} --pause ${PAUSE:-10}" || code=$?
[ "$code" -ne 255 ] || fail 8 "the connection to $host went away in the middle. Nothing was kept; run this again."
[ "$code" -eq 0 ] || exit "$code"
there "cat $folder/results.json" >"$here/results.json.part" || fail 8 "results.json could not be brought back from $host. Run this again."
mv -- "$here/results.json.part" "$here/results.json"
echo "wrote $here/results.json. Next: paredown measure $here --import $here/results.json"
