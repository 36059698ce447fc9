# shellcheck shell=bash
# What the scripts have in common: where things are kept, how progress is
# told, and how packages of other Debian suites are had without touching the
# machine's own apt configuration.
#
# Sourced, never run.  The caller has `set -euo pipefail`.

GEMINI_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
GEMINI_CACHE=${GEMINI_CACHE:-${XDG_CACHE_HOME:-${HOME:?is not set}/.cache}/virtio-gemini}
export GEMINI_ROOT GEMINI_CACHE
mkdir -p "$GEMINI_CACHE"

# Progress goes to stderr: stdout belongs to a script's result.
say() { printf '%s\n' "$*" >&2; }
step() { printf '==> %s\n' "$*" >&2; }
die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# have COMMAND...: are all of them there?
have() {
	local command
	for command; do
		command -v "$command" >/dev/null || return 1
	done
}

need_root() {
	[[ $(id -u) -eq 0 ]] || die "$1 needs root; run it as: sudo $0"
}

debian_codename() {
	# shellcheck source=/dev/null
	(. /etc/os-release && [[ ${ID:-} == debian ]] && printf '%s' "${VERSION_CODENAME:-}")
}

# quiet NAME COMMAND...: runs the command with its output in a log, which is
# shown only if it fails.
quiet() {
	local log=$GEMINI_CACHE/logs/$1.log
	shift
	mkdir -p "${log%/*}"
	if ! "$@" >"$log" 2>&1 </dev/null; then
		tail -n 40 "$log" >&2
		die "failed: $* (whole output: $log)"
	fi
}

# with_lock NAME COMMAND...: one process at a time on this machine.
with_lock() {
	local lock=$GEMINI_CACHE/locks/$1
	shift
	mkdir -p "${lock%/*}"
	(
		flock 9
		"$@"
	) 9>"$lock"
}

# mirror_of LABEL: the URI and the keyring of the archive that this machine
# takes Debian (or Debian-Security) from, as apt itself sees it, so that a
# proxy or a local mirror is used here as well.
mirror_of() {
	local wanted=$1 label uri
	# shellcheck disable=SC2016 # apt's own placeholders
	while IFS='|' read -r label uri; do
		if [[ $label == "$wanted" ]]; then
			printf '%s' "$uri"
			return
		fi
	done < <(apt-get indextargets --format '$(LABEL)|$(REPO_URI)' 'Created-By: Packages')
	return 1
}

# The suites that the scripts take packages from, beside the machine's own:
# QEMU's data files and Linux 6.12 are not in Debian 12 itself, and the newest
# Linux is in no release.
extra_suites() {
	case $1 in
	bookworm) printf '%s\n' 'Debian bookworm-backports' 'Debian-Security bookworm-security' ;;
	trixie) printf '%s\n' 'Debian trixie-backports' 'Debian-Security trixie-security' ;;
	esac
}

# Writes a private apt configuration (sources, lists, package cache) and
# leaves its file name in APT_CONFIG_PRIVATE.  The machine's own lists,
# preferences and sources stay as they are.
apt_private() {
	APT_CONFIG_PRIVATE=$GEMINI_CACHE/apt/apt.conf
	# Two scripts may start at the same time.
	with_lock apt write_apt_private
}

write_apt_private() {
	local codename dir main label suite uri
	codename=$(debian_codename) || die "this is not Debian: see README for what must be installed"
	case $codename in
	bookworm | trixie) ;;
	*) die "Debian 12 (bookworm) or 13 (trixie) is needed, this is '$codename'" ;;
	esac
	dir=$GEMINI_CACHE/apt
	mkdir -p "$dir/lists/partial" "$dir/archives/partial" "$dir/empty"
	if ! mirror_of Debian >/dev/null; then
		# A new machine or container: apt has not read its own sources yet.
		step "fetching this machine's own package lists"
		quiet apt-update-machine apt-get update
	fi
	main=$(mirror_of Debian) || die "apt knows no Debian archive: check /etc/apt/sources.list.d"
	{
		stanza "$main" "$codename"
		while read -r label suite; do
			uri=$(mirror_of "$label") || uri=${main%/debian/}/debian-security/
			stanza "$uri" "$suite"
		done < <(extra_suites "$codename")
	} >"$dir/gemini.sources.new"
	if ! cmp -s "$dir/gemini.sources.new" "$dir/gemini.sources"; then
		rm -f "$dir/updated"
	fi
	mv "$dir/gemini.sources.new" "$dir/gemini.sources"
	cat >"$APT_CONFIG_PRIVATE" <<-CONF
		Dir::Etc::sourcelist "$dir/gemini.sources";
		Dir::Etc::sourceparts "$dir/empty";
		Dir::State::lists "$dir/lists";
		Dir::Cache::archives "$dir/archives";
		Dir::Cache::pkgcache "$dir/pkgcache.bin";
		Dir::Cache::srcpkgcache "$dir/srcpkgcache.bin";
		Acquire::Languages "none";
		Acquire::Retries "3";
		APT::Sandbox::User "root";
	CONF
	# A day-old list is good enough, and a run with a warm cache is quick.
	if [[ -z $(find "$dir/updated" -mtime -1 2>/dev/null) ]]; then
		step "fetching the package lists"
		quiet apt-update apt-get -c "$APT_CONFIG_PRIVATE" -o APT::Update::Error-Mode=any update
		touch "$dir/updated"
	fi
}

