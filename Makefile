# pullcache: 'make run' serves, 'make test' tests everything, 'make check' looks at the code.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LISTEN ?=
ARGS   ?=
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help run demo test check faults bench clean
help:
	@echo "make run     serve on 127.0.0.1:5000 (make run LISTEN=0.0.0.0:5000, make run ARGS='--config my.yaml')"
	@echo "make demo    what it saves, shown on this machine alone: real images, 20 clients at once, a registry that stops"
	@echo "make test    install what the tests need, and run all of them"
	@echo "make check   ruff, mypy, layers, documents"
	@echo "make faults  the long fault runs: crashes at every moment and step, failing disks"
	@echo "make bench   first byte of cold blobs, against the registry's own"

run: $(VENV)/.run
	$(BIN)/pullcache serve $(if $(LISTEN),--listen $(LISTEN)) $(ARGS)

demo: $(VENV)/.run
	@sh tests/real/install.sh docker-registry skopeo
	@$(BIN)/python -m tests.demo

test: $(VENV)/.test
	@sh tests/real/install.sh
	$(BIN)/python -m tests.run

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/unit/test_layers.py tests/unit/test_docs.py

faults: $(VENV)/.test
	@sh tests/real/install.sh
	PULLCACHE_FAULTS=long $(BIN)/pytest -q -s tests/faults

bench: $(VENV)/.test
	@sh tests/real/install.sh
	$(BIN)/python -m tests.bench.first_byte

$(VENV)/bin/python:
	@sh tools/make-venv.sh $(PYTHON) $(VENV)

$(VENV)/.run: $(VENV)/bin/python requirements.lock requirements-build.lock pyproject.toml
	$(INSTALL) --require-hashes --only-binary :all: -r requirements.lock -r requirements-build.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run requirements-test.lock
	$(INSTALL) --require-hashes --only-binary :all: -r requirements-test.lock
	@touch $@

clean:
	rm -rf $(VENV) .cache .run dist
