/* load: the clients of the benchmark, in one thread. Opens its connections, says `{"ready":N}` on a line, measures for a while
 * after a warm-up, prints one line of JSON and leaves; with -H it stays, serving its connections, until standard input
 * ends.
 *
 *     load requests   [options]     requests on kept-alive connections, or each on a new one with -n
 *     load streams    [options]     one stream of events on each connection; how late each event comes
 *     load idle       [options]     one request on each connection, then silence
 *     load handshakes [options]     TLS connections without a request, resumed ones with -r
 *     load start      [options] -- COMMAND...    time from exec to the first answer; ends the command again
 *     load inetd      [options] -- COMMAND...    the same of a command that gets the connection as stdin and stdout
 *
 *     -p PORT    to ask                           -c N       connections at once (1)
 *     -a ADDRESS of the server (127.0.0.1)        -N COUNT   requests, in place of seconds
 *     -R RATE    requests a second at most, on all connections together
 *     -P PATH    request target (/api/tags)       -s SECONDS to measure (1)
 *     -K KEY     bearer key                       -w SECONDS of warm-up (0.2)
 *     -b BYTES   of request body: a POST, of a    -x STATUS  expected (200)
 *                chat completion up to 4 KB
 *     -n         a new connection a request       -t 1.2|1.3 TLS of this version
 *     -r         resume TLS sessions              -H         stay
 *     -C PIDS    processes whose CPU time is told, separated by commas
 *
 * CPU time is the kernel's account of a process in nanoseconds, exited threads included (clock_getcpuclockid), read at both
 * ends of the time measured. A request is `failed` when its connection ends before the answer is whole; a connection that the
 * server ends between two requests is `reopened`. */

#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

enum {
	PIDS_MAX = 64,
	READY_MAX = 256,
	TEXT_MAX = 8192,             /* bytes of a request head, and of a body that goes with it in one write */
	STREAM_BODY = 100,           /* bytes of the request for a stream */
	CHAT_MAX = 4096,             /* bytes of a body that is a chat completion; a longer one is zeros */
	KEEP_MAX = 16384,            /* bytes of an answer's head, or of an event that is not whole yet */
	PIECE = 256 << 10,           /* bytes read or written at once */
	SOURCES = 8,                 /* source addresses from 127.0.1.1 on: more pairs of ports than one has */
	CONNECTING_MAX = 64,         /* connections that are not through their first request yet, while all are opened */
	STEPS_MAX = 64,              /* of one connection before the others and the clock have their turn */
	COUNT_S = 120,               /* for a number of requests, or it is less */
	SETUP_S = 30                 /* for all connections to be ready, or it fails */
};

#define EVENTS (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)
#define TLS12_SUITE "ECDHE-ECDSA-AES128-GCM-SHA256"

enum mode { REQUESTS, STREAMS, IDLE, HANDSHAKES, START, INETD };
enum state { UNUSED, CONNECTING, HANDSHAKING, SENDING, READING_HEAD, READING_BODY, RESTING };
enum result { DONE, AGAIN, CLOSED };     /* of a step */

struct conn {
	int fd;
	enum state state;
	uint64_t sent;               /* bytes of the request */
	uint64_t left;               /* bytes of the answer's body; UINT64_MAX: until the end of the connection */
	bool ready;                  /* counted as ready */
	bool paced;                  /* in the line of those that wait for their turn */
	bool last;                   /* the server said that it will close */
	bool hung_up;                /* the kernel said that the end is near: read up to it */
	size_t have;
	char *keep;                  /* KEEP_MAX bytes */
#ifdef WITH_TLS
	SSL *ssl;
#endif
};

/* Counted while it is measured. */
struct counts {
	uint64_t done, failed, reopened, wrong_status, bytes_in, bytes_out, resumed;
};

