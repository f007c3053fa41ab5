"""Write what `launch/gpu_figures.sh` has measured as one Markdown file.

    python launch/figures_to_markdown.py outputs/gpu-figures

The folder has a file `steps.tsv`, a line for each command, and what each command printed. A part
that is not there, or cannot be read, is left out of the tables.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TYPES = {"no": "float32", "bf16": "bfloat16"}
LAST_LINES = 12  # of the output of what has failed


class Step(NamedTuple):
    """One command.

    Args:
        name: Also of the files with its output.
        status: Its exit status, or "skipped".
        took: Seconds.
        limit: Seconds that it was allowed.
        command: As one would type it.
    """

    name: str
    status: str
    took: int
    limit: int
    command: str

    @property
    def result(self) -> str:
        """Return the status in words."""
        match self.status:
            case "0":
                return "done"
            case "124" | "137":
                return f"**not done in {self.limit} s**"
            case "skipped":
                return "**not started, no time left**"
        return f"**failed, status {self.status}**"


def describe_machine() -> dict[str, str]:
    """Return the card, the versions of libraries, and the commit.

    Raises:
        SystemExit: A GPU is wanted, and JAX finds none.
    """
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu" and os.environ.get("SIZE") != "small":
        raise SystemExit(f"JAX runs on a {device.platform}; for a CPU there is --small")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.split(r"[<>=\[ ]", dependency)[0] for dependency in dependencies]
    missing = [name for name in names if not version_of(name)]
    shown = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers")
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "driver": nvidia_smi("name,driver_version,memory.total,clocks.max.sm,power.limit"),
        "CPU cores": str(len(os.sched_getaffinity(0))),
        "Python": sys.version.split()[0],
        **{name: version_of(name) or "-" for name in shown},
        "missing packages": ", ".join(missing) or "none",
        "size": os.environ.get("SIZE", "full"),
        "commit": os.environ.get("COMMIT", "unknown"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi(query: str) -> str:
    """Return what nvidia-smi knows of the first GPU; "-" without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "-"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] or "-"


def read_steps(folder: Path) -> list[Step]:
    """Return the steps in their order; of those that ran twice, the last."""
    steps = {}
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, status, took, limit, command = line.split("\t")
        steps.pop(name, None)
        steps[name] = Step(name, status, int(took), int(limit), command.strip())
    return list(steps.values())


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file; None if it is not there or not complete."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def read_text(path: Path) -> str:
    """Return the contents of a file; nothing if it is not there."""
    return path.read_text(errors="replace") if path.is_file() else ""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def code(text: str) -> str:
    """Return text as a block of code."""
    return f"```\n{text.strip()}\n```"


def bench_section(folder: Path) -> str:
    """Return a table of all programs, sizes and presets, cold beside warm."""
    found: dict[tuple[int, str, str], dict[str, dict[str, str]]] = {}
    memory = []
    row: dict[str, Any] = {}
    for path in sorted(folder.glob("bench-*.out")):
        temperature = path.stem.rsplit("-", 1)[1]
        settings = read_json(path) or []
        for row in settings if isinstance(settings, list) else [settings]:
            preset = row.get("gradient_checkpointing", "-")
            for program in row["compile_s_each"]:
                key = row["frames"], program, preset if program == "tune_step" else "-"
                found.setdefault(key, {})[temperature] = program_metrics(row, program)
            memory.append([path.stem, preset, gb(row["peak_bytes"])])
    if not row:
        return ""
    lines = []
    for key, by_temperature in sorted(found.items(), key=lambda item: item[0][0]):
        cold, warm = by_temperature.get("cold", {}), by_temperature.get("warm", {})
        both = [each.get(name, "-") for name in ("ms", "compile s") for each in (cold, warm)]
        one = warm or cold
        lines.append([*key, *both, *(one[name] for name in ONE_COLUMNS)])
    head = ["frames", "program", "preset", "ms, cold", "ms, warm", "compile s, cold"]
    head += ["compile s, warm", *ONE_COLUMNS]
    attention = ", ".join(f"{grid} {name}" for grid, name in row["attention"].items())
    return f"""{row["network"]}'s shapes, {TYPES[row["precision"]]}, {row["width"]} pixels.
Attention between frames, by grid of latents: {attention}.

- Cold: in a new process with an empty compile cache. Warm: the same command again.
- TFLOP/s and `of matmul` are those of the warm run, or of the cold one if there is no other.
- `of matmul` is the ratio to a large matrix product: {row["matmul_tflops"]:.4g} TFLOP/s.
- `planned GB` is the compiler's plan for one program.

{table(head, lines)}

Most memory that a process had used by the end of each preset, as the GPU counts it; on a CPU all
that the process uses:

{table(["command", "preset", "GB"], memory)}"""


