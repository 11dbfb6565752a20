#!/bin/bash
# Written by oscar-submit. Trains on all nodes of this job; started again, it goes on from the newest checkpoint.
{{directives}}

{{begin}}
tell_to_end() {
    scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null # all processes on all nodes, but not this script
}

# All processes meet at the first node of the job, at the address by which SLURM knows it.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# torchrun starts the processes of a node; each node has another SLURM_NODEID.
train=$(
    cat <<'END'
exec {{torchrun}} \
    --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    {{command}}
END
)

run srun --kill-on-bad-exit=1 --wait=60 {{step}} bash -c "$train" || exit
{{record}}
