# make                   ./tinyauth, static, with musl and BearSSL
# make CC=gcc STATIC=    dynamic, with the system's own libc
# make SANITIZE=1        with address and undefined behaviour sanitizers
# make PORTABLE=1        without what only Linux has: epoll, memfd, seccomp, Landlock
# make cert             a self-signed certificate for trying out: cert.pem, key.pem
# make demo | test | test-http | test-tls | test-minimal | test-inetd | test-openrc | test-systemd | test-image |
#      test-register | test-cross | test-kernels | test-releases | test-clients | test-real | test-diff | test-faults | test-ports |
#      test-swarm | bench |
#      coverage | fuzz | analyse | lint | install | uninstall | clean

PREFIX ?= /usr/local
DESTDIR ?=
STATIC ?= -static
SANITIZE ?=

# Debian's musl-gcc where there is one; on Alpine the system's gcc is musl's already.
ifeq ($(origin CC),default)
CC := $(if $(shell command -v musl-gcc 2>/dev/null),musl-gcc,gcc)
endif
ifneq ($(SANITIZE),)
CC := $(if $(filter musl-gcc,$(CC)),gcc,$(CC))
STATIC :=
endif

# Small before fast: nearly all of the time goes to the kernel. The others are what else makes gcc's code smaller.
SMALLEST = -Oz -fipa-pta -fno-move-loop-invariants -fno-tree-dominator-opts -fno-caller-saves -fno-tree-tail-merge -fno-jump-tables \
	-fno-thread-jumps
SMALL := $(shell for flags in "$(SMALLEST)" -Oz -Os; do \
	$(CC) $$flags -Werror -c -x c -o /dev/null /dev/null 2>/dev/null && echo "$$flags" && break; done)
CFLAGS ?= $(SMALL) -g -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables
HARDENING = -fstack-protector-strong -fstack-clash-protection -fno-strict-aliasing -D_FORTIFY_SOURCE=2
ifneq ($(SANITIZE),)
HARDENING = -DTINYAUTH_NO_SANDBOX -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif
# Debian keeps BearSSL's headers in a directory of their own: under musl-gcc /usr/include itself must not be searched.
BEARSSL_CFLAGS ?= $(patsubst %/bearssl.h,-I%,$(firstword $(wildcard /usr/include/bearssl/bearssl.h /usr/local/include/bearssl.h)))
BEARSSL_LIBS ?= $(firstword $(wildcard $(addsuffix /libbearssl.a,/usr/lib/$(shell gcc -print-multiarch 2>/dev/null) /usr/lib /usr/local/lib)))
OBJCOPY ?= objcopy

PORTABLE ?=
# Debian's compiler makes position-independent code also for what is linked to a fixed place.
ALL_CFLAGS = $(if $(STATIC),-fno-pie) $(if $(PORTABLE),-DTINYAUTH_PORTABLE) -std=c11 -Wall -Wextra -Werror -Wshadow -Wformat=2 -Wstrict-prototypes -Wvla \
	$(HARDENING) $(CFLAGS) $(BEARSSL_CFLAGS)
# In a static program musl does not apply relro: it and the linker's rounding would only fill the file up to a page.
MUSL := $(findstring musl,$(CC) $(shell $(CC) -dumpmachine 2>/dev/null))
RELRO = $(if $(and $(STATIC),$(MUSL)),-z norelro -z common-page-size=64,-z relro -z now)
ALL_LDFLAGS = $(if $(STATIC),$(STATIC) -no-pie) $(addprefix -Xlinker ,$(RELRO) -z noexecstack -z noseparate-code --gc-sections) $(LDFLAGS)

COMPILE = $(CC) $(ALL_CFLAGS)
LINK = $(ALL_LDFLAGS) build/libbearssl.a

tinyauth: tinyauth.c tinyauth.h build/flags build/libbearssl.a
	$(COMPILE) -o $@ tinyauth.c $(LINK)

# Tables for unwinding the library's stack, which nothing does, would be 11 KB of the binary.
build/libbearssl.a: $(BEARSSL_LIBS) build/flags
	$(OBJCOPY) -R .eh_frame -R .rela.eh_frame $(BEARSSL_LIBS) $@

build/unit: tests/unit.c tinyauth.c tinyauth.h build/flags build/libbearssl.a
	$(COMPILE) -Wno-unused-function -o $@ tests/unit.c $(LINK)

