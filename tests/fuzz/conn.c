/* Goal: a whole connection, driven by scripted bytes, ends and time. Nothing reaches the upstream without a key, nothing is
 * answered twice, what goes out either way is well formed, and all that was taken is given back. */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* The world that the product sees: two ends of socket pairs, a clock that the script sets, and links that take no more
 * bytes than the script allows. */
static int world_accept(void);
static int world_socket(void);
static int world_connect(void);
static ssize_t world_send(int, const void *, size_t);
static int world_poll(struct pollfd *, nfds_t);
static int world_epoll_wait(int, struct epoll_event *, int);
static int world_clock(clockid_t, struct timespec *);
static ssize_t world_write(const void *, size_t);
#define accept4(fd, peer, len, flags) ((void)(fd), (void)(peer), (void)(len), world_accept())
#define socket(family, type, protocol) ((void)(family), world_socket())
#define connect(fd, to, len) ((void)(fd), (void)(to), (void)(len), world_connect())
#define send(fd, p, n, flags) world_send(fd, p, n)
#define poll(set, n, ms) ((void)(ms), world_poll(set, n))
#define epoll_wait(fd, events, n, ms) ((void)(ms), world_epoll_wait(fd, events, n))
#define clock_gettime(id, t) world_clock(id, t)
#define write(fd, p, n) ((void)(fd), world_write(p, n))
#include "fuzz.h"
#undef accept4
#undef socket
#undef connect
#undef send
#undef poll
#undef epoll_wait
#undef clock_gettime
#undef write

static const char KEY[] = "fuzz-key-1";
static const char BASIC[] = "dTpmdXp6LWtleS0x";     /* u:fuzz-key-1 */

enum { CONNS = 3, CLIENTS_MAX = 8, UPSTREAMS_MAX = 24, TEXT_MAX = 300000, SPINS_MAX = 20 };

/* Bytes of the script from here on are orders, all others go to the side that writes. */
enum order {
	O_CLIENT = 0xf0, O_UPSTREAM_SIDE, O_TURN, O_LATER, O_CLIENT_CLOSE, O_CLIENT_HALF, O_UPSTREAM_CLOSE, O_UPSTREAM_HALF,
	O_ANOTHER, O_SELECT, O_CLIENT_TAKES, O_UPSTREAM_TAKES, O_PARK, O_CONNECT, O_MANY, O_WORKER
};

/* The script's end of one upstream connection. */
struct upstream_side {
	int fd, theirs, client;
	struct text got, said;
};

/* The script's end of one client connection. */
struct client_side {
	int fd, theirs;
	struct text got, said;
};

static struct world {
	struct client_side client[CLIENTS_MAX];
	struct upstream_side upstream[UPSTREAMS_MAX];
	size_t clients, upstreams, at;
	struct text pending;         /* bytes that the side that writes will say next */
	bool upstream_writes;
	uint64_t now_ns;
	size_t client_takes, upstream_takes;
	int accepts, connects;       /* fd that waits to be accepted; how the next connect ends */
	int ready;                   /* connections' events in this turn */
	uint64_t moved;              /* bytes that went anywhere, connections that began or ended */
	int spins;
} world;

static struct worker worker;
static struct log log_of_worker = {.regular = true};
static struct table *table;
static struct keys_map *keys;

/* ---- what the product calls ------------------------------------------------------------------------------------ */

static int
world_accept(void)
{
	int fd = world.accepts;

	world.accepts = -1;
	errno = EAGAIN;
	return fd;
}

static int
client_of(const struct conn *c)
{
	for (size_t i = world.clients; i-- > 0;)     /* a number may serve again: the newest counts */
		if (world.client[i].theirs == c->client.fd)
			return (int)i;
	return -1;
}

/* Whose connection it is, shows after the turn: check_owners(). */
static int
world_socket(void)
{
	int pair[2];

	if (world.connects == 3 || world.upstreams == UPSTREAMS_MAX) {
		errno = EMFILE;
		return -1;
	}
	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
	world.upstream[world.upstreams] = (struct upstream_side){.fd = pair[0], .theirs = pair[1], .client = -1};
	world.upstreams++;
	world.moved++;
	return pair[1];
}

