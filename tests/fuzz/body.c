/* Goal: bodies in all three forms. Whole, byte by byte and in pieces the same bytes are taken and come out, as a decoder of
 * another make reads them; a body that was not whole never gets an end. */
#include "fuzz.h"

/* Input: kind and form; the length, two bytes; how it is cut; then the body and what comes behind it. */
enum { HEADER = 4 };

struct run {
	bool bad;
	size_t used;                 /* bytes taken as the body's */
	struct body body;
	struct text out;
};

/* Runs a body through body_run() in pieces whose sizes come from `cut`: 0 whole, 1 byte by byte. */
static struct run
run(struct body b, struct slice in, unsigned cut)
{
	struct run r = {.body = b};
	uint32_t random = cut;

	while (r.used < in.n && !r.body.done) {
		random = random * 1664525u + 1013904223u;
		size_t n = in.n - r.used, piece = cut == 0 ? n : cut == 1 ? 1 : 1 + (random >> 24) % (cut % 2 ? 5 : 40), out_n;
		struct slice part = {in.p + r.used, piece < n ? piece : n};
		char *block = exact(part, SLACK, TAIL), *out;
		ssize_t used = body_run(&r.body, block + SLACK, part.n, &out, &out_n);
		MUST(used <= (ssize_t)part.n);
		if (used >= 0) {
			MUST(out >= block && out + out_n <= block + SLACK + part.n + TAIL);
			MUST((size_t)used == part.n || r.body.done);
			MUST(b.form == FORM_CHUNKED || out + out_n <= block + SLACK + used);
			MUST(memcmp(block + SLACK + used, part.p + used, part.n - (size_t)used) == 0);   /* the next request */
			text_add(&r.out, out, out_n);
			r.used += (size_t)used;
		}
		free(block);
		if (used < 0) {
			r.bad = true;
			r.used += cut == 1;  /* the bad byte itself */
			break;
		}
	}
	return r;
}

/* What came out of chunks, as bytes: by its form. */
static void
check_chunks(const struct run *r, const struct chunked *want)
{
	struct slice out = text_slice(&r->out);

	if (r->body.form == FORM_SAME) {
		struct chunked seen = chunked_read(out);
		MUST(seen.verdict == (r->body.done ? 1 : READ_MORE) && seen.used == out.n);
		MUST(seen.payload.n <= want->payload.n);
		MUST(r->bad || seen.payload.n == want->payload.n);
		MUST(seen.payload.n == 0 || memcmp(seen.payload.p, want->payload.p, seen.payload.n) == 0);
		MUST(memchr(out.p, ';', out.n) == NULL || memchr(want->payload.n ? want->payload.p : "", ';', want->payload.n) != NULL);
		text_free(&seen.payload);
		return;
	}
	MUST(out.n <= want->payload.n && (r->bad || out.n == want->payload.n));
	MUST(out.n == 0 || memcmp(out.p, want->payload.p, out.n) == 0);
}

static void
check_chunked(struct body b, struct slice in, unsigned cut)
{
	struct chunked want = chunked_read(in);
	struct run whole = run(b, in, 0), bytes = run(b, in, 1), pieces = run(b, in, cut);
	const struct run *runs[] = {&whole, &bytes, &pieces};

	for (size_t i = 0; i < LENGTH(runs); i++) {
		MUST(runs[i]->bad == bytes.bad && runs[i]->body.done == bytes.body.done);
		MUST(!(runs[i]->bad && runs[i]->body.done));
		if (!runs[i]->bad) {
			MUST(runs[i]->used == bytes.used && same(text_slice(&runs[i]->out), text_slice(&bytes.out)));
			MUST(memcmp(&runs[i]->body, &bytes.body, sizeof b) == 0);
		}
		if (!want.near_limit)
			check_chunks(runs[i], &want);
	}
	if (!want.near_limit) {
		MUST(bytes.bad == (want.verdict == READ_BAD) && bytes.body.done == (want.verdict > 0));
		MUST(want.verdict == READ_MORE || bytes.used == want.used);
	}
	struct slice tail;
	struct body ended = bytes.body;
	MUST(body_end(&ended, &tail) == bytes.body.done && tail.n == 0);
	text_free(&want.payload);
	for (size_t i = 0; i < LENGTH(runs); i++)
		free(runs[i]->out.p);
}

/* A length, or everything until the sender closes, as it comes or made into chunks. */
static void
check_counted(struct body b, struct slice in, unsigned cut)
{
	size_t want = b.kind == BODY_NONE ? 0 : b.kind == BODY_LENGTH && b.left < in.n ? (size_t)b.left : in.n;
	bool whole = b.kind == BODY_NONE || (b.kind == BODY_LENGTH && b.left <= in.n);

	for (unsigned i = 0; i < 3; i++) {
		struct run r = run(b, in, i < 2 ? i : cut);
		struct slice tail;
		MUST(!r.bad && r.used == want && r.body.done == whole);
		MUST(body_end(&r.body, &tail) == (whole || b.kind == BODY_CLOSE));
		if (b.form == FORM_CHUNKED) {
			struct chunked seen = chunked_read(text_slice(&r.out));
			MUST(seen.verdict == READ_MORE);
			text_free(&seen.payload);
			text_add(&r.out, tail.p, tail.n);
			seen = chunked_read(text_slice(&r.out));
			MUST(seen.verdict == 1 && seen.used == r.out.n && seen.payload.n == want);
			MUST(want == 0 || memcmp(seen.payload.p, in.p, want) == 0);
			text_free(&seen.payload);
		} else
			MUST(tail.n == 0 && r.out.n == want && (want == 0 || memcmp(r.out.p, in.p, want) == 0));
		text_free(&r.out);
	}
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	if (n < HEADER)
		return -1;
	struct body b;
	memset(&b, 0, sizeof b);
	b.kind = data[0] & 3;
	b.form = data[0] >> 2 & 1 ? FORM_PLAIN : FORM_SAME;
	b.left = b.kind == BODY_LENGTH ? (uint64_t)data[1] << 8 | data[2] : 0;
	if (b.kind == BODY_LENGTH && b.left == 0)
		b.kind = BODY_NONE;      /* as the heads' readers do */
	b.done = b.kind == BODY_NONE;
	if (b.kind == BODY_CLOSE && data[0] >> 3 & 1)
		b.form = FORM_CHUNKED;
	struct slice in = {(const char *)data + HEADER, n - HEADER};
	if (b.kind == BODY_CHUNKED)
		check_chunked(b, in, 2 + data[3]);
	else
		check_counted(b, in, 2 + data[3]);
	return 0;
}
