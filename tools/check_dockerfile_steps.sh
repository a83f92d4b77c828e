#!/usr/bin/env bash
# Run the steps of the Dockerfile's cpu stage in a clean Debian root, for machines without a container engine.
#
#   sudo tools/check_dockerfile_steps.sh [DIRECTORY]      # default: a temporary one, removed afterwards
#
# debootstrap makes the root; it and Python's packages come from wherever this machine gets its own: the first
# Debian source of apt (or DEBIAN_MIRROR), pip's configuration and environment. Every ENV, ARG, WORKDIR, COPY,
# RUN and USER of the stage is then carried out in order, and at the end its HEALTHCHECK, as its user.
set -euo pipefail

cd "$(dirname "$0")/.."
context=$PWD
[[ $EUID -eq 0 ]] || { echo "error: chroot needs root; run with sudo" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "error: needs debootstrap (apt-get install debootstrap)" >&2; exit 2; }

root=${1:-$(mktemp -d -t prolong-root-XXXXXX)}
mkdir -p "$root"
chmod 755 "$root" # mktemp's is closed to the image's user
mounts=()
cleanup() {
    for ((i = ${#mounts[@]} - 1; i >= 0; i--)); do umount "${mounts[i]}"; done
    if [[ $# -eq 0 || -z $1 ]]; then rm -rf --one-file-system "$root"; fi
}
trap 'cleanup "${1:-}"' EXIT

suite=$(sed -nE 's/^FROM python:.*-slim-([a-z]+) AS cpu$/\1/p' Dockerfile)
mirror=${DEBIAN_MIRROR:-$(awk '/^(URIs:|deb )/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)}
[[ -n $suite && -n $mirror ]] || { echo "error: no Debian mirror found; set DEBIAN_MIRROR" >&2; exit 2; }

# --- what the FROM line gives: Debian, Python, nothing else ---
if [[ ! -x $root/usr/bin/python3 ]]; then
    echo "== FROM: debootstrap $suite into $root"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$root" "$mirror" \
        >"$root.log" 2>&1 || { tail -20 "$root.log" >&2; exit 1; }
    rm -f "$root.log"
fi
ln -sf /usr/bin/python3 "$root/usr/local/bin/python"
bind() { mkdir -p "$root$1"; mount --bind "$1" "$root$1"; mounts+=("$root$1"); }
mount -t proc proc "$root/proc" && mounts+=("$root/proc")
bind /dev
bind /dev/shm

# --- this machine's way to packages ---
cp /etc/resolv.conf "$root/etc/resolv.conf"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
for config in /etc/pip.conf /etc/xdg/pip; do
    if [[ -e $config ]]; then mkdir -p "$root$(dirname "$config")" && cp -rL "$config" "$root$(dirname "$config")/"; fi
done
# Directories that pip's settings name (file:// indexes, find-links) are shown to the root as they are.
while read -r directory; do
    while [[ -n $directory && ! -d $directory ]]; do directory=${directory%/*}; done
    [[ $directory =~ ^/[^/]+/ || $directory =~ ^/(opt|srv|mnt) ]] && [[ $directory != /etc/* ]] && bind "$directory"
done < <({ python3 -m pip config list; env | grep '^PIP_'; } 2>/dev/null | grep -oE '/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)+' | grep -v '^/etc/' | sort -u || true)

# --- the stage's instructions, one per line, continuations joined and comments dropped ---
instructions=$(awk '
    /^FROM / {inside = ($NF == "cpu")}
    !inside || /^[[:space:]]*#/ {next}
    {sub(/[[:space:]]+$/, "")}
    /\\$/ {sub(/\\$/, ""); held = held $0; next}
    {print held $0; held = ""}' Dockerfile)

workdir=/ user=0:0
variables=(HOME=/root "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
while read -r name; do variables+=("$name=${!name}"); done < <(compgen -e | grep -E '^(PIP_|https?_proxy$|no_proxy$|SSL_CERT_FILE$|REQUESTS_CA_BUNDLE$)' || true)
inside() { chroot --userspec="$user" "$root" /usr/bin/env -i "${variables[@]}" /bin/bash -euo pipefail -c "cd '$workdir'; $1"; }
set_variable() { # NAME=value, the value expanded with what is set so far
    local value
    value=$(env -i "${variables[@]}" bash -c "printf %s \"${1#*=}\"")
    variables+=("${1%%=*}=$value")
}

while read -r word rest; do
    case $word in
        FROM | SHELL | CMD | "") ;;
        HEALTHCHECK) health=$(sed -E 's/.*CMD \[(.*)\]/\1/; s/", *"/ /g; s/"//g' <<<"$rest") ;;
        ENV) for pair in $rest; do set_variable "$pair"; done ;;
        ARG) name=${rest%%=*}; default=${rest#*=}; default=${default//\"/}; variables+=("$name=${!name:-$default}") ;;
        WORKDIR) workdir=$rest; mkdir -p "$root$workdir" ;;
        USER) user=$rest; variables+=(HOME=/home/prolong) ;;
        COPY)
            echo "== COPY $rest"
            read -ra parts <<<"$rest"
            target=${parts[-1]}
            [[ $target == /* ]] || target=$workdir/$target
            for path in "${parts[@]:0:${#parts[@]}-1}"; do
                if [[ -d $context/$path ]]; then
                    mkdir -p "$root$target"
                    tar -C "$context/$path" --exclude=__pycache__ -cf - . | tar -C "$root$target" -xf -
                else
                    if [[ $target == */ ]]; then mkdir -p "$root$target"; else mkdir -p "$root$(dirname "$target")"; fi
                    cp "$context/$path" "$root$target"
                fi
            done
            ;;
        RUN)
            echo "== RUN ${rest:0:100}"
            inside "$rest"
            ;;
        *)
            echo "error: $word: an instruction this script does not know" >&2
            exit 1
            ;;
    esac
done <<<"$instructions"

echo "== HEALTHCHECK $health (as $user)"
inside "$health"
echo "== all steps of the cpu stage work in a clean $suite root"
