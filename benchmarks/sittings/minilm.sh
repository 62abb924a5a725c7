#!/usr/bin/env bash
# Rows of recipes/bert_large/results/{glue,squad}_minilm.csv: MiniLM on five tasks of GLUE (GPU 0) and on SQuAD (GPU 1).
# Of SST-2 the first 8,600 rows, about as many as CoLA has.
#
#   bash benchmarks/sittings/minilm.sh COMMIT {masks|starts|ranks} [MINUTES]
#
# masks    dense and every mask at three rates, one seed
# starts   a teacher, a gradual start, both, at 2e-4, one seed; after masks, whose dense runs teach
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

masks=(--masks magnitude wanda transposable)
case ${2:?masks, starts or ranks} in
  masks) both "${masks[@]}" --rates 1e-4 2e-4 4e-4 ;;
  starts) both "${masks[@]}" --starts teacher gradual teacher+gradual --rates 2e-4 ;;
  ranks) both "${masks[@]}" --ranks 0 4 16 24 --best-rates --seeds 0 1 2 ;;
  *) echo "$2: masks, starts or ranks is expected" >&2; exit 2 ;;
esac
mkdir -p "$rows"
cp "$OUT"/*_minilm.csv "$rows/"
tail -n 40 "$OUT"/glue.log "$OUT"/squad.log
exit $status
