#!/bin/sh
# Renews the lock files from pyproject.toml: exact versions with hashes, for every platform, without an index's address.
set -eu
compile() {
  uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate \
    --quiet --upgrade "$@" >/dev/null
}
compile pyproject.toml -o requirements.lock
printf 'hatchling>=1.27\neditables>=0.5\n' | compile - -o requirements-build.lock
compile pyproject.toml --group test --group check -c requirements.lock -o requirements-test.lock