static struct {
	enum mode mode;
	uint16_t port;
	struct in_addr address;
	unsigned conns;
	uint64_t count;
	double seconds, warm, rate;
	const char *path, *key, *tls;
	uint64_t body;
	int status;
	bool each_new, resume, stay;
	int pids;
	pid_t pid[PIDS_MAX];
} opt = {.conns = 1, .seconds = 1, .warm = 0.2, .path = "/api/tags", .key = "", .status = 200};

static int epfd;
static struct conn *conns;
static unsigned opened, ready_conns;
static struct counts counts;
static bool setting_up, measuring;       /* those that are ready wait for the others */
static struct conn **line;               /* a ring of those that wait for their turn, one place each */
static unsigned line_first, line_n;
static uint64_t next_turn_ns;
static uint32_t *delays;                 /* ns of each event measured */
static size_t delays_n, delays_max;
static char request[TEXT_MAX];
static size_t request_n;
static char scratch[PIECE], zeros[PIECE];

static void
die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void
die_plain(const char *what)
{
	fprintf(stderr, "load: %s\n", what);
	exit(1);
}

static uint64_t
now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static uint64_t
cpu_ns(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < opt.pids; i++) {
		struct timespec t;
		clockid_t id;
		if (clock_getcpuclockid(opt.pid[i], &id) != 0 || clock_gettime(id, &t) != 0)
			die_plain("a process whose CPU time is asked for is gone");
		sum += (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
	}
	return sum;
}

/* ---- TLS ----------------------------------------------------------------------------------------------------- */

#ifdef WITH_TLS
static SSL_CTX *tls;
static SSL_SESSION *tls_session;         /* of the first handshake, taken up again by the others */
static char tls_spoken[128];

static void
tls_prepare(void)
{
	int version = strcmp(opt.tls, "1.3") == 0 ? TLS1_3_VERSION : TLS1_2_VERSION;

	tls = SSL_CTX_new(TLS_client_method());
	if (tls == NULL || !SSL_CTX_set_min_proto_version(tls, version) || !SSL_CTX_set_max_proto_version(tls, version) ||
	    !SSL_CTX_set_cipher_list(tls, TLS12_SUITE) || !SSL_CTX_set_ciphersuites(tls, "TLS_AES_128_GCM_SHA256"))
		die_plain("TLS cannot be prepared");
	SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
}

static void
tls_begin(struct conn *c)
{
	c->ssl = SSL_new(tls);
	if (c->ssl == NULL || !SSL_set_fd(c->ssl, c->fd) || !SSL_set_tlsext_host_name(c->ssl, "localhost"))
		die_plain("TLS connection");
	if (opt.resume && tls_session != NULL)
		SSL_set_session(c->ssl, tls_session);
}

static enum result
tls_result(struct conn *c, int n)
{
	int error = SSL_get_error(c->ssl, n);

	if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
		return AGAIN;
	ERR_clear_error();
	return CLOSED;
}

static enum result
tls_handshake(struct conn *c)
{
	int n = SSL_connect(c->ssl);

	if (n != 1)
		return tls_result(c, n);
	if (tls_spoken[0] == '\0')
		snprintf(tls_spoken, sizeof tls_spoken, "%s %s", SSL_get_version(c->ssl), SSL_get_cipher_name(c->ssl));
	if (opt.resume && tls_session == NULL)
		tls_session = SSL_get1_session(c->ssl);
	if (measuring && SSL_session_reused(c->ssl))
		counts.resumed++;
	return DONE;
}

static void
tls_end(struct conn *c)
{
	if (c->ssl == NULL)
		return;
	if (SSL_is_init_finished(c->ssl))
		SSL_shutdown(c->ssl);
	SSL_free(c->ssl);
	c->ssl = NULL;
	ERR_clear_error();
}
#endif

static ssize_t
conn_read(struct conn *c, char *p, size_t n)
{
#ifdef WITH_TLS
	if (c->ssl != NULL) {
		int got = SSL_read(c->ssl, p, (int)n);
		if (got > 0)
			return got;
		errno = EAGAIN;
		return tls_result(c, got) == AGAIN ? -1 : 0;
	}
#endif
	return read(c->fd, p, n);
}

