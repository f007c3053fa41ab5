"""Gives random inputs to what reads strangers' files: each is read, or refused with `UserError`.

    python tests/campaign/fuzz.py --minutes 10 [--seed 1] [--cases 100] [--target video ...]

Each target runs in a process of its own, which is started again after a crash, a hang or too much
memory. Inputs that were not handled are kept in a folder, whose name is printed. The exit status is
then 1.
"""

import argparse
import gc
import io
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tav_jax.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = ROOT / "tests/golden/base"
HANGS = 60  # seconds for one input; none takes a tenth on an idle machine
MOST_SECONDS = 30  # of CPU time, which other processes change little
MOST_MEMORY = 1_000_000_000  # bytes that reading one small file may add
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


class Case(NamedTuple):
    """An input, the name of its file, and what reads it."""

    name: str
    content: bytes
    read: Callable[[Path], object]


def mutate(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Returns a damaged copy of a file, or parts of it joined with those of another."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 4, 16, 300, len(data) // 4])
        match rng.randrange(8):
            case 0 | 1:
                for _ in range(rng.choice([1, 3, 30])):
                    if data:
                        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 2:
                data[at : at + 4] = rng.choice(EXTREMES).to_bytes(4, rng.choice(["big", "little"]))
            case 3:
                del data[at:]
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                data[at : at + length] = rng.randbytes(length)
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[at:] = other[start:]
    return bytes(data)


# --- videos and images


def video_files() -> dict[str, bytes]:
    """Returns small valid clips of many kinds."""
    import av
    import numpy as np
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (6, 6, 8, 3), np.uint8)
    frames = frames.repeat(8, 1).repeat(8, 2)
    files = {}
    kinds = [
        *[("a.mp4", "libx264", "yuv420p"), ("b.mp4", "libx265", "yuv420p10le")],
        *[("a.mov", "prores_ks", "yuv422p10le"), ("a.mkv", "libx264", "yuv420p")],
        *[("b.mkv", "ffv1", "bgra"), ("a.webm", "libvpx-vp9", "yuva420p")],
        *[("b.webm", "libvpx", "yuv420p"), ("a.avi", "mpeg4", "yuv420p")],
        *[("b.avi", "mjpeg", "yuvj420p"), ("a.mpg", "mpeg2video", "yuv420p")],
        *[("a.ts", "libx264", "yuv420p"), ("a.flv", "flv", "yuv420p")],
        *[("a.wmv", "wmv2", "yuv420p"), ("a.h264", "libx264", "yuv420p")],
        *[("a.gif", "gif", "rgb8"), ("a.apng", "apng", "rgb24")],
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, codec, pix_fmt in kinds:
            path = Path(folder, name)
            options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
            with av.open(str(path), "w") as file:
                stream = file.add_stream(codec, rate=25, options=options)
                stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
                for number, pixels in enumerate(frames):
                    frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, 25)
                    file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
            files[name] = path.read_bytes()
    images = [Image.fromarray(one) for one in frames]
    for suffix in ("gif", "png", "webp", "jpg", "bmp"):
        file = io.BytesIO()
        several = {"save_all": True, "append_images": images[1:]}
        kind = "JPEG" if suffix == "jpg" else suffix.upper()
        images[0].save(file, kind, **several if suffix in ("gif", "png", "webp") else {})
        files[f"i.{suffix}"] = file.getvalue()
    return files


def video(rng: random.Random) -> Iterator[Case]:
    from tav_jax.video.read import read_clip

    files = video_files()
    while True:
        name = rng.choice(list(files))
        choice = {"sampling": rng.choice(["rate", "uniform"])}
        choice["sample_start_idx"] = rng.choice([0, 0, 1, 300])
        content = mutate(rng, files[name], list(files.values()))

        def read(path: Path, choice: dict[str, Any] = choice) -> object:
            return read_clip(
                path, n_sample_frames=rng.choice([1, 4]), width=32, height=32, **choice
            )

        yield Case(name, content, read)


# --- models


def model_folder(rng: random.Random, name: str, content: bytes, part: str) -> Callable[[Path], Any]:
    """Returns what loads a part of the small model in which one file has this content."""
    from tav_jax.pretrained import model

    load = {
        "unet": model.load_unet,
        "vae": model.load_vae,
        "text_encoder": model.load_text_encoder,
        "tokenizer": model.load_tokenizer,
        "scheduler": model.load_schedule,
    }[part]

    def read(path: Path) -> object:
        folder = path.parent / part
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(BASE / part, folder)
        (folder / name).write_bytes(content)
        return load(folder)

    return read


