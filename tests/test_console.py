"""Output that cannot be written: odd encodings, closed descriptors, full disks, readers that leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAIN = """
import sys, warnings
from pathlib import Path
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.progress import progress

def main():
    print("score 3 ± 1 → runs/é… \\udcff")
    for _ in progress(range(3), desc="décoding ×", mininterval=0):
        print("line\\n" * 20_000)
    print("note: → λ", file=sys.stderr)
    warnings.warn("fällt auf")
    Path(sys.argv[1]).write_text("done", encoding="utf-8")
    if len(sys.argv) > 2:
        raise UserError("é: no → at all")

run_main(main)
"""


def command(result: Path, *arguments: str, flags: tuple[str, ...] = ()) -> list[str]:
    script = result.with_name("script.py")
    script.write_text(MAIN, encoding="utf-8")
    return [sys.executable, *flags, str(script), str(result), *arguments]


def env(**more: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if k != "BACKBENCH_QUIET" and not k.startswith(("LC_", "LANG"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), **more}


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "score 3 +- 1 -> runs/?... ?"),
        ({"PYTHONIOENCODING": "ascii:strict"}, "score 3 +- 1 -> runs/?... ?"),
        ({"PYTHONIOENCODING": "latin-1"}, "score 3 ± 1 -> runs/é... ?"),
        ({"PYTHONIOENCODING": "cp1252"}, "score 3 ± 1 -> runs/é… ?"),
        (C_LOCALE, "score 3 +- 1 -> runs/?... ?"),
        ({"PYTHONIOENCODING": "utf-8"}, "score 3 ± 1 → runs/é… ?"),
    ],
)
def test_every_encoding_takes_every_text(tmp_path, names, shown):
    encoding = names.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    done = subprocess.run(command(tmp_path / "a", "fail"), env=env(**names), capture_output=True)
    assert done.stdout.decode(encoding).splitlines()[0] == shown
    errors = done.stderr.decode(encoding)
    assert done.returncode == 2 and errors.splitlines()[-1].endswith("at all")
    assert "Traceback" not in errors and "3/3" in errors
    assert (tmp_path / "a").read_text() == "done"


@pytest.mark.parametrize("flags", [(), ("-u",)])
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 2, "error: the output could not be written (No space left on device)"),
        ("2>/dev/full", 0, ""),
        (">/dev/full 2>/dev/full", 2, ""),
        ("1</dev/null", 2, "error: the output could not be written (Bad file descriptor)"),
    ],
)
def test_output_that_cannot_be_written_loses_no_work(tmp_path, redirected, code, said, flags):
    shell = ["bash", "-c", f'exec "$@" {redirected}', "bash", *command(tmp_path / "a", flags=flags)]
    done = subprocess.run(shell, env=env(), capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "a").read_text()) == (code, "done")
    assert "Traceback" not in done.stderr and said in done.stderr


def test_a_file_of_a_run_is_never_its_closed_output(tmp_path):
    code = (
        "import os; from backbench.common.base.errors import run_main\n"
        f"def main():\n    with open({str(tmp_path / 'a')!r}, 'w') as f:\n"
        "        os.system('echo child'); f.write('kept')\n"
        "run_main(main)"
    )
    shell = ["bash", "-c", 'exec "$@" >&- 2>&- <&-', "bash", sys.executable, "-c", code]
    assert subprocess.run(shell, env=env()).returncode == 0
    assert (tmp_path / "a").read_text() == "kept"


def test_a_reader_that_leaves_stops_no_work(tmp_path):
    with subprocess.Popen(
        command(tmp_path / "a"), env=env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout.readline().startswith(b"score 3")
        run.stdout.close()
        assert b"Traceback" not in run.stderr.read() and run.wait() == 141
    assert (tmp_path / "a").read_text() == "done"