static int
world_connect(void)
{
	errno = world.connects == 2 ? ECONNREFUSED : EINPROGRESS;
	return world.connects == 0 ? 0 : -1;
}

static size_t *
world_takes(int fd)
{
	for (size_t i = 0; i < CONNS; i++)
		if ((*conn_at(&worker, i)).state != S_FREE && (*conn_at(&worker, i)).upstream.fd == fd)
			return &world.upstream_takes;
	return &world.client_takes;
}

static ssize_t
world_send(int fd, const void *p, size_t n)
{
	size_t *takes = world_takes(fd);
	struct pollfd gone = {fd, 0, 0};

	if (*takes == 0 && poll(&gone, 1, 0) == 0) {
		errno = EAGAIN;
		return -1;
	}
	ssize_t done = send(fd, p, n < *takes || *takes == 0 ? n : *takes, MSG_NOSIGNAL);
	if (done > 0 && *takes != SIZE_MAX)
		*takes -= (size_t)done;
	world.moved += done > 0 ? (uint64_t)done : 0;
	return done;
}

static int
world_poll(struct pollfd *set, nfds_t n)
{
	int ready = 0;

	poll(set, n, 0);
	for (nfds_t i = 0; i < n; i++) {
		if (set[i].fd >= 0 && *world_takes(set[i].fd) == 0)
			set[i].revents &= (short)~POLLOUT;
		ready += set[i].revents != 0;
		world.ready += set[i].revents != 0 && set[i].fd != worker.epoll;   /* whose events are counted apart */
	}
	return ready;
}

static int
world_epoll_wait(int fd, struct epoll_event *events, int max)
{
	int n = epoll_wait(fd, events, max, 0), kept = 0;

	for (int i = 0; i < n; i++) {
		struct conn *c = conn_at(&worker, events[i].data.u64 / 2);
		int of = events[i].data.u64 % 2 == 0 ? c->client.fd : c->upstream.fd;
		if (*world_takes(of) == 0)
			events[i].events &= ~(uint32_t)EPOLLOUT;
		if (events[i].events != 0)
			events[kept++] = events[i];
	}
	world.ready += kept;
	return kept;
}

static int
world_clock(clockid_t id, struct timespec *t)
{
	(void)id;
	*t = (struct timespec){(time_t)(world.now_ns / NS_PER_S), (long)(world.now_ns % NS_PER_S)};
	return 0;
}

/* The log: whole lines without control bytes. */
static ssize_t
world_write(const void *p, size_t n)
{
	const char *text = p;

	MUST(n > 0 && text[n - 1] == '\n');
	for (size_t i = 0; i < n; i++)
		MUST(text[i] == '\n' || (text[i] >= 0x20 && text[i] < 0x7f));
	return (ssize_t)n;
}

/* ---- what must hold after every turn ---------------------------------------------------------------------------- */

static void
check_conn(const struct conn *c)
{
	short client, upstream;
	bool requested = c->state >= S_CONNECT && c->state <= S_FLUSH;

	MUST(c->state > S_FREE && c->state < STATES_COUNT && c->client.fd >= 0);
	MUST((c->request != NULL) == requested);
	MUST(c->waiting == STATES[c->state].gives_way);
	MUST(c->deadline_ns > 0 && c->deadline_ns <= worker.now_ns + config.idle_ms * NS_PER_MS);
	MUST(worker.sweep_ns <= c->deadline_ns || worker.sweep_ns <= worker.now_ns + SWEEP_MIN_MS * NS_PER_MS);
	MUST(!pipe_on_scratch(&worker, &c->req) && !pipe_on_scratch(&worker, &c->resp));
	conn_interest(c, &client, &upstream);
	MUST(client != 0 || (upstream != 0 && c->upstream.fd >= 0));
	if (c->parked && !c->queued)
		MUST((client & ~c->client.watched) == 0 && (c->upstream.fd < 0 || c->brief || (upstream & ~c->upstream.watched) == 0));
	for (int i = 0; i < 2; i++) {
		const struct pipe *p = i == 0 ? &c->req : &c->resp;
		if (p->mem != NULL)
			MUST(p->start <= p->ready && p->ready <= p->raw && p->raw <= p->end && p->start >= 1 && p->end + TAIL <= BUF_SIZE);
	}
}

