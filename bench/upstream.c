/* upstream: a stand-in model server that costs as little as it can.
 *
 *     upstream N [ADDRESS [stay]]     serves on N free ports of 127.0.0.1 or ADDRESS, which it prints on one line, until it is
 *                                     ended; with `stay` it leaves the end of each connection to the other side
 *
 * What a request gets depends on its target alone, so that the same requests pass any policy in front of it:
 *
 *     ...?stream      an endless stream of server-sent events, EVENTS_PER_S a second, each with the time of its sending
 *     ...?bytes=N     a body of N bytes
 *     /v1/...         a chat completion of half a KB
 *     anything else   a short list of models
 *
 * A body that comes with the request (Content-Length) is swallowed first. Who asks for `Connection: close`, or speaks HTTP/1.0,
 * gets its answer and then the end of the connection at once, as of real servers.
 *
 * Several ports because the connections that a proxy opens and closes leave TIME_WAIT entries behind for their pair of
 * addresses: one proxy's must not slow the next one's. */

#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	PORTS_MAX = 64,
	HEAD_ROOM = 8192,            /* bytes of a request head, and of what is pipelined behind it */
	TARGET_ROOM = 128,
	EVENTS_PER_S = 50,           /* of one stream */
	SLOTS = 2000,                /* parts of a period in which streams have their turn: 10 us each */
	READY_MAX = 256
};

#define PERIOD_NS (1000000000ull / EVENTS_PER_S)
#define SLOT_NS (PERIOD_NS / SLOTS)

struct conn {
	int fd;
	bool close_after, chunked, streams;
	uint64_t body_left;          /* bytes of the request's body still to swallow */
	uint64_t bulk_left;          /* bytes of an answer's body still to send */
	char target[TARGET_ROOM];    /* of the request under way */
	size_t have;                 /* bytes in `head` */
	struct conn *next, **link;   /* the list of its slot, while it streams */
	char head[HEAD_ROOM];
};

static const char SHORT_BODY[] =
	"{\"models\":[{\"name\":\"tiny:latest\",\"model\":\"tiny:latest\",\"modified_at\":\"2026-01-01T00:00:00Z\",\"size\":1,"
	"\"details\":{\"format\":\"gguf\",\"family\":\"tiny\",\"parameter_size\":\"1M\",\"quantization_level\":\"Q4_0\"}}]}";
static const char CHAT_BODY[] =
	"{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1767225600,\"model\":\"tiny\",\"choices\":[{\"index\":0,"
	"\"message\":{\"role\":\"assistant\",\"content\":\"The quick brown fox jumps over the lazy dog, and the dog, who has seen it all "
	"before, opens one eye, sighs and goes on sleeping in the sun until somebody comes along with something that smells of "
	"dinner, which is the one thing that it gets up for.\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{"
	"\"prompt_tokens\":250,\"completion_tokens\":60,\"total_tokens\":310}}";
/* The time is written over the blanks. The length of a chunk stands before, its end behind. */
#define CHUNK "c2\r\n"
static char event[] = CHUNK
	"data: {\"t\":                    ,\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,"
	"\"model\":\"tiny\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"finish_reason\":null}]}\n\n" "\r\n";

static bool stays;
static int epfd;
static struct conn *slot[SLOTS];
static unsigned streams_begun, streams_open;
static uint64_t slots_done;              /* slots that had their turn, counted from the clock's zero */
static char scratch[256 << 10];

static void
die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t
now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void
watch(struct conn *c, int op, uint32_t events)
{
	struct epoll_event e = {.events = events, .data.ptr = c};

	if (epoll_ctl(epfd, op, c->fd, &e) != 0)
		die("epoll_ctl");
}

static void
conn_close(struct conn *c)
{
	if (c->streams) {
		*c->link = c->next;
		if (c->next != NULL)
			c->next->link = c->link;
		streams_open--;
	}
	close(c->fd);
	free(c);
}

/* ---- streams ------------------------------------------------------------------------------------------------- */

/* Streams are spread over the period by the golden ratio: evenly, however many there are and however fast they were
 * opened, and alike for each proxy. */
