PYTHON ?= python3
BIN := .venv/bin
# One word: a path with white space cannot be a script's interpreter.
HERE := $(CURDIR)

.PHONY: venv run test test-quick lint lock clean

venv: .venv/runtime

.venv/runtime: requirements.lock pyproject.toml enqueue/secure-sendmail-enqueue.in Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.11 venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@# The enqueue command starts without the virtual environment: it needs the standard library only, and speed.
	sed -e "s|@PYTHON@|$$($(BIN)/python -c 'import sys; print(sys._base_executable)')|" -e 's|@LIBRARY@|$(HERE)|' \
		enqueue/secure-sendmail-enqueue.in > $(BIN)/secure-sendmail-enqueue
	chmod 0755 $(BIN)/secure-sendmail-enqueue
	$(BIN)/python -m compileall -q enqueue
	@touch $@

.venv/development: .venv/runtime requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

run: .venv/runtime
	@$(BIN)/python tryout.py $(if $(ONCE),--once)

test: .venv/development
	@bash tests/packages.sh
	$(BIN)/python -m pytest

# Without servers: no root, no Debian packages.
test-quick: .venv/development
	$(BIN)/python -m pytest -m "not server"

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy enqueue releaser tests/servers.py

# Needs uv. The locks hold for every platform.
lock:
	echo setuptools | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate pyproject.toml - -o requirements.lock
	echo setuptools | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --extra dev pyproject.toml - -o requirements-dev.lock

clean:
	rm -rf .venv var *.egg-info