# Changes when the flags do, so that a build with others is never taken for this one.
build/flags: force
	@mkdir -p build
	@echo '$(COMPILE) $(LINK) $(BEARSSL_LIBS)' | cmp -s - $@ || echo '$(COMPILE) $(LINK) $(BEARSSL_LIBS)' >$@

demo: tinyauth
	sh tests/demo.sh

test: tinyauth build/unit
	UNIT_TESTS=build/unit sh test.sh

test-http: tinyauth
	python3 tests/http/run.py

test-tls: tinyauth
	python3 tests/tls/run.py

test-minimal: tinyauth
	python3 tests/minimal.py

test-register: tinyauth
	python3 tests/register.py

test-inetd: tinyauth
	python3 tests/inetd/run.py

test-openrc: tinyauth
	python3 tests/openrc/run.py

# SUITE is the Debian whose systemd it is: bookworm has 252, trixie 257.
SUITE ?= bookworm
test-systemd: tinyauth
	bash tests/systemd/run.sh --suite $(SUITE)

test-image: tinyauth
	bash tests/image/run.sh

test-cross:
	bash tests/cross/run.sh

# Debian's kernels for other processors, booted in an emulator.
test-kernels:
	python3 tests/kernels/run.py

# README's commands in clean roots of the Debian releases.
test-releases:
	bash tests/releases/run.sh

# Instructions of a request, an event and a refusal, against those recorded.
guard: tinyauth
	sh tests/guard/run.sh

bench: tinyauth
	python3 bench/run.py

# make cross ARCH=aarch64|armhf|riscv64: build/ARCH/tinyauth. tests/cross/toolchain.sh ARCH installs the compiler, and puts that
# architecture's musl and BearSSL, as Debian builds them, into CROSS_ROOT.
CROSS_GNU_aarch64 = aarch64-linux-gnu
CROSS_GNU_armhf = arm-linux-gnueabihf
CROSS_GNU_riscv64 = riscv64-linux-gnu
CROSS_ROOT ?= $(CURDIR)/build/cross/$(ARCH)
CROSS_GNU = $(CROSS_GNU_$(ARCH))
CROSS_USR = $(CROSS_ROOT)/usr
cross: BEARSSL_CFLAGS = -I$(CROSS_USR)/include/bearssl
cross:
	@test -n "$(CROSS_GNU)" || { echo "make cross ARCH=aarch64|armhf|riscv64" >&2; exit 64; }
	@test -d $(CROSS_USR) || { echo "$(CROSS_ROOT) is not there: tests/cross/toolchain.sh $(ARCH) makes it, as root" >&2; exit 1; }
	@mkdir -p build/$(ARCH)
	$(CROSS_GNU)-objcopy -R .eh_frame -R .rela.eh_frame -R .rel.eh_frame $(CROSS_USR)/lib/$(CROSS_GNU)/libbearssl.a \
		build/$(ARCH)/libbearssl.a
	$(CROSS_GNU)-gcc -specs $(wildcard $(CROSS_USR)/lib/*-linux-musl*/musl-gcc.specs) $(ALL_CFLAGS) \
		-ffile-prefix-map=$(CURDIR)=. -o build/$(ARCH)/tinyauth tinyauth.c $(ALL_LDFLAGS) -s build/$(ARCH)/libbearssl.a

# dist/: stripped binaries of the four architectures, manual pages and checksums.
VERSION := $(shell sed -n 's/^.define TINYAUTH_VERSION "\(.*\)"/\1/p' tinyauth.h)
dist: tinyauth
	rm -rf dist
	mkdir dist
	install -s -m 755 tinyauth dist/tinyauth-$(VERSION)-x86_64
	for arch in aarch64 armhf riscv64; do \
		$(MAKE) cross ARCH=$$arch && install -m 755 build/$$arch/tinyauth dist/tinyauth-$(VERSION)-$$arch || exit 1; done
	install -m 644 man/tinyauth.8 man/tinyauth-keys.5 dist
	cd dist && sha256sum * >SHA256SUMS

NAMES ?= DNS:localhost,IP:127.0.0.1,IP:::1
cert:
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=localhost \
		-addext subjectAltName=$(NAMES) -keyout key.pem -out cert.pem

