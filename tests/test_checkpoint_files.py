"""Files of checkpoints: every way to write plain weights is read, nothing runs, anything else gets its one line."""

import collections
import gzip
import io
import os
import pathlib
import pickle
import tarfile
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from backbench.common.backbones.checkpoint import read_checkpoint, tensors_of
from backbench.common.base.errors import UserError

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def content():
    """Weights as training code leaves them: parameters, views, shared and empty storages, facts beside them."""
    whole = torch.arange(24.0).reshape(4, 6)
    weights = OrderedDict(
        whole=whole,
        view=whole[1:3, ::2],
        turned=whole.T,
        half=torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        count=torch.tensor(7),
        none=torch.empty(0, 3),
        parameter=nn.Parameter(torch.ones(2, 2)),
    )
    weights._metadata = {"": {"version": 1}}
    facts = {"epoch": 3, "args": Namespace(arch="resnet50", lr=0.3), "best": np.float64(21.4), "seen": {1, 2}}
    return {"state_dict": weights, "names": ["ant", "bee"], "size": torch.Size([3, 4]), **facts}


def equal(found, wanted):
    assert list(found["state_dict"]) == list(wanted["state_dict"])
    for key, value in wanted["state_dict"].items():
        assert found["state_dict"][key].dtype == value.dtype and torch.equal(
            found["state_dict"][key], value
        ), key
    for key in wanted.keys() - {"state_dict", "args"}:
        assert found[key] == wanted[key], key
    assert vars(found["args"]) == vars(wanted["args"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_plain_weights_of_every_pickle_protocol(tmp_path, how, protocol):
    path = tmp_path / "x.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content(), protocol))
    else:
        torch.save(content(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "zip")
    equal(read_checkpoint(path), content())


class Python2(pickle._Pickler):
    """Writes texts as Python 2 did: as bytes without an encoding."""

    def save_text(self, text):
        raw = text.encode("latin1")
        short = len(raw) < 256
        self.write((b"U" if short else b"T") + len(raw).to_bytes(1 if short else 4, "little") + raw)
        self.memoize(text)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, str: save_text}


def python2_dump(value, file, protocol=2):
    Python2(file, 2, fix_imports=True).dump(value)


@pytest.mark.parametrize("extra", ["plain", "André", "x" * 300])
def test_files_of_python_2(tmp_path, extra):
    wanted = {**content(), "author": extra}
    module = types.SimpleNamespace(Pickler=Python2, dump=python2_dump, __name__="cPickle")
    torch.save(wanted, tmp_path / "x.pth", pickle_module=module, _use_new_zipfile_serialization=False)
    equal(read_checkpoint(tmp_path / "x.pth"), wanted)


ARRAYS = {
    "conv": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(3, dtype=">f4"),
    "half": np.ones(2, np.float16),
    "count": np.array(5),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_numpy_arrays(tmp_path, protocol):
    wanted = {"model": ARRAYS, "__author__": "Detectron2 Model Zoo", "names": np.array(["a", "b"])}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(wanted, protocol))
    found = read_checkpoint(tmp_path / "x.pkl")
    tensors = tensors_of(found)
    assert found["__author__"] == "Detectron2 Model Zoo" and len(tensors) == len(ARRAYS)
    for key, array in ARRAYS.items():
        assert (
            tensors[f"model.{key}"].dtype
            == torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).dtype
        )
        assert np.array_equal(tensors[f"model.{key}"].numpy(), array)


@pytest.mark.parametrize("protocol", [2, 4])
def test_settings_with_paths_and_defaultdicts(tmp_path, protocol):
    settings = {"out": pathlib.Path("/a/b"), "state": collections.defaultdict(dict, {"x": 1})}
    torch.save(settings, tmp_path / "x.pth", pickle_protocol=protocol)
    assert read_checkpoint(tmp_path / "x.pth") == {"out": "/a/b", "state": {"x": 1}}


def test_arrays_of_python_2(tmp_path):
    """R-50.pkl and kin: raw bytes written as a text."""
    with (tmp_path / "x.pkl").open("wb") as file:
        pickler = Python2(file, 2)
        pickler.dispatch_table = {np.ndarray: _as_python_2}
        pickler.dump({"blobs": {"conv1_w": np.linspace(-1, 1, 500, dtype=np.float32)}})
    found = tensors_of(read_checkpoint(tmp_path / "x.pkl"))["blobs.conv1_w"]
    assert np.array_equal(found.numpy(), np.linspace(-1, 1, 500, dtype=np.float32))


def _as_python_2(array):
    function, args, (version, shape, dtype, fortran, raw) = array.__reduce__()
    return function, args, (version, shape, dtype, fortran, raw.decode("latin1"))


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args, state)[: 2 if state is None else 3]

    def __reduce__(self):
        return self.parts


def stolen(**changes):
    raise AssertionError("code of a file ran")


EVIL = {
    "a call": Call(print, "code ran"),
    "a call of the system": Call(os.system, "echo code ran"),
    "a function of torch": Call(torch.hub.load_state_dict_from_url, "http://x"),
    "an own class": Namespace(a=stolen),
    "an array of objects": np.array([Call(print, "code ran")], dtype=object),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("what", EVIL)
def test_no_code_of_a_file_runs(tmp_path, capfd, what, protocol):
    evil = {"state_dict": {"conv1.weight": torch.ones(2)}, "more": EVIL[what]}
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(evil, protocol))
    paths = [tmp_path / "evil.pkl"]
    for zipped in (True, False):
        paths.append(tmp_path / f"{zipped}.pt")
        torch.save(evil, paths[-1], pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=zipped)
    for path in paths:
        with pytest.raises(UserError, match=r"could run code \(|not a PyTorch checkpoint") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    assert "code ran" not in "".join(capfd.readouterr())


