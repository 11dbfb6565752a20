cd {{folder}} || exit 2
export PYTHONUNBUFFERED=1
{{setup}}
# Write a line that `oscar-submit status` reads.
note() {
    echo "oscar-submit: $1 $(date --iso-8601=seconds) job $SLURM_JOB_ID node ${SLURMD_NODENAME:-$(hostname)}" \
        "restarts ${SLURM_RESTART_COUNT:-0}"
}

# Run a command to its end. Some time before the time limit SLURM sends USR1: the command saves its work and ends, and
# this job queues again. USR2 comes from `oscar-submit cancel`. TERM, of a preemption or scancel, SLURM itself sends to
# all processes of the job; what was preempted queues again.
run() {
    local child code cause=
    trap 'cause=time; tell_to_end' USR1
    trap 'cause=cancelled; tell_to_end' USR2
    trap 'cause=${cause:-ended}' TERM
    note began
    "$@" &
    child=$!

    while true; do # a signal ends `wait` early
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done

    if [ -n "$cause" ] && [ "$code" -ne 0 ]; then
        code=143 # told to end; torchrun would say 1
    fi
    note "ended $code"
    if [ "$cause" = time ] && [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
