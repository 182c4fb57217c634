/* What the fuzz targets share: the product itself, its invariants' check, and simple readers of HTTP that were written
 * from the rules and not from the product, to judge what it says. */
#ifndef FUZZ_H
#define FUZZ_H

#define main tinyauth_main
#include "../../tinyauth.c"
#undef main

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* An invariant. Its text and line are printed before the end. */
#define MUST(claim) ((claim) ? (void)0 : must_fail(#claim, __FILE__, __LINE__))

__attribute__((noreturn)) static void
must_fail(const char *claim, const char *file, int line)
{
	fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, claim);
	abort();
}

/* Bytes in a block of exactly their size, with room before and behind: what is read or written past it is seen. */
static char *
exact(struct slice s, size_t before, size_t behind)
{
	char *p = malloc(before + s.n + behind);

	MUST(p != NULL || before + s.n + behind == 0);
	if (s.n > 0)
		memcpy(p + before, s.p, s.n);
	return p;
}

/* A growing text. */
struct text {
	char *p;
	size_t n, max;
};

static void
text_add(struct text *t, const char *p, size_t n)
{
	if (t->n + n > t->max) {
		t->max = 2 * (t->n + n) + 256;
		t->p = realloc(t->p, t->max);
		MUST(t->p != NULL);
	}
	if (n > 0)
		memcpy(t->p + t->n, p, n);
	t->n += n;
}

static struct slice
text_slice(const struct text *t)
{
	return (struct slice){t->n > 0 ? t->p : "", t->n};
}

static void
text_free(struct text *t)
{
	free(t->p);
	*t = (struct text){NULL, 0, 0};
}

/* Equal bytes; an empty slice may have no place. */
static bool
same(struct slice a, struct slice b)
{
	return a.n == b.n && (a.n == 0 || memcmp(a.p, b.p, a.n) == 0);
}

static size_t
text_count(struct slice in, const char *what)
{
	size_t n = 0, size = strlen(what);

	for (const char *at; (at = memmem(in.p, in.n, what, size)) != NULL; n++)
		in = (struct slice){at + 1, in.n - (size_t)(at + 1 - in.p)};
	return n;
}

/* ---- a reader of heads that are known to be whole -------------------------------------------------------------- */

enum { READ_MORE = 0, READ_BAD = -1 };

/* Bytes up to and with the empty line; 0: there is none yet. */
static size_t
head_span(struct slice in)
{
	const char *end = in.n > 0 ? memmem(in.p, in.n, "\r\n\r\n", 4) : NULL;

	return end == NULL ? 0 : (size_t)(end + 4 - in.p);
}

/* The next line without its CR LF; false: none is left. Nothing but CR LF may end one. */
static bool
head_next_line(struct slice *rest, struct slice *line)
{
	const char *end = memmem(rest->p, rest->n, "\r\n", 2);

	if (end == NULL || end == rest->p)
		return false;
	*line = (struct slice){rest->p, (size_t)(end - rest->p)};
	*rest = (struct slice){end + 2, rest->n - line->n - 2};
	for (size_t i = 0; i < line->n; i++)
		MUST(line->p[i] != '\r' && line->p[i] != '\n' && line->p[i] != '\0');
	return true;
}

/* Splits a field line at its colon; blanks around the value are no part of it. */
static bool
head_split(struct slice line, struct slice *name, struct slice *value)
{
	const char *colon = memchr(line.p, ':', line.n);

	if (colon == NULL || colon == line.p)
		return false;
	*name = (struct slice){line.p, (size_t)(colon - line.p)};
	*value = (struct slice){colon + 1, line.n - name->n - 1};
	while (value->n > 0 && (value->p[0] == ' ' || value->p[0] == '\t'))
		value->p++, value->n--;
	while (value->n > 0 && (value->p[value->n - 1] == ' ' || value->p[value->n - 1] == '\t'))
		value->n--;
	return true;
}

static bool
same_name(struct slice a, const char *b)
{
	return a.n == strlen(b) && strncasecmp(a.p, b, a.n) == 0;
}

static bool
name_among(struct slice name, const char *const *list)
{
	for (; *list != NULL; list++)
		if (same_name(name, *list) ||
		    ((*list)[strlen(*list) - 1] == '-' && name.n >= strlen(*list) && strncasecmp(name.p, *list, strlen(*list)) == 0))
			return true;
	return false;
}

