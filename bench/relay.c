/* relay: the floor. Keeps the connections of its clients, connects upstream for each request, copies bytes and closes, and does
 * nothing else: no key, no limit, no log, no timeout, no check of what it passes on. What a proxy costs beyond it is what its
 * work costs.
 *
 *     relay poll|epoll UPSTREAM_PORT      listens on a free port of 127.0.0.1, which it prints, until it is ended
 *
 * Of a head it looks at Content-Length, to see where a message ends, and at `Connection: close`, which it adds to a request and
 * takes off its answer. It trusts both sides: each head comes whole in one read, nobody pipelines, an answer without a length
 * ends with its connection. System calls for a request on a kept connection: read, socket, connect, write, then (with epoll)
 * epoll_ctl, then read, write, close, and its part of a wait: there is none that could be left out. A connect that is still
 * under way, or a socket that is full, takes more. */

#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ENDS_MAX = 65536, READY_MAX = 256, ROOM = 64 << 10 };

#define CLOSE "Connection: close\r\n"

/* One of the two ends of a pair; that of the upstream has no descriptor between two requests. */
struct end {
	int fd;
	int place;                   /* in the poll set */
	struct end *other;
	uint64_t left;               /* bytes still to come of the message that is read here; UINT64_MAX: until the end */
	bool head;                   /* a head comes next */
	char *waiting;               /* bytes that the socket did not take, NULL as a rule */
	size_t waits, gone;
};

struct pair {
	struct end client, upstream;
	bool last;                   /* the client's connection ends with this answer */
	struct pair *next_dead;
};

static bool use_poll;
static int epfd;
static struct pollfd polled[ENDS_MAX];
static struct end *polled_end[ENDS_MAX];
static int places;
static struct sockaddr_in upstream;
static struct end listener;
static struct pair *dead;            /* freed when the turn is over: an event of this turn may still name it */
static char scratch[sizeof CLOSE - 1 + ROOM + 1];     /* what is read lies behind room for one line */

static void
die(const char *what)
{
	perror(what);
	exit(1);
}

static void
watch_begin(struct end *e)
{
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = e};

	if (!use_poll) {
		if (epoll_ctl(epfd, EPOLL_CTL_ADD, e->fd, &event) != 0)
			die("epoll_ctl");
		return;
	}
	if (places == ENDS_MAX)
		die("too many connections");
	e->place = places;
	polled[places] = (struct pollfd){.fd = e->fd, .events = POLLIN};
	polled_end[places++] = e;
}

/* An end is read while its other end takes bytes, and watched for room while bytes wait for it. */
static void
watch_change(struct end *e)
{
	bool reads = e->other->waiting == NULL, writes = e->waiting != NULL;
	struct epoll_event event = {.events = (reads ? EPOLLIN : 0u) | (writes ? EPOLLOUT : 0u), .data.ptr = e};

	if (use_poll)
		polled[e->place].events = (short)((reads ? POLLIN : 0) | (writes ? POLLOUT : 0));
	else if (epoll_ctl(epfd, EPOLL_CTL_MOD, e->fd, &event) != 0)
		die("epoll_ctl");
}

static void
end_close(struct end *e)
{
	if (e->fd < 0)
		return;
	close(e->fd);
	e->fd = -1;
	free(e->waiting);
	e->waiting = NULL;
	if (use_poll) {
		polled[e->place] = polled[--places];
		polled_end[e->place] = polled_end[places];
		polled_end[e->place]->place = e->place;
	}
}

static struct pair *
pair_of(struct end *e)
{
	return (struct pair *)(e < e->other ? e : e->other);     /* the client's end is its first member */
}

static void
pair_close(struct pair *p)
{
	end_close(&p->client);
	end_close(&p->upstream);
	p->next_dead = dead;
	dead = p;
}

/* Keeps what `to` did not take. Both are in the set. */
static void
keep(struct end *to, const char *p, size_t n)
{
	to->waiting = malloc(n);
	if (to->waiting == NULL)
		die("malloc");
	memcpy(to->waiting, p, n);
	to->waits = n;
	to->gone = 0;
	watch_change(to);
	watch_change(to->other);
}

/* Connects and writes at once: on this machine the connection stands when connect() returns, though it says that it does not.
 * Nothing is written in two small pieces, so TCP_NODELAY would change nothing. False when the pair is done. */
static bool
upstream_open(struct end *e, const char *p, size_t n)
{
	ssize_t sent;

	e->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (e->fd < 0 || (connect(e->fd, (struct sockaddr *)&upstream, sizeof upstream) != 0 && errno != EINPROGRESS))
		die("connect");
	e->head = true;
	sent = write(e->fd, p, n);
	watch_begin(e);
	if (sent < 0 && errno != EAGAIN)
		return false;
	if (sent < (ssize_t)n)
		keep(e, p + (sent > 0 ? sent : 0), n - (size_t)(sent > 0 ? sent : 0));
	return true;
}

/* Sets what is left of the message once the `*n` bytes at `*p` are passed on, and its `Connection: close`: added to a request,
 * taken off an answer unless the client asked for it. What stands before that line is moved. */
