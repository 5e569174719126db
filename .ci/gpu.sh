#!/usr/bin/env bash
# For a machine with an NVIDIA GPU, nvcc and an installed torch; needs no network. Builds in the tree for this GPU alone,
# then what is worth most first: the probes, the tests marked gpu, the benchmarks with their bars (table to
# benchmarks/results/), the small cases under compute-sanitizer, the soak.
# Under 8 minutes: each step has a limit, and none goes past the end. A missing tool is named and its step left out.
# Logs and the table go to $1 (default: build/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${1:-build/gpu}
mkdir -p "$logs"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
end=${SECONDS_IN_ALL:-460}
last_steps=110 # seconds that the sanitizer and the soak are to have
summary=()
status=0

# step NAME SECONDS COMMAND...: its result goes to the summary, and a failure of it to the exit status.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  limit=$((limit < end - SECONDS ? limit : end - SECONDS))
  if [ "$limit" -lt 5 ]; then
    summary+=("$name: left out, no time left")
    status=1
    return 1
  fi
  printf '\n==> %s\n' "$name"
  # Interrupted, pytest still prints what it has.
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$logs/${name// /-}.log" | tail -n 40
  code=${PIPESTATUS[0]}
  local result=passed
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    result="stopped after $limit s"
  elif [ "$code" != 0 ]; then
    result="failed ($code)"
  fi
  [ "$code" = 0 ] || status=1
  summary+=("$name: $result, $((SECONDS - start)) s")
  return "$code"
}

leave_out() { # leave_out STEP REASON
  summary+=("$1: left out, $2")
}

has() { # has MODULE: whether Python finds it
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null
}

finish() {
  printf '\n==> summary (%d s)\n' "$SECONDS"
  printf '%s\n' "${summary[@]}" | tee "$logs/summary"
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
  step "build probes" 45 nvcc -std=c++17 "-arch=sm_${capability/./}" -Icsrc -Itests "${sources[@]}" -o "$logs/run_probes" &&
    step probes 15 "$logs/run_probes"
else
  leave_out probes "nvcc is not on PATH"
fi

if ! has pytest; then
  leave_out "tests, benchmarks, sanitizer, soak" "pytest is not installed"
  status=1
  finish
fi

# Thousands of tests that leave the GPU idle between their small calls: several processes share it.
workers=()
if has xdist; then workers=(--numprocesses 6); fi
step tests 100 "$python" -m pytest -m "gpu and not slow" --quiet "${workers[@]}" tests

if has pytest_benchmark; then
  # The sizes that bars are set for, the bars of the issue first; BENCHMARKS="" runs every case, in many minutes.
  first=(attention train moe_experts cross_entropy decode generate)
  files=("${first[@]/#/benchmarks/bench_}")
  files=("${files[@]/%/.py}")
  for file in benchmarks/bench_*.py; do
    [[ " ${files[*]} " == *" $file "* ]] || files+=("$file")
  done
  bars="8192 or 1B or (decode and D128) or 16x2048 or 64x2048 or 32x128256 or 2048x4096 or 2048x11008 or 2048x32x128"
  bars="($bars or 2048x512x32000) and not (float32 and (norm or swiglu or rotary or route))"
  TORCHINDUCTOR_COMPILE_THREADS=8 step benchmarks $((end - last_steps - SECONDS)) "$python" -m pytest "${files[@]}" \
    --benchmark-only --gates --save-table --quiet -m gpu -k "${BENCHMARKS-$bars}"
  cp -r benchmarks/results "$logs" 2>/dev/null
else
  leave_out benchmarks "pytest-benchmark is not installed"
fi

if command -v compute-sanitizer >/dev/null; then
  step sanitizer 75 .ci/sanitize.sh "$logs" 65
else
  leave_out sanitizer "compute-sanitizer is not on PATH"
fi

step soak 35 "$python" -m pytest -m "gpu and slow" --quiet tests/ops
finish
