"""Published data sets, downloaded with their checksums: resumable, unpacked safely, then verified.

What has no open download is not fetched: `fetch` then says where to get it and how to lay it out.
"""

import http.client
import shutil
import stat
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from backbench.common.base.errors import UserError, is_disk_full
from backbench.common.base.files import make_folder, write_text
from backbench.common.base.locks import locked
from backbench.common.base.progress import progress
from backbench.common.data.published import file_md5
from backbench.common.data.verify import verify

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
UNPACKED = 1.15  # bytes of a set by those of its archive: photographs do not shrink


@dataclass(frozen=True)
class Source:
    """A set that can be downloaded: `archives` (URL, MD5), where below the root they unpack, how it is verified."""

    archives: tuple[tuple[str, str], ...]
    folder: str
    verified: str  # a data spec, {root} being the folder it was fetched to


def sources() -> dict[str, Source]:
    """What can be fetched, by name. URLs and checksums are torchvision's, where it has them."""
    from torchvision import datasets
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    cifar = {
        name: Source(((peer.url, peer.tgz_md5),), ".", f"{name}:{{root}}/{peer.base_folder}")
        for name, peer in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100))
    }
    voc = {key: (entry["url"], entry["md5"]) for key, entry in DATASET_YEAR_DICT.items()}
    imagenette = {
        f"imagenette{suffix}": Source((archive,), ".", f"folder:{{root}}/imagenette2{suffix}")
        for suffix, archive in (
            ("", datasets.Imagenette._ARCHIVES["full"]),
            ("-320", datasets.Imagenette._ARCHIVES["320px"]),
            ("-160", datasets.Imagenette._ARCHIVES["160px"]),
        )
    }
    coco = "http://images.cocodataset.org"  # its https has another host's certificate
    return {
        **cifar,
        **imagenette,
        "voc2007": Source((voc["2007"], voc["2007-test"]), ".", "voc:{root}/VOCdevkit,year=2007"),
        "voc2012": Source((voc["2012"],), ".", "voc:{root}/VOCdevkit,year=2012,train=train,test=val"),
        "voc0712": Source((voc["2007"], voc["2007-test"], voc["2012"]), ".", "voc:{root}/VOCdevkit"),
        "coco2014": Source(
            (  # MD5 as in many public download scripts; the bucket's ETag agrees
                (f"{coco}/annotations/annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd"),
                (f"{coco}/zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3"),
                (f"{coco}/zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88"),
            ),
            "coco",
            "captions:{root}/coco",
        ),
        "cub": Source(
            (  # the authors' deposit at CaltechDATA
                (
                    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                    "97eceeb196236b17998738112f37df78",
                ),
            ),
            ".",
            "cub:{root}/CUB_200_2011",
        ),
    }


BY_HAND = {
    "imagenet": """\
ImageNet (ILSVRC2012) needs an account: https://image-net.org/challenges/LSVRC/2012/2012-downloads.php
  ILSVRC2012_img_train.tar      MD5 1d675b47d978889d74fa0da5fadfb00e
  ILSVRC2012_img_val.tar        MD5 29b22e2961454d5413ddabcf34fc5622
  ILSVRC2012_devkit_t12.tar.gz  MD5 fa75699e90414af021442c21a62c3abf
Put the three files into {root}/imagenet and let torchvision unpack and sort them:
  python -c "from torchvision.datasets import ImageNet as I; [I('{root}/imagenet', s) for s in ('train', 'val')]"
That makes {root}/imagenet/train/<wnid>/ and val/<wnid>/. Then:
  backbench verify imagenet:{root}/imagenet""",
    "imagenet-boxes": """\
The validation boxes of ILSVRC2012 are on the same page as its images (an account is needed):
  https://image-net.org/challenges/LSVRC/2012/2012-downloads.php   ILSVRC2012_bbox_val_v3.tgz
Unpack them into {root}/imagenet-boxes, a folder of XML files. Then:
  backbench verify ilsvrc:{root}/imagenet,boxes={root}/imagenet-boxes""",
    "flickr8k": """\
Flickr8k is given out on request by its authors (https://hockenmaier.cs.illinois.edu). Lay it out as
  {root}/flickr8k/images/*.jpg and {root}/flickr8k/annotations/captions_{{train,val,test}}.json in COCO's format. Then:
  backbench verify captions:{root}/flickr8k""",
}


