#!/bin/bash
# host.sh SCRIPT [ARGUMENTS]: one host's part: a Ray node for the holder, and a torchrun agent.
#
# Without Slurm: run it on every host, with the same HEAD (the first host's name), HOSTS (how many
# at most), RENDEZVOUS (any name of this launch) and JOB, and with the same ~/.ray/auth_token
# (`ray get-auth-token --generate` makes one). A host that comes (back) later joins.
set -euo pipefail

: "${HEAD:?}" "${HOSTS:?}" "${RENDEZVOUS:?}"
RAY_PORT=${RAY_PORT:-6379}
RENDEZVOUS_PORT=${RENDEZVOUS_PORT:-29500}
export RAY_ADDRESS=$HEAD:$RAY_PORT
export RAY_AUTH_MODE=token # by itself the head asks for one where there is one, and nobody sends it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # see train_torchrun.py

if [ "$(hostname -s)" = "${HEAD%%.*}" ]; then
    ray start --head --port="$RAY_PORT"
else
    until ray start --address="$RAY_ADDRESS"; do sleep 5; done
fi
trap 'ray stop' EXIT # all of Ray on this host: a host is for one job at a time
torchrun --nnodes="1:$HOSTS" --nproc-per-node="${PROCESSES:-1}" --max-restarts=100 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$RENDEZVOUS_PORT" --rdzv-id="$RENDEZVOUS" "$@"