static void
stream_begin(struct conn *c)
{
	double turn = streams_begun++ * 0.6180339887498949;
	struct conn **list = &slot[(unsigned)((turn - (double)(uint64_t)turn) * SLOTS) % SLOTS];

	if (streams_open++ == 0)
		slots_done = now_ns() / SLOT_NS;
	c->streams = true;
	c->next = *list;
	c->link = list;
	if (c->next != NULL)
		c->next->link = &c->next;
	*list = c;
}

/* Writes the time of now over the blanks, its last digit in the last of them. */
static void
event_stamp(void)
{
	char *p = strchr(event, ',');

	for (uint64_t now = now_ns(); now > 0; now /= 10)
		*--p = (char)('0' + now % 10);
}

/* What cannot be written at once ends the stream: its reader is too slow for this test. */
static void
stream_event(struct conn *c)
{
	size_t before = c->chunked ? 0 : sizeof CHUNK - 1, behind = c->chunked ? 0 : 2;
	size_t n = sizeof event - 1 - before - behind;

	event_stamp();
	if (write(c->fd, event + before, n) != (ssize_t)n)
		conn_close(c);
}

/* Gives each slot that came since the last call its turn; returns the nanoseconds until the next one that is not empty. */
static uint64_t
streams_turn(void)
{
	uint64_t due = now_ns() / SLOT_NS;

	for (; streams_open > 0 && slots_done < due; slots_done++)
		for (struct conn *c = slot[slots_done % SLOTS], *next; c != NULL; c = next) {
			next = c->next;
			stream_event(c);
		}
	if (streams_open == 0)
		return UINT64_MAX;
	while (slot[due % SLOTS] == NULL && due < slots_done + SLOTS)
		due++;
	uint64_t now = now_ns(), then = (due + 1) * SLOT_NS;
	return then > now ? then - now : 0;
}

/* ---- requests ------------------------------------------------------------------------------------------------ */

static bool
send_all(struct conn *c, const char *p, size_t n)
{
	return write(c->fd, p, n) == (ssize_t)n;
}

/* False when the connection is done. */
static bool
bulk_move(struct conn *c)
{
	size_t piece = c->bulk_left < sizeof scratch ? (size_t)c->bulk_left : sizeof scratch;
	ssize_t n = write(c->fd, scratch, piece);

	if (n < 0 && errno != EAGAIN)
		return false;
	c->bulk_left -= n > 0 ? (uint64_t)n : 0;
	if (c->bulk_left > 0)
		return true;
	watch(c, EPOLL_CTL_MOD, EPOLLIN);
	return !c->close_after;
}

static bool
answer(struct conn *c)
{
	char head[1024];
	const char *target = c->target, *bytes = strstr(target, "?bytes="), *ending = c->close_after ? "Connection: close\r\n" : "";
	const char *body = bytes != NULL ? "" : strncmp(target, "/v1/", 4) == 0 ? CHAT_BODY : SHORT_BODY;
	uint64_t length = bytes != NULL ? strtoull(bytes + 7, NULL, 10) : strlen(body);
	int n;

	if (strstr(target, "?stream") != NULL) {
		n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n%s%s\r\n",
		             c->chunked ? "Transfer-Encoding: chunked\r\n" : "", ending);
		if (!send_all(c, head, (size_t)n))
			return false;
		stream_begin(c);
		return true;
	}
	n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %llu\r\n%s\r\n%s",
	             (unsigned long long)length, ending, body);
	if (!send_all(c, head, (size_t)n))
		return false;
	if (bytes == NULL)
		return !c->close_after;
	c->bulk_left = length;
	watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
	return bulk_move(c);
}

/* The value of a field, or NULL; `name` begins with a line feed and ends with a colon. */
static const char *
field(const char *head, const char *name)
{
	const char *p = strcasestr(head, name);

	return p == NULL ? NULL : p + strlen(name) + strspn(p + strlen(name), " ");
}

