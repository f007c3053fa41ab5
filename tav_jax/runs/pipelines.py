"""Tuned models as whole folders in the layout of the published Tune-A-Video, written and read."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tav_jax.errors import MissingFileError, UserError
from tav_jax.files import atomic_folder
from tav_jax.models.network import Network
from tav_jax.pretrained.hub import find_folder
from tav_jax.pretrained.model import CONFIG_NAMES, INDEX_NAME, load_model, save_model
from tav_jax.reading import read_json
from tav_jax.runs.adapters import Adapter, portable
from tav_jax.runs.config import dump_config, load_config, with_model
from tav_jax.runs.inputs import Inputs, digest_model
from tav_jax.runs.run import Run
from tav_jax.text import shorten
from tav_jax.training.optimizer import label_params, select

CONFIG_NAME = "config.yaml"  # a run's settings, as in the models of the published library
MOST_NAMES = 3  # of parameters that a message lists


def is_pipeline(path: Path) -> bool:
    """Tell whether a path is the folder of a whole model."""
    return (path / INDEX_NAME).is_file()


def write_pipeline(run: Run, folder: Path, step: int) -> None:
    """Write a run's model as the published code does: all parts, its index, and config.yaml.

    The published inference code opens the folder, and so does `pretrained_model_path`. The
    scheduler is the base model's with the class DDIMScheduler.

    Args:
        run: The run.
        folder: The folder to write. One that is there is replaced.
        step: The checkpoint.

    Raises:
        UserError: The model cannot be loaded, or the folder cannot be written.
    """
    config = run.config
    run.use_float32()
    model = run.load_model(step)
    base = find_folder(
        config.pretrained_model_path, revision=config.revision, variant=config.variant
    )
    scheduler = read_json(base / "scheduler" / CONFIG_NAMES["scheduler"])
    scheduler = scheduler | {"_class_name": "DDIMScheduler"}
    with atomic_folder(folder) as partial:
        save_model(partial, model, scheduler, is_tuned=True)
        # LoRAs and embeddings are in the weights and the tokenizer by now.
        text = dump_config(portable(replace(config, loras=(), embeddings=())))
        (partial / CONFIG_NAME).write_text(text, encoding="utf-8")


def read_pipeline(folder: Path, base: str | None = None) -> Adapter:
    """Return what a tuned model in the published layout has that its base model has not.

    Args:
        folder: The tuned model, with the config.yaml that the published code writes.
        base: Its base model. By default that of config.yaml.

    Raises:
        MissingFileError: There is no config.yaml, or no base model of that name.
        UserError: More than the trained modules differs from the base model.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise MissingFileError(
            f"{folder}: no {CONFIG_NAME}, which names the caption, the frames and the base model"
        )
    config, _ = load_config(folder / CONFIG_NAME)
    if base is not None:
        config = with_model(config, base)
    try:
        base_folder = find_folder(
            config.pretrained_model_path, revision=config.revision, variant=config.variant
        )
    except MissingFileError as error:
        raise MissingFileError(f"{error}; --model DIR says where the base model is") from None
    tuned = load_model(folder)
    original = load_model(base_folder, variant=config.variant, key=jax.random.key(config.seed))
    labels = label_params(tuned.unet.params, config.trainable_modules)
    different = [
        *(name for name in _differing(tuned.unet, original.unet) if labels.get(name) != "train"),
        *_differing(tuned.vae, original.vae),
        *_differing(tuned.text_encoder, original.text_encoder),
    ]
    if different:
        more = f" and {len(different) - MOST_NAMES} more" if len(different) > MOST_NAMES else ""
        raise UserError(
            f"{folder}: not {shorten(config.pretrained_model_path, 100)} with other "
            f"{', '.join(config.trainable_modules)}: {', '.join(different[:MOST_NAMES])}{more} "
            "differ, too; --model names another base model"
        )
    inputs = Inputs(None, digest_model(base_folder, config.variant, {}))
    trained = select(tuned.unet.params, labels, "train")
    return Adapter(portable(config), config.max_train_steps, inputs, trained, None)


def _differing(ours: Network, base: Network) -> Iterator[str]:
    """Yield the parameters that one of two networks lacks, or that are not equal.

    One that has been rounded to 16 bits is equal.
    """
    yield from sorted(ours.params.keys() ^ base.params.keys())
    for name in ours.params.keys() & base.params.keys():
        value, expected = np.asarray(ours.params[name]), np.asarray(base.params[name])
        if value.shape != expected.shape or not any(
            np.array_equal(value, expected.astype(dtype).astype(np.float32))
            for dtype in (np.float32, np.float16, jnp.bfloat16)
        ):
            yield name
