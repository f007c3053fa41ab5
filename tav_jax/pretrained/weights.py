"""Convert the tensors of a PyTorch checkpoint to the parameters of a network, and back.

There are three steps, each tested alone: rename, transpose, merge. PyTorch's layout appears in no
other module of the package.

| checkpoint           | here                | layout                                             |
|----------------------|---------------------|----------------------------------------------------|
| `*.weight`, rank 4   | `*.kernel`          | out in kh kw -> kh kw in out                       |
| `*.weight`, rank 2   | `*.kernel`          | out in -> in out                                   |
| `token_embedding.weight`, `position_embedding.weight` | `*.embedding` | as it is        |
| `*.weight`, rank 1   | `*.scale`           | as it is                                           |
| `*.bias`, `class_embedding`, `logit_scale` | the same | as it is                           |
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
from tav_jax.pretrained.pickled import plain_tensors
from tav_jax.reading import parse_json, read_json, require_file
from tav_jax.text import brief, shorten
from tav_jax.types import Params, PRNGKey

# Names that the autoencoder's attention had before diffusers 0.17, v1-4's files among them.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Tensors that are not parameters, with the reason.
IGNORED = {
    "text_model.embeddings.position_ids": "the numbers 0 to 76, saved by transformers before 4.31",
    "vision_model.embeddings.position_ids": "the same, of an image's patches",
}

# What the exponents of numbers that are not finite begin at, by type.
INFINITIES = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}
CHUNK = 2**18  # numbers
CONVERTERS = 2  # threads that cast tensors, each of which may be a hundred megabytes
WEIGHT_TYPES = ("F16", "BF16", "F32", "F64")
MOST_OF_A_KIND = 3  # tensors that are named, if more are missing, left over or of another shape
MOST_CHARACTERS = 490  # of a message about them
MOST_HEADER_BYTES = 100_000_000  # the limit of the library safetensors

TEMPORAL = ("attn_temp", "norm_temp")
"""Modules that only the 3D U-Net has."""


def parameter_name(name: str, rank: int) -> str:
    """Return the name here of a checkpoint's tensor."""
    *path, leaf = _current_name(name).split(".")
    if leaf == "weight":
        is_embedding = path[-1] in ("token_embedding", "position_embedding")
        leaf = "embedding" if is_embedding else "scale" if rank == 1 else "kernel"
    return ".".join([*path, leaf])


def _current_name(name: str) -> str:
    *path, leaf = name.split(".")
    return ".".join([*(OLD_NAMES.get(part, part) for part in path), leaf])


