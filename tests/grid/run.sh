#!/usr/bin/env bash
# Install what tests/grid/run.py needs, and run it. Exit status 3: it cannot be run here, and the last line says why.
# Snakemake goes into an environment of its own, work/gridvenv, which sees the packages of the project's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${VIRTUAL_ENV:-.venv}/bin/python
if ! tests/grid/slurm.sh check 2>/dev/null && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    packages="slurmctld slurmd slurm-client munge"
    timeout 300 sh -c "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        $packages" >/dev/null 2>&1 || true
fi
tests/grid/slurm.sh check || exit 3
own=work/gridvenv
if ! "$own/bin/python" -c 'import snakemake' 2>/dev/null; then
    "$python" -m venv --clear "$own"
    folders=("$own"/lib/python3*/site-packages)
    "$python" -c 'import site; print(site.getsitepackages()[0])' >"${folders[0]}/project.pth"
    table='tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["grid"]'
    pins=$("$python" -c "import tomllib; print(*$table)")
    # shellcheck disable=SC2086
    "$own/bin/python" -m pip install --disable-pip-version-check --quiet $pins || exit 3
fi
exec "$own/bin/python" tests/grid/run.py "$@"