def weights(rng: random.Random) -> Iterator[Case]:
    paths = sorted(BASE.rglob("*.safetensors"))
    files = {path: path.read_bytes() for path in paths}
    while True:
        path = rng.choice(paths)
        content = files[path]
        size = 8 + int.from_bytes(content[:8], "little")
        if rng.random() < 0.7:  # most that can be wrong is in the header
            header = mutate(rng, content[:size], [other[:2000] for other in files.values()])
            if rng.random() < 0.5:  # of the length that it says
                header = max(len(header) - 8, 0).to_bytes(8, "little") + header[8:]
            content = header + content[size:]
        else:
            content = mutate(rng, content, list(files.values()))
        yield Case(path.name, content, model_folder(rng, path.name, content, path.parent.name))


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """Returns a value that JSON and YAML have."""
    kind = rng.randrange(12 if depth < 3 else 9)
    if kind == 9:
        return [any_json(rng, depth + 1) for _ in range(rng.choice([0, 1, 4, 30]))]
    if kind >= 10:
        return {any_text(rng): any_json(rng, depth + 1) for _ in range(rng.choice([0, 1, 4]))}
    return [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([0, 1, -1, 2, 8, 320, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**30)]),
        lambda: rng.randrange(10**4),
        lambda: rng.choice([0.5, 1e-30, 1e300, -1.5, float("inf"), float("nan"), 1e6]),
        lambda: rng.choice(["silu", "linear", "CrossAttnDownBlock2D", "DownBlock2D", "gelu"]),
        lambda: any_text(rng),
        lambda: any_text(rng) * rng.choice([1, 1000]),
        lambda: "",
    ][kind]()


def any_text(rng: random.Random) -> str:
    letters = [
        "a",
        "0",
        " ",
        "\n",
        "\t",
        ":",
        "#",
        "é",
        "雪",
        "\u202e",
        "\x9b",
        "\x1b",
        "🎿",
        "../",
    ]
    letters += [
        "/",
        "\\",
        "'",
        '"',
        "{",
        "[",
        "&",
        "*",
        "!",
        "%",
        ",",
        "-",
        "\u2028",
        "\ufeff",
        "\0",
    ]
    return "".join(rng.choices(letters, k=rng.choice([1, 2, 5, 20])))


def change_tree(rng: random.Random, tree: Any) -> Any:
    """Returns a copy in which a few values or keys are others."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = tree
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            deeper = isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.6
            if not deeper:
                match rng.randrange(6):
                    case 0:
                        del place[key]
                    case 1 if isinstance(place, dict):
                        place[any_text(rng)] = any_json(rng)
                    case 2 if isinstance(place[key], int):
                        place[key] *= rng.choice([0, -1, 2, 3, 1000, 10**6, 10**12])
                    case _:
                        place[key] = any_json(rng)
                break
            place = place[key]
    return tree


def model_json(rng: random.Random) -> Iterator[Case]:
    paths = [path for path in sorted(BASE.rglob("*.json")) if path.parent != BASE]
    files = {path: path.read_bytes() for path in paths}
    while True:
        path = rng.choice(paths)
        content = change_json(rng, files[path], list(files.values()))
        yield Case(path.name, content, model_folder(rng, path.name, content, path.parent.name))


def change_json(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Returns JSON with a few other values, or a damaged copy of its text."""
    if rng.random() < 0.4:
        return mutate(rng, content, others)
    changed = change_tree(rng, json.loads(content))
    return json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def clip_json(rng: random.Random) -> Iterator[Case]:
    from tav_jax.models.clip_image import CLIPModel
    from tav_jax.models.network import parameter_shapes
    from tav_jax.pretrained import clip_configs as configs
    from tav_jax.pretrained.preprocess import Preprocessing
    from tav_jax.reading import read_json

    def read_config(path: Path) -> object:
        return parameter_shapes(CLIPModel, configs.read_clip_config(read_json(path)))

    def read_preprocessing(path: Path) -> object:
        return configs.read_preprocessor_config(read_json(path))

    config = {
        "model_type": "clip",
        "projection_dim": 6,
        "text_config": {"vocab_size": 99, "hidden_size": 8, "num_attention_heads": 2},
        "vision_config": {"image_size": 12, "patch_size": 5, "hidden_act": "gelu"},
    }
    older = config | {"text_config_dict": {"eos_token_id": 2}, "vision_config_dict": None}
    preprocessing = configs.write_preprocessor_config(Preprocessing())
    trees = [(config, read_config), (older, read_config), (preprocessing, read_preprocessing)]
    texts = [json.dumps(tree).encode() for tree, _ in trees]
    while True:
        which = rng.randrange(len(trees))
        yield Case("config.json", change_json(rng, texts[which], texts), trees[which][1])