static ssize_t
conn_write(struct conn *c, const char *p, size_t n)
{
#ifdef WITH_TLS
	if (c->ssl != NULL) {
		int put = SSL_write(c->ssl, p, (int)n);
		if (put > 0)
			return put;
		errno = tls_result(c, put) == AGAIN ? EAGAIN : EPIPE;
		return -1;
	}
#endif
	return write(c->fd, p, n);
}

/* ---- connections --------------------------------------------------------------------------------------------- */

static void
conn_open(struct conn *c)
{
	static unsigned turn;
	int one = 1;
	struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons(opt.port)};
	struct epoll_event e = {.events = EVENTS, .data.ptr = c};

	from.sin_addr.s_addr = htonl(0x7f000101u + turn++ % SOURCES);
	to.sin_addr = opt.address;
	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (c->fd < 0)
		die("socket");
	setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
	setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (opt.address.s_addr == htonl(INADDR_LOOPBACK) && bind(c->fd, (struct sockaddr *)&from, sizeof from) != 0)
		die("bind");
	if (connect(c->fd, (struct sockaddr *)&to, sizeof to) != 0 && errno != EINPROGRESS)
		die("connect");
	c->state = CONNECTING;
	c->sent = c->have = 0;
	c->last = c->hung_up = false;
	if (epoll_ctl(epfd, EPOLL_CTL_ADD, c->fd, &e) != 0)
		die("epoll_ctl");
}

static void
conn_close(struct conn *c)
{
#ifdef WITH_TLS
	tls_end(c);
#endif
	close(c->fd);
	c->state = UNUSED;
}

static void
conn_ready(struct conn *c)
{
	if (!c->ready)
		ready_conns++;
	c->ready = true;
}

/* What to do after a read of `n` bytes where `room` were possible: one that did not fill the room was all there was, and
 * the next bytes come with an event of their own. TLS may hold more than it gave. */
static enum result
after_read(const struct conn *c, ssize_t n, size_t room)
{
	return opt.tls == NULL && !c->hung_up && (size_t)n < room ? AGAIN : DONE;
}

static enum result
step_connecting(struct conn *c)
{
	int error = 0;
	socklen_t len = sizeof error;
	struct sockaddr_in peer;
	socklen_t peer_len = sizeof peer;

	if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len) != 0 || error != 0)
		return CLOSED;
	if (getpeername(c->fd, (struct sockaddr *)&peer, &peer_len) != 0)
		return AGAIN;
	c->state = SENDING;
#ifdef WITH_TLS
	if (opt.tls != NULL) {
		tls_begin(c);
		c->state = HANDSHAKING;
	}
#endif
	return DONE;
}

static enum result
step_handshaking(struct conn *c)
{
	enum result result = DONE;

#ifdef WITH_TLS
	result = tls_handshake(c);
#endif
	if (result != DONE)
		return result;
	c->state = SENDING;
	if (opt.mode != HANDSHAKES)
		return DONE;
	counts.done += measuring;
	conn_ready(c);
	return CLOSED;
}

static enum result
step_sending(struct conn *c)
{
	for (int i = 0; c->sent < request_n + opt.body; i++) {
		if (i == STEPS_MAX)
			return DONE;
		bool head = c->sent < request_n;
		uint64_t left = head ? request_n - c->sent : request_n + opt.body - c->sent;
		ssize_t n = conn_write(c, head ? request + c->sent : zeros, left < PIECE ? (size_t)left : PIECE);
		if (n < 0)
			return errno == EAGAIN ? AGAIN : CLOSED;
		c->sent += (uint64_t)n;
		if (measuring)
			counts.bytes_out += (uint64_t)n;
	}
	c->state = READING_HEAD;
	c->have = 0;
	return DONE;
}

static void
line_join(struct conn *c)
{
	if (!c->paced)
		line[(line_first + line_n++) % opt.conns] = c;
	c->paced = true;
}

