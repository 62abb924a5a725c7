#!/usr/bin/env bash
# Rows of recipes/gpt2/results/strategies.csv, and where the time of a step goes, on two GPUs.
#
#   bash benchmarks/sittings/strategies.sh COMMIT {profile|one|two|tests}
#
# profile   FSDP2 on GPU 0, ZeRO-2 on GPU 1: operators of steps 2 to 4 (2 min)
# one       by one process each, dense siblings too; one CSV a GPU (7 min)
# two       by two processes (5 min)
# tests     tests/gpu of strategies and of plans on GPU 0, the others on GPU 1 (7 min)
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"

runner() { # GPUs, CSV, arguments
  CUDA_VISIBLE_DEVICES=$1 $PY -m recipes.gpt2.strategies --csv "$OUT/$2.csv" --runs "/tmp/strategies-$2" "${@:3}" > "$OUT/$2.log" 2>&1
}

profiled() { # GPU, strategy, name
  CUDA_VISIBLE_DEVICES=$1 timeout -k 10 300 $PY -m recipes.gpt2.pretrain fit --config recipes/gpt2/novels_slope.yaml \
    --data.source "$SLOPE_DATA_DIR/text/novels.txt.xz" --data.tokenizer "$SLOPE_DATA_DIR/tokenizers" \
    --trainer.strategy "$2" --trainer.devices 1 --model.slope.adapter_rank 0 --trainer.max_steps 12 --model.warmup 0.1 \
    --trainer.val_check_interval 12 --trainer.limit_val_batches 1 --model.sample_tokens 0 --trainer.enable_checkpointing false \
    --trainer.logger.init_args.save_dir "/tmp/profile-$3" --trainer.callbacks '[recipes.meter.Meter]' \
    --trainer.profiler lightning.pytorch.profilers.PyTorchProfiler --trainer.profiler.dirpath "$OUT" \
    --trainer.profiler.filename "profile-$3" --trainer.profiler.sort_by_key "${SORT:-cpu_time_total}" \
    --trainer.profiler.row_limit 80 > "$OUT/profile-$3.log" 2>&1
}

case ${2:?profile, one, two or tests} in
  profile)
    profiled 0 slope_fsdp2 fsdp2 &
    profiled 1 slope_deepspeed_stage_2 zero2 &
    ;;
  one)
    runner 0 one-a --strategies FSDP2 DDP --dense FSDP2 DDP &
    runner 1 one-b --strategies ZeRO-2 ZeRO-3 --dense ZeRO-2 ZeRO-3 &
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
  *) echo "$2: profile, one, two or tests is expected" >&2; exit 2 ;;
esac
status=0
for job in $(jobs -p); do wait "$job" || status=1; done
tail -n 30 "$OUT"/*.log
exit $status