test-clients: tinyauth
	sh tests/clients/run.sh

# llama-server and Ollama themselves behind it; makes them first, once.
test-real: tinyauth
	python3 tests/real/run.py

# N mutated requests, made from SEED, read by the parsers of five servers; then servers that leave bodies unread.
N ?= 20000
SEED ?= 1
test-diff: tinyauth
	N=$(N) SEED=$(SEED) sh tests/diff/run.sh

# Without seccomp: a call that strace makes fail has no number that any list could allow.
build/unwalled: tinyauth.c tinyauth.h build/flags build/libbearssl.a
	$(COMPILE) -DTINYAUTH_NO_SANDBOX -o $@ tinyauth.c $(LINK)

test-faults: tinyauth build/unwalled
	python3 tests/faults/run.py --tinyauth build/unwalled

# One upstream connection a request, and enough local ports for them; needs root and network namespaces.
test-ports: tinyauth
	python3 tests/faults/ports.py

# A swarm of hostile and honest clients; best with SANITIZE=1.
test-swarm: tinyauth
	python3 tests/faults/swarm.py

# Each fuzz target for so many seconds.
SECONDS ?= 30
fuzz:
	sh tests/fuzz/run.sh $(SECONDS)

# Lines of tinyauth.c that `make test` reaches, but for what it measures.
coverage:
	rm -rf build/coverage
	mkdir -p build/coverage
	gcc -std=c11 -O0 -g --coverage -DTINYAUTH_NO_SANDBOX -fprofile-update=atomic $(BEARSSL_CFLAGS) -o build/coverage/tinyauth tinyauth.c $(BEARSSL_LIBS)
	gcc -std=c11 -O0 -g --coverage -DTINYAUTH_NO_SANDBOX -fprofile-update=atomic $(BEARSSL_CFLAGS) -Wno-unused-function -o build/coverage/unit \
		tests/unit.c $(BEARSSL_LIBS)
	UNIT_TESTS=build/coverage/unit sh test.sh --tinyauth build/coverage/tinyauth --no-measure
	gcovr --root . --filter tinyauth.c --print-summary --fail-under-line 90 build/coverage

analyse:
	clang --analyze -Xclang -analyzer-werror -std=c11 $(BEARSSL_CFLAGS) tinyauth.c
	rm -f tinyauth.plist
	cppcheck --enable=warning,performance,portability --std=c11 $(BEARSSL_CFLAGS) --suppress=missingIncludeSystem --quiet \
		--error-exitcode=1 tinyauth.c

lint:
	mandoc -Tlint -Wwarning man/tinyauth.8 man/tinyauth-keys.5
	shellcheck test.sh tests/*.sh tests/*/*.sh .ci/run

install: tinyauth
	install -d $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(PREFIX)/share/man/man8 $(DESTDIR)$(PREFIX)/share/man/man5
	install -d $(DESTDIR)$(PREFIX)/share/doc/tinyauth
	install -m 755 -s tinyauth $(DESTDIR)$(PREFIX)/sbin/tinyauth
	install -m 644 man/tinyauth.8 $(DESTDIR)$(PREFIX)/share/man/man8/tinyauth.8
	install -m 644 man/tinyauth-keys.5 $(DESTDIR)$(PREFIX)/share/man/man5/tinyauth-keys.5
	install -d $(DESTDIR)$(PREFIX)/share/doc/tinyauth/systemd
	for unit in contrib/systemd/*; do sed 's|/usr/local/sbin|$(PREFIX)/sbin|g' $$unit \
		>$(DESTDIR)$(PREFIX)/share/doc/tinyauth/systemd/$${unit##*/} || exit 1; done
	install -m 644 keys.example README.md LICENSE $(DESTDIR)$(PREFIX)/share/doc/tinyauth

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/sbin/tinyauth
	rm -f $(DESTDIR)$(PREFIX)/share/man/man8/tinyauth.8 $(DESTDIR)$(PREFIX)/share/man/man5/tinyauth-keys.5
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/tinyauth

clean:
	rm -rf tinyauth build

.PHONY: guard bench cert cross dist demo test test-http test-tls test-minimal test-register test-inetd test-openrc test-systemd \
	test-image test-cross test-kernels test-releases test-clients test-real test-diff test-faults test-ports test-swarm coverage fuzz analyse lint \
	install uninstall clean force
