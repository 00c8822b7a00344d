#!/bin/sh
# Runs this bundle on an Android phone with the runtime's own benchmark program, and writes results.json beside this script.
# Usage: run_adb.sh PROGRAM [SERIAL] [THREADS]
#   PROGRAM   an Android build of onnxruntime_perf_test, executor_runner or benchmark_model; *.so beside it travel along.
#   SERIAL    which phone, where more than one is attached (adb devices).
# PYTHON: interpreter on this machine (default python3, 3.8 or newer). READINGS: readings of a series (default 100).
# PAUSE: seconds of rest before a disturbed series is repeated (default 30).
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
program=${1:-}
serial=${2:-}
threads=${3:-1}
python=${PYTHON:-python3}
readings=${READINGS:-100}
remote=/data/local/tmp/paredown

fail() { # code, message
    echo "error: $2" >&2
    exit "$1"
}

explain() { # what was done, what adb said: the exact next step
    case $2 in
    *unauthorized*) fail 8 "the phone does not trust this machine yet ($1). Unlock it and accept 'Allow USB debugging', then run this again; if it does not ask: adb kill-server, then pull out the cable and plug it in." ;;
    *'No space left'* | *'not enough space'*) fail 8 "no space on the phone ($1). Free some, or remove what an earlier run left: adb -s $serial shell rm -r $remote." ;;
    *'not found'*device* | *device*'not found'* | *'device offline'* | *'no devices'* | *'error: closed'* | *'protocol fault'*) fail 8 "the phone went away ($1). Plug it in, check that 'adb devices' lists $serial as device, and run this again; nothing was kept." ;;
    *'avc:'*denied* | *'Permission denied'* | *'not permitted'*) fail 8 "the phone forbids it ($1: SELinux or noexec). See: adb -s $serial shell getenforce; adb -s $serial shell ls -lZ $remote. Use a phone whose shell may execute in /data/local/tmp, or one with root: adb -s $serial shell su -c 'setenforce 0'." ;;
    *'not executable'* | *'Exec format'* | *'CANNOT LINK'* | *'bad ELF'*) fail 8 "the program does not fit the phone ($1), whose ABI is $abi. Build it for that ABI, and put the .so files that it needs beside it. The phone said: $2" ;;
    *) fail 8 "$1 did not work. The phone said: $2" ;;
    esac
}

kind=$(basename -- "${program:-none}")
case $kind in
onnxruntime_perf_test* | executor_runner* | benchmark_model*) ;;
*) fail 2 "PROGRAM must be a path to onnxruntime_perf_test, executor_runner or benchmark_model. Got '$program'. Usage: run_adb.sh PROGRAM [SERIAL] [THREADS]." ;;
esac
[ -f "$program" ] || fail 8 "there is no program at '$program'. Build it for Android (arm64-v8a), or take the runtime's prebuilt one."
case $serial in
-* | *[!A-Za-z0-9_.:-]*) fail 2 "SERIAL must be as 'adb devices' prints it. Got '$serial'." ;;
esac
case $threads$readings in
*[!0-9]* | 0*) fail 2 "THREADS and READINGS must be whole numbers from 1. Got '$threads' and '$readings'." ;;
esac
[ "$readings" -ge 20 ] || fail 2 "READINGS must be 20 or more. Got '$readings'."
command -v adb >/dev/null 2>&1 || fail 8 "adb is not installed here. Install Android's platform-tools and put adb on PATH."
command -v "$python" >/dev/null 2>&1 || fail 8 "$python is not installed here: it reads what the phone printed. Install Python 3.8 or newer, or set PYTHON."

