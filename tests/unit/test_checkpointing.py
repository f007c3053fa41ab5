import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tav_jax.errors import DamagedError
from tav_jax.models.network import Network
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.training.checkpoints import (
    latest_step,
    restore_state,
    restore_trained,
    save_checkpoint,
)
from tav_jax.training.optimizer import label_params, make_optimizer
from tav_jax.training.train_step import TrainState, apply_gradients, init_state

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TRAINED = {f"{BLOCK}.attn1.to_q.kernel": (4, 4), f"{BLOCK}.attn_temp.to_out.0.bias": (4,)}
FROZEN = {f"{BLOCK}.attn1.to_k.kernel": (64, 64), "conv_in.bias": (256,)}
NAMES = list(TRAINED)


def make_optimizer_for(params, modules=("attn1.to_q", "attn_temp"), **settings):
    return make_optimizer(label_params(params, modules), 1e-2, **settings)


def make_state(seed=0, *, frozen="bfloat16", trained=TRAINED, **settings):
    """A state as a bfloat16 run has it: trained leaves float32, frozen ones in half the bytes."""
    key = jax.random.key(seed)
    params = {
        name: jax.random.normal(jax.random.fold_in(key, index), shape).astype(
            "float32" if name in trained else frozen
        )
        for index, (name, shape) in enumerate((trained | FROZEN).items())
    }
    unet = Network(UNet3DConditionModel, None, params)
    return init_state(unet, make_optimizer_for(params, **settings), jax.random.key(seed + 100))


def stepped(state, times, optimizer=None):
    """Updates with gradients that depend on the step alone."""
    optimizer = optimizer or make_optimizer_for(state.unet.params)
    for _ in range(times):
        gradients = {
            name: jnp.cos(state.unet.params[name] + state.step.astype("float32")) for name in NAMES
        }
        state = apply_gradients(state, gradients, optimizer)
    return state


def arrays(state):
    """Every array of a state by its place in it, the key as its numbers."""
    state = state._replace(key=jax.random.key_data(state.key))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_bit_equal(ours, theirs):
    ours, theirs = arrays(ours), arrays(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.tobytes() == theirs[name].tobytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 2 and 5, and the state of each."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    second = stepped(make_state(), 2)
    fifth = stepped(second, 3)
    for state in (second, fifth):
        save_checkpoint(folder, state, NAMES)
    return folder, {2: second, 5: fifth}


@pytest.mark.parametrize("step", [2, 5])
def test_what_is_saved_is_restored_bit_by_bit(step, saved):
    folder, states = saved
    # Another seed: but for the frozen leaves, which a checkpoint does not have, all must change.
    other = make_state(seed=1)
    restored = restore_state(folder / str(step), other, NAMES)
    frozen = {name: states[step].unet.params[name] for name in FROZEN}
    unet = restored.unet.with_params(restored.unet.params | frozen)
    assert_bit_equal(restored._replace(unet=unet), states[step])
    assert int(restored.step) == step


def test_frozen_leaves_stay_the_given_ones(saved):
    folder, _ = saved
    given = make_state(seed=1)
    restored = restore_state(folder / "5", given, NAMES)
    for name in FROZEN:
        assert restored.unet.params[name] is given.unet.params[name]


def test_five_updates_are_two_and_a_restore_and_three(saved):
    folder, states = saved
    assert_bit_equal(stepped(restore_state(folder / "2", make_state(), NAMES), 3), states[5])


def test_the_optimizer_has_a_memory_that_is_restored(saved):
    folder, states = saved
    restored = restore_state(folder / "2", make_state(), NAMES)
    forgetful = restored._replace(opt_state=make_state().opt_state)
    with pytest.raises(AssertionError):
        assert_bit_equal(stepped(forgetful, 3), states[5])


def test_a_restored_state_may_be_donated(saved):
    folder, states = saved
    path = folder / "5"
    donate = jax.jit(lambda state: state._replace(step=state.step + 1), donate_argnums=0)
    for _ in range(2):
        restored = restore_state(path, make_state(), NAMES)
        copy = jax.tree.map(jnp.copy, restored)
        after = donate(restored)
        assert_bit_equal(after._replace(step=after.step - 1), copy)
        assert_bit_equal(
            copy._replace(unet=states[5].unet.with_params(copy.unet.params)),
            states[5],
        )


def test_nothing_frozen_is_stored(saved):
    step = saved[0] / "5"
    with ocp.StandardCheckpointer() as checkpointer:
        trained, progress = (
            checkpointer.metadata(step / item).item_metadata.tree
            for item in ("trained", "progress")
        )
    assert {name: leaf.shape for name, leaf in trained.items()} == TRAINED
    # Where an optimiser's moments have a frozen leaf's name, there is no array under it.
    shapes = {
        tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2:]): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(progress)
        if leaf is not None
    }
    moments = {(moment, name): shape for moment in ("mu", "nu") for name, shape in TRAINED.items()}
    counters = {("key",): (2,), ("step",): (), ("0", "count"): ()}
    assert shapes == moments | counters


