/* Preloaded into llama-server: it opens no model while the file that GATE names is there. So a test holds it while it loads. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

FILE *
fopen(const char *path, const char *mode)
{
	FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, "fopen");
	const char *gate = getenv("GATE");

	while (gate && strstr(path, ".gguf") && access(gate, F_OK) == 0)
		usleep(5000);
	return real(path, mode);
}

FILE *
fopen64(const char *path, const char *mode)
{
	return fopen(path, mode);
}
