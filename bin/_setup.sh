# Sourced by the other files here: brings a checkout to the point where its Python runs.
# shellcheck shell=bash
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

say() { printf '%s\n' "$*" >&2; }

# need_packages KIND...: install the system packages of these kinds that are missing.
# The list is the product's own, src/fireclaw/data/system-packages.txt: package, probe, kind, why.
need_packages() {
    local missing=() package probe kind _why PATH=$PATH:/usr/sbin:/sbin
    while read -r package probe kind _why; do
        case " $* " in *" $kind "*) ;; *) continue ;; esac
        case $probe in
            /*) [ -e "$probe" ] || missing+=("$package") ;;
            *) command -v "$probe" >/dev/null || missing+=("$package") ;;
        esac
    done < <(grep -v '^#' "$root/src/fireclaw/data/system-packages.txt")
    [ ${#missing[@]} -gt 0 ] || return 0
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    say "installing system packages: ${missing[*]}"
    # Debian starts a service with its package, and ngircd's would take the port of the server that Fireclaw runs.
    case " ${missing[*]} " in *" ngircd "*)
        if [ -d /run/systemd/system ]; then
            say "masking the system's own ngircd service (systemctl unmask ngircd brings it back)"
            "${sudo[@]}" systemctl mask ngircd.service >&2 || say "it could not be masked; should it take port 6667, stop it"
        fi ;;
    esac
    local log
    log=$(mktemp)
    if ! { "${sudo[@]}" apt-get update &&
        "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
        >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        say "cannot install them; by hand: ${sudo[*]} apt-get install -y --no-install-recommends ${missing[*]}"
        exit 125
    fi
    rm -f "$log"
}

# need_python [EXTRA]: make .venv with this checkout and its libraries ("dev": with those of the tests, too).
need_python() {
    local extra=${1:-} ready=$root/.venv/.ready${1:+-$1}
    [ "$ready" -nt "$root/pyproject.toml" ] && return 0
    local base
    for base in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        if command -v "$base" >/dev/null &&
            "$base" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        base=
    done
    if [ -z "$base" ]; then
        say "Python 3.11 or newer with its venv module is needed: apt-get install python3 python3-venv"
        exit 125
    fi
    say "installing the Python libraries into .venv (about a minute)"
    [ -x "$python" ] && "$python" -c '' 2>/dev/null || "$base" -m venv --clear "$root/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$root${extra:+[$extra]}"
    touch "$ready"
}
