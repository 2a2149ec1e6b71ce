"""The folders of a checkout as the package `backbench`; open to packages of others, as a wheel's is."""

from pathlib import Path
from pkgutil import extend_path

__path__ = extend_path([str(Path(__file__).resolve().parent)], __name__)
