"""What was written whole and has changed since is noticed, and never lost."""

import json
import shutil

import numpy as np
import pytest
from test_checkpointing import NAMES, assert_bit_equal, make_state, stepped

from tav_jax.digests import folder_damage, has_digests
from tav_jax.errors import DamagedError
from tav_jax.files import move_aside
from tav_jax.runs.inversions import read_inversion, write_inversion
from tav_jax.training.checkpoints import (
    checkpoint_damage,
    latest_step,
    remove_unfinished,
    restore_state,
    restore_trained,
    save_checkpoint,
    saved_steps,
)


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", stepped(make_state(), 2), NAMES)
    return tmp_path / "checkpoints/2"


def like():
    params = make_state().unet.params
    return {name: params[name] for name in NAMES}


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_the_digests_are_those_of_all_files(checkpoint):
    listed = json.loads((checkpoint / "digests.json").read_text())["files"]
    assert {checkpoint / name for name in listed} == {
        path for path in files_of(checkpoint) if path.name != "digests.json"
    }
    assert checkpoint_damage(checkpoint) is None
    assert {path.name for path in checkpoint.parent.iterdir()} == {"2"}, "nothing is left over"


def test_a_flipped_bit_in_any_file_is_noticed(checkpoint):
    draw = np.random.default_rng(0)
    for path in files_of(checkpoint):
        whole = path.read_bytes()
        for bit in draw.integers(8 * len(whole), size=3):
            flip(path, bit)
            damage = checkpoint_damage(checkpoint)
            assert damage is not None, (path, bit)
            assert path.name in damage
            with pytest.raises(DamagedError, match=str(checkpoint)):
                restore_state(checkpoint, make_state(), NAMES)
            path.write_bytes(whole)
    restore_state(checkpoint, make_state(), NAMES)


