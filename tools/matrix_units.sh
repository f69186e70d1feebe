#!/usr/bin/env bash
# Runs the kernel tests of the coop variants on a software device with matrix units: Mesa 26, which Debian 13's backports have. It is
# unpacked beside the build, with the C library that it wants, and nothing of the system is changed.
set -euo pipefail

# shellcheck source=tools/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

if [ "$(uname -sm)" != "Linux x86_64" ] || ! command -v apt-get dpkg-deb >/dev/null; then
    say "no test of matrix units on a software device: that needs Linux on x86-64, and apt-get"
    exit 0
fi

mesa=$root/target/mesa26
key=/usr/share/keyrings/debian-archive-keyring.gpg
if [ ! -f "$mesa/done" ]; then
    [ -f "$key" ] || apt_install "Debian's keys are missing" debian-archive-keyring
    rm -rf "$mesa"
    mkdir -p "$mesa/lists/partial" "$mesa/cache/archives/partial" "$mesa/root"
    : >"$mesa/status"
    for suite in trixie trixie-backports; do
        echo "deb [arch=amd64 signed-by=$key] http://deb.debian.org/debian $suite main"
    done >"$mesa/sources.list"
    own=(-o "Dir::Etc::SourceList=$mesa/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$mesa/lists"
        -o "Dir::State::status=$mesa/status" -o "Dir::Cache=$mesa/cache" -o APT::Architecture=amd64 -o APT::Architectures=amd64
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
    say "fetching Mesa 26 from Debian 13's backports into target/mesa26"
    output=$(apt-get "${own[@]}" update 2>&1) || fail "apt-get could not read Debian 13's packages: $output"
    output=$(apt-get "${own[@]}" install -y --download-only --no-install-recommends -t trixie-backports \
        mesa-vulkan-drivers libvulkan1 libc6 libgcc-s1 2>&1) || fail "apt-get could not fetch Mesa 26: $output"
    for package in "$mesa"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$mesa/root"
    done
    rm -rf "$mesa/cache"
    touch "$mesa/done"
fi

libraries=$mesa/root/usr/lib/x86_64-linux-gnu
driver=$mesa/lavapipe.json
printf '{"file_format_version": "1.0.0", "ICD": {"api_version": "1.4", "library_path": "%s/libvulkan_lvp.so"}}\n' "$libraries" >"$driver"

tests=$(cargo test --test kernels --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*kernels-[^"]*\)".*/\1/p' | tail -1)
[ -x "$tests" ] || fail "cargo built no kernel tests: run cargo test --test kernels --no-run"
run() {
    VK_DRIVER_FILES=$driver VK_ICD_FILENAMES=$driver "$libraries/ld-linux-x86-64.so.2" \
        --library-path "$libraries" "$tests" "$@"
}
output=$(run matrix_units wide_head half_operands won_is_kept folded_projections chained_layers norms_b group_norm::norms_end winograd ragged --nocapture 2>&1) || fail "on Mesa 26: $output"
# A device without matrix units would pass by running nothing.
if grep "cannot run .*/coop" <<<"$output"; then fail "Mesa 26 offers no matrix units: $output"; fi
grep "^test " <<<"$output"