# --- texts


def structures(seed: int, count: int) -> list[Any]:
    """Returns keys and values as hypothesis finds them, of which some are settings' own."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as some

    keys = [
        "seed",
        "train_data",
        "width",
        "prompt",
        "prompts",
        "runs",
        "seeds",
        "run",
        "mesh",
        "fps",
    ]
    leaves = some.none() | some.booleans() | some.integers() | some.floats() | some.text()
    leaves |= some.dates() | some.binary(max_size=20)
    trees = some.recursive(
        leaves,
        lambda inner: (
            some.lists(inner) | some.dictionaries(some.sampled_from(keys) | some.text(), inner)
        ),
        max_leaves=20,
    )
    found: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trees)
    def collect(tree: Any) -> None:
        found.append(tree)

    collect()
    return found


def text_cases(
    rng: random.Random, files: dict[str, bytes], read: Callable[[Path, random.Random], object]
) -> Iterator[Case]:
    while True:
        for tree in structures(rng.randrange(2**32), 100):
            name = rng.choice(list(files))
            content = files[name]
            match rng.randrange(4):
                case 0:
                    content = mutate(rng, content, list(files.values()))
                case 1 if name.endswith(".yaml"):
                    changed = change_tree(rng, yaml.safe_load(content))
                    content = yaml.safe_dump(changed, allow_unicode=True).encode()
                case 2:
                    content = yaml.dump(tree, allow_unicode=rng.random() < 0.5).encode(
                        "utf-8", "surrogatepass"
                    )
                case _:
                    lines = content.decode().splitlines(keepends=True)
                    at = rng.randrange(len(lines) + 1)
                    lines[at:at] = [any_text(rng) + rng.choice(["\n", "", ": "])]
                    rng.shuffle(lines) if rng.random() < 0.3 else None
                    content = "".join(lines).encode("utf-8", "surrogatepass")
            yield Case(name, content, lambda path: read(path, rng))


def yaml_config(rng: random.Random) -> Iterator[Case]:
    from tav_jax.runs.config import load_clips, load_config
    from tav_jax.settings import parse, read_tree
    from tav_jax.worlds.experiments import Experiment

    good = ROOT / "configs/tiny-scenes.yaml"

    def read(path: Path, rng: random.Random) -> object:
        match rng.randrange(4):
            case 0:
                return load_clips(path, good)
            case 1:
                return parse(Experiment, read_tree(path), str(path))
            case 2:
                text = path.read_bytes().decode("utf-8", "surrogateescape")[:200]
                key = rng.choice(["seed=", "train_data.prompt=", "output_dir=", "mesh=", ""])
                return load_config(good, [key + text])
        return load_config(path)

    paths = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/experiments").glob("*.yaml")]
    yield from text_cases(rng, {path.name: path.read_bytes() for path in sorted(paths)}, read)


PLANS = {
    "plan.csv": b'run,prompt,seed,guidance_scale\nruns/a,"a cat, sitting",3,7.5\nruns/b,a dog,,\n',
    "plan.yaml": b"runs: [runs/a, runs/b]\nprompts:\n- a cat\n- 'a: dog'\nseeds: [1, 2]\n"
    b"guidance_scale: 7.5\nnum_inference_steps: 20\n",
}


def plan(rng: random.Random) -> Iterator[Case]:
    from tav_jax.runs.batch_plan import read_plan

    yield from text_cases(rng, PLANS, lambda path, rng: read_plan(path))


TARGETS: dict[str, Callable[[random.Random], Iterator[Case]]] = {
    "video": video,
    "weights": weights,
    "json": model_json,
    "clip": clip_json,
    "yaml": yaml_config,
    "plan": plan,
}


# --- the process that reads


def work(target: str, seed: int, cases: int, seconds: float, folder: Path) -> None:
    """Reads inputs; prints a line before each, and one for each that is not handled."""
    warnings.simplefilter("ignore")
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, too
    rng = random.Random(f"{target} {seed}")
    end = time.monotonic() + seconds
    for number, case in enumerate(TARGETS[target](rng)):
        if number == cases or time.monotonic() > end:
            break
        place = folder / str(number)
        place.mkdir()
        path = place / case.name
        path.write_bytes(case.content)
        print(json.dumps({"case": f"{number}/{case.name}"}), file=told, flush=True)
        forget_peak()
        start, before = time.process_time(), memory("VmRSS")
        result = "read"
        try:
            case.read(path)
        except UserError as error:
            result = "refused"
            if not str(error).strip():
                result = "a refusal without a message"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            result = (
                f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
            )
        seconds, added = time.process_time() - start, memory("VmHWM") - before
        if added > MOST_MEMORY:
            result = f"{added / 1e9:.1f} GB"
        elif seconds > MOST_SECONDS and result in ("read", "refused"):
            result = f"{result} after {seconds:.0f} s of CPU time"
        line = json.dumps({"result": result[:300], "s": seconds, "bytes": added})
        print(line, file=told, flush=True)
        if result in ("read", "refused"):  # the others are kept
            shutil.rmtree(place)
        gc.collect(0)


def forget_peak() -> None:
    """Makes `VmHWM` the largest memory from now on; otherwise one large input hides others."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Returns a line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if name in line)