/* Fields of a request that never pass, whoever wrote them; those that end in `-` are prefixes. */
static const char *const NEVER_UP[] = {"Authorization", "X-Api-Key", "Api-Key", "Keep-Alive", "Proxy-", "HTTP2-Settings",
	"Trailer", "Forwarded", "X-Client-IP", "True-Client-IP", "X-Cluster-Client-IP", NULL};
/* Those that we set: at most one of each. */
static const char *const OURS_UP[] = {"Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "TE", "Expect",
	"X-Real-IP", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Request-Id", NULL};
static const char *const NEVER_DOWN[] = {"Keep-Alive", "Proxy-", "HTTP2-Settings", "Trailer", "TE", NULL};
static const char *const OURS_DOWN[] = {"Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "X-Request-Id", NULL};

/* Checks the fields of a head that tinyauth wrote, and finds how its body is framed: `length` is UINT64_MAX without one. */
static void
head_is_ours(struct slice head, bool request, bool *chunked, uint64_t *length, bool *upgrade)
{
	const char *const *ours = request ? OURS_UP : OURS_DOWN;
	unsigned seen[16] = {0};
	struct slice line, name, value;

	*chunked = *upgrade = false;
	*length = UINT64_MAX;
	MUST(head_next_line(&head, &line));
	while (head_next_line(&head, &line)) {
		MUST(head_split(line, &name, &value));
		MUST(name.p[name.n - 1] != ' ' && name.p[name.n - 1] != '\t' && name.p[0] != ' ' && name.p[0] != '\t');
		MUST(!name_among(name, request ? NEVER_UP : NEVER_DOWN));
		MUST(!request || memchr(name.p, '_', name.n) == NULL);
		bool known = false;
		for (size_t i = 0; ours[i] != NULL; i++)
			if (same_name(name, ours[i])) {
				known = true;
				MUST(seen[i]++ == 0);
			}
		MUST(known || !request || name.n < 12 || strncasecmp(name.p, "X-Forwarded-", 12) != 0);
		if (same_name(name, "Connection"))
			MUST(same_name(value, "upgrade") || same_name(value, "close") ||
			     same_name(value, request ? "TE" : "keep-alive"));
		if (same_name(name, "Upgrade"))
			MUST(same_name(value, "websocket"));
		if (same_name(name, "Upgrade"))
			*upgrade = true;
		if (same_name(name, "Transfer-Encoding")) {
			MUST(same_name(value, "chunked"));
			*chunked = true;
		}
		if (same_name(name, "Content-Length")) {
			char *end, digits[24] = "";
			MUST(value.n >= 1 && value.n <= 18 && strspn(value.p, "0123456789") >= value.n);
			memcpy(digits, value.p, value.n);
			*length = strtoull(digits, &end, 10);
		}
	}
	MUST(!*chunked || *length == UINT64_MAX);
	MUST(head.n == 2);
	if (request)
		MUST(seen[0] == 1 && seen[7] == 1 && seen[8] == 1 && seen[9] == 1 && seen[11] == 1);
}

/* ---- a reader of chunked bodies --------------------------------------------------------------------------------- */

/* What a chunked body is. `used`: bytes up to its end, or up to and with the first bad one. */
struct chunked {
	int verdict;                 /* READ_MORE, READ_BAD, 1: whole */
	size_t used, ext_body;
	bool near_limit;             /* about as many extension bytes as are allowed: either way is right */
	struct text payload;
};

struct reading {
	const char *at, *end;
};

static bool
tchar(int c)
{
	return c > ' ' && c < 0x7f && strchr("\"(),/:;<=>?@[\\]{}", c) == NULL;
}

static bool
text_char(int c)
{
	return c == '\t' || (c >= ' ' && c != 0x7f);
}

/* The next byte, or -1 at the end of what there is. */
static int
peek(const struct reading *r)
{
	return r->at < r->end ? (unsigned char)*r->at : -1;
}

/* Takes one byte that must be `c`. */
static int
take(struct reading *r, int c)
{
	if (peek(r) < 0)
		return READ_MORE;
	return (unsigned char)*r->at++ == c ? 1 : READ_BAD;
}

static int
take_run(struct reading *r, bool (*is)(int))
{
	const char *from = r->at;

	while (peek(r) >= 0 && is(peek(r)))
		r->at++;
	if (peek(r) < 0)
		return READ_MORE;
	if (r->at > from)
		return 1;
	r->at++;
	return READ_BAD;
}

static int
take_quoted(struct reading *r)
{
	for (r->at++; peek(r) != '"'; r->at++) {
		if (peek(r) == '\\')
			r->at++;
		if (peek(r) < 0)
			return READ_MORE;
		if (!text_char(peek(r))) {
			r->at++;
			return READ_BAD;
		}
	}
	r->at++;
	return peek(r) < 0 ? READ_MORE : 1;
}

/* *( ";" token [ "=" ( token / quoted-string ) ] ) */
static int
take_extensions(struct reading *r)
{
	int good;

	while (peek(r) == ';') {
		r->at++;
		if ((good = take_run(r, tchar)) <= 0)
			return good;
		if (peek(r) != '=')
			continue;
		r->at++;
		if (peek(r) < 0)
			return READ_MORE;
		if ((good = peek(r) == '"' ? take_quoted(r) : take_run(r, tchar)) <= 0)
			return good;
	}
	return peek(r) < 0 ? READ_MORE : 1;
}

/* A chunk line: 1 to 15 digits, extensions, CR LF. */
static int
take_size(struct reading *r, struct chunked *c, uint64_t *size)
{
	int digits = 0, good;

	for (*size = 0; peek(r) >= 0 && strchr("0123456789abcdefABCDEF", peek(r)) != NULL && peek(r) != 0; r->at++) {
		if (++digits > 15) {
			r->at++;
			return READ_BAD;
		}
		*size = *size * 16 + (uint64_t)(peek(r) <= '9' ? peek(r) - '0' : (peek(r) | 0x20) - 'a' + 10);
	}
	if (peek(r) < 0)
		return READ_MORE;
	if (digits == 0) {
		r->at++;
		return READ_BAD;
	}
	const char *from = r->at;
	good = take_extensions(r);
	size_t ext = (size_t)(r->at - from);
	c->ext_body += ext;
	if (ext + 2 >= CHUNK_EXT_MAX || c->ext_body + 64 >= CHUNK_EXT_BODY_MAX)
		c->near_limit = true;
	if (good <= 0 || (good = take(r, '\r')) <= 0)
		return good;
	return take(r, '\n');
}

/* Fields as in a head, then the empty line, in at most TRAILER_MAX bytes. */
static int
take_trailers(struct reading *r)
{
	struct reading all = *r;
	int good;

	if ((size_t)(r->end - r->at) > TRAILER_MAX)
		r->end = r->at + TRAILER_MAX;
	for (;;) {
		if (peek(r) == '\r') {
			r->at++;
			good = take(r, '\n');
			break;
		}
		if ((good = take_run(r, tchar)) <= 0 || (good = take(r, ':')) <= 0)
			break;
		while (peek(r) >= 0 && text_char(peek(r)))
			r->at++;
		if ((good = take(r, '\r')) <= 0 || (good = take(r, '\n')) <= 0)
			break;
	}
	if (good == READ_MORE && r->end < all.end) {
		r->at = r->end + 1;
		good = READ_BAD;
	}
	r->end = all.end;
	return good;
}

static struct chunked
chunked_read(struct slice in)
{
	struct chunked c = {.verdict = READ_MORE};
	struct reading r = {in.p, in.p + in.n};
	uint64_t size;

	for (;;) {
		if ((c.verdict = take_size(&r, &c, &size)) <= 0)
			break;
		if (size == 0) {
			c.verdict = take_trailers(&r);
			break;
		}
		size_t there = (size_t)(r.end - r.at) < size ? (size_t)(r.end - r.at) : (size_t)size;
		text_add(&c.payload, r.at, there);
		r.at += there;
		if (there < size || (c.verdict = take(&r, '\r')) <= 0 || (c.verdict = take(&r, '\n')) <= 0) {
			c.verdict = there < size ? READ_MORE : c.verdict;
			break;
		}
	}
	c.used = (size_t)(r.at - in.p);
	return c;
}

#endif
