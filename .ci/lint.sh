#!/usr/bin/env bash
# Style and layering. The arrows that may not point back:
#   cli -> distributed -> train, generate, data, scaling, hub -> models -> nn -> ops -> csrc/<op>/<op>.cpp -> <op>.h <- *.cu, *_cpu.cpp -> csrc/core
set -euo pipefail
cd "$(dirname "$0")/.."
status=0

python3 -m pip install --quiet ruff==0.17.5 clang-format==23.1.5
ruff check . || status=1
ruff format --check --diff . || status=1
mapfile -t cpp < <(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort)
clang-format --dry-run -Werror "${cpp[@]}" || status=1

# forbid RULE PATTERN FILE...: no line of the files may match the extended regular expression.
forbid() {
  local rule=$1 pattern=$2
  shift 2
  if [ $# -gt 0 ] && grep -HnE "$pattern" "$@"; then
    printf 'lint: %s\n\n' "$rule"
    status=1
  fi
}

files() { # files FOLDER NAME...: those below the folder whose names match one of the patterns
  local folder=$1 name
  shift
  for name in "$@"; do [ -d "$folder" ] && find "$folder" -name "$name"; done | sort
}

mapfile -t kernels < <(files csrc '*.cu' '*.cuh')
mapfile -t torch_free < <(files csrc '*.cu' '*.cuh' '*_cpu.cpp'; files csrc/core '*.h' '*.cpp')
for folder in csrc/*/; do # <op>/<op>.h is the contract between the binding and the implementations
  contract="$folder$(basename "$folder").h"
  if [ -f "$contract" ]; then torch_free+=("$contract"); fi
done
mapfile -t all_cpp < <(files csrc '*.h' '*.cpp' '*.cu' '*.cuh')
mapfile -t package < <(files arfast '*.py')

forbid "kernels, CPU implementations, contracts and core/ do not know torch" \
  '#include.*(torch/|ATen|c10/|pybind|Python\.h|"binding/)' "${torch_free[@]}"
for folder in csrc/*/; do
  op=$(basename "$folder")
  twin=$op
  case $op in
    binding) continue ;;
    core) twin=emulator && mapfile -t own < <(files "$folder" '*.*') ;;
    *) mapfile -t own < <(files "$folder" '*.cu' '*.cuh' '*_cpu.cpp') ;;
  esac
  if [ ${#own[@]} -gt 0 ] && grep -HnE '#include "' "${own[@]}" | grep -vE "#include \"(core|$op|$twin)/"; then
    printf 'lint: core/ knows no op (but its emulated twin), an implementation knows core/ and its own op\n\n'
    status=1
  fi
done
forbid "inline assembly lives in csrc/core/ptx.cuh and ptx_wgmma.cuh" '\basm\b' \
  $(printf '%s\n' "${all_cpp[@]}" | grep -v '^csrc/core/ptx\(_wgmma\)\?.cuh$')
forbid "kernels are launched by launch() of core/runtime.cuh" '<<<' "${all_cpp[@]}"
forbid "shared memory is one struct reached by shared_storage()" '__shared__' \
  $(printf '%s\n' "${kernels[@]}" | grep -v '^csrc/core/runtime.cuh$')
forbid "an op neither allocates on the GPU nor waits for it" \
  'cudaMalloc|cudaFree|cuda(Device|Stream|Event)Synchronize' "${all_cpp[@]}"
forbid "a library reports errors, it does not end the process" '\b(exit|abort|assert)\(' "${all_cpp[@]}"

# Imports at the top of a module; a method may import what lies to its left when it runs (model.generate).
imports() {
  printf '^(from arfast import (.*\\b)?(%s)\\b|(from|import) arfast\\.(%s)\\b)' "$1" "$1"
}
top='distributed|train|generate|data|scaling|hub|image_hub|adapter|finetune|export|doctor|lm_eval|peaks|figures|lab'
forbid "ops import nothing of arfast but ops" "$(imports "nn|models|$top|cli")" $(files arfast/ops '*.py')
forbid "nn imports ops only" "$(imports "models|$top|cli")" $(files arfast/nn '*.py')
forbid "models import nn and ops only" "$(imports "$top|cli")" $(files arfast/models '*.py')
forbid "only cli imports cli" "$(imports cli)" \
  $(printf '%s\n' "${package[@]}" | grep -vE '^arfast/(cli/|__main__)')
forbid "torch.ops.arfast is called by arfast/ops only" 'torch\.ops\.arfast(\.([^b]|b[^u])|[^.]|$)' \
  $(printf '%s\n' "${package[@]}" | grep -v '^arfast/ops/')
forbid "nothing is unpickled or evaluated" \
  '^ *(import|from) +(pickle|dill|marshal)\b|torch\.(load|save)\(|(^|[^.[:alnum:]_])(eval|exec)\(|trust_remote_code=True' "${package[@]}"

# A file beyond its limit has two jobs.
limit() {
  local lines=$1 file
  shift
  for file in "$@"; do
    if [ "$(wc -l <"$file")" -gt "$lines" ]; then
      printf 'lint: %s must have at most %d lines, got %d\n' "$file" "$lines" "$(wc -l <"$file")"
      status=1
    fi
  done
}
limit 400 "${all_cpp[@]}" "${package[@]}" $(files tests '*.py' '*.cpp') $(files benchmarks '*.py')

# What is committed by mistake stays in the history: packages, archives, weights.
while IFS= read -r -d '' file; do
  if [ -f "$file" ] && [ "$(wc -c <"$file")" -gt $((1 << 19)) ]; then
    printf 'lint: %s must have at most 512 KiB, got %d bytes\n' "$file" "$(wc -c <"$file")"
    status=1
  fi
done < <(git ls-files -z --cached --others --exclude-standard)

if [ $status = 0 ]; then echo "lint: passed"; fi
exit $status
