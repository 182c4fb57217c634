/* relay: the floor. Copies bytes between a client connection and an upstream connection of its own, and does nothing else:
 * no parsing, no key, no log, no timeout. What a proxy costs beyond it is what its work costs.
 *
 *     relay poll|epoll UPSTREAM_PORT      listens on a free port of 127.0.0.1, which it prints, until it is ended
 *
 * It connects upstream when a client connects, so with a new connection for each request it connects for each request. */

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
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ENDS_MAX = 65536, READY_MAX = 256 };

/* One of the two ends of a pair. */
struct end {
	int fd;
	int place;                   /* in the poll set */
	struct end *other;
	bool ended;                  /* nothing more to read here: closed when `waiting` of the other has gone */
	char *waiting;               /* bytes that the socket did not take, NULL as a rule */
	size_t waits, gone;
	struct end *next_dead;
};

static bool use_poll;
static int epfd;
static struct pollfd polled[ENDS_MAX];
static struct end *polled_end[ENDS_MAX];
static int places;
static struct sockaddr_in upstream;
static struct end listener;
static struct end *dead;             /* freed when the turn is over: an event of this turn may still name it */
static char scratch[64 << 10];

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
	bool reads = e->other->waiting == NULL && !e->ended, writes = e->waiting != NULL;
	struct epoll_event event = {.events = (reads ? EPOLLIN : 0u) | (writes ? EPOLLOUT : 0u), .data.ptr = e};

	if (use_poll)
		polled[e->place].events = (short)((reads ? POLLIN : 0) | (writes ? POLLOUT : 0));
	else if (epoll_ctl(epfd, EPOLL_CTL_MOD, e->fd, &event) != 0)
		die("epoll_ctl");
}

static void
end_close(struct end *e)
{
	close(e->fd);
	e->fd = -1;
	free(e->waiting);
	if (use_poll) {
		polled[e->place] = polled[--places];
		polled_end[e->place] = polled_end[places];
		polled_end[e->place]->place = e->place;
	}
}

static void
pair_close(struct end *e)
{
	end_close(e);
	end_close(e->other);
	if (e > e->other)            /* the pair is one allocation, which begins with its first end */
		e = e->other;
	e->next_dead = dead;
	dead = e;
}

static struct end *
pair_open(int client)
{
	struct end *pair = calloc(2, sizeof *pair);
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	if (pair == NULL || fd < 0)
		die("a new pair");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (connect(fd, (struct sockaddr *)&upstream, sizeof upstream) != 0 && errno != EINPROGRESS)
		die("connect");
	pair[0] = (struct end){.fd = client, .other = &pair[1]};
	pair[1] = (struct end){.fd = fd, .other = &pair[0]};
	return pair;
}

static void
accept_some(void)
{
	int fd;

	while ((fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		struct end *pair = pair_open(fd);
		watch_begin(&pair[0]);
		watch_begin(&pair[1]);
	}
}

/* Keeps what `to` did not take. */
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

/* Each returns false when the pair is done. */
static bool
move_in(struct end *e)
{
	ssize_t n = read(e->fd, scratch, sizeof scratch), sent;

	if (n < 0)
		return errno == EAGAIN;
	if (n == 0) {
		e->ended = true;
		if (e->other->waiting == NULL)
			return false;
		watch_change(e);
		return true;
	}
	sent = write(e->other->fd, scratch, (size_t)n);
	if (sent < 0 && errno != EAGAIN)
		return false;
	if (sent < n)
		keep(e->other, scratch + (sent > 0 ? sent : 0), (size_t)(n - (sent > 0 ? sent : 0)));
	return true;
}

static bool
move_out(struct end *e)
{
	ssize_t n = write(e->fd, e->waiting + e->gone, e->waits - e->gone);

	if (n < 0)
		return errno == EAGAIN;
	e->gone += (size_t)n;
	if (e->gone < e->waits)
		return true;
	free(e->waiting);
	e->waiting = NULL;
	if (e->other->ended)
		return false;
	watch_change(e);
	watch_change(e->other);
	return true;
}

static void
serve(struct end *e, bool readable, bool writable)
{
	if (e->fd < 0)
		return;
	if (e == &listener)
		accept_some();
	else if ((writable && e->waiting != NULL && !move_out(e)) ||
	         (readable && e->other->waiting == NULL && !e->ended && !move_in(e)))
		pair_close(e);
}

static void
turn_poll(void)
{
	int n = poll(polled, (nfds_t)places, -1);

	/* Backwards: closing moves the last place into the closed one. */
	for (int i = places - 1; i >= 0 && n > 0; i--)
		if (i < places && polled[i].revents != 0) {
			n--;
			serve(polled_end[i], polled[i].revents & ~POLLOUT, polled[i].revents & (POLLOUT | POLLERR));
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
		struct end *next = dead->next_dead;
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
	setsockopt(listener.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
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