static void
answer_done(struct conn *c)
{
	counts.done += measuring;
	conn_ready(c);
	c->sent = 0;
	c->state = opt.mode == IDLE || setting_up || opt.rate > 0 ? RESTING : SENDING;
	if (opt.rate > 0 && !setting_up)
		line_join(c);
}

static uint64_t
answer_length(const char *head)
{
	const char *p = strcasestr(head, "\ncontent-length:");

	return p != NULL ? strtoull(p + 16, NULL, 10) : UINT64_MAX;
}

static bool
answer_closes(const char *head)
{
	const char *p = strcasestr(head, "\nconnection:");

	return p != NULL && strncasecmp(p + 12 + strspn(p + 12, " "), "close", 5) == 0;
}

/* Chunk lines and field lines are passed over: an event is a line that begins with its time. */
static void
stream_line(struct conn *c, const char *line, uint64_t now)
{
	static const char begin[] = "data: {\"t\":";

	if (strncmp(line, begin, sizeof begin - 1) != 0)
		return;
	uint64_t sent = strtoull(line + sizeof begin - 1, NULL, 10), delay = now > sent ? now - sent : 0;
	conn_ready(c);
	if (!measuring)
		return;
	counts.done++;
	if (delays_n < delays_max)
		delays[delays_n++] = delay < UINT32_MAX ? (uint32_t)delay : UINT32_MAX;
}

static void
stream_take(struct conn *c)
{
	uint64_t now = now_ns();
	char *p = c->keep, *end = c->keep + c->have, *line_end;

	while ((line_end = memchr(p, '\n', (size_t)(end - p))) != NULL) {
		*line_end = '\0';
		stream_line(c, p, now);
		p = line_end + 1;
	}
	c->have = (size_t)(end - p);
	memmove(c->keep, p, c->have);
}

static enum result
step_reading_head(struct conn *c)
{
	ssize_t n = conn_read(c, c->keep + c->have, KEEP_MAX - 1 - c->have);

	if (n <= 0)
		return n < 0 && errno == EAGAIN ? AGAIN : CLOSED;
	c->have += (size_t)n;
	if (measuring)
		counts.bytes_in += (uint64_t)n;
	c->keep[c->have] = '\0';
	char *end = strstr(c->keep, "\r\n\r\n");
	if (end == NULL)
		return c->have < KEEP_MAX - 1 ? DONE : CLOSED;
	*end = '\0';
	int status = atoi(c->keep + 9);
	if (status == 100) {
		c->have = 0;
		return DONE;
	}
	if (status != opt.status && counts.wrong_status++ == 0)
		fprintf(stderr, "load: an answer of another status:\n%s\n", c->keep);
	c->last = answer_closes(c->keep);
	size_t rest = c->have - (size_t)(end + 4 - c->keep);
	c->left = answer_length(c->keep);
	c->state = READING_BODY;
	memmove(c->keep, end + 4, rest);
	c->have = rest;
	if (opt.mode == STREAMS) {
		stream_take(c);
		return DONE;
	}
	if (c->left != UINT64_MAX)
		c->left -= rest < c->left ? rest : c->left;
	if (c->left > 0)
		return DONE;
	answer_done(c);
	return c->last || opt.each_new ? CLOSED : DONE;
}

static enum result
step_reading_stream(struct conn *c)
{
	size_t room = KEEP_MAX - c->have;
	ssize_t n = conn_read(c, c->keep + c->have, room);

	if (n <= 0)
		return n < 0 && errno == EAGAIN ? AGAIN : CLOSED;
	if (measuring)
		counts.bytes_in += (uint64_t)n;
	c->have += (size_t)n;
	stream_take(c);
	return c->have < KEEP_MAX ? after_read(c, n, room) : CLOSED;
}

