"""Adapters: what a run has trained, in one `.safetensors` file, to be used with the base model.

The header has the run's settings, the digests of its clip and of its base model, and what the
model specification of Stability AI (ModelSpec 1.0.1) asks for. The file may have the inverted clip,
too; then the clip is not needed for editing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import tav_jax
from tav_jax.digests import sha256
from tav_jax.errors import MissingFileError, UserError
from tav_jax.files import atomic_write
from tav_jax.pretrained.weights import is_finite, read_safetensors, to_parameter, to_tensor
from tav_jax.reading import parse_json, read_json, why_not_a_file
from tav_jax.runs.config import TuneConfig, config_tree, dump_config, parse_config
from tav_jax.runs.inputs import Inputs, write_inputs
from tav_jax.runs.inversions import read_inversion, write_inversion
from tav_jax.runs.lock import is_empty, lock_run
from tav_jax.runs.run import Run
from tav_jax.settings import parse
from tav_jax.text import shorten
from tav_jax.training.checkpoints import remove_unfinished, save_items
from tav_jax.types import Params

INVERTED = "inverted_clip"
FORMAT = "1"
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
NAME_ON_HUB = "adapter.safetensors"
SOURCE = "adapter.json"  # in the folder of a run that was made from an adapter


class Adapter(NamedTuple):
    """What an adapter's file holds.

    Args:
        config: The run's settings.
        step: The checkpoint that it was made from.
        inputs: Digests of the run's clip and base model, if the run had them.
        trained: The trained parameters.
        inverted: The clip inverted under them, if it is there.
    """

    config: TuneConfig
    step: int
    inputs: Inputs | None
    trained: Params
    inverted: np.ndarray | None


def write_adapter(
    run: Run, path: Path, *, step: int | None = None, dtype: str = "float32", latents: bool = True
) -> int:
    """Write what a run has trained to one file, and return the number of parameters.

    Args:
        run: The run. Its base model is loaded, and compared with what it has recorded.
        path: The file.
        step: The checkpoint, by default the newest.
        dtype: A key of `DTYPES`. float32 gives the same samples as the run, bit for bit.
        latents: Add the inverted clip, if the run has one of this checkpoint.

    Raises:
        UserError: There is no such checkpoint, or the file cannot be written.
    """
    step = run.find_step(step)
    trained = run.trained_parameters(step)
    file = run.inverted_file(step)
    inverted = read_inversion(file)[0] if latents and file.exists() else None
    adapter = Adapter(portable(run.config), step, run.recorded, trained, inverted)
    return save_adapter(adapter, path, dtype=dtype)


def save_adapter(adapter: Adapter, path: Path, *, dtype: str = "float32") -> int:
    """Write an adapter's file, and return the number of trained parameters.

    Args:
        adapter: What the file is to hold.
        path: The file.
        dtype: A key of `DTYPES`, of the trained parameters.

    Raises:
        UserError: The file cannot be written.
    """
    config, inputs = adapter.config, adapter.inputs
    named = (to_tensor(name, np.asarray(value)) for name, value in adapter.trained.items())
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in named}
    if adapter.inverted is not None:
        tensors[INVERTED] = adapter.inverted
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    spec = "modelspec."
    metadata = {
        "format": "pt",
        f"{spec}sai_model_spec": "1.0.1",
        f"{spec}architecture": "stable-diffusion-v1/tune-a-video",
        f"{spec}implementation": "tav_jax",
        f"{spec}title": shorten(config.train_data.prompt, 100) or "Tune-A-Video",
        f"{spec}description": f"Tuned on one clip with the caption: {config.train_data.prompt}",
        f"{spec}date": date.today().isoformat(),
        f"{spec}hash_sha256": f"0x{digest.hexdigest()}",
        f"{spec}resolution": f"{config.train_data.width}x{config.train_data.height}",
        "tav.format": FORMAT,
        "tav.version": tav_jax.__version__,
        "tav.step": str(adapter.step),
        "tav.caption": config.train_data.prompt,
        "tav.frames": str(config.train_data.n_sample_frames),
        "tav.base_model": config.pretrained_model_path,
        "tav.config": json.dumps(config_tree(config), ensure_ascii=False),
    }
    if inputs is not None:
        metadata["tav.inputs"] = json.dumps(inputs.to_tree())
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)  # safetensors lets only the owner read it
    return sum(value.size for value in adapter.trained.values())


def portable(config: TuneConfig) -> TuneConfig:
    """Return settings without the paths of this machine."""

    def name(path: str) -> str:
        return Path(path).name if Path(path).is_absolute() else path

    return replace(
        config,
        output_dir="-",
        pretrained_model_path=name(config.pretrained_model_path),
        train_data=replace(config.train_data, video_path=name(config.train_data.video_path)),
        resume_from_checkpoint=None,
        loras=tuple(replace(lora, path=name(lora.path)) for lora in config.loras),
        embeddings=tuple(map(name, config.embeddings)),
        log=(),
    )


def read_adapter(path: Path) -> Adapter:
    """Return what a file that `write_adapter` has written holds.

    Raises:
        UserError: It is another file, is damaged, or is of a later version.
    """
    tensors, metadata = read_safetensors(path)
    if "tav.format" not in metadata:
        raise UserError(
            f"{path}: not an adapter of tav_jax; `python -m tav_jax.convert RUN --to adapter FILE` "
            "writes one"
        )
    if metadata["tav.format"] != FORMAT:
        raise UserError(f"{path}: an adapter of a later version of tav_jax; install that")
    step = metadata.get("tav.step", "")
    if not (step.isascii() and step.isdecimal() and len(step) < 9):
        raise UserError(f"{path}: damaged: tav.step is no number of steps")
    config = parse_config(_json(metadata, "tav.config", path), f"{path}: tav.config")
    inputs = None
    if "tav.inputs" in metadata:
        inputs = parse(Inputs, _json(metadata, "tav.inputs", path), f"{path}: tav.inputs")
    for kind in ("loras", "embeddings"):
        digests = () if inputs is None else getattr(inputs, kind)
        if len(digests) != len(getattr(config, kind)):
            raise UserError(f"{path}: damaged: it does not have the digests of its {kind}")
    inverted = tensors.pop(INVERTED, None)
    if wrong := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise UserError(f"{path}: {shorten(', '.join(wrong))}: not all values are finite")
    parameters = (to_parameter(name, tensor) for name, tensor in tensors.items())
    trained = {name: jnp.asarray(np.asarray(x, np.float32)) for name, x in parameters}
    return Adapter(config, int(step), inputs, trained, inverted)


def _json(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    if key not in metadata:
        raise UserError(f"{path}: damaged: it has no {key}")
    return parse_json(metadata[key], f"{path}: {key}")


def find_adapter(name: str) -> Path:
    """Return the file of a path, or of a Hub id, downloaded once.

    Raises:
        MissingFileError: There is no such file or repository.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / NAME_ON_HUB
    if why_not_a_file(path) is None:
        return path
    if path.suffix or path.is_absolute() or name.count("/") != 1:
        raise MissingFileError(f"--adapter: {path}: no such file")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, NAME_ON_HUB))
    except Exception as error:  # no network, no such repository; each version says it otherwise
        why = shorten(str(error).strip().split("\n")[0], 200)
        raise MissingFileError(
            f"--adapter: no file {name}, nor such a model on the Hub: {why}"
        ) from None