static void
check_worker(void)
{
	size_t used = 0, bufs = worker.bufs.left, requests = worker.requests.left;

	for (size_t i = 0; i < CONNS; i++) {
		const struct conn *c = conn_at(&worker, i);
		if (c->state == S_FREE)
			continue;
		check_conn(c);
		used++;
		bufs += (c->req.mem != NULL) + (c->resp.mem != NULL);
		requests += c->request != NULL;
	}
	MUST(used == worker.used && bufs == 2 * CONNS && requests == CONNS);
}

/* Reads what came out on the script's side of a pair. */
static void
gather(int fd, struct text *to)
{
	char some[65536];
	ssize_t n;

	while (fd >= 0 && to->n < TEXT_MAX && (n = recv(fd, some, sizeof some, MSG_DONTWAIT)) > 0)
		text_add(to, some, (size_t)n);
}

/* Each upstream connection belongs to one client connection, and to no other ever. */
static void
check_owners(void)
{
	for (size_t i = 0; i < CONNS; i++) {
		const struct conn *c = conn_at(&worker, i);
		if (c->state == S_FREE || c->upstream.fd < 0)
			continue;
		int client = client_of(c);
		MUST(client >= 0);
		for (size_t k = world.upstreams; k-- > 0;)
			if (world.upstream[k].theirs == c->upstream.fd) {
				MUST(world.upstream[k].client == -1 || world.upstream[k].client == client);
				world.upstream[k].client = client;
				break;
			}
	}
}

static uint64_t
fingerprint(void)
{
	uint64_t sum = world.moved;

	for (size_t i = 0; i < CONNS; i++) {
		const struct conn *c = conn_at(&worker, i);
		if (c->state != S_FREE)
			sum = sum * 31 + c->state + c->req.end + c->req.raw * 3u + c->req.in + c->resp.end + c->resp.raw * 3u + c->resp.in +
			      (uint64_t)(c->client.fd + c->upstream.fd * 7) + c->req.broken + (uint64_t)c->client.watched +
			      (uint64_t)c->upstream.watched;
	}
	return sum * 31 + worker.used;
}

static void
turn(void)
{
	uint64_t before = fingerprint();

	world.ready = 0;
	worker_turn(&worker);
	world.spins = world.ready > 0 && fingerprint() == before ? world.spins + 1 : 0;
	MUST(world.spins < SPINS_MAX);
	check_worker();
	check_owners();
	for (size_t i = 0; i < world.clients; i++)
		if (world.client_takes > 0)
			gather(world.client[i].fd, &world.client[i].got);
	for (size_t i = 0; i < world.upstreams; i++)
		if (world.upstream_takes > 0)
			gather(world.upstream[i].fd, &world.upstream[i].got);
}

/* ---- the script ------------------------------------------------------------------------------------------------- */

static void
connect_client(void)
{
	int pair[2];

	if (world.clients == CLIENTS_MAX)
		return;
	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
	world.client[world.clients] = (struct client_side){.fd = pair[0], .theirs = pair[1]};
	world.at = world.clients++;
	world.accepts = pair[1];
	worker_accept(&worker, -1, false);
	check_worker();
}

/* The newest upstream connection of the selected client. */
static struct upstream_side *
upstream_selected(void)
{
	for (size_t i = world.upstreams; i-- > 0;)
		if (world.upstream[i].client == (int)world.at && world.upstream[i].fd >= 0)
			return &world.upstream[i];
	return NULL;
}

