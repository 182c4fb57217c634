/* Goal: the keys file. It is taken exactly when a reader of another make takes it, with the same keys; a refused one
 * changes nothing that is published, and names each bad line. */
#include "fuzz.h"

/* Input: flags, then the file. */
enum { ENV_KEY = 1, MANY = 8192 };

static struct keys_map *map;
static unsigned char published[32];  /* digest of a key that holds, once `any` is set */
static bool any;

struct entry {
	struct slice name;
	unsigned char digest[32];
	bool off;
};

struct reader {
	struct entry entry[MANY];
	size_t n, bad;
};

static void
digest_of(struct slice s, unsigned char digest[32])
{
	br_sha256_context sha;

	br_sha256_init(&sha);
	br_sha256_update(&sha, s.p, s.n);
	br_sha256_out(&sha, digest);
}

static bool
name_allowed(struct slice s)
{
	static const char ALLOWED[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._@-";

	for (size_t i = 0; i < s.n; i++)
		if (memchr(ALLOWED, s.p[i], sizeof ALLOWED - 1) == NULL)
			return false;
	return s.n >= 1 && s.n <= 64;
}

static bool
secret_allowed(struct slice s, unsigned char digest[32])
{
	if (s.n >= 7 && strncmp(s.p, "sha256:", 7) == 0) {
		for (size_t i = 0; s.n == 71 && i < 32; i++) {
			char pair[3] = {s.p[7 + 2 * i], s.p[8 + 2 * i], '\0'}, *end;
			if (strspn(pair, "0123456789abcdefABCDEF") != 2)
				return false;
			digest[i] = (unsigned char)strtoul(pair, &end, 16);
		}
		return s.n == 71;
	}
	for (size_t i = 0; i < s.n; i++)
		if ((unsigned char)s.p[i] <= ' ' || (unsigned char)s.p[i] >= 0x7f)
			return false;
	digest_of(s, digest);
	return s.n >= 1 && s.n <= 4096;
}

static bool
reader_add(struct reader *r, const struct entry *e)
{
	for (size_t i = 0; i < r->n; i++)
		if (same(r->entry[i].name, e->name) || memcmp(r->entry[i].digest, e->digest, 32) == 0)
			return false;
	r->entry[r->n++] = *e;
	return true;
}

/* Splits off the next field; one that begins with # ends the line. */
static struct slice
word(struct slice *line)
{
	size_t from = 0, to;

	while (from < line->n && (line->p[from] == ' ' || line->p[from] == '\t'))
		from++;
	if (from < line->n && line->p[from] == '#')
		from = line->n;
	for (to = from; to < line->n && line->p[to] != ' ' && line->p[to] != '\t'; to++)
		continue;
	struct slice found = {line->p + from, to - from};
	*line = (struct slice){line->p + to, line->n - to};
	return found;
}

static void
reader_line(struct reader *r, struct slice line)
{
	struct entry e = {.name = word(&line)};
	struct slice attribute;

	if (e.name.n == 0)
		return;
	bool good = name_allowed(e.name) && secret_allowed(word(&line), e.digest);
	while (good && (attribute = word(&line)).n > 0) {
		good = same(attribute, S("off"));
		e.off = true;
	}
	r->bad += !good || !reader_add(r, &e);
}

static void
reader_run(struct reader *r, struct slice in, bool env, const unsigned char env_digest[32])
{
	struct entry e = {.name = S("env")};

	r->n = r->bad = 0;
	if (env) {
		memcpy(e.digest, env_digest, 32);
		reader_add(r, &e);
	}
	for (size_t from = 0, to; from < in.n; from = to + 1) {
		for (to = from; to < in.n && in.p[to] != '\n'; to++)
			continue;
		struct slice line = {in.p + from, to - from};
		if (line.n > 0 && line.p[line.n - 1] == '\r')
			line.n--;
		reader_line(r, line);
	}
	if (r->n == 0 && r->bad == 0)
		r->bad = 1;
}

/* Every key is found by its digest, and no digest beside it is. */
static void
check_found(const struct reader *r)
{
	struct key key;

	MUST(map->half[map->generation & 1].count == r->n);
	for (size_t i = 0; i < r->n; i++) {
		const struct entry *e = &r->entry[i];
		unsigned char other[32];
		MUST(keys_find(map, e->digest, &key));
		MUST(same(slice_of(key.name), e->name) && key.flags == (e->off ? KEY_OFF : 0));
		memcpy(other, e->digest, 32);
		other[31 - i % 32] ^= (unsigned char)(1 << i % 8);
		bool known = false;
		for (size_t k = 0; k < r->n && !known; k++)
			known = memcmp(r->entry[k].digest, other, 32) == 0;
		MUST(keys_find(map, other, &key) == known);
	}
}

/* The lines on stderr: FILE:LINE: text, one for each bad line up to a hundred. */
static void
check_complaints(const char *said, size_t bad)
{
	size_t shown = bad < KEYS_ERRORS_SHOWN ? bad : KEYS_ERRORS_SHOWN;

	MUST(text_count(slice_of(said), "\n") == shown && text_count(slice_of(said), "FILE:") >= shown);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	size_t size;
	int fd;

	(void)argc, (void)argv;
	map = keys_new(0, &size, &fd);
	map->salt = 0x9e3779b97f4a7c15ull;
	close(fd);
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static struct reader want;
	static struct config cfg;

	if (n == 0 || n > MANY)
		return -1;
	struct slice in = {(const char *)data + 1, n - 1};
	char *block = exact(in, 0, 0), *said;
	size_t said_n;
	int to = memfd_create("said", MFD_CLOEXEC);
	struct complaints bad = {.to = to, .file = "FILE"};
	uint64_t generation = map->generation;
	struct key key;

	cfg.env_key = data[0] & ENV_KEY;
	digest_of(S("key2"), cfg.env_digest);
	reader_run(&want, in, cfg.env_key, cfg.env_digest);
	bool good = keys_parse(map, (struct slice){block, in.n}, keys_bound((struct slice){block, in.n}), &cfg, &bad);
	said_n = (size_t)lseek(to, 0, SEEK_CUR);
	said = calloc(1, said_n + 1);
	MUST(pread(to, said, said_n, 0) == (ssize_t)said_n);
	close(to);
	MUST(good == (want.bad == 0) && bad.n == want.bad && map->generation == generation);
	check_complaints(said, want.bad);
	MUST(!any || keys_find(map, published, &key));
	struct file file = {block, in.n, in.n, {.st_mode = 0644}, true};
	keys_exposed(&file);
	MUST(keys_count((struct slice){block, in.n}) < keys_bound((struct slice){block, in.n}));
	if (good) {
		keys_flip(map);
		check_found(&want);
		memcpy(published, want.entry[0].digest, 32);
		any = true;
	}
	free(said);
	free(block);
	return 0;
}
