# Functions that find, and on Debian and Ubuntu install, what scumble needs: a linker, a Vulkan loader, a device. Sourced, not run.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Mesa's window code calls it an error where no desktop has set this, although no window is opened.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

say() { printf 'scumble: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

system() {
    case "$(uname -s)" in
        Linux) echo linux ;;
        Darwin) echo macos ;;
        MINGW* | MSYS* | CYGWIN*) echo windows ;;
        *) echo other ;;
    esac
}

# as_root COMMAND...: what sudo is asked for is the command alone, never this script.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# apt_install WHY PACKAGE...: the reason on one line, then the install; 1 where this is not a system with apt-get.
apt_updated=
apt_install() {
    local why=$1
    shift
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
        fail "$why; run as root, then try again: apt-get update && apt-get install -y --no-install-recommends $*"
    fi
    say "$why: installing $* with apt-get"
    local output
    # A fresh machine's package lists may be empty, or older than the files on its mirror.
    if [ -z "$apt_updated" ]; then
        output=$(as_root apt-get update 2>&1) || fail "apt-get update failed: $output"
        apt_updated=1
    fi
    output=$(as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=120 \
        install --no-install-recommends "$@" 2>&1) || fail "apt-get could not install $*: $output"
}

need_cargo() {
    command -v cargo >/dev/null || fail "no cargo in PATH: install Rust as https://rustup.rs says, then try again"
}

# need_component NAME: a part of the Rust toolchain that minimal installations leave out.
need_component() {
    cargo "${1/rustfmt/fmt}" --version >/dev/null 2>&1 && return
    command -v rustup >/dev/null || fail "cargo has no $1, and there is no rustup to add it: install your system's package for it"
    say "cargo has no $1: adding it with rustup"
    rustup component add "$1" >/dev/null 2>&1 || fail "rustup could not add it; try: rustup component add $1"
}

# need_target NAME: the standard library for another platform.
need_target() {
    [ -d "$(rustc --print target-libdir --target "$1" 2>/dev/null)" ] && return
    command -v rustup >/dev/null || fail "no Rust library for $1, and there is no rustup to add it: install your system's package for it"
    say "no Rust library for $1: adding it with rustup"
    rustup target add "$1" >/dev/null 2>&1 || fail "rustup could not add it; try: rustup target add $1"
}

# Compiles and links, because a compiler without the C library's files does neither.
can_link() {
    local out works=0
    out=$(mktemp)
    cc -x c -o "$out" - <<<'int main(void) { return 0; }' 2>/dev/null || works=1
    rm -f "$out"
    return "$works"
}

need_linker() {
    case "$(system)" in
        windows) return ;;      # rustup has asked for one
        macos) can_link || fail "no C linker, which Rust needs: run xcode-select --install, then try again" ;;
        *)
            can_link && return
            apt_install "Rust needs a C linker" gcc libc6-dev ||
                fail "no C linker, which Rust needs: install gcc (or clang) and the C library's development files, then try again"
            ;;
    esac
}

# binary PROFILE-FOLDER: where cargo puts the program (debug or release).
binary() {
    local target=${CARGO_TARGET_DIR:-$root/target}
    case "$target" in
        /* | [A-Za-z]:*) ;;
        *) target=$root/$target ;;
    esac
    echo "$target/$1/scumble"
}

# has_device SCUMBLE: true, or false where the program finds no adapter; any other failure ends the script with its message.
has_device() {
    local message
    message=$("$1" info --json 2>&1 >/dev/null) && return
    case "$message" in
        *"no GPU adapter"*) return 1 ;;
        *) fail "scumble info failed: $message" ;;
    esac
}

has_vulkan_loader() {
    case "$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null)" in
        *libvulkan.so.1*) return 0 ;;
        *) return 1 ;;
    esac
}

no_device() {
    fail "no GPU adapter found: install the Vulkan loader and your GPU's Vulkan driver, or Mesa's software driver" \
        "(Fedora: vulkan-loader mesa-vulkan-drivers; Arch: vulkan-icd-loader vulkan-swrast), then try again"
}

# need_device SCUMBLE: installs only what is missing, and the software driver last of all.
need_device() {
    has_device "$1" && return
    [ "$(system)" = linux ] || fail "no GPU adapter found: scumble needs Metal on macOS, Vulkan or DX12 on Windows; update the graphics driver"
    if ! has_vulkan_loader; then
        apt_install "no Vulkan loader found" libvulkan1 || no_device
        has_device "$1" && return
    fi
    apt_install "no GPU adapter found, so Mesa's software device must do (an NVIDIA card needs NVIDIA's own driver)" mesa-vulkan-drivers ||
        no_device
    has_device "$1" || no_device
}