def test_what_a_file_names_cannot_be_altered(tmp_path):
    """BUILD sets attributes of whatever stands on the stack: neither functions nor classes of the table let it."""
    for name in (b"collections\nOrderedDict", b"argparse\nNamespace", b"torch._utils\n_rebuild_tensor_v2"):
        raw = b"\x80\x02c" + name + b"\nN}X\x08\x00\x00\x00__call__K\x01s\x86b."
        (tmp_path / "x.pkl").write_bytes(raw)
        with pytest.raises(UserError):
            read_checkpoint(tmp_path / "x.pkl")
    assert "__call__" not in vars(OrderedDict) and "__call__" not in vars(Namespace)
    dtype = (
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f8K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00|NNNK\x08K\x08K?tb."
    )
    (tmp_path / "x.pkl").write_bytes(dtype)
    assert not isinstance(read_checkpoint(tmp_path / "x.pkl"), np.dtype)
    (tmp_path / "x.pkl").write_bytes(
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x04\x00\x00\x00evil\x86R."
    )
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "x.pkl")


def test_a_tensor_that_reaches_past_its_storage(tmp_path):
    raw = io.BytesIO()
    torch.save(content(), raw, pickle_protocol=4)
    with zipfile.ZipFile(raw) as archive, zipfile.ZipFile(tmp_path / "x.pt", "w") as other:
        for name in archive.namelist():
            cut = name.endswith("data/0")
            other.writestr(name, archive.read(name)[: 8 if cut else None])
    with pytest.raises(UserError, match="truncated or damaged"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "safetensors"])
def test_a_file_cut_anywhere_is_one_line(tmp_path, how):
    path = tmp_path / f"x.{'safetensors' if how == 'safetensors' else 'pt'}"
    state = {"conv1.weight": torch.ones(30), "bn1.weight": torch.zeros(30)}
    if how == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(state, 4))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    whole = path.read_bytes()
    for share in (*range(1, 80), *range(80, len(whole) - 1, 53), len(whole) - 1):
        path.write_bytes(whole[:share])
        with pytest.raises(UserError) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        if share > 9:
            assert "truncated or damaged" in str(error.value)


ODD = {
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_no_network_takes_is_named(tmp_path, kind, protocol):
    state = {"state_dict": {"conv1.weight": torch.ones(2), "layer1.0.conv1.weight": ODD[kind]()}}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match=rf"x.pt: state_dict.layer1.0.conv1.weight is a {kind} tensor; \w+"):
        read_checkpoint(tmp_path / "x.pt")


def zipped(*names):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name in names:
            archive.writestr(name, "1")
    return raw.getvalue()


def tarred(*names):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return raw.getvalue()


def saved(write):
    raw = io.BytesIO()
    write(raw)
    return raw.getvalue()


FOREIGN = {
    "empty.pt": (b"", "an empty file"),
    "page.pth": (b"\n<!DOCTYPE html><html>404</html>", "a web page, not a checkpoint"),
    "pointer.pth": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "index.safetensors": (b'{"weight_map": {}}', "a JSON text"),
    "text.pt": (b"not a checkpoint", "not a PyTorch checkpoint"),
    "x.pth.gz": (gzip.compress(b"x"), "compressed with gzip; unpack it"),
    "x.npz": (saved(lambda f: np.savez(f, conv1=np.ones(3))), r"arrays of numpy \(conv1.npy"),
    "x.npy": (saved(lambda f: np.save(f, np.ones(3))), "one numpy array"),
    "x.zip": (zipped("x.pth"), "a zip archive; unpack it and give x.pth"),
    "pictures.zip": (zipped("a.jpg"), r"a zip archive of something else \(a.jpg\)"),
    "clip.pt": (
        zipped("RN50/data.pkl", "RN50/constants.pkl", "RN50/code/__torch__/x.py"),
        "a TorchScript archive",
    ),
    "old.pth": (tarred("sys_info", "pickle", "storages", "tensors"), "PyTorch 0.1.9 or older"),
    "x.tar": (tarred("model.pth"), r"a tar archive \(model.pth\); unpack it"),
    "x.h5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
    "x.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x032.0" + bytes(60), "an ONNX network"),
    "unnamed": (b"\x08\x07\x12\x07pytorch\x1a\x032.0" + bytes(60), "an ONNX network"),
    "flax_model.msgpack": (b"\x81\xa6params" + bytes(60), "Flax's weights"),
    "x.tflite": (b"\x1c\0\0\0TFL3" + bytes(60), "a TensorFlow Lite network"),
    "model.ckpt.data-00000-of-00001": (bytes(99), "a part of a TensorFlow checkpoint"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_every_other_file_is_called_what_it_is(tmp_path, name):
    raw, message = FOREIGN[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_safetensors_under_any_name(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"conv1.weight": torch.ones(3)}, tmp_path / "model.bin")
    assert torch.equal(read_checkpoint(tmp_path / "model.bin")["state_dict"]["conv1.weight"], torch.ones(3))
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "x.safetensors")  # and the reverse
    assert torch.equal(read_checkpoint(tmp_path / "x.safetensors")["conv1.weight"], torch.ones(3))
