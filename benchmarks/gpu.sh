#!/usr/bin/env bash
# Everything a GPU is wanted for, in one command and one folder; no network, whatever torch and Triton are there.
#   benchmarks/gpu.sh OUT [PART ...]     DRY=1: every step at tiny shapes, on the interpreter
# parts: machine tests launch bench sparse sanitizer tune, under 8 minutes by their limits; by name: compiled, evidence.
# TUNE_SECONDS=900 lets the sweep over tiles go through all its cases: PARTS=tune
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
parts=${*:-machine tests launch bench sparse sanitizer tune${DRY:+ compiled evidence}}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
dry=${DRY:-0}
status=0

step() { # name, seconds, command...: run it for at most that long, keep its output, remember a failure
  local name=$1 limit=$2 code
  shift 2
  echo "== $name"
  timeout --kill-after 15 ${gently:-} "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n "${LINES_SHOWN:-40}"
  code=${PIPESTATUS[0]}
  case $code in
  0) ;;
  124 | 137) status=1 && echo "== $name: time was up after $limit s" ;;
  *) status=1 && echo "== $name FAILED" ;;
  esac
}

for part in $parts; do
  case $part in
  machine)
    step machine 15 "$python" -m rewardzip doctor
    command -v nvidia-smi >/dev/null && step nvidia-smi 5 nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE
    ;;
  tests) # those of the kernels on the GPU first; interrupted once, pytest tells what it has run
    gently="--foreground --signal INT"
    pytest=("$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors)
    "$python" -c "import xdist" 2>/dev/null && pytest+=(-n 8 --dist worksteal)
    kernels=$(grep -lE '^from conftest import .*(GPU|need_triton)' tests/test_*.py)
    if [ "$dry" = 1 ]; then
      step tests 60 "$python" -m pytest -q -p no:cacheprovider tests/test_quantize_rows.py
    else
      step tests 100 "${pytest[@]}" $kernels
      step tests-others 25 "${pytest[@]}" tests $(printf -- '--ignore %s ' $kernels)
    fi
    gently=""
    ;;
  launch) step launch 30 "$python" benchmarks/launch_cost.py ;;
  bench)
    if [ "$dry" = 1 ]; then
      step linear 60 "$python" benchmarks/linear.py --quick --no-compile --out "$out"
      step models 60 "$python" benchmarks/models.py --quick --no-compile --out "$out"
    else
      rows="1 256 4096 65536 1048576 16777216" # the last for the small nets alone
      step models 95 "$python" benchmarks/models.py --rows $rows --seconds 0.2 --no-compile --out "$out"
      step linear 35 "$python" benchmarks/linear.py --rows 1 256 4096 --seconds 0.2 --no-compile --out "$out"
    fi
    ;;
  sparse)
    if [ "$dry" = 1 ]; then
      step sparse 60 "$python" benchmarks/sparse.py --quick --out "$out"
      step sparse24 60 "$python" benchmarks/sparse24.py --quick --out "$out/sparse24.json"
    else
      cells="--rows 1 32 1024 --seconds 0.1"
      for size in 1024 4096; do # a table is written when it is whole
        step "sparse-$size" 18 "$python" benchmarks/sparse.py --sizes $size --sparsity 0.5 0.9 $cells --out "$out"
      done
      step sparse24 18 "$python" benchmarks/sparse24.py --sizes 1024 4096 $cells --out "$out/sparse24.json"
    fi
    ;;
  compiled) # torch.compile's columns take minutes to compile: asked for by name
    if [ "$dry" = 1 ]; then
      step models-compiled 100 "$python" benchmarks/models.py --quick --out "$out/compiled"
    else
      step models-compiled 400 "$python" benchmarks/models.py --rows 1 256 4096 65536 --out "$out/compiled"
    fi
    ;;
  sanitizer)
    if [ "$dry" = 1 ]; then
      step small_shapes 100 env TRITON_INTERPRET=1 "$python" benchmarks/small_shapes.py
    elif command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck; do
        step "$tool" 25 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" benchmarks/small_shapes.py
      done
    else
      echo "== sanitizer: compute-sanitizer is not installed" | tee "$out/sanitizer.log"
    fi
    ;;
  tune) # the table of measured tiles, whole after each case; as the package ships it in gpu/measured_tiles.json
    seconds=${TUNE_SECONDS:-45}
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
