#!/usr/bin/env bash
# Everything a GPU is wanted for, in one command and one folder; no network, whatever torch and Triton are there.
#   benchmarks/gpu.sh OUT [PART ...]     parts: tests sanitizer launch bench        DRY=1: tiny, on the interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
parts=${*:-tests launch sanitizer bench}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
dry=${DRY:-0}
status=0

step() { # name, command...: run it, keep its output, remember a failure
  local name=$1
  shift
  echo "== $name"
  if ! "$@" 2>&1 | tee "$out/$name.log" | tail -n "${LINES_SHOWN:-40}"; then
    status=1
    echo "== $name FAILED"
  fi
}

for part in $parts; do
  case $part in
  tests)
    ops="tests/test_int8_linear.py tests/test_int8_dynamic_linear.py tests/test_quantize_rows.py tests/test_mutants.py"
    ops="$ops tests/test_fused_mlp.py tests/test_reward_head.py tests/test_capture.py"
    [ "$dry" = 1 ] && ops="tests/test_quantize_rows.py"
    step tests "$python" -m pytest -q -p no:cacheprovider $ops
    ;;
  launch) step launch "$python" benchmarks/launch_cost.py ;;
  sanitizer)
    if [ "$dry" = 1 ]; then
      step small_shapes env TRITON_INTERPRET=1 "$python" benchmarks/small_shapes.py
    elif command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" benchmarks/small_shapes.py
      done
    else
      echo "== sanitizer: compute-sanitizer is not installed" | tee "$out/sanitizer.log"
    fi
    ;;
  bench)
    if [ "$dry" = 1 ]; then
      step linear "$python" benchmarks/linear.py --quick --no-compile --out "$out"
      step models "$python" benchmarks/models.py --quick --no-compile --out "$out"
    else
      step models "$python" benchmarks/models.py --rows 1 64 4096 65536 1048576 --out "$out"
      step linear "$python" benchmarks/linear.py --out "$out"
    fi
    ;;
  *)
    echo "gpu.sh: no part called $part" >&2
    status=2
    ;;
  esac
done
exit $status
