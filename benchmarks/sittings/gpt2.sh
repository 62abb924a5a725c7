#!/usr/bin/env bash
# Rows of recipes/gpt2/results/novels.csv, made on two GPUs; what the file has is not made again.
#
#   bash benchmarks/sittings/gpt2.sh COMMIT {seeds|medium|kernels|zeroshot|levers} [MINUTES]
#
# seeds      every method at its best rate, seed SEED (3); checkpoints stay below /tmp/gpt2-runs
# medium     dense, SLoPe and transposable, 40M tokens
# kernels    200 steps by the compiled kernels and by the reference operations, a CSV of their own
# zeroshot   scores of these checkpoints, side by side (needs the pack `eval`); in the same session of the machine.
#            After seeds is through: what that left would be trained four on a GPU, and its tokens/s be wrong
# levers     one lever at a time on transposable masks, a CSV of their own
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"
minutes=${3:-9}
runs=/tmp/gpt2-runs
seed=${SEED:-3}
status=0

compare() { # CSV, arguments
  $PY -m recipes.gpt2.compare run --family novels --csv "$OUT/$1.csv" --runs "$runs" --gpus 0 1 --budget-minutes "$minutes" \
    "${@:2}" 2>&1 | tee "$OUT/$1.log" || status=1
}

keep() { # earlier rows, so that nothing is made twice; rows of an earlier call on this machine come first
  for file in novels.csv novels-curves.csv novels-adapters.csv novels-zeroshot.csv kernels.csv kernels-curves.csv levers.csv levers-curves.csv; do
    [ -f "/tmp/gpt2-rows/$file" ] && cp "/tmp/gpt2-rows/$file" "$OUT/" && continue
    [ -f "recipes/gpt2/results/$file" ] && cp "recipes/gpt2/results/$file" "$OUT/"
  done
}

methods=(dense "slope r=0" "transposable r=0" "slope r=16" "transposable r=16" "srste r=0" fst)
case ${2:?seeds, medium, kernels, zeroshot or levers} in
  seeds)
    keep
    compare novels --methods "${methods[@]}" --best-rates --seeds "$seed" --checkpoints --trace-adapters
    ;;
  medium)
    keep
    compare novels --methods dense@9e-4 "slope r=0@1.2e-3" "transposable r=0@1.8e-3" --model.size medium
    ;;
  kernels)
    keep
    short=(--trainer.max_steps 200 --trainer.val_check_interval 200)
    compare kernels --curve-every 1 --rates 1.8e-3 --methods "slope r=0" "emulated r=0" \
      --add "emulated r=0: novels_slope.yaml --model.slope.adapter_rank 0 --model.slope.backend reference" "${short[@]}"
    ;;
  zeroshot)
    keep
    compare novels --methods "${methods[@]}" --best-rates --seeds "$seed" --checkpoints --zeroshot "$SLOPE_DATA_DIR/zeroshot" \
      --gpus 0 0 0 0 1 1 1 1
    ;;
  levers)
    keep
    base="novels_transposable.yaml --model.slope.adapter_rank"
    compare levers --rates 2.7e-3 \
      --add "no lever: $base 0" \
      --add "initial scale 0.028: $base 0 --model.gpt2.initializer_range 0.028" \
      --add "initial scale 0.04: $base 0 --model.gpt2.initializer_range 0.04" \
      --add "decay of values 0.01: $base 0 --model.values_weight_decay 0.01" \
      --add "cosine to 0.1: $base 0 --model.schedule cosine --model.min_rate_share 0.1" \
      --add "adapters r=16 from 0.9, rate x30: $base 16 --model.slope.adapter_start 0.9 --model.adapter_learning_rate_scale 30" \
      --add "adapters r=16 from 0.5, rate x30: $base 16 --model.slope.adapter_start 0.5 --model.adapter_learning_rate_scale 30" \
      --add "magnitude in attention: $base 0 --model.slope.layer_masks '{\"*.attn.*\": \"magnitude\"}'" \
      --trace-adapters
    ;;
  *) echo "$2: seeds, medium, kernels, zeroshot or levers is expected" >&2; exit 2 ;;
esac
mkdir -p /tmp/gpt2-rows
cp "$OUT"/*.csv /tmp/gpt2-rows/
exit $status
