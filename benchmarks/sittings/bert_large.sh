#!/usr/bin/env bash
# BERT-Large: both phases on the novels, dense on GPU 0 and sparse on GPU 1, then SQuAD and two tasks of GLUE from there.
#
#   bash benchmarks/sittings/bert_large.sh COMMIT STAGE[+STAGE...] [STEPS]      stages: phase1, phase2, finetune, trace
#
# One session of the machine: checkpoints lie below /tmp/bert, rows of finetune in /tmp/bert/rows, and it goes on from both. Joined by +, dense and
# sparse do not wait for each other between stages. A phase is sent SIGTERM after HALT (150) seconds and resumed from what it saved then; HALT=0: it
# is not. STEPS cuts a phase short. PRETRAIN, PHASE1, PHASE2, PHASE2_SPARSE, FINETUNE, GLUE and SQUAD="arguments" are for all runs of that kind.
# trace: where 3 steps of phase 1 go that have 128 sequences; 2:4 with adapters asleep and awake. TEXT=mixed: that pack's text in place of the
# novels. LIMIT (580): seconds after which nothing runs any more.
#
#   HALT=0 TEXT=mixed PHASE1="--trainer.max_steps 200" PHASE2="--trainer.max_steps 100" \
#     PHASE2_SPARSE="--model.slope.adapter_start_step 75" bash benchmarks/sittings/bert_large.sh COMMIT phase1+phase2+finetune
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"
stage=${2:?phase1, phase2, finetune, trace, or some of them joined by +} limit=${LIMIT:-580} rows=/tmp/bert/rows

newest() { find "/tmp/bert/$1" -name '*.ckpt' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-; }

left() { # of LIMIT; never 0, which timeout takes for no limit
  local seconds=$((limit - SECONDS))
  echo $((seconds > 1 ? seconds : 1))
}

train() { # seconds, GPU, sibling, phase, arguments
  OMP_NUM_THREADS=8 CUDA_VISIBLE_DEVICES=$2 timeout -k 60 "$1" $PY -m recipes.bert_large.pretrain fit \
    --config "recipes/bert_large/pretrain_phase$4_novels$3.yaml" --data.source "$SLOPE_DATA_DIR/text/${TEXT:-novels}.txt.xz" \
    --data.tokenizer "$SLOPE_DATA_DIR/tokenizers/bert-base-uncased-vocab.txt" --trainer.enable_progress_bar false "${@:5}"
}

fit() { # seconds, GPU, sibling, phase, arguments
  local more="${PRETRAIN:-}"
  [ "$4" = 1 ] && more+=" ${PHASE1:-}" || more+=" ${PHASE2:-}"
  [ -n "$3" ] || [ "$4" = 1 ] || more+=" ${PHASE2_SPARSE:-}"
  train "${@:1:4}" --trainer.logger.init_args.save_dir "/tmp/bert/phase$4$3" --resume auto "${@:5}" $more
}

pretrain() { # GPU, sibling, phase, arguments
  local log="$OUT/phase$3$2.log" halt=${HALT:-150} status=0
  if [ "$halt" -gt 0 ]; then
    fit "$halt" "$@" > "$log" 2>&1 || status=$?
    [ $status -ne 124 ] || { status=0; fit "$(left)" "$@" >> "$log" 2>&1 || status=$?; } # 124: it was halted, and saved
  else
    fit "$(left)" "$@" > "$log" 2>&1 || status=$?
  fi
  [ $status -eq 0 ] || return $status
  tar -czf "$OUT/phase$3$2.tgz" --exclude '*.ckpt*' -C "/tmp/bert/phase$3$2" .
}

finetune() { # GPU, sibling, methods and what else they take
  local weights
  weights=$(newest "phase2$2")
  local vocabulary=$SLOPE_DATA_DIR/tokenizers/bert-base-uncased-vocab.txt
  local common=(--weights "$weights" --methods "${@:3}" --budget-minutes "$(($(left) / 60 + 1))" --data.tokenizer "$vocabulary" ${FINETUNE:-}) failed=0
  # Side by side, three runs a GPU: batches of 4 leave it waiting.
  CUDA_VISIBLE_DEVICES=$1 timeout -k 20 "$(left)" $PY -m recipes.bert_large.glue_all --config glue_base.yaml --csv "$rows/glue$2.csv" \
    --runs "/tmp/bert/glue$2" --data "$SLOPE_DATA_DIR/glue" --tasks mrpc rte --jobs 2 "${common[@]}" ${GLUE:-} > "$OUT/glue$2.log" 2>&1 &
  CUDA_VISIBLE_DEVICES=$1 timeout -k 20 "$(left)" $PY -m recipes.bert_large.compare --config base.yaml --csv "$rows/squad$2.csv" \
    --runs "/tmp/bert/squad$2" --data "$SLOPE_DATA_DIR/squad" "${common[@]}" ${SQUAD:-} > "$OUT/squad$2.log" 2>&1 || failed=1
  wait $! && return $failed
}

traced() { # GPU, sibling, name, arguments
  local folder=/tmp/bert/trace-$3 status=0
  # No validation: its compilation takes longer than all the rest.
  train "$(left)" "$1" "$2" 1 --data.batch_size 128 --trainer.accumulate_grad_batches 1 --trainer.max_steps 24 --trainer.val_check_interval 24 \
    --trainer.limit_val_batches 0 --trainer.enable_checkpointing false --trainer.logger false --trainer.default_root_dir "$folder" "${@:4}" \
    --trainer.callbacks "[{class_path: recipes.trace.Trace}]" ${PRETRAIN:-} > "$OUT/trace-$3.log" 2>&1 || status=$?
  cp "$folder/trace.txt" "$OUT/trace-$3.md" && return $status # it is there before the run is over
}

steps=(${3:+--trainer.max_steps "$3" --trainer.val_check_interval "$3"})
chain() { # GPU, sibling, how it is fine-tuned
  local name
  for name in ${stage//+/ }; do
    case $name in
      phase1) pretrain "$1" "$2" 1 "${steps[@]}" ;;
      phase2) pretrain "$1" "$2" 2 --model.start_from "$(newest "phase1$2")" "${steps[@]}" ;;
      finetune) SLOPE_SEARCH=0 finetune "$@" ;; # six runs would look for the fastest algorithms at a time; none is timed here
      trace)
        traced "$1" "$2" "${2:-sparse}" && { [ -n "$2" ] || traced "$1" "" awake --model.slope.adapter_rank 16 --model.slope.adapter_start_step 5; }
        ;;
      *) echo "$name: phase1, phase2, finetune or trace is expected" >&2; return 2 ;;
    esac || { echo "$name$2 failed (status $?, log in $OUT)" >&2; return 1; }
  done
}

mkdir -p "$rows"
chain 0 _dense dense &
chain 1 "" sparse --ranks 16 & # as in phase 2, whose adapters are awake
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
tail -n 30 "$OUT"/*.log
cp "$rows"/* "$OUT/" 2> /dev/null
(cd "$OUT" && tar -czf logs.tar.gz --ignore-failed-read ./*.csv ./*.md ./*.log 2> /dev/null && rm -f ./*.csv ./*.md ./*.log) # many small files
exit $status
