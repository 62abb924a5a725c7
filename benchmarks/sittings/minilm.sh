#!/usr/bin/env bash
# Rows of recipes/bert_large/results/{glue,squad}_minilm.csv: MiniLM on five tasks of GLUE (GPU 0) and on SQuAD (GPU 1).
# Of SST-2 the first 8,600 rows, about as many as CoLA has.
#
#   bash benchmarks/sittings/minilm.sh COMMIT STAGE[+STAGE...] [MINUTES]
#
# masks    dense and every mask at three rates, one seed; needs the pack `bert`, as all stages do
# starts   a teacher, a gradual start, both, at 2e-4, one seed; after masks, whose dense runs teach
# recover  on the novels (needs the pack `text`, too; TEXT=mixed: on that pack's), with sequences of 128 tokens for GLUE and of 384, as long
#          as its windows, for SQuAD; checkpoints in /tmp/TEXT-STEPS and /tmp/TEXT384-STEPS
# recovered  GLUE and SQuAD from there, alone, with a teacher, with its hidden states; in the same session of the machine, after masks
# states   likewise: Wanda's masks, a teacher whose hidden states weigh more, labels and no labels
# seeds    of plain and recovered starts (or of STARTS="...", MASKS="...", SPARSE="arguments") at their best rates (or RATES="--rates ...",
#          SQUAD_RATES likewise), METHODS (both), seeds 0 to 2; EPOCHS=6: then SQuAD with as many, dense and sparse
# ranks    after masks: best rates, adapters of rank 0, 4, 16, 24, seeds 0 to 2
# early    after masks: adapters of rank 4, 16, 24 awake from the first step, of every mask, and rank 0 where it has no row; SEEDS (0),
#          SQUAD_SEEDS likewise
# teachers the dense runs that `seeds` needs, made beside a recovery
# wait     for the recoveries of this call
# adapted  after seeds: likewise, of recovered starts with a teacher (and SPARSE="arguments"), Wanda's masks, seed 0, then 1 and 2
#
# Each reads and leaves the rows so far in /tmp/minilm-rows. Joined by +, GLUE and SQuAD do not wait for each other between stages, and a recovery
# (which leaves most of a GPU's time) runs beside those that do not start from it: recover+early+seeds. glue:STAGE and squad:STAGE are for that one
# alone. The first recovery is on GPU 1. LIMIT (585): seconds after which nothing runs any more.
#
# TEXT (novels), STEPS (3000) of a recovery, RECOVERIES="wanda wanda-384 magnitude-r24" of them. To see that it all runs, on a CPU: STEPS=3 TASKS=rte
# RECOVER="--data.batch_size 4 --data.source FILE --trainer.precision 32-true"
# GLUE="--data.max_train_rows 8 --data.max_dev_rows 8 --trainer.precision 32-true"
# SQUAD="--data.max_train_questions 2 --data.max_dev_questions 2 --trainer.precision 32-true"
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"
minutes=${3:-8}
case $minutes in *[!0-9]*) echo "$minutes: whole minutes are expected" >&2; exit 2 ;; esac
rows=/tmp/minilm-rows limit=${LIMIT:-585}
for file in glue_minilm squad_minilm; do
  if [ -f "$rows/$file.csv" ]; then cp "$rows/$file.csv" "$OUT/"
  elif [ -f "recipes/bert_large/results/$file.csv" ]; then cp "recipes/bert_large/results/$file.csv" "$OUT/"
  fi
done

export SLOPE_SEARCH=0 # 14 runs would look for the fastest algorithms at a time, each in the others' way; no run is timed here

run() { # log, GPU, module and arguments; begins nothing after the minutes, ends in time to keep what there is
  local left=$((limit - SECONDS))
  [ "$left" -gt 30 ] && [ "$SECONDS" -lt $((minutes * 60)) ] || { echo "no time is left for: ${*:3}" >> "$OUT/$1.log"; return 0; }
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

recovered=/tmp/${TEXT:=novels}-${STEPS:=3000} # its name goes into the rows
recovered_long=/tmp/${TEXT}384-$STEPS
recover() { # GPU, name, arguments
  local runs=/tmp/minilm-recover/$2 to=$recovered weights
  case $2 in *-384) to=$recovered_long ;; esac
  weights=$($PY -c "from recipes.bert_large.glue_plan import minilm_folder; print(minilm_folder())")
  SLOPE_SEARCH=1 OMP_NUM_THREADS=4 CUDA_VISIBLE_DEVICES=$1 timeout -k 20 $((limit - 5 - SECONDS)) $PY -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_recover.yaml \
    --data.source "$SLOPE_DATA_DIR/text/$TEXT.txt.xz" --model.weights "$weights" --data.tokenizer "$weights" \
    --trainer.enable_progress_bar false --trainer.logger.init_args.save_dir "$runs" --data.num_workers 4 \
    --trainer.max_steps "$STEPS" --trainer.val_check_interval "$((STEPS / 3))" "${@:3}" ${RECOVER:-} > "$OUT/recover-$2.log" 2>&1 || return
  cp "$(find "$runs" -name last.ckpt | tail -n 1)" "$to/${2%-384}.ckpt"
  cp "$(find "$runs" -name result-fit.json | tail -n 1)" "$OUT/recover-$2.json"
}

