# shellcheck shell=bash
# Functions of the scripts that fetch what a guest needs: messages, the user's
# cache, and Debian packages through a private apt state.
#
# The private state has its own sources, package lists and dpkg status, so that
# nothing on the machine changes and root is not needed. Packages come from the
# mirrors in the machine's own apt sources. apt checks the signed Release file,
# and the package lists and every package by their hashes.

readonly VIOMMU_CACHE=${VIOMMU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/viommu}
readonly GUEST_SUITE=trixie
readonly LISTS_MAX_AGE_MINUTES=60

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
	printf '%s: error: %s\n' "${0##*/}" "$1" >&2
	shift
	local line
	for line in "$@"; do printf '    %s\n' "$line" >&2; done
	exit 1
}

# Locks the cache for the rest of the script: a second run waits here, then
# finds the first one's result in the cache. Removes what a killed run left
# unfinished.
lock_cache() {
	mkdir -p "$VIOMMU_CACHE"
	exec {VIOMMU_LOCK}>"$VIOMMU_CACHE/lock"
	if ! flock -n "$VIOMMU_LOCK"; then
		say "waiting for another run that is filling $VIOMMU_CACHE"
		flock "$VIOMMU_LOCK"
	fi
	rm -rf "$VIOMMU_CACHE"/.unfinished.*
}

# newest_complete PREFIX: prints the newest $VIOMMU_CACHE/PREFIX-* that was
# finished.
newest_complete() {
	local stamp newest='' versions=''
	for stamp in "$VIOMMU_CACHE/$1"-*/.complete; do
		[[ -e $stamp ]] && versions+="${stamp%/.complete}"$'\n'
	done
	newest=$(sort -V <<<"${versions%$'\n'}" | tail -n 1)
	[[ -n $newest ]] && printf '%s\n' "$newest"
}

# unfinished_folder: makes the folder $TEMP, which is to be filled. At exit it
# is removed unless it was published, and a download that still runs is stopped.
unfinished_folder() {
	TEMP=$(mktemp -d "$VIOMMU_CACHE/.unfinished.XXXXXX")
	APT_PID=
	trap '[[ -z $APT_PID ]] || kill "$APT_PID" 2>/dev/null || true; rm -rf "$TEMP"' EXIT
}

# publish FINAL: gives $TEMP its final name, in one step.
publish() {
	touch "$TEMP/.complete"
	chmod 755 "$TEMP"
	rm -rf "$1"
	mv -T "$TEMP" "$1"
}

# cached PREFIX OPTION COMMAND...: prints the newest finished $VIOMMU_CACHE/PREFIX-*.
# COMMAND makes one if there is none, or looks for a newer one if OPTION is --update.
# If that fails (no network), an earlier one is still used.
cached() {
	local prefix=$1 option=$2 old status
	shift 2
	[[ -z $option || $option == --update ]] || die "Unknown option: $option" "Wanted: --update"
	if ! old=$(newest_complete "$prefix") || [[ -n $option ]]; then
		lock_cache
		if ! old=$(newest_complete "$prefix") || [[ -n $option ]]; then
			set +e
			(set -e && "$@")
			status=$?
			set -e
			if ((status)); then
				[[ -n $old ]] || exit "$status"
				say "using ${old##*/}, which was fetched earlier"
			fi
		fi
	fi
	newest_complete "$prefix"
}

# Prints the apt sources of this machine, component main only, one "URI SUITE"
# on each line. apt itself reads them, since they may be in several formats.
machine_sources() {
	{ apt-get update --print-uris 2>/dev/null || true; } |
		sed -n "s|^'\(.*\)/dists/\(.*\)/main/binary-[^/]*/Packages.*|\1 \2|p" | sort -u
}

# machine_mirror SUITE_PATTERN PATH_NAME: prints the machine's mirror for such a
# suite. Other archives use Debian's suite names too, so an address that ends in
# Debian's usual folder name is preferred.
machine_mirror() {
	local uris
	uris=$(machine_sources | awk -v suite="^($1)\$" '$2 ~ suite { print $1 }')
	{
		grep -E "/$2(\\.list)?/*\$" <<<"$uris" || true
		printf '%s\n' "$uris"
	} | sed -n 1p
}

debian_keyring() {
	local keyring
	for keyring in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
		[[ -e $keyring ]] && printf '%s\n' "$keyring" && return
	done
	die "No Debian archive keys on this machine." \
		"Wanted: /usr/share/keyrings/debian-archive-keyring.gpg" \
		"To do:  install the package debian-archive-keyring"
}

write_sources() {
	local mirror=${VIOMMU_DEBIAN_MIRROR:-} security='' keyring found
	if [[ -z $mirror ]]; then
		mirror=$(machine_mirror 'bookworm|trixie' debian)
		security=$(machine_mirror '(bookworm|trixie)-security' debian-security)
	fi
	found=$(machine_sources | awk '{ print $2 }' | paste -sd ' ')
	[[ -n $mirror ]] || die "No Debian mirror found in this machine's apt sources." \
		"Wanted: an entry of suite bookworm or trixie with component main" \
		"Found:  ${found:-no entry at all}" \
		"To do:  set VIOMMU_DEBIAN_MIRROR to the address of a Debian mirror"
	keyring=$(debian_keyring)
	cat <<-END
		Types: deb
		URIs: $mirror
		Suites: $GUEST_SUITE $GUEST_SUITE-updates $GUEST_SUITE-backports
		Components: main
		Architectures: amd64
		Signed-By: $keyring
	END
	[[ -z $security ]] || cat <<-END

		Types: deb
		URIs: $security
		Suites: $GUEST_SUITE-security
		Components: main
		Architectures: amd64
		Signed-By: $keyring
	END
}

