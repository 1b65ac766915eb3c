#!/bin/bash
# torchrun on several hosts: the same command on each of them. docs/clusters.md, section torchrun.
#
#   bash launch/torchrun.sh FLAGS...
#
# FLAGS should hold `--save RUN --load RUN`: a restart then goes on from the last checkpoint.
set -eu
cd "$(dirname "$0")/.."

TORCHRUN=.venv/bin/torchrun                # EDIT: of the environment that has this package
NODES=2                                    # EDIT: hosts; MIN:MAX to go on with fewer when some are lost
RANKS=8                                    # EDIT: ranks per host
RENDEZVOUS=node1:29400                     # EDIT: one of the hosts, and a free port
JOB=pretrain                               # EDIT: a name that no other run uses at the same time
RESTARTS=3                                 # EDIT: how often the ranks are started again after one was lost
export NCCL_SOCKET_IFNAME=^lo,docker0      # EDIT: the network between the hosts
export CUDA_DEVICE_MAX_CONNECTIONS=1       # EDIT: leave out without tensor parallelism (docs/clusters.md)

# The agent's own store cannot be shared with ranks that are started again (pytorch issues 135712 and 167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$TORCHRUN" --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB" \
    --rdzv-conf last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=5,join_timeout=600 \
    launch/pretrain.py "$@"
