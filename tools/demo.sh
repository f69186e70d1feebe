#!/usr/bin/env bash
# Sets up what is missing, builds scumble, and makes a picture of a prompt with the embedded model.
set -euo pipefail

usage='usage: tools/demo.sh [PROMPT] [options of scumble generate]
Writes scumble-demo.png in the current folder, or the file that -o names.
    tools/demo.sh "a fox in a pine forest at night"
    tools/demo.sh "a red car on a road at sunset" --seed 7 --no-sag -o car.png'

# shellcheck source=tools/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# The first argument is the prompt unless it is an option.
case "${1--}" in
    -h | --help) echo "$usage"; exit ;;
    -*) set -- "a fox in a pine forest at night" "$@" ;;
esac
# `--out=X`, `-oX` and `-o X` all name the file; without any of them it is ours.
out="scumble-demo.png"
for argument in "$@"; do
    case "$argument" in -o* | --out | --out=*) out= ;; esac
done
[ -z "$out" ] || set -- "$@" -o "$out"

need_cargo
need_linker
say "building (the first time takes some minutes)"
(cd "$root" && cargo build --quiet --release -p scumble-cli)
scumble=$(binary release)
need_device "$scumble"
"$scumble" generate "$@"
[ -z "$out" ] || say "the picture is $PWD/$out"