@pytest.mark.parametrize("harm", ["truncated", "emptied", "removed", "longer", "a folder"])
def test_a_file_of_another_size_is_noticed(harm, checkpoint):
    path = max(files_of(checkpoint / "trained"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    elif harm != "removed":
        changed = {"truncated": content[:-1], "emptied": b"", "longer": content + b"\0"}
        path.write_bytes(changed[harm])
    with pytest.raises(DamagedError, match=path.name):
        restore_trained(checkpoint, like())


def test_the_digests_themselves_may_be_damaged(checkpoint):
    record = checkpoint / "digests.json"
    whole = record.read_text()
    for text in ("", "[]", "{}", whole[:-1], whole.replace("trained/", "trailed/", 1), "{" * 9999):
        record.write_text(text)
        assert folder_damage(checkpoint) == "digests.json is damaged"
    record.write_bytes(b"\xff\xfe")
    assert folder_damage(checkpoint, "trained") == "digests.json is damaged"


def test_sampling_reads_and_checks_what_it_needs_only(checkpoint):
    flip(max(files_of(checkpoint / "progress"), key=lambda path: path.stat().st_size), 77)
    assert restore_trained(checkpoint, like()).keys() == set(NAMES)
    assert checkpoint_damage(checkpoint, ["trained"]) is None
    with pytest.raises(DamagedError, match="progress/"):
        restore_state(checkpoint, make_state(), NAMES)


def test_a_checkpoint_without_digests_is_restored_unchecked(checkpoint):
    expected = restore_state(checkpoint, make_state(), NAMES)
    (checkpoint / "digests.json").unlink()
    assert not has_digests(checkpoint)
    assert checkpoint_damage(checkpoint) is None, "it can be read"
    assert_bit_equal(restore_state(checkpoint, make_state(), NAMES), expected)


# A failed read ends Orbax's event loop, and others find it closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt", "ocdbt.process_0/manifest.ocdbt"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff" * 99])
def test_a_checkpoint_without_digests_that_cannot_be_read_is_damaged(file, content, checkpoint):
    (checkpoint / "digests.json").unlink()
    (checkpoint / "trained" / file).write_bytes(content)
    if checkpoint_damage(checkpoint) is None:  # Orbax reads without this file
        restore_state(checkpoint, make_state(), NAMES)
    else:
        with pytest.raises(DamagedError, match="trained cannot be read"):
            restore_state(checkpoint, make_state(), NAMES)


def test_an_empty_checkpoint_is_damaged(tmp_path):
    (tmp_path / "7").mkdir()
    assert latest_step(tmp_path) == 7
    assert checkpoint_damage(tmp_path / "7") == "it has no trained"
    with pytest.raises(DamagedError, match="it has no trained"):
        restore_state(tmp_path / "7", make_state(), NAMES)


def test_a_step_that_was_moved_aside_can_be_saved_again(checkpoint):
    state = stepped(make_state(), 2)
    first, second = (
        (move_aside(checkpoint), save_checkpoint(checkpoint.parent, state, NAMES))[0]
        for _ in range(2)
    )
    assert (first.name, second.name) == ("2.damaged", "2.damaged-2")
    assert saved_steps(checkpoint.parent) == [2]
    assert_bit_equal(restore_state(checkpoint, make_state(), NAMES), state)
    assert checkpoint_damage(first) is None, "it is still there"


def test_what_killed_processes_left_is_removed(checkpoint):
    folder = checkpoint.parent
    move_aside(checkpoint)
    save_checkpoint(folder, stepped(make_state(), 2), NAMES)
    for name in (".unfinished-0000abcd/3", "3.orbax-checkpoint-tmp-17"):
        shutil.copytree(checkpoint, folder / name)
    (folder / "notes").mkdir()
    assert saved_steps(folder) == [2]
    remove_unfinished(folder)
    assert {path.name for path in folder.iterdir()} == {"2", "2.damaged", "notes"}


LATENTS = np.random.default_rng(1).standard_normal((1, 2, 4, 4, 4)).astype(np.float32)


def test_inverted_latents_are_an_ordinary_file_of_numpy(tmp_path):
    path = tmp_path / "ddim_latent-6.npy"
    write_inversion(path, LATENTS)
    for mode in (None, "r"):
        np.testing.assert_array_equal(np.load(path, mmap_mode=mode), LATENTS, strict=True)
    latents, has_digest = read_inversion(path)
    np.testing.assert_array_equal(latents, LATENTS, strict=True)
    assert has_digest
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_every_flipped_byte_of_inverted_latents_is_noticed(tmp_path):
    path = tmp_path / "ddim_latent-6.npy"
    write_inversion(path, LATENTS)
    whole = path.read_bytes()
    for byte in range(len(whole)):
        flip(path, 8 * byte + byte % 8)
        with pytest.raises(DamagedError, match="ddim_latent-6"):
            read_inversion(path)
        path.write_bytes(whole)


def test_latents_of_an_earlier_version_have_no_digest(tmp_path):
    np.save(tmp_path / "old.npy", LATENTS)
    latents, has_digest = read_inversion(tmp_path / "old.npy")
    np.testing.assert_array_equal(latents, LATENTS, strict=True)
    assert not has_digest


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(LATENTS.astype(np.float64), id="float64"),
        pytest.param(LATENTS[0], id="four axes"),
        pytest.param(np.where(LATENTS > 2, np.nan, LATENTS), id="NaN"),
        pytest.param(np.where(LATENTS > 2, np.inf, LATENTS), id="infinite"),
        pytest.param(np.array([print]), id="objects"),
    ],
)
def test_what_are_no_latents_is_refused(array, tmp_path):
    np.save(tmp_path / "old.npy", array)
    with pytest.raises(DamagedError) as said:
        read_inversion(tmp_path / "old.npy")
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\3\4", b"junk" * 99, "half", "more"])
def test_what_is_no_array_is_refused(content, tmp_path):
    path = tmp_path / "old.npy"
    np.save(path, LATENTS)
    if isinstance(content, str):
        whole = path.read_bytes()
        content = whole[: len(whole) // 2] if content == "half" else whole + b"\0"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"old\.npy: it "):
        read_inversion(path)