static enum result
step_reading_body(struct conn *c)
{
	ssize_t n;

	if (opt.mode == STREAMS)
		return step_reading_stream(c);
	n = conn_read(c, scratch, sizeof scratch);
	if (n <= 0)
		return n < 0 && errno == EAGAIN ? AGAIN : CLOSED;
	if (measuring)
		counts.bytes_in += (uint64_t)n;
	if (c->left != UINT64_MAX)
		c->left -= (uint64_t)n < c->left ? (uint64_t)n : c->left;
	if (c->left > 0)
		return after_read(c, n, sizeof scratch);
	answer_done(c);
	return c->last || opt.each_new ? CLOSED : DONE;
}

static enum result
step_resting(struct conn *c)
{
	ssize_t n = conn_read(c, scratch, sizeof scratch);

	return n < 0 && errno == EAGAIN ? AGAIN : n > 0 ? DONE : CLOSED;
}

static enum result
conn_step(struct conn *c)
{
	switch (c->state) {
	case CONNECTING:
		return step_connecting(c);
	case HANDSHAKING:
		return step_handshaking(c);
	case SENDING:
		return step_sending(c);
	case READING_HEAD:
		return step_reading_head(c);
	case READING_BODY:
		return step_reading_body(c);
	case RESTING:
		return step_resting(c);
	case UNUSED:
		break;
	}
	return AGAIN;
}

/* The connection has ended, by the server or because it is done; what was under way is counted, and a new one takes its
 * place. */
static void
conn_again(struct conn *c)
{
	bool whole = opt.mode == HANDSHAKES ? c->state == SENDING
	                                    : c->state == RESTING || (c->state == SENDING && c->sent == 0 && c->ready);
	bool until_end = c->state == READING_BODY && c->left == UINT64_MAX && opt.mode == REQUESTS;

	if (until_end)
		answer_done(c);
	else if (!whole && measuring)
		counts.failed++;
	else if (measuring && !opt.each_new && opt.mode != HANDSHAKES)
		counts.reopened++;
	conn_close(c);
	conn_open(c);
}

static void
conn_run(struct conn *c, uint32_t events)
{
	struct epoll_event again = {.events = EVENTS, .data.ptr = c};
	enum result result = DONE;

	c->hung_up = c->hung_up || (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
	for (int i = 0; i < STEPS_MAX && result == DONE; i++)
		result = conn_step(c);
	if (result == CLOSED)
		conn_again(c);
	else if (result == DONE && epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &again) != 0)   /* tells us once more */
		die("epoll_ctl");
}

/* ---- the run ------------------------------------------------------------------------------------------------- */

/* Those whose turn has come by the rate ask. Turns that nobody was there for are lost. Returns when to look again. */
static uint64_t
line_move(uint64_t now)
{
	if (line_n == 0)
		return UINT64_MAX;
	if (next_turn_ns + 1000000000ull < now)
		next_turn_ns = now;
	for (; line_n > 0 && next_turn_ns <= now; next_turn_ns += (uint64_t)(1e9 / opt.rate)) {
		struct conn *c = line[line_first];
		line_first = (line_first + 1) % opt.conns;
		line_n--;
		c->paced = false;
		if (c->state == RESTING) {
			c->state = SENDING;
			conn_run(c, 0);
		}
	}
	return line_n > 0 ? next_turn_ns : UINT64_MAX;
}

/* Events until `until`, or a turn at least. False when standard input has ended. */
static bool
turn(uint64_t until)
{
	struct epoll_event ready[READY_MAX];
	uint64_t now = now_ns(), due = line_move(now);

	until = due < until ? due : until;
	int ms = until > now ? (int)((until - now) / 1000000) + 1 : 0;
	int n = epoll_wait(epfd, ready, READY_MAX, ms);

	for (int i = 0; i < n; i++) {
		if (ready[i].data.ptr == NULL)
			return false;
		conn_run(ready[i].data.ptr, ready[i].events);
	}
	return true;
}

