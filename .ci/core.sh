#!/usr/bin/env bash
# The CMake build: csrc/core tested for each CPU target that this machine has, and no symbol of a target's objects that
# the linker could give to another target.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

command -v cmake >/dev/null || python3 -m pip install --quiet cmake
command -v ninja >/dev/null || python3 -m pip install --quiet ninja
# The kernels are compiled by kernels.py.
cmake -S . -B "$build" -G Ninja -DCMAKE_CUDA_COMPILER="" -DCMAKE_COMPILE_WARNING_AS_ERROR=ON -DPython3_EXECUTABLE="$(command -v python3)" >/dev/null
cmake --build "$build"
ctest --test-dir "$build" --output-on-failure

# An inline function compiled with AVX-512 under a name that other objects define too may become everybody's copy, and
# then stops the program on a machine without it.
status=0
for target in avx2 avx512; do
  library="$build/libarfast_cpu_$target.a"
  [ -f "$library" ] || continue
  if nm -C --defined-only "$library" | grep -E '^[0-9a-f]+ [WVuwv] ' | grep -vE "arfast::$target::|DW\.ref\."; then
    echo "core: $library must define no weak symbol outside arfast::$target; use what core/ has, or internal linkage"
    status=1
  fi
done
exit $status
