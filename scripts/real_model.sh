#!/usr/bin/env bash
# A real model end to end on one GPU: chains of its own on training problems, a retrofit on them, and the accuracy of
# the original, of the retrofitted family and of training-free policies at equal memory. Every step resumes.
# usage: scripts/real_model.sh MODEL DATA OUT [chains|retrofit|dms|rivals]...
# DATA holds gsm8k_train.jsonl, math_train.jsonl, and the test sets of TASKS: gsm8k_test.jsonl, math500.jsonl,
# human_eval.jsonl. The environment may set TASKS, LENGTHS, RIVALS, BATCH, PYTHON and OPTIONS (of every experiment:
# OPTIONS="--limit 64", say).
set -euo pipefail
model=$1 data=$2 out=$3
shift 3
steps=${*:-chains retrofit dms rivals}
python=${PYTHON:-python3} batch=${BATCH:-256}
tasks=${TASKS:-gsm8k math500 humaneval} lengths=${LENGTHS:-512 1024}
rivals=${RIVALS:-h2o tova streaming quest rkv snapkv vase_attnv vase_dkv keydiff random_attention}
declare -A file=([gsm8k]=gsm8k_test.jsonl [math500]=math500.jsonl [humaneval]=human_eval.jsonl)
held='import json, sys
rows = json.load(open(sys.argv[1]))["rows"]
print(round(next(row["peak_tokens"] for row in rows if row["config"].endswith(f"-1-{sys.argv[2]}"))))'
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
      for task in $tasks; do
        for length in $lengths; do
          "$python" -m "experiments.$task" --model "$model" --gate "$out/retrofit" --data "$data/${file[$task]}" \
            --policy full dms --cr 2 4 8 --chains 1 2 4 8 --max-length "$length" --batch-size "$batch" \
            ${OPTIONS:-} --run-dir "$out/${task}_${length}_dms"
        done
      done ;;
    rivals)
      for task in $tasks; do
        for length in $lengths; do
          for cr in 2 4 8; do
            # At equal memory: as many tokens as one chain of the retrofitted model really held at its peak.
            budget=$("$python" -c "$held" "$out/${task}_${length}_dms/results.json" "$cr")
            for protect in False True; do
              "$python" -m "experiments.$task" --model "$model" --data "$data/${file[$task]}" --policy $rivals \
                --budget "$budget" --protect-prompt $protect --chains 1 2 --max-length "$length" --batch-size "$batch" \
                ${OPTIONS:-} --run-dir "$out/${task}_${length}_rivals_cr${cr}_protect$protect"
            done
          done
        done
      done ;;
    *) echo "unknown step: $step" >&2; exit 2 ;;
  esac
done
