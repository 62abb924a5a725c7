#!/usr/bin/env bash
# Rows of recipes/bert_large/results/{glue,squad}_minilm.csv: MiniLM on five tasks of GLUE (GPU 0) and on SQuAD (GPU 1).
# Of SST-2 the first 8,600 rows, about as many as CoLA has.
#
#   bash benchmarks/sittings/minilm.sh COMMIT {masks|starts|recover|recovered|states|seeds|ranks} [MINUTES]
#
# masks    dense and every mask at three rates, one seed; needs the pack `bert`, as all stages do
# starts   a teacher, a gradual start, both, at 2e-4, one seed; after masks, whose dense runs teach
# recover  every mask on the novels (needs the pack `text`, too), also with adapters; checkpoints in /tmp/novels-STEPS
# recovered  GLUE and SQuAD from there, alone, with a teacher, with its hidden states; in the same session of the machine, after masks
# states   likewise: Wanda's masks, a teacher whose hidden states weigh more, labels and no labels, at two rates
# seeds    of plain and recovered starts (or of STARTS="...", MASKS="...", SPARSE="arguments") at their best rates, seeds 0 to 2
# ranks    after masks: best rates, adapters of rank 0, 4, 16, 24, seeds 0 to 2
#
# Each reads and leaves the rows so far in /tmp/minilm-rows.
#
# STEPS (3000) of a recovery, RECOVERIES="wanda magnitude-r24" of them. To see that it all runs, on a CPU: STEPS=3 TASKS=rte
# RECOVER="--data.batch_size 4 --data.source FILE --trainer.precision 32-true"
# GLUE="--data.max_train_rows 8 --data.max_dev_rows 8 --trainer.precision 32-true"
# SQUAD="--data.max_train_questions 2 --data.max_dev_questions 2 --trainer.precision 32-true"
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

export SLOPE_SEARCH=0 # 14 runs would look for the fastest algorithms at a time, each in the others' way; no run is timed here

run() { # log, GPU, module and arguments; begins nothing after the minutes, ends in time to keep what there is
  local left=$((585 - SECONDS))
  [ "$left" -gt 30 ] || return 0
  CUDA_VISIBLE_DEVICES=$2 timeout -k 15 "$left" $PY -m "${@:3}" --in-process \
    --budget-minutes "$(((minutes * 60 - SECONDS) / 60)).$(((minutes * 60 - SECONDS) % 60 * 10 / 60))" >> "$OUT/$1.log" 2>&1
}

glue() {
  run glue 0 recipes.bert_large.glue_all --config glue_minilm.yaml --csv "$OUT/glue_minilm.csv" --runs /tmp/minilm-glue \
    --data "$SLOPE_DATA_DIR/glue" --tasks ${TASKS:-cola sst2 mrpc stsb rte} --jobs 14 ${GLUE:---data.max_train_rows 8600} "$@"
}

squad() {
  run squad 1 recipes.bert_large.compare --config squad_minilm.yaml --csv "$OUT/squad_minilm.csv" --runs /tmp/minilm-squad \
    --data "$SLOPE_DATA_DIR/squad" --jobs 5 ${SQUAD:-} "$@"
}

recovered=/tmp/novels-${STEPS:=3000} # its name goes into the rows
recover() { # GPU, name, arguments
  local runs=/tmp/minilm-recover/$2 weights
  weights=$($PY -c "from recipes.bert_large.glue_plan import minilm_folder; print(minilm_folder())")
  SLOPE_SEARCH=1 OMP_NUM_THREADS=4 CUDA_VISIBLE_DEVICES=$1 timeout -k 20 580 $PY -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_recover.yaml \
    --data.source "$SLOPE_DATA_DIR/text/novels.txt.xz" --model.weights "$weights" --data.tokenizer "$weights" \
    --trainer.enable_progress_bar false --trainer.logger.init_args.save_dir "$runs" --data.num_workers 4 \
    --trainer.max_steps "$STEPS" --trainer.val_check_interval "$((STEPS / 3))" "${@:3}" ${RECOVER:-} > "$OUT/recover-$2.log" 2>&1 || return
  cp "$(find "$runs" -name last.ckpt | tail -n 1)" "$recovered/$2.ckpt"
  cp "$(find "$runs" -name result-fit.json | tail -n 1)" "$OUT/recover-$2.json"
}

masks=(--masks ${MASKS:-magnitude wanda transposable})
from=(--recovered "$recovered" --starts)
stage() { # glue or squad
  local failed=0 rates=(1e-4 2e-4) # of recovered starts
  [ "$1" = glue ] || rates=(2e-4 4e-4)
  case $stage in
    masks) $1 "${masks[@]}" --rates 1e-4 2e-4 4e-4 || failed=1 ;;
    starts) $1 "${masks[@]}" --starts teacher gradual teacher+gradual --rates 2e-4 || failed=1 ;;
    recovered)
      $1 "${masks[@]}" "${from[@]}" recovered teacher+recovered --rates "${rates[@]}" || failed=1
      $1 --methods sparse --masks magnitude wanda "${from[@]}" teacher+recovered --rates "${rates[@]}" \
        --sparse-arguments "--model.teacher.hidden_weight 1" || failed=1
      $1 --methods sparse --masks wanda --ranks 24 "${from[@]}" recovered --rates "${rates[@]}" || failed=1
      ;;
    states)
      $1 --methods sparse --masks wanda "${from[@]}" teacher+recovered --rates "${rates[@]}" --sparse-arguments \
        "--model.teacher.hidden_weight 4" "--model.teacher.hidden_weight 16" "--model.teacher.hidden_weight 64" \
        "--model.teacher.weight 1 --model.teacher.hidden_weight 4" "--model.teacher.weight 1 --model.teacher.hidden_weight 16" || failed=1
      ;;
    seeds) $1 "${masks[@]}" "${from[@]}" ${STARTS:-plain recovered teacher+recovered} --best-rates --seeds 0 1 2 ${SPARSE:+--sparse-arguments "$SPARSE"} || failed=1 ;;
    ranks) $1 "${masks[@]}" --ranks 0 4 16 24 --best-rates --seeds 0 1 2 || failed=1 ;;
  esac
  return $failed
}

stage=${2:?masks, starts, recover, recovered, states, seeds or ranks}
case $stage in
  recover)
    mkdir -p "$recovered"
    gpu=0
    for name in ${RECOVERIES:-magnitude wanda transposable wanda-r24}; do
      options=()
      case $name in wanda*) options+=(--model.slope.mask_calibration_batches 16) ;; transposable*) options+=(--model.slope.mask transposable) ;; esac
      case $name in *-r*) options+=(--model.slope.adapter_rank "${name##*-r}" --model.slope.adapter_start_step 0) ;; esac
      recover "$gpu" "$name" "${options[@]}" &
      gpu=$((1 - gpu))
    done
    ;;
  masks | starts | recovered | states | seeds | ranks)
    stage glue &
    stage squad &
    ;;
  *) echo "$stage: masks, starts, recover, recovered, states, seeds or ranks is expected" >&2; exit 2 ;;
esac
status=0
for job in $(jobs -p); do wait "$job" || status=1; done
if [ "$stage" = recover ]; then
  tail -n 30 "$OUT"/recover-*.log
  exit $status
fi
mkdir -p "$rows"
cp "$OUT"/*_minilm.csv "$rows/"
tail -n 40 "$OUT"/glue.log "$OUT"/squad.log
exit $status
