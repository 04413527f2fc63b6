#!/usr/bin/env bash
# A real model end to end on one GPU: chains of its own on training problems, a retrofit on them, and the accuracy of
# the original, of the retrofitted family and of training-free policies at equal memory. Every step resumes.
# usage: scripts/real_model.sh MODEL DATA OUT [chains|retrofit|dms|rivals]...
# DATA holds gsm8k_train.jsonl, gsm8k_test.jsonl and math_train.jsonl.
set -euo pipefail
model=$1 data=$2 out=$3
shift 3
steps=${*:-chains retrofit dms rivals}
python=${PYTHON:-python3}
mkdir -p "$out"

for step in $steps; do
  case $step in
    chains)
      for name in gsm8k_train math_train; do
        "$python" -m scripts.sample_traces --model "$model" --data "$data/$name.jsonl" --out "$out/$name.jsonl" \
          --limit 5000 --max-new-tokens 512 --max-num-seqs 256
      done ;;
    retrofit)
      "$python" -m scripts.retrofit --config configs/qwen2.5_coder_0.5b.yaml --model "$model" \
        --data "$out"/gsm8k_train.jsonl "$out"/math_train.jsonl --crs 2 4 --out "$out/retrofit" ;;
    dms)
      "$python" -m experiments.gsm8k --model "$model" --gate "$out/retrofit" --data "$data/gsm8k_test.jsonl" \
        --policy full dms --cr 2 4 8 --chains 1 2 4 8 --max-length ${LENGTH:-512} --batch-size ${BATCH:-256} --run-dir "$out/gsm8k_dms" ;;
    rivals)
      held='import json, sys; rows = json.load(open(sys.argv[1]))["rows"]
print(round(next(row["peak_tokens"] for row in rows if row["config"].endswith("-1-4"))))'
      budget=$("$python" -c "$held" "$out/gsm8k_dms/results.json")
      "$python" -m experiments.gsm8k --model "$model" --data "$data/gsm8k_test.jsonl" \
        --policy h2o tova streaming quest --budget "$budget" --chains 1 2 --max-length ${LENGTH:-512} --batch-size ${BATCH:-256} \
        --run-dir "$out/gsm8k_rivals" ;;
    *) echo "unknown step: $step" >&2; exit 2 ;;
  esac
done