static void
take_head(struct pair *pair, struct end *from, char **p, size_t *n)
{
	static const char length[] = "\nContent-Length: ", close_line[] = "\n" CLOSE;
	char *end = memmem(*p, *n, "\r\n\r\n", 4), *found, *line;
	bool request = from == &pair->client;
	const size_t len = sizeof CLOSE - 1;

	if (end == NULL) {
		fprintf(stderr, "relay: a head comes in pieces\n");
		exit(1);
	}
	size_t head = (size_t)(end + 2 - *p), body = *n - head - 2;
	found = memmem(*p, head, length, sizeof length - 1);
	from->left = found != NULL ? strtoull(found + sizeof length - 1, NULL, 10) - body : request ? 0 : UINT64_MAX;
	from->head = false;
	line = memmem(*p, head, close_line, sizeof close_line - 1);
	if (request)
		pair->last = line != NULL;
	if (request && line == NULL) {
		memmove(*p - len, *p, head);
		memcpy(*p - len + head, CLOSE, len);
		*p -= len;
		*n += len;
	} else if (!request && line != NULL && !pair->last) {
		memmove(*p + len, *p, (size_t)(line + 1 - *p));
		*p += len;
		*n -= len;
	}
}

/* The answer is whole: its connection goes at once. False when the client's goes with it. */
static bool
answer_done(struct pair *pair)
{
	end_close(&pair->upstream);
	pair->client.head = true;
	return !pair->last;
}

/* Each returns false when the pair is done. */
static bool
move_in(struct pair *pair, struct end *e)
{
	char *p = scratch + sizeof CLOSE - 1;
	ssize_t got = read(e->fd, p, ROOM), sent;

	if (got < 0)
		return errno == EAGAIN;
	if (got == 0)
		return false;
	size_t n = (size_t)got;
	if (e->head)
		take_head(pair, e, &p, &n);
	else if (e->left != UINT64_MAX)
		e->left -= n;
	if (e->other->fd < 0)
		return upstream_open(e->other, p, n);
	sent = write(e->other->fd, p, n);
	if (sent < 0 && errno != EAGAIN)
		return false;
	if (sent < (ssize_t)n) {
		keep(e->other, p + (sent > 0 ? sent : 0), n - (size_t)(sent > 0 ? sent : 0));
		return true;
	}
	return e == &pair->client || e->left > 0 || answer_done(pair);
}

static bool
move_out(struct pair *pair, struct end *e)
{
	ssize_t n = write(e->fd, e->waiting + e->gone, e->waits - e->gone);

	if (n < 0)
		return errno == EAGAIN;
	e->gone += (size_t)n;
	if (e->gone < e->waits)
		return true;
	free(e->waiting);
	e->waiting = NULL;
	watch_change(e);
	if (e == &pair->client && pair->upstream.left == 0)
		return answer_done(pair);
	watch_change(e->other);
	return true;
}

static void
accept_some(void)
{
	int fd;

	while ((fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		struct pair *pair = calloc(1, sizeof *pair);
		if (pair == NULL)
			die("a new pair");
		pair->client = (struct end){.fd = fd, .other = &pair->upstream, .head = true};
		pair->upstream = (struct end){.fd = -1, .other = &pair->client};
		watch_begin(&pair->client);
	}
}

static void
serve(struct end *e, bool readable, bool writable)
{
	if (e->fd < 0)
		return;
	if (e == &listener) {
		accept_some();
		return;
	}
	struct pair *pair = pair_of(e);
	if ((writable && e->waiting != NULL && !move_out(pair, e)) ||
	    (readable && e->fd >= 0 && e->other->waiting == NULL && !move_in(pair, e)))
		pair_close(pair);
}

static void
turn_poll(void)
{
	int n = poll(polled, (nfds_t)places, -1);

	/* Backwards: closing moves the last place into the closed one. */
	for (int i = places - 1; i >= 0 && n > 0; i--)
		if (i < places && polled[i].revents != 0) {
			short events = polled[i].revents;
			polled[i].revents = 0;       /* should it be moved: it had its turn */
			n--;
			serve(polled_end[i], events & ~POLLOUT, events & (POLLOUT | POLLERR));
		}
}

static void
turn_epoll(void)
{
	struct epoll_event ready[READY_MAX];
	int n = epoll_wait(epfd, ready, READY_MAX, -1);

	for (int i = 0; i < n; i++)
		serve(ready[i].data.ptr, ready[i].events & ~(uint32_t)EPOLLOUT, ready[i].events & (EPOLLOUT | EPOLLERR));
}

static void
bury(void)
{
	while (dead != NULL) {
		struct pair *next = dead->next_dead;
		free(dead);
		dead = next;
	}
}

int
main(int argc, char **argv)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof a;
	int one = 1;

	if (argc != 3)
		return 64;
	signal(SIGPIPE, SIG_IGN);
	use_poll = strcmp(argv[1], "poll") == 0;
	upstream = a;
	upstream.sin_port = htons((uint16_t)atoi(argv[2]));
	epfd = epoll_create1(0);
	listener.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	setsockopt(listener.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);     /* what is accepted inherits it */
	if (bind(listener.fd, (struct sockaddr *)&a, sizeof a) != 0 || listen(listener.fd, SOMAXCONN) != 0 ||
	    getsockname(listener.fd, (struct sockaddr *)&a, &len) != 0)
		die("listen");
	watch_begin(&listener);
	printf("%d\n", ntohs(a.sin_port));
	fflush(stdout);
	for (;;) {
		if (use_poll)
			turn_poll();
		else
			turn_epoll();
		bury();
	}
}
