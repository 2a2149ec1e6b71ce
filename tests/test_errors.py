"""Entry scripts end in one line: places that may not be written, readers that leave, files with a byte order mark."""

import os
import subprocess
import sys

import pytest

from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import read_json, write_json
from backbench.common.data.pictures import find_pictures


@pytest.mark.parametrize("place", ["file/scores.json", "absent/scores.json"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: write_json(tmp_path / place, {}))
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"error: {tmp_path / place}: cannot be written (")


def test_a_file_that_may_not_be_read_is_one_line_and_a_bug_keeps_its_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: tmp_path.read_bytes())
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(
        f"error: {tmp_path}: Is a directory; "
    )
    with pytest.raises(FileNotFoundError):
        run_main(lambda: (tmp_path / "absent").read_bytes())


def test_a_reader_that_leaves_ends_the_script_in_silence():
    code = "from backbench.common.base.errors import run_main; run_main(lambda: print('line\\n' * 100_000))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout.readline() == b"line\n"
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait() == 141


def test_json_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_unreadable_pictures_of_a_folder_are_left_out_and_named_ones_refused(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    assert find_pictures([tmp_path]) == [tmp_path / "good.png"]
    assert capsys.readouterr().err == f"left out: {bad}: not a readable image, or cut short\n"
    with pytest.raises(UserError, match=r"bad\.jpg: not a readable image"):
        find_pictures([tmp_path, bad])
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match=r"bad\.jpg: not a readable image"):
        find_pictures([tmp_path])


def test_a_user_without_a_home(tmp_path):
    """Libraries load; the cache folder is asked for in one line, and one that is set is taken."""
    code = (
        "import pwd\npwd.getpwuid = lambda number: {}[number]\n"  # posixpath: KeyError for an unknown user
        "import backbench.common.engine.optim\n"
        "from backbench.common.base.cache import cache_folder\n"
        "from backbench.common.base.errors import run_main\n"
        "run_main(lambda: print(cache_folder('memo')))"
    )
    unset = ("HOME", "XDG_CACHE_HOME", "BACKBENCH_CACHE")
    homeless = {name: value for name, value in os.environ.items() if name not in unset}

    def run(**env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code], env={**homeless, **env}, capture_output=True, text=True
        )

    lost, found = run(), run(BACKBENCH_CACHE=str(tmp_path))
    assert lost.returncode == 2 and lost.stderr.count("\n") == 1
    assert lost.stderr.endswith("set BACKBENCH_CACHE\n")
    assert found.stdout.strip() == str(tmp_path / "memo"), found.stderr