ONE_COLUMNS = "TFLOP", "TFLOP/s", "of matmul", "planned GB"


def program_metrics(row: dict[str, Any], program: str) -> dict[str, str]:
    """Return a program's metrics of a row of `bench`, by column."""
    rate = row[f"{program}_tflops"]
    return {
        "ms": f"{row[f'{program}_ms']:.1f}",
        "compile s": f"{row['compile_s_each'][program]:.1f}",
        "TFLOP": f"{row[f'{program}_tflop']:.4g}",
        "TFLOP/s": f"{rate:.4g}",
        "of matmul": f"{rate / row['matmul_tflops']:.0%}",
        "planned GB": gb(row[f"{program}_planned_bytes"]),
    }


def gb(size: int) -> str:
    """Return bytes in GB."""
    return f"{size / 1e9:.2f}"


STEP_OF_SPEED = re.compile(
    r"^(?P<step>[a-z ]+): ours (?P<ours>[\d.]+) ms, PyTorch (?P<theirs>[\d.]+) ms "
    r"\((?P<fastest>.+?); tried (?P<tried>.+)\), ratio (?P<ratio>[\d.]+) \((?P<range>[^)]+)\)",
    re.MULTILINE,
)


def speed_section(folder: Path) -> str:
    """Return the ratios to PyTorch, and what both sides said of themselves."""
    rows, rest = [], ""
    for name in ("speed", "speed-compiled"):
        text = read_text(folder / f"{name}.out")
        for found in STEP_OF_SPEED.finditer(text):
            times = float(found["theirs"]) / float(found["ours"])
            ratio = f"{found['ratio']} ({found['range']})"
            rows.append(
                [name, found["step"], found["ours"], found["theirs"], ratio, f"{times:.2f}"]
            )
            rows[-1] += [found["fastest"], found["tried"]]
        if others := [line for line in text.splitlines() if not STEP_OF_SPEED.match(line)]:
            rest += f"\nWhat else `{name}` printed:\n\n{code(chr(10).join(others))}\n"
    if memory := read_text(folder / "speed-memory.out"):
        rest += f"\nPeak memory, each in a fresh process:\n\n{code(memory)}\n"
    if not rows:
        return rest
    head = ["command", "step", "ours, ms", "PyTorch, ms", "ours / PyTorch", "times as fast"]
    head += ["PyTorch's fastest variant", "ms of all variants"]
    return f"""Medians of runs in turns, in one process and on the same weights. PyTorch's time is
that of its fastest variant.

{table(head, rows)}
{rest}"""


