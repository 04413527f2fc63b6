#!/usr/bin/env bash
# What docs/ names as not run, for want of a GPU: each step writes a record or a run folder into OUT; a step that fails
# does not stop the others. Nothing else may run on the GPUs, and little on the processors.
# usage: scripts/benchmarks/gpu_records.sh OUT MODEL.gguf SMOLLM2.gguf DATA [STEP ...]
#   check      every kernel against the reference, decode and latent and flash, and their times
#   small      Llama-3.2-1B's shape, 1, 8 and 256 sequences, beside transformers (and FASTDMS=clone of FastDMS)
#   latent     kernels and decode steps of Youtu-LLM-2B's shape
#   offload    keys and values in pinned host memory, streamed and under Quest
#   start      the first and the second start of scripts.generate, by phase
#   job        GSM8K, four chains a problem, beside generate alone; twice, the second time with programs kept
#   ruler      today's training-free rivals on needles and variable tracking (DATA: shakespeare.txt)
#   window     the window ablation, three seeds
#   mini       does a latent cache compress as well as keys and values?
#   two        two GPUs: engines over the tensor axis, the retrofit along each axis
# PYTHON may be set, and RUN=echo shows the commands.
set -uo pipefail
out=$1 model=$2 smol=$3 data=$4
shift 4
steps=${*:-check small latent offload start job ruler window mini two}
python="${RUN:-} ${PYTHON:-python3}" run=${RUN:-}
bench="$python -m scripts.benchmarks"
mkdir -p "$out"

for step in $steps; do
  case $step in
    check)
      $bench.bench_kernels --check --out "$out/kernels_check.json"
      $bench.bench_kernels --no-peers --out "$out/kernels.json" ;;
    small) $run scripts/benchmarks/small_batches.sh "$out/small" ${FASTDMS:-} ;;
    latent)
      $bench.bench_kernels --kernels latent --no-peers --out "$out/kernels_latent.json"
      $bench.bench_kernels --kernels latent --no-peers --tune --quick --out "$out/kernels_latent_tune.json"
      $bench.bench_decode --model youtu_2b --cells 64x8192x1 64x8192x4 64x8192x8 --out "$out/decode_youtu_2b.json" ;;
    offload)
      $bench.bench_offload --model llama3.2_1b --out "$out/offload_llama3.2_1b.json"
      $bench.bench_offload --model qwen3_8b --cells 1x8192 8x8192 --modes dms streamed quest \
        --out "$out/offload_qwen3_8b.json" ;;
    start)
      for n in first second; do
        $python -m scripts.generate --model "$model" --chat --prompt "What is 17 * 23?" --max-new-tokens 32 --verbose
      done ;;
    job)
      $bench.bench_job --model "$model" --dtype bfloat16 --prompts 256 --max-num-seqs 256 --profile --out "$out/job.json"
      for n in first second; do
        $python -m experiments.gsm8k --model "$model" --data "$data/gsm8k_test.jsonl" --policy full --chains 1 2 4 \
          --max-length 400 --batch-size 256 --run-dir "$out/gsm8k_$n"
      done ;;
    ruler)
      for policy in rkv snapkv keydiff vase_attnv vase_dkv random_attention; do
        set -- --model "$smol" --policy "$policy" --budget 0.25 --evict-every 16 --length 1024 2048 --limit 50 \
          --batch-size 50 --page-size 16
        $python -m experiments.niah "$@" --task niah_single_1 niah_single_2 --data "$data/shakespeare.txt" \
          --run-dir "$out/niah_$policy"
        $python -m experiments.variable_tracking "$@" --run-dir "$out/vt_$policy"
      done ;;
    window) $python -m experiments.ablate_window --jobs 9 --out "$out/window" ;;
    mini) $run scripts/mini_latent.sh "$out/mini" ;;
    two)
      $bench.bench_tensor --devices 2 --model qwen3_8b --cells maxx32768x1 maxx32768x8 --out "$out/tensor_qwen3_8b.json"
      $bench.bench_decode --model qwen3_8b --cells maxx32768x1 maxx32768x8 --out "$out/decode_qwen3_8b.json"
      for mesh in "1 1 1" "2 1 1" "1 2 1" "1 1 2"; do
        $bench.bench_retrofit --model configs/models/qwen3_1.7b.yaml --context 8192 --rows 2 --compute bfloat16 \
          --profile --mesh $mesh --out "$out/retrofit_${mesh// /}.json"
      done ;;
    *) echo "unknown step: $step" >&2 && exit 2 ;;
  esac || echo "step $step failed" >&2
done
