"""The folders of a checkout as the package `backbench`, which a wheel has by itself."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
