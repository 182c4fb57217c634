/* Goal: request and response heads. Whole and byte by byte end alike, nothing is read past the input, and what is written
 * anew means the same, without a credential, a hop-by-hop field or a word about another client. */
#include "fuzz.h"

/* Input: flags, then the head. In it \x01 COUNT BYTE stands for BYTE 16 * COUNT times: limits are near. */
enum { IS_ANSWER = 1, CLIENT_MINOR_0 = 2, HEAD_METHOD = 4, CLOSES = 8 };

static struct text
unpack(const uint8_t *p, size_t n)
{
	struct text t = {NULL, 0, 0};

	for (size_t i = 0; i < n && t.n < 2 * ANSWER_HEAD_MAX; i++) {
		char c = (char)p[i];
		size_t times = 1;
		if (p[i] == 1 && i + 2 < n) {
			times = 16 * p[i + 1];
			c = (char)p[i + 2];
			i += 2;
		}
		while (times-- > 0)
			text_add(&t, &c, 1);
	}
	return t;
}

static int
parse(struct head *h, struct slice in, bool answer)
{
	return answer ? answer_parse(h, in) : head_parse(h, in);
}

/* The verdict on the first `n` bytes, in a block of their own. */
static int
verdict(struct slice in, size_t n, bool answer)
{
	static struct head h;
	char *block = exact((struct slice){in.p, n}, 0, 0);
	int good = parse(&h, (struct slice){block, n}, answer);

	MUST(good >= 0 || (h.why != NULL && -good >= 400 && -good <= 505));
	MUST(good <= (int)n);
	free(block);
	return good;
}

/* Every prefix says MORE until one says what the whole says; of long inputs some prefixes are tried. */
static void
check_prefixes(struct slice in, int whole, bool answer)
{
	size_t step = in.n < 300 ? 1 : in.n / 150;

	for (size_t n = 0; n <= in.n; n += step) {
		int good = verdict(in, n, answer);
		if (good == MORE)
			MUST(n < in.n || whole == MORE);
		else
			MUST(good == whole);
		if (whole > 0)
			MUST((good > 0) == (n >= (size_t)whole));
		if (good != MORE)
			break;
	}
	if (whole > 0)
		MUST(verdict(in, (size_t)whole - 1, answer) == MORE && verdict(in, (size_t)whole, answer) == whole);
}

/* Is the name one of Connection's tokens in this head? */
static bool
named_by_connection(struct slice head, struct slice wanted)
{
	struct slice line, name, value;

	head_next_line(&head, &line);
	while (head_next_line(&head, &line)) {
		if (!head_split(line, &name, &value) || !same_name(name, "Connection"))
			continue;
		for (size_t from = 0, to; from <= value.n; from = to + 1) {
			for (to = from; to < value.n && value.p[to] != ','; to++)
				continue;
			struct slice token = {value.p + from, to - from};
			while (token.n > 0 && (token.p[0] == ' ' || token.p[0] == '\t'))
				token.p++, token.n--;
			while (token.n > 0 && (token.p[token.n - 1] == ' ' || token.p[token.n - 1] == '\t'))
				token.n--;
			if (token.n == wanted.n && token.n > 0 && strncasecmp(token.p, wanted.p, token.n) == 0)
				return true;
		}
	}
	return false;
}

/* Fields that go on at times, or in part. */
static const char *const AT_TIMES[] = {"Origin", "Sec-WebSocket-Protocol", "X-Accel-Buffering", NULL};

/* The next field that goes on as it is; in a request nothing else does. */
static bool
next_passing(struct slice *rest, struct slice whole, bool request, struct slice *name, struct slice *value)
{
	struct slice line;

	while (head_next_line(rest, &line)) {
		MUST(head_split(line, name, value));
		if (name_among(*name, request ? NEVER_UP : NEVER_DOWN) || name_among(*name, request ? OURS_UP : OURS_DOWN))
			continue;
		if (name_among(*name, AT_TIMES))
			continue;
		if (request && (memchr(name->p, '_', name->n) != NULL || (name->n >= 12 && strncasecmp(name->p, "X-Forwarded-", 12) == 0)))
			continue;
		if (!named_by_connection(whole, *name))
			return true;
	}
	return false;
}

/* The same fields pass, in the same order, with the same values. */
static void
check_passed(struct slice in, struct slice out, bool request)
{
	struct slice rest_in = in, rest_out = out, name[2], value[2], line;

	MUST(head_next_line(&rest_in, &line) && head_next_line(&rest_out, &line));
	for (;;) {
		bool more = next_passing(&rest_in, in, request, &name[0], &value[0]);
		MUST(next_passing(&rest_out, (struct slice){"", 0}, request, &name[1], &value[1]) == more);
		if (!more)
			return;
		MUST(same(name[0], name[1]) && same(value[0], value[1]));
	}
}

/* How often a field of this name stands in a head. */
static size_t
fields_named(struct slice head, const char *wanted)
{
	struct slice line, name, value;
	size_t n = 0;

	head_next_line(&head, &line);
	while (head_next_line(&head, &line))
		n += head_split(line, &name, &value) && same_name(name, wanted);
	return n;
}

/* What two parsers could read differently is not taken. */
static void
check_unambiguous(const struct head *h, struct slice head)
{
	size_t lengths = fields_named(head, "Content-Length"), codings = fields_named(head, "Transfer-Encoding");

	MUST(lengths + codings <= 1 && (lengths == 1) == h->has_length && (codings == 1) == h->chunked);
	MUST(fields_named(head, "Host") <= 1 && (h->minor == 0 || fields_named(head, "Host") == 1));
	MUST(fields_named(head, "Authorization") <= 1 && fields_named(head, "X-Api-Key") <= 1);
}