/* Takes one whole head from the buffer. False when the connection is done. */
static bool
take_head(struct conn *c, char *end)
{
	const char *connection, *length;

	*end = '\0';
	if (sscanf(c->head, "%*15s %127s", c->target) != 1 || field(c->head, "\ntransfer-encoding:") != NULL)
		return false;                /* nothing here sends chunked bodies, and no proxy should make one */
	c->chunked = strstr(c->head, " HTTP/1.1") != NULL;
	connection = field(c->head, "\nconnection:");
	c->close_after = stays ? false : connection != NULL ? strncasecmp(connection, "close", 5) == 0 : !c->chunked;
	length = field(c->head, "\ncontent-length:");
	c->body_left = length != NULL ? strtoull(length, NULL, 10) : 0;

	size_t used = (size_t)(end + 4 - c->head), rest = c->have - used;
	size_t body = rest < c->body_left ? rest : (size_t)c->body_left;
	memmove(c->head, end + 4 + body, rest - body);
	c->have = rest - body;
	c->body_left -= body;
	if (c->body_left == 0)
		return answer(c);
	return true;
}

/* Reads once and serves what is whole. False when the connection is done. */
static bool
conn_read(struct conn *c)
{
	ssize_t n;
	char *end;

	if (c->body_left > 0) {
		n = read(c->fd, scratch, c->body_left < sizeof scratch ? (size_t)c->body_left : sizeof scratch);
		if (n <= 0)
			return n < 0 && errno == EAGAIN;
		c->body_left -= (uint64_t)n;
		return c->body_left > 0 || answer(c);
	}
	n = read(c->fd, c->head + c->have, sizeof c->head - 1 - c->have);
	if (n <= 0)
		return n < 0 && errno == EAGAIN;
	c->have += (size_t)n;
	while (c->body_left == 0 && c->bulk_left == 0 && !c->streams &&
	       (end = memmem(c->head, c->have, "\r\n\r\n", 4)) != NULL)
		if (!take_head(c, end))
			return false;
	return c->have < sizeof c->head - 1;
}

static void
accept_some(int listener)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		struct conn *c = malloc(sizeof *c);
		if (c == NULL)
			die("malloc");
		memset(c, 0, offsetof(struct conn, head));
		c->fd = fd;
		watch(c, EPOLL_CTL_ADD, EPOLLIN);
	}
}

static int
listener_open(struct sockaddr_in *a, const char *address)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
	socklen_t len = sizeof *a;

	*a = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(address)};
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);      /* what is accepted inherits it */
	if (fd < 0 || bind(fd, (struct sockaddr *)a, sizeof *a) != 0 || listen(fd, SOMAXCONN) != 0 ||
	    getsockname(fd, (struct sockaddr *)a, &len) != 0)
		die("listen");
	return fd;
}

int
main(int argc, char **argv)
{
	struct epoll_event ready[READY_MAX];
	int ports = argc > 1 ? atoi(argv[1]) : 1;
	static struct conn listener[PORTS_MAX];

	if (strtoul(event, NULL, 16) != sizeof event - 1 - (sizeof CHUNK - 1) - 2)
		return fprintf(stderr, "upstream: a chunk's length is wrong\n"), 1;
	stays = argc > 3 && strcmp(argv[3], "stay") == 0;
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_TIMERSLACK, 1000ul);                /* ns: events leave when they are due */
	epfd = epoll_create1(0);
	for (int i = 0; i < ports && i < PORTS_MAX; i++) {
		struct sockaddr_in a;
		listener[i].fd = listener_open(&a, argc > 2 ? argv[2] : "127.0.0.1");
		watch(&listener[i], EPOLL_CTL_ADD, EPOLLIN);
		printf("%d%c", ntohs(a.sin_port), i + 1 < ports ? ' ' : '\n');
	}
	fflush(stdout);
	for (;;) {
		uint64_t wait = streams_turn();
		struct timespec t = {(time_t)(wait / 1000000000), (long)(wait % 1000000000)};
		int n = epoll_pwait2(epfd, ready, READY_MAX, wait == UINT64_MAX ? NULL : &t, NULL);
		for (int i = 0; i < n; i++) {
			struct conn *c = ready[i].data.ptr;
			if (c >= listener && c < listener + PORTS_MAX)
				accept_some(c->fd);
			else if (((ready[i].events & EPOLLOUT) && !bulk_move(c)) ||
			         ((ready[i].events & ~(uint32_t)EPOLLOUT) && !conn_read(c)))
				conn_close(c);
		}
	}
}
