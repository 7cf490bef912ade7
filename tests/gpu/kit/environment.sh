# To be sourced, in the checkout: where things are on the machine.
export SITE=${SITE:-/tmp/site} STORE=${STORE:-/tmp/gpu} DHRD_SHARED=${DHRD_SHARED:-/tmp/shared} DHRD_CACHE=${DHRD_CACHE:-/tmp/dhrd_cache}
export PYTHONPATH=$PWD:$SITE PATH=$SITE/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export OUT=${OUT:-/tmp/out}
mkdir -p "$STORE" "$OUT" "$DHRD_SHARED"