# Sets up the private apt state, makes APT_CONFIG name it, and refreshes the
# package lists if they are old. Needs the cache lock. The machine's Acquire
# settings (proxies, timeouts) apply; its hooks and its installed packages do
# not.
use_private_apt() {
	local state=$VIOMMU_CACHE/apt acquire
	mkdir -p "$state"/{etc/parts,etc/preferences,etc/sources,lists/partial,cache/archives/partial}
	write_sources >"$state/etc/sources/debian.sources.new"
	if ! cmp -s "$state/etc/sources/debian.sources"{.new,}; then
		rm -f "$state/lists.stamp"
	fi
	mv "$state/etc/sources/debian.sources"{.new,}
	: >"$state/status"
	acquire=$(apt-config dump --no-empty Acquire | grep -v '^Acquire::IndexTargets' || true)
	cat >"$state/etc/apt.conf" <<-END
		$acquire
		Acquire::Languages "none";
		Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
		APT::Architecture "amd64";
		APT::Architectures { "amd64"; };
		APT::Sandbox::User "root";
		APT::Install-Recommends "false";
		Dir::State "$state";
		Dir::State::lists "$state/lists";
		Dir::State::status "$state/status";
		Dir::State::extended_states "$state/extended_states";
		Dir::Cache "$state/cache";
		Dir::Etc::main "/dev/null";
		Dir::Etc::parts "$state/etc/parts";
		Dir::Etc::preferences "/dev/null";
		Dir::Etc::preferencesparts "$state/etc/preferences";
		Dir::Etc::sourcelist "/dev/null";
		Dir::Etc::sourceparts "$state/etc/sources";
		Dir::Log "$state";
	END
	export APT_CONFIG=$state/etc/apt.conf
	refresh_lists "$state"
}

refresh_lists() {
	local stamp=$1/lists.stamp
	[[ -z $(find "$stamp" -mmin "-$LISTS_MAX_AGE_MINUTES" 2>/dev/null) ]] || return 0
	say "fetching Debian's package lists ($GUEST_SUITE)"
	apt-get update -qq --error-on=any >&2 || die "Debian's package lists could not be fetched." \
		"Wanted: $GUEST_SUITE, $GUEST_SUITE-updates and $GUEST_SUITE-backports" \
		"From:   $(awk '/^URIs:/ { print $2 }' "$1/etc/sources/debian.sources" | paste -sd ' ')" \
		"To do:  check the network, or set VIOMMU_DEBIAN_MIRROR"
	touch "$stamp"
}

# candidate PACKAGE SUITE...: prints the newest version of PACKAGE in these
# suites.
candidate() {
	local package=$1 suites
	shift
	suites=$(IFS='|'; printf '%s' "$*")
	apt-cache madison "$package" |
		awk -F ' *[|] *' -v suites=" ($suites)/main" '$3 ~ suites { print $2 }' |
		sort -V | tail -n 1
}

# closure SUITE PACKAGE...: prints the packages and their dependencies, one "URI
# FILE SIZE" on each line. Prefers versions from SUITE, if that is not empty.
closure() {
	local suite=$1
	shift
	apt-get install -qq --yes --print-uris ${suite:+--target-release "$suite"} "$@" |
		awk '{ gsub("\x27", "", $1); print $1, $2, $3 }'
}

# fetch_debs FOLDER APT_ARGUMENTS...: downloads packages into FOLDER and shows
# progress. apt compares each with the hash in the signed package list.
fetch_debs() {
	local folder=$1 beats=0
	shift
	mkdir -p "$folder/partial"
	(cd "$folder" && exec apt-get -qq -o Acquire::Retries=3 \
		-o "Dir::Cache::archives=$folder" "$@" >&2) &
	APT_PID=$!
	while kill -0 "$APT_PID" 2>/dev/null; do
		sleep 0.2
		((++beats % 25)) || say "  $(du -sm "$folder" | cut -f1) MB so far"
	done
	wait "$APT_PID" || die "Packages could not be fetched from Debian's mirror." \
		"To do: check the network and run this again"
	APT_PID=
}

# unpack_debs FOLDER DEB...: unpacks packages without documentation and
# translations.
unpack_debs() {
	local folder=$1 deb
	shift
	mkdir -p "$folder"
	for deb in "$@"; do
		dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$folder" --no-same-owner \
			--exclude='./usr/share/doc' --exclude='./usr/share/man' \
			--exclude='./usr/share/locale'
	done
}

# manifest DEB...: prints the packages' hashes, for the record.
manifest() {
	(cd "$(dirname "$1")" && sha256sum -- "${@##*/}")
}

# file_version VERSION: prints a package version as a part of a file name.
file_version() {
	local version=${1#*:}
	printf '%s\n' "${version//[^A-Za-z0-9.+~-]/_}"
}

# unescape NAME: undoes apt's %3a, the colon of an epoch in a file name.
unescape() {
	printf '%s\n' "${1//%3a/:}"
}

# package_versions CLOSURE: prints its packages as "name=version", as apt takes
# them.
package_versions() {
	unescape "$(awk '{ split($2, part, "_"); print part[1] "=" part[2] }' <<<"$1")"
}