def run_section(folder: Path) -> str:
    """Return the time of each stage of the run, and of a step."""
    lines = [json.loads(line) for line in read_text(folder / "run.jsonl").splitlines()]
    if not lines:
        return ""
    steps = [line for line in lines if "stage" not in line]
    stages: dict[str, float] = {}
    for line in lines:
        if "stage" in line:
            stages[line["stage"]] = stages.get(line["stage"], 0.0) + line["seconds"]
    settled = sorted(line["seconds"] for line in steps[len(steps) // 2 :])
    text = "The stages, as `metrics.jsonl` has them. Invert, sample and decode include compiling.\n"
    text += "The compile cache had what earlier parts of the same call had put there.\n\n"
    text += table(["stage", "s"], [[name, f"{s:.2f}"] for name, s in stages.items()])
    text += f"\n\n- {len(steps)} steps; all stages together {sum(stages.values()):.1f} s."
    if settled:
        median = 1000 * settled[len(settled) // 2]
        first, last = steps[0]["loss"], steps[-1]["loss"]
        text += f"\n- A step of the second half takes {median:.1f} ms (median)."
        text += f"\n- Loss {first:.4f} at step {steps[0]['step']}, {last:.4f} at step "
        text += f"{steps[-1]['step']}; with random weights it need not fall."
    return text


def profile_section(folder: Path) -> str:
    """Return the operations that take longest in each step."""
    row = read_json(folder / "profile.out")
    if row is None:
        return ""
    text = "Kernels on a GPU; on a CPU XLA's operations, of which threads run several at a time.\n"
    text += "Those of one name are summed. `share` is of the time of all operations.\n"
    for program in row["compile_s_each"]:
        profile = row[f"{program}_profile"]
        busy, took = profile["busy_ms"], profile["ms"]
        kinds = ", ".join(
            f"{kind.replace('_', ' ')} {ms:.2f} ms ({ms / busy:.0%})"
            for kind, ms in profile["ms_by_kind"].items()
        )
        text += f"\n### {program}\n\n"
        text += f"- {row[f'{program}_ms']:.1f} ms; while it was traced {took:.1f} ms.\n"
        text += f"- All operations together: {busy:.2f} ms. By kind, as far as names tell: {kinds}."
        rows = [
            [
                f"`{x['name'][:90]}`",
                x["kind"],
                f"{x['runs']:g}",
                f"{x['ms']:.3f}",
                f"{x['share']:.1%}",
            ]
            for x in profile["largest"]
        ]
        text += "\n\n" + table(["operation", "kind", "runs in a step", "ms", "share"], rows) + "\n"
    return text


CASE = re.compile(
    r"^(?P<name>\S+) +(?:\S+ +){2}(?P<measured>\S+) +(?P<allowed>\S+) +\S+ +(?P<result>ok|OVER)$"
)


def golden_section(folder: Path, steps: Sequence[Step]) -> str:
    """Return a row for each implementation of attention: passed, and the largest error."""
    rows = []
    for step in steps:
        if not step.name.startswith("golden-") or step.status == "skipped":
            continue
        text = read_text(folder / f"{step.name}.out")
        cases = [found for found in map(CASE.match, text.splitlines()) if found]
        over = [found["name"] for found in cases if found["result"] == "OVER"]
        complete = "all within tolerance" in text or f"{len(over)} over" in text
        nearest = max(cases, key=part_of_limit, default=None)
        rows.append(
            [
                step.name.removeprefix("golden-"),
                f"{len(cases) - len(over)} of {len(cases)}",
                "yes" if complete else "no",
                f"{nearest['measured']} of {nearest['allowed']}" if nearest else "-",
                nearest["name"] if nearest else "-",
                ", ".join(over) or "-",
            ]
        )
    if not rows:
        return ""
    head = ["attention", "passed", "all were run", "error nearest to its limit", "in", "over"]
    return f"""Published numbers by `tests/golden.py`, with each implementation of attention.

- In float32, and matrix products are float32 too, not TensorFloat-32.
- cuDNN's attention has no float32. So on a GPU `auto` here uses `einsum` or `chunked`, and cuDNN's
  (`fused`) is tested in bfloat16, which has wider limits, beside `einsum` in bfloat16. Layers with
  heads that cuDNN does not support use another implementation.

{table(head, rows)}"""


def part_of_limit(comparison: re.Match[str]) -> float:
    """Return the error of a comparison as a part of its limit; 0 if it must be exact."""
    allowed = float(comparison["allowed"])
    return float(comparison["measured"]) / allowed if allowed else 0.0


def failures_section(folder: Path, steps: Sequence[Step]) -> str:
    """Return the last lines of what every failed step printed."""
    text = ""
    for step in steps:
        if step.status in ("0", "skipped"):
            continue
        printed = [
            line
            for kind in ("out", "err")
            for line in read_text(folder / f"{step.name}.{kind}").splitlines()[-LAST_LINES:]
        ]
        text += f"### {step.name}\n\n{step.result}\n\n{code(chr(10).join(printed))}\n\n"
    return text.strip()


def markdown(folder: Path) -> str:
    """Return the whole page."""
    steps = read_steps(folder)
    machine = read_json(folder / "machine.out") or {}
    overview = [[step.name, step.result, step.took] for step in steps]
    commands = "\n".join(f"{step.name}: {step.command}" for step in steps)
    sections = {
        "Machine": lambda: table(["", ""], machine.items()),
        "What was run": lambda: table(["command", "result", "s"], overview),
        "Benchmark": lambda: bench_section(folder),
        "Against PyTorch": lambda: speed_section(folder),
        "A run": lambda: run_section(folder),
        "Where the time goes": lambda: profile_section(folder),
        "Reference cases": lambda: golden_section(folder, steps),
        "What failed": lambda: failures_section(folder, steps),
        "The commands in full": lambda: code(commands),
    }
    page = f"# Measurements on {machine.get('device', 'an unknown device')}\n"
    for title, write in sections.items():
        try:
            text = write()
        except Exception as error:  # one part's output, half written, must not cost the others
            text = f"Cannot be read: {error!r}"
        page += f"\n## {title}\n\n{text.strip()}\n" if text else ""
    return page


def main() -> None:
    """Write `figures.md`, or print what the machine is."""
    parser = argparse.ArgumentParser(
        description="Write what launch/gpu_figures.sh has measured as one Markdown file.",
        epilog="example: python launch/figures_to_markdown.py outputs/gpu-figures",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "outputs/gpu-figures")
    parser.add_argument("--machine", action="store_true", help="print what the machine is")
    args = parser.parse_args()
    if args.machine:
        print(json.dumps(describe_machine(), indent=2))
        return
    path = args.folder / "figures.md"
    unfinished = path.with_suffix(".md.tmp")
    unfinished.write_text(markdown(args.folder))
    unfinished.replace(path)


if __name__ == "__main__":
    main()
