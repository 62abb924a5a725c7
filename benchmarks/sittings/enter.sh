# Sourced on the GPU machine, in the checkout: unpacks what pack.sh packed, and says where it lies.
#
#   . benchmarks/sittings/enter.sh COMMIT
#
# A pack is unpacked once and may then be absent. COMMIT stands in the results where the checkout came without its history.
place=${SLOPE_OFFLINE:-/tmp/slope-offline}
mkdir -p "$place"
for pack in offline/*.tar offline/*.tar.xz; do
  done_mark="$place/.$(basename "$pack").unpacked"
  if [ -f "$pack" ] && [ ! -f "$done_mark" ]; then
    tar -xf "$pack" -C "$place" && touch "$done_mark"
  fi
done
[ -f "$place/extension/slope_cuda.so" ] && cp "$place/extension/slope_cuda.so" slope_pl/ops/
export PYTHONPATH="$place/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export SLOPE_DATA_DIR="$place/data" SLOPE_COMMIT="${1:?the commit that lies here}"
export HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR="$place/inductor" TRITON_CACHE_DIR="$place/triton"
PY=${PY:-python3}
OUT=${OUT:-runs/sitting}
mkdir -p "$OUT"
$PY -m slope_pl.info | tee "$OUT/info.txt"
