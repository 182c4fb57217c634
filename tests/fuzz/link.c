/* Goal: certificates, keys and TLS records that somebody else wrote. No file makes the reader look past its bytes; on a TLS
 * link every byte arrives once, in order and only from the peer; an end is told as an end only when the peer said
 * close_notify; nothing of a link is left when it is closed. */
#define _GNU_SOURCE
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>
static int known_bytes(void *, size_t);
#define getentropy(p, n) known_bytes(p, n)
#include "fuzz.h"
#undef getentropy

/* Made for this test alone: good until 2136. */
static const char CERT[] =
	"-----BEGIN CERTIFICATE-----\n"
	"MIIBmzCCAUGgAwIBAgIULC6UEH8owydfrJD9gcFHgtKDY8cwCgYIKoZIzj0EAwIw\n"
	"FDESMBAGA1UEAwwJZnV6ei50ZXN0MCAXDTI2MTEyNTAyMzI0M1oYDzIxMzYwNjAx\n"
	"MDIzMjQzWjAUMRIwEAYDVQQDDAlmdXp6LnRlc3QwWTATBgcqhkjOPQIBBggqhkjO\n"
	"PQMBBwNCAAROEqON1yGXcQvWTWkkwryVGXMJQvj+kkE9/hNf0XcZ1Qz24Q1Ik5Aa\n"
	"qJuHkzEtzoCPKKmt7d/nMdhOL579Dp+7o28wbTAdBgNVHQ4EFgQUlLIhtnzeNzVj\n"
	"MMvpEVRuU3t66dEwHwYDVR0jBBgwFoAUlLIhtnzeNzVjMMvpEVRuU3t66dEwDwYD\n"
	"VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglmdXp6LnRlc3SHBH8AAAEwCgYIKoZI\n"
	"zj0EAwIDSAAwRQIhALBucRk2Qx372oZ3vdcdUMV/+94NvJoi0KUp5/aQdh+4AiAz\n"
	"S7NhvNQx4MtJHa6CzMYGL1NQPPUm5yWwEjNCjPs4Zw==\n"
	"-----END CERTIFICATE-----\n";
static const char KEY[] =
	"-----BEGIN PRIVATE KEY-----\n"
	"MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgOoV6koBG9RsyCuqu\n"
	"pBOztqiX4L/Qc9lmiJl+8CGf90qhRANCAAROEqON1yGXcQvWTWkkwryVGXMJQvj+\n"
	"kkE9/hNf0XcZ1Qz24Q1Ik5AaqJuHkzEtzoCPKKmt7d/nMdhOL579Dp+7\n"
	"-----END PRIVATE KEY-----\n";

enum { NOW_S = 1800000000, LINKS = 2, TURNS = 64, SPACE = 1 << 16, MOST = 1 << 20 };

static struct tls_pair *pair;
static struct tls *home;

/* The peer of a link: BearSSL's own client, and what it said and heard. */
struct peer {
	int fd;
	br_ssl_client_context cc;
	br_x509_knownkey_context known;
	unsigned char in[BR_SSL_BUFSIZE_INPUT], out[BR_SSL_BUFSIZE_OUTPUT];
	uint64_t said, heard;        /* plain bytes so far: byte number i is (i * 7 + i / 251) & 0xff both ways */
	uint64_t sound;              /* of what was said, so much lies in records that nothing was changed in */
	bool spoilt, goodbye, fin;   /* a record was changed; close_notify is sent; the descriptor is shut */
	bool told;                   /* the other side said close_notify */
};

static struct peer peer;
static br_ssl_session_parameters session;

static int
known_bytes(void *p, size_t n)
{
	memset(p, 7, n);
	return 0;
}

static unsigned char
byte_at(uint64_t i)
{
	return (unsigned char)(i * 7 + i / 251);
}