static void
speak(void)
{
	struct upstream_side *u = world.upstream_writes ? upstream_selected() : NULL;
	struct client_side *c = &world.client[world.at];
	int fd = world.upstream_writes ? (u != NULL ? u->fd : -1) : c->fd;
	struct text *said = u != NULL ? &u->said : &c->said;
	ssize_t n = fd < 0 || world.pending.n == 0 ? 0 : send(fd, world.pending.p, world.pending.n, MSG_NOSIGNAL);

	if (n > 0)
		text_add(said, world.pending.p, (size_t)n);
	world.pending.n = 0;
}

static void
shut(int *fd, bool whole)
{
	if (*fd < 0)
		return;
	shutdown(*fd, SHUT_WR);
	if (whole) {
		close(*fd);
		*fd = -1;
	}
}

/* One order with its argument; returns how many bytes it took. */
static size_t
order(uint8_t what, const uint8_t *p, size_t n)
{
	static const uint64_t LATER_MS[] = {1, 100, 1000, 2500, 11000, 31000, 76000, 601000};
	static const size_t TAKES[] = {0, 1, 7, 100, 5000, SIZE_MAX};
	uint8_t argument = n > 0 ? p[0] : 0;
	struct upstream_side *u = upstream_selected();

	speak();
	switch (what) {
	case O_CLIENT:
	case O_UPSTREAM_SIDE:
		turn();
		world.upstream_writes = what == O_UPSTREAM_SIDE;
		return 0;
	case O_LATER:
		world.now_ns += LATER_MS[argument % LENGTH(LATER_MS)] * NS_PER_MS;
		break;
	case O_CLIENT_CLOSE:
	case O_CLIENT_HALF:
		shut(&world.client[world.at].fd, what == O_CLIENT_CLOSE);
		turn();
		return 0;
	case O_UPSTREAM_CLOSE:
	case O_UPSTREAM_HALF:
		if (u != NULL)
			shut(&u->fd, what == O_UPSTREAM_CLOSE);
		turn();
		return 0;
	case O_ANOTHER:
		connect_client();
		world.upstream_writes = false;
		return 0;
	case O_SELECT:
		world.at = argument % world.clients;
		break;
	case O_CLIENT_TAKES:
		world.client_takes = TAKES[argument % LENGTH(TAKES)];
		break;
	case O_UPSTREAM_TAKES:
		world.upstream_takes = TAKES[argument % LENGTH(TAKES)];
		break;
	case O_PARK:
		worker.many = true;
		turn();
		return 0;
	case O_CONNECT:
		world.connects = argument % 4;
		break;
	case O_MANY:
		for (size_t i = 0; n > 1 && i < 64u * argument && world.pending.n < 20000; i++)
			text_add(&world.pending, (const char *)p + 1, 1);
		return n > 1 ? 2 : n;
	case O_WORKER:
		if (argument % 2 == 0)
			worker_drain(&worker);
		else
			keys->stale = argument / 2 % 3;
		break;
	default:
		turn();
		return 0;
	}
	turn();
	return n > 0;
}

/* ---- what must hold at the end ---------------------------------------------------------------------------------- */

/* How many requests a client's bytes hold, the last one perhaps not whole; `heads` tells of each whether it is a HEAD. */
static size_t
requests_in(struct slice in, bool *is_head, size_t max)
{
	static struct head h;
	size_t n = 0;
	int taken;

	while (in.n > 0 && n < max) {
		if ((taken = head_parse(&h, in)) <= 0) {
			is_head[n++] = false;
			return n;
		}
		is_head[n++] = same(h.method, S("HEAD"));
		in = slice_from(in, (size_t)taken);
		if (h.chunked) {
			struct chunked c = chunked_read(in);
			text_free(&c.payload);
			if (c.verdict <= 0)
				return n;
			in = slice_from(in, c.used);
		} else
			in = slice_from(in, h.length < in.n ? (size_t)h.length : in.n);
	}
	return n;
}