def test_a_checkpoint_grows_by_what_trains_and_not_by_what_is_frozen(tmp_path):
    def size_with(trained, frozen):
        folder = tmp_path / f"{len(trained)}-{len(frozen)}"
        names = TRAINED | {f"{BLOCK}.attn_temp.more{index}.kernel": (1000,) for index in trained}
        names |= {f"frozen{index}.kernel": (1000,) for index in frozen}
        save_checkpoint(folder, make_state(trained=names), [n for n in names if "frozen" not in n])
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    none, frozen, trained = size_with([], []), size_with([], [1, 2]), size_with([1, 2], [])
    leaf = 4 * 1000
    assert frozen - none < leaf
    assert trained - none > leaf


def test_trained_leaves_are_restored_without_the_optimizer(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder / "5", tmp_path / "5")
    shutil.rmtree(tmp_path / "5" / "progress")
    like = {name: jnp.zeros(shape) for name, shape in TRAINED.items()}
    restored = restore_trained(tmp_path / "5", like)
    assert restored.keys() == like.keys()
    for name, value in restored.items():
        np.testing.assert_array_equal(value, states[5].unet.params[name], strict=True)


def test_the_newest_step_is_found(saved):
    assert latest_step(saved[0]) == 5


def test_without_a_checkpoint_there_is_no_newest_step_and_nothing_is_made(tmp_path):
    assert latest_step(tmp_path) is None
    assert latest_step(tmp_path / "missing") is None
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_checkpoint_does_not_count(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints"
    # What a killed process leaves: Orbax's temporary folder, with some of the files in it.
    shutil.copytree(folder / "5", folder / "7.orbax-checkpoint-tmp-1")
    (folder / "7.orbax-checkpoint-tmp-1" / "_CHECKPOINT_METADATA").unlink()
    (folder / ".7.partial").mkdir()
    (folder / "notes").mkdir()
    assert latest_step(folder) == 5
    state = stepped(restore_state(folder / "5", make_state(), NAMES), 2)
    save_checkpoint(folder, state, NAMES)
    assert latest_step(folder) == 7
    assert_bit_equal(restore_state(folder / "7", make_state(), NAMES), state)


def test_a_step_that_is_there_stays(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = stepped(make_state(seed=9), 5)
    save_checkpoint(tmp_path / "checkpoints", other, NAMES)
    restored = restore_state(tmp_path / "checkpoints" / "5", make_state(), NAMES)
    assert_bit_equal(restored, saved[1][5])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


WIDER = {f"{BLOCK}.attn1.to_q.kernel": (6, 6), f"{BLOCK}.attn_temp.to_out.0.bias": (6,)}
MORE = TRAINED | {f"{BLOCK}.attn_temp.to_{part}.kernel": (4, 4) for part in "qkv"}
FEWER = {f"{BLOCK}.attn1.to_q.kernel": (4, 4)}
OTHERS = {name.replace("to_q", "to_v"): shape for name, shape in TRAINED.items()}


@pytest.mark.parametrize(
    ("trained", "modules", "differing"),
    [
        pytest.param(WIDER, ("attn1.to_q", "attn_temp"), set(TRAINED), id="another width"),
        pytest.param(
            MORE, ("attn1.to_q", "attn_temp"), MORE.keys() - TRAINED, id="more modules trained"
        ),
        pytest.param(FEWER, ("attn1.to_q",), TRAINED.keys() - FEWER, id="fewer modules trained"),
        pytest.param(
            OTHERS, ("attn1.to_v", "attn_temp"), TRAINED.keys() ^ OTHERS, id="other modules trained"
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(trained, modules, differing, saved):
    path = saved[0] / "5"
    state = make_state(trained=trained, modules=modules)
    with pytest.raises(ValueError, match="not a checkpoint of this network and optimiser") as said:
        restore_state(path, state, trained)
    assert str(path) in str(said.value)
    for name in differing:
        assert name in str(said.value)
    assert "strict=False" not in str(said.value), "advice about Orbax is none for its users"


def test_a_checkpoint_of_another_optimizer_is_refused(saved):
    folder, _ = saved
    state = make_state()
    momentum = optax.sgd(1e-2, momentum=0.9)
    state = TrainState(state.unet, momentum.init(state.unet.params), state.step, state.key)
    with pytest.raises(ValueError, match="not a checkpoint of this network and optimiser") as said:
        restore_state(folder / "5", state, NAMES)
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("checkpoints/3", id="a step that was not saved"),
        pytest.param("checkpoints", id="the folder of all steps"),
        pytest.param("", id="the run"),
        pytest.param("missing/5", id="nothing"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_and_left_alone(path, saved):
    run = saved[0].parent
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match="expected a folder checkpoints/<step>"):
        restore_state(run / path, make_state(), NAMES)
    assert sorted(run.rglob("*")) == before


# The first read that fails ends Orbax's event loop, and others find it closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_refused(saved, tmp_path):
    shutil.copytree(saved[0] / "5", tmp_path / "5")
    for path in (tmp_path / "5" / "trained").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedError, match=" bytes instead of ") as said:
        restore_state(tmp_path / "5", make_state(), NAMES)
    assert len(str(said.value).splitlines()) == 1
    # One that an earlier version wrote has no digests.
    (tmp_path / "5" / "digests.json").unlink()
    with pytest.raises(DamagedError, match="trained cannot be read") as said:
        restore_state(tmp_path / "5", make_state(), NAMES)
    assert len(str(said.value).splitlines()) == 1