/* A file that holds these bytes, and its path. */
static int
file_with(struct slice s, char path[32])
{
	int fd = memfd_create("fuzz", 0);

	MUST(fd >= 0 && write(fd, s.p, s.n) == (ssize_t)s.n);
	snprintf(path, 32, "/proc/self/fd/%d", fd);
	return fd;
}

static struct tls_pair *
load(struct slice cert, struct slice key, struct mistake *m)
{
	char cert_path[32], key_path[32];
	int cert_fd = file_with(cert, cert_path), key_fd = file_with(key, key_path);
	struct tls_pair *t = pair_load(cert_path, key_path, NOW_S, m);

	close(cert_fd);
	close(key_fd);
	return t;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	struct mistake m = {""};
	int fd;

	(void)argc;
	(void)argv;
	pair = load((struct slice){CERT, sizeof CERT - 1}, (struct slice){KEY, sizeof KEY - 1}, &m);
	MUST(pair != NULL);
	struct sessions *sessions = sessions_new(&fd);
	sessions_begin(sessions, pair->epoch);
	home = tls_new(pair, sessions, LINKS);
	return 0;
}

/* ---- files ----------------------------------------------------------------------------------------------------- */

static void
check_words(const char *words, size_t room)
{
	MUST(memchr(words, '\0', room) != NULL);
	for (; *words != '\0'; words++)
		MUST(*words >= ' ' && *words < 0x7f);
}

/* A pair that was taken is whole; one that was not has a sentence. */
static void
try_files(struct slice cert, struct slice key)
{
	struct mistake m;

	memset(&m, 0xa5, sizeof m);
	struct tls_pair *t = load(cert, key, &m);
	if (t == NULL) {
		MUST(m.text[0] != '\0' && memchr(m.text, '\0', sizeof m.text) != NULL);
		return;
	}
	MUST(t->certificates >= 1 && t->certificates <= TLS_CHAIN_MAX && t->until_s > NOW_S);
	MUST((t->ec.curve != 0 || t->rsa.n_bitlen != 0) && t->n <= sizeof t->der);
	for (size_t i = 0; i < t->certificates; i++)
		MUST(t->chain[i].data >= t->der && t->chain[i].data + t->chain[i].data_len <= t->der + sizeof t->der);
	check_words(t->subject, sizeof t->subject);
	check_words(t->names, sizeof t->names);
	MUST(pair_equal(t, t));
	pair_forget(t);
}

/* `cert key` with a NUL between them; a part that is missing is the good one. */
static void
fuzz_files(struct slice in)
{
	const char *nul = in.n > 0 ? memchr(in.p, '\0', in.n) : NULL;
	struct slice cert = {in.p, nul != NULL ? (size_t)(nul - in.p) : in.n}, key = {KEY, sizeof KEY - 1};

	if (nul != NULL)
		key = slice_from(in, cert.n + 1);
	if (cert.n == 0)
		cert = (struct slice){CERT, sizeof CERT - 1};
	try_files(cert, key);
}

/* The reader of DER, on a block of exactly its size. */
static void
fuzz_der(struct slice in)
{
	static struct tls_pair t;
	char *block = exact(in, 0, 0);
	struct slice der = {in.n > 0 ? block : "", in.n}, rest = der, content;

	memset(&t, 0, sizeof t);
	if (cert_read(&t, der))
		MUST(t.public.n >= 1 && t.public.p >= block && t.public.p + t.public.n <= block + in.n);
	check_words(t.subject, sizeof t.subject);
	check_words(t.names, sizeof t.names);
	while (der_next(&rest, &content) != 0)
		MUST(content.p >= der.p && content.p + content.n == rest.p && rest.p + rest.n == der.p + der.n);
	uint64_t seconds;
	for (int tag = DER_UTC; tag <= DER_TIME; tag++)
		if (der_time(tag, der, &seconds))
			MUST(seconds < 253402300800ull);
	free(block);
}

/* ---- links ----------------------------------------------------------------------------------------------------- */

