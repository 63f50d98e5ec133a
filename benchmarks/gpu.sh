#!/usr/bin/env bash
# Everything a GPU is wanted for, in one command and one folder; no network, whatever torch and Triton are there.
#   benchmarks/gpu.sh OUT [PART ...]     DRY=1: every step at tiny shapes, on the interpreter
# parts: machine tests launch bench sanitizer tune, under 8 minutes by their limits; by name: compiled, evidence.
# TUNE_SECONDS=900 lets the sweep over tiles go through all its cases: PARTS=tune
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
parts=${*:-machine tests launch bench sanitizer tune${DRY:+ evidence}}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
dry=${DRY:-0}
status=0

step() { # name, seconds, command...: run it for at most that long, keep its output, remember a failure
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  if ! timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n "${LINES_SHOWN:-40}"; then
    status=1
    echo "== $name FAILED"
  fi
}

for part in $parts; do
  case $part in
  machine)
    step machine 20 "$python" -m rewardzip doctor
    command -v nvidia-smi >/dev/null && step nvidia-smi 10 nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE
    ;;
  tests)
    ops="tests"
    [ "$dry" = 1 ] && ops="tests/test_quantize_rows.py"
    step tests 160 "$python" -m pytest -q -p no:cacheprovider $ops
    ;;
  launch) step launch 30 "$python" benchmarks/launch_cost.py ;;
  bench)
    if [ "$dry" = 1 ]; then
      step linear 60 "$python" benchmarks/linear.py --quick --no-compile --out "$out"
      step models 60 "$python" benchmarks/models.py --quick --no-compile --out "$out"
    else
      rows="1 16 256 4096 65536 1048576 16777216" # the last for the small nets alone
      step models 80 "$python" benchmarks/models.py --rows $rows --seconds 0.3 --no-compile --out "$out"
      step linear 40 "$python" benchmarks/linear.py --no-compile --out "$out"
    fi
    ;;
  compiled) # torch.compile's columns take minutes to compile: asked for by name
    step models-compiled 400 "$python" benchmarks/models.py --rows 1 256 4096 65536 --out "$out/compiled"
    ;;
  sanitizer)
    if [ "$dry" = 1 ]; then
      step small_shapes 100 env TRITON_INTERPRET=1 "$python" benchmarks/small_shapes.py
    elif command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck; do
        step "$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" benchmarks/small_shapes.py
      done
    else
      echo "== sanitizer: compute-sanitizer is not installed" | tee "$out/sanitizer.log"
    fi
    ;;
  tune) # the table of measured tiles, whole after each case; as the package ships it in gpu/measured_tiles.json
    seconds=${TUNE_SECONDS:-65}
    if [ "$dry" = 1 ]; then
      step tune 60 env TRITON_INTERPRET=1 "$python" benchmarks/tiles.py --quick --out "$out"
    else
      step tune $((seconds + 10)) "$python" benchmarks/tiles.py --seconds "$seconds" --out "$out"
    fi
    ;;
  evidence)
    # what this machine's Triton makes of the kernels, beside the committed table
    case="int8_linear 16x"
    [ "$dry" = 1 ] || case=""
    step evidence 90 env -u TRITON_INTERPRET "$python" benchmarks/static_evidence.py --target sm_90 --case "$case"
    ;;
  *)
    echo "gpu.sh: no part called $part" >&2
    status=2
    ;;
  esac
done
exit $status
