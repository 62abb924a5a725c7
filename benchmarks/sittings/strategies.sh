#!/usr/bin/env bash
# Rows of recipes/gpt2/results/strategies.csv, on two GPUs, and where the time of a step goes.
#
#   bash benchmarks/sittings/strategies.sh COMMIT {trace|one|two|tests}
#
# trace     where a step goes under FSDP2 and ZeRO-2, dense and sparse, on one GPU (5 min)
# one       FSDP2, ZeRO-2 and ZeRO-3 by one process each, dense siblings too; one CSV a GPU (7 min)
# two       by two processes (5 min)
# tests     tests/gpu of strategies and of plans on GPU 0, the others on GPU 1 (7 min)
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"

runner() { # GPUs, CSV, arguments
  CUDA_VISIBLE_DEVICES=$1 $PY -m recipes.gpt2.strategies --csv "$OUT/$2.csv" --runs "/tmp/strategies-$2" "${@:3}" > "$OUT/$2.log" 2>&1
}

traced() { # GPU, name, config, strategy, arguments
  CUDA_VISIBLE_DEVICES=$1 timeout -k 10 200 $PY -m recipes.gpt2.pretrain fit --config "recipes/gpt2/$3" \
    --data.source "$SLOPE_DATA_DIR/text/novels.txt.xz" --data.tokenizer "$SLOPE_DATA_DIR/tokenizers" \
    --trainer.strategy "$4" --trainer.devices 1 --model.compile true --trainer.max_steps 24 --model.warmup 0.1 \
    --trainer.val_check_interval 24 --trainer.limit_val_batches 1 --model.sample_tokens 0 --trainer.enable_checkpointing false \
    --trainer.enable_progress_bar false --trainer.logger.init_args.save_dir "/tmp/trace-$2" "${@:5}" \
    --trainer.callbacks "[{class_path: recipes.trace.Trace, init_args: {folder: /tmp/trace-$2}}]" > "/tmp/trace-$2.log" 2>&1
  local status=$?
  tail -n 5 "/tmp/trace-$2.log"
  tar -czf "$OUT/traces.tar.gz" -C /tmp --exclude='*/lightning_logs' --exclude='*/version_*' $(cd /tmp && ls -d trace-*)
  return $status
}

case ${2:?trace, one, two or tests} in
  trace)
    fsdp2=(lightning.pytorch.strategies.ModelParallelStrategy --trainer.strategy.data_parallel_size 1 --trainer.strategy.tensor_parallel_size 1)
    {
      failed=0
      traced 0 fsdp2 novels_slope.yaml slope_fsdp2 || failed=1
      traced 0 zero2 novels_slope.yaml slope_deepspeed_stage_2 || failed=1
      traced 0 dense-fsdp2 novels_dense.yaml "${fsdp2[@]}" || failed=1
      traced 0 dense-zero2 novels_dense.yaml deepspeed_stage_2 || failed=1
      traced 0 single novels_slope.yaml slope || failed=1
      exit $failed
    } &
    ;;
  one)
    runner 0 one-a --strategies "single device" FSDP2 ZeRO-3 --dense FSDP2 ZeRO-3 &
    runner 1 one-b --strategies "single device" ZeRO-2 "ZeRO-2 unchecked" --dense ZeRO-2 &
    ;;
  two)
    runner 0,1 two --devices 2 --strategies "single device" ZeRO-3 ZeRO-2 DDP FSDP2 &
    ;;
  tests)
    export SLOPE_REQUIRE_GPU=1
    CUDA_VISIBLE_DEVICES=0 $PY -m pytest -q tests/gpu/test_strategies.py tests/gpu/test_cusparselt_runs.py > "$OUT/tests-a.log" 2>&1 &
    CUDA_VISIBLE_DEVICES=1 $PY -m pytest -q tests/gpu --ignore tests/gpu/test_strategies.py \
      --ignore tests/gpu/test_cusparselt_runs.py > "$OUT/tests-b.log" 2>&1 &
    ;;
  *) echo "$2: trace, one, two or tests is expected" >&2; exit 2 ;;
esac
status=0
for job in $(jobs -p); do wait "$job" || status=1; done
tail -n 30 "$OUT"/*.log 2> /dev/null
exit $status