plan=$("$python" - "$here/manifest.json" <<'PLAN'
import json, re, sys
manifest = json.load(open(sys.argv[1]))
print("program=%s" % re.sub(r"[^a-z_]", "", manifest["program"]))
print("model=%s" % re.sub(r"[^A-Za-z0-9_.-]", "", manifest["model"]["file"]))
print("golden=%d" % len(manifest["golden"]))
print("inputs=%d" % len(manifest["inputs"]))
PLAN
) || fail 3 "manifest.json of this bundle cannot be read. Copy the bundle again."
known=$(printf '%s\n' "$plan" | sed -n 's/^program=//p')
model=$(printf '%s\n' "$plan" | sed -n 's/^model=//p')
golden=$(printf '%s\n' "$plan" | sed -n 's/^golden=//p')
inputs=$(printf '%s\n' "$plan" | sed -n 's/^inputs=//p')
[ -n "$known" ] || fail 2 "this kind of model ($model) has no benchmark program for Android that this script knows. Use run_ssh.sh or run_local.sh."
case $kind in
"$known"*) ;;
*) fail 2 "PROGRAM must be $known for this model. Got '$kind'." ;;
esac

# ------------------------------------------------------------------------------------------------------ which phone
attached=$(adb devices 2>&1) || fail 8 "adb does not work here: $attached. Try: adb kill-server; adb devices."
attached=$(printf '%s\n' "$attached" | tr -d '\r' | sed -n '/^List of devices attached/,$p' | sed 1d | sed '/^[[:space:]]*$/d')
if [ -n "$serial" ]; then
    state=$(printf '%s\n' "$attached" | awk -v s="$serial" '$1 == s { $1 = ""; print substr($0, 2); exit }')
    [ -n "$state" ] || fail 8 "no phone '$serial' is attached. Attached: $(printf '%s' "${attached:-none}" | tr '\n\t' '; '). Take a serial from there."
else
    count=$(printf '%s' "$attached" | grep -c . || true)
    [ "$count" -gt 0 ] || fail 8 "no phone is attached. Plug one in, switch on Developer options > USB debugging, and check that 'adb devices' lists it."
    [ "$count" -eq 1 ] || fail 8 "$count phones are attached: $(printf '%s' "$attached" | tr '\n\t' '; '). Say which: run_adb.sh PROGRAM SERIAL."
    serial=$(printf '%s\n' "$attached" | awk '{ print $1 }')
    state=$(printf '%s\n' "$attached" | awk '{ $1 = ""; print substr($0, 2) }')
fi
abi=unknown
case $state in
device*) ;;
unauthorized*) explain "adb devices" "device unauthorized" ;;
offline*) fail 8 "the phone $serial is offline. Run: adb reconnect offline; or pull out the cable, plug it in and unlock the phone." ;;
*permissions*) fail 8 "this machine may not speak to the phone over USB ($state). Install the udev rules (android-sdk-platform-tools-common) or add yourself to the group plugdev, then plug it in again." ;;
*) fail 8 "the phone $serial is in the state '$state'. Start Android on it, so that 'adb devices' says device." ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# adb's own exit code says little on old phones: the command's code is printed and read back.
shell() { # label, command: output in $work/said
    if ! adb -s "$serial" shell "{ $2; } 2>&1; echo paredown-exit=\$?" </dev/null >"$work/raw" 2>&1; then
        explain "$1" "$(tail -c 2000 "$work/raw") device not found"
    fi
    tr -d '\r' <"$work/raw" >"$work/whole"
    sed '/^paredown-exit=/d' "$work/whole" >"$work/said"
    code=$(sed -n 's/^paredown-exit=//p' "$work/whole" | tail -n 1)
    [ "$code" = 0 ] || explain "$1" "$(tail -c 2000 "$work/said")${code:+ (exit code $code)}${code:-device not found: it said nothing at the end}"
}

transfer() { # label, adb arguments
    label=$1
    shift
    if ! adb -s "$serial" "$@" </dev/null >"$work/raw" 2>&1; then
        gone=
        adb -s "$serial" get-state >/dev/null 2>&1 || gone=' device not found'
        explain "$label" "$(tail -c 2000 "$work/raw")$gone"
    fi
}

# --------------------------------------------------------------------------------------------------------- what it is
results=$work/pulled
mkdir -p "$results/outputs"
shell "getprop" "for key in ro.product.cpu.abi ro.product.manufacturer ro.product.model ro.soc.model ro.build.version.release; do getprop \$key; done; nproc || grep -c ^processor /proc/cpuinfo; grep -m 1 Features /proc/cpuinfo || true"
abi=$(sed -n 1p "$work/said")
{
    echo "program=$kind"
    echo "threads=$threads"
    line=0
    for name in abi manufacturer model soc android cores; do
        line=$((line + 1))
        echo "$name=$(sed -n "${line}p" "$work/said")"
    done
    echo "features=$(sed -n '7s/.*: *//p' "$work/said")"
} >"$results/device.txt"

