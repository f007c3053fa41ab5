#!/usr/bin/env bash
# Tune on a Cloud TPU slice of one host or several, and sample the config's prompts. Run it on a
# machine with gcloud: it copies the project to every host, sets it up and runs one command on all.
#   TPU_NAME=my-tpu ZONE=europe-west4-b bash launch/tpu_slice.sh configs/man-skiing.yaml [key=...]
# Create the slice before:
#   gcloud compute tpus tpu-vm create my-tpu --zone=europe-west4-b \
#       --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite
# Its hosts share a disk (Filestore, or a bucket by gcsfuse), where video_path and output_dir are,
# both absolute paths: process 0 writes a checkpoint and all read it. As many frames as the chips
# divide. When the slice is preempted, its hosts save a checkpoint. The script waits until you or a
# queued resource have created it again, and goes on. Not timed: no slice was at hand; the step has
# been compiled for v5e only.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU_NAME:?is not set: the name of the slice}" "${ZONE:?is not set: where the slice is}"

archive="$(mktemp --suffix=.tar.gz)"
trap 'rm -f "$archive"' EXIT
printf -v arguments '%q ' "$@"

on_all() {
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

is_ready() {
    local state
    state="$(gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$ZONE" --format='value(state)')"
    [[ $state == READY ]]
}

tar --create --gzip --file "$archive" --exclude '__pycache__' \
    pyproject.toml README.md tav_jax configs
# Status 143: the hosts were asked to stop. If the slice is gone ssh says something else.
while true; do
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:tav_jax.tar.gz" --zone="$ZONE" --worker=all
    status=0
    # uv brings a Python of its own: the hosts' may be older than 3.11.
    on_all "
        set -e
        mkdir -p tav_jax && tar -xzf tav_jax.tar.gz -C tav_jax && cd tav_jax
        command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
        ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
        ~/.local/bin/uv pip install --quiet --editable '.[tpu]'
        # All-to-all overlaps with computation. By default, computation waits for it.
        export LIBTPU_INIT_ARGS=--xla_tpu_enable_async_all_to_all=true
        exec .venv/bin/python -m tav_jax.tune --config $arguments" || status=$?
    if [[ $status == 0 ]] || { [[ $status != 143 ]] && is_ready; }; then
        exit "$status"
    fi
    until is_ready; do sleep 60; done
done
