"""The file of a run's inverted clip: a float32 `.npy` with its SHA-256 digest after the array.

`numpy.load` reads what the array needs and ignores what follows. So there is one file, which
appears with its digest at once.
"""

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from tav_jax.errors import DamagedError
from tav_jax.files import atomic_write

Inversion = Float32[np.ndarray, "1 f h w c"]

MARK = b"\nsha256 "


def _ending(content: bytes) -> bytes:
    return MARK + hashlib.sha256(content).hexdigest().encode() + b"\n"


LENGTH = len(_ending(b""))


def write_inversion(path: Path, latents: Inversion) -> None:
    """Write inverted latents with their digest."""
    file = BytesIO()
    np.save(file, latents)
    content = file.getvalue()
    with atomic_write(path) as partial:
        partial.write_bytes(content + _ending(content))


def read_inversion(path: Path) -> tuple[Inversion, bool]:
    """Return inverted latents, and whether they have a digest. Earlier versions wrote none.

    Raises:
        DamagedError: The file is not as it was written, or does not hold finite float32 latents.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: it cannot be read ({error.strerror})") from None
    array, ending = content[:-LENGTH], content[-LENGTH:]
    has_digest = ending.startswith(MARK)
    if not has_digest:
        array = content
    elif ending != _ending(array):
        raise DamagedError(f"{path}: its SHA-256 digest is another")
    file = BytesIO(array)
    try:
        latents = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, TypeError, EOFError, OverflowError, MemoryError):
        raise DamagedError(f"{path}: it is no NumPy array") from None
    if file.read(1):
        raise DamagedError(f"{path}: it has more than a NumPy array")
    if latents.dtype != np.float32 or latents.ndim != 5:
        raise DamagedError(f"{path}: it has {latents.dtype} of {latents.ndim} axes, not latents")
    if not np.isfinite(latents).all():
        raise DamagedError(f"{path}: it has values that are not finite")
    return latents, has_digest
