#!/usr/bin/env bash
# On the machine, in the checkout: the wheels into $SITE, the first part of the weights aside. Prints what is there.
set -euo pipefail
. tests/gpu/kit/environment.sh
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .gpu/wheels/*.whl
cp .gpu/w1/* "$STORE/"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
python3 - <<'P'
import importlib, time
for names in (('torch', 'transformers', 'peft', 'numpy', 'torchmetrics'), ('composer', 'streaming', 'dhrd_plugin.training.run')):
    start = time.time()
    found = [importlib.import_module(name) for name in names]
    print(*(f'{m.__name__} {getattr(m, "__version__", "")}' for m in found), f'{time.time() - start:.1f} s', flush=True)
P