/* What poll would say. */
static void
look(struct link *l)
{
	struct pollfd p = {l->fd, POLLIN | POLLOUT | POLLRDHUP, 0};

	MUST(poll(&p, 1, 0) >= 0);
	l->seen = p.revents;
}

static int
open_link(struct link *l)
{
	int fds[2], small = 4608;

	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
	setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
	link_open(l, fds[1]);
	MUST(link_secure(l, home));
	return fds[0];
}

/* Nothing of a closed link may stay in its place, but for what was on the wire: `out` holds records, whose plain bytes were
 * encrypted where they stood. */
static void
close_link(struct link *l, const struct tls_link *t, bool reset)
{
	const unsigned char *p = (const unsigned char *)t;

	link_close(l, reset);
	MUST(l->fd == -1 && l->tls == NULL);
	for (size_t i = 0; i < offsetof(struct tls_link, out); i++)
		MUST(p[i] == 0 || i < sizeof(void *));   /* the pool keeps the place of the next one there */
}

/* Bytes that nobody made with TLS in mind, in pieces whose sizes they say themselves. */
static void
fuzz_hello(struct slice in)
{
	struct link l;
	char text[32], waste[4096];
	int fd = open_link(&l);
	struct tls_link *t = l.tls;
	ssize_t done = LINK_AGAIN;

	for (int turn = 0; turn < TURNS && done == LINK_AGAIN && in.n > 0; turn++) {
		size_t n = turn % 4 == 3 ? 1 + (unsigned char)in.p[0] : in.n / 2 + 1;
		n = n < in.n ? n : in.n;
		if (send(fd, in.p, n, MSG_NOSIGNAL) > 0)
			in = slice_from(in, n);
		look(&l);
		done = link_handshake(&l);
		while (recv(fd, waste, sizeof waste, 0) > 0)
			continue;
	}
	shutdown(fd, SHUT_WR);
	for (int turn = 0; turn < TURNS && done == LINK_AGAIN; turn++) {
		look(&l);
		done = link_handshake(&l);
	}
	MUST(done == LINK_FAILED || done == LINK_END || done == LINK_PLAIN);
	if (done == LINK_PLAIN)
		MUST(l.tls == NULL);
	else {
		MUST(memchr(link_name(&l), '\0', 256) != NULL && link_error(&l, text)[0] != '\0');
		link_shut(&l);
	}
	close_link(&l, t, done == LINK_FAILED);
	close(fd);
}

/* ---- a link with a peer that speaks TLS ------------------------------------------------------------------------- */

/* Sends up to `most` bytes of the peer's records, with one bit changed when `flip` says so, once in a script. */
static void
peer_sends(size_t most, bool flip)
{
	br_ssl_engine_context *eng = &peer.cc.eng;
	size_t n;
	unsigned char *p = br_ssl_engine_sendrec_buf(eng, &n);

	if (p == NULL || peer.fin)
		return;
	n = n < most ? n : most;
	size_t at = n / 2;
	flip &= !peer.spoilt && n > 0;
	if (flip)
		p[at] ^= 0x10;
	ssize_t done = send(peer.fd, p, n, MSG_NOSIGNAL);
	if (flip && done > (ssize_t)at) {
		peer.sound = peer.said;
		peer.spoilt = true;
	} else if (flip)
		p[at] ^= 0x10;               /* it goes another time, and good */
	if (done > 0)
		br_ssl_engine_sendrec_ack(eng, (size_t)done);
}

/* Takes up to `most` bytes of records, and checks what is in them. */
static void
peer_takes(size_t most)
{
	br_ssl_engine_context *eng = &peer.cc.eng;
	unsigned char *p;
	size_t n;

	while (most > 0 && (p = br_ssl_engine_recvrec_buf(eng, &n)) != NULL) {
		ssize_t got = recv(peer.fd, p, n < most ? n : most, 0);
		if (got <= 0)
			break;
		most -= (size_t)got;
		br_ssl_engine_recvrec_ack(eng, (size_t)got);
		while ((p = br_ssl_engine_recvapp_buf(eng, &n)) != NULL) {
			for (size_t i = 0; i < n; i++)
				MUST(p[i] == byte_at(peer.heard + i));
			peer.heard += n;
			br_ssl_engine_recvapp_ack(eng, n);
		}
	}
	if (br_ssl_engine_current_state(eng) == BR_SSL_CLOSED && !peer.goodbye) {
		peer.told = br_ssl_engine_last_error(eng) == 0;
		MUST(peer.told || peer.spoilt);
	}
}

