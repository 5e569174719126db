#!/usr/bin/env bash
# Small cases of every kernel on a real GPU under memcheck, racecheck and synccheck, side by side: .ci/sanitize.sh LOGS SECONDS
set -uo pipefail
cd "$(dirname "$0")/.."
logs=$1 limit=$2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Without torch's caching allocator every tensor is an allocation of its own, whose ends the checker knows.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# Names of tests; "schedules" alone would also be the mark random_schedules, hundreds of tests.
rows="33 and bfloat16 and (permute or combine or moe_experts or equals_reference or forward_and_backward)"
rows+=" and not (window or softcap or sink or full or sided or linear)"
small="test_schedules or decode_schedules or (cluster_size and plain) or steps_fill_the_cache or out_of_range"
small+=" or without_a_place or ($rows)"
tools=(memcheck racecheck synccheck)
jobs=()
for tool in "${tools[@]}"; do
  timeout --kill-after=5 "$limit" compute-sanitizer --tool "$tool" --error-exitcode 86 --target-processes all \
    "$python" -m pytest -m "gpu and not slow" --quiet --maxfail 1 -k "${SANITIZE:-$small}" tests/ops \
    >"$logs/$tool.log" 2>&1 &
  jobs+=($!)
done

status=0
for i in "${!tools[@]}"; do
  wait "${jobs[i]}"
  code=$?
  printf '%s: %s, %s\n' "${tools[i]}" "$code" "$(tail -n 1 "$logs/${tools[i]}.log")"
  if [ "$code" != 0 ]; then # 124: stopped at the limit, which is no finding
    grep -m 20 -E '^=========|^(FAILED|ERROR)' "$logs/${tools[i]}.log"
    [ "$code" = 124 ] || status=1
  fi
done
exit $status
