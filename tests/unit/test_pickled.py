"""Pickled checkpoints: what PyTorch writes is read, and nothing else that a pickle may ask for."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tav_jax.errors import UserError
from tav_jax.pretrained.pickled import plain_tensors, read_pickled

PUBLISHED = Path(__file__).parents[1] / "golden/tuned/unet/diffusion_pytorch_model.bin"


class Global:
    """A global that is pickled by its name alone."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, *arguments):
        return Call(self, arguments)


class Call:
    """What calling a global gives, or what a storage is, with the state that is set afterwards."""

    def __init__(self, function, arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state


class Pickler(pickle._Pickler):  # the one in Python can be taught to name what is not there
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, obj):
        return obj.arguments if isinstance(obj, Call) and obj.function is None else None

    def save_global_by_name(self, obj):
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(b"R")
        if obj.state is not None:
            self.save(obj.state)
            self.write(b"b")

    dispatch[Global] = save_global_by_name
    dispatch[Call] = save_call


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
FLOATS = Global("torch", "FloatStorage")
NUMBERS = np.arange(6, dtype=np.float32)


def storage(key="0", kind=FLOATS, numel=6, what="storage"):
    return Call(None, (what, kind, key, "cpu", numel))


def tensor(size=(2, 3), stride=(3, 1), offset=0, of=None):
    return REBUILD(of or storage(), offset, size, stride, False, OrderedDict())


def write(path, tree, storages=None, *, root="model", order=b"little", compression=0):
    """Writes a checkpoint as PyTorch does, of a tree of tensors and anything else."""
    pickled = io.BytesIO()
    Pickler(pickled, 2).dump(tree)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled.getvalue())
        archive.writestr(f"{root}/byteorder", order)
        for key, content in ({"0": NUMBERS.tobytes()} if storages is None else storages).items():
            archive.writestr(f"{root}/data/{key}", content)
    return path


def test_a_made_up_checkpoint_is_read(tmp_path):
    tree = OrderedDict(
        whole=tensor(),
        turned=tensor((3, 2), (1, 3)),
        part=tensor((2,), (2,), 1),
        number=tensor((), (), 5),
        none=tensor((0, 3), (3, 1)),
        trained=Global("torch._utils", "_rebuild_parameter")(tensor(), True, OrderedDict()),
    )
    read = read_pickled(write(tmp_path / "x.bin", tree))
    whole = NUMBERS.reshape(2, 3)
    expected = {
        "whole": whole,
        "turned": whole.T,
        "part": NUMBERS[[1, 3]],
        "number": NUMBERS[5],
        "none": np.empty((0, 3)),
        "trained": whole,
    }
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value)
        assert not read[name].flags.writeable or not read[name].size


@pytest.mark.parametrize(
    "name", ["DoubleStorage", "HalfStorage", "BFloat16Storage", "FloatStorage", "LongStorage"]
)
def test_types_are_those_of_pytorch(tmp_path, name):
    torch = pytest.importorskip("torch")
    kind = {"Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Float": "float32"}
    values = torch.arange(-3, 9).reshape(3, 4) / 7
    values = values.to(getattr(torch, kind.get(name.removesuffix("Storage"), "int64")))
    path = tmp_path / "x.bin"
    torch.save({"position_ids": values, "turned": values.T, "part": values[1:, ::2]}, path)
    read = dict(plain_tensors(path, ["position_ids", "turned", "part"]))
    as_numpy = values.float() if name == "BFloat16Storage" else values
    np.testing.assert_array_equal(read["position_ids"], as_numpy.numpy())
    np.testing.assert_array_equal(read["turned"], as_numpy.T.numpy())
    np.testing.assert_array_equal(read["part"], as_numpy[1:, ::2].numpy())


def test_the_published_one_is_read_from_the_file_as_it_lies():
    read = read_pickled(PUBLISHED)
    assert len(read) > 100
    assert all(value.base is not None for value in read.values()), "nothing is copied"


