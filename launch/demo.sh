#!/usr/bin/env bash
# The demo: real text from this Python installation, 300 steps of a small GPT on two local ranks
# (tensor parallel 2 with sequence parallelism, ZeRO-1), every sample scored towards two targets; then the answer.
# `make demo` runs it inside .venv. With `pipeline` as first argument (`make demo-pipeline`) the two ranks are two
# pipeline stages instead, in runs/demo-pipeline.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=data/demo
if [ "${1:-}" = pipeline ]; then
  RUN=runs/demo-pipeline
  LAYOUT=(--pipeline-model-parallel-size 2 --micro-batch-size 4)
else
  RUN=runs/demo
  LAYOUT=(--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 8)
fi

[ -f "$DATA/target_prose.idx" ] || python launch/demo_corpus.py --output "$DATA"
if [ -e "$RUN" ]; then
  echo "$RUN is there from an earlier demo: replaced"
  rm -rf "$RUN"
fi
cat <<'EOF'
Columns below: loss of the training batch; loss of the targets code and prose, all in nats per token; scoring: its share of a
step's time, most of it the validation pass (8 target sequences beside 16 training samples).
Audit lines: additivity is exact and must stay near 0; the fall of a target's loss in one step is noisy, and its prediction
is judged over the whole run, at the end.
EOF

# A free port: launches that overlap would collide on DeepSpeed's default.
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

deepspeed --quiet --num_accelerators 2 --master_port "$PORT" launch/pretrain.py \
  "${LAYOUT[@]}" --deepspeed_config ds_configs/zero1.json \
  --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 256 \
  --global-batch-size 16 --train-iters 300 \
  --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0 \
  --hidden-dropout 0 --attention-dropout 0 \
  --data-path 1 "$DATA/code" 1 "$DATA/prose" 1 "$DATA/shuffled" --split 100,0,0 \
  --save "$RUN" --save-interval 150 \
  --shapley-target code="$DATA/target_code:4" --shapley-target prose="$DATA/target_prose:4" \
  --shapley-base current --shapley-audit-interval 50

inrun summary "$RUN"
inrun verify "$RUN"
inrun report "$RUN"