def unpack_adapter(path: Path, folder: Path) -> Run:
    """Return the run of an adapter, in whose folder everything works but going on with tuning.

    Args:
        path: The adapter's file.
        folder: The run's folder, which is made unless it is there.

    Raises:
        UserError: The folder holds something else, or the adapter cannot be read.
    """
    source = folder / SOURCE
    record = {"sha256": sha256(path)}
    is_ours = why_not_a_file(source) is None and read_json(source) == record
    if folder.exists() and not is_ours and not (folder.is_dir() and is_empty(folder)):
        raise UserError(
            f"--run: {folder} holds something else than this adapter's videos; name another folder"
        )
    with lock_run(folder):
        if not (folder / "config.yaml").is_file():
            _unpack(read_adapter(path), folder, source, record)
    return Run.open(folder)


def _unpack(adapter: Adapter, folder: Path, source: Path, record: dict[str, str]) -> None:
    """Write the run. Its config.yaml comes last, so a folder that has it is complete."""
    run = Run(folder, replace(adapter.config, output_dir=str(folder.absolute())))
    with atomic_write(source) as partial:
        partial.write_text(json.dumps(record), encoding="utf-8")
    run.checkpoints.mkdir(exist_ok=True)
    remove_unfinished(run.checkpoints)
    save_items(run.checkpoints, adapter.step, trained=adapter.trained)
    if adapter.inverted is not None:
        write_inversion(run.inverted_file(adapter.step), adapter.inverted)
    if adapter.inputs is not None:
        write_inputs(run.inputs_file, adapter.inputs)
    with atomic_write(run.config_file) as partial:
        partial.write_text(dump_config(run.config), encoding="utf-8")