static void
open_all(void)
{
	uint64_t end = now_ns() + SETUP_S * 1000000000ull;

	conns = calloc(opt.conns, sizeof *conns);
	char *keep = malloc((size_t)opt.conns * KEEP_MAX);
	line = calloc(opt.conns, sizeof *line);
	if (conns == NULL || keep == NULL || line == NULL)
		die("memory");
	setting_up = true;
	while (ready_conns < opt.conns) {
		while (opened < opt.conns && opened - ready_conns < CONNECTING_MAX) {
			conns[opened].keep = keep + (size_t)opened * KEEP_MAX;
			conn_open(&conns[opened++]);
		}
		turn(now_ns() + 100000000);
		if (counts.wrong_status > 0)
			exit(1);
		if (now_ns() > end) {
			fprintf(stderr, "load: %u of %u connections are ready after %d s\n", ready_conns, opt.conns, SETUP_S);
			exit(1);
		}
	}
	setting_up = false;
	counts = (struct counts){.wrong_status = counts.wrong_status};
	printf("{\"ready\":%u}\n", ready_conns);
	fflush(stdout);
	for (unsigned i = 0; i < opt.conns && opt.mode == REQUESTS; i++)
		if (conns[i].state == RESTING && opt.rate > 0)
			line_join(&conns[i]);
		else if (conns[i].state == RESTING) {
			conns[i].state = SENDING;
			conn_run(&conns[i], 0);
		}
}

static int
compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static double
delay_us(double part)
{
	return delays_n == 0 ? 0 : delays[(size_t)((double)(delays_n - 1) * part)] / 1e3;
}

static void
run_for(double seconds)
{
	uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);

	while (now_ns() < end && (opt.count == 0 || !measuring || counts.done + counts.failed < opt.count))
		turn(end);
}

static void
measure(void)
{
	run_for(opt.warm);
	measuring = true;
	uint64_t began = now_ns(), cpu = cpu_ns();
	run_for(opt.count > 0 ? COUNT_S : opt.seconds);
	cpu = cpu_ns() - cpu;
	uint64_t took = now_ns() - began;
	measuring = false;
	if (delays_n > 0)
		qsort(delays, delays_n, sizeof *delays, compare);
	printf("{\"seconds\":%.6f,\"cpu_ns\":%llu,\"done\":%llu,\"failed\":%llu,\"reopened\":%llu,\"wrong_status\":%llu,"
	       "\"bytes_in\":%llu,\"bytes_out\":%llu,\"resumed\":%llu,\"p50_us\":%.1f,\"p99_us\":%.1f,\"tls\":\"%s\"}\n",
	       (double)took / 1e9, (unsigned long long)cpu, (unsigned long long)counts.done, (unsigned long long)counts.failed,
	       (unsigned long long)counts.reopened, (unsigned long long)counts.wrong_status,
	       (unsigned long long)counts.bytes_in, (unsigned long long)counts.bytes_out, (unsigned long long)counts.resumed,
	       delay_us(0.5), delay_us(0.99),
#ifdef WITH_TLS
	       tls_spoken);
#else
	       "");
#endif
	fflush(stdout);
}

static void
stay(void)
{
	struct epoll_event e = {.events = EPOLLIN | EPOLLHUP};

	if (epoll_ctl(epfd, EPOLL_CTL_ADD, STDIN_FILENO, &e) != 0)
		die("standard input cannot be watched");
	while (turn(now_ns() + 1000000000))
		;
}

/* A chat completion of `n` bytes, its question as long as it takes. */
static void
make_chat(char *p, size_t n, bool streams)
{
	static const char end[] = "\"}]}";
	int begin = snprintf(p, CHAT_MAX + 1, "{\"model\":\"tiny\",\"stream\":%s,\"messages\":[{\"role\":\"user\",\"content\":\"Hi",
	                     streams ? "true" : "false");

	if (n > CHAT_MAX || n < (size_t)begin + sizeof end - 1)
		die_plain("no chat completion has this length");
	for (size_t i = (size_t)begin; i < n; i++)
		p[i] = " again"[(i - (size_t)begin) % 6];
	memcpy(p + n - (sizeof end - 1), end, sizeof end);
}

