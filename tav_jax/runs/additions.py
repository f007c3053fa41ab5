"""The LoRAs and embeddings of a run: where they are, and whether it was tuned with them."""

from collections.abc import Sequence
from pathlib import Path

from tav_jax.errors import MissingFileError, UserError
from tav_jax.reading import why_not_a_file
from tav_jax.runs.inputs import FileDigest, OtherInputError, digest_file
from tav_jax.text import shorten


def find_additions(
    kind: str,
    paths: Sequence[str],
    recorded: Sequence[FileDigest] | None,
    folder: Path | None,
    run: Path,
) -> list[tuple[Path, FileDigest]]:
    """Return the files that are added to a run's base model, with their digests.

    Args:
        kind: What messages call them: the key of the settings.
        paths: Where the settings say that they are.
        recorded: Their digests, or None if the run has none yet.
        folder: Where they are now, in any folder below and under any name. None: where the
            settings say.
        run: The run's folder, for messages.

    Raises:
        MissingFileError: Some are not there.
        OtherInputError: Some are others than the run was tuned with. All are listed.
    """
    if recorded is not None and len(recorded) != len(paths):
        raise UserError(
            f"{shorten(str(run), 150)}: config.yaml has {len(paths)} {kind}, and inputs.json "
            f"{len(recorded)}; put back the copies that belong together"
        )
    found, missing, others = [], [], []
    for index, path in enumerate(paths):
        known = None if recorded is None else recorded[index]
        place = Path(path) if folder is None else _find(folder, Path(path).name, known)
        if place is None:
            missing.append(f"no file in {folder} has the content of {Path(path).name}")
        elif problem := why_not_a_file(place):
            missing.append(f"{place}: {problem}")
        else:
            digest = digest_file(place, known)
            if known is not None and digest.sha256 != known.sha256:
                others.append(str(place))
            found.append((place, digest))
    if missing:
        advice = "; if it has moved, sample with --lora-dir DIR" if folder is None else ""
        raise MissingFileError(f"{kind}: {'; '.join(missing)}{advice}")
    if others:
        raise OtherInputError(
            f"{shorten(str(run), 150)} was tuned with other {kind} than {', '.join(others)}; "
            "sample with --lora-dir DIR of the run's, or tune with these in another output_dir"
        )
    return found


def _find(folder: Path, name: str, known: FileDigest | None) -> Path | None:
    """Return the file of a folder that has a content; of unknown content, that of the name."""
    if known is None:
        return folder / name
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    # Only files of the same size are read, and that of the same name before the others.
    for path in sorted(paths, key=lambda path: path.name != name):
        if path.stat().st_size == known.size and digest_file(path, known).sha256 == known.sha256:
            return path
    return None
