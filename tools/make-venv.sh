#!/bin/sh
# Makes a virtual environment: make-venv.sh PYTHON DIRECTORY. Debian keeps what that needs in a package of its own.
set -eu
python=$1 directory=$2
command -v "$python" >/dev/null || { echo "$python is not there; pullcache needs Python 3.11 or later" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$("$python" --version) is too old; pullcache needs Python 3.11 or later (make PYTHON=python3.12)" >&2; exit 1; }
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv
  else
    echo "Python's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1
  fi
fi
"$python" -m venv "$directory"