def fetch(
    name: str, root: Path | str = "data", url_base: str | None = None, known: dict[str, Source] | None = None
) -> int:
    """Download the set `name` below `root`, unpack it and verify it; 0 when it is fine.

    Archives are kept in `root`/archives; one that is there (by hand, too) is checked, not downloaded. A killed
    download goes on where it stopped. `url_base` replaces all but the file name of each URL (a mirror). What
    cannot be downloaded is explained (returns 1). Raises UserError for an unknown name, no network, a wrong
    checksum, too small a disk and an archive that is damaged or would write outside its folder.
    """
    known = sources() if known is None else known
    root = Path(root).expanduser()
    if name in BY_HAND:
        print(BY_HAND[name].format(root=root))
        return 1
    if name not in known:
        raise UserError(
            f"fetch {name}: no such set; choose one of {', '.join(known)}; by hand: {', '.join(BY_HAND)}"
        )
    source = known[name]
    archives = make_folder(root / "archives")
    folder = make_folder(root / source.folder)
    wanted = []
    for url, md5 in source.archives:
        path = archives / urllib.parse.urlsplit(url).path.rpartition("/")[2]
        url = f"{url_base.rstrip('/')}/{path.name}" if url_base else url
        if not _unpacked(path, md5):
            wanted.append((url, path, md5))
    _need_space(root, wanted)
    for url, path, md5 in wanted:
        download(url, path, md5)
        unpack(path, folder)
        write_text(_marker(path), f"{md5} {folder}\n")
    return verify(source.verified.format(root=root))


def _marker(archive: Path) -> Path:
    return archive.with_name(archive.name + ".unpacked")


def _unpacked(archive: Path, md5: str) -> bool:
    marker = _marker(archive)
    return marker.exists() and marker.read_text(encoding="utf-8").split()[:1] == [md5]


def _need_space(root: Path, wanted: list[tuple[str, Path, str]]) -> None:
    """UserError when the disk cannot hold what is still to be downloaded and unpacked."""
    need = 0
    for url, path, _ in wanted:
        there = next((p.stat().st_size for p in (path, _part(path)) if p.exists()), 0)
        size = path.stat().st_size if path.exists() else _length(url)
        need += max(0, size - there) + int(UNPACKED * size)
    free = shutil.disk_usage(root).free
    if need > free:
        raise UserError(
            f"{root}: {need / 1e9:.1f} GB are needed to download and unpack, {free / 1e9:.1f} GB are free; "
            "free some or give another --root"
        )


def _length(url: str) -> int:
    try:
        with _open(urllib.request.Request(url, method="HEAD")) as response:
            return int(response.headers.get("Content-Length", 0))
    except urllib.error.HTTPError:
        return 0  # some servers answer GET only: the download says what is wrong


def download(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path` through `path`.part, going on where an earlier one stopped; check its MD5.

    A `path` with the right MD5 is left as it is. Raises UserError for everything that goes wrong.
    """
    with locked(path):
        if path.exists():
            if file_md5(path) == md5:
                return
            raise UserError(f"{path}: its MD5 is not the published {md5}; remove it and run again")
        part = _part(path)
        _receive(url, part)
        got = file_md5(part)
        if got != md5:
            part.unlink()
            raise UserError(
                f"{url}: MD5 {got}, published is {md5}; the download was removed: damaged, or the file was changed"
            )
        part.replace(path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _receive(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = _open(request)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # nothing is left to send: the MD5 will tell
            return
        raise UserError(f"{url}: the server answers {error.code} {error.reason}; try --url-base") from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise UserError(
                f"{url}: the server resumed at another byte than {start}; remove {part}, run again"
            )
        start = start if resumed else 0  # a server without ranges sends the whole again
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = progress(
            desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1000
        )
        try:
            with part.open("ab" if resumed else "wb") as file, bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        except (http.client.HTTPException, OSError) as error:
            if is_disk_full(error):
                raise UserError(f"{part}: no space left on its disk; free some and run again") from None
            raise UserError(_broken(url, part, total)) from None
        if total is not None and part.stat().st_size < total:
            raise UserError(_broken(url, part, total))


def _broken(url: str, part: Path, total: int | None) -> str:
    share = f" after {100 * part.stat().st_size / total:.0f} %" if total else ""
    return f"{url}: the connection broke{share}; run the same command again to go on from there"


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    request.add_header("User-Agent", "backbench")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{request.full_url}: cannot be reached ({reason}); check the network, give a mirror with --url-base, "
            "or put the file into the folder archives of --root by hand"
        ) from None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar (of any compression) or zip archive into `folder`, over what is there.

    Raises UserError for one that is damaged, for a full disk, and before a member that would land outside.
    """
    if not hasattr(tarfile, "data_filter"):  # Python before 3.11.4
        raise UserError(f"{archive}: this Python unpacks no archive safely; unpack it into {folder} by hand")
    try:
        if zipfile.is_zipfile(archive):
            _unzip(archive, folder)
        else:
            with (
                tarfile.open(archive) as tar,
                progress(tar, desc=f"unpacking {archive.name}", unit="file") as members,
            ):
                for member in members:
                    tar.extract(member, folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: refused, it would write outside {folder} ({error})") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        if is_disk_full(error):
            raise UserError(
                f"{folder}: no space left while unpacking {archive.name}; free some, run again"
            ) from None
        raise UserError(f"{archive}: cannot be unpacked ({error}); remove it and run again") from None


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(
                    f"{archive}: refused, its member {member.filename} would write outside {folder}"
                )
        for member in progress(members, desc=f"unpacking {archive.name}", unit="file"):
            file.extract(member, folder)
