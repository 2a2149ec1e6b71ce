PYTHON ?= python3

demo: .venv/demo ## four pretrainings, five backbones × four tasks, a board and a report, on embedded data
	.venv/bin/backbench demo

test: .venv/test ## lint, format and the whole suite
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile

.venv/demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -e .
	touch $@

.venv/test: .venv/demo
	.venv/bin/pip install --quiet -e '.[test]'
	touch $@

.PHONY: demo test
