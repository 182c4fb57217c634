# make                   ./tinyauth, static, with musl and BearSSL
# make CC=gcc STATIC=    dynamic, with the system's own libc
# make SANITIZE=1        with address and undefined behaviour sanitizers
# make demo | test | test-clients | test-diff | test-http | fuzz | install | uninstall | clean

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

CFLAGS ?= -O2 -g
HARDENING = -fstack-protector-strong -fstack-clash-protection -fno-strict-aliasing -D_FORTIFY_SOURCE=2
ifneq ($(SANITIZE),)
HARDENING = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif
# Debian keeps BearSSL's headers in a directory of their own: under musl-gcc /usr/include itself must not be searched.
BEARSSL_CFLAGS ?= $(if $(wildcard /usr/include/bearssl/bearssl.h),-I/usr/include/bearssl)
BEARSSL_LIBS ?= $(firstword $(wildcard /usr/lib/$(shell uname -m)-linux-gnu*/libbearssl.a /usr/lib/libbearssl.a) -lbearssl)

ALL_CFLAGS = -std=c11 -Wall -Wextra -Werror -Wshadow -Wformat=2 -Wstrict-prototypes -Wvla \
	$(HARDENING) $(CFLAGS) $(BEARSSL_CFLAGS)
ALL_LDFLAGS = $(STATIC) -Wl,-z,relro,-z,now,-z,noexecstack -Wl,--gc-sections $(LDFLAGS)

tinyauth: tinyauth.c tinyauth.h Makefile
	$(CC) $(ALL_CFLAGS) -o $@ tinyauth.c $(ALL_LDFLAGS) $(BEARSSL_LIBS)

clean:
	rm -rf tinyauth build

.PHONY: clean
