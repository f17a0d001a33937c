#!/bin/bash
# Makes sure that everything `make test` needs is on this Debian machine, and what is named as PACKAGE:PROGRAM, unpacked.
# Says nothing when there is nothing to do.
set -eu
umask 022

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/.cache/debian
policy=/usr/sbin/policy-rc.d
mark="from secure-sendmail's tests/packages.sh"

needed=(php-cli python3-watchdog python3-click python3-rich python3-pymysql mariadb-server util-linux strace procps
    apache2-bin libapache2-mod-php php-fpm sudo acl debootstrap systemd nftables
    locales libphp-phpmailer php-symfony-mailer php-mail php-pear php-mysql node-nodemailer nodejs git-email libmailtools-perl s-nail libfaketime)

# These would conflict with the machine's own mail server, bring one, or start a service, so they are not installed but
# only unpacked into the cache. Each with one of its programs, whose libraries tell whether the packages it depends on are
# there; without a program where it shall do without them.
unpacked=(postfix:usr/lib/postfix/sbin/smtpd exim4-daemon-light:usr/sbin/exim4 bsd-mailx:usr/bin/bsd-mailx cron:usr/sbin/cron
    wordpress: "$@")

download=

cleanup() {
    if [ -n "$download" ]; then
        rm -rf "$download"
    fi
    # The mark also finds the file that a killed run has left.
    if grep -qs "$mark" "$policy"; then
        rm -f "$policy"
    fi
}

install() {
    apt-get -o DPkg::Lock::Timeout=120 "$1" -y --no-install-recommends "${@:2}"
}

is_unpacked() { # PACKAGE PROGRAM
    local libraries
    [ -d "$cache/$1" ] || return 1
    [ -n "$2" ] || return 0
    libraries=$(LD_LIBRARY_PATH=$cache/$1/usr/lib/$1 ldd "$cache/$1/$2" 2>/dev/null) || return 1
    [[ $libraries != *"not found"* ]]
}

unpack() { # PACKAGE PROGRAM
    local archive field needs fields=()
    [ -z "$2" ] || fields=(Pre-Depends Depends)
    download=$(mktemp -d /tmp/secure-sendmail-packages.XXXXXX)
    # apt fetches as its own user, and warns where that user may not write.
    chown _apt "$download"
    (cd "$download" && apt-get download "$1")
    archive=$(echo "$download/$1"_*.deb)
    for field in "${fields[@]}"; do
        # Without a mail server, and without the other packages of the same program, such as exim4-base.
        needs=$(dpkg-deb -f "$archive" "$field" | sed -e "s/\b${1%%-*}-[^,]*,\? *//g" -e 's/\bdefault-mta\b[^,]*,\? *//')
        [ -z "$needs" ] || install satisfy "$needs"
    done
    # The name appears when the content is complete, so that an interrupted run is repaired by the next one.
    rm -rf "$cache/$1.new" "${cache:?}/$1"
    mkdir -p "$cache"
    # With its control file, which says the version.
    dpkg-deb -R "$archive" "$cache/$1.new"
    chmod -R a+rX "$cache/$1.new"
    mv "$cache/$1.new" "$cache/$1"
    rm -rf "$download"
    download=
}

# A Debian of this machine's release, with what every server has and nothing of ours. Nobody changes it.
base=$cache/root

make_base() {
    local codename sources mirror new=$base.new
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    sources=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v codename="$codename" '$3 ~ "^" codename "(-updates|-security)?$"' | sort -u)
    mirror=$(awk -v codename="$codename" '$3 == codename { print $2; exit }' <<< "$sources")
    rm -rf "$new"
    echo "debootstrap makes a Debian for the test of the installation, in $base"
    debootstrap --variant=minbase --include=systemd,procps,logrotate "$codename" "$new" "$mirror" > "$new.log" ||
        { tail -n 20 "$new.log" >&2; exit 1; }
    echo "$sources" > "$new/etc/apt/sources.list"
    # As this machine reaches the mirror.
    apt-config dump | grep -E '^Acquire::(https?::|Check-)' > "$new/etc/apt/apt.conf.d/90machine" || true
    if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
        mkdir -p "$new/etc/ssl/certs"
        cp -L /etc/ssl/certs/ca-certificates.crt "$new/etc/ssl/certs/"
    fi
    mv "$new" "$base"
}

installed=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' "${needed[@]}" 2>/dev/null || true)"
to_install=()
for package in "${needed[@]}"; do
    [[ $installed == *" $package:installed "* ]] || to_install+=("$package")
done
to_unpack=()
for entry in "${unpacked[@]}"; do
    is_unpacked "${entry%%:*}" "${entry#*:}" || to_unpack+=("$entry")
done

to_make=()
[ -d "$base" ] || to_make+=("$base")

if [ $((${#to_install[@]} + ${#to_unpack[@]} + ${#to_make[@]})) -gt 0 ]; then
    if [ "$(id -u)" != 0 ]; then
        {
            echo "make test needs Debian packages that are missing. Run as root:"
            echo
            echo "    apt-get update"
            [ ${#to_install[@]} = 0 ] || echo "    apt-get install -y --no-install-recommends ${to_install[*]}"
            if [ $((${#to_unpack[@]} + ${#to_make[@]})) -gt 0 ]; then
                printf '    bash %q\n' "$root/tests/packages.sh"
                echo
                echo "The last one unpacks Debian packages into $cache (and does not install them): ${to_unpack[*]%%:*} ${to_make[*]}"
            fi
        } >&2
        exit 1
    fi
    trap cleanup EXIT
    trap 'exit 1' HUP INT TERM
    # Installing a package must not start its service.
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\n# %s\nexit 101\n' "$mark" > "$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    if [ ${#to_install[@]} -gt 0 ]; then
        install install "${to_install[@]}"
    fi
    for entry in "${to_unpack[@]}"; do
        unpack "${entry%%:*}" "${entry#*:}"
    done
    [ ${#to_make[@]} = 0 ] || make_base
fi

if [ "$(id -u)" != 0 ]; then
    echo "make test starts a private Postfix, whose master must be root: run it as root." >&2
    echo "make test-quick works without." >&2
    exit 1
fi