/* The bytes of a body behind a head that is framed so; SIZE_MAX: it is not whole. */
static size_t
body_span(struct slice in, bool chunked, uint64_t length)
{
	if (!chunked)
		return length == UINT64_MAX ? 0 : length <= in.n ? (size_t)length : SIZE_MAX;
	struct chunked c = chunked_read(in);
	MUST(c.verdict != READ_BAD);
	text_free(&c.payload);
	return c.verdict == READ_MORE ? SIZE_MAX : c.used;
}

/* What one upstream connection got: whole requests in our own words, the last one perhaps cut. Returns how many. */
static size_t
check_upstream(const struct upstream_side *u)
{
	static struct head h;
	struct slice in = text_slice(&u->got);
	bool chunked, upgrade;
	uint64_t length;
	size_t heads = 0, span, body;

	while (in.n > 0) {
		heads++;
		if ((span = head_span(in)) == 0)
			return heads;
		struct slice head = {in.p, span};
		head_is_ours(head, true, &chunked, &length, &upgrade);
		if (span <= HEAD_MAX)
			MUST(head_parse(&h, head) == (int)span || -400 > head_parse(&h, head));
		in = slice_from(in, span);
		if (upgrade && text_count(text_slice(&u->said), " 101") > 0)
			return heads;
		if ((body = body_span(in, chunked, length)) == SIZE_MAX)
			return heads;
		in = slice_from(in, body);
	}
	return heads;
}

/* What one client got: final answers to its requests, in order, one each, with interim ones before; the last perhaps cut. */
static void
check_client(const struct client_side *c)
{
	static bool is_head[256];
	size_t requests = requests_in(text_slice(&c->said), is_head, LENGTH(is_head)), finals = 0, span, body;
	struct slice in = text_slice(&c->got);
	bool chunked, upgrade;
	uint64_t length;

	while (in.n > 0 && requests < LENGTH(is_head)) {
		if ((span = head_span(in)) == 0)
			return;
		struct slice head = {in.p, span};
		MUST(strncmp(in.p, "HTTP/1.1 ", 9) == 0 && in.p[12] == ' ');
		int status = atoi(in.p + 9);
		head_is_ours(head, false, &chunked, &length, &upgrade);
		in = slice_from(in, span);
		if (status == 101)
			return;
		if (status < 200)
			continue;
		bool turned_away = requests == 0 && (status == 503 || status == 429) && memmem(head.p, head.n, "X-Request-Id: -", 15) != NULL;
		MUST(turned_away || finals < requests);
		bool none = status == 204 || status == 304 || (finals < requests && is_head[finals]);
		finals++;
		if (!none && !chunked && length == UINT64_MAX)
			return;              /* until the end */
		if ((body = none ? 0 : body_span(in, chunked, length)) == SIZE_MAX)
			return;
		in = slice_from(in, body);
	}
	MUST(in.n == 0 || requests == LENGTH(is_head));
}

static void
check_keyed(size_t client)
{
	struct slice said = text_slice(&world.client[client].said);
	size_t allowed = text_count(said, KEY) + text_count(said, BASIC), heads = 0, connections = 0;

	for (size_t i = 0; i < world.upstreams; i++)
		if (world.upstream[i].client == (int)client) {
			size_t n = check_upstream(&world.upstream[i]);
			heads += n;
			connections += n > 0;
		}
	/* A request may be sent once more on a fresh connection. */
	MUST(heads == 0 || (allowed > 0 && heads <= allowed + connections - 1));
}

static void
check_given_back(void)
{
	size_t conns = 0;

	conns = worker.conns.left;
	MUST(worker.used == 0 && conns == CONNS && worker.requests.left == CONNS && worker.bufs.left == 2 * CONNS);
	MUST(worker.polled.next == &worker.polled && worker.polled.prev == &worker.polled);
	MUST(worker.waiting.young == &worker.waiting && worker.waiting.old == &worker.waiting);
	for (size_t i = 0; i < CONNS; i++)
		MUST(table_held(table, worker.row)[i] == 0);
	for (size_t i = 0; i < world.clients; i++)
		MUST(fcntl(world.client[i].theirs, F_GETFD) < 0);
	for (size_t i = 0; i < world.upstreams; i++)
		MUST(fcntl(world.upstream[i].theirs, F_GETFD) < 0);
}

