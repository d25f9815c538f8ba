#!/bin/sh
# Installs the programs that tests/real needs, or those named (Debian, as root), and starts no service.
# Elsewhere it says what is missing and leaves the rest alone: those tests then skip.
set -eu

# program:package
wanted='
docker-registry:docker-registry
skopeo:skopeo
containerd:containerd
ctr:containerd
podman:podman
dockerd:docker.io
docker:docker.io
buildah:buildah
mmdebstrap:mmdebstrap
strace:strace
faketime:faketime
ip:iproute2
unshare:util-linux
'

PATH="${PATH}:/usr/local/sbin:/usr/sbin:/sbin"
export PATH

packages=''
add() {
    case " $packages " in
        *" $1 "*) ;;
        *) packages="${packages:+$packages }$1" ;;
    esac
}

for pair in $wanted; do
    case " ${*:-${pair%%:*}} " in
        *" ${pair%%:*} "*) ;;
        *) continue ;;
    esac
    if ! command -v "${pair%%:*}" >/dev/null 2>&1; then
        echo "missing: ${pair%%:*} (Debian package ${pair#*:})"
        add "${pair#*:}"
    fi
done
if ! [ -s /etc/ssl/certs/ca-certificates.crt ]; then
    echo "missing: CA certificates (Debian package ca-certificates)"
    add ca-certificates
fi

if [ -z "$packages" ]; then
    echo "everything needed is here"
    exit 0
fi
if ! [ -e /etc/debian_version ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "not Debian: install these by hand; tests that need them are skipped"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "not root: as root, apt-get install --no-install-recommends $packages"
    exit 0
fi

# Package scripts must not start services here: these tests start their own.
policy=/usr/sbin/policy-rc.d
if ! [ -e "$policy" ] && ! [ -L "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

DEBIAN_FRONTEND=noninteractive
export DEBIAN_FRONTEND
apt-get update -qq
# shellcheck disable=SC2086  # a list of package names
apt-get install -y -qq --no-install-recommends $packages
echo "installed: $packages"
