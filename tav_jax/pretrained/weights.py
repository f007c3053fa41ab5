"""Convert the tensors of a PyTorch checkpoint to the parameters of a network, and back.

There are three steps, each tested alone: rename, transpose, merge. PyTorch's layout appears in no
other module of the package.

| checkpoint           | here                | layout                                             |
|----------------------|---------------------|----------------------------------------------------|
| `*.weight`, rank 4   | `*.kernel`          | out in kh kw -> kh kw in out                       |
| `*.weight`, rank 2   | `*.kernel`          | out in -> in out                                   |
| `token_embedding.weight`, `position_embedding.weight` | `*.embedding` | as it is        |
| `*.weight`, rank 1   | `*.scale`           | as it is                                           |
| `*.bias`             | `*.bias`            | as it is                                           |
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import Array
from safetensors.numpy import save_file

from tav_jax.errors import MissingFileError, UserError
from tav_jax.files import atomic_write
from tav_jax.models.layers import fan_in_uniform
from tav_jax.models.network import in_modules
from tav_jax.types import Params, PRNGKey

# Names that the autoencoder's attention had before diffusers 0.17, v1-4's files among them.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Tensors that are not parameters, with the reason.
IGNORED = {
    "text_model.embeddings.position_ids": "the numbers 0 to 76, saved by transformers before 4.31",
}

TEMPORAL = ("attn_temp", "norm_temp")
"""Modules that only the 3D U-Net has."""


def parameter_name(name: str, rank: int) -> str:
    """Return the name here of a checkpoint's tensor."""
    *path, leaf = name.split(".")
    path = [OLD_NAMES.get(part, part) for part in path]
    if leaf == "weight":
        is_embedding = path[-1] in ("token_embedding", "position_embedding")
        leaf = "embedding" if is_embedding else "scale" if rank == 1 else "kernel"
    return ".".join([*path, leaf])


def tensor_name(name: str) -> str:
    """Return the name in a checkpoint of a parameter here."""
    *path, leaf = name.split(".")
    return ".".join([*path, leaf if leaf == "bias" else "weight"])


