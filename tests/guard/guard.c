/* guard: what one unit of work costs a worker, counted in instructions.
 *
 *     guard WORK CONNECTIONS UNITS [CERT KEY]      over TLS with a certificate and its key
 *
 * A client, a worker and an upstream in one process, joined by sockets. All connections go in step: each sends, then the
 * worker has its turns, then the other side reads. Clocks are replaced by one that ticks evenly, so that every run takes the
 * same way; what is counted is worker_turn() and everything below it, see run.sh. */
#define _GNU_SOURCE
#include <time.h>

static int clock_even(clockid_t, struct timespec *);
#define clock_gettime clock_even
#define main tinyauth_main
#include "../../tinyauth.c"
#undef main
#undef clock_gettime

enum { CONNECTIONS_MAX = 64, TICK_NS = 10000, GIVE_UP_S = 60 };

#define KEY "sk-9f86d081884c7d659a2feaa0c55ad015"
#define CHUNK(size, event) size "\r\n" event "\r\n"
#define EVENT "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"tiny\"," \
	"\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"finish_reason\":null}]}\n\n"
#define MODELS "{\"models\":[{\"name\":\"tiny:latest\",\"size\":1,\"details\":{\"format\":\"gguf\",\"family\":\"tiny\"}}]}"
#define COMPLETION "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1767225600,\"model\":\"tiny\",\"choices\":[]}"
#define PROMPT "{\"messages\":[{\"role\":\"user\",\"content\":\"Say a word\"}],\"model\":\"tiny\"}"

/* As the Python client of OpenAI writes it. */
#define SDK "Host: localhost:21434\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nAccept: application/json\r\n" \
	"Content-Type: application/json\r\nUser-Agent: OpenAI/Python 1.59.7\r\nX-Stainless-Lang: python\r\n" \
	"X-Stainless-Package-Version: 1.59.7\r\nX-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\n" \
	"X-Stainless-Runtime: CPython\r\nX-Stainless-Runtime-Version: 3.12.3\r\nAuthorization: Bearer " KEY "\r\n" \
	"X-Stainless-Async: false\r\nx-stainless-retry-count: 0\r\nContent-Length: 68\r\n"
_Static_assert(sizeof PROMPT - 1 == 68, "the prompt is as long as its head says");
_Static_assert(sizeof MODELS - 1 == 88, "the answer, too");
_Static_assert(sizeof COMPLETION - 1 == 95, "and this one");
_Static_assert(sizeof EVENT - 1 == 0xa9, "and an event");

static const struct work {
	const char *name;
	const char *request, *answer;    /* "": the request does not get as far as the upstream */
	const char *end;                 /* of what the client gets */
	const char *event, *event_end;   /* NULL: a unit is a request; else one of these events, behind one request */
} WORKS[] = {
	{"request", "GET /api/tags HTTP/1.1\r\nHost: localhost:21434\r\nUser-Agent: load\r\nAuthorization: Bearer " KEY "\r\n\r\n",
	    "HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
	    "Content-Length: 88\r\nConnection: close\r\n\r\n" MODELS, MODELS, NULL, NULL},
	{"chat", "POST /v1/chat/completions HTTP/1.1\r\n" SDK "\r\n" PROMPT,
	    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
	    "Content-Length: 95\r\nConnection: close\r\n\r\n" COMPLETION, COMPLETION, NULL, NULL},
	{"event", "POST /v1/chat/completions HTTP/1.1\r\n" SDK "\r\n" PROMPT,
	    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" CHUNK("a9", EVENT), EVENT "\r\n",
	    CHUNK("a9", EVENT), EVENT "\r\n"},
	{"refusal", "GET /api/tags HTTP/1.1\r\nHost: localhost:21434\r\nUser-Agent: load\r\n\r\n", "", "}\n", NULL, NULL},
};

/* A client's end and, once the worker has connected, an upstream's. Which upstream serves whom makes no difference. */
struct peer {
	struct rig *rig;
	int client, upstream;
	br_ssl_client_context tls;
	br_x509_knownkey_context server;
	br_sslio_context io;
	unsigned char records[BR_SSL_BUFSIZE_BIDI];
};

struct rig {
	struct worker *w;
	int listener;
	size_t peers;
	bool secure;
	struct peer peer[CONNECTIONS_MAX];
};

/* Not inlined anywhere, so that it can be told from what drives it. */
static void (*volatile turn)(struct worker *) = worker_turn;

