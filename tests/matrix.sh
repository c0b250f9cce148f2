#!/usr/bin/env bash
# The suite, or the tests named, under each setting that rounding depends on; a table of what passed at the end.
set -uo pipefail
python=${PYTHON_TEST:-.venv/bin/python}
settings=(
    "ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1"
    "ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1"
    "ATEN_CPU_CAPABILITY=avx512 OMP_NUM_THREADS=1"
    "ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1"
    "OMP_NUM_THREADS=2"
)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
table=$("$python" -c 'import torch; print("torch", torch.__version__)')
failed=0
for setting in "${settings[@]}"; do
    echo "== $setting"
    # shellcheck disable=SC2086  # a setting is one assignment or several
    env $setting "$python" -m pytest -q -n 0 "$@" 2>&1 | tee "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    table+=$'\n'"$setting: $(tail -n 1 "$log")"
done
echo "$table"
exit "$failed"
