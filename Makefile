# make help says what there is. KERNEL=patched (7.3 with the project's series,
# built here the first time), KERNEL=patched-6.12 (the same for 6.12), KERNEL=stock
# (Debian's 6.12) or KERNEL=backports (the newest in trixie-backports) chooses the
# guest's kernel.
KERNEL ?= patched
# The Linux whose series guest-kernel, compare and the checks of a series take.
SERIES ?= 7.3
# Of its kernels' names.
SUFFIX = $(if $(filter-out 7.3,$(SERIES)),-$(SERIES))

.PHONY: help demo test lint clippy quick miri asan fuzz soak bench bench-guest compare guest-kernel check-patches check-arches check-kernel-debug setup update clean

help:
	@echo 'make demo         the NVMe flow from end to end, and its summary'
	@echo 'make test         format, lints, unit and integration tests, guest boots'
	@echo 'make quick        format, lints, unit and socket tests: no network, no guest'
	@echo 'make lint         format, clippy, spelling, links and lines of the documents'
	@echo 'make miri         the unit tests of what is lock-free, under Miri'
	@echo 'make asan         unit and socket tests under the address sanitizer'
	@echo 'make fuzz         each fuzz target, SECONDS=60 long'
	@echo 'make soak         what must hold for hours: an hour of it'
	@echo 'make bench        the address space beside a BTreeMap, events, the live state, and reports'
	@echo 'make bench-guest  guest I/O here and on the devices inside QEMU'
	@echo 'make compare      Linux without the series and with it, with the protocol off and on:'
	@echo '                  what an I/O costs in requests, kicks, time and memory'
	@echo 'make guest-kernel build the guest kernel with the series in guest-kernel-patches/'
	@echo 'make check-patches apply, build and check that series, patch by patch'
	@echo 'make check-arches compile what that series changes for i386 and arm64 with 64 KiB pages'
	@echo 'make check-kernel-debug boot that series with KASAN, lockdep and DMA_API_DEBUG'
	@echo 'make setup        install what this machine lacks'
	@echo 'make update       look for a newer QEMU, kernels and guest tools'
	@echo 'make clean        remove target/; what was fetched stays in the cache'
	@echo 'KERNEL=patched, patched-6.12, stock or backports chooses the kernel of the demo: the patched'
	@echo 'ones are built the first time (about 12 minutes), the others are Debian'"'"'s own and quick.'
	@echo 'SERIES=6.12 takes another Linux than 7.3 for guest-kernel, compare and the checks.'

demo:
	@scripts/demo $(KERNEL)

# What is quick comes first. Guests one at a time: each has threads enough for
# two processors.
test:
	@scripts/step --begin
	scripts/step 'packages' scripts/setup patched
	scripts/step 'lints' $(MAKE) --no-print-directory lint
	scripts/step 'unit and socket tests' env VIOMMU_STRESS_SECONDS=60 cargo test --workspace
	scripts/step 'fuzzing' scripts/fuzz 20
	scripts/step 'loom' env RUSTFLAGS='--cfg loom' \
		cargo test --release --target-dir target/loom -p viommu -p viommu-trace --lib loom_
	scripts/step 'guest of Debian' scripts/prepare-guest stock
	scripts/step 'guest of its backports' scripts/prepare-guest backports
	scripts/step 'tests of Debian'"'"'s kernels' cargo test --test guest -- --test-threads=1 --skip patched::
	scripts/step 'guest with the series for 7.3' scripts/prepare-guest patched
	scripts/step 'tests of the series for 7.3' env VIOMMU_SERIES=7.3 \
		cargo test --test guest -- --test-threads=1 --skip linux_6_12:: --skip suspend:: patched::
	scripts/step 'guest with the series for 6.12' scripts/prepare-guest patched-6.12
	scripts/step 'tests of the series for 6.12' env VIOMMU_SERIES=6.12 \
		cargo test --test guest -- --test-threads=1 --skip linux_7_3:: patched::
	@scripts/step --end

lint: clippy
	$$(scripts/get-typos)
	cargo test --test plain documents::

clippy:
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --test guest -- -D warnings
	cargo clippy --manifest-path fuzz/Cargo.toml --target-dir target -- -D warnings

# Spelling is left to `make lint`: the checker comes from the network.
quick: clippy
	cargo test --workspace

# Half a minute. The tables' entries hold addresses as numbers, so provenance is exposed.
miri:
	@cargo +nightly miri --version >/dev/null || \
		{ echo 'Miri is missing; to do: rustup toolchain install nightly --component miri,rust-src' >&2; exit 1; }
	MIRIFLAGS=-Zmiri-permissive-provenance cargo +nightly miri test --target-dir target/miri -p viommu -p viommu-trace --lib -- iommu:: ring::

# Ten minutes, nearly all of it building. RUSTC_BOOTSTRAP is for -Zsanitizer, whose
# runtime is part of the stable toolchain.
asan:
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --workspace --target x86_64-unknown-linux-gnu --target-dir target/asan

SECONDS ?= 60

fuzz:
	@scripts/fuzz $(SECONDS)

soak:
	VIOMMU_SOAK=1 cargo test --release --test daemon soak:: -- --nocapture --test-threads=1

bench:
	@scripts/setup stock
	cargo bench --no-fail-fast --bench address_space --bench trace --bench live_state --bench report

bench-guest:
	@scripts/setup stock
	scripts/prepare-guest stock
	cargo bench --bench guest

compare:
	@scripts/setup patched
	scripts/prepare-guest patched$(SUFFIX)
	scripts/prepare-guest unpatched$(SUFFIX)
	VIOMMU_SERIES=$(SERIES) cargo bench --bench compare

guest-kernel:
	@scripts/build-guest-kernel --series $(SERIES)

check-patches:
	@scripts/check-patches --series $(SERIES)

check-arches:
	@scripts/check-arches --series $(SERIES)

check-kernel-debug:
	@scripts/setup patched
	@scripts/check-kernel-debug --series $(SERIES)

setup:
	@scripts/setup $(KERNEL)

update:
	scripts/get-qemu --update
	scripts/get-kernel stock --update
	scripts/get-kernel backports --update
	scripts/get-kernel patched --update
	scripts/get-kernel patched-6.12 --update
	scripts/get-guest-tools --update

clean:
	cargo clean
