#!/usr/bin/env bash
# Does a latent compress as well as keys and values? A mini model with latent attention from nothing, then the adapter
# gate on it and, by the same recipe, on the bundled mini model, whose cache has as many bytes a token; and the accuracy
# of both at CR 1, 4 and 8. On one GPU; every step resumes.
# usage: scripts/mini_latent.sh OUT
# The environment may set PYTHON, and options of the steps: PRETRAIN, RETROFIT, JUDGE="--limit 512", say.
set -euo pipefail
out=$1 python=${PYTHON:-python3}
config=configs/mini_latent_retrofit.yaml judge=${JUDGE:---limit 2048 --batch-size 1024}
mkdir -p "$out"

"$python" -m scripts.pretrain_mini --model configs/models/mini_latent.yaml --out "$out/latent" ${PRETRAIN:-}
for name in latent mini; do
  model=$([ $name = mini ] && echo mini || echo "$out/latent/base")
  "$python" -m scripts.retrofit --config $config --model "$model" --out "$out/${name}_gates" ${RETROFIT:-}
  "$python" -m experiments.aime --model "$model" --gate "$out/${name}_gates" --data mini --cr 1 4 8 --chains 1 4 $judge \
    --run-dir "$out/${name}_accuracy"
done
