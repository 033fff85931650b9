#!/usr/bin/env bash
# Submits the stages of a run as dependent jobs, or a sweep of runs as an array. Run again, it submits what is missing.
set -euo pipefail

die() {
    echo "submit.sh: $*" >&2
    exit 2
}

config='' cluster='' from='' sweep='' dry='' overrides=()
while (($#)); do
    case $1 in
        --config | --cluster | --from | --sweep)
            (($# > 1)) || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --config=* | --cluster=* | --from=* | --sweep=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --dry-run) dry=1 && shift ;;
        *=*) overrides+=("$1") && shift ;;
        *) die "unknown argument '$1' (\`nuteprune submit --help\` shows them)" ;;
    esac
done
[[ $config || ${#overrides[@]} -gt 0 ]] || die "--config is missing (or recipe=NAME run_dir=DIRECTORY)"
[[ $cluster ]] || die "--cluster is missing: write it with \`nuteprune submit --example >my-cluster.env\` and edit it"
[[ ! $config || -r $config ]] || die "cannot read $config"
[[ -r $cluster ]] || die "cannot read $cluster"
settings=(${config:+--config "$config"})
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cluster=$(realpath "$cluster")
# shellcheck source=slurm/clusters/example.env
source "$cluster"
[[ ${PYTHON:-} ]] || die "$cluster sets no PYTHON"
for name in PRUNE_GPUS FINETUNE_GPUS EVALUATE_GPUS; do
    [[ ${!name:-0} =~ ^[0-9]+$ ]] ||
        die "$name=${!name} is not a number: name the kind in ${name%GPUS}FLAGS, as in (--gpus-per-node=a100:8)"
done
[[ $dry ]] || command -v sbatch >/dev/null || die "no sbatch here: submit where SLURM is, or look at --dry-run"

# Name, state and job of each stage, and the run's directory: one line each.
state=$("$PYTHON" -m nuteprune status "${settings[@]}" --tsv "${overrides[@]}")
run_dir=$(sed -n 's/^run_dir\t//p' <<<"$state")
mapfile -t stages < <(sed -n '/^run_dir\t/d; s/\t.*//p' <<<"$state")
kinds=("${stages[@]%%-*}") # recover-0.1 is a rung of recover's
[[ -z $from || " ${stages[*]} ${kinds[*]} " == *" $from "* ]] || die "--from $from: this run has the stages ${stages[*]}"

# setting STAGE NAME DEFAULT: the cluster file's STAGE_NAME.
setting() {
    local name=${1^^}_$2
    echo "${!name:-$3}"
}

# The planner lays the run out for the fewest nodes that it may get; sets $planned (hours, GB of a node, seconds of a
# signal) and $settings.
plan() {
    local word kept=() nodes figures out=() card=(${GPU_NAME:+--gpu "$GPU_NAME"} ${GPU_MEMORY:+--gpu-memory "$GPU_MEMORY"})
    nodes=$(setting prune NODES 1)
    [[ $dry ]] || out=(--out "$run_dir/plan")
    figures=$("$PYTHON" -m nuteprune plan "${settings[@]}" --nodes "${nodes%%-*}" --gpus-per-node "$PRUNE_GPUS" \
        "${card[@]}" --json "${out[@]}" "${overrides[@]}") ||
        die "no plan for $nodes x $PRUNE_GPUS GPUs (${card[*]}): \`nuteprune plan\` shows what was tried"
    figures=$("$PYTHON" -c 'import json, sys; print(*json.load(sys.stdin)["limits"].values())' <<<"$figures")
    read -ra planned <<<"$figures"
    settings=(--config "$run_dir/plan/plan.yaml")
    for word in "${overrides[@]}"; do
        if [[ $word == evaluate.trust_remote_code=* ]]; then kept+=("$word"); fi # which no file can hold
    done
    overrides=("${kept[@]}")
}

# resources STAGE: sbatch's flags for it, in $flags. Training stages have all ranks; recover and distill have what prune has.
resources() {
    local stage=$1 gpus tasks=1 time mem signal extra own
    [[ $stage =~ ^(recover|distill)$ ]] && stage=prune
    extra="${stage^^}_FLAGS[@]"
    gpus=$(setting "$stage" GPUS 0)
    time=$(setting "$stage" TIME "")
    mem=$(setting "$stage" MEM "")
    signal=300
    own=(${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} ${!extra+"${!extra}"})
    if [[ $stage == prune && ${planned[*]} ]]; then
        time=${time:-${planned[0]}:00:00} signal=${planned[2]}
        if [[ " ${own[*]}" != *" --mem"* ]]; then mem=${mem:-${planned[1]}G}; fi
    fi
    [[ $time ]] || die "$cluster sets no ${stage^^}_TIME, and only pruning on GPUs has a figure of the planner's"
    if [[ $stage =~ ^(prune|finetune)$ && ${LAUNCHER:-srun} == srun ]] && ((gpus)); then tasks=$gpus; fi
    flags=(--nodes="$(setting "$stage" NODES 1)" --ntasks-per-node="$tasks"
        --cpus-per-task="$(setting "$stage" CPUS 1)" --time="$time" --signal="B:USR1@${SIGNAL_SECONDS:-$signal}")
    if ((gpus)); then flags+=(--gpus-per-node="$gpus"); fi
    flags+=(${mem:+--mem="$mem"} ${own[@]+"${own[@]}"})
}

# submit NAME FLAG… SCRIPT ARGUMENT…: prints the command, or runs it; the job's number is in $job.
submit() {
    local name=$1 command title
    title=$(basename "$run_dir")
    shift
    command=(sbatch --parsable --kill-on-invalid-dep=yes --job-name="${title%"-$name"}-$name"
        --output="$run_dir/logs/$name-%j.log" "$@")
    if [[ $dry ]]; then
        job=${name^^}_JOB
        printf '%q ' "${command[@]}" | sed 's/ $/\n/'
    else
        mkdir -p "$run_dir/logs"
        job=$("${command[@]}")
        job=${job%%;*} # "id;cluster" in a federation
    fi
}

[[ ! $sweep ]] || entries=$("$PYTHON" "$here/sweep.py" "$sweep" "${settings[@]}" "${overrides[@]}")

planned=()
if ((${PRUNE_GPUS:-0})); then plan; fi

if [[ $sweep ]]; then
    count=$(wc -l <<<"$entries")
    run_dir+=-sweep
    if [[ ! $dry ]]; then
        mkdir -p "$run_dir"
        echo "$entries" >"$run_dir/sweep.tsv"
    fi
    resources prune
    submit sweep "${flags[@]}" --array="0-$((count - 1))${SWEEP_AT_ONCE:+%$SWEEP_AT_ONCE}" \
        "$here/sweep.sbatch" "$cluster" "$here" "$run_dir" "${settings[@]}" "${overrides[@]}"
    [[ $dry ]] || echo "sweep: job $job, $count runs below $run_dir (nuteprune status $(printf %q "$run_dir")/NAME)"
    exit
fi

# Without --from, what stands before a stage that is done or under way is not needed any more.
first=$from
if [[ ! $from ]]; then
    first=$(awk -F'\t' '$2 ~ /^(done|pending|running)$/ { print $1 }' <<<"$state" | tail -n 1)
    first=${first:-${stages[0]}}
fi

# Stages of a kind (the rungs of recover) run side by side: each waits for those of the kind before.
waits='' group='' last='' jobs='' reached=''
for stage in "${stages[@]}"; do
    IFS=$'\t' read -r _ status job < <(grep "^$stage"$'\t' <<<"$state")
    kind=${stage%%-*}
    if [[ $kind == "${first%%-*}" ]]; then reached=1; fi
    if [[ $kind != "$last" ]]; then waits=${group:-$waits} group='' last=$kind; fi
    if [[ $status == pending || $status == running ]]; then
        [[ $dry ]] || echo "$stage: job $job is $status already"
    elif [[ $status == done && ! $from ]]; then
        [[ $dry ]] || echo "$stage: done"
        continue
    elif [[ ! $reached ]]; then
        [[ $from || $stage == prepare ]] ||
            echo "$stage: not submitted, $first behind it is done or under way (add --from $stage)" >&2
        continue
    else
        resources "$kind"
        submit "$stage" ${waits:+--dependency="afterok:$waits"} "${flags[@]}" \
            "$here/stage.sbatch" "$cluster" "$stage" "$run_dir" "${settings[@]}" "${overrides[@]}"
        if [[ ! $dry ]]; then
            printf '%s\t%s\n' "$stage" "$job" >>"$run_dir/jobs.tsv"
            echo "$stage: job $job${waits:+ after job ${waits//:/, }}"
        fi
    fi
    group+=${group:+:}$job jobs+=${jobs:+,}$job
done

printf -v python %q "$PYTHON"
printf -v run %q "$run_dir"
[[ $dry || -z $jobs ]] || cat <<END
watch:        $python -m nuteprune status $run
the queue:    squeue --jobs $jobs
logs:         $run/logs/
cancel:       scancel ${jobs//,/ }
TensorBoard, in a terminal of your own machine:
  ssh -L 6006:localhost:6006 $(id -un)@$(hostname) 'cd $(printf %q "$PWD") && $python -m tensorboard.main --port 6006 --logdir $run/tensorboard'
END