static int
clock_even(clockid_t id, struct timespec *t)
{
	static uint64_t ns;

	ns += TICK_NS;
	*t = (struct timespec){(time_t)(1767225600 + ns / NS_PER_S), (long)(ns % NS_PER_S)};
	return id == CLOCK_MONOTONIC || id == CLOCK_REALTIME ? 0 : -1;
}

static void
must(bool good, const char *what)
{
	if (!good)
		die(EXIT_FAILURE, "guard: %s: %s", what, strerror(errno));
}

static void
until_readable(struct rig *rig, int fd)
{
	struct pollfd p = {fd, POLLIN, 0};

	while (poll(&p, 1, 0) == 0)
		turn(rig->w);
}

/* ---- the two ends -------------------------------------------------------------------------------------------- */

static int
client_read(void *of, unsigned char *to, size_t room)
{
	struct peer *peer = of;

	until_readable(peer->rig, peer->client);
	return (int)recv(peer->client, to, room, 0);
}

static int
client_write(void *of, const unsigned char *from, size_t n)
{
	struct peer *peer = of;

	return (int)send(peer->client, from, n, MSG_NOSIGNAL);
}

static void
client_send(struct peer *peer, struct slice text)
{
	if (peer->rig->secure)
		must(br_sslio_write_all(&peer->io, text.p, text.n) == 0 && br_sslio_flush(&peer->io) == 0, "TLS to the worker");
	else
		must(client_write(peer, (const unsigned char *)text.p, text.n) == (int)text.n, "to the worker");
}

/* Reads on until what came ends like this. */
static void
client_receive(struct peer *peer, struct slice end)
{
	char got[4096];
	size_t n = 0;

	while (n < end.n || memcmp(got + n - end.n, end.p, end.n) != 0) {
		must(n < sizeof got, "the client got something else");
		int some = peer->rig->secure ? br_sslio_read(&peer->io, got + n, sizeof got - n) :
		                               client_read(peer, (unsigned char *)got + n, sizeof got - n);
		must(some > 0, "from the worker");
		n += (size_t)some;
	}
}

static void
upstream_receive(struct peer *peer)
{
	char got[4096];

	if (peer->upstream < 0) {
		until_readable(peer->rig, peer->rig->listener);
		peer->upstream = accept4(peer->rig->listener, NULL, NULL, SOCK_CLOEXEC);
	}
	until_readable(peer->rig, peer->upstream);
	must(recv(peer->upstream, got, sizeof got, 0) > 0, "the upstream got nothing");
}

/* A whole answer ends its connection, as each request asks for. */
static void
upstream_send(struct peer *peer, struct slice text, bool whole)
{
	must(send(peer->upstream, text.p, text.n, MSG_NOSIGNAL) == (ssize_t)text.n, "from the upstream");
	if (!whole)
		return;
	close(peer->upstream);
	peer->upstream = -1;
}

/* One unit on each connection. */
static void
rig_round(struct rig *rig, const char *request, const char *answer, const char *end, bool whole)
{
	for (size_t i = 0; request[0] != '\0' && i < rig->peers; i++)
		client_send(&rig->peer[i], slice_of(request));
	for (size_t i = 0; request[0] != '\0' && answer[0] != '\0' && i < rig->peers; i++)
		upstream_receive(&rig->peer[i]);
	for (size_t i = 0; answer[0] != '\0' && i < rig->peers; i++)
		upstream_send(&rig->peer[i], slice_of(answer), whole);
	for (size_t i = 0; i < rig->peers; i++)
		client_receive(&rig->peer[i], slice_of(end));
}

/* ---- the rig ------------------------------------------------------------------------------------------------- */

/* In the abstract namespace, at an address that the kernel chose: nothing is left behind, and runs do not meet. */
static int
rig_listen(struct addr *a)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	*a = (struct addr){.ss.ss_family = AF_UNIX, .len = sizeof a->ss};
	must(bind(fd, (struct sockaddr *)&a->ss, sizeof a->ss.ss_family) == 0 &&
	     getsockname(fd, (struct sockaddr *)&a->ss, &a->len) == 0 && listen(fd, 2 * CONNECTIONS_MAX) == 0, "listen");
	return fd;
}