def to_parameter(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a checkpoint's tensor with its name and its layout here, as a view."""
    name = parameter_name(name, tensor.ndim)
    if name.endswith(".kernel"):
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return name, tensor


def to_tensor(name: str, parameter: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a parameter with its name and its layout in a checkpoint."""
    if name.endswith(".kernel"):
        parameter = parameter.transpose(3, 2, 0, 1) if parameter.ndim == 4 else parameter.T
    return tensor_name(name), np.ascontiguousarray(parameter)


def merge(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype_of: Callable[[str], str] = lambda name: "float32",
    where: str = "checkpoint",
    may_lack: tuple[str, ...] = (),
) -> Params:
    """Return a network's parameters from a checkpoint's tensors.

    Args:
        shapes: The network's parameters, as `parameter_shapes` gives them.
        tensors: The checkpoint's tensors with their names. Each is cast before the next is read.
        dtype_of: The type in which a parameter of that name is stored.
        where: What messages call the checkpoint.
        may_lack: Modules whose parameters need not be there.

    Raises:
        UserError: tensors are missing, left over or of other shapes; all are listed.
    """
    published = {tensor_name(name): name for name in shapes}
    params: Params = {}
    met = set()
    problems = []
    for published_name, tensor in tensors:
        if published_name in IGNORED:
            continue
        name, value = to_parameter(published_name, tensor)
        # A weight of another rank is still that weight, and has a wrong shape.
        name = published.get(tensor_name(name), name)
        if name in met:
            problems.append(f"  twice, under two names: {published_name} {list(tensor.shape)}")
        met.add(name)
        if name not in shapes:
            problems.append(f"  left over: {published_name} {list(tensor.shape)}")
        elif value.shape != shapes[name].shape:
            expected = _published_shape(name, shapes)
            problems.append(
                f"  wrong shape: {published_name} {list(tensor.shape)}, expected {expected}"
            )
        else:
            params[name] = jnp.asarray(value.astype(dtype_of(name)))
    for name in shapes:
        if name not in met and not in_modules(name, may_lack):
            problems.append(f"  missing: {tensor_name(name)} {_published_shape(name, shapes)}")
    if problems:
        raise UserError(f"{where}: not the network of its config:\n" + "\n".join(sorted(problems)))
    return params


def _published_shape(name: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[int]:
    return list(to_tensor(name, np.empty(shapes[name].shape, np.bool_))[1].shape)


def inflate(
    params: Params,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    key: PRNGKey,
    *,
    dtype_of: Callable[[str], str] = lambda name: "float32",
) -> Params:
    """Return an image U-Net's parameters together with newly initialised temporal ones.

    Wu et al. 2023, section 3.2. The temporal attention's output projection starts at zero, so the
    network starts as the image U-Net applied to each frame. The published code sets only the
    weight to zero. Its random bias shifts every token from the first step, so ours is zero too.
    """
    missing = [name for name in shapes if name not in params]
    fresh: Params = {}
    for name, name_key in zip(missing, jax.random.split(key, max(1, len(missing))), strict=False):
        if not in_modules(name, TEMPORAL):
            raise ValueError(f"only temporal parameters can be made afresh, not {name}")
        shape, dtype = shapes[name].shape, dtype_of(name)
        if name.endswith(".scale"):
            fresh[name] = jnp.ones(shape, dtype)
        elif name.endswith(".bias") or ".to_out." in name:
            fresh[name] = jnp.zeros(shape, dtype)
        else:
            fresh[name] = fan_in_uniform(name_key, shape).astype(dtype)
    return params | fresh


def read_tensors(
    folder: Path, stem: str, variant: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and tensor from a network's weight files, one at a time.

    Args:
        folder: One network's folder, such as `stable-diffusion-v1-4/unet`.
        stem: `diffusion_pytorch_model` for diffusers' networks, `model` for transformers'.
        variant: The variant in the files' names, such as "fp16". By default files without a
            variant are read, or fp16 if there are none.

    Raises:
        MissingFileError: There are no weights, or some shards are missing.
        UserError: A file is damaged, or it is pickled and PyTorch is not installed.
    """
    chosen = choose_weights([path.name for path in folder.iterdir()], stem, variant)
    if chosen is None:
        raise MissingFileError(
            f"{folder}: no {stem}{f'.{variant}' if variant else ''}.safetensors, nor shards or .bin"
        )
    for path in _shards(folder / chosen) if chosen.endswith(".json") else [folder / chosen]:
        if path.suffix == ".bin":
            yield from _read_pickled(path)
            continue
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118, it is not a dictionary
                    yield name, file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: damaged or cut off ({error}); download it again") from None


def choose_weights(names: Iterable[str], stem: str, variant: str | None = None) -> str | None:
    """Return the name of the weights' file in a network's folder, or of the index of its shards.

    `.safetensors` is preferred to PyTorch's pickled `.bin`, then float32 to fp16, then one file to
    shards.
    """
    names = set(names)
    pickled_stem = "pytorch_model" if stem == "model" else stem
    for base, suffix in ((stem, ".safetensors"), (pickled_stem, ".bin")):
        for tag in [f".{variant}"] if variant else ["", ".fp16"]:
            # diffusers writes an index's variant before `.json`, other tools before the suffix.
            for name in (
                f"{base}{tag}{suffix}",
                f"{base}{suffix}.index{tag}.json",
                f"{base}{tag}{suffix}.index.json",
            ):
                if name in names:
                    return name
    return None


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index distributes the tensors over."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error!r}); download it again") from None


def _shards(index: Path) -> list[Path]:
    paths = [index.parent / name for name in shard_names(index)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise MissingFileError(
            f"{index} names shards that are missing: {', '.join(missing)}; download them"
        )
    return paths


def _read_pickled(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: a pickled checkpoint, which only PyTorch opens; "
            "`pip install 'tav_jax[interop]'`, or put the model's .safetensors beside it"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a file of plain tensors ({reason})") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path}: not a file of plain tensors; is it a whole training's state?")
    for name, tensor in tensors.items():
        # PyTorch cannot convert bfloat16 to NumPy. Every bfloat16 number is a float32 number.
        yield name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def save_tensors(path: Path, params: Mapping[str, Array]) -> None:
    """Write parameters atomically, as a `.safetensors` file in the published layout."""
    tensors = dict(to_tensor(name, np.asarray(value)) for name, value in params.items())
    with atomic_write(path) as partial:
        # The published code's loader requires this entry.
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors lets only the owner read it
