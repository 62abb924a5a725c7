#!/usr/bin/env bash
# BERT-Large: both phases on the novels, dense on GPU 0 and sparse on GPU 1, then SQuAD and two tasks of GLUE from there.
#
#   bash benchmarks/sittings/bert_large.sh COMMIT {phase1|phase2|finetune} [STEPS]
#
# One session of the machine: checkpoints lie below /tmp/bert. A phase is sent SIGTERM after HALT (150) seconds and resumed from what
# it saved then. STEPS cuts a phase short, to see that it runs; PRETRAIN and FINETUNE="arguments" are for all runs,
# PRETRAIN_SPARSE for the sparse ones.
# Rows of finetune are kept in /tmp/bert/rows: it goes on from them. LIMIT (580): seconds after which nothing runs any more.
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/sittings/enter.sh "${1:?commit}"
stage=${2:?phase1, phase2 or finetune} limit=${LIMIT:-580} rows=/tmp/bert/rows

newest() { find "/tmp/bert/$1" -name '*.ckpt' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-; }

fit() { # seconds, GPU, sibling, phase, arguments
  local sparse=${PRETRAIN_SPARSE:-}
  [ -z "$3" ] || sparse=
  OMP_NUM_THREADS=8 CUDA_VISIBLE_DEVICES=$2 timeout -k 60 "$1" $PY -m recipes.bert_large.pretrain fit \
    --config "recipes/bert_large/pretrain_phase$4_novels$3.yaml" --data.source "$SLOPE_DATA_DIR/text/novels.txt.xz" \
    --data.tokenizer "$SLOPE_DATA_DIR/tokenizers/bert-base-uncased-vocab.txt" --trainer.enable_progress_bar false \
    --trainer.logger.init_args.save_dir "/tmp/bert/phase$4$3" --resume auto "${@:5}" ${PRETRAIN:-} $sparse
}

pretrain() { # GPU, sibling, phase, arguments
  local log="$OUT/phase$3$2.log" status=0
  fit "${HALT:-150}" "$@" > "$log" 2>&1 || status=$?
  [ $status -ne 124 ] || { status=0; fit $((limit - 5 - SECONDS)) "$@" >> "$log" 2>&1 || status=$?; } # 124: it was halted, and saved
  [ $status -eq 0 ] || return $status
  tar -czf "$OUT/phase$3$2.tgz" --exclude '*.ckpt*' -C "/tmp/bert/phase$3$2" .
}

finetune() { # GPU, sibling, methods and what else they take
  local weights
  weights=$(newest "phase2$2")
  local vocabulary=$SLOPE_DATA_DIR/tokenizers/bert-base-uncased-vocab.txt
  local common=(--weights "$weights" --methods "${@:3}" --budget-minutes "$((limit / 60 - 1))" --data.tokenizer "$vocabulary" ${FINETUNE:-}) failed=0
  # Side by side, three runs a GPU: batches of 4 leave it waiting.
  CUDA_VISIBLE_DEVICES=$1 timeout -k 20 $((limit - SECONDS)) $PY -m recipes.bert_large.glue_all --config glue_base.yaml --csv "$rows/glue$2.csv" \
    --runs "/tmp/bert/glue$2" --data "$SLOPE_DATA_DIR/glue" --tasks mrpc rte --jobs 2 "${common[@]}" > "$OUT/glue$2.log" 2>&1 &
  CUDA_VISIBLE_DEVICES=$1 timeout -k 20 $((limit - SECONDS)) $PY -m recipes.bert_large.compare --config base.yaml --csv "$rows/squad$2.csv" \
    --runs "/tmp/bert/squad$2" --data "$SLOPE_DATA_DIR/squad" "${common[@]}" > "$OUT/squad$2.log" 2>&1 || failed=1
  wait $! && return $failed
}

steps=(${3:+--trainer.max_steps "$3" --trainer.val_check_interval "$3"})
case $stage in
  phase1)
    pretrain 0 _dense 1 "${steps[@]}" &
    pretrain 1 "" 1 "${steps[@]}" &
    ;;
  phase2)
    pretrain 0 _dense 2 --model.start_from "$(newest phase1_dense)" "${steps[@]}" &
    pretrain 1 "" 2 --model.start_from "$(newest phase1)" "${steps[@]}" &
    ;;
  finetune)
    export SLOPE_SEARCH=0 # six runs would look for the fastest algorithms at a time; none is timed here
    mkdir -p "$rows"
    finetune 0 _dense dense &
    finetune 1 "" sparse --ranks 16 & # as in phase 2, whose adapters are awake
    ;;
  *) echo "$2: phase1, phase2 or finetune is expected" >&2; exit 2 ;;
esac
status=0
for job in $(jobs -p); do wait "$job" || status=1; done
tail -n 30 "$OUT"/*.log
if [ "$stage" = finetune ]; then # many small files
  cp "$rows"/* "$OUT/"
  (cd "$OUT" && tar -czf finetune.tar.gz ./*.csv ./*.md ./*.log && rm -f ./*.csv ./*.md ./*.log)
fi
exit $status