static struct keys_map *
rig_keys(void)
{
	struct complaints bad = {.to = STDERR_FILENO, .file = "keys"};
	size_t size;
	int fd;
	struct keys_map *map = keys_new(1, &size, &fd);

	must(map != NULL && keys_parse(map, S("alice " KEY "\n"), 2, &config, &bad), "keys");
	keys_flip(map);
	return map;
}

/* A worker as it serves: an address limit that never fires, one upstream, the log in a file. */
static struct worker *
rig_worker(const char *cert, const char *key)
{
	char *argv[] = {"--ip-rate=1000000/s", "--ip-burst=100000", NULL};
	struct worker *w = map_new(sizeof *w, MAP_PRIVATE);
	struct mistake m;
	bool usage;
	int fd;

	must(config_read(&config, argv, NULL, 0, &usage, &m), m.text);
	if (cert != NULL && (w->pair = pair_load(cert, key, clock_wall_ms() / 1000, &m)) == NULL)
		must(false, m.text);
	worker_map(w);
	w->keys = rig_keys();
	w->table = table_new(1, config.max_conns, &fd);
	w->row = table_row_take(w->table, -1);
	w->log = map_new(sizeof *w->log, MAP_PRIVATE);
	w->log->fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
	w->log->regular = true;
	w->control = -1;
	w->epoll = watch_open();
	w->now_ns = clock_ns();
	w->sweep_ns = UINT64_MAX;
	return w;
}

/* The cipher is the one that costs the same on every processor. */
static void
peer_secure(struct peer *peer, const struct tls_pair *pair)
{
	static const uint16_t SUITE[] = {BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256};
	const br_ec_public_key public = {pair->ec.curve, (unsigned char *)(uintptr_t)pair->public.p, pair->public.n};

	br_ssl_client_init_full(&peer->tls, &(br_x509_minimal_context){0}, NULL, 0);
	br_ssl_engine_set_suites(&peer->tls.eng, SUITE, LENGTH(SUITE));
	br_x509_knownkey_init_ec(&peer->server, &public, BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN);
	br_ssl_engine_set_x509(&peer->tls.eng, &peer->server.vtable);
	br_ssl_engine_set_buffer(&peer->tls.eng, peer->records, sizeof peer->records, 1);
	must(br_ssl_client_reset(&peer->tls, "localhost", 0) == 1, "TLS client");
	br_sslio_init(&peer->io, &peer->tls.eng, client_read, peer, client_write, peer);
	must(br_sslio_flush(&peer->io) == 0, "TLS handshake");
}

static void
rig_connect(struct rig *rig, struct peer *peer)
{
	struct sockaddr_storage from = {.ss_family = AF_INET};
	int fd[2];

	inet_pton(AF_INET, "192.0.2.17", &((struct sockaddr_in *)&from)->sin_addr);
	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fd) == 0, "socketpair");
	conn_open(rig->w, fd[0], fd[0], &from, rig->secure);
	peer->rig = rig;
	peer->client = fd[1];
	peer->upstream = -1;
	if (rig->secure)
		peer_secure(peer, rig->w->pair);
}

int
main(int argc, char **argv)
{
	static struct rig rig;
	const struct work *work = WORKS;
	uint64_t peers = 0, units = 0;

	while (argc > 1 && work < WORKS + LENGTH(WORKS) && strcmp(work->name, argv[1]) != 0)
		work++;
	if ((argc != 4 && argc != 6) || work == WORKS + LENGTH(WORKS) || !number_read(slice_of(argv[2]), &peers) || peers == 0 ||
	    peers > CONNECTIONS_MAX || !number_read(slice_of(argv[3]), &units) || units % peers != 0)
		die(EX_USAGE, "usage: guard request|chat|event|refusal CONNECTIONS UNITS [CERT KEY]");
	alarm(GIVE_UP_S);
	rig.secure = argc == 6;
	rig.peers = peers;
	rig.w = rig_worker(argv[4], rig.secure ? argv[5] : NULL);
	rig.listener = rig_listen(&config.upstream.addr[0]);
	for (size_t i = 0; i < peers; i++)
		rig_connect(&rig, &rig.peer[i]);
	if (work->event != NULL)
		rig_round(&rig, work->request, work->answer, work->end, false);
	for (uint64_t i = 0; i < units / peers; i++)
		if (work->event != NULL)
			rig_round(&rig, "", work->event, work->event_end, false);
		else
			rig_round(&rig, work->request, work->answer, work->end, true);
	return EXIT_SUCCESS;
}
