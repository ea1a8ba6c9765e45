#!/usr/bin/env bash
# Makes the policy of the folder ur5_tasks: demonstrations, dataset, training, success. Run it again to continue.
#   checkpoints/train_ur5_tasks.sh WORK_FOLDER
# EPISODES, STEPS and STARTS make it smaller, for a try.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: train_ur5_tasks.sh WORK_FOLDER}
episodes=${EPISODES:-700} steps=${STEPS:-40000} starts=${STARTS:-100}
tasks=(pick_and_lift put_into_bin push_to_zone)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$work/demonstrations"

# Two thirds of the demonstrations are pushed off their way, so that the policy sees how to recover.
record() { # task, seed, metres, episodes
    local folder=$work/demonstrations/$1_$3
    [ -f "$folder/episodes.csv" ] || clp record --task "$1" --robot ur5 --episodes "$4" --seed "$2" --size 96x96 \
        --speed 2 --perturb "$3" --output "$folder" --overwrite
}
seed=20
for task in "${tasks[@]}"; do
    record "$task" $((seed++)) 0.03 $((episodes * 2 / 3))
    record "$task" $((seed++)) 0 $((episodes - episodes * 2 / 3))
done

clp convert --bag "$work"/demonstrations/* --embodiment "$work/demonstrations/pick_and_lift_0/embodiment.yaml" \
    --output "$work/dataset"

[ -f "$work/untrained/config.json" ] ||
    clp make-checkpoint --family smolvla --size small --embodiment ur5 --output "$work/untrained" --overwrite
clp finetune --checkpoint "$work/untrained" --dataset "$work/dataset" --output "$work/float32" --resume \
    --train all --steps "$steps" --batch-size 16 --learning-rate 1e-3 --held-out 0.02 -- \
    --policy.optimizer_grad_clip_norm=1 --policy.scheduler_warmup_steps=500 \
    --policy.scheduler_decay_steps="$steps" --policy.scheduler_decay_lr=2e-5
[ -f "$work/ur5_tasks/config.json" ] || python "$here/to_bfloat16.py" "$work/float32" "$work/ur5_tasks"

for executed in 10 25 50; do
    clp evaluate "$work/ur5_tasks" --embodiment ur5 --task "${tasks[@]}" --episodes "$starts" --seed 100000 \
        --replan-steps "$executed" --output "$work/success_$executed"
done