# --- the process that watches


def fuzz(
    target: str, seed: int, cases: int, seconds: float, kept: Path
) -> tuple[Counter, float, int]:
    """Returns how often inputs were read, refused or not handled, the most seconds and bytes."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    slowest, largest = 0.0, 0
    while (done := counts.total()) < cases and (left := end - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--work", folder, "--target", target]
            command += ["--seed", str(seed + done), "--cases", str(cases - done)]
            process = subprocess.Popen(
                [*command, "--minutes", str(left / 60)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # `select` does not see what is in a buffer
            )
            assert process.stdout is not None
            name, result = "", ""
            while True:
                if not select.select([process.stdout], [], [], HANGS)[0]:
                    result = f"no end after {HANGS} s"
                    process.kill()
                    break
                line = process.stdout.readline()
                if not line:
                    break
                told = json.loads(line)
                name = told.get("case", name)
                if result := told.get("result", ""):
                    counts[result] += 1
                    slowest, largest = max(slowest, told["s"]), max(largest, told["bytes"])
                    if result not in ("read", "refused"):
                        keep(Path(folder), name, kept / f"{target}-{seed}-{counts.total()}")
                    name = ""
            process.wait(timeout=600)
            process.stdout.close()
            if name or (process.returncode and not result):
                counts[result or f"{name}: ended with status {process.returncode}"] += 1
                keep(Path(folder), name, kept / f"{target}-{seed}-{counts.total()}")
            if process.returncode == 0:
                break
    return counts, slowest, largest


def keep(folder: Path, name: str, to: Path) -> None:
    """Keeps an input that was not handled."""
    if name and (folder / name).exists():
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, to)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1, help="for each target")
    parser.add_argument("--cases", type=int, default=10**9, help="at most, for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    seconds = options.minutes * 60
    if options.work:
        work(options.target[0], options.seed, options.cases, seconds, options.work)
        return 0
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    wrong = 0
    for target in options.target:
        counts, slowest, largest = fuzz(target, options.seed, options.cases, seconds, kept)
        findings = Counter(counts)
        read, refused = findings.pop("read", 0), findings.pop("refused", 0)
        print(
            f"{target}: {counts.total()} cases, {read} read, {refused} refused, "
            f"{findings.total()} not handled, at most {slowest:.1f} s of CPU "
            f"time and {largest / 1e9:.2f} GB",
            flush=True,
        )
        for finding, count in findings.most_common():
            print(f"  {count} x {finding}", flush=True)
        wrong += findings.total() + (not counts)
    if wrong:
        print(f"the inputs are in {kept}")
    else:
        shutil.rmtree(kept)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
