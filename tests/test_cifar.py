"""CIFAR from its published files: both versions, against torchvision's reader, and files that are not CIFAR."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from backbench.common.base.errors import UserError
from backbench.common.data import open_classification, open_detection, parse_data
from backbench.common.data.readers.cifar import BATCHES

NAMES = {"cifar10": [f"class{n}" for n in range(10)], "cifar100": [f"fine{n}" for n in range(100)]}


def python2_pickle(content: dict) -> bytes:
    """What Python 2's cPickle wrote: byte strings, and arrays rebuilt by numpy.core from a byte string."""

    def encode(value) -> bytes:
        if isinstance(value, np.ndarray):
            shape = b"(" + b"".join(b"I%d\n" % n for n in value.shape) + b"t"
            return (
                b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
                + shape
                + b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
                + encode(value.tobytes())
                + b"tb"
            )
        if isinstance(value, int):
            return b"I%d\n" % value
        if isinstance(value, list):
            return b"(" + b"".join(map(encode, value)) + b"l"
        data = value.encode("latin1") if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(data)) + data

    return b"\x80\x02}(" + b"".join(encode(k) + encode(v) for k, v in content.items()) + b"u."


def batch(seed: int, count: int, kind: str) -> dict:
    rng = np.random.default_rng(seed)
    labels = {"labels": rng.integers(10, size=count).tolist()}
    if kind == "cifar100":
        labels = {
            "coarse_labels": rng.integers(20, size=count).tolist(),
            "fine_labels": rng.integers(100, size=count).tolist(),
        }
    data = rng.integers(0, 256, (count, 3072)).astype(np.uint8)
    return {
        "batch_label": f"batch {seed}",
        **labels,
        "data": data,
        "filenames": [f"{i}.png" for i in range(count)],
    }


def write_cifar(root: Path, kind: str, version: str, dump=python2_pickle) -> Path:
    """A CIFAR of 4 images a file in the published layout. Returns its folder."""
    parts = [*BATCHES, "test_batch"] if kind == "cifar10" else ["train", "test"]
    folder = {
        ("cifar10", "python"): "cifar-10-batches-py",
        ("cifar10", "binary"): "cifar-10-batches-bin",
        ("cifar100", "python"): "cifar-100-python",
        ("cifar100", "binary"): "cifar-100-binary",
    }
    folder = root / folder[kind, version]
    folder.mkdir(parents=True)
    for seed, name in enumerate(parts):
        content = batch(seed, 4, kind)
        if version == "python":
            (folder / name).write_bytes(dump(content))
            continue
        columns = [content[key] for key in ("labels", "coarse_labels", "fine_labels") if key in content]
        records = np.column_stack([*columns, content["data"]]).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    names = NAMES[kind]
    if version == "python":
        meta = (
            {"label_names": names}
            if kind == "cifar10"
            else {"fine_label_names": names, "coarse_label_names": []}
        )
        (folder / ("batches.meta" if kind == "cifar10" else "meta")).write_bytes(dump(meta))
    else:
        file = "batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"
        (folder / file).write_text("\n".join(names) + "\n\n")
    return folder


def fails(call, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_equals_torchvision_and_the_binary_version(kind, tmp_path):
    folder = write_cifar(tmp_path / "py", kind, "python")
    train, test = open_classification(f"{kind}:{tmp_path / 'py'}")
    peer = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]

    Peer = type(
        "Peer",
        (peer,),
        {
            "train_list": [(name, None) for name, _ in peer.train_list],
            "test_list": [(name, None) for name, _ in peer.test_list],
            "meta": {**peer.meta, "md5": None},
        },
    )
    for part, images in ((True, train), (False, test)):
        theirs = Peer(tmp_path / "py", train=part)
        assert np.array_equal(images.pixels, theirs.data) and images.pixels.dtype == np.uint8
        assert images.labels.tolist() == theirs.targets and images.classes == theirs.classes == NAMES[kind]
        assert np.array_equal(images.read(1), np.asarray(theirs[1][0]))
    assert len(train) == (20 if kind == "cifar10" else 4) and len(test) == 4
    assert (train.name, train.ids[1], test.ids[0]) == (kind, "train/00001", "test/00000")
    assert train.paths[0].parent == folder and len(train.paths) == len(train)
    write_cifar(tmp_path / "bin", kind, "binary")
    again = open_classification(f"{kind}:{tmp_path / 'bin'}")
    for ours, other in zip((train, test), again):
        assert np.array_equal(ours.pixels, other.pixels) and ours.labels.tolist() == other.labels.tolist()
        assert (ours.fingerprint, ours.ids, ours.classes) == (other.fingerprint, other.ids, other.classes)
    assert train.fingerprint != test.fingerprint


