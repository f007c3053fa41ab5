#!/usr/bin/env bash
# Measure everything about one GPU, and write it down as DIR/figures.md: speed, speed of PyTorch
# beside it, a run, where the time goes, reference cases. Needs no network and installs nothing.
#   bash launch/gpu_figures.sh [DIR]                     by default outputs/gpu-figures; 9 minutes
#   bash launch/gpu_figures.sh --small [DIR]             all but `compiled`, small enough for a CPU
#   PARTS=speed,golden bash launch/gpu_figures.sh [DIR]  only these; DIR keeps earlier results
# The parts in their order: bench speed run profile golden presets more_frames compiled memory. Each
# command has a limit of time, and all together have LIMIT seconds (530). What fails or does not end
# in time is named in figures.md, and the rest goes on. Never run on a GPU; nine minutes are hardly
# enough for all parts, so name the last ones in a second call.
# PYTHON names the interpreter (python3). WHEELS is a folder of wheels of packages that it lacks;
# they are unpacked into a temporary folder. COMMIT names the commit where there is no git.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

small=false
if [[ "${1-}" == --small ]]; then
    small=true
    shift
fi
directory=${1:-outputs/gpu-figures}
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$directory"

export PYTHONPATH="$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Empty at first, so that the first command of each size compiles everything.
export JAX_COMPILATION_CACHE_DIR="$scratch/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}

if $small; then
    # Compiling is most of the time, and what the small form measures means nothing.
    export SIZE=small JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=true
    parts=bench,speed,run,profile,golden,presets,more_frames,memory
    frames=2 more_frames=3 programs=encode,decode presets=blocks slower=4
    bench=("$python" -m tav_jax.bench --json --network small --size 64 --precision no --repeats 2)
    speed=("$python" tests/parity/speed.py --network small --frames 2 --size 8 --device cpu
        --attention sdpa)
    pairs=2
    run=(--config configs/tiny-scenes.yaml max_train_steps=20 validation_data.num_inference_steps=4
        validation_data.num_inv_steps=4)
    golden=("$python" tests/golden.py tests/golden --cases "schedule,vae")
    implementations=(auto chunked)
else
    export SIZE=full
    parts=bench,speed,run,profile,golden,presets,more_frames,compiled,memory
    frames=8 more_frames=24 presets=blocks,full slower=1
    programs=tune_step,guided_step,inversion_step,encode,decode
    bench=("$python" -m tav_jax.bench --json --network v1-4 --size 512 --precision bf16
        --repeats 10)
    speed=("$python" tests/parity/speed.py --network v1-4 --frames 8 --size 64 --precision bf16
        --device cuda --attention sdpa)
    pairs=20
    run=(--config configs/man-skiing-8-frames.yaml validation_steps=300
        "pretrained_model_path=$scratch/model"
        train_data.video_path=configs/clips/red-circle-moving-right.mp4
        train_data.sampling=uniform)
    golden=("$python" tests/golden.py tests/golden)
    implementations=(auto einsum by_head chunked)
fi

markdown() {
    "$python" launch/figures_to_markdown.py "$directory"
}

# step NAME SECONDS COMMAND...: run a command within a limit of time; what it prints is kept.
step() {
    local name=$1 seconds=$(($2 * slower)) started=$SECONDS status took
    shift 2
    if ((seconds > limit - SECONDS)); then
        seconds=$((limit - SECONDS))
    fi
    if ((seconds < 5)); then
        status=skipped
        : >"$directory/$name.out"
        : >"$directory/$name.err"
    else
        # In the background, since a trap waits for what runs in the foreground.
        timeout --kill-after=5 "$seconds" "$@" >"$directory/$name.out" 2>"$directory/$name.err" &
        wait $!
        status=$?
    fi
    took=$((SECONDS - started))
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$took" "$seconds" "$(printf '%q ' "$@")" \
        >>"$directory/steps.tsv"
    echo "$(date +%T) $name: status $status, $took s"
    if [[ $status != 0 && $status != skipped ]]; then
        tail -n 3 "$directory/$name.err"
    fi
    [[ $status == 0 ]]
}

# twice NAME SECONDS ARGUMENTS...: the same benchmark with an empty compile cache, and again.
twice() {
    local name=$1 seconds=$2
    shift 2
    step "bench-$name-cold" "$seconds" "${bench[@]}" "$@"
    step "bench-$name-warm" "$seconds" "${bench[@]}" "$@"
}

part_bench() {
    twice "$frames" 200 --frames "$frames" --programs "$programs" --gradient-checkpointing none
}

# Only the tuning step depends on the preset.
part_presets() {
    twice "$frames-presets" 150 --frames "$frames" --programs tune_step \
        --gradient-checkpointing "$presets"
}

part_more_frames() {
    twice "$more_frames" 200 --frames "$more_frames" --programs "$programs" \
        --gradient-checkpointing none
    twice "$more_frames-presets" 150 --frames "$more_frames" --programs tune_step \
        --gradient-checkpointing "$presets"
}

part_speed() { step speed 260 "${speed[@]}" --channels-last --pairs "$pairs"; }

part_compiled() {
    step speed-compiled 400 "${speed[@]}" --channels-last --compile --pairs "$pairs"
}

part_memory() { step speed-memory 300 "${speed[@]}" --gradient-checkpointing blocks --memory; }

part_run() {
    rm -rf "$scratch/run"
    $small || step run-model 100 "$python" tests/full_size.py "$scratch/model"
    step run 240 "$python" -m tav_jax.tune "${run[@]}" "output_dir=$scratch/run"
    cp "$scratch/run/metrics.jsonl" "$directory/run.jsonl" 2>/dev/null
}

part_profile() {
    step profile 120 "${bench[@]}" --frames "$frames" --programs tune_step,guided_step \
        --gradient-checkpointing none --profile "$scratch/profile"
}

part_golden() {
    # float32 must be float32: by default, GPUs multiply in TensorFloat-32
    local name command=(env JAX_DEFAULT_MATMUL_PRECISION=highest
        XLA_PYTHON_CLIENT_PREALLOCATE=false "${golden[@]}")
    for name in "${implementations[@]}"; do
        step "golden-$name" 180 "${command[@]}" --attention "$name" &
        $small && wait
    done
    if ! $small; then # cuDNN's attention is for bfloat16
        for name in fused einsum; do
            step "golden-$name-bf16" 180 "${command[@]}" --attention "$name" --precision bf16 &
        done
    fi
    wait
}

parts=${PARTS:-$parts}
limit=${LIMIT:-$((530 * slower))}
if [[ -n "${WHEELS-}" ]]; then
    step wheels 60 "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" \
        --target "$scratch/site" "$WHEELS"/*.whl
fi
if ! step machine 60 "$python" launch/figures_to_markdown.py --machine; then
    echo "JAX cannot run, or finds no GPU: see $directory/machine.err" >&2
    exit 1
fi
for part in ${parts//,/ }; do
    echo "$(date +%T) part $part"
    "part_$part"
    markdown
done
echo "wrote $directory/figures.md"
