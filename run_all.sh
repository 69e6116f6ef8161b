#!/usr/bin/env bash
# ./run_all.sh [OPTIONS]             install what is missing, then run the notebooks (--help lists the options)
# ./run_all.sh test [OPTIONS]        the same, then run the tests (options go to pytest)
# ./run_all.sh verify [OPTIONS]      the same, then hold every committed number against its source (--quick: no model)
# ./run_all.sh doctor [--json]        the same, then say what this machine lacks and the command that fits it
# ./run_all.sh mutations [OPTIONS]   the same, then make each change of tests/mutations.toml and see a test fail
# ./run_all.sh book [--out FOLDER]   the same, and what makes a book, then write notebooks and figures as HTML to read
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [[ -n "${VIRTUAL_ENV:-}" || ( -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base ) ]]; then
    python="${VIRTUAL_ENV:-$CONDA_PREFIX}/bin/python"
    fits "$python" || { echo "the activated environment has no Python 3.11 to 3.13; deactivate it or make another" >&2; exit 1; }
else
    for python in python3.11 python3.12 python3.13 python3 none; do
        fits "$python" && break
    done
    [[ $python != none ]] || { echo "Python 3.11 to 3.13 is needed (Debian, Ubuntu: apt install python3 python3-venv)" >&2; exit 1; }
    # A half-made environment has no pip; it is made again.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear .venv || { echo "apt install python3-venv, then run this again" >&2; exit 1; }
    fi
    python=.venv/bin/python
fi

# The stamp is written last, so an interrupted installation is repeated; with it, no network is needed.
stamp=$("$python" -c 'import hashlib, pathlib, sys; print(pathlib.Path(sys.prefix) / (".bkd-" + hashlib.sha256(pathlib.Path("requirements.lock").read_bytes() + str(pathlib.Path.cwd()).encode()).hexdigest()[:16]))')
if [[ ! -e "$stamp" ]]; then
    echo "installing the locked dependencies (once)"
    rm -f "${stamp%-*}"-*  # another lock's stamp no longer says what is installed
    "$python" -m pip install --disable-pip-version-check --quiet -r requirements.lock
    "$python" -m pip install --disable-pip-version-check --quiet --no-deps -e .
    touch "$stamp"
fi

if [[ "${1:-}" == test || "${1:-}" == verify || "${1:-}" == doctor ]]; then
    exec "$python" -m bkd_utils "$@"
elif [[ "${1:-}" == book ]]; then
    # What only the book needs is installed when it is first asked for; it moves nothing that is locked.
    "$python" -c 'import myst_nb, plotly, sphinx_book_theme' 2>/dev/null ||
        "$python" -m pip install --disable-pip-version-check --quiet -c requirements.lock -e '.[book]'
    exec "$python" -m bkd_utils "$@"
elif [[ "${1:-}" == mutations ]]; then
    "$python" -m bkd_utils fetch
    exec "$python" tests/mutations.py "${@:2}"
fi
exec "$python" -m bkd_utils run "$@"
