"""`backbench fetch` against a server on this machine: resumed, checked, unpacked, and everything that can go wrong."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from test_cifar import write_cifar

from backbench.common.base.errors import UserError
from backbench.common.cli import main as cli
from backbench.common.data import fetch as module
from backbench.common.data.fetch import BY_HAND, Source, download, fetch, sources, unpack


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; breaks off a body after `cut` bytes; answers ranges unless `ranges` is False."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.ranges = True
        self.sent: list[tuple[str, str | None, int]] = []
        self.base = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range") if self.server.ranges else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            part = data[start:][: self.server.cut]
            self.server.sent.append((self.path, self.headers.get("Range"), len(part)))
            self.wfile.write(part)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def tar_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


DATA = bytes(range(256)) * 4000


def test_a_killed_download_goes_on(server, tmp_path):
    server.files["/a.bin"], server.cut = DATA, 300_000
    target = tmp_path / "a.bin"
    with pytest.raises(
        UserError, match=r"a\.bin: the connection broke after 29 %; run the same command again"
    ):
        download(f"{server.base}/a.bin", target, md5(DATA))
    assert not target.exists() and (tmp_path / "a.bin.part").read_bytes() == DATA[:300_000]
    server.cut = None
    download(f"{server.base}/a.bin", target, md5(DATA))
    assert target.read_bytes() == DATA and not (tmp_path / "a.bin.part").exists()
    assert server.sent[1] == ("/a.bin", "bytes=300000-", len(DATA) - 300_000)
    download(f"{server.base}/a.bin", target, md5(DATA))
    assert len(server.sent) == 2  # what is there is not fetched again


def test_a_server_without_ranges_sends_the_whole_again(server, tmp_path):
    server.files["/a.bin"], server.ranges = DATA, False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    download(f"{server.base}/a.bin", tmp_path / "a.bin", md5(DATA))
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_a_whole_part_file_only_needs_its_name(server, tmp_path):
    server.files["/a.bin"] = DATA
    (tmp_path / "a.bin.part").write_bytes(DATA)
    download(f"{server.base}/a.bin", tmp_path / "a.bin", md5(DATA))
    assert (tmp_path / "a.bin").read_bytes() == DATA and not server.sent


def test_a_wrong_checksum_is_refused_and_removed(server, tmp_path):
    server.files["/a.bin"] = DATA
    with pytest.raises(
        UserError, match=f"MD5 {md5(DATA)}, published is {md5(b'')}; the download was removed"
    ):
        download(f"{server.base}/a.bin", tmp_path / "a.bin", md5(b""))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    (tmp_path / "a.bin").write_bytes(b"by hand")
    with pytest.raises(UserError, match="its MD5 is not the published"):
        download(f"{server.base}/a.bin", tmp_path / "a.bin", md5(DATA))
    assert (tmp_path / "a.bin").read_bytes() == b"by hand"


def test_no_server_and_no_file_are_one_line(server, tmp_path):
    with pytest.raises(UserError, match="the server answers 404"):
        download(f"{server.base}/none", tmp_path / "none", md5(b""))
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*--url-base") as caught:
        fetch("cifar10", tmp_path, url_base=server.base)
    assert "\n" not in str(caught.value)


def cifar_source(server, tmp_path) -> dict[str, Source]:
    folder = write_cifar(tmp_path / "made", "cifar10", "python")
    data = tar_of(**{f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()})
    server.files["/mirror/cifar-10-python.tar.gz"] = data
    published = sources()["cifar10"]
    return {"cifar10": Source(((published.archives[0][0], md5(data)),), published.folder, published.verified)}


def test_fetch_downloads_unpacks_and_verifies(server, tmp_path, capsys, monkeypatch):
    known = cifar_source(server, tmp_path)
    monkeypatch.setattr(module, "sources", lambda: known)
    command = ["fetch", "cifar10", "--root", str(tmp_path / "data"), "--url-base", f"{server.base}/mirror/"]
    assert cli._main(command) == 1  # the toy set is not the published one, and verify says so
    out = capsys.readouterr().out
    assert "a subset: 20 of the 50,000 train images" in out and "its MD5 is not the published one" in out
    archive = tmp_path / "data" / "archives" / "cifar-10-python.tar.gz"
    assert (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").is_file() and archive.is_file()
    archive.unlink()  # unpacked before: the archive may go
    cli._main(command)
    assert len(server.sent) == 1


def test_an_archive_put_there_by_hand_is_used(server, tmp_path):
    known = cifar_source(server, tmp_path)
    archives = tmp_path / "data" / "archives"
    archives.mkdir(parents=True)
    (archives / "cifar-10-python.tar.gz").write_bytes(server.files["/mirror/cifar-10-python.tar.gz"])
    fetch("cifar10", tmp_path / "data", "http://127.0.0.1:9", known)
    assert (tmp_path / "data" / "cifar-10-batches-py" / "batches.meta").is_file() and not server.sent


def test_the_disk_is_looked_at_first(server, tmp_path, monkeypatch):
    known = cifar_source(server, tmp_path)
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"GB are needed to download and unpack, 0\.0 GB are free"):
        fetch("cifar10", tmp_path / "data", f"{server.base}/mirror", known)
    assert not server.sent


def zip_of(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return path


def test_archives_that_write_outside_are_refused(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("../out.txt", "/out.txt", "a/../../out.txt"):
        bad = tmp_path / "bad.tar.gz"
        bad.write_bytes(tar_of(**{name: b"x"}))
        if not name.startswith("/"):  # tarfile's data filter strips a leading slash and stays inside
            with pytest.raises(UserError, match="refused, it would write outside"):
                unpack(bad, folder)
        with pytest.raises(UserError, match=r"refused, its member .*out.txt would write outside"):
            unpack(zip_of(tmp_path / "bad.zip", **{"good.txt": "y", name: "x"}), folder)
    assert not list(folder.iterdir()) and not (tmp_path / "out.txt").exists()
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        tar.addfile(link)
    with pytest.raises(UserError, match="refused"):
        unpack(tmp_path / "link.tar", folder)


def test_unpacks_zip_and_says_what_is_damaged(tmp_path):
    unpack(zip_of(tmp_path / "good.zip", **{"train2014/a.txt": "x"}), tmp_path / "out")
    assert (tmp_path / "out" / "train2014" / "a.txt").read_text() == "x"
    data = tar_of(a=DATA)
    for name, content in (("cut.tgz", data[: len(data) // 2]), ("text.tgz", b"hello"), ("empty.tgz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be unpacked"):
            unpack(tmp_path / name, tmp_path / "out")


def test_names(tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"fetch mnist: no such set; choose one of cifar10, .*by hand: imagenet"
    ):
        fetch("mnist", tmp_path)
    for name in BY_HAND:
        assert fetch(name, tmp_path) == 1
        assert str(tmp_path) in capsys.readouterr().out
    for source in sources().values():
        assert all(url.startswith("http") and len(md5) == 32 for url, md5 in source.archives)