/* ---- one run ---------------------------------------------------------------------------------------------------- */

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	struct complaints bad = {.to = -1, .file = ""};
	struct text file = {NULL, 0, 0};
	size_t size;
	int fd;

	(void)argc, (void)argv;
	config = (struct config){.max_conns = CONNS, .ip_conns = 64, .ip_rate = {NS_PER_S / 10, 20}, .header_ms = 10000,
	    .connect_ms = 5000, .first_byte_ms = 600000, .idle_ms = 600000, .keepalive_ms = 75000, .drain_ms = 600000,
	    .linger_ms = LINGER_PAUSE_MS, .reader_ms = READER_MS};
	config.upstream = (struct upstream){.text = "127.0.0.1:1", .host = "localhost:1", .addrs = 2};
	keys = keys_new(0, &size, &fd);
	MUST(keys != NULL);
	text_add(&file, "a fuzz-key-1\nb switched-off off\n", 32);
	MUST(keys_parse(keys, text_slice(&file), 3, &config, &bad));
	keys_flip(keys);
	text_free(&file);
	table = table_new(1, CONNS, &fd);
	table->seed[0] = table->seed[1] = 1;
	worker = (struct worker){.log = &log_of_worker, .keys = keys, .table = table, .control = -1};
	worker.row = table_row_take(table, -1);
	worker_map(&worker);
	worker.epoll = epoll_create1(EPOLL_CLOEXEC);
	return 0;
}

static void
world_begin(void)
{
	world = (struct world){.client_takes = SIZE_MAX, .upstream_takes = SIZE_MAX, .now_ns = 1000 * NS_PER_S, .accepts = -1};
	struct sockaddr_storage peer = {.ss_family = AF_UNSPEC};
	memset(table->address[table_address_id(table, &peer) >> 32 & (RATE_SETS - 1)], 0, sizeof table->address[0]);
	keys->stale = 0;
	worker.draining = false;
	worker.sweep_ns = UINT64_MAX;
	worker.accept_ns = worker.drain_ns = worker.turn = worker.ids = 0;
	worker.readies = 0;
	worker.now_ns = world.now_ns;
	worker.wall_ms = world.now_ns / NS_PER_MS;
	connect_client();
}

static void
world_end(void)
{
	speak();
	world.client_takes = world.upstream_takes = SIZE_MAX;
	for (int i = 0; i < 3; i++)
		turn();
	for (size_t i = 0; i < world.clients; i++)
		shut(&world.client[i].fd, false);
	for (int i = 0; i < 40 && worker.used > 0; i++) {
		turn();
		world.now_ns += i < 3 ? 0 : 601 * NS_PER_S;
	}
	for (size_t i = 0; i < world.clients; i++) {
		gather(world.client[i].fd, &world.client[i].got);
		shut(&world.client[i].fd, true);
	}
	for (size_t i = 0; i < world.upstreams; i++) {
		gather(world.upstream[i].fd, &world.upstream[i].got);
		shut(&world.upstream[i].fd, true);
	}
	check_given_back();
	for (size_t i = 0; i < world.clients; i++) {
		check_keyed(i);
		check_client(&world.client[i]);
		text_free(&world.client[i].got);
		text_free(&world.client[i].said);
	}
	for (size_t i = 0; i < world.upstreams; i++) {
		MUST(world.upstream[i].client >= 0 || world.upstream[i].got.n == 0);
		text_free(&world.upstream[i].got);
		text_free(&world.upstream[i].said);
	}
	text_free(&world.pending);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	world_begin();
	for (size_t i = 0; i < n;) {
		uint8_t c = data[i++];
		if (c >= O_CLIENT)
			i += order(c, data + i, n - i);
		else
			text_add(&world.pending, (const char *)&c, 1);
	}
	world_end();
	return 0;
}
