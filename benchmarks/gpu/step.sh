#!/bin/sh
# A step of a run on a machine with a GPU and torch, and without network, in the root of this tree:
#   step.sh part NAME SHA256 | machine | unpack | smoke | tests | sessions | service | served | training
#   step.sh each STEP…
# BUNDLE: where a part comes to. WORK: a folder outside of the tree in which the bundle is put together. OUT:
# where results.tar.gz goes. DEVICE: cuda, or cpu for a rehearsal. SECONDS_EACH: of one measurement.
set -eu
BUNDLE=${BUNDLE:-.bundle}
WORK=${WORK:-${TMPDIR:-/tmp}/topwork-gpu}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$WORK/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" BENTOML_HOME="$WORK/bentoml"
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export ORT_DISABLE_TELEMETRY=1 BENTOML_DO_NOT_TRACK=true HF_HUB_OFFLINE=1
RESULTS=$WORK/results
mkdir -p "$RESULTS"
# All figures so far, whatever becomes of this step.
trap 'tar --create --gzip --file "${OUT:-$WORK}/results.tar.gz" --directory "$WORK" results' EXIT
# Written by the step `smoke` where the service does not find NVIDIA's libraries by itself.
if [ -f "$WORK/libraries" ]; then
    LD_LIBRARY_PATH=$(cat "$WORK/libraries")
    export LD_LIBRARY_PATH
fi

case $1 in
part)
    mv "$BUNDLE/$2" "$WORK/$2"
    echo "$3  $WORK/$2" | sha256sum --check
    ;;
machine)
    PYTHONPATH=$PWD python3 -m benchmarks.gpu.machine "$RESULTS/machine.jsonl"
    ;;
unpack)
    cat "$WORK"/part.* | xz --decompress --threads=0 --stdout | tar --extract --directory "$WORK"
    rm "$WORK"/part.*
    ;;
smoke)
    python3 -m benchmarks.gpu.smoke --device "$DEVICE" && exit
    # Once more with a path for the loader: then what is measured is right, and our own search is to be mended.
    python3 -c 'import glob, nvidia; print(":".join(d for p in nvidia.__path__ for d in glob.glob(p + "/*/lib")))' \
        >"$WORK/libraries"
    LD_LIBRARY_PATH=$(cat "$WORK/libraries") python3 -m benchmarks.gpu.smoke --device "$DEVICE"
    ;;
tests)
    if [ "$DEVICE" = cuda ]; then
        set -- -m gpu
        export TOPWORK_TEST_REQUIRE=gpu
    else
        set -- -m 'not gpu'
    fi
    python3 -m pytest --noconftest -c /dev/null --rootdir=. -p no:cacheprovider -q --durations=5 \
        --junitxml="$RESULTS/junit.xml" "$@" tests/models/runtime/test_cuda.py tests/adapters/finetune/test_trainer.py
    ;;
sessions)
    python3 -m benchmarks.gpu --device "$DEVICE" --results "$RESULTS" --seconds "${SECONDS_EACH:-0.15}" chip torch sessions
    ;;
served)
    python3 -m benchmarks.gpu --device "$DEVICE" --results "$RESULTS" --seconds "${SECONDS_EACH:-0.3}" served
    ;;
service)
    python3 -m benchmarks.gpu.service --device "$DEVICE" --results "$RESULTS" --inputs "$WORK/pictures" \
        --seconds "${SECONDS_EACH:-3}"
    ;;
training)
    python3 -m benchmarks.gpu.fine_tune --device "$DEVICE" --results "$RESULTS"
    ;;
each)
    shift
    failed=
    for step; do
        sh "$0" "$step" || failed="$failed $step"
    done
    [ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
    ;;
*)
    echo "no such step: $1" >&2
    exit 2
    ;;
esac
