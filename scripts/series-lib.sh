# shellcheck shell=bash
# Makes commits in a git tree of the series, and patch files of the commits.
# Needs lib.sh and kernel-lib.sh.
#
# In the tree, the tag `origin` is the source without the series, and the tag
# `files` is the series as it was when the patch files were last read or
# written.

# The width of the diffstat in the cover letter, whose paths need it.
readonly STAT_WIDTH=74

# In a hook, git's variables name another repository.
# shellcheck disable=SC2046
unset $(git rev-parse --local-env-vars 2>/dev/null)

# tree_git FOLDER ARGUMENT...: runs git in that tree without the user's
# configuration, so that the same commits give the same files.
tree_git() {
	local folder=$1
	shift
	GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null \
		GIT_COMMITTER_NAME=viommu GIT_COMMITTER_EMAIL=viommu@localhost \
		git -C "$folder" -c gc.auto=0 -c core.abbrev=9 -c core.autocrlf=false -c diff.renames=false "$@"
}

# start_tree FOLDER: makes a git tree of the source in it.
start_tree() {
	tree_git "$1" init -q -b series
	# -f: the source's own .gitignore must not leave anything out.
	tree_git "$1" -c core.looseCompression=1 add -A -f
	tree_git "$1" commit -q --author 'viommu <viommu@localhost>' -m "Linux $(tree_version "$1")"
	tree_git "$1" tag origin
}

# import_series FOLDER: makes commits of the patch files, upon the source.
import_series() {
	local output files
	mapfile -t files < <(series_files | xargs -r realpath)
	tree_git "$1" checkout -q -f -B series origin
	if ((${#files[@]})); then
		output=$(tree_git "$1" am -q "${files[@]}" 2>&1) ||
			die "The series does not apply to this source." "$output" "Tree: $1"
	fi
	tree_git "$1" tag -f files >/dev/null
}

# patch_subjects FILE...: prints the subjects, one on each line, without the
# numbers.
patch_subjects() {
	local file
	for file in "$@"; do
		git mailinfo /dev/null /dev/null <"$file" | sed -n 's/^Subject: //p'
	done
}

# export_series FOLDER OUT: writes the commits upon the source to the folder OUT
# as patch files, with the present cover letter and README.md, brought up to
# date.
export_series() {
	local count
	[[ -z $(tree_git "$1" rev-list --merges origin..HEAD) ]] ||
		die "The series has a merge, which no patch file can hold." "Tree: $1"
	count=$(tree_git "$1" rev-list --count origin..HEAD)
	tree_git "$1" format-patch -q -o "$2" --numbered --zero-commit --no-signature \
		--subject-prefix="PATCH $SERIES" origin..HEAD
	export_cover "$1" "$count" >"$2/0000-cover-letter.patch"
	export_table "$1" "$2" >"$2/README.md"
}

# The text of the letter is written by hand; git makes the list of authors and
# the sizes.
export_cover() {
	local number
	number=$(printf '%0*d/%d' "${#2}" 0 "$2")
	sed -n -e "s|^\(Subject: \[PATCH $SERIES\) [0-9]*/[0-9]*\]|\1 $number]|" \
		-e '/^[^ ].* ([0-9]*):$/q' -e p "$PATCHES/0000-cover-letter.patch"
	tree_git "$1" shortlog -w72,2,4 origin..HEAD
	tree_git "$1" diff --stat=$STAT_WIDTH --summary origin HEAD
	echo
}

# README.md's row about a patch stays with the patch's subject or, if that has
# changed, with its place. The row of a new patch has its subject.
export_table() {
	local files old new said i row
	local -A said_of=()
	mapfile -t files < <(series_files)
	mapfile -t old < <(patch_subjects "${files[@]}")
	mapfile -t said < <(sed -n 's/^\(| [0-9]* |\) \(.*\) | +[0-9]* -[0-9]* |$/\2/p' "$PATCHES/README.md")
	((${#said[@]} == ${#old[@]})) || die "README.md does not have one row for each patch." \
		"Wanted: ${#old[@]}" "Found:  ${#said[@]}" "In:     $PATCHES/README.md"
	for i in "${!old[@]}"; do said_of[${old[i]}]=${said[i]}; done
	mapfile -t files < <(find "$2" -name '[0-9]*.patch' ! -name '0000-*' | LC_ALL=C sort)
	mapfile -t new < <(patch_subjects "${files[@]}")
	for i in "${!new[@]}"; do
		row=${said_of[${new[i]}]:-}
		if [[ -z $row && -n ${old[i]:-} && $'\n'$(printf '%s\n' "${new[@]}")$'\n' != *$'\n'"${old[i]}"$'\n'* ]]; then
			row=${said[i]}
		fi
		printf '| %d | %s | %s |\n' $((i + 1)) "${row:-${new[i]} |}" "$(patch_size "${files[i]}")"
	done >"$2/rows"
	sed -e '/^| [0-9]* | .* | +[0-9]* -[0-9]* |$/d' -e "/^|---|---|---|---|\$/r $2/rows" \
		-e "s/00{01\.\.[0-9]*}/00{01..$(printf %02d "${#new[@]}")}/" "$PATCHES/README.md"
	rm "$2/rows"
}

# patch_size FILE: prints how many lines it adds and removes.
patch_size() {
	git apply --numstat "$1" | awk '{ added += $1; removed += $2 } END { printf "+%d -%d\n", added, removed }'
}
