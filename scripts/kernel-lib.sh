# shellcheck shell=bash
# shellcheck disable=SC2034 # some variables are for the scripts that read this
# Functions of the scripts that build the guest's kernel. They need lib.sh, and
# run in the project's folder.
#
# The work folder .kernel/VERSION/ holds
#   tree/     the source with the series applied
#   origin/   the original files that the series touches
#   source    which source tree/ was unpacked from
#   objects*/ the compiled objects
#   modules*/ the drivers that are built against it, source and objects

readonly DEFAULT_SERIES=7.3
readonly MODULES=guest-kernel-patches/modules
# The number in a full build; it varies a little with the configuration.
readonly ABOUT_OBJECTS=1600

# Prints the versions of Linux that there is a series for.
known_series() {
	find guest-kernel-patches -maxdepth 1 -name 'linux-*' -printf '%f\n' | sed 's/^linux-//' | sort -V | paste -sd ' '
}

# use_series VERSION: selects the series for this Linux.
use_series() {
	SERIES=$1
	PATCHES=guest-kernel-patches/linux-$SERIES
	[[ -n $SERIES && -d $PATCHES ]] || die "There is no series for this version of Linux." \
		"Wanted: one of $(known_series)" "Found:  ${SERIES:-no version}"
	# Where Debian has its source.
	case $SERIES in
	6.12) SOURCE_SUITES=("$GUEST_SUITE" "$GUEST_SUITE-updates" "$GUEST_SUITE-security") ;;
	*) SOURCE_SUITES=("$GUEST_SUITE-backports") ;;
	esac
}

# use_work_folder SUFFIX [FOLDER]: reserves the series' folder in .kernel/, or a
# folder in that, for this run. Objects of other configurations are kept apart.
use_work_folder() {
	work=$PWD/.kernel/$SERIES${2:+/$2}
	mkdir -p "$work"
	exec {WORK_LOCK}>"$work/lock"
	flock -n "$WORK_LOCK" || {
		say "waiting for another build in $work"
		flock "$WORK_LOCK"
	}
	tree=$work/tree
	objects=$work/objects$1
	modules=$work/modules$1
	log=$work/build.log
	mkdir -p "$objects"
}