class Runs:
    """Pickled, it asks for a function to be called when it is read."""

    def __init__(self, function, *arguments):
        self.asked = function, arguments

    def __reduce__(self):
        return self.asked


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (Runs(os.system, "touch harm"), r"(posix|nt)\.system"),
        (Runs(eval, "open('harm', 'w')"), r"(builtins|__builtin__)\.eval"),
        (Runs(exec, "open('harm', 'w')"), r"(builtins|__builtin__)\.exec"),
        (Runs(getattr, dict, "keys"), r"(builtins|__builtin__)\.getattr"),
        (Runs(__import__, "antigravity"), r"(builtins|__builtin__)\.__import__"),
        (Runs(bytes.fromhex, "00"), r"getattr|fromhex|bytes"),
        (Runs(zipfile.ZipFile, "harm", "w"), r"zipfile.*ZipFile"),
        (Global("torch.nn.modules.linear", "Linear"), r"torch\.nn\.modules\.linear\.Linear"),
        (Global("torch", "load"), r"torch\.load"),
        (Global("numpy.core.multiarray", "_reconstruct"), r"numpy\.core\.multiarray\._reconstruct"),
        (Global("collections", "Counter"), r"collections\.Counter"),
        (Global("torch._utils", "_rebuild_sparse_tensor"), "_rebuild_sparse_tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_pickle_asks_to_run_is_named_and_not_run(tmp_path, monkeypatch, harm, named):
    monkeypatch.chdir(tmp_path)
    if isinstance(harm, Runs):
        pickled = pickle.dumps({"weight": harm}, 2)
        with zipfile.ZipFile("x.bin", "w") as archive:
            archive.writestr("model/data.pkl", pickled)
    else:
        write(tmp_path / "x.bin", {"weight": harm})
    with pytest.raises(UserError, match=f"x.bin: not a file of plain tensors: .*{named}"):
        read_pickled(Path("x.bin"))
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        tensor((7,), (1,)),
        tensor((2, 3), (3, 1), 1),
        tensor((2, 3), (4, 1)),
        tensor((2, 3), (3, -1)),
        tensor((2, 3), (3, 1), -1),
        tensor((10**6, 10**6), (0, 0)),
        tensor((2, 3), (3,)),
        tensor((1,) * 9, (1,) * 9),
        tensor((2.0, 3), (3, 1)),
        tensor((True, 3), (3, 1)),
        tensor("ab", "ab"),
        tensor(of=storage(numel=7)),
        tensor(of=storage(numel=-6)),
        tensor(of=storage(numel=10**12)),
        tensor(of=storage("1")),
        tensor(of=storage("../data.pkl")),
        tensor(of=storage(7)),
        tensor(of=storage(kind="FloatStorage")),
        tensor(of=storage(kind=Global("torch", "HalfStorage"))),
        tensor(of=storage(what="module")),
        tensor(of="0"),
        tensor(of=tensor()),
        REBUILD(),
        Global("torch._utils", "_rebuild_parameter")("x", True, OrderedDict()),
        Call(FLOATS, (3,)),
        Call(REBUILD, (storage(), 0, (6,), (1,), False, OrderedDict()), {"shape": (9, 9)}),
        FLOATS,
        storage(),
        "text",
        3,
        [tensor()],
        {"nested": tensor()},
    ],
)
def test_what_is_no_tensor_is_refused_in_one_line(tmp_path, wrong):
    path = write(tmp_path / "x.bin", {"weight": wrong, "good": tensor()})
    if wrong.__class__ is Call and wrong.function is None:
        # A storage alone is a row of numbers, which no network's parameter is by itself.
        assert read_pickled(path)["weight"].shape == (6,)
        return
    with pytest.raises(UserError) as error:
        read_pickled(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 500 + len(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tree", [[tensor()], tensor(), {3: tensor()}, {"state_dict": {}}, {"a": None}]
)
def test_only_a_dictionary_of_tensors_is_weights(tmp_path, tree):
    with pytest.raises(UserError, match="not a file of plain tensors"):
        read_pickled(write(tmp_path / "x.bin", tree))


def test_other_archives_are_refused(tmp_path):
    good = {"weight": tensor()}
    path = tmp_path / "x.bin"
    with pytest.raises(UserError, match="big-endian"):
        read_pickled(write(path, good, order=b"big"))
    with pytest.raises(UserError, match="is not as PyTorch stores it"):
        read_pickled(write(path, good, compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/other.pkl", b"")
    with pytest.raises(UserError, match=r"it has no data\.pkl"):
        read_pickled(path)
    write(path, good)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("model/data/0", NUMBERS[::-1].tobytes())
    with pytest.raises(UserError, match="'model/data/0' is in it twice"):
        read_pickled(path)
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99))
    with pytest.raises(UserError, match=r"format of PyTorch before 1\.6"):
        read_pickled(path)
    for content in (b"", b"PK", b"<html>404</html>", pickle.dumps({})):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a file of plain tensors"):
            read_pickled(path)


def test_a_file_that_is_cut_or_changed_is_read_or_refused(tmp_path):
    content = write(tmp_path / "good.bin", {"weight": tensor()}).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "x.bin"
    for case in range(400):
        changed = bytearray(content[: rng.integers(len(content))] if case % 4 == 0 else content)
        for place in rng.integers(len(changed), size=rng.integers(1, 4)) if changed else ():
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        with suppress(UserError):
            read = read_pickled(path)
            assert all(isinstance(value, np.ndarray) for value in read.values())


def test_numbers_that_are_no_floats_are_no_weights(tmp_path):
    integers = storage(kind=Global("torch", "IntStorage"))
    path = write(tmp_path / "x.bin", {"ids": tensor(of=integers), "w": tensor()})
    with pytest.raises(UserError, match="'ids' is int32; weights are plain tensors of float16"):
        dict(plain_tensors(path, ()))
    assert dict(plain_tensors(path, ("ids",)))["ids"].dtype == np.int32