# ------------------------------------------------------------------------------------------------------- copy it there
need=$(du -sk "$here" "$program" | awk '{ kb += $1 } END { print kb + 1024 }')
shell "df" "df -k /data/local/tmp"
free=$(awk 'NR > 1 && $4 ~ /^[0-9]+$/ { free = $4 } END { print free }' "$work/said")
if [ -n "$free" ] && [ "$free" -lt "$need" ]; then
    fail 8 "no space on the phone: /data/local/tmp has $free kB free, $need kB are needed. Free some, or remove what an earlier run left: adb -s $serial shell rm -r $remote."
fi
shell "mkdir" "rm -rf $remote && mkdir -p $remote/out"
transfer "push of the bundle" push "$here/." "$remote/"
transfer "push of the program" push "$program" "$remote/program"
for library in "$(dirname -- "$program")"/*.so; do
    [ -f "$library" ] || continue
    transfer "push of $(basename -- "$library")" push "$library" "$remote/"
done
shell "chmod" "chmod 755 $remote/program"

# -------------------------------------------------------------------------------------------------------------- run it
enter="cd $remote && export LD_LIBRARY_PATH=$remote"
heat="cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null || true"

input_files() { # number of the golden sample: its files, by comma
    list=
    at=0
    while [ "$at" -lt "$inputs" ]; do
        list=$list${list:+,}golden/$1/input_$at.bin
        at=$((at + 1))
    done
    echo "$list"
}

if [ "${kind#executor_runner}" != "$kind" ]; then # the one program that writes outputs
    sample=0
    while [ "$sample" -lt "$golden" ]; do
        shell "run of golden sample $sample" "$enter && ./program --model_path=$model --inputs=$(input_files "$sample") --output_file=out/$sample --print_output=none --cpu_threads=$threads"
        sample=$((sample + 1))
    done
    transfer "pull of the outputs" pull "$remote/out/." "$results/outputs/"
fi

number=1
while :; do
    series=$results/series-$number
    mkdir -p "$series"
    shell "temperature" "$heat"
    cp "$work/said" "$series/celsius-before.txt"
    case $kind in
    onnxruntime_perf_test*)
        shell "run" "$enter && rm -f readings.csv && ./program -m times -r $readings -x $threads -y 1 -e cpu $model readings.csv"
        cp "$work/said" "$series/log.txt"
        transfer "pull of the readings" pull "$remote/readings.csv" "$series/readings.csv"
        ;;
    executor_runner*)
        shell "run" "$enter && ./program --model_path=$model --inputs=$(input_files 0) --num_executions=$((readings + 10)) --print_output=none --cpu_threads=$threads"
        awk '/Iteration [0-9]+ of/ && ++n <= 10 { next } { print }' "$work/said" >"$series/log.txt" # ten runs to warm up
        ;;
    benchmark_model*)
        shell "run" "$enter && n=0; while [ \$n -lt $readings ]; do ./program --graph=$model --num_threads=$threads --warmup_runs=1 --num_runs=10 --min_secs=0 || exit 1; n=\$((n + 1)); done"
        { echo "runs_per_reading=10"; cat "$work/said"; } >"$series/log.txt"
        ;;
    esac
    shell "temperature" "$heat"
    cp "$work/said" "$series/celsius-after.txt"
    steady=0
    "$python" "$here/runner.py" --steady "$series" || steady=$?
    [ "$steady" -le 1 ] || exit "$steady"
    if [ "$steady" -eq 0 ] || [ "$number" -ge 3 ]; then break; fi
    echo "series $number was disturbed (heat or other load): resting ${PAUSE:-30} s, then again" >&2
    sleep "${PAUSE:-30}"
    number=$((number + 1))
done
shell "clean up" "rm -rf $remote"
"$python" "$here/runner.py" --collect "$results" --out "$here/results.json"
echo "wrote $here/results.json. Next: paredown measure $here --import $here/results.json"