static void
peer_says(size_t n)
{
	br_ssl_engine_context *eng = &peer.cc.eng;
	size_t room;
	unsigned char *p = br_ssl_engine_sendapp_buf(eng, &room);

	if (p == NULL || peer.goodbye || peer.said > MOST)
		return;
	n = n < room ? n : room;
	for (size_t i = 0; i < n; i++)
		p[i] = byte_at(peer.said + i);
	br_ssl_engine_sendapp_ack(eng, n);
	br_ssl_engine_flush(eng, 0);
	peer.said += n;
}

static void
peer_meets(struct link *l, bool afresh)
{
	br_ssl_engine_context *eng = &peer.cc.eng;
	br_x509_minimal_context minimal;
	br_ec_public_key public = {BR_EC_secp256r1, (unsigned char *)(uintptr_t)pair->public.p, pair->public.n};
	ssize_t done = LINK_AGAIN;

	br_ssl_client_init_full(&peer.cc, &minimal, NULL, 0);
	br_x509_knownkey_init_ec(&peer.known, &public, BR_KEYTYPE_SIGN | BR_KEYTYPE_KEYX);
	br_ssl_engine_set_x509(eng, &peer.known.vtable);
	br_ssl_engine_set_buffers_bidi(eng, peer.in, sizeof peer.in, peer.out, sizeof peer.out);
	br_ssl_engine_inject_entropy(eng, KEY, 32);
	if (session.session_id_len > 0 && !afresh)
		br_ssl_engine_set_session_parameters(eng, &session);
	MUST(br_ssl_client_reset(&peer.cc, "fuzz.test", !afresh && session.session_id_len > 0));
	for (int turn = 0; turn < TURNS && done == LINK_AGAIN; turn++) {
		peer_sends(SPACE, false);
		look(l);
		done = link_handshake(l);
		peer_takes(SPACE);
	}
	MUST(done == 1 && br_ssl_engine_current_state(eng) & BR_SSL_SENDAPP);
	br_ssl_engine_get_session_parameters(eng, &session);
}

/* Reads once. Every byte is the next of what the peer said; an end, or a failure, has its cause. */
static ssize_t
link_takes(struct link *l, size_t room, uint64_t *got)
{
	char *p = exact((struct slice){"", 0}, room, 0);
	ssize_t n = link_read(l, p, room);

	MUST(n <= (ssize_t)room);
	for (ssize_t i = 0; i < n; i++)
		MUST((unsigned char)p[i] == byte_at(*got + (uint64_t)i));
	*got += n > 0 ? (uint64_t)n : 0;
	MUST(*got <= (peer.spoilt ? peer.sound : peer.said));
	if (n == LINK_END)
		MUST(peer.goodbye && !peer.spoilt && *got == peer.said);
	if (n == LINK_FAILED)
		MUST(peer.spoilt || peer.fin || peer.goodbye || tls_stuck(l->tls));
	free(p);
	return n;
}

/* Writes `n` bytes that follow those told as written; the same ones again when they did not all go. */
static void
link_gives(struct link *l, size_t n, uint64_t *given, size_t *again)
{
	char *p;

	n = *again > 0 ? *again : n;
	if (n == 0 || *given > MOST)
		return;
	p = exact((struct slice){"", 0}, n, 0);
	for (size_t i = 0; i < n; i++)
		p[i] = (char)byte_at(*given + i);
	ssize_t done = link_write(l, p, n);
	MUST(done <= (ssize_t)n && done != 0);
	*again = done == LINK_AGAIN ? n : 0;
	*given += done > 0 ? (uint64_t)done : 0;
	free(p);
}