static void
make_request(void)
{
	struct { char text[128]; } key = {""}, length = {""};
	char chat[CHAT_MAX + 1] = "";

	if (opt.mode == STREAMS)
		opt.body = STREAM_BODY;
	if (opt.key[0] != '\0')
		snprintf(key.text, sizeof key.text, "Authorization: Bearer %s\r\n", opt.key);
	if (opt.body > 0)
		snprintf(length.text, sizeof length.text, "Content-Type: application/json\r\nContent-Length: %llu\r\n",
		         (unsigned long long)opt.body);
	if (opt.body > 0 && opt.body <= CHAT_MAX)
		make_chat(chat, (size_t)opt.body, opt.mode == STREAMS);
	int n = snprintf(request, sizeof request, "%s %s HTTP/1.1\r\nHost: localhost:%u\r\nUser-Agent: load\r\n%s%s%s\r\n%s",
	                 opt.body > 0 ? "POST" : "GET", opt.path, opt.port, key.text, length.text,
	                 opt.each_new ? "Connection: close\r\n" : "", chat);
	if (n < 0 || (size_t)n >= sizeof request)
		die_plain("the request is too long");
	request_n = (size_t)n;
	if (chat[0] != '\0')
		opt.body = 0;                /* it goes with the head */
}

/* ---- start-up time ------------------------------------------------------------------------------------------- */

/* One request and the beginning of its answer on a connection that blocks. True when it was answered as expected. */
static bool
ask_on(struct conn *c)
{
	char head[64] = "";

#ifdef WITH_TLS
	if (opt.tls != NULL) {
		tls_begin(c);
		if (tls_handshake(c) != DONE)
			return false;
	}
#endif
	return conn_write(c, request, request_n) == (ssize_t)request_n && conn_read(c, head, sizeof head - 1) > 12 &&
	       atoi(head + 9) == opt.status;
}

static bool
ask_once(void)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(opt.port), .sin_addr = opt.address};
	struct timeval limit = {2, 0};
	struct conn c = {.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};

	setsockopt(c.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	bool good = connect(c.fd, (struct sockaddr *)&to, sizeof to) == 0 && ask_on(&c);
#ifdef WITH_TLS
	SSL_free(c.ssl);
#endif
	close(c.fd);
	return good;
}

static void
end_command(pid_t pid)
{
	kill(pid, SIGTERM);
	for (int i = 0; i < 500; i++) {
		if (waitpid(pid, NULL, WNOHANG) == pid)
			return;
		usleep(10000);
	}
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

/* Starts the command, with `in` as its standard input and output if that is not -1; `*began` is the time before exec, which
 * has happened when this returns. */
static pid_t
begin_command(char **command, int in, volatile uint64_t *began)
{
	pid_t pid = vfork();

	if (pid < 0)
		die("fork");
	if (pid == 0) {
		if (in >= 0)
			dup2(in, STDIN_FILENO);
		dup2(in >= 0 ? in : STDERR_FILENO, STDOUT_FILENO);
		*began = now_ns();
		execv(command[0], command);
		_exit(127);
	}
	return pid;
}

static uint64_t
time_start(char **command)
{
	volatile uint64_t began;
	uint64_t took = 0;
	pid_t pid = begin_command(command, -1, &began);

	while (took == 0 && now_ns() - began < 10000000000ull) {
		if (ask_once())
			took = now_ns() - began;
		else
			usleep(50);
	}
	end_command(pid);
	if (took == 0)
		die_plain("the command did not answer within 10 s");
	return took;
}

/* As inetd starts it: the connection is there before the process, and the request with it. */
static uint64_t
time_inetd(char **command)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof at;
	int door = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), theirs;
	struct conn c = {.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
	char head[64] = "";
	volatile uint64_t began;

	if (bind(door, (struct sockaddr *)&at, sizeof at) != 0 || listen(door, 1) != 0 ||
	    getsockname(door, (struct sockaddr *)&at, &len) != 0 || connect(c.fd, (struct sockaddr *)&at, sizeof at) != 0 ||
	    (theirs = accept4(door, NULL, NULL, SOCK_CLOEXEC)) < 0)
		die("connection");
	if (write(c.fd, request, request_n) != (ssize_t)request_n)
		die("request");
	pid_t pid = begin_command(command, theirs, &began);
	close(theirs);
	bool good = read(c.fd, head, sizeof head - 1) > 12 && atoi(head + 9) == opt.status;
	uint64_t took = now_ns() - began;
	close(c.fd);
	end_command(pid);
	if (!good)
		die_plain("the command did not answer");
	return took;
}

