"""Read PyTorch's pickled checkpoints (`.bin`) without PyTorch, and without running what is in them.

Such a file is a zip archive: `data.pkl` is a pickle of a dictionary of tensors, and each `data/KEY`
has the numbers of one storage. A pickle may name any function of any module to be called. Here it
may name those that tensors are made of, and nothing else.
"""

import io
import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from tav_jax.errors import UserError
from tav_jax.reading import require_file
from tav_jax.text import brief, shorten

MOST_PICKLE_BYTES = 64 * 2**20  # v1-4's largest has 0.2 MB
MOST_AXES = 8
LOCAL_HEADER = 30  # bytes of a zip entry before its name
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of PyTorch before 1.6 begin

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _StorageType(NamedTuple):
    """Stands for one of PyTorch's classes of storages."""

    dtype: np.dtype


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint as views of the file, by name.

    Args:
        path: A file that `torch.save` has written, since PyTorch 1.6.

    Raises:
        UserError: It is no such file, is damaged, or has or asks for anything but tensors.
    """
    tensors = read_tree(path)
    if not all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in tensors.items()
    ):
        raise UserError(f"{path}: not a file of plain tensors; is it a whole training's state?")
    return dict(tensors)


def read_tree(path: Path) -> Mapping[Any, Any]:
    """Return the dictionary of a file, of tensors and of Python's own plain values.

    Args:
        path: As `read_pickled` takes it.

    Raises:
        UserError: It is no such file, is damaged, or asks for anything but tensors.
    """
    require_file(path)
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
        if start == LEGACY:
            raise UserError(
                f"{path}: in the format of PyTorch before 1.6; in PyTorch, "
                "torch.save(torch.load(FILE, weights_only=True), FILE) writes today's"
            )
        if not start.startswith(b"PK"):
            raise UserError(f"{path}: not a file of plain tensors")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read_archive(path, content)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle or archive makes Python's readers raise
        reason = shorten(str(error) or type(error).__name__, 100)
        raise UserError(f"{path}: not a file of plain tensors ({reason})") from None


def _read_archive(path: Path, content: mmap.mmap) -> Mapping[Any, Any]:
    entries = _entries(path, content)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(f"{path}: not a file of plain tensors: it has no data.pkl")
    (root,) = roots
    order = entries.get(f"{root}byteorder")
    if order is not None and content[order.start : order.stop] != b"little":
        raise UserError(f"{path}: its numbers are big-endian")
    pickled = entries[f"{root}data.pkl"]
    if pickled.stop - pickled.start > MOST_PICKLE_BYTES:
        raise UserError(f"{path}: its list of tensors has more than {MOST_PICKLE_BYTES} bytes")

    def storage(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        place = entries.get(f"{root}data/{key}")
        if place is None:
            raise UserError(f"{path}: damaged: no data/{shorten(key, 40)} in it")
        if place.stop - place.start != numel * dtype.itemsize:
            raise UserError(
                f"{path}: damaged: data/{shorten(key, 40)} has {place.stop - place.start} bytes "
                f"instead of {numel * dtype.itemsize}"
            )
        return np.frombuffer(content, dtype, numel, place.start) if numel else np.empty(0, dtype)

    text = io.BytesIO(content[pickled.start : pickled.stop])
    tree = _Unpickler(text, path, storage).load()
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: not a file of plain tensors; is it a whole training's state?")
    return tree


def _entries(path: Path, content: mmap.mmap) -> dict[str, range]:
    """Return the bytes of each entry of the archive, all of which must be stored as they are."""
    entries: dict[str, range] = {}
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        header = content[info.header_offset : info.header_offset + LOCAL_HEADER]
        if info.compress_type != zipfile.ZIP_STORED or header[:4] != b"PK\x03\x04":
            raise UserError(f"{path}: damaged: {brief(info.filename)} is not as PyTorch stores it")
        if info.filename in entries:
            raise UserError(f"{path}: {brief(info.filename)} is in it twice")
        extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + LOCAL_HEADER + extra
        if start + info.file_size > len(content):
            raise UserError(f"{path}: damaged: it ends within {brief(info.filename)}")
        entries[info.filename] = range(start, start + info.file_size)
    return entries


class _Unpickler(pickle.Unpickler):
    """Makes tensors, and refuses whatever else a pickle names.

    Args:
        file: The pickle.
        path: The checkpoint, for messages.
        storage: Returns the numbers of a storage.
    """

    def __init__(
        self,
        file: io.BytesIO,
        path: Path,
        storage: Callable[[str, np.dtype, int], np.ndarray],
    ):
        super().__init__(file)
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str, /) -> Any:
        """Return what stands for a global of the pickle."""
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) not in known:
            self._refuse(f"it asks for {shorten(f'{module}.{name}', 100)}, which no weights need")
        return known[module, name]

    def persistent_load(self, pid: Any, /) -> np.ndarray:
        """Return the numbers of a storage that the pickle refers to."""
        kind, storage_type, key, _, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            self._refuse("it refers to something else than storages")
        if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            self._refuse("a storage has no name or size")
        return self._storage(key, storage_type.dtype, numel)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> np.ndarray:
        numbers = [offset, *size, *stride]
        if not isinstance(storage, np.ndarray) or storage.ndim != 1:
            self._refuse("a tensor is made of something else than a storage")
        if not all(type(number) is int and number >= 0 for number in numbers):
            self._refuse("a tensor's offset, size and stride are no numbers from 0")
        if len(size) != len(stride) or len(size) > MOST_AXES:
            self._refuse(f"a tensor has {len(size)} axes and {len(stride)} strides")
        count = 1
        for length in size:
            count *= length
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and (last >= len(storage) or count > len(storage)):
            self._refuse(
                f"a tensor of size {brief(tuple(size))} reaches beyond its storage of "
                f"{len(storage)} numbers"
            )
        if not count:
            return np.empty(tuple(size), storage.dtype)
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)

    def _parameter(self, tensor: Any, *_: object) -> np.ndarray:
        if not isinstance(tensor, np.ndarray):
            self._refuse("a parameter is made of something else than a tensor")
        return tensor

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self._path}: not a file of plain tensors: {why}")


def plain_tensors(path: Path, ignored: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a checkpoint as floats that NumPy computes with.

    Args:
        path: See `read_pickled`.
        ignored: Names of tensors that may be of another type. They are yielded as they are.

    Raises:
        UserError: As `read_pickled`, or a tensor is not of floats.
    """
    for name, tensor in read_pickled(path).items():
        if tensor.dtype == jnp.bfloat16:
            tensor = tensor.astype(np.float32)  # which has every bfloat16 number
        elif tensor.dtype.kind != "f" and name not in ignored:
            raise UserError(
                f"{path}: {brief(name)} is {tensor.dtype}; weights are plain tensors of float16, "
                "bfloat16, float32 or float64"
            )
        yield name, tensor
