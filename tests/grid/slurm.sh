#!/usr/bin/env bash
# A real Slurm on this machine, without systemd and without accounting, for tests of the grid.
#   slurm.sh start FOLDER   start munged, slurmctld and slurmd with everything in FOLDER, but for a link in /etc/slurm
#   slurm.sh stop FOLDER    end them
#   slurm.sh check          can it be started here? says why not
# It needs root and Debian's slurmctld, slurmd, slurm-client and munge, and no other Slurm on this machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin
# Snakemake's jobs forget SLURM_CONF, so the configuration must be where Slurm looks for it.
conf=/etc/slurm/slurm.conf

check() {
    [[ $(id -u) == 0 ]] || { echo "Slurm cannot be started: only root can" >&2; exit 1; }
    for program in munged slurmctld slurmd sbatch; do
        command -v $program >/dev/null && continue
        echo "Slurm cannot be started: no $program (Debian: apt-get install slurmctld slurmd slurm-client munge)" >&2
        exit 1
    done
    if [[ -e $conf ]] && ! grep -q "for tests of the grid" $conf; then
        echo "Slurm cannot be started: $conf is there already" >&2
        exit 1
    fi
}

ended() { # wait until the process of a pid file is gone
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.2; done
    kill -9 "$pid" 2>/dev/null || true
}

case "${1:-}" in
check)
    check
    ;;
start)
    check
    mkdir -p "$2/state" "$2/spool" "$2/munge"
    state=$(realpath "$2")
    # A key and a socket of its own, so that a munge of the system is not touched.
    (umask 077 && head -c 1024 /dev/urandom >"$state/munge/key")
    memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))
    sed -e "s|@HOST@|$(hostname)|g; s|@STATE@|$state|g; s|@CPUS@|$(($(getconf _NPROCESSORS_ONLN) * 2))|g; s|@MEMORY@|$memory|g" \
        "$here/slurm.conf.template" >"$state/slurm.conf"
    mkdir -p "${conf%/*}"
    ln -sfn "$state/slurm.conf" $conf
    chmod 755 "$state" && chmod 700 "$state/munge"
    munged --force --key-file="$state/munge/key" --socket="$state/munge.socket" --pid-file="$state/munge/munged.pid" \
        --log-file="$state/munge/munged.log" --seed-file="$state/munge/seed"
    slurmctld
    slurmd
    for _ in $(seq 100); do
        [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]] && exit 0
        sleep 0.2
    done
    echo "Slurm did not come up; see $state/*.log" >&2
    tail -n 5 "$state"/slurmctld.log "$state"/slurmd.log >&2
    exit 1
    ;;
stop)
    state=$(realpath "$2")
    # A job that outlives its slurmd would ask for it for ever.
    timeout 20 bash -c 'scancel --user=root && while [[ -n $(squeue --noheader) ]]; do sleep 0.5; done' || true
    for pid in "$state/slurmd.pid" "$state/slurmctld.pid" "$state/munge/munged.pid"; do ended "$pid"; done
    [[ $(readlink $conf) != "$state/slurm.conf" ]] || rm -f $conf
    ;;
*)
    echo "usage: slurm.sh start FOLDER | stop FOLDER | check" >&2
    exit 2
    ;;
esac
