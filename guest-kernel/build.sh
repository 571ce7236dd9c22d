#!/bin/bash
# Builds Caisson's guest kernel: a monolithic, uncompressed x86_64 vmlinux.
# See README.md beside this file; `build.sh --help` for the options.
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
package=linux-source-6.12
min_free_mib=3072 # source tree 1.6 GiB, objects 0.6 GiB, and some room

usage() {
    cat <<TEXT
usage: build.sh [--source DIR|TARBALL] [--out FILE]

Builds vmlinux from the fragments in config/ and prints where it is.
  --source DIR|TARBALL  Linux source; default: Debian's package $package
  --out FILE            also copy the kernel to FILE
The result is kept in \${CAISSON_CACHE:-~/.cache/caisson}/kernel-HASH, where HASH
covers the source, the fragments, this script and the compiler. Missing tools
are installed by apt when this runs as root.
TEXT
}

say() { printf 'guest-kernel: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

source_arg= out=
while [ $# -gt 0 ]; do
    case $1 in
        --source) [ $# -ge 2 ] || die "--source needs a directory or a tarball"; source_arg=$2; shift 2 ;;
        --out) [ $# -ge 2 ] || die "--out needs a file name"; out=$2; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; die "unknown argument '$1'" ;;
    esac
done

# --- what the build needs ----------------------------------------------------

# "command-or-header package" pairs; libelf is for objtool.
needs="gcc gcc
make make
flex flex
bison bison
bc bc
perl perl
xz xz-utils
/usr/include/gelf.h libelf-dev"

install_missing() {
    local missing=() thing pkg
    while read -r thing pkg; do
        case $thing in
            /*) [ -e "$thing" ] || missing+=("$pkg") ;;
            *) command -v "$thing" >/dev/null || missing+=("$pkg") ;;
        esac
    done <<<"$needs"
    if [ -z "$source_arg" ] && [ ! -e "/usr/src/$package.tar.xz" ]; then missing+=("$package"); fi
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] ||
        die "missing: ${missing[*]}; install them (as root: apt-get install ${missing[*]}) and try again"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local log
    log=$(mktemp)
    if ! apt-get install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 &&
        ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        die "apt-get could not install ${missing[*]}"
    fi
    rm -f "$log"
}

# --- inputs and their hash ---------------------------------------------------

# One line that changes when the source does, without reading 1.5 GB.
source_identity() {
    if [ -d "$source" ]; then
        (cd "$source" && find . -name .git -prune -o -type f -printf '%p %s %T@\n' | sort | sha256sum)
    elif [ -z "$source_arg" ]; then
        dpkg-query -W -f '${Package} ${Version}' "$package"
    else
        sha256sum <"$source"
    fi
}

inputs_hash() {
    {
        source_identity
        cat "$here"/config/*.config "$here/build.sh"
        gcc --version | head -n 1
        ld --version | head -n 1
    } | sha256sum | cut -c 1-16
}

# --- the build ---------------------------------------------------------------

# Every line of the fragments must hold in the final .config: Kconfig drops what
# it cannot satisfy without a word.
verify_config() {
    local config=$1 line symbol bad=0
    while IFS= read -r line; do
        symbol=${line%%=*}
        if [ "${line#*=}" = n ]; then
            ! grep -q "^$symbol=" "$config" && continue
        else
            grep -qxF -- "$line" "$config" && continue
        fi
        say "not in effect: $line (is: $(grep -E "^(# )?$symbol[= ]" "$config" || echo undefined))"
        bad=1
    done < <(cat "$here"/config/*.config | grep '^CONFIG_')
    [ "$bad" = 0 ] || die "the fragments ask for settings this source cannot give (above)"
}

build_into() { # build_into RESULT_DIR; everything else happens in $work
    local result=$1 tree=$source
    local free_mib
    free_mib=$(df --output=avail -m "$work" | tail -n 1)
    [ "$free_mib" -ge "$min_free_mib" ] ||
        die "$work has $free_mib MiB free; the build needs $min_free_mib (set CAISSON_CACHE to a larger disk)"
    if [ ! -d "$tree" ]; then
        say "unpacking $source"
        mkdir "$work/src"
        tar -xf "$source" -C "$work/src" --strip-components=1 || die "$source is not a readable tarball"
        tree=$work/src
    fi
    [ -e "$tree/Kconfig" ] && [ -e "$tree/arch/x86/Kconfig" ] || die "$source holds no Linux source (no Kconfig)"
    if [ -e "$tree/.config" ] || [ -d "$tree/include/config" ]; then
        die "$tree has been built in; run 'make mrproper' there, so that we can build outside it"
    fi

    mkdir "$work/obj"
    cat "$here"/config/*.config >"$work/all.config"
    # Host, user, date and rustc version would otherwise end up in the kernel.
    local timestamp
    timestamp=$(date -u -d "@$(stat -c %Y "$tree/Makefile")")
    local make=(make -s -C "$tree" "O=$work/obj" ARCH=x86_64 RUSTC=false
        "KBUILD_BUILD_TIMESTAMP=$timestamp" KBUILD_BUILD_USER=caisson KBUILD_BUILD_HOST=caisson
        KBUILD_BUILD_VERSION=1)
    local log=$work/log
    "${make[@]}" "KCONFIG_ALLCONFIG=$work/all.config" allnoconfig >"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; die "configuring failed"; }
    verify_config "$work/obj/.config"

    version=$("${make[@]}" kernelrelease 2>>"$log")
    local jobs=$(($(nproc) + 1))
    say "building $version with $jobs jobs"
    if ! nice "${make[@]}" -j "$jobs" vmlinux >"$log" 2>&1; then
        grep -E 'error|Error|No space' "$log" | head -n 20 >&2 || tail -n 20 "$log" >&2
        die "the compiler failed (above)"
    fi
    # Only what is loaded and the PVH note is of use to a VMM.
    strip --strip-all --remove-section='.rela.*' --remove-section=.comment \
        -o "$result/vmlinux" "$work/obj/vmlinux"
    cp "$work/obj/.config" "$result/config"
    cp "$work/obj/System.map" "$result/System.map"
    echo "$version" >"$result/version"
}

install_missing
if [ -n "$source_arg" ]; then
    [ -e "$source_arg" ] || die "--source $source_arg: no such file or directory"
    source=$(realpath "$source_arg")
else
    source=/usr/src/$package.tar.xz
fi

cache=${CAISSON_CACHE:-${HOME:?neither CAISSON_CACHE nor HOME is set}/.cache/caisson}
mkdir -p "$cache" || die "cannot create the cache directory $cache"
cache=$(realpath "$cache")
entry=$cache/kernel-$(inputs_hash)

if [ ! -e "$entry/vmlinux" ]; then
    # One build at a time: a second one of the same inputs finds the first's work.
    exec 9>"$cache/kernel.lock"
    flock -n 9 || { say "waiting for another kernel build"; flock 9; }
    if [ ! -e "$entry/vmlinux" ]; then
        started=$SECONDS
        work=$(mktemp -d "$cache/.kernel-build.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM HUP
        mkdir "$work/result"
        build_into "$work/result" 9>&-
        mv -T "$work/result" "$entry"
        rm -rf "$work"
        say "built in $((SECONDS - started)) s"
    fi
    flock -u 9
fi

result=$entry/vmlinux
if [ -n "$out" ]; then
    mkdir -p "$(dirname "$out")"
    if ! cmp -s "$result" "$out"; then
        cp "$result" "$out.tmp.$$" && mv "$out.tmp.$$" "$out" || { rm -f "$out.tmp.$$"; die "cannot write $out"; }
    fi
    result=$out
fi
printf '%s: Linux %s, %s bytes\n' "$result" "$(cat "$entry/version")" "$(stat -c %s "$result")"
