#!/usr/bin/env bash
# Rows of recipes/bert_large/results/{glue,squad}_minilm.csv: MiniLM on five tasks of GLUE (GPU 0) and on SQuAD (GPU 1).
# Of SST-2 the first 8,600 rows, about as many as CoLA has.
#
#   bash benchmarks/sittings/minilm.sh COMMIT {masks|starts|recover|recovered|ranks} [MINUTES]
#
# masks    dense and every mask at three rates, one seed
# starts   a teacher, a gradual start, both, at 2e-4, one seed; after masks, whose dense runs teach
# recover  every mask on the novels (needs the pack `text`), also with adapters; checkpoints in /tmp/novels-STEPS
# recovered  GLUE and SQuAD from there, alone and with a teacher; in the same session of the machine, after masks
# ranks    after masks: best rates, adapters of rank 0, 4, 16, 24, seeds 0 to 2
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"
minutes=${3:-8}
rows=/tmp/minilm-rows
for file in glue_minilm squad_minilm; do
  if [ -f "$rows/$file.csv" ]; then cp "$rows/$file.csv" "$OUT/"
  elif [ -f "recipes/bert_large/results/$file.csv" ]; then cp "recipes/bert_large/results/$file.csv" "$OUT/"
  fi
done

status=0
both() {
  local common=(--in-process --budget-minutes "$minutes" "$@")
  CUDA_VISIBLE_DEVICES=0 timeout -k 20 590 $PY -m recipes.bert_large.glue_all --config glue_minilm.yaml --csv "$OUT/glue_minilm.csv" \
    --runs /tmp/minilm-glue --data "$SLOPE_DATA_DIR/glue" --tasks cola sst2 mrpc stsb rte --jobs 14 \
    --data.max_train_rows 8600 "${common[@]}" > "$OUT/glue.log" 2>&1 &
  CUDA_VISIBLE_DEVICES=1 timeout -k 20 590 $PY -m recipes.bert_large.compare --config squad_minilm.yaml --csv "$OUT/squad_minilm.csv" \
    --runs /tmp/minilm-squad --data "$SLOPE_DATA_DIR/squad" --jobs 5 "${common[@]}" > "$OUT/squad.log" 2>&1 &
  for job in $(jobs -p); do wait "$job" || status=1; done
}

recovered=/tmp/novels-${STEPS:=1500} # its name goes into the rows
recover() { # GPU, name, arguments
  local runs=/tmp/minilm-recover/$2 weights
  weights=$($PY -c "from recipes.bert_large.glue_plan import minilm_folder; print(minilm_folder())")
  CUDA_VISIBLE_DEVICES=$1 timeout -k 20 580 $PY -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_recover.yaml \
    --data.source "$SLOPE_DATA_DIR/text/novels.txt.xz" --model.weights "$weights" --data.tokenizer "$weights" \
    --trainer.enable_progress_bar false --trainer.logger.init_args.save_dir "$runs" --data.num_workers 6 \
    --trainer.max_steps "$STEPS" --trainer.val_check_interval "$((STEPS / 3))" "${@:3}" > "$OUT/recover-$2.log" 2>&1 || return
  cp "$(find "$runs" -name last.ckpt | tail -n 1)" "$recovered/$2.ckpt"
  cp "$(find "$runs" -name result-fit.json | tail -n 1)" "$OUT/recover-$2.json"
}

masks=(--masks magnitude wanda transposable)
case ${2:?masks, starts, recover, recovered or ranks} in
  masks) both "${masks[@]}" --rates 1e-4 2e-4 4e-4 ;;
  starts) both "${masks[@]}" --starts teacher gradual teacher+gradual --rates 2e-4 ;;
  recover)
    mkdir -p "$recovered"
    recover 0 magnitude &
    recover 1 wanda --model.slope.mask_calibration_batches 16 &
    recover 0 transposable --model.slope.mask transposable &
    recover 1 magnitude-r24 --model.slope.adapter_rank 24 --model.slope.adapter_start_step 0 &
    for job in $(jobs -p); do wait "$job" || status=1; done
    tail -n 30 "$OUT"/recover-*.log
    exit $status
    ;;
  recovered) both "${masks[@]}" --ranks 0 --recovered "$recovered" --starts recovered teacher+recovered --rates 1e-4 2e-4 ;;
  ranks) both "${masks[@]}" --ranks 0 4 16 24 --best-rates --seeds 0 1 2 ;;
  *) echo "$2: masks, starts, recover, recovered or ranks is expected" >&2; exit 2 ;;
esac
mkdir -p "$rows"
cp "$OUT"/*_minilm.csv "$rows/"
tail -n 40 "$OUT"/glue.log "$OUT"/squad.log
exit $status