@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_python_3_wrote(protocol, tmp_path):
    write_cifar(tmp_path / "a", "cifar10", "python")
    write_cifar(tmp_path / "b", "cifar10", "python", lambda content: pickle.dumps(content, protocol))
    first, second = (open_classification(f"cifar10:{tmp_path / name}")[0] for name in "ab")
    assert np.array_equal(first.pixels, second.pixels) and first.fingerprint == second.fingerprint


def test_folder_or_parent_limit_and_report(tmp_path):
    folder = write_cifar(tmp_path, "cifar10", "binary")
    write_cifar(tmp_path, "cifar100", "python")
    direct, parent = (open_classification(f"cifar10:{where}")[0] for where in (folder, tmp_path))
    assert direct.fingerprint == parent.fingerprint
    assert len(open_classification(f"cifar100:{tmp_path},name=few")[0].classes) == 100
    few, _ = open_classification(f"cifar10:{folder}", limit=3)
    assert len(few) == 3 and few.pixels.shape == (3, 32, 32, 3) and few.fingerprint != direct.fingerprint
    at = direct.ids.index(few.ids[2])
    assert np.array_equal(few.pixels[2], direct.pixels[at]) and few.labels[2] == direct.labels[at]
    assert "20 images; the published train part has 50000" in direct.report[0]


def test_a_changed_pixel_changes_the_fingerprint(tmp_path):
    folder = write_cifar(tmp_path, "cifar10", "binary")
    before = open_classification(f"cifar10:{folder}")[0].fingerprint
    file = folder / "data_batch_3.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    assert open_classification(f"cifar10:{folder}")[0].fingerprint != before


def test_refuses_code_and_foreign_pickles(tmp_path):
    folder = write_cifar(tmp_path, "cifar10", "python")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    def with_batch(data: bytes) -> None:
        (folder / "data_batch_2").write_bytes(data)
        open_classification(f"cifar10:{folder}")

    good = batch(1, 4, "cifar10")
    fails(lambda: with_batch(pickle.dumps({"data": Evil()})), "data_batch_2", "mkdir", "could run code")
    assert not marker.exists()
    for wrong, part in (
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (pickle.dumps({**good, "data": good["data"].astype(np.float32)}, 2), "an array of 'f4'"),
        (pickle.dumps({**good, "data": np.array([None])}, 2), "an array of 'O8'"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({**good, "data": good["data"][:, :100]}, 2), "no 'data' of n × 3072"),
        (pickle.dumps({**good, "labels": ["a"] * 4}, 2), "no list of whole numbers"),
        (pickle.dumps({**good, "labels": [1, 2]}, 2), "4 images but 2 labels"),
        (pickle.dumps({**good, "labels": [1, 2, 10, 4]}, 2), "image 2 has label 10, there are 10 classes"),
        (python2_pickle(good)[:5000], "cut short"),
        (b"", "cut short"),
        (b"hello world", "cut short or no pickle"),
    ):
        fails(lambda wrong=wrong: with_batch(wrong), "data_batch_2", part)


def test_missing_truncated_and_foreign_files(tmp_path):
    folder = write_cifar(tmp_path, "cifar10", "binary")
    file = folder / "data_batch_4.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    fails(
        lambda: open_classification(f"cifar10:{folder}"), "data_batch_4.bin", "3073-byte records", "cut short"
    )
    file.write_bytes(b"\x0b" + whole[1:])
    fails(lambda: open_classification(f"cifar10:{folder}"), "data_batch_4.bin", "image 0 has label 11")
    file.unlink()
    fails(
        lambda: open_classification(f"cifar10:{folder}"),
        "data_batch_4.bin",
        "no such file",
        "data_batch_5.bin",
    )
    fails(lambda: open_classification(f"cifar100:{folder}"), "is cifar10, not cifar100", "cifar10:")
    fails(
        lambda: open_classification(f"cifar10:{tmp_path / 'none'}"), "no such folder", "cifar-10-batches-py/"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").touch()
    fails(
        lambda: open_classification(f"cifar100:{tmp_path / 'other'}"),
        "no cifar100",
        "x.txt",
        "cifar-100-python/",
    )
    fails(lambda: parse_data("cifar10"), "no path", "cifar10:DIR")
    fails(lambda: parse_data("cifar10:/x,train=a"), "'train' is no option of cifar10")
    fails(lambda: open_detection(f"cifar10:{folder}"), "detection does not read 'cifar10'")
