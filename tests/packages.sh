# For the `install` scripts of the tests: Debian packages, where root allows it. Source it, then call `ensure_packages`.

missing_packages() {
    local package
    for package in "$@"; do
        dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || echo "$package"
    done
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "$@" >/dev/null
}

# A package must not bring up its own server: the tests start theirs.
without_services() {
    local policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    "$@"
}

install_packages() {
    # The package lists may be old: a second try is worth their update.
    apt_install "$@" 2>/dev/null || { apt-get update --quiet=2 >/dev/null && apt_install "$@"; }
}

# Installs what is missing of these packages; what stays missing is named, and its tests will say SKIPPED.
ensure_packages() {
    local missing
    if ! command -v dpkg-query >/dev/null; then
        echo "install: this is no Debian; wanted: $*" >&2
        return
    fi
    mapfile -t missing < <(missing_packages "$@")
    if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" -eq 0 ]; then
        without_services install_packages "${missing[@]}" || true
        mapfile -t missing < <(missing_packages "$@")
    fi
    [ "${#missing[@]}" -eq 0 ] || echo "install: missing, so their tests are skipped: apt install ${missing[*]}" >&2
}
