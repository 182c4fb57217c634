/* Goal: command line and environment. What is taken lies within its bounds, what is refused has a sentence, the same words
 * give the same configuration from either place, and the command line wins. No name is looked up. */
#define _GNU_SOURCE
#include <netdb.h>
static int numeric_only(const char *, const char *, const struct addrinfo *, struct addrinfo **);
#define getaddrinfo numeric_only
#include "fuzz.h"
#undef getaddrinfo

enum { WORDS = 24 };

/* Input: words with a NUL between them; those that begin with TINYAUTH_ go to the environment. */
struct words {
	char *argv[WORDS + 1];
	char *env[WORDS];
	size_t args, envs;
};

static int
numeric_only(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list)
{
	struct addrinfo numeric = *hints;

	numeric.ai_flags |= AI_NUMERICHOST;
	return getaddrinfo(host, port, &numeric, list);
}

static void
words_read(struct words *w, char *p, size_t n)
{
	w->args = w->envs = 0;
	for (char *end = p + n; p < end; p += strlen(p) + 1) {
		bool env = strncmp(p, "TINYAUTH_", 9) == 0 && strchr(p, '=') > p + 9;
		if (env && w->envs < WORDS)
			w->env[w->envs++] = p;
		else if (!env && w->args < WORDS)
			w->argv[w->args++] = p;
	}
	w->argv[w->args] = NULL;
}

static void
environment_empty(void)
{
	char name[VARIABLE_MAX];

	unsetenv("TINYAUTH_KEY");
	for (size_t i = 0; i < LENGTH(OPTIONS); i++) {
		option_variable(&OPTIONS[i], name);
		unsetenv(name);
	}
}

static void
environment_set(const char *assignment)
{
	const char *value = strchr(assignment, '=');
	char *name = strndup(assignment, (size_t)(value - assignment));

	setenv(name, value + 1, 1);
	free(name);
}

static bool
text_equal(const char *a, const char *b)
{
	return a == b || (a != NULL && b != NULL && strcmp(a, b) == 0);
}

static bool
config_equal(const struct config *a, const struct config *b)
{
	for (unsigned i = 0; i < a->listens; i++)
		if (strcmp(a->listen[i].text, b->listen[i].text) != 0)
			return false;
	return text_equal(a->keys, b->keys) && text_equal(a->log, b->log) &&
	       a->env_key == b->env_key && memcmp(a->env_digest, b->env_digest, 32) == 0 && a->listens == b->listens &&
	       strcmp(a->upstream.text, b->upstream.text) == 0 && strcmp(a->upstream.host, b->upstream.host) == 0 &&
	       a->upstream.addrs == b->upstream.addrs && a->workers == b->workers && a->max_conns == b->max_conns &&
	       a->ip_rate.interval_ns == b->ip_rate.interval_ns && a->ip_rate.burst == b->ip_rate.burst &&
	       a->ip_conns == b->ip_conns && a->log_format == b->log_format && a->header_ms == b->header_ms &&
	       a->connect_ms == b->connect_ms && a->first_byte_ms == b->first_byte_ms && a->idle_ms == b->idle_ms &&
	       a->keepalive_ms == b->keepalive_ms && a->drain_ms == b->drain_ms;
}

/* No deadline may wrap, nor the allowance of a rate. */
static void
check_bounds(const struct config *cfg)
{
	const uint64_t times[] = {cfg->header_ms, cfg->connect_ms, cfg->first_byte_ms, cfg->idle_ms, cfg->keepalive_ms, cfg->drain_ms};
	uint64_t reach;

	for (size_t i = 0; i < LENGTH(times); i++)
		MUST(times[i] > 0 && times[i] < UINT64_MAX / 4 / NS_PER_MS);
	MUST(cfg->workers >= 1 && cfg->workers <= WORKERS_MAX && cfg->max_conns >= 1 && cfg->max_conns <= 1000000);
	MUST(cfg->ip_conns >= 1 && cfg->ip_conns <= 1000000 && cfg->ip_rate.burst <= 100000);
	MUST(!__builtin_mul_overflow(cfg->ip_rate.interval_ns, cfg->ip_rate.burst + 1, &reach) && reach < UINT64_MAX - (1ull << 62));
	MUST(cfg->listens >= 1 && cfg->listens <= LISTEN_MAX && (cfg->upstream.named || cfg->upstream.addrs >= 1) && cfg->upstream.addrs <= UPSTREAM_ADDRS);
	MUST(cfg->upstream.host[0] != '\0' && cfg->upstream.text[0] != '\0');
	MUST(cfg->keys == NULL || cfg->keys[0] != '\0');
	MUST(cfg->log == NULL || cfg->log[0] != '\0');
	MUST(cfg->log_format == LOG_JSON || cfg->log_format == LOG_LOGFMT);
	for (unsigned i = 0; i < cfg->listens; i++)
		MUST(cfg->listen[i].text[0] != '\0');
}

/* config_read() with the sentence checked. */
static bool
read_all(struct config *cfg, char *const *argv, size_t max, bool *usage)
{
	char *rest[WORDS + 1] = {NULL};
	struct mistake m;

	memset(&m, 0xa5, sizeof m);
	bool good = config_read(cfg, argv, rest, max, usage, &m);
	MUST(good || (m.text[0] != '\0' && memchr(m.text, '\0', sizeof m.text) != NULL));
	if (good)
		check_bounds(cfg);
	return good;
}

/* `--name=value` says what TINYAUTH_NAME=value does, and outdoes it. */
static void
check_places(const char *argument)
{
	static struct config from_line, from_both, from_env;
	const char *value = strchr(argument, '=');
	const struct option_row *row;
	char name[VARIABLE_MAX], *argv[] = {(char *)(uintptr_t)argument, NULL}, *none[] = {NULL};
	bool usage;

	if (strncmp(argument, "--", 2) != 0 || value == NULL ||
	    (row = option_find(argument + 2, (size_t)(value - argument - 2), 0)) == NULL)
		return;
	option_variable(row, name);
	environment_empty();
	bool good = read_all(&from_line, argv, 0, &usage);
	MUST(good || usage || strncmp(row->name, "tls-", 4) == 0);   /* half of a pair: the other may be in the environment */
	setenv(name, "\x7f", 1);
	MUST(read_all(&from_both, argv, 0, &usage) == good);
	MUST(!good || config_equal(&from_line, &from_both));
	setenv(name, value + 1, 1);
	if (strchr(value, ',') != NULL)
		return;
	MUST(read_all(&from_env, none, 0, &usage) == good);
	MUST(good ? config_equal(&from_line, &from_env) : !usage);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static struct config first, second;
	struct words w;
	char *block = exact((struct slice){(const char *)data, n}, 0, 1);
	bool usage;

	block[n] = '\0';
	words_read(&w, block, n);
	environment_empty();
	for (size_t i = 0; i < w.envs; i++)
		environment_set(w.env[i]);
	bool good = read_all(&first, w.argv, n % 2 ? WORDS : 0, &usage);
	MUST(!(good && getenv("TINYAUTH_KEY") != NULL) || (first.env_key && strncmp(getenv("TINYAUTH_KEY"), "sha256:", 7) == 0));
	/* What an upgraded binary finds in the environment is the same. */
	MUST(read_all(&second, w.argv, n % 2 ? WORDS : 0, &usage) == good);
	MUST(!good || config_equal(&first, &second));
	for (size_t i = 0; i < w.args; i++)
		check_places(w.argv[i]);
	environment_empty();
	free(block);
	return 0;
}
