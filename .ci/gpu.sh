#!/usr/bin/env bash
# For a machine with an NVIDIA GPU, nvcc and an installed torch; needs no network. Builds in the tree for this GPU alone,
# runs the probes, the tests marked gpu, some of them under compute-sanitizer, and the benchmarks (table to benchmarks/results/).
# Under 8 minutes: each step has a limit. A missing tool is named and its step left out. Logs go to $1 (default: build/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${1:-build/gpu}
mkdir -p "$logs"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
summary=()
status=0

# step NAME SECONDS COMMAND...: its result goes to the summary, and a failure of it to the exit status.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  printf '\n==> %s\n' "$name"
  # Interrupted, pytest still prints and saves what it has.
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$logs/$name.log" | tail -n 40
  code=${PIPESTATUS[0]}
  local result=passed
  if [ "$code" = 124 ]; then result="stopped after $limit s"; elif [ "$code" != 0 ]; then result="failed ($code)"; fi
  [ "$code" = 0 ] || status=1
  summary+=("$name: $result, $((SECONDS - start)) s")
  return "$code"
}

finish() {
  printf '\n==> summary\n'
  printf '%s\n' "${summary[@]}"
  exit "$status"
}

capability=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))' 2>/dev/null) || { echo "gpu: torch sees no GPU"; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'

export TORCH_CUDA_ARCH_LIST="$capability" ARFAST_CUDA=1
step build 120 "$python" setup.py build_ext --inplace || finish

# What the emulated GPU of the tests takes for granted, asked of the real one.
if command -v nvcc >/dev/null; then
  sources=(tests/emulator/probes/*.cu)
  step "build probes" 60 nvcc -std=c++17 "-arch=sm_${capability/./}" -Icsrc -Itests "${sources[@]}" -o "$logs/run_probes" &&
    step probes 30 "$logs/run_probes"
else
  summary+=("probes: left out, nvcc is not on PATH")
fi

if "$python" -c 'import pytest' 2>/dev/null; then
  step tests 90 "$python" -m pytest -m "gpu and not slow" --quiet tests
else
  summary+=("tests: left out, pytest is not installed")
  status=1
fi

# Without torch's caching allocator every tensor is an allocation of its own, whose ends the checker knows.
if command -v compute-sanitizer >/dev/null; then
  small="schedules or (cluster_size and plain) or (33 and bfloat16 and (permute or combine or equals_reference"
  small+=" or forward_and_backward) and not (window or softcap or sink or full or sided or linear))"
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 35 compute-sanitizer --tool "$tool" --error-exitcode 86 \
      --target-processes all "$python" -m pytest -m "gpu and not slow" --quiet --maxfail 1 \
      -k "${SANITIZE:-$small}" tests/ops
  done
else
  summary+=("compute-sanitizer: left out, not on PATH")
fi

if "$python" -c 'import pytest_benchmark' 2>/dev/null; then
  # The sizes that bars are set for; BENCHMARKS="" runs every case, in many minutes.
  bars="8192 or 32x128256 or H16 or decode or 2048x4096 or 2048x11008 or 2048x32x128 or 4096x512 or 2048x512x32000 or step"
  step benchmarks 170 "$python" -m pytest benchmarks --benchmark-only --save-table --quiet -m gpu \
    -k "${BENCHMARKS-($bars) and not (float32 and (norm or swiglu or rotary or experts or linear))}"
  cp -r benchmarks/results "$logs" 2>/dev/null
else
  summary+=("benchmarks: left out, pytest-benchmark is not installed")
fi
finish