stanza() {
	local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n' \
		"$1" "$2" "$keyring"
}

# A short hash over the names and contents of files and directories, given
# relative to the checkout; what a build leaves behind does not count.
content_hash() {
	local path
	cd "$GEMINI_ROOT" || return
	for path; do
		find "$path" -type f -not -name '*.o' -not -name '*.ko' -not -name '.*.cmd' \
			-not -name '*.mod' -not -name '*.mod.c' -not -name 'modules.order' \
			-not -name 'Module.symvers' -print0
	done | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
}

# cargo_build PACKAGE...: release builds, with cargo's own progress.
cargo_build() {
	local package arguments=()
	for package; do
		arguments+=(-p "$package")
	done
	have cargo || die "cargo is missing; run scripts/setup first"
	(cd "$GEMINI_ROOT" && cargo build --locked --release "${arguments[@]}") >&2
}

# install_for COMMAND PACKAGE: installs the package if there is no such command.
install_for() {
	! have "$1" || return 0
	step "installing $2"
	quiet "apt-install-$2" env DEBIAN_FRONTEND=noninteractive \
		apt-get -c "$APT_CONFIG_PRIVATE" install -y --no-install-recommends "$2"
}

# debian_root SUITE DIR OPTION...: a Debian in a new directory, from the archive
# that this machine uses.
debian_root() {
	local suite=$1 dir=$2 mirror security
	shift 2
	install_for mmdebstrap mmdebstrap
	mirror=$(mirror_of Debian)
	security=$(mirror_of Debian-Security) || security=${mirror%/debian/}/debian-security/
	quiet "mmdebstrap-${dir##*/}" mmdebstrap "$@" \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg "$suite" "$dir" \
		"deb $mirror $suite main" "deb $mirror $suite-updates main" \
		"deb $security $suite-security main"
}

# overlay_on ROOT DIR: mounts a copy of ROOT at DIR. What is changed in it lies beside
# DIR, which has to be in a tmpfs: it goes with that, and not into ROOT.
overlay_on() {
	mkdir "$2" "$2-upper" "$2-work"
	mount -t overlay overlay -o "lowerdir=$1,upperdir=$2-upper,workdir=$2-work" "$2"
}

# firmware_of_debian FILE: where Debian's packages have it.
firmware_of_debian() {
	local dir
	for dir in /usr/share/seabios /usr/share/qemu /usr/lib/ipxe/qemu; do
		if [[ -e $dir/$1 ]]; then
			printf '%s' "$dir/$1"
			return
		fi
	done
	die "$1 is in none of the packages seabios, qemu-system-data, ipxe-qemu"
}

# Builds everything that a real guest needs and tells the programs of tests/e2e
# where it is (see tests/e2e/src/assets.rs).  LAB_KERNEL and LAB_VERSION are what
# the guest runs, as scripts/build-guest --kernel and --version name it.
prepare_lab() {
	step "building QEMU (kept in the cache)"
	GEMINI_QEMU=$("$GEMINI_ROOT/scripts/build-qemu" | tail -n 1)
	step "building the guest (kept in the cache)"
	GEMINI_GUEST=$("$GEMINI_ROOT/scripts/build-guest" --kernel "${LAB_KERNEL:-cloud}" \
		--version "${LAB_VERSION:-6.12}" | tail -n 1)
	step "building the daemon"
	cargo_build vhost-device-gemini gemini-e2e
	GEMINI_DAEMON=$(target_dir)/release/vhost-device-gemini
	export GEMINI_QEMU GEMINI_GUEST GEMINI_DAEMON
}

# The plugin of QEMU's that simulates TLBs, and what replays its traces.
build_tlb_simulator() {
	step "building the TLB simulator"
	cargo_build gemini-tlbsim gemini-tlbsim-plugin
	GEMINI_TLB_PLUGIN=$(target_dir)/release/libgemini_tlbsim_plugin.so
	GEMINI_TLB_REPLAY=$(target_dir)/release/gemini-tlb-replay
	export GEMINI_TLB_PLUGIN GEMINI_TLB_REPLAY
}

target_dir() {
	printf '%s' "${CARGO_TARGET_DIR:-$GEMINI_ROOT/target}"
}
