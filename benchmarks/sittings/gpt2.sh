#!/usr/bin/env bash
# Rows of recipes/gpt2/results/novels.csv, made on two GPUs; what the file has is not made again.
#
#   bash benchmarks/sittings/gpt2.sh COMMIT {seeds|medium|kernels|zeroshot|levers} [MINUTES [ARGUMENTS of seeds or zeroshot]]
#
# seeds      every method at its best rate, seed SEED (3); checkpoints stay below /tmp/gpt2-runs. Beside it kernels, in turn
# kernels    200 steps by the compiled kernels and by the reference operations, a CSV of their own
# medium     dense, SLoPe and transposable, 40M tokens, and levers where a GPU is left
# zeroshot   scores of these checkpoints, side by side (needs the pack `eval`), on LANES (0 0 1 1); in the same session
#            of the machine. What has no row yet would be trained: leave it out (--methods)
# levers     one lever at a time, seed SEED, the slower ones last; a CSV of their own
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"
minutes=${3:-9}
runs=/tmp/gpt2-runs
seed=${SEED:-3}
status=0

compare() { # CSV, arguments; ends in time to keep what there is
  timeout -k 25 550 $PY -m recipes.gpt2.compare run --family novels --csv "$OUT/$1.csv" --runs "$runs" --gpus 0 1 \
    --budget-minutes "$minutes" "${@:2}" > "$OUT/$1.log" 2>&1 || status=1
  cat "$OUT/$1.log"
}

kernels() {
  compare kernels --curve-every 1 --rates 1.8e-3 --seeds 0 1 2 --methods "slope r=0" "emulated r=0" \
    --add "emulated r=0: novels_slope.yaml --model.slope.adapter_rank 0 --model.slope.backend reference" \
    --trainer.max_steps 200 --trainer.val_check_interval 200
}

levers() { # arguments
  base="novels_transposable.yaml --model.slope.adapter_rank"
  compare levers --seeds "$seed" --rates 2.7e-3 --trace-adapters \
    --add "adapters r=16 from 0.9, rate x30: $base 16 --model.slope.adapter_start 0.9 --model.adapter_learning_rate_scale 30" \
    --add "decay of values 0.01: $base 0 --model.values_weight_decay 0.01" \
    --add "initial scale 0.028: $base 0 --model.gpt2.initializer_range 0.028" \
    --add "cosine to 0.1: $base 0 --model.schedule cosine --model.min_rate_share 0.1" \
    --add "values' rate x1.5: $base 0 --model.values_learning_rate_scale 1.5" \
    --add "magnitude in attention: $base 0 --model.slope.layer_masks '{\"*.attn.*\": \"magnitude\"}'" \
    --add "adapters r=16 from 0.5, rate x30: $base 16 --model.slope.adapter_start 0.5 --model.adapter_learning_rate_scale 30" \
    --add "initial scale 0.04: $base 0 --model.gpt2.initializer_range 0.04" \
    --add "regrowth: $regrowth" \
    --methods "adapters r=16 from 0.9, rate x30" "decay of values 0.01" "initial scale 0.028" "cosine to 0.1" \
    "values' rate x1.5@1.8e-3" "magnitude in attention" "regrowth@1.8e-3" "adapters r=16 from 0.5, rate x30" "initial scale 0.04" "$@"
}

keep() { # earlier rows, so that nothing is made twice; rows of an earlier call on this machine come first
  for file in novels.csv novels-curves.csv novels-adapters.csv novels-zeroshot.csv kernels.csv kernels-curves.csv levers.csv levers-curves.csv \
    levers-adapters.csv; do
    [ -f "/tmp/gpt2-rows/$file" ] && cp "/tmp/gpt2-rows/$file" "$OUT/" && continue
    [ -f "recipes/gpt2/results/$file" ] && cp "recipes/gpt2/results/$file" "$OUT/"
  done
}

regrowth="novels_srste.yaml --model.srste.adapter_rank 0 --model.srste.mask_refresh_steps 100 --model.srste.decay 0"
methods=(dense "slope r=0" "transposable r=0" "slope r=16" "transposable r=16" "srste r=0" fst)
case ${2:?seeds, medium, kernels, zeroshot or levers} in
  seeds)
    keep
    kernels &
    # The slow ones first, so that the two GPUs end together.
    compare novels --methods fst "srste r=0" dense "slope r=0" "transposable r=0" "slope r=16" "transposable r=16" \
      --best-rates --seeds "$seed" --checkpoints --trace-adapters "${@:4}"
    wait
    ;;
  medium)
    keep
    # Two sparse runs on GPU 0; the dense one leaves time for levers on GPU 1, in turn.
    compare novels --methods "slope r=0@1.2e-3" dense@9e-4 "transposable r=0@1.8e-3" --model.size medium &
    sleep 40
    levers --gpus 1
    wait
    ;;
  kernels)
    keep
    kernels
    ;;
  zeroshot)
    keep
    # shellcheck disable=SC2086
    compare novels --methods "${methods[@]}" --best-rates --seeds "$seed" --checkpoints --zeroshot "$SLOPE_DATA_DIR/zeroshot" \
      --gpus ${LANES:-0 0 1 1} "${@:4}"
    ;;
  levers)
    keep
    levers
    ;;
  *) echo "$2: seeds, medium, kernels, zeroshot or levers is expected" >&2; exit 2 ;;
esac
mkdir -p /tmp/gpt2-rows
cp "$OUT"/*.csv /tmp/gpt2-rows/
exit $status