static void
check_request(struct slice in, int n)
{
	static struct head h, again;
	char *block = exact(in, 0, 0), *to = malloc(BUF_SIZE);
	struct slice skipped = {in.p, (size_t)n};
	bool chunked, upgrade;
	uint64_t length;

	MUST(head_parse(&h, (struct slice){block, in.n}) == n);
	struct slice secret[CREDENTIALS_MAX], worn[] = {h.authorization, h.x_api_key, h.api_key, credential_protocol(&h)};
	for (size_t i = head_credentials(&h, secret); i-- > 0;)
		MUST(secret[i].n > 0 && secret[i].p >= block && secret[i].p + secret[i].n <= block + n);
	for (size_t i = 0; i < LENGTH(worn); i++)    /* NUL bytes in the result would be a credential */
		if (worn[i].n > 0)
			wipe((char *)(uintptr_t)worn[i].p, worn[i].n);
	struct forward forward = {.host = S("localhost:1"), .addr = S("192.0.2.1"), .proto = S("http"), .id = S("id"),
	    .upgrade = head_upgrades(&h)};
	struct out o = {to, 0, BUF_SIZE, false};
	head_rewrite(&h, &forward, &o);
	MUST(!o.full);
	struct slice out = {o.p, o.n};
	MUST(head_span(out) == out.n);
	head_is_ours(out, true, &chunked, &length, &upgrade);
	MUST(upgrade == forward.upgrade && chunked == h.chunked && (length == UINT64_MAX || length == h.length));
	MUST(length != UINT64_MAX || h.chunked || !h.has_length);
	if (skipped.p[0] == '\r')
		skipped = (struct slice){skipped.p + 2, skipped.n - 2};
	check_passed(skipped, out, true);
	check_unambiguous(&h, skipped);
	if (o.n <= HEAD_MAX && h.fields + 8 < FIELDS_MAX) {
		MUST(head_parse(&again, out) == (int)out.n);
		MUST(same(again.method, h.method) && same(again.path, h.path) && again.path_odd == h.path_odd);
		MUST(same(again.target, h.slash_missing ? again.target : h.target));
		MUST(!h.slash_missing || (again.target.n == h.target.n + 1 && again.target.p[0] == '/' &&
		     memcmp(again.target.p + 1, h.target.p, h.target.n) == 0));
		MUST(again.chunked == h.chunked && again.length == h.length && again.close == !forward.upgrade);
		MUST(!again.has_authorization && !again.has_x_api_key && !again.has_api_key);
		MUST(head_upgrades(&again) == forward.upgrade && head_dialect(&again) == head_dialect(&h));
		MUST(path_matches(&h, S("/health")) == path_matches(&again, S("/health")));
	}
	struct body b = head_body(&h);
	MUST(b.done == !(h.chunked || h.length > 0));
	free(to);
	free(block);
}

static void
check_answer(struct slice in, int n, unsigned flags)
{
	static struct head h, again;
	char *block = exact(in, 0, 0), *to = malloc(BUF_SIZE);
	uint8_t minor = flags & CLIENT_MINOR_0 ? 0 : 1;
	bool head_method = flags & HEAD_METHOD, chunked, upgrade;
	uint64_t length;

	MUST(answer_parse(&h, (struct slice){block, in.n}) == n);
	struct body b = answer_body(&h, head_method);
	b.form = (uint8_t)answer_form(&b, minor);
	struct slice connection = h.status == 101 ? S("upgrade") : flags & CLOSES ? S("close") : S("");
	struct out o = {to, 0, BUF_SIZE, false};
	struct backward back = {.minor = minor, .connection = h.status > 101 && h.status < 200 ? S("") : connection, .id = S("id"),
	    .host = S("upstream.test:1")};
	answer_rewrite(&h, &b, &back, &o);
	MUST(!o.full);
	struct slice out = {o.p, o.n};
	MUST(head_span(out) == out.n);
	head_is_ours(out, false, &chunked, &length, &upgrade);
	MUST(upgrade == (h.status == 101));
	check_passed((struct slice){in.p, (size_t)n}, out, false);
	if (o.n < ANSWER_HEAD_MAX && h.fields + 6 < FIELDS_MAX) {
		MUST(answer_parse(&again, out) == (int)out.n && again.status == h.status && same(again.reason, h.reason));
		struct body c = answer_body(&again, head_method);
		if (b.kind == BODY_NONE)
			MUST(c.kind == BODY_NONE);
		else if (minor == 0 && b.kind != BODY_LENGTH)
			MUST(c.kind == BODY_CLOSE);
		else if (b.kind == BODY_CLOSE)
			MUST(c.kind == BODY_CHUNKED);
		else
			MUST(c.kind == b.kind && c.left == b.left);
		MUST(h.status >= 200 ? h.status != 204 || (!chunked && length == UINT64_MAX) : !chunked && length == UINT64_MAX);
		MUST(minor == 1 || !chunked);
	}
	free(to);
	free(block);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	if (n == 0)
		return -1;
	struct text t = unpack(data + 1, n - 1);
	bool answer = data[0] & IS_ANSWER;
	int whole = verdict(text_slice(&t), t.n, answer);

	check_prefixes(text_slice(&t), whole, answer);
	if (whole > 0 && answer)
		check_answer(text_slice(&t), whole, data[0]);
	else if (whole > 0)
		check_request(text_slice(&t), whole);
	text_free(&t);
	return 0;
}
