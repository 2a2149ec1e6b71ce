"""What a file is by its first bytes, and what to do with one that holds no weights as they are read here."""

import tarfile
import zipfile
from pathlib import Path

from backbench.common.base.errors import UserError

FOREIGN = (  # offset, bytes there, what such a file is, what to do
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights", "run git lfs pull"),
    (0, b"<?xml", "an XML text, not a checkpoint", "give the file with the weights"),
    (0, b"<", "a web page, not a checkpoint (a download that failed?)", "fetch it again"),
    (0, b"{", "a JSON text, not a checkpoint", "give the file with the weights"),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it (gunzip) and give what is in it"),
    (0, b"BZh", "compressed with bzip2", "unpack it (bunzip2) and give what is in it"),
    (0, b"\xfd7zXZ\0", "compressed with xz", "unpack it (unxz) and give what is in it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it (unzstd) and give what is in it"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it and give what is in it"),
    (0, b"Rar!", "a RAR archive", "unpack it and give what is in it"),
    (
        0,
        b"\x93NUMPY",
        "one numpy array (.npy), not a network",
        "give a checkpoint with the names of its layers",
    ),
    (
        0,
        b"\x89HDF\r\n",
        "an HDF5 file (Keras or TensorFlow)",
        "convert it to a PyTorch state dict, e.g. with the script of the network's authors",
    ),
    (4, b"TFL3", "a TensorFlow Lite network", "give the PyTorch checkpoint it was made from"),
    (0, b"GGUF", "a GGUF file", "give the PyTorch checkpoint it was made from"),
)
BY_NAME = {  # ends of names of files that no bytes tell
    ".onnx": (
        "an ONNX network: a graph whose weights have lost their names",
        "the checkpoint it was exported from",
    ),
    ".msgpack": (
        "Flax's weights (msgpack)",
        "the PyTorch weights beside them, or convert them to a state dict",
    ),
    ".pb": ("a TensorFlow graph", "a PyTorch checkpoint"),
    ".index": ("a part of a TensorFlow checkpoint", "a PyTorch checkpoint"),
    ".meta": ("a part of a TensorFlow checkpoint", "a PyTorch checkpoint"),
    ".data-00000-of-00001": ("a part of a TensorFlow checkpoint", "a PyTorch checkpoint"),
    ".caffemodel": ("a Caffe network", "the same weights converted to PyTorch"),
    ".params": ("MXNet's weights", "the same weights converted to PyTorch"),
    ".t7": ("a Lua Torch file", "the same weights converted to PyTorch"),
}


def refuse_foreign(path: Path) -> None:
    """Raise UserError with what a file is and what to do where it is none of the files that are read here."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(
            f"{path}: an empty file (a download or a write that failed?); fetch or write it again"
        )
    for offset, magic, what, advice in FOREIGN:
        if (head if offset else head.lstrip())[offset:].startswith(magic) and not is_safetensors(head):
            raise UserError(f"{path}: {what}; {advice}")
    if zipfile.is_zipfile(path):
        _refuse_zip(path)
    elif head[:1] == b"\x80" or is_safetensors(head):  # a pickle, whatever its name
        return
    for ending, (what, advice) in BY_NAME.items():
        if path.name.endswith(ending):
            raise UserError(f"{path}: {what}; give {advice}")
    if head[:1] == b"\x08" and b"\x12" in head[2:5]:
        what, advice = BY_NAME[".onnx"]
        raise UserError(f"{path}: {what}; give {advice}")
    if tarfile.is_tarfile(path):
        _refuse_tar(path)


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so is a safetensors file: the size of a JSON header, and its brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _refuse_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    parts = {name.partition("/")[2] for name in names}
    if "constants.pkl" in parts or any(part.startswith("code/") for part in parts):
        raise UserError(
            f"{path}: a TorchScript archive (weights with code); if you trust it, save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if "data.pkl" in parts:
        return  # torch.save's
    if any("archive_format" in part or part.startswith("serialized_") for part in (*parts, *names)):
        raise UserError(
            f"{path}: a program of torch.export; save the state dict of the network it was made from"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(
            f"{path}: arrays of numpy ({', '.join(names[:3])} …), the weights of another library; "
            "convert them to a PyTorch state dict"
        )
    weights = [
        name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar"))
    ]
    if weights:
        raise UserError(f"{path}: a zip archive; unpack it and give {weights[0]}")
    some = f"{', '.join(names[:3])}{' …' if names[3:] else ''}" or "nothing"
    raise UserError(f"{path}: a zip archive of something else ({some}), not a checkpoint")


def _refuse_tar(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = archive.getnames()
    if {"pickle", "storages", "tensors"} <= set(names):
        raise UserError(
            f"{path}: written by PyTorch 0.1.9 or older (a tar); if you trust it, write it again: "
            "torch.save(torch.load(FILE, weights_only=False), 'weights.pt')"
        )
    some = f"{', '.join(names[:3])}{' …' if names[3:] else ''}"
    raise UserError(f"{path}: a tar archive ({some}); unpack it and give the file with the weights")