/* The second of two starts: this client's own first steps, such as those into its TLS library, are not measured. */
static void
measure_start(uint64_t (*start)(char **), char **command)
{
	start(command);
	printf("{\"start_ms\":%.3f}\n", (double)start(command) / 1e6);
}

/* ---- main ---------------------------------------------------------------------------------------------------- */

static void
read_pids(char *list)
{
	for (char *p = strtok(list, ","); p != NULL && opt.pids < PIDS_MAX; p = strtok(NULL, ","))
		opt.pid[opt.pids++] = (pid_t)atoi(p);
}

static void
read_options(int argc, char **argv)
{
	bool bad_address = false;
	int c;

	opt.address.s_addr = htonl(INADDR_LOOPBACK);
	while ((c = getopt(argc, argv, "+p:a:c:N:R:P:s:w:K:b:x:nt:rHC:")) != -1)
		switch (c) {
		case 'p': opt.port = (uint16_t)atoi(optarg); break;
		case 'a': bad_address = inet_aton(optarg, &opt.address) == 0; break;
		case 'N': opt.count = strtoull(optarg, NULL, 10); break;
		case 'R': opt.rate = atof(optarg); break;
		case 'c': opt.conns = (unsigned)atoi(optarg); break;
		case 'P': opt.path = optarg; break;
		case 's': opt.seconds = atof(optarg); break;
		case 'w': opt.warm = atof(optarg); break;
		case 'K': opt.key = optarg; break;
		case 'b': opt.body = strtoull(optarg, NULL, 10); break;
		case 'x': opt.status = atoi(optarg); break;
		case 'n': opt.each_new = true; break;
		case 't': opt.tls = optarg; break;
		case 'r': opt.resume = true; break;
		case 'H': opt.stay = true; break;
		case 'C': read_pids(optarg); break;
		default: exit(64);
		}
	if (bad_address)
		die_plain("no such address");
}

static enum mode
read_mode(const char *word)
{
	static const char *const words[] = {"requests", "streams", "idle", "handshakes", "start", "inetd"};

	for (unsigned i = 0; i < sizeof words / sizeof words[0]; i++)
		if (strcmp(word, words[i]) == 0)
			return (enum mode)i;
	die_plain("no such mode");
	return REQUESTS;
}

int
main(int argc, char **argv)
{
	if (argc < 2)
		return 64;
	opt.mode = read_mode(argv[1]);
	read_options(argc - 1, argv + 1);
	signal(SIGPIPE, SIG_IGN);
	make_request();
	if (opt.tls != NULL) {
#ifdef WITH_TLS
		tls_prepare();
#else
		die_plain("built without TLS");
#endif
	}
	if (opt.mode == START || opt.mode == INETD) {
		measure_start(opt.mode == START ? time_start : time_inetd, argv + 1 + optind);
		return 0;
	}
	epfd = epoll_create1(EPOLL_CLOEXEC);
	if (opt.mode == STREAMS) {
		delays_max = (size_t)(opt.conns * (opt.seconds + 1) * 100);
		delays = malloc(delays_max * sizeof *delays);
	}
	open_all();
	if (opt.mode != IDLE && opt.seconds > 0)
		measure();
	if (opt.stay)
		stay();
	return 0;
}