# Prints the Debian packages that building a kernel needs and this machine
# lacks, one on each line. If there are any, ccache is added, although a build
# works without it.
missing_build_packages() {
	local missing=() pair
	for pair in flex:flex bison:bison bc:bc cpio:cpio perl:perl patch:patch git:git xz:xz-utils gcc:gcc make:make; do
		command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
	done
	[[ -e /usr/include/gelf.h ]] || missing+=(libelf-dev)
	((${#missing[@]})) || return 0
	command -v ccache >/dev/null || missing+=(ccache)
	printf '%s\n' "${missing[@]}"
}

need_build_tools() {
	local missing
	mapfile -t missing < <(missing_build_packages)
	((${#missing[@]} == 0)) || die "Packages that building a kernel needs are missing: ${missing[*]}" \
		"To do:  sudo apt-get install ${missing[*]}"
}

# Prints the patch files in the order of the series, without the cover letter.
series_files() {
	find "$PATCHES" -name '[0-9]*.patch' ! -name '0000-*' | LC_ALL=C sort
}

# Prints the files of the drivers that are no part of the series, each a folder
# with a Kbuild.
module_files() {
	find "$MODULES" -mindepth 2 -type f | LC_ALL=C sort
}

# patch_content PATCH: prints what it changes, without author and date.
patch_content() {
	sed -n '/^---$/,$p' "$1"
}

# debian_source [--update]: prints the newest archive of the series' Linux that
# was fetched; fetches one if there is none.
debian_source() {
	local folder
	folder=$(cached "linux-source-$SERIES" "${1:-}" fetch_source)
	printf '%s\n' "$folder"/*.tar.xz
}

# source_packages: "PACKAGE VERSION" of the sources to try, best first. The
# backports drop one Linux for the next, which the series may fit as well.
source_packages() {
	local package version packages=("linux-source-$SERIES")
	if [[ ${SOURCE_SUITES[*]} == *-backports && -z $(candidate "${packages[@]}" "${SOURCE_SUITES[@]}") ]]; then
		mapfile -t packages < <(apt-cache pkgnames "linux-source-${SERIES%%.*}." |
			grep -xE 'linux-source-[0-9.]+' | sort -rV)
	fi
	for package in "${packages[@]}"; do
		version=$(candidate "$package" "${SOURCE_SUITES[@]}")
		[[ -z $version ]] || printf '%s %s\n' "$package" "$version"
	done
}

fetch_source() {
	local package version folder packages
	use_private_apt
	mapfile -t packages < <(source_packages)
	((${#packages[@]})) || die "Debian has no linux-source-$SERIES." "Looked in: ${SOURCE_SUITES[*]}"
	for package in "${packages[@]}"; do
		read -r package version <<<"$package"
		folder=$VIOMMU_CACHE/linux-source-$SERIES-$(file_version "$version")
		[[ ! -e $folder/.complete ]] || return 0
		say "fetching Debian's source of Linux $version (150 MB)"
		unfinished_folder
		fetch_debs "$TEMP/debs" download "$package=$version"
		manifest "$TEMP"/debs/*.deb >"$TEMP/manifest.sha256"
		unpack_debs "$TEMP/root" "$TEMP"/debs/*.deb
		mv "$TEMP"/root/usr/src/*.tar.xz "$TEMP/linux-$(file_version "$version").tar.xz"
		rm -rf "$TEMP/root" "$TEMP/debs"
		if [[ $package == "linux-source-$SERIES" ]] || series_fits "$TEMP"/*.tar.xz; then
			publish "$folder"
			return
		fi
		rm -rf "$TEMP"
	done
	die "Debian has no source that the series for Linux $SERIES applies to." \
		"Wanted: linux-source-$SERIES" "Found:  ${packages[*]}"
}

# series_fits SOURCE: whether it applies to an archive. If not, says which patch.
series_fits() {
	local tree=$TEMP/fits scratch=$TEMP/scratch source=$1 files series
	mkdir "$tree"
	mapfile -t series < <(series_files)
	mapfile -t files < <(sed -n 's|^+++ b/||p' "${series[@]}" | sort -u)
	# Those that the series adds are not there.
	tar -xf "$source" -C "$tree" --strip-components=1 --wildcards "${files[@]/#/*/}" '*/Makefile' 2>/dev/null || true
	cp -r "$tree" "$scratch"
	(for patch in "${series[@]}"; do apply_one "$patch"; done) || return
	rm -rf "$tree" "$scratch"
}

# source_id SOURCE: prints its name, or for a folder a hash that changes with
# any file.
source_id() {
	if [[ -d $1 ]]; then
		(cd "$1" && find . -path ./.git -prune -o -type f -printf '%P %s %T@\n') |
			sort | sha256sum
	else
		printf '%s\n' "${1##*/}"
	fi
}

unpack_source() {
	local source=$1 id
	id=$(source_id "$source")
	[[ -e $work/source && $(<"$work/source") == "$id" && -d $tree ]] && return
	# Old objects may be newer than the unpacked files, and make would take them
	# for up to date.
	rm -rf "$tree" "$work/origin" "$work/source" "$work"/objects*
	mkdir -p "$tree" "$objects"
	say "unpacking $source"
	if [[ -d $source ]]; then
		(cd "$source" && tar -c --exclude=./.git .) | tar -x -C "$tree"
		# A tree that was configured or built would disturb a build in another folder.
		[[ ! -e $tree/.config ]] || make -s -C "$tree" mrproper
	else
		tar -xf "$source" -C "$tree" --strip-components=1
	fi
	printf '%s\n' "$id" >"$work/source"
}

tree_version() {
	local version
	version=$(sed -n 's/^\(VERSION\|PATCHLEVEL\|SUBLEVEL\) = //p' "$1/Makefile" 2>/dev/null | paste -sd .)
	printf '%s\n' "${version:-of no known version}"
}

# original FILE: copies FILE as it was before any series to $scratch.
original() {
	local from=$tree
	[[ ! -e $work/origin/$1 && ! -e $work/origin/$1.absent ]] || from=$work/origin
	[[ -e $from/$1 ]] || return 0
	mkdir -p "$scratch/$(dirname "$1")"
	cp -p "$from/$1" "$scratch/$1"
}

# failed_files: reads patch's output, and prints the files that it could not
# change.
failed_files() {
	awk '/^patching file/ { file = $3 }
		/FAILED|ignored|previously applied/ && file && !seen[file]++ { print file }
		/^\|\+\+\+ / { sub("b/", "", $2); print $2 " (not there)" }' | paste -sd ' '
}

# apply_one PATCH: applies it to $scratch, without fuzz.
apply_one() {
	local output
	if ! output=$(patch -d "$scratch" -p1 -F0 -N --no-backup-if-mismatch -r - <"$1"); then
		rm -rf "$scratch"
		die "The series does not apply to this source." \
			"Patch:  ${1##*/}" \
			"File:   $(failed_files <<<"$output")" \
			"Source: Linux $(tree_version "$tree"), from $source" \
			"Wanted: Linux $SERIES, for example Debian's linux-source-$SERIES"
	fi
}

# prepare_tree SOURCE PATCH...: makes tree/ the source with these patches. Files
# that do not change keep their time, so that make does not compile them again.
prepare_tree() {
	local source=$1 patch file scratch
	shift
	unpack_source "$source"
	rm -rf "$work"/scratch.*
	scratch=$(mktemp -d "$work/scratch.XXXXXX")
	while read -r file; do original "$file"; done < <(sed -n 's|^+++ b/||p' "$@" | sort -u)
	for patch in "$@"; do apply_one "$patch"; done
	# Files that an earlier series touched and this one does not are restored.
	if [[ -d $work/origin ]]; then
		while read -r file; do
			[[ -e $scratch/$file ]] || put_back "$file"
		done < <(cd "$work/origin" && find . -type f -printf '%P\n')
	fi
	while read -r file; do put_file "$file"; done < <(cd "$scratch" && find . -type f -printf '%P\n')
	rm -rf "$scratch"
}

put_back() {
	local file=${1%.absent}
	[[ ! -e $scratch/$file ]] || return 0
	if [[ $1 == *.absent ]]; then
		rm -f "$tree/$file"
	else
		cmp -s "$work/origin/$file" "$tree/$file" || cp "$work/origin/$file" "$tree/$file"
	fi
}

put_file() {
	mkdir -p "$work/origin/$(dirname "$1")" "$tree/$(dirname "$1")"
	if [[ ! -e $work/origin/$1 && ! -e $work/origin/$1.absent ]]; then
		if [[ -e $tree/$1 ]]; then
			cp -p "$tree/$1" "$work/origin/$1"
		else
			: >"$work/origin/$1.absent"
		fi
	fi
	cmp -s "$scratch/$1" "$tree/$1" || cp "$scratch/$1" "$tree/$1"
}

# The same input gives the same objects, no matter where the checkout is.
kernel_make() {
	local compiler=${CC:-gcc}
	command -v ccache >/dev/null && compiler="ccache $compiler"
	KBUILD_BUILD_TIMESTAMP=2025-01-01 KBUILD_BUILD_USER=viommu KBUILD_BUILD_HOST=viommu \
		CCACHE_BASEDIR=$work CCACHE_NOHASHDIR=1 \
		make -C "$tree" O="$objects" CC="$compiler" -j"$(nproc)" "$@"
}

# merge_config FRAGMENT...: makes a configuration of tinyconfig and the fragments.
merge_config() {
	local fragments
	fragments=$(realpath "$@")
	kernel_make -s tinyconfig >"$log" 2>&1 || die "The kernel could not be configured." "Log: $log"
	# shellcheck disable=SC2086
	(cd "$objects" && KCONFIG_CONFIG=.config "$tree/scripts/kconfig/merge_config.sh" -m -O . .config $fragments) \
		>"$log" 2>&1 || die "The configuration could not be merged." "Log: $log"
	kernel_make -s olddefconfig >"$log" 2>&1 || die "The kernel could not be configured." "Log: $log"
}

# check_config FRAGMENT...: checks that each of their lines has come true.
check_config() {
	local line option wrong=''
	while read -r line; do
		case $line in
		CONFIG_*) option=${line%%=*} ;;
		'# CONFIG_'*' is not set')
			option=${line#\# }
			option=${option%% *}
			;;
		*) continue ;;
		esac
		# A later fragment may overrule an earlier one.
		[[ $(cat "$@" | grep -E "^(# )?$option[= ]" | tail -n 1) == "$line" ]] || continue
		case $line in
		CONFIG_*) grep -qxF -- "$line" "$objects/.config" || wrong+=" $option" ;;
		*) ! grep -q "^$option=" "$objects/.config" || wrong+=" $option" ;;
		esac
	done < <(cat "$@")
	[[ -z $wrong ]] || die "The kernel cannot be configured as wanted." "Options:$wrong" \
		"Wanted: what $* say" "Found:  $objects/.config"
}

# configure FRAGMENT...: makes a configuration of them, and checks it.
configure() {
	merge_config "$@"
	check_config "$@"
}

# warnings_in PATCH...: prints the compiler's warnings about the files that they
# touch.
warnings_in() {
	grep -iE "($(sed -n 's|^+++ b/||p' "$@" | sort -u | paste -sd '|')):[0-9:]+ warning" "$log" || true
}

# compile TARGET...: compiles, and prints progress now and then.
compile() {
	local pid start=$SECONDS next=15 done
	say "building Linux $(tree_version "$tree") in ${work#"$PWD/"}/: 8 to 12 minutes on 2 cores the first time, less later"
	kernel_make "$@" >"$log" 2>&1 &
	pid=$!
	# shellcheck disable=SC2064
	trap "kill $pid 2>/dev/null || true; $(trap -p EXIT | sed "s/^trap -- '\(.*\)' EXIT\$/\1/")" EXIT
	while kill -0 "$pid" 2>/dev/null; do
		sleep 1
		((SECONDS - start >= next)) || continue
		next=$((next + 15))
		done=$(grep -cE '^  (CC|AS|LD) ' "$log" || true)
		say "  $done files of about $ABOUT_OBJECTS, fewer if only some changed, $((SECONDS - start)) s"
	done
	wait "$pid" || die "The kernel does not build." \
		"First error: $(grep -m 1 -E 'error:|Error [0-9]' "$log")" "Log: $log"
}

# compile_modules: compiles copies of the drivers against the compiled kernel.
compile_modules() {
	local folder
	rm -rf "$modules"
	mkdir -p "$modules"
	cp -r "$MODULES"/*/ "$modules/"
	: >"$log"
	for folder in "$modules"/*; do
		kernel_make "M=$folder" modules >>"$log" 2>&1 || die "A driver does not build." \
			"Driver: $MODULES/${folder##*/}" \
			"First error: $(grep -m 1 -E 'error:|ERROR:|Error [0-9]' "$log")" "Log: $log"
	done
}
