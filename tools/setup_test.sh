#!/usr/bin/env bash
# Tests tools/setup.sh and tools/demo.sh on pretended machines: fakes of every outside program stand first in PATH. Takes a second or two.
# shellcheck disable=SC2016  # The bodies of the fakes expand when the fakes run.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0

# fake NAME BODY: a program of that name, which can see $machine, the folder whose files are what is "installed".
fake() {
    printf '#!/bin/bash\nmachine=%q\n%s\n' "$machine" "$2" >"$machine/bin/$1"
    chmod +x "$machine/bin/$1"
}

# machine USER-ID SYSTEM THINGS...: THINGS are of cargo apt sudo cc loader driver.
new_machine() {
    machine=$(mktemp -d "$work/XXXXXX")
    mkdir -p "$machine/bin" "$machine/has" "$machine/target/release"
    local id=$1 system=$2 tool
    shift 2
    for tool in "$@"; do touch "$machine/has/$tool"; done
    # Nothing of the true machine but these.
    for tool in bash cat cut dirname env mktemp rm touch; do ln -s "$(command -v "$tool")" "$machine/bin/$tool"; done
    fake uname "echo $system"
    fake id "echo $id"
    fake cc '[ -e "$machine/has/cc" ]'
    fake ldconfig '[ ! -e "$machine/has/loader" ] || echo "libvulkan.so.1 (libc6) => /lib/libvulkan.so.1"'
    [ ! -e "$machine/has/cargo" ] || fake cargo 'echo "cargo $*" >>"$machine/log"'
    [ ! -e "$machine/has/sudo" ] || fake sudo 'echo "sudo" >>"$machine/log"; exec "$@"'
    [ ! -e "$machine/has/apt" ] || fake apt-get 'echo "apt-get ${*: -1}" >>"$machine/log"
        case "$*" in
            *gcc*) touch "$machine/has/cc" ;;
            *mesa*) touch "$machine/has/loader" "$machine/has/driver" ;;
            *libvulkan1*) touch "$machine/has/loader"; [ ! -e "$machine/has/gpu" ] || touch "$machine/has/driver" ;;
        esac'
    fake scumble 'if [ -e "$machine/has/broken" ]; then echo "error: out of memory" >&2; exit 1; fi
        if ! { [ -e "$machine/has/loader" ] && [ -e "$machine/has/driver" ]; }; then echo "error: no GPU adapter found" >&2; exit 1; fi
        [ "$1" = info ] || printf "run" >>"$machine/log"
        [ "$1" = info ] || { printf " [%s]" "$@"; echo; } >>"$machine/log"'
    mv "$machine/bin/scumble" "$machine/target/release/scumble"
}

# demo STATUS WORDS ARGUMENTS...: runs the demo; expects that status, and WORDS in what it said.
demo() {
    local status=$1 words=$2 found=0 said
    shift 2
    said=$(cd "$machine" && PATH=$machine/bin CARGO_TARGET_DIR=$machine/target bash "$tools/demo.sh" "$@" 2>&1 </dev/null) || found=$?
    [ "$found" = "$status" ] || { bad=1; echo "demo $*: expected status $status, found $found: $said"; }
    case "$said" in *"$words"*) ;; *) bad=1; echo "demo $*: expected \"$words\", found: $said" ;; esac
}

# log EXPECTED: what was run that changes something, in order.
log() {
    local found
    found=$(cat "$machine/log" 2>/dev/null || true)
    [ "$found" = "$1" ] || { bad=1; printf 'expected log:\n%s\nfound:\n%s\n' "$1" "$found"; }
}

build="cargo build --quiet --release -p scumble-cli"
fox="run [generate] [a fox in a pine forest at night]"

new_machine 0 Linux cargo cc loader driver            # nothing is missing: nothing is installed
demo 0 "$machine/scumble-demo.png"
log "$build
$fox [-o] [scumble-demo.png]"

new_machine 0 Linux cargo cc loader driver            # options, with and without a prompt; the user's own -o
demo 0 "" --seed 7
demo 0 "" "a cat" --no-sag -o x.png
demo 0 "" "a cat" --out=x.png
demo 0 "" "" --steps 4
log "$build
$fox [--seed] [7] [-o] [scumble-demo.png]
$build
run [generate] [a cat] [--no-sag] [-o] [x.png]
$build
run [generate] [a cat] [--out=x.png]
$build
run [generate] [] [--steps] [4] [-o] [scumble-demo.png]"

new_machine 0 Linux cargo apt                         # a fresh machine without a GPU: everything, and update once
demo 0 "no GPU adapter found"
log "apt-get update
apt-get libc6-dev
$build
apt-get libvulkan1
apt-get mesa-vulkan-drivers
$fox [-o] [scumble-demo.png]"

new_machine 1000 Linux cargo cc sudo apt gpu          # a GPU with its driver but no loader: no software driver; through sudo
demo 0 "no Vulkan loader found: installing libvulkan1"
log "$build
sudo
apt-get update
sudo
apt-get libvulkan1
$fox [-o] [scumble-demo.png]"

new_machine 0 Linux cargo cc apt loader               # a loader and no driver
demo 0 "installing mesa-vulkan-drivers"
log "$build
apt-get update
apt-get mesa-vulkan-drivers
$fox [-o] [scumble-demo.png]"

new_machine 1000 Linux cargo apt                      # neither root nor sudo: the command is told, nothing is run
demo 1 "run as root, then try again: apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev"
log ""

new_machine 0 Linux cc                                # no Rust
demo 1 "https://rustup.rs"

new_machine 0 Linux cargo                             # a Linux without apt-get
demo 1 "no C linker"
new_machine 0 Linux cargo cc
demo 1 "Fedora: vulkan-loader"

new_machine 501 Darwin cargo cc loader driver         # macOS and Windows
demo 0 ""
new_machine 501 Darwin cargo
demo 1 "xcode-select --install"
new_machine 501 MINGW64_NT-10.0 cargo
demo 1 "DX12"

new_machine 0 Linux cargo cc apt loader broken        # another failure than "no adapter" is shown, and installs nothing
demo 1 "scumble info failed: error: out of memory"
log "$build"

[ "$bad" = 0 ] && echo "setup_test: ok"
exit "$bad"
