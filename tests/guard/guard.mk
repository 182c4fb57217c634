# make -f tests/guard/guard.mk build/guard: with the flags of the product.
include Makefile

build/guard: tests/guard/guard.c tinyauth.c tinyauth.h build/flags build/libbearssl.a
	$(COMPILE) -Wno-unused-function -o $@ tests/guard/guard.c $(LINK)
