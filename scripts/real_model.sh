#!/usr/bin/env bash
# A real model end to end on one GPU: chains of its own on training problems, a retrofit on them, and the accuracy of
# the original, of the retrofitted family and of training-free policies at equal memory. Every step resumes.
# usage: scripts/real_model.sh MODEL DATA OUT [chains|retrofit|dms|rivals|tables]...
# DATA holds gsm8k_train.jsonl, math_train.jsonl, and the test sets of TASKS: gsm8k_test.jsonl, math500.jsonl,
# human_eval.jsonl. The environment may set TASKS, LENGTHS, RIVALS, BATCH, PYTHON, OPTIONS (of every experiment:
# OPTIONS="--limit 64", say) and RETROFIT (options of scripts.retrofit).
set -euo pipefail
model=$1 data=$2 out=$3
shift 3
steps=${*:-chains retrofit dms rivals tables}
python=${PYTHON:-python3} batch=${BATCH:-256}
tasks=${TASKS:-gsm8k math500 humaneval} lengths=${LENGTHS:-512 1024}
rivals=${RIVALS:-h2o tova streaming quest rkv snapkv vase_attnv vase_dkv keydiff random_attention}
declare -A file=([gsm8k]=gsm8k_test.jsonl [math500]=math500.jsonl [humaneval]=human_eval.jsonl)
held='import json, sys
rows = json.load(open(sys.argv[1]))["rows"]
print(round(next(row["peak_tokens"] for row in rows if row["config"].endswith(f"-1-{sys.argv[2]}"))) - int(sys.argv[3]))'
form='Please reason step by step, and put your final answer within \boxed{}.'  # as experiments/tasks/base.py asks
every=8  # steps from one eviction to the next, for the policies that evict in blocks
mkdir -p "$out"

for step in $steps; do
  case $step in
    chains)
      for name in gsm8k_train math_train; do
        "$python" -m scripts.sample_traces --model "$model" --data "$data/$name.jsonl" --out "$out/$name.jsonl" \
          --instruction "$form" --limit "${CHAINS:-7500}" --max-new-tokens 512 --max-num-seqs "$batch"
      done ;;
    retrofit)
      "$python" -m scripts.retrofit --config configs/qwen2.5_coder_0.5b.yaml --model "$model" \
        --data "$out"/gsm8k_train.jsonl "$out"/math_train.jsonl --crs 2 4 --out "$out/retrofit" \
        ${RETROFIT:-} ;;
    dms)
      for task in $tasks; do
        for length in $lengths; do
          common="--data $data/${file[$task]} --chains 1 2 4 8 --max-length $length --batch-size $batch ${OPTIONS:-}"
          "$python" -m "experiments.$task" --model "$model" --policy full $common --run-dir "$out/${task}_${length}_full"
          "$python" -m "experiments.$task" --model "$out/retrofit" --policy dms --cr 2 4 8 $common \
            --run-dir "$out/${task}_${length}_dms"
        done
      done ;;
    rivals)
      for task in $tasks; do
        for length in $lengths; do
          for cr in 2 4 8; do
            # At equal memory: as many tokens as one chain of the retrofitted model really held at its peak. Between
            # two evictions a policy that evicts in blocks holds up to every - 1 more.
            for rival in $rivals; do
              case $rival in
                tova | h2o | streaming | quest) blocks= over=0 ;;
                *) blocks="--evict-every $every" over=$((every - 1)) ;;
              esac
              budget=$("$python" -c "$held" "$out/${task}_${length}_dms/results.json" "$cr" "$over")
              for protect in False True; do
                prompts="--protect-prompt $protect"
                if [ "$rival" = quest ]; then  # it evicts nothing, and reads by pages of its authors' size
                  [ "$protect" = True ] && continue
                  prompts="--page-size 16"
                fi
                "$python" -m "experiments.$task" --model "$model" --data "$data/${file[$task]}" --policy "$rival" \
                  --budget "$budget" $prompts $blocks --chains 1 2 --max-length "$length" --batch-size "$batch" \
                  ${OPTIONS:-} --run-dir "$out/${task}_${length}_cr${cr}_${rival}_protect$protect"
              done
            done
          done
        done
      done ;;
    tables)
      for task in $tasks; do
        for length in $lengths; do
          "$python" -m experiments.collect "$out/${task}_${length}_full" "$out/${task}_${length}_dms" \
            "$out/${task}_${length}_cr"* --chains 3 --out "$out/${task}_${length}.json"
        done
      done ;;
    *) echo "unknown step: $step" >&2; exit 2 ;;
  esac
done