static void
peer_leaves(int how)
{
	if (how > 0 && !peer.goodbye) {
		peer.goodbye = true;
		br_ssl_engine_close(&peer.cc.eng);
	}
	if (how != 1) {
		for (int i = 0; i < TURNS; i++)
			peer_sends(SPACE, false);
		size_t n;
		if (br_ssl_engine_sendrec_buf(&peer.cc.eng, &n) != NULL)
			return;              /* no room for it now */
		shutdown(peer.fd, SHUT_WR);
		peer.fin = true;
	}
}

/* Has it left? Only a peer that does something makes it so. */
static void
look_for_the_end(struct link *l)
{
	bool cut, left = link_left(l, &cut);

	MUST(!left || peer.goodbye || peer.fin || peer.spoilt || tls_stuck(l->tls));
	MUST(!left || !cut || peer.fin || peer.spoilt || tls_stuck(l->tls));   /* an engine that cannot answer is given up */
	MUST(!left || cut || peer.goodbye || link_pending(l));
}

/* An order is three bytes: what, and two of how much. */
static void
fuzz_script(struct slice in)
{
	struct link l;
	uint64_t got = 0, given = 0;
	size_t again = 0;
	bool shut = false;
	ssize_t last = LINK_AGAIN;

	memset(&peer, 0, sizeof peer);
	peer.fd = open_link(&l);
	struct tls_link *t = l.tls;
	peer_meets(&l, in.n > 0 && in.p[0] == '!');
	for (; in.n >= 3; in = slice_from(in, 3)) {
		size_t much = (size_t)(unsigned char)in.p[1] << 8 | (unsigned char)in.p[2];
		if (l.seen == 0 || in.p[0] & 0x10)
			look(&l);
		switch (in.p[0] & 15) {
		case 0: case 1: peer_says(much); peer_sends(SPACE, false); break;
		case 2: peer_says(much % 300); break;
		case 3: peer_sends(much, false); break;
		case 4: peer_sends(much, much % 5 == 0); break;
		case 5: peer_takes(much); break;
		case 6: peer_leaves((int)(much % 3)); break;
		case 7: case 8: case 9:
			if (!shut && (last == LINK_AGAIN || last > 0))   /* behind our own end nobody reads */
				last = link_takes(&l, much % BUF_SIZE + 1, &got);
			break;
		case 10: case 11:
			if (!shut)
				link_gives(&l, much % BUF_SIZE + 1, &given, &again);
			break;
		case 12:
			if (!shut)
				look_for_the_end(&l);
			break;
		case 13:
			link_rest(&l);
			break;
		case 14:
			if (much % 7 == 0 && again == 0)
				shut = true;
			if (shut)
				link_shut(&l);
			break;
		default: break;
		}
	}
	/* What was on its way arrives, unless something was spoilt or somebody left. */
	for (int turn = 0; turn < 1000 && !shut && !peer.goodbye && !peer.fin; turn++) {
		look(&l);
		peer_sends(SPACE, false);
		if (last == LINK_AGAIN || last > 0)
			last = link_takes(&l, BUF_SIZE / 2 + (size_t)turn % 7, &got);
		if (again > 0)
			link_gives(&l, 0, &given, &again);
		peer_takes(SPACE);
		if (got == peer.said && again == 0 && peer.heard >= given)
			break;
	}
	MUST(peer.spoilt || shut || peer.goodbye || peer.fin || (got == peer.said && peer.heard == given));
	close_link(&l, t, false);
	close(peer.fd);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	struct slice in = {(const char *)data + 1, n - 1};

	if (n < 1)
		return 0;
	switch (data[0] % 4) {
	case 0: fuzz_files(in); break;
	case 1: fuzz_der(in); break;
	case 2: fuzz_hello(in); break;
	default: fuzz_script(in); break;
	}
	return 0;
}