every=(--masks magnitude wanda transposable)
masks=(--masks ${MASKS:-${every[@]:1}})
hidden="--model.teacher.hidden_weight"
stage() { # glue or squad, stage
  local failed=0 rates=(1e-4 2e-4) from=(--recovered "$recovered" --starts) weights=(4 16) more=() of_seeds=${RATES:---best-rates} early_seeds=${SEEDS:-0}
  if [ "$1" = squad ]; then
    rates=(2e-4 4e-4) weights=(16 64) of_seeds=${SQUAD_RATES:-$of_seeds} early_seeds=${SQUAD_SEEDS:-$early_seeds}
    [ ! -d "$recovered_long" ] || from[1]=$recovered_long
  fi
  case $2 in
    masks) $1 "${masks[@]}" --rates 1e-4 2e-4 4e-4 || failed=1 ;;
    starts) $1 "${masks[@]}" --starts teacher gradual teacher+gradual --rates 2e-4 || failed=1 ;;
    recovered)
      $1 "${masks[@]}" "${from[@]}" recovered teacher+recovered --rates "${rates[@]}" || failed=1
      $1 --methods sparse --masks magnitude wanda "${from[@]}" teacher+recovered --rates "${rates[@]}" \
        --sparse-arguments "$hidden 1" || failed=1
      $1 --methods sparse --masks wanda --ranks 24 "${from[@]}" recovered --rates "${rates[@]}" || failed=1
      ;;
    states)
      $1 --methods sparse --masks wanda "${from[@]}" teacher+recovered --rates "${rates[@]}" --sparse-arguments \
        "$hidden ${weights[0]}" "$hidden ${weights[1]}" "--model.teacher.weight 1 $hidden 16" || failed=1
      ;;
    seeds | teachers)
      [ "$2" = seeds ] || more=(--prepare)
      $1 "${more[@]}" --methods ${METHODS:-dense sparse} "${masks[@]}" "${from[@]}" ${STARTS:-plain recovered teacher+recovered} $of_seeds --seeds 0 1 2 \
        ${SPARSE:+--sparse-arguments "$SPARSE"} || failed=1
      if [ "$1 $2" = "squad seeds" ] && [ -n "${EPOCHS:-}" ]; then
        $1 --methods dense --rates 1e-4 2e-4 --trainer.max_epochs "$EPOCHS" || failed=1
        $1 --methods sparse --masks wanda "${from[@]}" teacher+recovered --rates 4e-4 ${SPARSE:+--sparse-arguments "$SPARSE"} \
          --trainer.max_epochs "$EPOCHS" || failed=1
        $1 --masks wanda "${from[@]}" teacher+recovered --best-rates --seeds 0 1 2 ${SPARSE:+--sparse-arguments "$SPARSE"} \
          --trainer.max_epochs "$EPOCHS" || failed=1
      fi
      ;;
    ranks) $1 "${masks[@]}" --ranks 0 4 16 24 --best-rates --seeds 0 1 2 || failed=1 ;;
    early)
      $1 --methods sparse "${every[@]}" --best-rates --seeds $early_seeds || failed=1
      $1 --methods sparse "${every[@]}" --ranks 4 16 24 --starts early --best-rates --seeds $early_seeds || failed=1
      ;;
    wait) ;;
    adapted)
      for seeds in 0 "1 2"; do
        $1 --methods sparse --masks wanda --ranks 4 16 24 "${from[@]}" early+teacher+recovered --best-rates --seeds $seeds \
          ${SPARSE:+--sparse-arguments "$SPARSE"} || failed=1
      done
      ;;
    *) echo "$2: $expected is expected" >&2; failed=2 ;;
  esac
  return $failed
}

stages() { # glue or squad
  local failed=0 name
  for name in ${stage//+/ }; do
    case $name in "$1":*) name=${name#*:} ;; *:*) continue ;; esac
    case $name in recover) continue ;; wait | recovered | states | seeds | adapted) recoveries_are_over ;; esac
    stage "$1" "$name" || failed=$?
  done
  return $failed
}

recoveries_are_over() { # waits for those of this very call
  case +$stage+ in *+recover+*) ;; *) return 0 ;; esac
  until [ -f "$recovered/over" ]; do sleep 1; done
}

recoveries() {
  local gpu=1 name rank options jobs=() failed=0 # where SQuAD runs, which has fewer runs at a time
  for name in ${RECOVERIES:-magnitude wanda-384 wanda magnitude-384}; do
    options=()
    case $name in wanda*) options+=(--model.slope.mask_calibration_batches 16) ;; transposable*) options+=(--model.slope.mask transposable) ;; esac
    case $name in *-r*) rank=${name##*-r} options+=(--model.slope.adapter_rank "${rank%-384}" --model.slope.adapter_start_step 0) ;; esac
    case $name in *-384) options+=(--data.max_length 384 --data.batch_size 85 --data.eval_batch_size 85) ;; esac # tokens as before
    recover "$gpu" "$name" "${options[@]}" &
    jobs+=($!)
    gpu=$((1 - gpu))
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  touch "$recovered/over"
  tail -n 30 "$OUT"/recover-*.log
  return $failed
}

expected="masks, starts, recover, recovered, states, seeds, ranks, early, teachers, wait or adapted"
stage=${2:?$expected}
mkdir -p "$rows"
[ "$stage" = recover ] || trap 'cp "$OUT"/*_minilm.csv "$rows/"' EXIT # when it is ended from outside, too
trap 'exit 143' TERM
case +$stage+ in
  *+recover+*)
    mkdir -p "$recovered" "$recovered_long"
    rm -f "$recovered/over"
    recoveries &
    ;;
esac
if [ "$stage" != recover ]; then
  stages glue &
  stages squad &
fi
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
[ "$stage" = recover ] || tail -n 40 "$OUT"/glue.log "$OUT"/squad.log
exit $status
