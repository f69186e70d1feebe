#!/usr/bin/env bash
# Sets up what is missing, then runs every check: format, lints, tests, and the build for browsers.
set -euo pipefail

# shellcheck source=tools/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

step() {
    say "$*"
    "$@"
}

need_cargo
need_linker
need_component rustfmt
need_component clippy
need_target wasm32-unknown-unknown

step bash tools/setup_test.sh
step cargo fmt --all --check
step cargo clippy --workspace --all-targets -- -D warnings
# All that the tests need is built in one go, the program among it: alone, it would be built with other features, and wgpu twice.
step cargo test --workspace --no-run
# Where there is no GPU, the only device is the software one.
need_device "$(binary debug)"
step cargo test --workspace
step bash tools/matrix_units.sh
step cargo check -p scumble --target wasm32-unknown-unknown
say "all checks passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