def tensor_name(name: str) -> str:
    """Return the name in a checkpoint of a parameter here."""
    *path, leaf = name.split(".")
    return ".".join([*path, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


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
    # Not `ascontiguousarray`, which makes a vector of a scalar.
    return tensor_name(name), np.asarray(parameter, order="C")


def merge(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype_of: Callable[[str], str] = lambda name: "float32",
    where: str = "checkpoint",
    may_lack: tuple[str, ...] = (),
    change_of: Callable[[str], np.ndarray | None] = lambda name: None,
) -> Params:
    """Return a network's parameters from a checkpoint's tensors.

    Args:
        shapes: The network's parameters, as `parameter_shapes` gives them.
        tensors: The checkpoint's tensors with their names. A few are read ahead while others are
            cast. None may be changed afterwards: a parameter may share its memory.
        dtype_of: The type in which a parameter of that name is stored.
        where: What messages call the checkpoint.
        may_lack: Modules whose parameters need not be there.
        change_of: Returns what is added to a parameter of that name before it is cast, in its
            layout here, or None.

    Raises:
        UserError: tensors are missing, left over or of other shapes, of which all are listed. Or
            one has numbers that are not finite.
    """
    params: Params = {}
    matching = _Matching(shapes, may_lack)
    broken: list[str] = []
    waiting: deque[tuple[str, str, Future[tuple[Array, bool]]]] = deque()

    def take_first() -> None:
        name, published_name, converted = waiting.popleft()
        params[name], all_finite = converted.result()
        if not all_finite:
            broken.append(published_name)

    # NumPy and JAX let go of the interpreter's lock while they cast and copy.
    with ThreadPoolExecutor(CONVERTERS) as pool:
        for published_name, tensor in tensors:
            name = matching.find(published_name, tensor.shape)
            if name is None:
                continue
            if tensor.dtype.name not in INFINITIES:
                raise UserError(f"{where}: {published_name}: {tensor.dtype} is no type of weights")
            converted = pool.submit(_convert, published_name, tensor, dtype_of(name), change_of)
            waiting.append((name, published_name, converted))
            if len(waiting) > CONVERTERS:
                take_first()
        while waiting:
            take_first()
    matching.finish(where)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"{where}: {broken[0]}{more}: some values are NaN or infinite")
    return params


def _convert(
    published_name: str,
    tensor: np.ndarray,
    dtype: str,
    change_of: Callable[[str], np.ndarray | None],
) -> tuple[Array, bool]:
    """Return a tensor as a parameter, and whether all its numbers are finite."""
    name, value = to_parameter(published_name, tensor)
    if (change := change_of(name)) is not None:
        value = value.astype(np.float32) + change
    # `device_put` transposes a view two to three times faster than `jnp.asarray`.
    return jax.device_put(value.astype(dtype, copy=False)), is_finite(tensor)


def check_shapes(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    stored: Iterable[tuple[str, tuple[int, ...]]],
    *,
    where: str = "checkpoint",
    may_lack: tuple[str, ...] = (),
) -> None:
    """Raise as `merge` does, from the names and shapes of a checkpoint's tensors alone."""
    matching = _Matching(shapes, may_lack)
    for published_name, shape in stored:
        matching.find(published_name, shape)
    matching.finish(where)


class _Matching:
    """Finds the parameter of each tensor, and gathers what does not match."""

    def __init__(self, shapes: Mapping[str, jax.ShapeDtypeStruct], may_lack: tuple[str, ...]):
        self.shapes = shapes
        self.may_lack = may_lack
        self.published = {tensor_name(name): name for name in shapes}
        self.met: set[str] = set()
        self.problems: dict[str, list[tuple[str, str]]] = {}

    def _add(self, kind: str, name: str, shape: str) -> None:
        self.problems.setdefault(kind, []).append((name, shape))

    def find(self, published_name: str, shape: tuple[int, ...]) -> str | None:
        """Return the name of a tensor's parameter, or None if there is none of that shape."""
        if published_name in IGNORED:
            return None
        tensor = shorten(published_name, 150), brief(list(shape))
        # Found by name alone: a weight of another rank is still that weight, of a wrong shape.
        name = self.published.get(_current_name(published_name))
        if name is None:
            self._add("left over", *tensor)
            return None
        if name in self.met:
            self._add("twice, under two names", *tensor)
        self.met.add(name)
        if list(shape) != (expected := _published_shape(name, self.shapes)):
            self._add("wrong shape", tensor[0], f"{tensor[1]}, expected {expected}")
            return None
        return name

    def finish(self, where: str) -> None:
        """Raise `UserError` if tensors are missing, left over or of other shapes."""
        for name in self.shapes:
            if name not in self.met and not in_modules(name, self.may_lack):
                self._add("missing", tensor_name(name), str(_published_shape(name, self.shapes)))
        if not self.problems:
            return
        heading = f"{shorten(where, 150)}: not the network of its config:"
        for most in range(MOST_OF_A_KIND, -1, -1):
            message = "\n".join([heading, *self._list(most)])
            if len(message) <= MOST_CHARACTERS:
                break
        raise UserError(message)

    def _list(self, most: int) -> list[str]:
        """Return lines of what does not match, of each kind so many, or at 0 one without shape."""
        lines = []
        for kind, tensors in sorted(self.problems.items()):
            tensors = sorted(tensors)
            if most:
                lines += [f"  {kind}: {name} {shape}" for name, shape in tensors[:most]]
            else:
                lines.append(f"  {kind}: {shorten(tensors[0][0], 30)}")
            if (more := len(tensors) - max(most, 1)) > 0:
                lines[-1] += f", and {more} more"
        return lines


def is_finite(tensor: np.ndarray) -> bool:
    """Tell whether all numbers are finite, at the speed of memory.

    A number is infinite or NaN if all bits of its exponent are set. As integers these are the
    largest of both signs, so two maxima decide, without an array of truths.
    """
    infinity, bits = INFINITIES[tensor.dtype.name], 8 * tensor.dtype.itemsize
    signed = np.ascontiguousarray(tensor).reshape(-1).view(f"i{bits // 8}")
    unsigned = signed.view(f"u{bits // 8}")
    for start in range(0, tensor.size, CHUNK):  # which stays in the cache for the second maximum
        few = slice(start, start + CHUNK)
        if signed[few].max() >= infinity or unsigned[few].max() >= infinity + 2 ** (bits - 1):
            return False
    return True


def _published_shape(name: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[int]:
    shape = list(shapes[name].shape)
    if name.endswith(".kernel"):
        return [shape[i] for i in (3, 2, 0, 1)] if len(shape) == 4 else shape[::-1]
    return shape


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
        UserError: A file is damaged, or a pickled one asks for anything but tensors.
    """
    for path in find_files(folder, stem, variant):
        if path.suffix == ".bin":
            yield from plain_tensors(path, IGNORED)
            continue
        read_header(path)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118, it is not a dictionary
                    yield name, file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from None


def find_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Return a network's weight files. Arguments and errors are those of `read_tensors`."""
    chosen = choose_weights([path.name for path in folder.iterdir()], stem, variant)
    if chosen is None:
        raise MissingFileError(
            f"{folder}: no {stem}{f'.{variant}' if variant else ''}.safetensors, nor shards or .bin"
        )
    files = _shards(folder / chosen) if chosen.endswith(".json") else [folder / chosen]
    for file in files:
        require_file(file)
    return files


class Stored(NamedTuple):
    """What a file's header says about a tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(
    path: Path, *, any_type: Callable[[str], bool] = IGNORED.__contains__
) -> dict[str, Stored]:
    """Return the names, types and shapes of the tensors of a `.safetensors` file.

    Args:
        path: The file.
        any_type: Tells whether a tensor of that name may have another type than weights.

    Raises:
        UserError: The file is damaged, has a name twice, or a tensor of a type that is no weight's.
    """
    tensors = parse_header(path)
    for name, one in tensors.items():
        if one.dtype not in WEIGHT_TYPES and not any_type(name):
            raise UserError(
                f"{path}: {shorten(name, 150)} has the type {shorten(one.dtype, 20)}; weights are "
                f"{', '.join(WEIGHT_TYPES)}"
            )
    return tensors


def parse_header(path: Path) -> dict[str, Stored]:
    """Return what `read_header` does, for tensors of any type."""
    require_file(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MOST_HEADER_BYTES, path.stat().st_size - 8):
            raise _damaged(path, "no header of safetensors")
        header = file.read(size)
    try:
        tree = parse_json(header, str(path))
        tree.pop("__metadata__", None)
        return {
            name: Stored(str(one["dtype"]), tuple(map(int, one["shape"])))
            for name, one in tree.items()
        }
    except (UserError, LookupError, TypeError, ValueError) as error:
        if "is there twice" in str(error):
            raise
        raise _damaged(path, shorten(str(error), 100)) from None


def read_safetensors(
    path: Path, *, any_type: Callable[[str], bool] = IGNORED.__contains__
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return all tensors of a `.safetensors` file, and its metadata.

    Arguments and errors are those of `read_header`.
    """
    read_header(path, any_type=any_type)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from None


def stored_shapes(files: Iterable[Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor of `.safetensors` files, from their headers."""
    for path in files:
        for name, one in read_header(path).items():
            yield name, one.shape


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: damaged or cut off ({reason}); download it again")


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
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name in ("", "..")]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        why = shorten(str(error).removeprefix(f"{index}: "), 100)
        raise UserError(f"{index}: damaged ({why}); download it again") from None
    if outside:
        raise UserError(f"{index}: {brief(outside[0])} is not a file's name in this folder")
    return names


def _shards(index: Path) -> list[Path]:
    paths = [index.parent / name for name in shard_names(index)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise MissingFileError(
            f"{index} names shards that are missing: {', '.join(missing)}; download them"
        )
    return paths


def save_tensors(path: Path, params: Mapping[str, Array]) -> None:
    """Write parameters atomically, as a `.safetensors` file in the published layout."""
    tensors = dict(to_tensor(name, np.asarray(value)) for name, value in params.items())
    with atomic_write(path) as partial:
        # The published code's loader requires this entry.
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors lets only the owner read it
