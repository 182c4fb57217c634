/* tinyauth: a key in front of a model server.
 *
 * PORCH
 *
 * One file, read from the bottom up: a room may call only rooms above it.
 *
 *   BASICS      slices, bounded writers, numbers, clocks, mappings and pools
 *   LOG         every sentence that is logged
 *   CONFIG      the options table, the frozen configuration, addresses and networks
 *   KEYS        the keys file and the published key table
 *   TABLE       what processes share: rates and connections by address, TLS sessions
 *   HTTP        pure functions: heads, bodies, error answers, PROXY headers, credentials
 *   USAGE       (not furnished yet: counts tokens)
 *   CERTIFICATE the TLS certificate and its key, as files
 *   LINK        descriptors and TLS
 *   CONN        one client connection: state table, two pipes, admission, the end
 *   SANDBOX     what a process gives up; the child that looks up names
 *   WORKER      the pool of connections and the loop around poll
 *   SUPERVISOR  listeners, children, generations, signals, watched files, upgrade, systemd; and -i, one connection
 *   COMMANDS    check, check --url, key
 *   MAIN
 *
 * One request walks down the stairs once: worker_accept, conn_open, step_new, step_tls, step_head, conn_admit,
 * conn_forward, step_connect, step_relay, request_end; then step_head again, or conn_close.
 *
 * Memory is decided at start. A worker maps, and touches only what it uses:
 *
 *   max_conns * (512 struct conn + 1 KB struct request + 2 * 40 KB pipe buffers + 128 for poll, epoll and pools
 *                + with TLS 40 KB) + 4 * 40 KB scratch + 64 KB log + with TLS 32 KB stage; buffers are whole pages
 *
 * A pipe holds a buffer only while bytes wait in it: a head that is not whole, or a receiver that is slower than its
 * sender. An idle connection, and a stream whose client keeps up, hold none. An idle TLS link keeps the pages that its
 * handshake or small records touched: link_rest() gives back the others. The shared mappings are one key table (40 bytes,
 * a name and 8 index bytes a key, twice), 512 KB of address rates, 8 bytes a connection and, with TLS, 416 KB of sessions,
 * touched where used.
 *
 * What is tried against us, and what meets it:
 *
 *   requests that two parsers read differently      refused at the first byte that shows it, never repaired: HTTP
 *   smuggling through a framing disagreement        heads and chunk lines are written anew; an upstream connection carries
 *                                                   one request and says so: no next one is there to be smuggled
 *   a body behind a head that the server refuses    head_unsafe: before it has seen `close`
 *   guessing keys                                   --ip-rate before any look at a key; digests compared in constant time
 *   slow heads, slow readers, idle connections      a deadline for every state: STATES
 *   slow bodies                                     STRETCH_BYTES in STRETCH_MS
 *   huge heads, many fields                         HEAD_MAX, TARGET_MAX, FIELDS_MAX, OPTIONS_NAMED_MAX
 *   endless chunk extensions and trailers           CHUNK_EXT_MAX, CHUNK_EXT_BODY_MAX, TRAILER_MAX
 *   thousands of pipelined requests                 STEPS_MAX, then the others have their turn
 *   connections of one address                      --ip-conns; twice as many may begin a handshake to be told so
 *   handshakes that stall, half records             HANDSHAKE_MS; one record is read ahead at most
 *   hundreds of handshakes at once                  one signature a turn: conn_step
 *   alerts and empty records without end            PULLS_MAX, then the others have their turn; an engine that cannot send
 *                                                   before it reads on is given up: tls_stuck
 *   plain HTTP on a TLS port, TLS on a plain one    told so in a 400, before any key is read: R_PLAIN_HTTP, R_TLS_HELLO
 *   an end forged by whoever sits on the wire       an end without close_notify is a cut: link_left, R_CLIENT_CUT
 *   sessions forged or torn in the shared cache     each has a keyed seal, and dies with the certificate's key
 *   connections of many addresses                   a full pool: others take them; where all are full, the oldest without an
 *                                                   authenticated request gives way
 *   peers that vanish without a word                socket_vigil, READER_MS
 *   an upstream's address that is dead              FATES, FATE_REST_MS
 *   descriptors and local ports that run out        supervisor_descriptors; accepting pauses for ACCEPT_PAUSE_MS; an upstream
 *                                                   connection that we end first is reset, and holds no port
 *   a log that nobody reads, a full disk            lines wait, then are dropped and counted; nothing blocks
 *   an upstream that sends garbage or never ends    ANSWER_HEAD_MAX, INTERIM_MAX, 502; backpressure
 *   headers that claim another client               all X-Forwarded-* and their like are dropped and set anew; a PROXY header
 *                                                   and X-Forwarded-For count from --trust peers only, PROXY_HEAD_MAX
 *   a name server that lies or hangs                names are looked up in a child behind walls of its own, RESOLVE_MS
 *   a worker that was taken over                    SANDBOX: user, empty root, seccomp, Landlock; the key table is read-only
 *                                                   there and holds digests; listeners keep their options. The certificate's
 *                                                   key is within its reach, and so are the rates of the shared table
 */

#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sysexits.h>
#include <time.h>
#include <unistd.h>

/* Where there is no Linux, or none is wanted (make PORTABLE=1): poll alone, and no more of a sandbox than user and chroot. */
#if defined(__linux__) && !defined(TINYAUTH_PORTABLE)
#define TINYAUTH_LINUX 1
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#else
#define TINYAUTH_LINUX 0
#endif
#ifndef POLLRDHUP
#define POLLRDHUP 0
#endif
#ifndef MADV_DONTDUMP
#define MADV_DONTDUMP MADV_NORMAL
#endif

#include <bearssl.h>

#include "tinyauth.h"

static struct config config;

/* ============================================================================================================= *
 * BASICS
 * Owns: slices, bounded writers and their printf, number parsing, constant-time compare, wiping, clocks, random bytes,
 *       mappings, pools, whole files, the keyed hash; libc's malloc, as an arena
 * Calls: libc
 * Promises: memory comes from mmap and from the arena, at start or in a child; a writer never passes its end; parsers take
 *           all of their input or nothing
 * Never: logs
 * ============================================================================================================= */

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))
#define S(literal) ((struct slice){literal, sizeof(literal) - 1})
#define NS_PER_MS 1000000ull
#define NS_PER_S 1000000000ull

#if !defined(__GLIBC__)
/* Debian's libbearssl.a is compiled with _FORTIFY_SOURCE and calls these glibc functions, which musl lacks. */
__attribute__((weak)) void *
__memcpy_chk(void *to, const void *from, size_t n, size_t room)
{
	if (n > room)
		abort();
	return memcpy(to, from, n);
}

__attribute__((weak)) void *
__memmove_chk(void *to, const void *from, size_t n, size_t room)
{
	if (n > room)
		abort();
	return memmove(to, from, n);
}

__attribute__((weak)) void *
__memset_chk(void *to, int byte, size_t n, size_t room)
{
	if (n > room)
		abort();
	return memset(to, byte, n);
}

/* All the memory that libc can ask for: its resolver, setenv(), strdup() and upgrade_checks() do, before serving starts, in a
 * child or in the supervisor. What was taken last can be given back. Defined here, nothing of libc's own allocator is linked. */
enum { ARENA = 256 << 10, ALIGN = 16 };
static _Alignas(ALIGN) char arena[ARENA];
static size_t arena_used;

void *
malloc(size_t n)
{
	if (n > ARENA || arena_used + ALIGN + ((n + ALIGN - 1) & ~(size_t)(ALIGN - 1)) > ARENA) {
		errno = ENOMEM;
		return NULL;
	}
	char *p = arena + arena_used + ALIGN;
	memcpy(p - ALIGN, &n, sizeof n);
	arena_used += ALIGN + ((n + ALIGN - 1) & ~(size_t)(ALIGN - 1));
	return p;
}

void
free(void *p)
{
	size_t n;

	if (p == NULL)
		return;
	memcpy(&n, (char *)p - ALIGN, sizeof n);
	if ((char *)p + ((n + ALIGN - 1) & ~(size_t)(ALIGN - 1)) == arena + arena_used)
		arena_used = (size_t)((char *)p - ALIGN - arena);
}

void *
calloc(size_t n, size_t each)
{
	void *p = each != 0 && n > ARENA / each ? NULL : malloc(n * each);

	return p == NULL ? NULL : memset(p, 0, n * each);
}

void *
realloc(void *p, size_t n)
{
	void *q = malloc(n);
	size_t old = 0;

	if (p != NULL && q != NULL) {
		memcpy(&old, (char *)p - ALIGN, sizeof old);
		memcpy(q, p, old < n ? old : n);
	}
	return q;
}
#endif

static struct slice
slice_of(const char *text)
{
	return (struct slice){text, strlen(text)};
}

static bool
slice_equal(struct slice a, struct slice b)
{
	return a.n == b.n && memcmp(a.p, b.p, a.n) == 0;
}

static char
ascii_lower(char c)
{
	return c >= 'A' && c <= 'Z' ? (char)(c | 0x20) : c;
}

/* Without regard to ASCII case, whatever the locale. */
static bool
slice_like(struct slice a, struct slice b)
{
	if (a.n != b.n)
		return false;
	for (size_t i = 0; i < a.n; i++)
		if (ascii_lower(a.p[i]) != ascii_lower(b.p[i]))
			return false;
	return true;
}

static bool
slice_starts_like(struct slice a, struct slice prefix)
{
	return a.n >= prefix.n && slice_like((struct slice){a.p, prefix.n}, prefix);
}

/* The slice without its first `n` bytes. */
static struct slice
slice_from(struct slice a, size_t n)
{
	return n > a.n ? (struct slice){a.p + a.n, 0} : (struct slice){a.p + n, a.n - n};
}

/* The next line, without its end. */
static struct slice
text_line(struct slice *text)
{
	const char *end = memchr(text->p, '\n', text->n);
	struct slice line = {text->p, end != NULL ? (size_t)(end - text->p) : text->n};

	*text = slice_from(*text, line.n + (end != NULL));
	if (line.n > 0 && line.p[line.n - 1] == '\r')
		line.n--;
	return line;
}

static void
out_bytes(struct out *o, const char *p, size_t n)
{
	if (n > o->max - o->n)
		o->full = true;
	if (n > o->max - o->n || n == 0)
		return;
	memcpy(o->p + o->n, p, n);
	o->n += n;
}

static void
out_slice(struct out *o, struct slice s)
{
	out_bytes(o, s.p, s.n);
}

/* Inline, so that nobody counts the bytes of a constant again and again. */
static inline __attribute__((always_inline)) void
out_text(struct out *o, const char *text)
{
	out_bytes(o, text, strlen(text));
}

static void
out_char(struct out *o, char c)
{
	if (o->n < o->max)
		o->p[o->n++] = c;
	else
		o->full = true;
}

static void
out_number(struct out *o, uint64_t n)
{
	char digits[20];
	size_t at = sizeof digits;

	do
		digits[--at] = (char)('0' + n % 10);
	while ((n /= 10) != 0);
	out_bytes(o, digits + at, sizeof digits - at);
}

/* Nanoseconds as milliseconds with three decimals. */
static void
out_ms(struct out *o, uint64_t ns)
{
	uint64_t us = ns / 1000;
	char decimals[4] = {'.', (char)('0' + us / 100 % 10), (char)('0' + us / 10 % 10), (char)('0' + us % 10)};

	out_number(o, us / 1000);
	out_bytes(o, decimals, sizeof decimals);
}

/* printf's %s, %.*s, %c, %d, %u, %llu, %zu and %%: libc's own would be a tenth of the binary. */
static void
out_vprint(struct out *o, const char *format, va_list rest)
{
	for (const char *c; *format != '\0'; format = c + 1) {
		size_t n = strcspn(format, "%"), most = SIZE_MAX;
		out_bytes(o, format, n);
		if (format[n] == '\0')
			return;
		for (c = format + n + 1; *c == '.' || *c == '*' || *c == 'l' || *c == 'z'; c++)
			if (*c == '*')
				most = (size_t)va_arg(rest, int);
		switch (*c) {
		case 's': {
			const char *text = va_arg(rest, const char *);
			most = most < o->max - o->n ? most : o->max - o->n;
			out_bytes(o, text, strnlen(text, most));
			break;
		}
		case 'c':
			out_char(o, (char)va_arg(rest, int));
			break;
		case 'd': {
			int number = va_arg(rest, int);
			if (number < 0)
				out_char(o, '-');
			out_number(o, number < 0 ? 0 - (uint64_t)number : (uint64_t)number);
			break;
		}
		case 'u':
			out_number(o, c[-1] == 'l' ? va_arg(rest, unsigned long long) : c[-1] == 'z' ? va_arg(rest, size_t) :
			    va_arg(rest, unsigned));
			break;
		default:
			out_char(o, *c);
		}
	}
}

__attribute__((format(printf, 2, 3))) static void
out_print(struct out *o, const char *format, ...)
{
	va_list rest;

	va_start(rest, format);
	out_vprint(o, format, rest);
	va_end(rest);
}

/* A string of at most `max` bytes with its NUL, cut where it does not fit. */
__attribute__((format(printf, 3, 4))) static void
text_print(char *to, size_t max, const char *format, ...)
{
	struct out o = {to, 0, max - 1, false};
	va_list rest;

	va_start(rest, format);
	out_vprint(&o, format, rest);
	va_end(rest);
	to[o.n] = '\0';
}

static const char HEX[16] = "0123456789abcdef";

/* Lower-case hex without leading zeros; returns the number of digits. */
static size_t
hex_write(char *to, uint64_t n)
{
	size_t digits = 1;

	for (uint64_t rest = n >> 4; rest != 0; rest >>= 4)
		digits++;
	for (size_t i = digits; i-- > 0; n >>= 4)
		to[i] = HEX[n & 15];
	return digits;
}

/* Value of a hex digit, or -1. */
static int
hex_value(char c)
{
	static const int8_t VALUE[256] = {
		['0'] = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ['A'] = 11, 12, 13, 14, 15, 16, ['a'] = 11, 12, 13, 14, 15, 16};

	return VALUE[(unsigned char)c] - 1;
}

/* All of `s` as hex into `to`, which takes s.n / 2 bytes. */
static bool
hex_read(unsigned char *to, struct slice s)
{
	int bad = 0;

	for (size_t i = 0; i + 1 < s.n; i += 2) {
		int high = hex_value(s.p[i]), low = hex_value(s.p[i + 1]);
		bad |= high | low;
		to[i / 2] = (unsigned char)((unsigned)high << 4 | (unsigned)low);
	}
	return bad >= 0 && s.n % 2 == 0;
}

static bool
is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* Decimal digits and nothing else, at most 18 of them: the value always fits. */
static bool
number_read(struct slice s, uint64_t *n)
{
	if (s.n == 0 || s.n > LENGTH_DIGITS_MAX)
		return false;
	*n = 0;
	for (size_t i = 0; i < s.n; i++) {
		if (!is_digit(s.p[i]))
			return false;
		*n = *n * 10 + (uint64_t)(s.p[i] - '0');
	}
	return true;
}

/* Like memcmp() == 0, in a time that does not depend on where the bytes differ. */
static bool
equal_constant_time(const void *a, const void *b, size_t n)
{
	const volatile unsigned char *x = a, *y = b;
	unsigned char differ = 0;

	for (size_t i = 0; i < n; i++)
		differ |= (unsigned char)(x[i] ^ y[i]);
	return differ == 0;
}

/* Zeroes that the compiler may not leave out. */
static void
wipe(void *p, size_t n)
{
	memset(p, 0, n);
	__asm__ volatile("" : : "r"(p) : "memory");
}

static uint64_t
clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

static uint64_t
clock_wall_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / NS_PER_MS;
}

static bool
write_whole(int fd, struct slice s)
{
	while (s.n > 0) {
		ssize_t n = write(fd, s.p, s.n);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		s = slice_from(s, (size_t)n);
	}
	return true;
}

enum { SAID_MAX = 6144 };

/* Words for people, in one write: others write there, too. */
__attribute__((format(printf, 2, 3))) static bool
say(int fd, const char *format, ...)
{
	char text[SAID_MAX];
	struct out o = {text, 0, sizeof text, false};
	va_list rest;

	va_start(rest, format);
	out_vprint(&o, format, rest);
	va_end(rest);
	return write_whole(fd, (struct slice){o.p, o.n});
}

/* One line on stderr and the end. Only before serving starts. */
__attribute__((noreturn, format(printf, 2, 3))) static void
die(int status, const char *format, ...)
{
	char text[SAID_MAX];
	struct out o = {text, 0, sizeof text - 1, false};
	va_list rest;

	out_text(&o, "tinyauth: ");
	va_start(rest, format);
	out_vprint(&o, format, rest);
	va_end(rest);
	text[o.n] = '\n';
	write_whole(STDERR_FILENO, (struct slice){text, o.n + 1});
	exit(status);
}

static void
random_fill(void *p, size_t n)
{
	if (getentropy(p, n) != 0)
		die(EXIT_FAILURE, "no random bytes: getentropy: %s", strerror(errno));
}

/* The eight groups of an IPv6 address; the first longest run of zeros becomes `::` [RFC 5952]. */
static void
out_ip6(struct out *o, const unsigned char *a)
{
	char hex[4];
	int from = 8, run = 1;

	for (int i = 0, n; i < 8; i += n + 1) {
		for (n = 0; i + n < 8 && a[2 * (i + n)] == 0 && a[2 * (i + n) + 1] == 0; n++)
			continue;
		if (n > run) {
			from = i;
			run = n;
		}
	}
	for (int i = 0; i < 8; i++) {
		if (i == from) {
			out_text(o, "::");
			i += run - 1;
			continue;
		}
		if (i > 0 && i != from + run)
			out_char(o, ':');
		out_bytes(o, hex, hex_write(hex, (unsigned)a[2 * i] << 8 | a[2 * i + 1]));
	}
}

/* An address without its port, an IPv4 one as such also on a dual-stack socket. */
static void
out_ip(struct out *o, const struct sockaddr_storage *ss)
{
	const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)ss;
	const unsigned char *v4 = in6->sin6_addr.s6_addr + 12;

	if (ss->ss_family == AF_INET6 && !IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr)) {
		out_ip6(o, in6->sin6_addr.s6_addr);
		return;
	}
	if (ss->ss_family == AF_INET)
		v4 = (const unsigned char *)&((const struct sockaddr_in *)ss)->sin_addr;
	out_print(o, "%d.%d.%d.%d", v4[0], v4[1], v4[2], v4[3]);
}

/* Sets or asks a limit of this process. musl's setrlimit() brings along what stops threads, of which there are none. */
static int
process_limit(int which, const struct rlimit *set, struct rlimit *ask)
{
#if TINYAUTH_LINUX
	return prlimit(0, which, set, ask);
#else
	return set != NULL ? setrlimit(which, set) : getrlimit(which, ask);
#endif
}

/* What goes to it goes nowhere: /dev/null, or in a container without /dev a socket that leads nowhere. */
static int
descriptor_idle(void)
{
	int fd = open("/dev/null", O_RDWR);

	return fd >= 0 ? fd : socket(AF_UNIX, SOCK_DGRAM, 0);
}

/* Closes descriptors from `from` to below `to` one by one, where they are open: poll tells of many at once. */
static void
descriptors_close(unsigned from, unsigned to)
{
	struct pollfd p[256];
	struct rlimit limit = {4096, 4096};

	process_limit(RLIMIT_NOFILE, NULL, &limit);
	to = to < limit.rlim_cur ? to : (unsigned)limit.rlim_cur;
	while (from < to) {
		nfds_t n = to - from < LENGTH(p) ? to - from : LENGTH(p);
		for (nfds_t i = 0; i < n; i++)
			p[i] = (struct pollfd){(int)(from + i), 0, 0};
		int known = poll(p, n, 0);
		for (nfds_t i = 0; i < n; i++)
			if (known < 0 || !(p[i].revents & POLLNVAL))
				close(p[i].fd);
		from += (unsigned)n;
	}
}

/* Closes all descriptors but standard input, output and error and those in `keep`, which is sorted for that; -1 is none. */
static void
descriptors_close_but(int *keep, size_t n)
{
	enum { CLOSE_RANGE = 436 };
	unsigned from = STDERR_FILENO + 1;

	for (size_t i = 1; i < n; i++)
		for (size_t k = i; k > 0 && keep[k - 1] > keep[k]; k--) {
			int swapped = keep[k];
			keep[k] = keep[k - 1];
			keep[k - 1] = swapped;
		}
	for (size_t i = 0; i <= n; i++) {
		unsigned to = i < n ? (unsigned)keep[i] : UINT_MAX;
		if (i < n && keep[i] < (int)from)
			continue;
#if TINYAUTH_LINUX
		if (to > from && syscall(CLOSE_RANGE, from, to - 1, 0) != 0)   /* before Linux 5.9 */
#endif
			descriptors_close(from, to);
		from = to + 1;
	}
}

/* Standard input, output and error are something, so that no other file is ever taken for them. */
static void
descriptors_fill(void)
{
	int fd;

	do
		fd = descriptor_idle();
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);
}

/* Sends one byte to another process, and with it a descriptor, unless that is -1. False: it did not go, and is lost. */
static bool
word_send(int to, char word, int fd)
{
	union { struct cmsghdr align; char space[CMSG_SPACE(sizeof(int))]; } control;
	struct iovec iov = {&word, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	memset(&control, 0, sizeof control);
	if (fd >= 0) {
		m.msg_control = &control;
		m.msg_controllen = sizeof control;
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof fd);
		memcpy(CMSG_DATA(c), &fd, sizeof fd);
	}
	return sendmsg(to, &m, MSG_NOSIGNAL | MSG_DONTWAIT) == 1;
}

/* Takes such a byte and its descriptor, -1 where there is none. As recv(): 1, 0 at the end, -1 with errno. */
static ssize_t
word_receive(int from, char *word, int *fd)
{
	union { struct cmsghdr align; char space[CMSG_SPACE(sizeof(int))]; } control;
	struct iovec iov = {word, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t n = recvmsg(from, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n == 1 ? CMSG_FIRSTHDR(&m) : NULL;

	*fd = -1;
	if (c != NULL && c->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(c), sizeof *fd);
	return n;
}

/* Processors that this process may run on. */
static uint64_t
cpus_online(void)
{
#if TINYAUTH_LINUX
	cpu_set_t set;

	CPU_ZERO(&set);
	long n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
#else
	long n = sysconf(_SC_NPROCESSORS_ONLN);
#endif
	return n > 0 ? (uint64_t)n : 1;
}

/* No pages of 2 MB, which some systems give unasked: one touched buffer would be as much. */
static void
memory_small(void)
{
#if TINYAUTH_LINUX
	enum { THP_DISABLE = 41 };

	prctl(THP_DISABLE, 1, 0, 0, 0);
#endif
}

/* Bytes of a page of memory: 4 KB, or on some machines 16 or 64. */
static size_t
page_size(void)
{
	static size_t size;

	if (size == 0)
		size = (size_t)sysconf(_SC_PAGESIZE);
	return size;
}

/* Bytes of the pages that so many bytes need. */
static size_t
page_round(size_t n)
{
	return (n + page_size() - 1) & ~(page_size() - 1);
}

/* A mapping that costs memory only where it is touched, or NULL. */
static void *
map_try(size_t n, int flags)
{
	void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

/* Gets pages that will all be written, at once: one by one they cost more than what is done with them. A kernel that cannot
 * (before Linux 5.14) gets them one by one. */
static void
map_touch(void *p, size_t n)
{
	enum { POPULATE_WRITE = 23 };
	uintptr_t from = (uintptr_t)p & ~(uintptr_t)(page_size() - 1);

	if (TINYAUTH_LINUX && n > 65536)
		madvise((void *)from, (uintptr_t)p + n - from, POPULATE_WRITE);
}

/* The same at start, where memory is decided: dies when there is none. */
static void *
map_new(size_t n, int flags)
{
	void *p = map_try(n, flags);

	if (p == NULL)
		die(EXIT_FAILURE, "cannot map %zu bytes: %s; lower --max-conns or --workers", n, strerror(errno));
	return p;
}

static struct pool
pool_new(size_t max, size_t each)
{
	size_t size;

	if (__builtin_mul_overflow(max, each, &size))
		die(EXIT_FAILURE, "%zu connections are more than this system can address; lower --max-conns", max);
	return (struct pool){.mem = map_new(size, MAP_PRIVATE), .each = each, .left = max,
	    .given = map_new(max * sizeof(void *), MAP_PRIVATE)};
}

/* A place, or NULL: all are in use. */
static void *
pool_take(struct pool *p)
{
	if (p->left == 0)
		return NULL;
	p->left--;
	if (p->n == 0)
		return p->mem + p->fresh++ * p->each;
	p->n--;
	if (p->cold > p->n)
		p->cold = p->n;
	return p->given[p->n];
}

static void
pool_give(struct pool *p, void *place)
{
	p->given[p->n++] = place;
	p->left++;
}

/* Places that came back, but for the last few, still hold memory. */
static bool
pool_warm(const struct pool *p)
{
	return p->n > p->cold + TRIM_KEEP;
}

/* Gives the system the memory of places that came back, but for the last few. Of pools whose places are whole pages. */
static void
pool_trim(struct pool *p)
{
	for (; pool_warm(p); p->cold++)
		madvise(p->given[p->cold], p->each, MADV_DONTNEED);
}

/* A mapping that children share: a memfd, which an upgrade can hand over; where there is none, a file that has no name any
 * more, unless it is to hold secrets; else anonymous, *fd -1. */
static void *
map_shared(const char *name, size_t n, bool secret, int *fd)
{
#if TINYAUTH_LINUX
	(void)secret;
	*fd = memfd_create(name, MFD_CLOEXEC);
#else
	char path[] = "/tmp/tinyauth-XXXXXX";

	(void)name;
	if ((*fd = secret ? -1 : mkostemp(path, O_CLOEXEC)) >= 0)
		unlink(path);
#endif
	if (*fd >= 0 && ftruncate(*fd, (off_t)n) != 0) {
		close(*fd);
		*fd = -1;
	}
	if (*fd < 0)
		return map_try(n, MAP_SHARED);
	void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (p != MAP_FAILED)
		return p;
	close(*fd);
	*fd = -1;
	return NULL;
}

/* A file's bytes in a mapping of its own; file_forget() wipes and unmaps it. */
struct file {
	char *p;
	size_t n, mapped;
	struct stat st;
	bool opened;
};

static void
file_forget(struct file *f)
{
	if (f->p == NULL)
		return;
	wipe(f->p, f->n);
	munmap(f->p, f->mapped);
	f->p = NULL;
}

static bool
stat_same(const struct stat *a, const struct stat *b)
{
	return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Opens the directory that a path lies in. */
static int
directory_open(const char *path)
{
	char directory[PATH_MAX];
	const char *slash = strrchr(path, '/');

	text_print(directory, sizeof directory, "%.*s", slash == NULL ? 1 : (int)(slash - path + 1), slash == NULL ? "." : path);
	return open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* Could a file be opened for writing, or made? It is not touched: whoever reads a pipe would see its end. */
static bool
file_writable(const char *path)
{
	struct stat st;

	if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) {
		errno = EISDIR;
		return false;
	}
	if (access(path, W_OK) == 0)
		return true;
	if (errno != ENOENT || lstat(path, &st) == 0)   /* such as a link that leads nowhere */
		return false;
	int fd = directory_open(path);
	bool good = fd >= 0 && faccessat(fd, ".", W_OK | X_OK, 0) == 0;
	if (fd >= 0)
		close(fd);
	return good;
}

/* Gives a file of `size` bytes or less its whole size, on the disk as well: a hole in a mapping of it for which there is no room
 * later is a SIGBUS. What it holds stays. False with errno. */
static bool
file_allocate(int fd, const struct stat *st, size_t size)
{
	enum { BLOCK = 512 };                /* no file system has smaller ones */
	int error;
	char byte;

	do
		error = posix_fallocate(fd, 0, (off_t)size);
	while (error == EINTR);
	if (error == 0 || error == ENOSPC || error == EDQUOT || error == EFBIG || error == EIO)   /* else it cannot do so */
		return (errno = error) == 0;
	for (off_t at = 0; (size_t)at < size && (uint64_t)st->st_blocks * 512 < size; at += BLOCK) {
		off_t last = at + BLOCK - 1 < (off_t)size ? at + BLOCK - 1 : (off_t)size - 1;
		byte = 0;
		if (pread(fd, &byte, 1, last) < 0 || pwrite(fd, &byte, 1, last) != 1)
			return false;
	}
	return true;
}

/* Reads all of an open file, up to `max` bytes. NULL, or what is wrong. */
static const char *
file_fill(int fd, size_t max, struct file *f)
{
	ssize_t n = 0;

	if (fstat(fd, &f->st) != 0)
		return strerror(errno);
	if (!S_ISREG(f->st.st_mode))
		return "it is not a regular file";
	if ((size_t)f->st.st_size >= max)
		return "it is too large";
	f->mapped = (size_t)f->st.st_size + 1;
	if ((f->p = map_try(f->mapped, MAP_PRIVATE)) == NULL)
		return "no memory for it";
	map_touch(f->p, f->mapped);
	while (f->n < f->mapped && (n = read(fd, f->p + f->n, f->mapped - f->n)) > 0)
		f->n += (size_t)n;
	if (n < 0)
		return strerror(errno);
	return f->n == f->mapped ? "it grew while it was read; try again" : NULL;
}

static const char *
file_read(const char *path, size_t max, struct file *f)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);

	*f = (struct file){.opened = fd >= 0};
	if (fd < 0)
		return strerror(errno);
	const char *why = file_fill(fd, max, f);
	close(fd);
	if (why != NULL)
		file_forget(f);
	return why;
}

/* SipHash-2-4 of 16 bytes: where an address goes in a shared table is nobody's guess. */
static uint64_t
hash_keyed(const uint64_t key[2], const uint64_t word[2])
{
	uint64_t v0 = key[0] ^ 0x736f6d6570736575ull, v1 = key[1] ^ 0x646f72616e646f6dull;
	uint64_t v2 = key[0] ^ 0x6c7967656e657261ull, v3 = key[1] ^ 0x7465646279746573ull;
	const uint64_t input[3] = {word[0], word[1], 16ull << 56};
#define ROTATE(x, b) ((x) << (b) | (x) >> (64 - (b)))
	for (int i = 0; i < 4; i++) {
		if (i < 3)
			v3 ^= input[i];
		else
			v2 ^= 0xff;
		for (int round = i < 3 ? 2 : 4; round > 0; round--) {
			v0 += v1, v1 = ROTATE(v1, 13), v1 ^= v0, v0 = ROTATE(v0, 32);
			v2 += v3, v3 = ROTATE(v3, 16), v3 ^= v2;
			v0 += v3, v3 = ROTATE(v3, 21), v3 ^= v0;
			v2 += v1, v1 = ROTATE(v1, 17), v1 ^= v2, v2 = ROTATE(v2, 32);
		}
		if (i < 3)
			v0 ^= input[i];
	}
#undef ROTATE
	return v0 ^ v1 ^ v2 ^ v3;
}

/* ============================================================================================================= *
 * LOG
 * Owns: the log's descriptor, every sentence that is logged, the escaping
 * Calls: BASICS
 * Promises: whole lines, at most one write a turn (a pipe takes 4 KB at once); control bytes are escaped
 * Never: blocks the process: what cannot be written waits in the buffer, what finds no room there is dropped and counted
 * ============================================================================================================= */

/* A field's name as it stands in the line: `status=` or `"status":`. */
static void
log_name(struct log *log, struct out *o, const char *name)
{
	if (log->format == LOG_JSON) {
		out_text(o, o->n > 1 ? ",\"" : "\"");
		out_text(o, name);
		out_text(o, "\":");
	} else {
		if (o->n > 0)
			out_char(o, ' ');
		out_text(o, name);
		out_char(o, '=');
	}
}

/* Bytes at the start of `s` that stand for themselves in either format, quoted or not. */
static size_t
log_plain(struct slice s)
{
	static const bool PLAIN[256] = {['!'] = true, ['#' ... '<'] = true, ['>' ... '['] = true, [']' ... '~'] = true};
	size_t n = 0;

	while (n < s.n && PLAIN[(unsigned char)s.p[n]])
		n++;
	return n;
}

/* Bytes as they may stand between quotes in either format: nothing that a terminal or a parser acts upon. */
static void
log_escaped(struct log *log, struct out *o, struct slice s)
{
	const char *hex = log->format == LOG_JSON ? "\\u00" : "\\x";

	for (size_t n; n = log_plain(s), out_bytes(o, s.p, n), n < s.n; s = slice_from(s, n + 1)) {
		unsigned char c = (unsigned char)s.p[n];
		if (c < 0x20 || c >= 0x7f) {
			out_text(o, hex);
			out_char(o, HEX[c >> 4]);
			out_char(o, HEX[c & 15]);
			continue;
		}
		if (c == '"' || c == '\\')
			out_char(o, '\\');
		out_char(o, (char)c);
	}
}

/* A text field; an empty one is unknown: `-` in logfmt, left out in JSON. */
static void
log_slice(struct log *log, struct out *o, const char *name, struct slice s)
{
	if (s.n == 0 && log->format == LOG_JSON)
		return;
	log_name(log, o, name);
	if (s.n == 0)
		out_char(o, '-');
	else if (log->format == LOG_LOGFMT && log_plain(s) == s.n)
		out_slice(o, s);
	else {
		out_char(o, '"');
		log_escaped(log, o, s);
		out_char(o, '"');
	}
}

static void
log_text(struct log *log, struct out *o, const char *name, const char *text)
{
	log_slice(log, o, name, slice_of(text));
}

static void
log_number(struct log *log, struct out *o, const char *name, uint64_t n)
{
	log_name(log, o, name);
	out_number(o, n);
}

static void
log_ms(struct log *log, struct out *o, const char *name, uint64_t ns)
{
	log_name(log, o, name);
	out_ms(o, ns);
}

/* Seconds since 1970 as `2026-11-23T03:12:00`. Days count from 1 March of year 0, so that a leap day ends its year. */
static void
date_write(char date[24], uint64_t second)
{
	uint64_t day = second / 86400 + 719468, era = day / 146097, of_era = day % 146097;
	uint64_t year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
	uint64_t of_year = of_era - (365 * year + year / 4 - year / 100);
	uint64_t march = (5 * of_year + 2) / 153, month = march < 10 ? march + 3 : march - 9;

	const uint64_t pairs[] = {(era * 400 + year + (month <= 2)) / 100, (era * 400 + year + (month <= 2)), month,
	    of_year - (153 * march + 2) / 5 + 1, second / 3600 % 24, second / 60 % 60, second % 60};

	static const char BEHIND[LENGTH(pairs)] = {'\0', '-', '-', 'T', ':', ':', '\0'};

	for (size_t i = 0; i < LENGTH(pairs); i++) {
		*date++ = (char)('0' + pairs[i] / 10 % 10);
		*date++ = (char)('0' + pairs[i] % 10);
		if (BEHIND[i] != '\0')
			*date++ = BEHIND[i];
	}
	*date = '\0';
}

/* Midnight of a day in seconds since 1970; year 1970 or later. */
static uint64_t
date_seconds(uint64_t year, uint64_t month, uint64_t day)
{
	uint64_t from_march = month > 2 ? month - 3 : month + 9, y = month > 2 ? year : year - 1;

	return (y * 365 + y / 4 - y / 100 + y / 400 + (153 * from_march + 2) / 5 + day - 1 - 719468) * 86400;
}

/* `2026-11-23T03:12:00.123Z`; the date part is made once a second. */
static void
log_time(struct log *log, struct out *o, uint64_t wall_ms)
{
	uint64_t ms = wall_ms % 1000;
	char tail[5] = {'.', (char)('0' + ms / 100), (char)('0' + ms / 10 % 10), (char)('0' + ms % 10), 'Z'};

	if (log->second != wall_ms / 1000 || log->date[0] == '\0') {
		log->second = wall_ms / 1000;
		date_write(log->date, log->second);
	}
	log_name(log, o, "time");
	if (log->format == LOG_JSON)
		out_char(o, '"');
	out_text(o, log->date);
	out_bytes(o, tail, sizeof tail);
	if (log->format == LOG_JSON)
		out_char(o, '"');
}

static bool log_flush(struct log *log);

/* Starts a line. Every line ends in log_end(), which keeps it or counts it as dropped. */
static struct out
log_begin(struct log *log, uint64_t wall_ms)
{
	if (LOG_BUF - log->n < LOG_LINE)
		log_flush(log);
	struct out o = {log->buf + log->n, 0, LOG_BUF - log->n < LOG_LINE ? 0 : LOG_LINE, false};

	if (log->format == LOG_JSON)
		out_char(&o, '{');
	log_time(log, &o, wall_ms);
	return o;
}

static void
log_end(struct log *log, struct out *o)
{
	out_text(o, log->format == LOG_JSON ? "}\n" : "\n");
	if (o->full)
		log->dropped++;
	else
		log->n += o->n;
}

/* How many of the waiting bytes one write may take: all for a file, else whole lines of at most LOG_LINE bytes, which a
 * pipe takes as a whole or not at all. */
static size_t
log_portion(const struct log *log, size_t from)
{
	size_t n = log->n - from;

	if (log->regular || n <= LOG_LINE)
		return n;
	const char *end = memrchr(log->buf + from, '\n', LOG_LINE);
	return end == NULL ? LOG_LINE : (size_t)(end + 1 - (log->buf + from));
}

static ssize_t
log_write(struct log *log, const char *p, size_t n)
{
	struct pollfd ready = {log->fd, POLLOUT, 0};

	if (log->socket)
		return send(log->fd, p, n, MSG_DONTWAIT | MSG_NOSIGNAL);
	/* A description that we share with others must not be made non-blocking: it is asked first. */
	if (!log->own && !log->regular && poll(&ready, 1, 0) != 1)
		return -1;
	return write(log->fd, p, n);
}

/* Writes what waits, as far as that goes at once. False: something is left. */
static bool
log_flush(struct log *log)
{
	size_t done = 0;

	if (log->off)
		log->n = log->dropped = 0;
	while (done < log->n) {
		ssize_t n = log_write(log, log->buf + done, log_portion(log, done));
		if (n <= 0)
			break;
		done += (size_t)n;
	}
	memmove(log->buf, log->buf + done, log->n - done);
	log->n -= done;
	if (log->n == 0 && log->dropped > 0) {
		uint64_t lines = log->dropped;
		struct out o = log_begin(log, clock_wall_ms());
		log->dropped = 0;
		log_text(log, &o, "event", "log_dropped");
		log_number(log, &o, "lines", lines);
		log_end(log, &o);
	}
	return log->n == 0;
}

/* Takes fd as the log, as it is. `own`: nobody else has this description, and it does not block. */
static void
log_take(struct log *log, int fd, bool own)
{
	struct stat st;

	log->fd = fd;
	log->regular = log->socket = log->own = false;
	if (fstat(fd, &st) != 0)
		return;
	log->regular = S_ISREG(st.st_mode);
	log->socket = S_ISSOCK(st.st_mode);
	log->own = own && !log->regular && !log->socket;
}

/* Takes fd as the log. A pipe or terminal that others share is opened anew if /proc is there, so that it can be
 * non-blocking for us alone. */
static void
log_use(struct log *log, int fd)
{
	char path[32];

	log_take(log, fd, false);
	if (log->regular || log->socket)
		return;
	text_print(path, sizeof path, "/proc/self/fd/%d", fd);
	int own = open(path, O_WRONLY | O_NONBLOCK | O_APPEND | O_CLOEXEC | O_NOCTTY);
	if (own >= 0) {
		log->fd = own;
		log->own = true;
		if (fd > STDERR_FILENO)
			close(fd);
	}
}

static int
log_open_file(const char *path)
{
	return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0640);
}

/* Lets go of the descriptor in use. */
static void
log_close(struct log *log)
{
	log_flush(log);
	if (log->fd > STDERR_FILENO)
		close(log->fd);
}

/* An event line is: time, event, then what the caller adds. */
static struct out
log_event(struct log *log, const char *event)
{
	struct out o = log_begin(log, clock_wall_ms());

	log_text(log, &o, "event", event);
	return o;
}

static void
log_listening(struct log *log, const char *addr, bool tls)
{
	struct out o = log_event(log, "listening");

	log_text(log, &o, "addr", addr);
	log_text(log, &o, "tls", tls ? "yes" : "no");
	log_end(log, &o);
}

static void
log_ready(struct log *log, uint64_t workers, uint64_t keys, const char *upstream)
{
	struct out o = log_event(log, "ready");

	log_number(log, &o, "pid", (uint64_t)getpid());
	log_number(log, &o, "workers", workers);
	log_number(log, &o, "keys", keys);
	log_text(log, &o, "upstream", upstream);
	log_end(log, &o);
}

static void
log_fewer_connections(struct log *log, uint64_t max_conns)
{
	struct out o = log_event(log, "fewer_connections");

	log_number(log, &o, "max_conns", max_conns);
	log_text(log, &o, "what", "the limit of open files allows no more; raise it (ulimit -Hn) or lower --max-conns");
	log_end(log, &o);
}

/* What holds of the sandbox of the workers. */
static void
log_sandbox(struct log *log, const char *event, uint64_t uid, uint64_t gid, struct slice walls)
{
	struct out o = log_event(log, event);

	log_number(log, &o, "uid", uid);
	log_number(log, &o, "gid", gid);
	log_slice(log, &o, "walls", walls);
	log_end(log, &o);
}

static void
log_worker_started(struct log *log, int slot, int pid)
{
	struct out o = log_event(log, "worker_started");

	log_number(log, &o, "worker", (uint64_t)slot);
	log_number(log, &o, "pid", (uint64_t)pid);
	log_end(log, &o);
}

static void
log_worker_died(struct log *log, const struct child *child, int status)
{
	struct out o = log_event(log, "worker_died");

	log_number(log, &o, "worker", (uint64_t)child->slot);
	log_number(log, &o, "pid", (uint64_t)child->pid);
	if (WIFSIGNALED(status))
		log_number(log, &o, "signal", (uint64_t)WTERMSIG(status));
	else
		log_number(log, &o, "status", (uint64_t)WEXITSTATUS(status));
	if (child->call != 0)
		log_number(log, &o, "forbidden_call", (uint64_t)child->call);
	log_end(log, &o);
}

static void
log_keys_published(struct log *log, uint64_t keys)
{
	struct out o = log_event(log, "keys_published");

	log_number(log, &o, "keys", keys);
	log_end(log, &o);
}

static void
log_keys_refused(struct log *log, const char *file, uint64_t errors)
{
	struct out o = log_event(log, "keys_refused");

	log_text(log, &o, "file", file);
	log_number(log, &o, "errors", errors);
	log_text(log, &o, "kept", "the keys from before");
	log_end(log, &o);
}

/* A bare event, or one with a sentence: what happened, why, and what was done about it. */
static void
log_note(struct log *log, const char *event, const char *what)
{
	struct out o = log_event(log, event);

	if (what != NULL)
		log_text(log, &o, "what", what);
	log_end(log, &o);
}

/* An event that a system call's failure caused. */
static void
log_failure(struct log *log, const char *event, const char *what, int error)
{
	struct out o = log_event(log, event);

	log_text(log, &o, "what", what);
	log_text(log, &o, "error", strerror(error));
	log_end(log, &o);
}

/* A TLS handshake that failed, or a connection that broke in it. */
static void
log_tls_failed(struct log *log, uint64_t wall_ms, const char *addr, const char *name, const char *error)
{
	struct out o = log_begin(log, wall_ms);

	log_text(log, &o, "event", "tls_failed");
	log_text(log, &o, "addr", addr);
	log_text(log, &o, "sni", name);
	log_text(log, &o, "error", error);
	log_end(log, &o);
}

/* What certificate serves, or will soon serve no more. */
static void
log_certificate(struct log *log, const char *event, const char *subject, const char *names, uint64_t until_s)
{
	struct out o = log_event(log, event);
	char date[24];

	date_write(date, until_s);
	log_text(log, &o, "subject", subject);
	log_text(log, &o, "names", names);
	log_text(log, &o, "until", strcat(date, "Z"));
	log_end(log, &o);
}

/* A connection that was closed before a request of it was read. */
static void
log_turned_away(struct log *log, uint64_t wall_ms, const char *addr, unsigned status, const char *why)
{
	struct out o = log_begin(log, wall_ms);

	log_text(log, &o, "event", "turned_away");
	log_text(log, &o, "addr", addr);
	log_number(log, &o, "status", status);
	log_text(log, &o, "reason", why);
	log_end(log, &o);
}

/* The access line: one for each request, written at its end. `why` is the reason's word, "" when it was served. */
static void
log_access(struct log *log, uint64_t now_ns, uint64_t wall_ms, const struct conn *c, const char *why, const char *upstream)
{
	const struct request *r = c->request;
	struct out o = log_begin(log, wall_ms);

	log_text(log, &o, "addr", c->addr);
	log_text(log, &o, "key", r->key.name);
	log_slice(log, &o, "method", (struct slice){r->method, r->method_len});
	log_slice(log, &o, "path", (struct slice){r->path, r->path_len});
	log_number(log, &o, "status", r->status);
	if (why[0] != '\0')
		log_text(log, &o, "reason", why);
	if (r->why != NULL)
		log_text(log, &o, "what", r->why);
	log_number(log, &o, "in", r->in + c->req.in);
	log_number(log, &o, "out", c->resp.out);
	if (r->first_ns != 0)
		log_ms(log, &o, "ttfb_ms", r->first_ns - r->begin_ns);
	else
		log_slice(log, &o, "ttfb_ms", S(""));
	log_ms(log, &o, "ms", now_ns - r->begin_ns);
	log_text(log, &o, "upstream", upstream);
	log_slice(log, &o, "id", (struct slice){r->id, r->id_len});
	log_end(log, &o);
}

/* ============================================================================================================= *
 * CONFIG
 * Owns: the options table, which drives parsing, the environment and --help; the frozen configuration; addresses,
 *       networks and secrets as they are written
 * Calls: BASICS
 * Promises: a bad value is one sentence that says what is wrong and how to mend it; the command line wins
 * Never: changes the configuration after start. Others do so, each before the fork that it is for or in the process that it is
 *        for: names_find_listen(), names_find_upstream() and supervisor_resolved(), supervisor_descriptors(), inetd_run(),
 *        table_from_config(), sandbox_upstream()
 * ============================================================================================================= */

enum option_kind { O_TEXT, O_LISTEN, O_UPSTREAM, O_TRUST, O_USER, O_COUNT, O_BURST, O_DURATION, O_RATE, O_FORMAT };

struct option_row {
	char letter;                 /* 0: none */
	const char *name, *argument, *initial, *help;
	size_t offset;               /* of the value in struct config */
	enum option_kind kind;
};

#define AT(member) offsetof(struct config, member)
static const struct option_row OPTIONS[] = {
	{'k', "keys", "FILE", NULL, "the keys file (./keys, else /etc/tinyauth/keys)", AT(keys), O_TEXT},
	{'l', "listen", "ADDR", "[::]:21434", "HOST:PORT, :PORT, [V6]:PORT or unix:PATH; repeatable", 0, O_LISTEN},
	{'u', "upstream", "ADDR", "127.0.0.1:11434", "the model server: HOST:PORT or unix:PATH", 0, O_UPSTREAM},
	{'w', "workers", "N", NULL, "worker processes (one per online CPU)", AT(workers), O_COUNT},
	{'n', "max-conns", "N", "1024", "client connections per worker", AT(max_conns), O_COUNT},
	{0, "ip-rate", "RATE", "10/s", "requests per client address, N/s|m|h|d; off: no limit", AT(ip_rate), O_RATE},
	{0, "ip-burst", "N", "20", "requests beyond it that may come at once", AT(ip_rate.burst), O_BURST},
	{0, "ip-conns", "N", "64", "open connections per client address", AT(ip_conns), O_COUNT},
	{0, "tls-cert", "FILE", NULL, "certificate chain (PEM): TLS on every TCP listener", AT(tls_cert), O_TEXT},
	{0, "tls-key", "FILE", NULL, "its private key (PEM)", AT(tls_key), O_TEXT},
	{0, "state", "FILE", NULL, "the shared table in a file, for what -i runs and for restarts", AT(state), O_TEXT},
	{0, "user", "NAME|UID[:GID]", "65534:65534", "what workers become when started as root", 0, O_USER},
	{0, "trust", "CIDR", NULL, "peers whose PROXY and X-Forwarded-For are believed; repeatable", 0, O_TRUST},
	{0, "log", "FILE", NULL, "access and event log (stderr); opened anew on SIGUSR1", AT(log), O_TEXT},
	{0, "log-format", "FORMAT", "logfmt", "logfmt or json", AT(log_format), O_FORMAT},
	{0, "header-timeout", "TIME", "10s", "for a request's head to be whole", AT(header_ms), O_DURATION},
	{0, "connect-timeout", "TIME", "5s", "for the upstream to take the connection", AT(connect_ms), O_DURATION},
	{0, "first-byte-timeout", "TIME", "600s", "for the first byte of the answer", AT(first_byte_ms), O_DURATION},
	{0, "idle-timeout", "TIME", "600s", "for a body or stream that stands still", AT(idle_ms), O_DURATION},
	{0, "keepalive-timeout", "TIME", "75s", "for the next request of a connection", AT(keepalive_ms), O_DURATION},
	{0, "idle-exit", "TIME", NULL, "socket-activated: end when nothing happened for so long", AT(idle_exit_ms), O_DURATION},
	{0, "drain-timeout", "TIME", "600s", "for running streams when the server stops", AT(drain_ms), O_DURATION},
};
#undef AT

/* What is wrong with a value, for one line on stderr. */
struct mistake {
	char text[512];
};

__attribute__((format(printf, 2, 3))) static bool
mistake_is(struct mistake *m, const char *format, ...)
{
	va_list rest;

	va_start(rest, format);
	struct out o = {m->text, 0, sizeof m->text - 1, false};
	out_vprint(&o, format, rest);
	m->text[o.n] = '\0';
	va_end(rest);
	return false;
}

static void
addr_write(struct addr *a)
{
	struct out o = {a->text, 0, sizeof a->text - 1, false};

	if (a->ss.ss_family == AF_INET) {
		struct sockaddr_in *in = (struct sockaddr_in *)&a->ss;
		out_ip(&o, &a->ss);
		out_print(&o, ":%u", ntohs(in->sin_port));
	} else if (a->ss.ss_family == AF_INET6) {
		struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&a->ss;
		out_char(&o, '[');
		out_ip(&o, &a->ss);
		out_print(&o, "]:%u", ntohs(in6->sin6_port));
	} else
		out_print(&o, "unix:%.*s", 107, ((struct sockaddr_un *)&a->ss)->sun_path);
	a->text[o.n] = '\0';
}

static bool
addr_read_unix(const char *path, struct addr *a, struct mistake *m)
{
	struct sockaddr_un *un = (struct sockaddr_un *)&a->ss;

	if (path[0] == '\0' || strlen(path) >= sizeof un->sun_path)
		return mistake_is(m, "'unix:%s': the path must have 1 to %zu bytes", path, sizeof un->sun_path - 1);
	un->sun_family = AF_UNIX;
	strcpy(un->sun_path, path);
	a->len = sizeof *un;
	addr_write(a);
	return true;
}

/* Splits HOST:PORT or [V6]:PORT; host takes NI_MAXHOST bytes. */
static bool
addr_split(const char *text, char *host, const char **port, struct mistake *m)
{
	const char *colon = strrchr(text, ':');
	const char *from = text, *to = colon;
	uint64_t number;

	if (strstr(text, "://") != NULL)
		return mistake_is(m, "'%s' is a URL; write HOST:PORT alone", text);
	if (colon == NULL)
		return mistake_is(m, "'%s' has no port; write HOST:PORT, :PORT, [V6]:PORT or unix:PATH", text);
	if (text[0] == '[' && colon > text && colon[-1] == ']') {
		from = text + 1;
		to = colon - 1;
	} else if (memchr(text, ':', (size_t)(colon - text)) != NULL)
		return mistake_is(m, "'%s' is unclear; write an IPv6 address as [ADDRESS]:PORT", text);
	if (to - from >= NI_MAXHOST)
		return mistake_is(m, "'%s': the host is too long", text);
	memcpy(host, from, (size_t)(to - from));
	host[to - from] = '\0';
	*port = colon + 1;
	if (!number_read(slice_of(*port), &number) || number > 65535)
		return mistake_is(m, "'%s': '%s' is not a port; write a number from 0 to 65535", text, *port);
	return true;
}

/* One address, when it is written as one and not as a name; then *n becomes 0, and it is looked up later. */
static bool
addr_read(const char *text, struct addr *a, unsigned *n, bool passive, struct mistake *m)
{
	char host[NI_MAXHOST] = "";
	const char *port = NULL;
	struct sockaddr_in *in = (struct sockaddr_in *)&a->ss;
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&a->ss;
	uint64_t number = 0;

	*n = 1;
	*a = (struct addr){.len = 0};
	if (strncmp(text, "unix:", 5) == 0)
		return addr_read_unix(text + 5, a, m);
	if (!addr_split(text, host, &port, m))
		return false;
	if (host[0] == '\0' && !passive)
		return mistake_is(m, "'%s' has no host; write HOST:PORT", text);
	number_read(slice_of(port), &number);
	if (number == 0 && !passive)
		return mistake_is(m, "'%s': nothing can be reached at port 0", text);
	if (inet_pton(AF_INET, host, &in->sin_addr) == 1) {
		in->sin_family = AF_INET;
		in->sin_port = htons((uint16_t)number);
		a->len = sizeof *in;
	} else if (inet_pton(AF_INET6, host[0] == '\0' ? "::" : host, &in6->sin6_addr) == 1) {
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons((uint16_t)number);
		a->len = sizeof *in6;
	} else if (strlen(text) < sizeof a->text) {
		strcpy(a->text, text);
		*n = 0;
		return true;
	} else
		return mistake_is(m, "'%.*s...' is too long", 40, text);
	addr_write(a);
	return true;
}

/* The 16 bytes of an address, IPv4 as ::ffff:a.b.c.d; zeros for a unix socket. */
static void
ip_of(const struct sockaddr_storage *ss, unsigned char ip[16])
{
	memset(ip, 0, 16);
	if (ss->ss_family == AF_INET6)
		memcpy(ip, &((const struct sockaddr_in6 *)ss)->sin6_addr, 16);
	else if (ss->ss_family == AF_INET) {
		ip[10] = ip[11] = 0xff;
		memcpy(ip + 12, &((const struct sockaddr_in *)ss)->sin_addr, 4);
	}
}

static bool
ip_local(const unsigned char ip[16])
{
	static const unsigned char LOCAL[16];

	return memcmp(ip, LOCAL, 16) == 0;
}

static bool
ip_v4(const unsigned char ip[16])
{
	static const unsigned char MAPPED[12] = {[10] = 0xff, [11] = 0xff};

	return memcmp(ip, MAPPED, 12) == 0;
}

/* The other way round. */
static struct sockaddr_storage
ip_address(const unsigned char ip[16])
{
	struct sockaddr_storage ss = {.ss_family = AF_UNIX};

	if (!ip_local(ip)) {
		ss.ss_family = AF_INET6;
		memcpy(&((struct sockaddr_in6 *)&ss)->sin6_addr, ip, 16);
	}
	return ss;
}

/* `192.0.2.1`, `2001:db8::1`, also with a port behind it or in brackets. */
static bool
ip_read(struct slice text, unsigned char ip[16])
{
	char word[INET6_ADDRSTRLEN + 1];
	struct sockaddr_storage ss = {.ss_family = AF_INET};

	if (text.n > 0 && text.p[0] == '[') {
		const char *end = memchr(text.p, ']', text.n);
		text = slice_from((struct slice){text.p, end == NULL ? 0 : (size_t)(end - text.p)}, 1);
	} else if (memchr(text.p, '.', text.n) != NULL && memchr(text.p, ':', text.n) != NULL && text.p[0] != ':')
		text.n = (size_t)((const char *)memrchr(text.p, ':', text.n) - text.p);
	if (text.n == 0 || text.n >= sizeof word || memchr(text.p, '\0', text.n) != NULL)
		return false;
	memcpy(word, text.p, text.n);
	word[text.n] = '\0';
	if (inet_pton(AF_INET, word, &((struct sockaddr_in *)&ss)->sin_addr) != 1) {
		ss.ss_family = AF_INET6;
		if (inet_pton(AF_INET6, word, &((struct sockaddr_in6 *)&ss)->sin6_addr) != 1)
			return false;
	}
	ip_of(&ss, ip);
	return true;
}

/* Is the address in one of the networks whose word is believed? */
static bool
ip_trusted(const struct config *cfg, const unsigned char ip[16])
{
	for (unsigned i = 0; i < cfg->trusts; i++) {
		const struct cidr *net = &cfg->trust[i];
		size_t whole = net->bits / 8;
		unsigned rest = net->bits % 8, mask = 0xff00u >> rest & 0xff;
		if (net->local == ip_local(ip) && ip_v4(net->ip) == ip_v4(ip) && memcmp(ip, net->ip, whole) == 0 &&
		    (rest == 0 || ((ip[whole] ^ net->ip[whole]) & mask) == 0))
			return true;
	}
	return false;
}

/* `10.0.0.0/8`, `fd00::/8`, one address, or `unix`. */
static bool
config_trust(struct config *cfg, const char *value, struct mistake *m)
{
	const char *slash = strchr(value, '/');
	struct slice address = {value, slash == NULL ? strlen(value) : (size_t)(slash - value)};
	struct cidr net = {.local = strcmp(value, "unix") == 0, .bits = 128};
	uint64_t bits = 128;

	if (cfg->trusts == TRUST_MAX)
		return mistake_is(m, "more than %d networks", TRUST_MAX);
	bool v4 = memchr(value, ':', address.n) == NULL, odd = memchr(value, '[', address.n) != NULL;
	bool port = !v4 && memchr(value, '.', address.n) != NULL && strncmp(value, "::ffff:", 7) != 0;
	if (!net.local && (odd || port || !ip_read(address, net.ip)))
		return mistake_is(m, "'%s' is not a network; write ADDRESS, ADDRESS/BITS or unix", value);
	uint64_t offset = v4 ? 96 : 0;
	if (slash != NULL && (!number_read(slice_of(slash + 1), &bits) || (bits += offset) > 128 || (ip_v4(net.ip) && bits < 96)))
		return mistake_is(m, "'%s': '%s' is not a number of bits; IPv4 is written 10.0.0.0/8", value, slash + 1);
	net.bits = (uint8_t)bits;
	cfg->trust[cfg->trusts++] = net;
	return true;
}

/* `NAME`, `UID` or `UID:GID`. A name is looked for in /etc/passwd. */
static bool
config_user(struct config *cfg, const char *value, struct mistake *m)
{
	const char *colon = strchr(value, ':');
	struct slice user = {value, colon == NULL ? strlen(value) : (size_t)(colon - value)};
	struct file f = {.p = NULL};
	bool found = number_read(user, &cfg->uid);

	cfg->gid = cfg->uid;
	if (!found && file_read("/etc/passwd", KEYS_FILE_MAX, &f) == NULL) {
		for (struct slice text = {f.p, f.n}; text.n > 0 && !found;) {
			struct slice line = text_line(&text), part[4] = {{"", 0}};
			for (size_t i = 0; i < LENGTH(part); i++) {
				const char *end = memchr(line.p, ':', line.n);
				part[i] = (struct slice){line.p, end == NULL ? line.n : (size_t)(end - line.p)};
				line = slice_from(line, part[i].n + 1);
			}
			found = slice_equal(part[0], user) && number_read(part[2], &cfg->uid) && number_read(part[3], &cfg->gid);
		}
		file_forget(&f);
	}
	if (!found)
		return mistake_is(m, "'%s': there is no such user in /etc/passwd; write a name or UID:GID", value);
	if (colon != NULL && !number_read(slice_of(colon + 1), &cfg->gid))
		return mistake_is(m, "'%s': the group must be a number", value);
	if (cfg->uid == 0 || cfg->uid >= UINT32_MAX || cfg->gid >= UINT32_MAX)
		return mistake_is(m, "'%s': workers never run as root; name another user", value);
	return true;
}

static bool
addr_loopback(const struct addr *a)
{
	if (a->ss.ss_family == AF_INET)
		return ntohl(((const struct sockaddr_in *)&a->ss)->sin_addr.s_addr) >> 24 == 127;
	if (a->ss.ss_family == AF_INET6)
		return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)&a->ss)->sin6_addr);
	return true;
}

/* The upstream's own Host: Ollama answers 403 to names that it does not know, and always knows `localhost`. */
static void
upstream_host(struct upstream *u)
{
	if (u->addr[0].ss.ss_family == AF_UNIX)
		strcpy(u->host, "localhost");
	else if (u->addrs > 0 && addr_loopback(&u->addr[0]))
		text_print(u->host, sizeof u->host, "localhost%s", strrchr(u->text, ':'));
	else
		strcpy(u->host, u->text);
}

static bool
config_upstream(struct config *cfg, const char *value, struct mistake *m)
{
	struct upstream *u = &cfg->upstream;

	if (cfg->upstream_given)
		return mistake_is(m, "only one upstream can be given in this version");
	cfg->upstream_given = true;
	if (strlen(value) >= sizeof u->text)
		return mistake_is(m, "'%.*s...' is too long", 40, value);
	if (!addr_read(value, u->addr, &u->addrs, false, m))
		return false;
	u->named = u->addrs == 0;
	strcpy(u->text, value);
	upstream_host(u);
	return true;
}

static bool
config_listen(struct config *cfg, const char *value, struct mistake *m)
{
	unsigned n;

	if (cfg->listens == LISTEN_MAX)
		return mistake_is(m, "more than %d listeners", LISTEN_MAX);
	if (!addr_read(value, &cfg->listen[cfg->listens], &n, true, m))
		return false;
	cfg->listens++;
	return true;
}

/* `300ms`, `10s`, `5m`, `1h`, in ms. */
static bool
duration_read(const char *text, uint64_t *ms)
{
	static const struct { const char *unit; uint64_t ms; } UNITS[] = {
		{"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}};
	size_t digits = strspn(text, "0123456789");
	uint64_t n;

	if (digits > 9 || !number_read((struct slice){text, digits}, &n) || n == 0)
		return false;
	for (size_t i = 0; i < LENGTH(UNITS); i++)
		if (strcmp(text + digits, UNITS[i].unit) == 0) {
			*ms = n * UNITS[i].ms;
			return *ms <= DURATION_MAX_MS;
		}
	return false;
}

/* `10/s`, `100/m`, `5/h`, `1/d`; the interval in ns. */
static bool
rate_read(const char *text, uint64_t *interval_ns)
{
	static const struct { const char *unit; uint64_t s; } UNITS[] = {{"/s", 1}, {"/m", 60}, {"/h", 3600}, {"/d", 86400}};
	size_t digits = strspn(text, "0123456789");
	uint64_t n;

	if (digits > 9 || !number_read((struct slice){text, digits}, &n) || n == 0)
		return false;
	for (size_t i = 0; i < LENGTH(UNITS); i++)
		if (strcmp(text + digits, UNITS[i].unit) == 0) {
			*interval_ns = UNITS[i].s * NS_PER_S / n;
			return true;
		}
	return false;
}

static bool
config_rate(struct rate *rate, const char *value, struct mistake *m)
{
	rate->interval_ns = 0;
	if (strcmp(value, "off") == 0 || rate_read(value, &rate->interval_ns))
		return true;
	return mistake_is(m, "'%s' is not a rate; write N/s, N/m, N/h or N/d, or off", value);
}

static bool
config_set(struct config *cfg, const struct option_row *row, const char *value, struct mistake *m)
{
	void *to = (char *)cfg + row->offset;

	if (row->kind == O_LISTEN || row->kind == O_TRUST)   /* in a list of the environment blanks may follow a comma */
		value += strspn(value, " ");
	switch (row->kind) {
	case O_TEXT:
		*(const char **)to = value;
		return value[0] != '\0' || mistake_is(m, "needs a value; give it one or leave it out");
	case O_LISTEN:
		return config_listen(cfg, value, m);
	case O_UPSTREAM:
		return config_upstream(cfg, value, m);
	case O_TRUST:
		return config_trust(cfg, value, m);
	case O_USER:
		return config_user(cfg, value, m);
	case O_COUNT:
		return (number_read(slice_of(value), to) && *(uint64_t *)to >= 1 && *(uint64_t *)to <= 1000000) ||
		       mistake_is(m, "'%s' is not a number from 1 to 1000000", value);
	case O_BURST:
		return (number_read(slice_of(value), to) && *(uint64_t *)to <= 100000) ||
		       mistake_is(m, "'%s' is not a number from 0 to 100000", value);
	case O_DURATION:
		return duration_read(value, to) ||
		       mistake_is(m, "'%s' is not a time; write a number and ms, s, m or h, such as 10s, up to a year", value);
	case O_RATE:
		return config_rate(to, value, m);
	case O_FORMAT:
		*(int *)to = strcmp(value, "json") == 0 ? LOG_JSON : LOG_LOGFMT;
		return strcmp(value, "json") == 0 || strcmp(value, "logfmt") == 0 ||
		       mistake_is(m, "'%s' is not a log format; write logfmt or json", value);
	}
	return false;
}

enum { VARIABLE_MAX = 64 };

/* `header-timeout` is TINYAUTH_HEADER_TIMEOUT in the environment. */
static void
option_variable(const struct option_row *row, char name[VARIABLE_MAX])
{
	size_t n = strlen(strcpy(name, "TINYAUTH_"));

	for (const char *c = row->name; *c != '\0' && n < VARIABLE_MAX - 1; c++)
		name[n++] = *c == '-' ? '_' : (char)(*c & ~0x20);
	name[n] = '\0';
}

/* Repeatable ones are comma-separated there. */
static bool
config_environment(struct config *cfg, const struct option_row *row, const char *value, struct mistake *m)
{
	if (row->kind != O_LISTEN && row->kind != O_TRUST)
		return config_set(cfg, row, value, m);
	char *list = strdup(value), *rest = list;
	bool good = list != NULL;
	for (char *one; good && (one = strsep(&rest, ",")) != NULL;)
		good = config_set(cfg, row, one, m);
	free(list);
	return good;
}

static const struct option_row *
option_find(const char *name, size_t n, char letter)
{
	for (size_t i = 0; i < LENGTH(OPTIONS); i++) {
		if (letter != 0 && OPTIONS[i].letter == letter)
			return &OPTIONS[i];
		if (letter == 0 && strlen(OPTIONS[i].name) == n && memcmp(OPTIONS[i].name, name, n) == 0)
			return &OPTIONS[i];
	}
	return NULL;
}

/* One option at argv[*i], whose value may be the next argument: `--name value`, `--name=value`, `-k value`, `-kvalue`. */
static bool
config_argument(struct config *cfg, char *const *argv, int *i, uint64_t *given, struct mistake *m)
{
	const char *argument = argv[*i], *value = NULL;
	const struct option_row *row = NULL;
	struct mistake why;

	if (strcmp(argument, "-i") == 0)
		return cfg->inetd = true;
	if (argument[0] == '-' && argument[1] == '-') {
		size_t n = strcspn(argument + 2, "=");
		row = option_find(argument + 2, n, 0);
		value = argument[2 + n] == '=' ? argument + 3 + n : NULL;
	} else if (argument[0] == '-' && argument[1] != '\0') {
		row = option_find(NULL, 0, argument[1]);
		value = argument[2] != '\0' ? argument + 2 : NULL;
	}
	if (row == NULL)
		return mistake_is(m, "'%s' is not an option; tinyauth --help lists them", argument);
	if (value == NULL && (value = argv[++*i]) == NULL)
		return mistake_is(m, "--%s needs a value: %s", row->name, row->argument);
	*given |= 1ull << (row - OPTIONS);
	return config_set(cfg, row, value, &why) || mistake_is(m, "--%s: %s", row->name, why.text);
}

static bool
secret_hashed(struct slice secret)
{
	return secret.n >= 7 && memcmp(secret.p, "sha256:", 7) == 0;
}

/* What functions that have returned left below us on the stack, up to 512 bytes. */
__attribute__((noinline)) static void
stack_wipe(void)
{
	volatile uint64_t used[64];

	for (size_t i = 0; i < LENGTH(used); i++)
		used[i] = 0;
}

/* Digest of a secret, of which nothing is left behind: BearSSL's last round copies its block to the stack. */
static void
sha256_of(struct slice s, unsigned char digest[32])
{
	br_sha256_context sha;

	br_sha256_init(&sha);
	br_sha256_update(&sha, s.p, s.n);
	br_sha256_out(&sha, digest);
	wipe(&sha, sizeof sha);
	stack_wipe();
}

/* Digest of a secret as it is written in a keys file or in TINYAUTH_KEY: the key itself, or sha256: and its digest. */
static bool
secret_read(struct slice secret, unsigned char digest[32], struct mistake *m)
{
	if (secret_hashed(secret))
		return (secret.n == 7 + 64 && hex_read(digest, slice_from(secret, 7))) ||
		       mistake_is(m, "sha256: must be followed by 64 hex digits; make the line anew with 'tinyauth key add'");
	if (secret.n < 1 || secret.n > SECRET_MAX)
		return mistake_is(m, "the secret has %zu bytes; 1 to %d are allowed", secret.n, SECRET_MAX);
	for (size_t i = 0; i < secret.n; i++)
		if (secret.p[i] <= ' ' || secret.p[i] >= 0x7f)
			return mistake_is(m, "the secret holds a byte that is not visible ASCII; replace it");
	sha256_of(secret, digest);
	return true;
}

enum { HASHED_TEXT = 7 + 64 + 1 };

/* A digest as secret_read() takes it. */
static void
digest_write(const unsigned char digest[32], char hashed[HASHED_TEXT])
{
	char *to = hashed + strlen(strcpy(hashed, "sha256:"));

	for (size_t i = 0; i < 32; i++) {
		*to++ = HEX[digest[i] >> 4];
		*to++ = HEX[digest[i] & 15];
	}
	*to = '\0';
}

/* TINYAUTH_KEY becomes a digest; the secret is wiped from the environment, where it would stand for all to see. An
 * upgraded binary finds the digest there. */
static bool
config_env_key(struct config *cfg, struct mistake *m)
{
	char *secret = getenv("TINYAUTH_KEY");
	char hashed[HASHED_TEXT];

	if (secret == NULL)
		return true;
	if (!secret_read(slice_of(secret), cfg->env_digest, m))
		return false;
	cfg->env_key = true;
	digest_write(cfg->env_digest, hashed);
	for (char **e = environ; *e != NULL; e++)
		if (strncmp(*e, "TINYAUTH_KEY=", 13) == 0)
			wipe(*e + 13, strlen(*e + 13));
	return setenv("TINYAUTH_KEY", hashed, 1) == 0 || mistake_is(m, "no memory for the environment");
}

static void
config_default_keys(struct config *cfg)
{
	static const char *const PLACES[] = {"keys", "/etc/tinyauth/keys"};

	for (size_t i = 0; cfg->keys == NULL && i < LENGTH(PLACES); i++)
		if (access(PLACES[i], F_OK) == 0)
			cfg->keys = PLACES[i];
}

/* Command line, then environment, then defaults. What is no option goes to `words`, at most `max` of them. False: `m` says
 * what is wrong, `*usage` whether the command line is. */
static bool
config_read(struct config *cfg, char *const *argv, char **words, size_t max, bool *usage, struct mistake *m)
{
	uint64_t given = 0;
	struct mistake why;
	char variable[VARIABLE_MAX];

	*cfg = (struct config){.linger_ms = LINGER_PAUSE_MS, .reader_ms = READER_MS, .handshake_ms = HANDSHAKE_MS};
	*usage = true;
	for (int i = 0; argv[i] != NULL; i++) {
		if (argv[i][0] != '-' && max > 0) {
			*words++ = argv[i];
			max--;
		} else if (!config_argument(cfg, argv, &i, &given, m))
			return false;
	}
	*usage = false;
	for (size_t i = 0; i < LENGTH(OPTIONS); i++) {
		option_variable(&OPTIONS[i], variable);
		const char *value = given >> i & 1 ? NULL : getenv(variable);
		bool named = value != NULL;
		if (!named && !(given >> i & 1))
			value = OPTIONS[i].initial;
		if (value != NULL && !config_environment(cfg, &OPTIONS[i], value, &why))
			return mistake_is(m, "%s%s: %s", named ? "" : "--", named ? variable : OPTIONS[i].name, why.text);
	}
	if (!config_env_key(cfg, &why))
		return mistake_is(m, "TINYAUTH_KEY: %s", why.text);
	if ((cfg->tls_cert == NULL) != (cfg->tls_key == NULL))
		return mistake_is(m, "--tls-cert and --tls-key go together; give both or neither");
	if (cfg->workers == 0)
		cfg->workers = cpus_online();
	if (cfg->workers > WORKERS_MAX)
		cfg->workers = WORKERS_MAX;
	config_default_keys(cfg);
	return true;
}

enum { HELP_COLUMN = 33 };

static bool
config_help(int to)
{
	bool good = say(to, "tinyauth " TINYAUTH_VERSION ": a key in front of a model server\n\n"
	      "  tinyauth [options]                   serve\n"
	      "  tinyauth -i [options]                serve the one connection on stdin and stdout (inetd, Accept=yes)\n"
	      "  tinyauth check [options]             check keys file, certificate and options, print what would run\n"
	      "  tinyauth check --url URL             ask a server that runs, such as http://127.0.0.1:21434/health\n"
	      "  tinyauth key add NAME [attr ...]     append a hashed key to the keys file, print its secret once\n"
	      "  tinyauth key rotate NAME             a new secret, the rest of the line as it was\n"
	      "  tinyauth key rm NAME                 remove a key\n"
	      "  tinyauth key list                    names and attributes\n"
	      "  tinyauth -h | --help | -V | --version\n\n");

	for (size_t i = 0; i < LENGTH(OPTIONS); i++) {
		const struct option_row *row = &OPTIONS[i];
		char line[160], letter[5] = {'-', row->letter, ',', ' ', '\0'};
		struct out o = {line, 0, sizeof line, false};
		out_print(&o, "  %s--%s %s ", row->letter ? letter : "    ", row->name, row->argument);
		while (o.n < HELP_COLUMN)
			out_char(&o, ' ');
		good = good && say(to, row->initial ? "%.*s%s (%s)\n" : "%.*s%s\n", (int)o.n, line, row->help, row->initial);
	}
	return good && say(to,
	    "\nEach long option can come from the environment, such as TINYAUTH_LISTEN; TINYAUTH_KEY holds one key.\n"
	    "Signals: HUP reads the keys again, USR1 opens the log anew, USR2 replaces the binary, TERM and INT drain.\n");
}

/* ============================================================================================================= *
 * KEYS
 * Owns: the keys file's grammar, the published key table (two halves and an index)
 * Calls: BASICS, CONFIG (secrets, mistakes)
 * Promises: a file with any error is refused whole, each bad line named; a look-up costs the same whatever the secret
 * Never: logs or keeps a secret: digests only, and the file's bytes are wiped once read
 * ============================================================================================================= */

static size_t
keys_half_size(uint64_t capacity, uint64_t slots)
{
	return (size_t)(capacity * (sizeof(struct key_row) + KEY_NAME_MAX) + slots * sizeof(uint32_t));
}

static size_t
keys_map_size(uint64_t capacity, uint64_t slots)
{
	return sizeof(struct keys_map) + 2 * keys_half_size(capacity, slots);
}

static uint64_t
keys_slots(uint64_t rows)
{
	uint64_t slots = 64;

	while (slots < 2 * rows)
		slots *= 2;
	return slots;
}

static struct key_row *
keys_rows(const struct keys_map *map, unsigned half)
{
	return (struct key_row *)((char *)map + sizeof *map + half * keys_half_size(map->capacity, map->slots));
}

static uint32_t *
keys_index(const struct keys_map *map, unsigned half)
{
	return (uint32_t *)(keys_rows(map, half) + map->capacity);
}

static char *
keys_text(const struct keys_map *map, unsigned half)
{
	return (char *)(keys_index(map, half) + map->slots);
}

/* First index slot to look at for a digest. */
static uint32_t
keys_slot(const struct keys_map *map, const unsigned char digest[32], uint32_t mask)
{
	uint64_t word;

	memcpy(&word, digest, sizeof word);
	return (uint32_t)(word * map->salt >> 32) & mask;
}

/* Looks in one half. The half may be rewritten meanwhile, so that nothing in it is believed without a bound. */
static bool
keys_find_in(const struct keys_map *map, unsigned half, const unsigned char digest[32], struct key *key)
{
	const struct key_row *rows = keys_rows(map, half);
	const uint32_t *index = keys_index(map, half);
	uint32_t mask = map->half[half].mask;

	if (mask >= map->slots)
		return false;
	uint32_t slot = keys_slot(map, digest, mask);
	for (uint32_t probes = 0; probes <= mask; probes++, slot = (slot + 1) & mask) {
		uint32_t number = index[slot];
		if (number == 0 || number > map->capacity)
			return false;
		struct key_row row = rows[number - 1];
		if (!equal_constant_time(row.digest, digest, sizeof row.digest))
			continue;
		if (row.name_len > KEY_NAME_MAX || row.name_at > (uint64_t)map->capacity * KEY_NAME_MAX - row.name_len)
			return false;
		memcpy(key->name, keys_text(map, half) + row.name_at, row.name_len);
		key->name[row.name_len] = '\0';
		key->flags = row.flags;
		return true;
	}
	return false;
}

/* Finds a key by its digest, in the half that holds from beginning to end of the look. */
static bool
keys_find(const struct keys_map *map, const unsigned char digest[32], struct key *key)
{
	for (;;) {
		uint64_t generation = atomic_load_explicit(&map->generation, memory_order_acquire);
		bool found = keys_find_in(map, generation & 1, digest, key);
		atomic_thread_fence(memory_order_acquire);
		if (atomic_load_explicit(&map->generation, memory_order_relaxed) == generation)
			return found;
	}
}

/* Bad lines, as they are named on stderr. */
struct complaints {
	int to;                      /* descriptor; -1: only counted */
	bool hasty;                  /* a server says them, which waits for no reader */
	const char *file;
	uint64_t n;
};

/* Does a descriptor take PIPE_BUF bytes at once? */
static bool
words_fit(int to)
{
	struct pollfd p = {to, POLLOUT, 0};

	return poll(&p, 1, 0) == 1 && (p.revents & POLLOUT) != 0;
}

static bool
complaints_heard(const struct complaints *c)
{
	return c->to >= 0 && (!c->hasty || words_fit(c->to));
}

__attribute__((format(printf, 3, 4))) static void
complain(struct complaints *c, uint64_t line, const char *format, ...)
{
	char text[SAID_MAX];
	struct out o = {text, 0, sizeof text - 1, false};
	va_list rest;

	if (++c->n > KEYS_ERRORS_SHOWN || !complaints_heard(c))
		return;
	out_print(&o, line > 0 ? "%s:%llu: " : "%s: ", c->file, (unsigned long long)line);
	va_start(rest, format);
	out_vprint(&o, format, rest);
	va_end(rest);
	if (c->hasty && o.n >= PIPE_BUF)
		o.n = PIPE_BUF - 1;
	text[o.n] = '\n';
	write_whole(c->to, (struct slice){text, o.n + 1});
}

static void
complaints_end(const struct complaints *c)
{
	if (c->n > KEYS_ERRORS_SHOWN && complaints_heard(c))
		say(c->to, "%s: and %llu more errors\n", c->file, (unsigned long long)(c->n - KEYS_ERRORS_SHOWN));
}

/* The next field of a line; a field that starts with `#` ends the line. */
static struct slice
line_field(struct slice *line)
{
	const char *p = line->p, *end = line->p + line->n;

	while (p < end && (*p == ' ' || *p == '\t'))
		p++;
	if (p < end && *p == '#')
		p = end;
	struct slice field = {p, 0};
	while (p < end && *p != ' ' && *p != '\t')
		p++;
	field.n = (size_t)(p - field.p);
	*line = (struct slice){p, (size_t)(end - p)};
	return field;
}

static bool
key_name_good(struct slice name)
{
	for (size_t i = 0; i < name.n; i++)
		if (!is_digit(name.p[i]) && !(ascii_lower(name.p[i]) >= 'a' && ascii_lower(name.p[i]) <= 'z') &&
		    memchr("._@-", name.p[i], 4) == NULL)
			return false;
	return name.n >= 1 && name.n <= KEY_NAME_MAX;
}

/* One attribute, the line's field `number`. The place where rates, expiry, addresses and roles will be read. It is not said in
 * an error: behind a name with a blank in it, it is the secret. */
static bool
key_attribute(struct slice attribute, unsigned number, struct key_row *row, struct mistake *m)
{
	if (slice_equal(attribute, S("off"))) {
		row->flags |= KEY_OFF;
		return true;
	}
	return mistake_is(m, "field %u is not an attribute of this version, which knows: off; remove it, or write NAME SECRET "
	    "without blanks in them", number);
}

/* Fills `row` from one line: its name and the fields behind that. */
static bool
key_line(struct slice name, struct slice line, struct key_row *row, struct mistake *m)
{
	struct slice field;

	*row = (struct key_row){.name_len = (uint8_t)name.n};
	if (slice_equal(name, S("*")))
		return mistake_is(m, "defaults for all keys ('*') are not known to this version; remove the line");
	if (slice_starts_like(name, S("\xef\xbb\xbf")))
		return mistake_is(m, "the file begins with a byte order mark; save it as UTF-8 without BOM");
	if (!key_name_good(name))
		return mistake_is(m, "a name must be 1 to %d of the characters A-Z a-z 0-9 . _ @ -; rename the key", KEY_NAME_MAX);
	field = line_field(&line);
	if (field.n == 0)
		return mistake_is(m, "the line has no secret; write NAME SECRET");
	if (!secret_read(field, row->digest, m))
		return false;
	for (unsigned number = 3; (field = line_field(&line)).n > 0; number++)
		if (!key_attribute(field, number, row, m))
			return false;
	return true;
}

static uint64_t
name_hash(const struct keys_map *map, struct slice name)
{
	uint64_t hash = map->salt;

	for (size_t i = 0; i < name.n; i++)
		hash = (hash ^ (unsigned char)name.p[i]) * 0x100000001b3ull;
	return hash * map->salt;
}

/* Where a name stands, or would stand, in the index of names that lives while a file is read. Its entries are half of the
 * hash, so that hardly ever another name is looked at, and the number of the row. */
static uint64_t *
names_slot(const struct keys_map *map, unsigned half, uint64_t *names, struct slice name, uint64_t hash)
{
	uint32_t mask = map->half[half].mask, slot;

	for (slot = (uint32_t)(hash >> 32) & mask; names[slot] != 0; slot = (slot + 1) & mask) {
		if (names[slot] >> 32 != (uint32_t)hash)
			continue;
		const struct key_row *row = &keys_rows(map, half)[(uint32_t)names[slot] - 1];
		if (slice_equal((struct slice){keys_text(map, half) + row->name_at, row->name_len}, name))
			break;
	}
	return &names[slot];
}

/* Adds a key to the half that is being written. */
static bool
keys_insert(struct keys_map *map, unsigned half, uint64_t *names, struct key_row row, struct slice name, struct mistake *m)
{
	struct keys_half *h = &map->half[half];
	struct key_row *rows = keys_rows(map, half);
	uint32_t *index = keys_index(map, half), slot;
	uint64_t hash = name_hash(map, name), *named = names_slot(map, half, names, name, hash);

	if (*named != 0)
		return mistake_is(m, "the name '%.*s' is used twice; rename one of them", (int)name.n, name.p);
	for (slot = keys_slot(map, row.digest, h->mask); index[slot] != 0; slot = (slot + 1) & h->mask) {
		const struct key_row *other = &rows[index[slot] - 1];
		if (equal_constant_time(other->digest, row.digest, 32))
			return mistake_is(m, "'%.*s' has the same secret as '%.*s'; give it another", (int)name.n, name.p,
			    (int)other->name_len, keys_text(map, half) + other->name_at);
	}
	row.name_at = h->text;
	memcpy(keys_text(map, half) + h->text, name.p, name.n);
	h->text += (uint32_t)name.n;
	rows[h->count++] = row;
	index[slot] = h->count;
	*named = hash << 32 | h->count;
	return true;
}

/* An upper bound for the keys of a file and TINYAUTH_KEY: its lines, and one. */
static uint64_t
keys_bound(struct slice text)
{
	uint64_t n = 1;

	for (; text.n > 0; n++)
		text_line(&text);
	return n;
}

/* Lines that hold something. */
static uint64_t
keys_count(struct slice text)
{
	uint64_t n = 0;

	while (text.n > 0) {
		struct slice line = text_line(&text);
		n += line_field(&line).n > 0;
	}
	return n;
}

/* Reads a file's text into the half that is not published. False: there were complaints, and nothing may be published.
 * `bound`: as keys_bound() of the text, for which the mapping must have room. */
static bool
keys_parse(struct keys_map *map, struct slice text, uint64_t bound, const struct config *cfg, struct complaints *bad)
{
	unsigned half = (atomic_load(&map->generation) + 1) & 1;
	uint64_t slots = keys_slots(bound), before = bad->n;
	struct keys_half *h = &map->half[half];
	struct mistake m;
	struct key_row row;

	*h = (struct keys_half){.mask = (uint32_t)slots - 1};
	map_touch(keys_rows(map, half), slots / 4 * sizeof(struct key_row));
	map_touch(keys_index(map, half), slots * sizeof(uint32_t));
	memset(keys_index(map, half), 0, slots * sizeof(uint32_t));
	uint64_t *names = map_try(slots * sizeof *names, MAP_PRIVATE);
	if (names == NULL) {
		complain(bad, 0, "no memory to read it");
		return false;
	}
	map_touch(names, slots * sizeof *names);
	if (cfg->env_key) {
		row = (struct key_row){.name_len = 3};
		memcpy(row.digest, cfg->env_digest, sizeof row.digest);
		keys_insert(map, half, names, row, S("env"), &m);
	}
	for (uint64_t number = 1; text.n > 0; number++) {
		struct slice line = text_line(&text), name = line_field(&line);
		if (name.n == 0)
			continue;
		if (!key_line(name, line, &row, &m) || !keys_insert(map, half, names, row, name, &m))
			complain(bad, number, "%s", m.text);
	}
	munmap(names, slots * sizeof *names);
	if (h->count == 0 && bad->n == before)
		complain(bad, 0, "holds no key; make one with 'tinyauth key add NAME'");
	return bad->n == before;
}

/* Makes the half that was just written the one that holds. Readers of the other one notice and look again. */
static void
keys_flip(struct keys_map *map)
{
	atomic_thread_fence(memory_order_release);
	atomic_fetch_add_explicit(&map->generation, 1, memory_order_acq_rel);
	atomic_thread_fence(memory_order_seq_cst);   /* nothing of the next writing comes before it */
}

static bool
keys_read(const char *path, struct file *f, struct complaints *bad)
{
	errno = 0;
	const char *why = file_read(path, KEYS_FILE_MAX, f);

	if (why != NULL && (f->opened || errno != ENOENT))
		complain(bad, 0, "cannot be read: %s", why);
	else if (why != NULL)
		complain(bad, 0, "cannot be read: %s; make it with 'tinyauth key add NAME --keys %s', or name another", why, path);
	return why == NULL;
}

/* True when somebody else may read plain secrets. */
static bool
keys_exposed(const struct file *f)
{
	struct slice text = {f->p, f->n};

	if ((f->st.st_mode & S_IROTH) == 0)
		return false;
	while (text.n > 0) {
		struct slice line = text_line(&text), name = line_field(&line), secret = line_field(&line);
		if (name.n > 0 && secret.n > 0 && !secret_hashed(secret))
			return true;
	}
	return false;
}

static void
keys_warn_exposed(const struct file *f, const char *path)
{
	if (keys_exposed(f) && words_fit(STDERR_FILENO))
		say(STDERR_FILENO, "tinyauth: %s: holds plain secrets and everybody can read it; chmod 600 it\n", path);
}

/* A fresh key table with room for at least `rows` keys, or NULL; *fd is its memfd, or -1 when it is anonymous. */
static struct keys_map *
keys_new(uint64_t rows, size_t *size, int *fd)
{
	uint64_t capacity = rows > KEYS_MIN ? rows : KEYS_MIN, slots = keys_slots(capacity);
	struct keys_map *map;

	*size = keys_map_size(capacity, slots);
	if ((map = map_shared("tinyauth-keys", *size, false, fd)) == NULL)
		return NULL;
	map->capacity = (uint32_t)capacity;
	map->slots = (uint32_t)slots;
	random_fill(&map->salt, sizeof map->salt);
	map->salt |= 1;
	map->magic = KEYS_MAGIC;
	return map;
}

/* ============================================================================================================= *
 * TABLE
 * Owns: the shared mapping, anonymous or in --state's file: rates and open connections by address, who has room, which of an
 *       upstream's addresses could not be reached; later in-flight counts and usage. The mapping of TLS sessions
 * Calls: BASICS
 * Promises: a process killed anywhere leaves it usable; an address is limited across all workers
 * Never: takes a lock while serving: those on --state's file guard its beginning, and tell which rows have a process
 * ============================================================================================================= */

/* The table of this process. What the mapping says of itself is not believed later on: every worker can write to it. */
static struct {
	uint32_t rows, conns;
	uint64_t size;
} geometry;

/* In 64 bits also where an address has 32: a size that wraps must not pass for another. */
static uint64_t
table_size(uint64_t rows, uint64_t conns)
{
	return sizeof(struct table) + rows * (sizeof(struct conn_row) + conns * sizeof(uint64_t));
}

static void
table_believe(const struct table *t)
{
	geometry.rows = t->rows;
	geometry.conns = t->conns;
	geometry.size = t->size;
}

static void
table_begin(struct table *t, uint64_t rows, uint64_t conns)
{
	random_fill(t->seed, sizeof t->seed);
	t->size = table_size(rows, conns);
	t->rows = (uint32_t)rows;
	t->conns = (uint32_t)conns;
	t->magic = TABLE_MAGIC;
	table_believe(t);
}

static struct table *
table_new(uint64_t rows, uint64_t conns, int *fd)
{
	uint64_t size = table_size(rows, conns);

	errno = ENOMEM;                      /* when no address is as large */
	struct table *t = size <= SIZE_MAX ? map_shared("tinyauth-table", (size_t)size, false, fd) : NULL;

	if (t == NULL)
		die(EXIT_FAILURE, "cannot map the shared table: %s; lower --max-conns or --workers", strerror(errno));
	table_begin(t, rows, conns);
	return t;
}

/* The table that lies in an open file of `size` bytes, when it is one, is whole and has this much room. */
static struct table *
table_in_file(int fd, size_t size, uint64_t rows, uint64_t conns)
{
	struct table *t;

	if (size < sizeof *t || (t = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED)
		return NULL;
	table_believe(t);
	if (t->magic == TABLE_MAGIC && geometry.size == size && geometry.rows >= rows && geometry.rows <= ROWS_MAX &&
	    geometry.conns >= conns && geometry.conns <= CONNS_MAX && table_size(geometry.rows, geometry.conns) == size)
		return t;
	munmap(t, size);
	return NULL;
}

/* A fresh file gives back what it got. */
static struct table *
table_no_room(const char *path, int fd, bool fresh, struct mistake *m)
{
	int error = errno;

	if (fresh && ftruncate(fd, 0) != 0)
		error = errno;
	mistake_is(m, "%s: no room for the shared table: %s; make room, or name another file with --state", path, strerror(error));
	return NULL;
}

/* The table in a file, which others may use at the same time: with `least` rows or more, a new one with `rows`. One that is
 * broken, of another version or too small is set aside as FILE.old, and *aside tells. NULL: `m` says why there is none. */
static struct table *
table_open(const char *path, uint64_t least, uint64_t rows, uint64_t conns, int *fd, bool *aside, struct mistake *m)
{
	char old[PATH_MAX];
	struct stat st, named;
	struct table *t;

	*aside = false;
	for (;;) {
		*fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NOFOLLOW, 0600);
		if (*fd < 0 || flock(*fd, LOCK_EX) != 0 || fstat(*fd, &st) != 0) {   /* held while it is looked at or begun */
			mistake_is(m, "%s: cannot be opened for the shared table: %s; name another with --state", path, strerror(errno));
			return NULL;
		}
		if (!S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 022) != 0 || st.st_nlink > 1) {
			mistake_is(m, "%s: is not a file that this user alone can write; name another with --state", path);
			return NULL;
		}
		bool same = stat(path, &named) == 0 && stat_same(&named, &st);
		if (same && (t = table_in_file(*fd, (size_t)st.st_size, least, conns)) != NULL) {
			if (!file_allocate(*fd, &st, (size_t)st.st_size))
				return table_no_room(path, *fd, false, m);
			break;
		}
		text_print(old, sizeof old, "%s.old", path);
		if (same && st.st_size > 0) {
			*aside = true;
			if (rename(path, old) != 0) {
				mistake_is(m, "%s: holds no table, and cannot be set aside: %s; remove it", path, strerror(errno));
				return NULL;
			}
		} else if (same) {
			uint64_t size = table_size(rows, conns);
			errno = ENOMEM;
			if (size > SIZE_MAX || !file_allocate(*fd, &st, (size_t)size) ||
			    (t = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0)) == MAP_FAILED)
				return table_no_room(path, *fd, true, m);
			table_begin(t, rows, conns);
			break;
		}
		close(*fd);
	}
	flock(*fd, LOCK_UN);
	return t;
}

static struct conn_row *
table_row(struct table *t, uint32_t number)
{
	return (struct conn_row *)(t + 1) + number;
}

/* The open connections of one worker: the identity of the client address of each, 0 where there is none. They stand behind
 * all rows, so that looking at every row touches few pages. */
static _Atomic uint64_t *
table_held(struct table *t, const struct conn_row *row)
{
	return (_Atomic uint64_t *)table_row(t, geometry.rows) + (size_t)(row - table_row(t, 0)) * geometry.conns;
}

/* Gives back what a worker held, however it ended. */
static void
table_row_give(struct table *t, struct conn_row *row)
{
	uint32_t used = atomic_load(&row->used);

	for (uint32_t i = 0; i < used && i < geometry.conns; i++)
		atomic_store_explicit(&table_held(t, row)[i], 0, memory_order_relaxed);
	row->used = row->room = 0;
	atomic_store(&row->requests, 0);
	atomic_store(&row->taken, 0);
}

/* A row of a table in a file is that of the process that holds a lock on the byte of its number: not to wait for, but
 * because the kernel takes it back when the process ends, however it ends. Elsewhere, where fd is -1, the supervisor sees that. */
static bool
table_lock(int fd, uint32_t row, short type)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)row, .l_len = 1};

	return fd < 0 || fcntl(fd, F_SETLK, &lock) == 0;
}

/* Gives back the rows of process `gone`, 0: of all that are gone. One that lives has its lock. */
static void
table_recover(struct table *t, int fd, uint32_t gone)
{
	for (uint32_t i = 0; i < geometry.rows; i++) {
		struct conn_row *row = table_row(t, i);
		uint32_t pid = atomic_load(&row->taken);
		if (pid == 0 || (gone != 0 && pid != gone) || !table_lock(fd, i, F_WRLCK))
			continue;
		if (atomic_compare_exchange_strong(&row->taken, &pid, (uint32_t)getpid()))
			table_row_give(t, row);
		table_lock(fd, i, F_UNLCK);
	}
}

/* A row that nobody has, now this process's and, by its lock, to be seen as such; NULL: all are taken. The lock comes first,
 * or somebody who looks between the two would think its process gone. */
static struct conn_row *
table_row_take(struct table *t, int fd)
{
	for (uint32_t i = 0; i < geometry.rows; i++) {
		struct conn_row *row = table_row(t, i);
		uint32_t nobody = 0;
		if (atomic_load(&row->taken) != 0 || !table_lock(fd, i, F_WRLCK))
			continue;
		if (atomic_compare_exchange_strong(&row->taken, &nobody, (uint32_t)getpid()))
			return row;
		table_lock(fd, i, F_UNLCK);
	}
	return NULL;
}

/* Adds to a counter that only this process writes, so that nothing has to be locked. */
static void
count_up(_Atomic uint64_t *counter, uint64_t n)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

/* How many connections of an address are open in all workers; counting ends at `enough`. */
static uint64_t
table_connections(struct table *t, uint64_t id, uint64_t enough)
{
	uint64_t n = 0;

	for (uint32_t number = 0; number < geometry.rows; number++) {
		struct conn_row *row = table_row(t, number);
		uint32_t used = atomic_load_explicit(&row->used, memory_order_relaxed);
		for (uint32_t i = 0; i < used && i < geometry.conns && n < enough; i++)
			n += atomic_load_explicit(&table_held(t, row)[i], memory_order_relaxed) == id;
	}
	return n;
}

/* Identity of a client address: IPv4 whole, IPv6 by its /64, all peers of a unix socket one. Never 0. */
static uint64_t
table_address_id(const struct table *t, const struct sockaddr_storage *ss)
{
	uint64_t word[2] = {0, 0};

	if (ss->ss_family == AF_INET) {
		word[0] = 4;
		word[1] = ((const struct sockaddr_in *)ss)->sin_addr.s_addr;
	} else if (ss->ss_family == AF_INET6) {
		const struct in6_addr *a = &((const struct sockaddr_in6 *)ss)->sin6_addr;
		uint32_t v4;
		word[0] = 6;
		memcpy(&word[1], a, sizeof word[1]);
		if (IN6_IS_ADDR_V4MAPPED(a)) {
			memcpy(&v4, a->s6_addr + 12, sizeof v4);
			word[0] = 4;
			word[1] = v4;
		}
	}
	return hash_keyed(t->seed, word) | 1;
}

/* A time of the table, when one up to `latest` can have been written by a clock that runs still; else it is of a clock before a
 * reboot, and long past. */
static uint64_t
table_time(const _Atomic uint64_t *ns, uint64_t latest)
{
	uint64_t time = atomic_load_explicit(ns, memory_order_relaxed);

	return time <= latest ? time : 0;
}

/* The slot of an identity: its own, or a free one, or the one whose time lies furthest back. */
static struct rate_slot *
table_slot(struct rate_slot *set, uint64_t id, uint64_t latest)
{
	for (;;) {
		struct rate_slot *oldest = &set[0];
		for (size_t i = 0; i < RATE_WAYS; i++) {
			if (atomic_load_explicit(&set[i].id, memory_order_relaxed) == id)
				return &set[i];
			if (table_time(&set[i].tat_ns, latest) < table_time(&oldest->tat_ns, latest))
				oldest = &set[i];
		}
		uint64_t evicted = atomic_load_explicit(&oldest->id, memory_order_relaxed);
		if (!atomic_compare_exchange_strong(&oldest->id, &evicted, id))
			continue;
		/* Of two processes that bring in the same address at once, one may get a second slot: it ages out. */
		atomic_store_explicit(&oldest->tat_ns, 0, memory_order_relaxed);
		return oldest;
	}
}

/* GCRA: takes one request from an identity's allowance. 0, or how many ns until the next one passes. */
static uint64_t
table_take(struct table *t, uint64_t id, const struct rate *rate, uint64_t now_ns)
{
	uint64_t interval = rate->interval_ns, reach = interval * rate->burst, tat, next;

	if (interval == 0)
		return 0;
	uint64_t latest = now_ns + reach + interval + CLOCK_SKEW_MS * NS_PER_MS;
	struct rate_slot *slot = table_slot(t->address[id >> 32 & (RATE_SETS - 1)], id, latest);
	tat = atomic_load_explicit(&slot->tat_ns, memory_order_relaxed);
	do {
		uint64_t from = tat > now_ns && tat <= latest ? tat : now_ns;
		if (from - now_ns > reach)
			return from - now_ns - reach;
		next = from + interval;
	} while (!atomic_compare_exchange_weak_explicit(&slot->tat_ns, &tat, next, memory_order_relaxed, memory_order_relaxed));
	return 0;
}

/* ---- what became of an upstream's addresses ------------------------------------------------------------------ */

static uint64_t
fate_id(const struct table *t, const struct addr *a)
{
	uint64_t word[2] = {a->ss.ss_family, 0xcbf29ce484222325ull};

	for (const char *c = a->text; *c != '\0'; c++)
		word[1] = (word[1] ^ (unsigned char)*c) * 0x100000001b3ull;
	return hash_keyed(t->seed, word) | 1;
}

static struct fate_slot *
fate_find(struct table *t, uint64_t id)
{
	for (size_t i = 0; i < FATES; i++)
		if (atomic_load_explicit(&t->fate[i].id, memory_order_relaxed) == id)
			return &t->fate[i];
	return NULL;
}

/* Was this address out of reach a short while ago? Then others go first. After its rest the first who asks may try it; to the
 * others it rests until that one knows. */
static bool
fate_rests(struct table *t, const struct addr *a, uint64_t now_ns)
{
	struct fate_slot *slot = fate_find(t, fate_id(t, a));
	uint64_t failed_ns = slot == NULL ? 0 : atomic_load_explicit(&slot->failed_ns, memory_order_relaxed);

	if (failed_ns == 0)
		return false;
	if (failed_ns <= now_ns + CLOCK_SKEW_MS * NS_PER_MS && now_ns < failed_ns + FATE_REST_MS * NS_PER_MS)
		return true;
	return !atomic_compare_exchange_strong(&slot->failed_ns, &failed_ns, now_ns);
}

/* It cannot be reached. Takes the place of what is oldest. */
static void
fate_failed(struct table *t, const struct addr *a, uint64_t now_ns)
{
	uint64_t id = fate_id(t, a);
	struct fate_slot *slot = fate_find(t, id), *oldest = t->fate;

	for (size_t i = 1; slot == NULL && i < FATES; i++)
		if (table_time(&t->fate[i].failed_ns, now_ns) < table_time(&oldest->failed_ns, now_ns))
			oldest = &t->fate[i];
	if (slot == NULL)
		atomic_store_explicit(&(slot = oldest)->id, id, memory_order_relaxed);
	atomic_store_explicit(&slot->failed_ns, now_ns, memory_order_relaxed);
}

/* It was reached. */
static void
fate_reached(struct table *t, const struct addr *a)
{
	struct fate_slot *slot = fate_find(t, fate_id(t, a));

	if (slot != NULL && atomic_load_explicit(&slot->failed_ns, memory_order_relaxed) != 0)
		atomic_store_explicit(&slot->failed_ns, 0, memory_order_relaxed);
}

/* Are there other workers of this server that have room for a connection? *events: what they have done ever. */
static bool
table_room_elsewhere(struct table *t, const struct conn_row *own, uint32_t server, uint64_t *events)
{
	bool found = false;

	*events = 0;
	for (uint32_t i = 0; i < geometry.rows && server != 0; i++) {
		struct conn_row *row = table_row(t, i);
		if (row == own || atomic_load(&row->taken) == 0 || atomic_load(&row->room) != server)
			continue;
		found = true;
		*events += atomic_load_explicit(&row->events, memory_order_relaxed);
	}
	return found;
}

/* ---- TLS sessions -------------------------------------------------------------------------------------------- */

static struct sessions *
sessions_new(int *fd)
{
	struct sessions *t = map_shared("tinyauth-sessions", sizeof *t, true, fd);

	if (t == NULL)
		die(EXIT_FAILURE, "cannot map the TLS session cache: %s", strerror(errno));
	madvise(t, sizeof *t, MADV_DONTDUMP);
	random_fill(t->seed, sizeof t->seed);
	t->magic = SESSIONS_MAGIC;
	return t;
}

/* Sessions of another key than this one are gone from now on. A fresh mapping has none. */
static void
sessions_begin(struct sessions *t, uint64_t epoch)
{
	uint64_t before = atomic_load(&t->epoch);

	if (before != epoch && before != 0)
		wipe(t->slot, sizeof t->slot);
	atomic_store(&t->epoch, epoch);
}

static uint64_t
session_seal(const struct sessions *t, uint64_t epoch, const uint64_t word[SESSION_WORDS], uint64_t born_ms)
{
	uint64_t pair[2] = {epoch, born_ms};

	for (size_t i = 0; i < SESSION_WORDS; i++) {
		pair[0] = hash_keyed(t->seed, pair);
		pair[1] = word[i];
	}
	return hash_keyed(t->seed, pair);
}

static struct session_slot *
session_set(struct sessions *t, const uint64_t id[SESSION_ID_WORDS])
{
	return t->slot[hash_keyed(t->seed, id) & (SESSION_SETS - 1)];
}

/* Keeps a session, in place of the oldest of its set. */
static void
sessions_put(struct sessions *t, uint64_t epoch, const uint64_t word[SESSION_WORDS], uint64_t now_ms)
{
	struct session_slot *set = session_set(t, word), *slot = set;

	for (size_t i = 1; i < SESSION_WAYS; i++)
		if (atomic_load_explicit(&set[i].born_ms, memory_order_relaxed) <
		    atomic_load_explicit(&slot->born_ms, memory_order_relaxed))
			slot = &set[i];
	atomic_store_explicit(&slot->born_ms, now_ms, memory_order_relaxed);
	for (size_t i = 0; i < SESSION_WORDS; i++)
		atomic_store_explicit(&slot->word[i], word[i], memory_order_relaxed);
	atomic_store_explicit(&slot->seal, session_seal(t, epoch, word, now_ms), memory_order_release);
}

/* Finds the session whose id `word` begins with, and fills in the rest of it. */
static bool
sessions_get(struct sessions *t, uint64_t epoch, uint64_t word[SESSION_WORDS], uint64_t now_ms)
{
	struct session_slot *set = session_set(t, word);
	uint64_t copy[SESSION_WORDS];
	bool found = false;

	for (size_t i = 0; i < SESSION_WAYS && !found; i++) {
		uint64_t seal = atomic_load_explicit(&set[i].seal, memory_order_acquire);
		uint64_t born_ms = atomic_load_explicit(&set[i].born_ms, memory_order_relaxed);
		for (size_t k = 0; k < SESSION_WORDS; k++)
			copy[k] = atomic_load_explicit(&set[i].word[k], memory_order_relaxed);
		found = born_ms != 0 && born_ms <= now_ms && now_ms - born_ms < SESSION_MS &&
		        memcmp(copy, word, SESSION_ID_WORDS * sizeof *copy) == 0 && session_seal(t, epoch, copy, born_ms) == seal;
	}
	if (found)
		memcpy(word, copy, sizeof copy);
	wipe(copy, sizeof copy);
	return found;
}

/* ============================================================================================================= *
 * HTTP
 * Owns: head parser, head rewriter, body framing, error bodies, PROXY headers, where in a head the credential stands.
 *       Numbers such as [r8] are the rules of the manual's list "what is taken and what is refused"
 * Calls: BASICS, CONFIG (addresses, trusted networks)
 * Promises: pure functions over the bytes they are given; what two parsers could read differently is refused at the
 *           first byte that shows it; whole input and the same input byte by byte end alike
 * Never: sees a descriptor, a clock or the key table
 * ============================================================================================================= */

enum { C_TOKEN = 1, C_VALUE = 2, C_TARGET = 4, C_HOST = 8, C_UPPER = 16 };

/* What a byte may be part of: a token [RFC 9110 5.6.2], a field value [5.5], a target, a reg-name [RFC 3986 3.2.2], a
 * method as we take it. */
static const uint8_t CLASS[256] = {
	['\t'] = C_VALUE, [' '] = C_VALUE,
	['!'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST, ['"'] = C_VALUE | C_TARGET,
	['#'] = C_TOKEN | C_VALUE, ['$'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST,
	['%'] = C_TOKEN | C_VALUE | C_TARGET, ['&' ... '\''] = C_TOKEN | C_VALUE | C_TARGET | C_HOST,
	['(' ... ')'] = C_VALUE | C_TARGET | C_HOST, ['*' ... '+'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST,
	[','] = C_VALUE | C_TARGET, ['-'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST | C_UPPER,
	['.'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST, ['/'] = C_VALUE | C_TARGET,
	['0' ... '9'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST, [':'] = C_VALUE | C_TARGET,
	[';'] = C_VALUE | C_TARGET | C_HOST, ['<'] = C_VALUE | C_TARGET, ['='] = C_VALUE | C_TARGET | C_HOST,
	['>' ... '@'] = C_VALUE | C_TARGET, ['A' ... 'Z'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST | C_UPPER,
	['[' ... ']'] = C_VALUE | C_TARGET, ['^'] = C_TOKEN | C_VALUE | C_TARGET,
	['_'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST, ['`'] = C_TOKEN | C_VALUE | C_TARGET,
	['a' ... 'z'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST, ['{'] = C_VALUE | C_TARGET,
	['|'] = C_TOKEN | C_VALUE | C_TARGET, ['}'] = C_VALUE | C_TARGET,
	['~'] = C_TOKEN | C_VALUE | C_TARGET | C_HOST, [0x80 ... 0xff] = C_VALUE,
};

static bool
is_class(char c, int class)
{
	return (CLASS[(unsigned char)c] & class) != 0;
}

/* Names that mean something to us, in the order of their first letters; those that end in `-` are prefixes. */
static const struct field_name {
	uint8_t id, n;
	char name[22];
} FIELD_NAMES[] = {
#define NAME(text, id) {id, sizeof(text) - 1, text}
	NAME("authorization", F_AUTHORIZATION), NAME("api-key", F_API_KEY), NAME("anthropic-version", F_ANTHROPIC_VERSION),
	NAME("connection", F_CONNECTION), NAME("content-length", F_CONTENT_LENGTH), NAME("content-type", F_CONTENT_TYPE),
	NAME("content-location", F_LOCATION), NAME("expect", F_EXPECT), NAME("forwarded", F_FORWARDED), NAME("host", F_HOST),
	NAME("http2-settings", F_HOP), NAME("keep-alive", F_HOP), NAME("location", F_LOCATION), NAME("origin", F_ORIGIN),
	NAME("proxy-", F_HOP), NAME("sec-fetch-mode", F_SEC_FETCH_MODE), {F_WS_PROTOCOL, 22, "sec-websocket-protocol"},
	NAME("te", F_HOP), NAME("trailer", F_HOP), NAME("transfer-encoding", F_TRANSFER_ENCODING),
	NAME("true-client-ip", F_FORWARDED), NAME("upgrade", F_UPGRADE), NAME("x-api-key", F_X_API_KEY),
	NAME("x-client-ip", F_FORWARDED), NAME("x-cluster-client-ip", F_FORWARDED), NAME("x-forwarded-", F_FORWARDED),
	NAME("x-real-ip", F_FORWARDED), NAME("x-request-id", F_X_REQUEST_ID), NAME("x-accel-buffering", F_X_ACCEL_BUFFERING),
#undef NAME
};

/* Where the names with this first letter begin, and one more; 0: there are none. */
static const uint8_t FIELD_FIRST['z' - 'a' + 1] = {['a' - 'a'] = 1, ['c' - 'a'] = 4, ['e' - 'a'] = 8, ['f' - 'a'] = 9, ['h' - 'a'] = 10,
	['k' - 'a'] = 12, ['l' - 'a'] = 13, ['o' - 'a'] = 14, ['p' - 'a'] = 15, ['s' - 'a'] = 16, ['t' - 'a'] = 18, ['u' - 'a'] = 22,
	['x' - 'a'] = 23};

static enum field_id
field_identify(struct slice name)
{
	const char first = ascii_lower(name.p[0]);
	size_t at = first >= 'a' && first <= 'z' ? FIELD_FIRST[first - 'a'] : 0;
	const struct field_name *f = at > 0 ? FIELD_NAMES + at - 1 : FIELD_NAMES + LENGTH(FIELD_NAMES);

	for (const struct field_name *end = FIELD_NAMES + LENGTH(FIELD_NAMES); f < end && f->name[0] == first; f++) {
		struct slice known = {f->name, f->n};
		if (known.p[known.n - 1] == '-' ? slice_starts_like(name, known) : slice_like(name, known))
			return f->id;
	}
	return memchr(name.p, '_', name.n) != NULL ? F_UNDERSCORE : F_OTHER;
}

/* A parser's result: bytes taken (> 0), MORE, or a negative HTTP status with `why` set. */
enum { MORE = 0 };

static int
head_bad(struct head *h, int status, const char *why)
{
	h->why = why;
	return -status;
}

/* Where a parser stands in its input. */
struct cursor {
	const char *p, *end;
};

/* CR LF, or a start of it. [r2] */
static int
head_line_end(struct head *h, struct cursor *c)
{
	if (c->p == c->end)
		return MORE;
	if (c->p[0] != '\r')
		return head_bad(h, 400, "a line of the head does not end with CR LF");
	if (c->p + 1 == c->end)
		return MORE;
	if (c->p[1] != '\n')
		return head_bad(h, 400, "a CR in the head has no LF behind it");
	c->p += 2;
	return 1;
}

/* [r3] */
static int
head_method(struct head *h, struct cursor *c)
{
	const char *from = c->p;

	for (; c->p < c->end && *c->p != ' '; c->p++) {
		if (!is_class(*c->p, C_TOKEN))
			return head_bad(h, 400, "the method holds a byte that no method has");
		if (!is_class(*c->p, C_UPPER) || c->p - from == METHOD_MAX)
			return head_bad(h, 501, "the method is not known: methods are up to 32 of A-Z and -");
	}
	if (c->p == c->end)
		return MORE;
	h->method = (struct slice){from, (size_t)(c->p - from)};
	if (h->method.n == 0)
		return head_bad(h, 400, "the request line has no method");
	if (slice_equal(h->method, S("CONNECT")) || slice_equal(h->method, S("TRACE")) || slice_equal(h->method, S("TRACK")))
		return head_bad(h, 405, "CONNECT, TRACE and TRACK are not served");
	c->p++;
	return 1;
}

/* A port: up to five digits, at most 65535. */
static bool
port_good(struct slice port)
{
	uint64_t n = 0;

	return port.n == 0 || (port.n <= 5 && number_read(port, &n) && n <= 65535);
}

/* `[` IPv6 `]` without a zone. */
static bool
host_literal_good(struct slice literal)
{
	char text[INET6_ADDRSTRLEN];
	struct in6_addr a;

	if (literal.n < 4 || literal.n - 2 >= sizeof text || literal.p[literal.n - 1] != ']')
		return false;
	memcpy(text, literal.p + 1, literal.n - 2);
	text[literal.n - 2] = '\0';
	return memchr(text, '\0', literal.n - 2) == NULL && inet_pton(AF_INET6, text, &a) == 1;
}

/* How far a reg-name goes [RFC 3986 3.2.2]; SIZE_MAX: a byte that none has. A percent sign that is not whole yet ends it. */
static size_t
host_name_length(struct slice host)
{
	size_t i = 0;

	while (i < host.n && host.p[i] != ':') {
		if (host.p[i] != '%' && !is_class(host.p[i], C_HOST))
			return SIZE_MAX;
		for (size_t digit = 1; host.p[i] == '%' && digit <= 2; digit++)
			if (i + digit == host.n)
				return i;
			else if (hex_value(host.p[i + digit]) < 0)
				return SIZE_MAX;
		i += host.p[i] == '%' ? 3 : 1;
	}
	return i > 0 || host.n == 0 ? i : SIZE_MAX;
}

/* Host, or an absolute target's authority: reg-name or [IPv6], and a port. When it is not `whole`: could it still become
 * one? [r10] */
static bool
host_good(struct slice host, bool whole)
{
	size_t n;

	if (host.n == 0)
		return !whole;
	if (host.p[0] == '[') {
		for (n = 1; n < host.n && host.p[n] != ']'; n++)
			if (hex_value(host.p[n]) < 0 && host.p[n] != ':' && host.p[n] != '.')
				return false;
		if (n == host.n)
			return !whole;
		if (!host_literal_good((struct slice){host.p, ++n}))
			return false;
	} else if ((n = host_name_length(host)) == SIZE_MAX)
		return false;
	if (n == host.n)
		return true;
	if (host.p[n] == '%')
		return !whole;
	return host.p[n] == ':' && port_good(slice_from(host, n + 1));
}

/* The byte of a path at `i`, percent-decoded once; `*used` says how many bytes it took. */
static unsigned char
path_byte(struct slice path, size_t i, size_t *used)
{
	*used = 1;
	if (path.p[i] != '%' || path.n - i < 3)
		return (unsigned char)path.p[i];
	*used = 3;
	return (unsigned char)(hex_value(path.p[i + 1]) << 4 | hex_value(path.p[i + 2]));
}

/* Does the decoded path equal `rule`, or begin with it when that ends in `*`? An odd path matches nothing. [r6] */
static bool
path_matches(const struct head *h, struct slice rule)
{
	size_t at = 0, used;

	if (h->path_odd)
		return false;
	for (size_t i = 0; i < rule.n; i++, at += used) {
		if (rule.p[i] == '*' && i + 1 == rule.n)
			return true;
		if (at == h->path.n || path_byte(h->path, at, &used) != (unsigned char)rule.p[i])
			return false;
	}
	return at == h->path.n;
}

/* Does the decoded path hold what servers normalise, each in its own way: `.` and `..` segments, `//`, `;`, encoded
 * slashes? [r6] */
static bool
path_is_odd(struct slice path)
{
	size_t segment = 0, dots = 0, used;

	for (size_t i = 0; i < path.n; i += used) {
		unsigned char c = path_byte(path, i, &used);
		if (c == ';' || (used == 3 && (c == '/' || c == '\\')))
			return true;
		if (c != '/') {
			segment++;
			dots += c == '.';
			continue;
		}
		if (i > 0 && (segment == 0 || (segment == dots && dots <= 2)))
			return true;
		segment = dots = 0;
	}
	return segment > 0 && segment == dots && dots <= 2;
}

/* A percent sign in a path: two hex digits, not of a control byte. 1, MORE, or the negative status. [r6] */
static int
head_percent(struct head *h, const char *p, const char *end)
{
	if (end - p > 1 && hex_value(p[1]) < 0)
		return head_bad(h, 400, "a % in the path is not followed by two hex digits");
	if (end - p < 3)
		return MORE;
	if (hex_value(p[2]) < 0)
		return head_bad(h, 400, "a % in the path is not followed by two hex digits");
	int byte = hex_value(p[1]) << 4 | hex_value(p[2]);
	if (byte < 0x20 || byte == 0x7f)
		return head_bad(h, 400, "the path holds an encoded control byte");
	return 1;
}

/* Bytes of an absolute-form target that stand before its path; 0: it is none. */
static size_t
target_scheme(struct slice target)
{
	if (slice_starts_like(target, S("http://")))
		return 7;
	return slice_starts_like(target, S("https://")) ? 8 : 0;
}

/* Could the target, as far as it is known, still become an absolute form? */
static bool
target_scheme_begins(struct slice target)
{
	static const struct slice SCHEME = {"https://", 8};
	size_t n = target.n < SCHEME.n ? target.n : SCHEME.n;

	if (target_scheme(target) > 0)
		return true;
	return slice_like((struct slice){target.p, n}, (struct slice){SCHEME.p, n}) ||
	       slice_like((struct slice){target.p, n < 7 ? n : 7}, (struct slice){"http://", n < 7 ? n : 7});
}

/* The authority of an absolute-form target; not `whole`, of what there is of one. */
static int
head_authority(struct head *h, size_t scheme, bool whole)
{
	struct slice rest = slice_from(h->target, scheme);
	size_t n = 0;

	while (n < rest.n && rest.p[n] != '/' && rest.p[n] != '?')
		n++;
	h->host = (struct slice){rest.p, n};
	return host_good(h->host, whole || n < rest.n) ? 1 : head_bad(h, 400, "the target's authority is not HOST or HOST:PORT");
}

/* The bytes of a target up to its blank, or to the first that must not be there. */
static int
head_target_bytes(struct head *h, struct cursor *c)
{
	const char *from = c->p, *query = NULL;

	for (; c->p < c->end && *c->p != ' '; c->p++) {
		h->target = (struct slice){from, (size_t)(c->p - from)};
		if (!is_class(*c->p, C_TARGET))
			return head_bad(h, 400, "the target holds a byte that no target has");
		if (c->p - from == TARGET_MAX)
			return head_bad(h, 414, "the target is longer than 8192 bytes");
		if (*c->p == '?' && query == NULL)
			query = c->p;
		if (query == NULL && *c->p == '\\')
			return head_bad(h, 400, "the path holds a backslash");
		int good = query == NULL && *c->p == '%' ? head_percent(h, c->p, c->end) : 1;
		if (good < 0)
			return good;
	}
	h->target = (struct slice){from, (size_t)(c->p - from)};
	return c->p == c->end ? MORE : 1;
}

/* origin-form, absolute-form, or `*` with OPTIONS; HTTP/2's preface gets as far as its version. [r5] */
static int
head_target(struct head *h, struct cursor *c)
{
	const char *from = c->p;
	int good = head_target_bytes(h, c);

	if (h->target.n == 0)
		return good == 1 ? head_bad(h, 400, "the request line has no target") : good;
	bool star = *from == '*' && h->target.n == 1 &&
	            (slice_equal(h->method, S("OPTIONS")) || slice_equal(h->method, S("PRI")));
	if (*from != '/' && !star && !target_scheme_begins(h->target))
		return head_bad(h, 400, "the target is neither a path nor an http URL");
	size_t scheme = target_scheme(h->target);
	if (scheme > 0 && head_authority(h, scheme, good == 1) < 0)
		return -400;
	if (good <= 0)               /* behind what the form refuses: the first bad byte decides */
		return good;
	if (*from != '/' && !star && scheme == 0)
		return head_bad(h, 400, "the target is neither a path nor an http URL");
	if (scheme > 0) {            /* on it goes in origin-form [r5] */
		h->target = slice_from(h->target, scheme + h->host.n);
		h->slash_missing = h->target.n == 0 || h->target.p[0] == '?';
	}
	const char *query = memchr(h->target.p, '?', h->target.n);
	h->path = query == NULL ? h->target : (struct slice){h->target.p, (size_t)(query - h->target.p)};
	if (h->slash_missing)
		h->path = S("/");
	h->path_odd = path_is_odd(h->path);
	c->p++;
	return 1;
}

/* `HTTP/1.0` or `HTTP/1.1`. [r4] */
static int
head_version(struct head *h, struct cursor *c)
{
	static const char START[] = "HTTP/";

	for (size_t i = 0; i < 8; i++) {
		if (c->p + i == c->end)
			return MORE;
		char byte = c->p[i];
		if (i < 5 ? byte != START[i] : i == 6 ? byte != '.' : !is_digit(byte))
			return head_bad(h, 400, "the HTTP version is not HTTP/1.1 or HTTP/1.0");
		if (i == 5 && byte != '1')
			return head_bad(h, 505, "this version of HTTP is not spoken here: use HTTP/1.1");
		if (i == 7 && byte > '1')
			return head_bad(h, 400, "the HTTP version is not HTTP/1.1 or HTTP/1.0");
	}
	h->minor = (uint8_t)(c->p[7] - '0');
	c->p += 8;
	return 1;
}

static int
head_request_line(struct head *h, struct cursor *c)
{
	int good;

	if ((good = head_method(h, c)) <= 0 || (good = head_target(h, c)) <= 0 || (good = head_version(h, c)) <= 0)
		return good;
	if (slice_equal(h->method, S("PRI")) && slice_equal(h->target, S("*")))
		return head_bad(h, 400, "a target of * goes with OPTIONS only");
	return head_line_end(h, c);
}

/* The status line; the reason and the blank before it may be missing. [r23] */
static int
head_status_line(struct head *h, struct cursor *c)
{
	const char *from;
	int good = head_version(h, c);

	if (good <= 0)
		return good;
	if (c->end - c->p < 4)
		return MORE;
	if (c->p[0] != ' ' || c->p[1] < '1' || c->p[1] > '9' || !is_digit(c->p[2]) || !is_digit(c->p[3]))
		return head_bad(h, 502, "the status is not a number of three digits");
	h->status = (c->p[1] - '0') * 100 + (c->p[2] - '0') * 10 + (c->p[3] - '0');
	c->p += 4;
	if (c->p < c->end && *c->p != ' ')
		return head_line_end(h, c);
	if (c->p < c->end)
		c->p++;
	for (from = c->p; c->p < c->end && is_class(*c->p, C_VALUE); c->p++)
		continue;
	h->reason = (struct slice){from, (size_t)(c->p - from)};
	return head_line_end(h, c);
}

/* `name ":" OWS value OWS CRLF`. [r8, r9] */
static int
head_field_line(struct head *h, struct cursor *c, struct field *f)
{
	const char *from = c->p, *to;

	if (*c->p == ' ' || *c->p == '\t')
		return head_bad(h, 400, "a line of the head begins with a blank");
	while (c->p < c->end && is_class(*c->p, C_TOKEN))
		c->p++;
	if (c->p == c->end)
		return MORE;
	if (*c->p != ':' || c->p == from)
		return head_bad(h, 400, "a field's name is empty or holds a byte that no name has");
	f->name = (struct slice){from, (size_t)(c->p - from)};
	for (c->p++; c->p < c->end && (*c->p == ' ' || *c->p == '\t'); c->p++)
		continue;
	for (from = c->p; c->p < c->end && is_class(*c->p, C_VALUE); c->p++)
		continue;
	for (to = c->p; to > from && (to[-1] == ' ' || to[-1] == '\t'); to--)
		continue;
	f->value = (struct slice){from, (size_t)(to - from)};
	if (c->p < c->end && *c->p != '\r')
		return head_bad(h, 400, "a field's value holds a control byte, or a line ends without CR");
	return head_line_end(h, c);
}

/* The next member of a comma-separated list without the blanks around it; false at the end. */
static bool
list_next(struct slice *list, struct slice *member)
{
	if (list->n == 0)
		return false;
	const char *comma = memchr(list->p, ',', list->n);
	*member = (struct slice){list->p, comma == NULL ? list->n : (size_t)(comma - list->p)};
	*list = slice_from(*list, member->n + (comma != NULL));
	while (member->n > 0 && (member->p[0] == ' ' || member->p[0] == '\t'))
		*member = slice_from(*member, 1);
	while (member->n > 0 && (member->p[member->n - 1] == ' ' || member->p[member->n - 1] == '\t'))
		member->n--;
	return true;
}

static bool
is_token(struct slice s)
{
	for (size_t i = 0; i < s.n; i++)
		if (!is_class(s.p[i], C_TOKEN))
			return false;
	return s.n > 0;
}

/* [r15] */
static int
field_connection(struct head *h, struct slice value)
{
	struct slice option;

	while (list_next(&value, &option)) {
		if (option.n == 0)
			continue;
		if (!is_token(option))
			return head_bad(h, 400, "Connection holds something that is not a name");
		if (slice_like(option, S("close")))
			h->close = true;
		else if (slice_like(option, S("keep-alive")))
			h->keep_alive = true;
		else if (slice_like(option, S("upgrade")))
			h->option_upgrade = true;
		else if (h->options == OPTIONS_NAMED_MAX)
			return head_bad(h, 431, "Connection names more than 32 fields");
		else
			h->option[h->options++] = option;
	}
	return 1;
}

/* [r11]; in a response identical repeats are one. [r25] */
static int
field_length(struct head *h, struct slice value, bool request)
{
	uint64_t n;

	if (!number_read(value, &n))
		return head_bad(h, 400, "Content-Length is not a number of 1 to 18 digits");
	if (h->has_length && (request || !slice_equal(value, h->length_text)))
		return head_bad(h, 400, "Content-Length is given twice");
	if (h->chunked)
		return head_bad(h, 400, "Content-Length and Transfer-Encoding are given together");
	h->has_length = true;
	h->length = n;
	h->length_text = value;
	return 1;
}

/* [r12] */
static int
field_transfer_encoding(struct head *h, struct slice value)
{
	static const struct slice CODINGS[] = {{"gzip", 4}, {"x-gzip", 6}, {"deflate", 7}, {"compress", 8}, {"x-compress", 10}};
	struct slice first = {value.p, 0};

	if (h->minor == 0)
		return head_bad(h, 400, "Transfer-Encoding is not part of HTTP/1.0");
	if (h->has_length)
		return head_bad(h, 400, "Content-Length and Transfer-Encoding are given together");
	if (h->chunked)
		return head_bad(h, 400, "Transfer-Encoding is given twice");
	if (slice_like(value, S("chunked"))) {
		h->chunked = true;
		return 1;
	}
	for (first.n = 0; first.n < value.n && is_class(value.p[first.n], C_TOKEN); first.n++)
		continue;
	for (size_t i = 0; i < LENGTH(CODINGS); i++)
		if (slice_like(first, CODINGS[i]))
			return head_bad(h, 501, "Transfer-Encoding: only chunked is spoken here");
	return head_bad(h, 400, "Transfer-Encoding is not chunked");
}

/* Keeps a credential; a second one of the same name is refused, empty or not. [r14] */
static int
field_credential(struct head *h, bool *has, struct slice *to, struct slice value)
{
	if (*has)
		return head_bad(h, 400, "a field that carries a key is given twice");
	*has = true;
	*to = value;
	return 1;
}

static int
field_request(struct head *h, const struct field *f)
{
	switch (f->id) {
	case F_HOST:
		if (h->has_host)
			return head_bad(h, 400, "Host is given twice");
		h->has_host = true;
		if (!host_good(f->value, true))
			return head_bad(h, 400, "Host is not HOST or HOST:PORT");
		if (h->host.n == 0)
			h->host = f->value;
		return 1;
	case F_CONTENT_LENGTH:
		return field_length(h, f->value, true);
	case F_TRANSFER_ENCODING:
		return field_transfer_encoding(h, f->value);
	case F_CONNECTION:
		return field_connection(h, f->value);
	case F_AUTHORIZATION:
		return field_credential(h, &h->has_authorization, &h->authorization, f->value);
	case F_X_API_KEY:
		return field_credential(h, &h->has_x_api_key, &h->x_api_key, f->value);
	case F_API_KEY:
		return field_credential(h, &h->has_api_key, &h->api_key, f->value);
	case F_EXPECT:
		if (!slice_like(f->value, S("100-continue")))
			return head_bad(h, 417, "Expect: only 100-continue can be met");
		h->expect_continue = true;
		return 1;
	case F_UPGRADE:
		h->upgrade_websocket = slice_like(f->value, S("websocket"));
		return 1;
	case F_X_REQUEST_ID:
		h->request_id = f->value;
		return 1;
	case F_ANTHROPIC_VERSION:
		h->anthropic = true;
		return 1;
	case F_SEC_FETCH_MODE:
		h->page = !slice_like(f->value, S("navigate"));
		return 1;
	case F_WS_PROTOCOL:
		h->ws_protocol = f->value;
		return 1;
	default:
		return 1;
	}
}

static int
field_response(struct head *h, const struct field *f)
{
	switch (f->id) {
	case F_CONTENT_LENGTH:
		return field_length(h, f->value, false);
	case F_TRANSFER_ENCODING:
		return field_transfer_encoding(h, f->value);
	case F_CONNECTION:
		return field_connection(h, f->value);
	case F_UPGRADE:
		h->upgrade_websocket = slice_like(f->value, S("websocket"));
		return 1;
	case F_CONTENT_TYPE:
		h->streams = slice_starts_like(f->value, S("text/event-stream")) || slice_starts_like(f->value, S("application/x-ndjson"));
		return 1;
	case F_X_ACCEL_BUFFERING:
		h->accel = true;
		return 1;
	default:
		return 1;
	}
}

/* Reads the fields up to the empty line. */
static int
head_fields(struct head *h, struct cursor *c, bool request)
{
	for (;;) {
		if (c->p == c->end)
			return MORE;
		if (*c->p == '\r')
			return head_line_end(h, c);
		struct field f;
		int good = head_field_line(h, c, &f);
		if (good <= 0)
			return good;
		if (h->fields == FIELDS_MAX)
			return head_bad(h, 431, "the head has more than 100 fields");
		f.id = field_identify(f.name);
		h->field[h->fields++] = f;
		good = request ? field_request(h, &f) : field_response(h, &f);
		if (good <= 0)
			return good;
	}
}

/* Everything but the field array, which is as long as `fields` says. */
static void
head_clear(struct head *h)
{
	memset(h, 0, offsetof(struct head, field));
	memset((char *)h + offsetof(struct head, length_text), 0, sizeof *h - offsetof(struct head, length_text));
}

/* Is this the beginning of a TLS hello instead of a request? [RFC 5246 6.2.1] */
static bool
head_is_tls(struct slice in)
{
	return in.n > 0 && in.p[0] == 0x16;
}

/* A limit that was passed outranks "more": the rest of such a head is not waited for. [r7] */
static int
head_limit(struct head *h, int good, size_t n, size_t max)
{
	return good == MORE && n >= max ? head_bad(h, 431, "the head is longer than its limit") : good;
}

/* Parses one request head at the start of `in`; what follows it is not looked at. [r22] Returns the bytes it takes, MORE, or a
 * negative status with h->why. */
static int
head_parse(struct head *h, struct slice in)
{
	struct cursor c = {in.p, in.p + (in.n < HEAD_MAX ? in.n : HEAD_MAX)};
	int good;

	head_clear(h);
	if (c.p < c.end && *c.p == '\r' && (good = head_line_end(h, &c)) <= 0)  /* one empty line is skipped [r1] */
		return good;
	if ((good = head_request_line(h, &c)) <= 0 || (good = head_fields(h, &c, true)) <= 0)
		return head_limit(h, good, in.n, HEAD_MAX);
	if (!h->has_host && h->minor == 1)
		return head_bad(h, 400, "Host is missing");
	return (int)(c.p - in.p);
}

/* Parses a response head likewise; every refusal is a 502. */
static int
answer_parse(struct head *h, struct slice in)
{
	struct cursor c = {in.p, in.p + (in.n < ANSWER_HEAD_MAX ? in.n : ANSWER_HEAD_MAX)};
	int good;

	head_clear(h);
	if ((good = head_status_line(h, &c)) <= 0 || (good = head_fields(h, &c, false)) <= 0)
		good = head_limit(h, good, in.n, ANSWER_HEAD_MAX);
	if (good < 0)
		return head_bad(h, 502, h->why);
	return good == MORE ? MORE : (int)(c.p - in.p);
}

/* Did the request ask for a WebSocket in the one way that is let through? [r16] */
static bool
head_upgrades(const struct head *h)
{
	return h->upgrade_websocket && h->option_upgrade && h->minor == 1 && slice_equal(h->method, S("GET")) &&
	       !h->chunked && (!h->has_length || h->length == 0);
}

/* What remains of the request when its head was taken. [r13] */
static struct body
head_body(const struct head *h)
{
	struct body b = {.kind = h->chunked ? BODY_CHUNKED : h->length > 0 ? BODY_LENGTH : BODY_NONE, .left = h->length};

	if (h->chunked)
		b.left = 0;
	b.done = b.kind == BODY_NONE;
	return b;
}

/* ---- bodies -------------------------------------------------------------------------------------------------- */

/* Where a chunked body stands. [r19] */
enum chunk_state {
	K_SIZE, K_EXT_NAME_FIRST, K_EXT_NAME, K_EXT_VALUE_FIRST, K_EXT_VALUE, K_EXT_QUOTED, K_EXT_ESCAPED, K_EXT_QUOTED_END, K_BLANK,
	K_SIZE_LF, K_DATA, K_DATA_CR, K_DATA_LF,
	K_TRAILER_FIRST, K_TRAILER_NAME, K_TRAILER_VALUE, K_TRAILER_LF, K_END_LF,
	K_BROKEN
};

/* Bytes of our own chunk line or end that stand for input which an earlier call took without writing anything: the
 * output starts so far before the input, and canonical input needs no moving. */
static size_t
chunk_owed(const struct body *b)
{
	char line[16];

	if (b->form != FORM_SAME)
		return 0;
	if (b->state == K_DATA_LF)
		return 1;
	if (b->state == K_END_LF)
		return 4;
	if (b->state >= K_TRAILER_FIRST)
		return 3;
	if (b->state >= K_DATA || b->digits == 0)
		return 0;
	return hex_write(line, b->left) + (b->state == K_SIZE_LF);
}

/* A blank in the chunk line of an answer: behind the size, and around the `;` and `=` of extensions. [r26] */
static bool
chunk_line_blank(struct body *b)
{
	bool waits = b->state == K_EXT_NAME_FIRST || b->state == K_EXT_VALUE_FIRST;

	if (!waits && b->state != K_BLANK && b->state != K_EXT_NAME && b->state != K_EXT_VALUE && b->state != K_EXT_QUOTED_END &&
	    !(b->state == K_SIZE && b->digits > 0))
		return false;
	if (!waits)
		b->state = K_BLANK;
	return true;
}

/* One byte of a chunk line: size and extensions. False: it must not be there. */
static bool
chunk_line_byte(struct body *b, char c)
{
	static const uint8_t QUOTED = K_EXT_QUOTED;
	int digit;

	if (b->state != K_SIZE && b->state != K_SIZE_LF &&
	    (++b->ext > CHUNK_EXT_MAX || (!b->answer && ++b->ext_body > CHUNK_EXT_BODY_MAX)))
		return false;
	if (b->answer && (c == ' ' || c == '\t') && chunk_line_blank(b))
		return true;
	switch (b->state) {
	case K_SIZE:
		if ((digit = hex_value(c)) >= 0) {
			b->left = b->left << 4 | (uint64_t)digit;
			return ++b->digits <= CHUNK_DIGITS_MAX;
		}
		b->state = c == ';' ? K_EXT_NAME_FIRST : K_SIZE_LF;
		return b->digits > 0 && (c == ';' || c == '\r');
	case K_EXT_NAME_FIRST:
		b->state = K_EXT_NAME;
		return is_class(c, C_TOKEN);
	case K_EXT_VALUE_FIRST:
		b->state = c == '"' ? QUOTED : K_EXT_VALUE;
		return c == '"' || is_class(c, C_TOKEN);
	case K_EXT_QUOTED:
		b->state = c == '"' ? K_EXT_QUOTED_END : c == '\\' ? K_EXT_ESCAPED : QUOTED;
		return is_class(c, C_VALUE);
	case K_EXT_ESCAPED:
		b->state = QUOTED;
		return is_class(c, C_VALUE);
	case K_EXT_NAME:
	case K_EXT_VALUE:
		if (is_class(c, C_TOKEN))
			return true;
		/* fall through */
	case K_EXT_QUOTED_END:
	case K_BLANK:
		if (c == '=' && (b->state == K_EXT_NAME || (b->state == K_BLANK && b->ext > 1)))
			b->state = K_EXT_VALUE_FIRST;
		else
			b->state = c == ';' ? K_EXT_NAME_FIRST : K_SIZE_LF;
		return c == '=' ? b->state == K_EXT_VALUE_FIRST : c == ';' || c == '\r';
	default:
		return c == '\n';    /* K_SIZE_LF; the caller goes on to the data */
	}
}

/* One byte of a trailer section: fields as in a head, then the empty line. [r18] */
static bool
chunk_trailer_byte(struct body *b, char c)
{
	if (++b->trailer > TRAILER_MAX)
		return false;
	switch (b->state) {
	case K_TRAILER_FIRST:
		b->state = c == '\r' ? K_END_LF : K_TRAILER_NAME;
		return c == '\r' || is_class(c, C_TOKEN);
	case K_TRAILER_NAME:
		if (c == ':')
			b->state = K_TRAILER_VALUE;
		return c == ':' || is_class(c, C_TOKEN);
	case K_TRAILER_VALUE:
		if (c == '\r')
			b->state = K_TRAILER_LF;
		return c == '\r' || is_class(c, C_VALUE);
	case K_TRAILER_LF:
		b->state = K_TRAILER_FIRST;
		return c == '\n';
	default:
		b->done = c == '\n'; /* K_END_LF */
		return b->done;
	}
}

/* Writes the chunk line that was just read, anew: our digits, no extensions. */
static char *
chunk_line_write(struct body *b, char *to)
{
	if (b->form == FORM_SAME && b->left > 0) {
		to += hex_write(to, b->left);
		*to++ = '\r';
		*to++ = '\n';
	}
	b->state = b->left > 0 ? K_DATA : K_TRAILER_FIRST;
	b->ext = 0;
	b->digits = 0;
	return to;
}

/* Reads chunks from `in` and writes them, as chunks of our own or bare, in place. */
static ssize_t
chunks_read(struct body *b, char *in, size_t n, char **out, size_t *out_n)
{
	char *from = in, *end = in + n, *to = in - chunk_owed(b);

	*out = to;
	while (from < end && !b->done) {
		if (b->state == K_DATA) {
			size_t take = (size_t)(end - from) < b->left ? (size_t)(end - from) : (size_t)b->left;
			if (to != from)
				memmove(to, from, take);
			from += take;
			to += take;
			b->left -= take;
			b->state = b->left > 0 ? K_DATA : K_DATA_CR;
			continue;
		}
		char c = *from++;
		if (b->state == K_DATA_CR || b->state == K_DATA_LF) {
			if (c != (b->state == K_DATA_CR ? '\r' : '\n'))
				return -1;
			b->state = b->state == K_DATA_CR ? K_DATA_LF : K_SIZE;
			if (b->form == FORM_SAME && c == '\n') {   /* both or none: some take CR alone for the end */
				*to++ = '\r';
				*to++ = '\n';
			}
		} else if (b->state >= K_TRAILER_FIRST) {
			if (!chunk_trailer_byte(b, c))
				return -1;
		} else {
			bool line_whole = b->state == K_SIZE_LF;
			if (!chunk_line_byte(b, c))
				return -1;
			if (line_whole)
				to = chunk_line_write(b, to);
		}
	}
	if (b->done && b->form == FORM_SAME) {
		memcpy(to, "0\r\n\r\n", 5);
		to += 5;
	}
	*out_n = (size_t)(to - *out);
	return from - in;
}

/* A body that was broken once stays so: what follows is never taken for a part of it. */
static ssize_t
chunks_run(struct body *b, char *in, size_t n, char **out, size_t *out_n)
{
	ssize_t used = b->state == K_BROKEN ? -1 : chunks_read(b, in, n, out, out_n);

	if (used < 0)
		b->state = K_BROKEN;
	return used;
}

/* Makes one chunk of `n` raw bytes: needs SLACK bytes before them and TAIL behind. */
static void
chunk_make(char *in, size_t n, char **out, size_t *out_n)
{
	char line[16];
	size_t digits = hex_write(line, n);

	in[-2] = '\r';
	in[-1] = '\n';
	memcpy(in - 2 - digits, line, digits);
	in[n] = '\r';
	in[n + 1] = '\n';
	*out = in - 2 - digits;
	*out_n = digits + 2 + n + 2;
}

/* Takes body bytes from `in` and leaves at *out what goes on, in place: SLACK bytes before `in` and TAIL bytes behind its
 * end are used. Returns how many bytes belong to the body, or -1 when its framing is broken. */
static ssize_t
body_run(struct body *b, char *in, size_t n, char **out, size_t *out_n)
{
	*out = in;
	*out_n = 0;
	if (b->done || n == 0)
		return 0;
	if (b->kind == BODY_CHUNKED)
		return chunks_run(b, in, n, out, out_n);
	if (b->kind == BODY_LENGTH) {
		n = n < b->left ? n : (size_t)b->left;
		b->left -= n;
		b->done = b->left == 0;
	}
	if (b->form == FORM_CHUNKED)
		chunk_make(in, n, out, out_n);
	else
		*out_n = n;
	return (ssize_t)n;
}

/* The sender closed. True: that is the body's proper end; *tail is what still has to be said. */
static bool
body_end(struct body *b, struct slice *tail)
{
	*tail = b->form == FORM_CHUNKED ? S("0\r\n\r\n") : S("");
	if (b->kind == BODY_CLOSE)
		b->done = true;
	return b->done;
}

/* ---- rewriting ----------------------------------------------------------------------------------------------- */

static void
put_field(struct out *o, struct slice name, struct slice value)
{
	size_t n = name.n + value.n + 4;
	char *p = o->p + o->n;

	if (n > o->max - o->n) {
		o->full = true;
		return;
	}
	memcpy(p, name.p, name.n);
	memcpy(p + name.n, ": ", 2);
	memcpy(p + name.n + 2, value.p, value.n);
	memcpy(p + n - 2, "\r\n", 2);
	o->n += n;
}

static void
put_length(struct out *o, uint64_t n)
{
	out_text(o, "Content-Length: ");
	out_number(o, n);
	out_bytes(o, "\r\n", 2);
}

/* Is this one of the fields that Connection names? [r15] */
static bool
head_option_names(const struct head *h, struct slice name)
{
	for (unsigned i = 0; i < h->options; i++)
		if (slice_like(h->option[i], name))
			return true;
	return false;
}

/* What we tell the upstream about the client. */
struct forward {
	struct slice host;           /* the upstream's own Host */
	struct slice addr;           /* the client's address */
	struct slice proto;          /* http or https */
	struct slice id;             /* X-Request-Id */
	bool upgrade;
};

/* Passed on: what is nobody's business but the model's. Never a credential, never what we set ourselves. */
static bool
head_passes(const struct head *h, const struct field *f)
{
	return (f->id <= F_PASSED || f->id == F_WS_PROTOCOL || (f->id == F_ORIGIN && h->upgrade_websocket)) &&
	       !head_option_names(h, f->name);
}

/* A browser can give its key nowhere else. */
static const struct slice PROTOCOL_KEY = {"openai-insecure-api-key.", 24};

/* The protocols that a WebSocket offers, without those that are a key, or were: it may be wiped already. */
static void
put_protocols(struct out *o, const struct field *f)
{
	struct slice list = f->value, one;
	bool first = true;

	while (list_next(&list, &one)) {
		if (one.n == 0 || one.p[0] == '\0' || slice_starts_like(one, PROTOCOL_KEY))
			continue;
		if (first)
			out_slice(o, f->name);
		out_text(o, first ? ": " : ", ");
		out_slice(o, one);
		first = false;
	}
	if (!first)
		out_text(o, "\r\n");
}

static bool
head_method_among(const struct head *h, const struct slice *method, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (slice_equal(h->method, method[i]))
			return true;
	return false;
}

static bool
head_has_body(const struct head *h)
{
	return h->chunked || h->length > 0;
}

/* Methods whose body every server reads. One of them without a body says so [RFC 9110 8.6]. */
static bool
head_wants_length(const struct head *h)
{
	static const struct slice METHODS[] = {{"POST", 4}, {"PUT", 3}, {"PATCH", 5}};

	return head_method_among(h, METHODS, LENGTH(METHODS));
}

/* Would a parser behind us stop at this head before it has seen `Connection: close`, and take its body for the next request?
 * The smallest limits are those of cpp-httplib, which serves llama-server. 0, or the status of the refusal with h->why. */
static int
head_unsafe(struct head *h)
{
	static const struct slice METHODS[] = {{"GET", 3}, {"HEAD", 4}, {"OPTIONS", 7}, {"DELETE", 6}};
	unsigned fields = FIELDS_ADDED;

	if (slice_equal(h->method, S("PRI")))
		return -head_bad(h, 501, "PRI is the beginning of HTTP/2, which is not spoken here");
	if (!head_has_body(h))
		return 0;
	if (!head_wants_length(h) && !head_method_among(h, METHODS, LENGTH(METHODS)))
		return -head_bad(h, 501, "a body goes with POST, PUT, PATCH, DELETE, GET, HEAD and OPTIONS only");
	const char *query = memchr(h->target.p, '?', h->target.n);
	if (query != NULL && memchr(query + 1, '?', h->target.n - (size_t)(query + 1 - h->target.p)) != NULL)
		return -head_bad(h, 400, "a second ? in the target of a request with a body: write it as %3F");
	if (h->method.n + h->target.n + S("  HTTP/1.1\r\n").n > LINE_MAX_SENT)
		return -head_bad(h, 414, "the request line is longer than 8192 bytes");
	for (unsigned i = 0; i < h->fields; i++) {
		fields += head_passes(h, &h->field[i]);
		if (h->field[i].name.n + h->field[i].value.n + S(": \r\n").n > LINE_MAX_SENT)
			return -head_bad(h, 431, "a field of a request with a body is longer than 8192 bytes");
	}
	return fields > FIELDS_MAX ? -head_bad(h, 431, "a request with a body has more than 88 fields") : 0;
}

/* Writes the request head anew for the upstream, which is to end the connection with its answer: `close` stands alone, since
 * some servers know no list there. [r20] */
static void
head_rewrite(const struct head *h, const struct forward *to, struct out *o)
{
	out_slice(o, h->method);
	out_bytes(o, h->slash_missing ? " /" : " ", h->slash_missing ? 2 : 1);
	out_slice(o, h->target);
	out_bytes(o, " HTTP/1.1\r\n", 11);
	put_field(o, S("Host"), to->host);
	for (unsigned i = 0; i < h->fields; i++) {
		const struct field *f = &h->field[i];
		if (!head_passes(h, f))
			continue;
		if (f->id == F_WS_PROTOCOL)
			put_protocols(o, f);
		else
			put_field(o, f->name, f->value);
	}
	if (h->chunked)
		put_field(o, S("Transfer-Encoding"), S("chunked"));
	else if (h->has_length || head_wants_length(h))
		put_length(o, h->length);
	if (h->expect_continue && h->minor == 1)
		put_field(o, S("Expect"), S("100-continue"));
	out_text(o, to->upgrade ? "Upgrade: websocket\r\nConnection: upgrade\r\n" : "Connection: close\r\n");
	put_field(o, S("X-Real-IP"), to->addr);
	put_field(o, S("X-Forwarded-For"), to->addr);
	put_field(o, S("X-Forwarded-Proto"), to->proto);
	if (h->host.n > 0)
		put_field(o, S("X-Forwarded-Host"), h->host);
	put_field(o, S("X-Request-Id"), to->id);
	out_bytes(o, "\r\n", 2);
}

/* How a response's body comes. [r25] */
static struct body
answer_body(const struct head *h, bool head_method)
{
	struct body b = {.kind = BODY_CLOSE, .answer = true};

	if (head_method || h->status < 200 || h->status == 204 || h->status == 304)
		b.kind = BODY_NONE;
	else if (h->chunked)
		b.kind = BODY_CHUNKED;
	else if (h->has_length) {
		b.kind = h->length > 0 ? BODY_LENGTH : BODY_NONE;
		b.left = h->length;
	}
	b.done = b.kind == BODY_NONE;
	return b;
}

/* How it goes on: HTTP/1.0 knows no chunks, and HTTP/1.1 clients see the end of everything. [r28] */
static enum body_form
answer_form(const struct body *b, uint8_t client_minor)
{
	if (client_minor == 0)
		return FORM_PLAIN;
	return b->kind == BODY_CLOSE ? FORM_CHUNKED : FORM_SAME;
}

/* The framing fields of a response. Those of a body that is not sent (HEAD, 304) say what GET would have brought. */
static void
answer_framing(const struct head *h, const struct body *b, uint8_t client_minor, struct out *o)
{
	bool chunks = h->chunked || (b->kind == BODY_CLOSE && b->form == FORM_CHUNKED);

	if (h->status < 200 || h->status == 204)
		return;
	if (chunks && client_minor == 1 && h->status != 304)   /* some clients wait for the chunks of a 304 */
		put_field(o, S("Transfer-Encoding"), S("chunked"));
	else if (h->has_length)
		put_length(o, h->length);
}

/* What we tell the client besides what the upstream says. */
struct backward {
	uint8_t minor;               /* of the client's HTTP/1 */
	struct slice connection;     /* what Connection says, or empty */
	struct slice id;             /* X-Request-Id */
	struct slice host;           /* the upstream's own Host, by which it may name itself */
};

/* A place on the upstream is a place here: without scheme and authority it is where the client asked. Others pass. [RFC 9110 10.2.2] */
static void
put_location(struct out *o, struct slice name, struct slice value, struct slice host)
{
	struct slice rest = slice_from(value, target_scheme(value));

	if (rest.n == value.n || !slice_starts_like(rest, host) || (rest.n > host.n && strchr("/?#", rest.p[host.n]) == NULL)) {
		put_field(o, name, value);
		return;
	}
	rest = slice_from(rest, host.n);
	out_slice(o, name);
	out_text(o, rest.n > 0 && rest.p[0] == '/' ? ": " : ": /");
	out_slice(o, rest);
	out_text(o, "\r\n");
}

/* Writes a response head anew for the client. [r29] */
static void
answer_rewrite(const struct head *h, const struct body *b, const struct backward *to, struct out *o)
{
	out_text(o, "HTTP/1.1 ");
	out_number(o, (uint64_t)h->status);
	out_char(o, ' ');
	out_slice(o, h->reason);
	out_bytes(o, "\r\n", 2);
	for (unsigned i = 0; i < h->fields; i++) {
		const struct field *f = &h->field[i];
		bool ours = f->id == F_HOP || f->id == F_CONTENT_LENGTH || f->id == F_TRANSFER_ENCODING ||
		            f->id == F_CONNECTION || f->id == F_UPGRADE || f->id == F_X_REQUEST_ID;
		if (ours || head_option_names(h, f->name))
			continue;
		if (f->id == F_LOCATION)
			put_location(o, f->name, f->value, to->host);
		else
			put_field(o, f->name, f->value);
	}
	if (h->streams && !h->accel && h->status == 200)   /* an nginx in front of us does not hold it then */
		put_field(o, S("X-Accel-Buffering"), S("no"));
	answer_framing(h, b, to->minor, o);
	if (h->status == 101)
		out_text(o, "Upgrade: websocket\r\n");
	if (to->connection.n > 0)
		put_field(o, S("Connection"), to->connection);
	if (h->status >= 200 || h->status == 101)
		put_field(o, S("X-Request-Id"), to->id);
	out_bytes(o, "\r\n", 2);
}

/* ---- our own answers ----------------------------------------------------------------------------------------- */

/* One row for each way a request can end: status, the log's word, OpenAI's code and type, Anthropic's type, and the
 * sentence, in which % stands for the detail. */
static const struct reason_row {
	uint16_t status;
	const char *word, *code, *type, *anthropic, *message;
} REASONS[REASONS_COUNT] = {
	[R_NONE] = {0, "", "", "", "", ""},
	[R_HEALTH] = {200, "", "", "", "", ""},
	[R_BAD_REQUEST] = {400, "bad_request", "bad_request", "invalid_request_error", "invalid_request_error", "bad request: %"},
	[R_PLAIN_HTTP] = {400, "plain_http", "bad_request", "invalid_request_error", "invalid_request_error",
	    "bad request: this port speaks TLS; write https:// instead of http://"},
	[R_TLS_HELLO] = {400, "tls_hello", "bad_request", "invalid_request_error", "invalid_request_error",
	    "bad request: this port speaks HTTP without TLS; write http:// instead of https://"},
	[R_BAD_BODY] = {400, "bad_body", "bad_request", "invalid_request_error", "invalid_request_error",
	    "bad request: the chunked body is malformed"},
	[R_NO_KEY] = {401, "no_key", "invalid_api_key", "invalid_request_error", "authentication_error",
	    "no API key: send it in the field Authorization, behind Bearer, or in the field X-Api-Key"},
	[R_BAD_KEY] = {401, "bad_key", "invalid_api_key", "invalid_request_error", "authentication_error", "invalid API key"},
	[R_KEY_OFF] = {401, "key_off", "invalid_api_key", "invalid_request_error", "authentication_error",
	    "this API key is switched off"},
	[R_METHOD] = {405, "method", "method_not_allowed", "invalid_request_error", "invalid_request_error", "%"},
	[R_HEADER_TIMEOUT] = {408, "header_timeout", "request_timeout", "invalid_request_error", "invalid_request_error",
	    "the request's head did not come in time"},
	[R_BODY_TIMEOUT] = {408, "body_timeout", "request_timeout", "invalid_request_error", "invalid_request_error",
	    "the request's body stopped coming"},
	[R_TARGET_LONG] = {414, "target_long", "uri_too_long", "invalid_request_error", "invalid_request_error", "%"},
	[R_EXPECT] = {417, "expect", "expectation_failed", "invalid_request_error", "invalid_request_error", "%"},
	[R_IP_RATE] = {429, "ip_rate", "rate_limit_exceeded", "rate_limit_error", "rate_limit_error",
	    "too many requests from this address: try again in % s"},
	[R_IP_CONNS] = {429, "ip_conns", "rate_limit_exceeded", "rate_limit_error", "rate_limit_error",
	    "too many open connections from this address: close some, or try again in % s"},
	[R_HEAD_LONG] = {431, "head_long", "header_too_large", "invalid_request_error", "invalid_request_error", "%"},
	[R_NOT_IMPLEMENTED] = {501, "not_implemented", "not_implemented", "invalid_request_error", "invalid_request_error", "%"},
	[R_VERSION] = {505, "version", "http_version", "invalid_request_error", "invalid_request_error", "%"},
	[R_CLIENT_CLOSED] = {499, "client_closed", "", "", "", ""},
	[R_CLIENT_CUT] = {499, "client_cut", "", "", "", ""},
	[R_CLIENT_STALLED] = {499, "client_stalled", "", "", "", ""},
	[R_UPSTREAM_UNKNOWN] = {502, "upstream_unknown", "bad_gateway", "server_error", "api_error",
	    "the address of the model server at % cannot be found: look at the name server, or correct --upstream"},
	[R_UPSTREAM_REFUSED] = {502, "upstream_refused", "bad_gateway", "server_error", "api_error",
	    "cannot connect to the model server at %: start it, or correct --upstream"},
	[R_UPSTREAM_CONNECT_TIMEOUT] = {504, "upstream_connect_timeout", "gateway_timeout", "server_error", "api_error",
	    "the model server at % does not take connections: look whether it runs, or correct --upstream"},
	[R_UPSTREAM_CLOSED] = {502, "upstream_closed", "bad_gateway", "server_error", "api_error",
	    "the model server at % closed the connection without an answer: look at its log, then try again"},
	[R_UPSTREAM_BAD] = {502, "upstream_bad", "bad_gateway", "server_error", "api_error",
	    "the model server at %; look whether --upstream names the right port"},
	[R_UPSTREAM_TIMEOUT] = {504, "upstream_timeout", "gateway_timeout", "server_error", "api_error",
	    "the model server at % did not answer in time: look at its load, or raise --first-byte-timeout"},
	[R_UPSTREAM_CUT] = {502, "upstream_cut", "", "", "", ""},
	[R_IDLE] = {504, "idle", "gateway_timeout", "server_error", "api_error",
	    "the model server at % stopped taking the request: look at its load, or raise --idle-timeout"},
	[R_FULL] = {503, "full", "overloaded", "server_error", "overloaded_error",
	    "this server has no connection to spare: try again in % s"},
	[R_STALE] = {503, "stale", "overloaded", "server_error", "overloaded_error",
	    "this server process is being replaced: try again on a new connection"},
	[R_DRAIN] = {503, "drain", "overloaded", "server_error", "overloaded_error", "this server is stopping: try again"},
};

static const char *
status_phrase(unsigned status)
{
	switch (status) {
	case 200: return "OK";
	case 400: return "Bad Request";
	case 401: return "Unauthorized";
	case 405: return "Method Not Allowed";
	case 408: return "Request Timeout";
	case 414: return "URI Too Long";
	case 417: return "Expectation Failed";
	case 429: return "Too Many Requests";
	case 431: return "Request Header Fields Too Large";
	case 501: return "Not Implemented";
	case 502: return "Bad Gateway";
	case 503: return "Service Unavailable";
	case 504: return "Gateway Timeout";
	default: return "HTTP Version Not Supported";
	}
}

/* Bytes at the start of `s` that a JSON string holds as they are. */
static size_t
json_plain(struct slice s)
{
	size_t n = 0;

	while (n < s.n && (unsigned char)s.p[n] >= 0x20 && s.p[n] != '"' && s.p[n] != '\\')
		n++;
	return n;
}

/* Text inside a JSON string. */
static void
json_text(struct out *o, struct slice s)
{
	for (size_t n; n = json_plain(s), out_bytes(o, s.p, n), n < s.n; s = slice_from(s, n + 1)) {
		if (s.p[n] == '"' || s.p[n] == '\\')
			out_char(o, '\\');
		out_char(o, (unsigned char)s.p[n] < 0x20 ? ' ' : s.p[n]);
	}
}

/* The reason's sentence, which JSON takes as it is, with its detail in place of %. */
static void
error_message(const struct reason_row *row, struct slice detail, struct out *o)
{
	size_t n = strcspn(row->message, "%");

	out_bytes(o, row->message, n);
	if (row->message[n] == '\0')
		return;
	json_text(o, detail);
	out_text(o, row->message + n + 1);
}

/* Error bodies as each family of clients reads them. */
static void
error_body(const struct reason_row *row, enum dialect dialect, struct slice detail, struct out *o)
{
	switch (dialect) {
	case DIALECT_OLLAMA:
		out_text(o, "{\"error\":\"");
		error_message(row, detail, o);
		out_text(o, "\"}");
		break;
	case DIALECT_ANTHROPIC:
		out_text(o, "{\"type\":\"error\",\"error\":{\"type\":\"");
		out_text(o, row->anthropic);
		out_text(o, "\",\"message\":\"");
		error_message(row, detail, o);
		out_text(o, "\"}}");
		break;
	case DIALECT_OPENAI:
		out_text(o, "{\"error\":{\"message\":\"");
		if (row == &REASONS[R_BAD_KEY])      /* the words by which LiteLLM and aider know it */
			out_text(o, "Incorrect API key provided: no key of this server");
		else
			error_message(row, detail, o);
		out_text(o, "\",\"type\":\"");
		out_text(o, row->type);
		out_text(o, "\",\"param\":null,\"code\":\"");
		out_text(o, row->code);
		out_text(o, "\"}}");
		break;
	}
	out_char(o, '\n');
}

static enum dialect
head_dialect(const struct head *h)
{
	if (h->anthropic)
		return DIALECT_ANTHROPIC;
	if (path_matches(h, S("/api/*")))
		return DIALECT_OLLAMA;
	return path_matches(h, S("/v1/messages*")) ? DIALECT_ANTHROPIC : DIALECT_OPENAI;
}

/* What the request's end says besides the reason. */
struct verdict {
	enum reason reason;
	enum dialect dialect;
	struct slice detail, id;
	uint64_t retry_ms;           /* 0: no Retry-After */
	bool head_method, close, keep_alive;   /* keep_alive: an HTTP/1.0 client wants to hear it */
	bool page;                   /* as in struct head: its browser is not to ask its user for a password */
};

/* Would the same request fare no better? Clients repeat many a status by themselves, some for minutes and without a word. After a 504 a
 * repeat would be another expensive generation, and a longer wait would seem to hang. */
static bool
verdict_final(const struct verdict *v)
{
	static const uint16_t FINAL[] = {400, 401, 405, 414, 417, 431, 501, 504, 505};

	for (size_t i = 0; i < LENGTH(FINAL); i++)
		if (REASONS[v->reason].status == FINAL[i])
			return true;
	return v->reason == R_UPSTREAM_BAD || v->retry_ms > RETRY_MS_MAX;
}

/* A whole answer of our own: head and body. */
static void
answer_own(const struct verdict *v, struct out *o)
{
	const struct reason_row *row = &REASONS[v->reason];
	char text[1024];
	struct out body = {text, 0, sizeof text, false};

	if (v->reason == R_HEALTH)
		out_text(&body, "OK");
	else
		error_body(row, v->dialect, v->detail, &body);
	out_text(o, "HTTP/1.1 ");
	out_number(o, row->status);
	out_char(o, ' ');
	out_text(o, status_phrase(row->status));
	out_text(o, v->reason == R_HEALTH ? "\r\nContent-Type: text/plain\r\n" : "\r\nContent-Type: application/json\r\n");
	if (row->status == 401)
		out_text(o, "WWW-Authenticate: Bearer\r\n");
	if (row->status == 401 && !v->page)  /* some clients send a password only when they are asked for one */
		out_text(o, "WWW-Authenticate: Basic realm=\"tinyauth\"\r\n");
	if (row->status == 405)
		out_text(o, "Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n");
	if (v->retry_ms > 0) {
		out_text(o, "Retry-After: ");
		out_number(o, (v->retry_ms + 999) / 1000);
		out_text(o, "\r\nretry-after-ms: ");
		out_number(o, v->retry_ms);
		out_text(o, "\r\n");
	}
	if (verdict_final(v))
		out_text(o, "x-should-retry: false\r\n");
	put_field(o, S("X-Request-Id"), v->id);
	if (v->close)
		put_field(o, S("Connection"), S("close"));
	else if (v->keep_alive)
		put_field(o, S("Connection"), S("keep-alive"));
	put_length(o, body.n);
	out_bytes(o, "\r\n", 2);
	if (!v->head_method)
		out_bytes(o, body.p, body.n);
}

/* ---- what a trusted peer says of its clients ----------------------------------------------------------------- */

/* An address of one family and nothing else, in words. */
static bool
proxy_address(struct slice word, bool v6, unsigned char ip[16])
{
	return memchr(word.p, v6 ? '[' : ':', word.n) == NULL && (memchr(word.p, ':', word.n) != NULL) == v6 && ip_read(word, ip);
}

/* `PROXY TCP4 192.0.2.1 198.51.100.1 56324 443` CR LF, at most 107 bytes; of UNKNOWN the rest means nothing. */
static int
proxy_line(struct slice in, unsigned char ip[16], bool *unnamed)
{
	const char *end = memchr(in.p, '\n', in.n < 107 ? in.n : 107);
	struct slice word[6] = {{"", 0}};
	unsigned char from[16], to[16];
	size_t words = 0;

	if (end == NULL)
		return in.n < 107 ? MORE : -1;
	if (end[-1] != '\r')
		return -1;
	struct slice line = {in.p, (size_t)(end - 1 - in.p)};
	for (bool more = true; more && words < LENGTH(word); words++) {
		const char *blank = memchr(line.p, ' ', line.n);
		word[words] = (struct slice){line.p, blank == NULL ? line.n : (size_t)(blank - line.p)};
		more = blank != NULL;
		line = slice_from(line, word[words].n + 1);
	}
	bool v4 = slice_equal(word[1], S("TCP4")), v6 = slice_equal(word[1], S("TCP6"));
	*unnamed = slice_equal(word[1], S("UNKNOWN"));
	if (*unnamed)
		return (int)(end + 1 - in.p);
	if ((!v4 && !v6) || words != LENGTH(word) || line.n > 0 || !proxy_address(word[2], v6, from) ||
	    !proxy_address(word[3], v6, to) || word[4].n == 0 || !port_good(word[4]) || word[5].n == 0 || !port_good(word[5]))
		return -1;
	memcpy(ip, from, sizeof from);
	return (int)(end + 1 - in.p);
}

/* The binary form: signature, version and command, family, length, addresses, and what we do not need. */
static int
proxy_block(struct slice in, unsigned char ip[16], bool *unnamed)
{
	const unsigned char *p = (const unsigned char *)in.p;

	if (in.n < 16)
		return MORE;
	size_t n = (size_t)p[14] << 8 | p[15];
	if (p[12] >> 4 != 2 || (p[12] & 15) > 1 || 16 + n > PROXY_HEAD_MAX)
		return -1;
	if (in.n < 16 + n)
		return MORE;
	bool v4 = p[13] == 0x11, v6 = p[13] == 0x21;
	if ((v4 && n < 12) || (v6 && n < 36))
		return -1;
	bool client = (p[12] & 15) == 1;     /* else the peer's own connection */
	*unnamed = client && !v4 && !v6;
	if (client && v4) {
		struct sockaddr_storage ss = {.ss_family = AF_INET};
		memcpy(&((struct sockaddr_in *)&ss)->sin_addr, p + 16, 4);
		ip_of(&ss, ip);
	} else if (client && v6)
		memcpy(ip, p + 16, 16);
	return (int)(16 + n);
}

enum { PROXY_NONE = INT_MAX };

/* A PROXY header, version 1 or 2, in front of a connection: its length, MORE, PROXY_NONE: there is none, or -1: it is
 * broken. `ip` is written to when the header names an address; `*unnamed`: there is a client, whose address it does not name. */
static int
proxy_parse(struct slice in, unsigned char ip[16], bool *unnamed)
{
	static const struct slice LINE = {"PROXY ", 6}, BLOCK = {"\r\n\r\n\0\r\nQUIT\n", 12};

	for (int block = 0; block < 2; block++) {
		struct slice mark = block ? BLOCK : LINE;
		if (memcmp(in.p, mark.p, in.n < mark.n ? in.n : mark.n) != 0)
			continue;
		if (in.n < mark.n)
			return MORE;
		return block ? proxy_block(in, ip, unnamed) : proxy_line(in, ip, unnamed);
	}
	return PROXY_NONE;
}

/* The client's address as trusted peers tell it: the last one in X-Forwarded-For that is not one of theirs. False: there
 * is none. */
static bool
head_forwarded_for(const struct head *h, const struct config *cfg, unsigned char ip[16])
{
	unsigned char one[16];
	bool found = false;

	for (unsigned i = h->fields; i-- > 0;) {
		if (!slice_like(h->field[i].name, S("X-Forwarded-For")))
			continue;
		for (struct slice rest = h->field[i].value; rest.n > 0;) {
			const char *comma = memrchr(rest.p, ',', rest.n);
			struct slice word = comma == NULL ? rest : slice_from(rest, (size_t)(comma + 1 - rest.p));
			rest.n = comma == NULL ? 0 : (size_t)(comma - rest.p);
			while (word.n > 0 && (word.p[0] == ' ' || word.p[0] == '\t'))
				word = slice_from(word, 1);
			while (word.n > 0 && (word.p[word.n - 1] == ' ' || word.p[word.n - 1] == '\t'))
				word.n--;
			if (!ip_read(word, one))
				return found;
			memcpy(ip, one, 16);
			found = true;
			if (!ip_trusted(cfg, one))
				return true;
		}
	}
	return found;
}

/* Did the client reach the trusted peer by TLS? */
static bool
head_forwarded_https(const struct head *h)
{
	for (unsigned i = 0; i < h->fields; i++)
		if (slice_like(h->field[i].name, S("X-Forwarded-Proto")) && slice_like(h->field[i].value, S("https")))
			return true;
	return false;
}

/* ---- credentials --------------------------------------------------------------------------------------------- */

/* The value of a base64 character, or -1. */
static int
base64_value(char c)
{
	if (c >= 'A' && c <= 'Z')
		return c - 'A';
	if (c >= 'a' && c <= 'z')
		return c - 'a' + 26;
	if (is_digit(c))
		return c - '0' + 52;
	return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Decodes base64 in place, padded or not. False: it is none. */
static bool
base64_decode(char *p, size_t *n)
{
	size_t in = *n, out = 0;
	uint32_t bits = 0;

	for (int pad = 0; in > 0 && p[in - 1] == '=' && pad < 2; pad++)
		in--;
	for (size_t i = 0; i < in; i++) {
		int value = base64_value(p[i]);
		if (value < 0)
			return false;
		bits = bits << 6 | (uint32_t)value;
		if (i % 4 > 0)
			p[out++] = (char)(bits >> (6 - 2 * (i % 4)) & 0xff);
	}
	*n = out;
	return in % 4 != 1;
}

/* What stands behind `scheme` and its blanks, when the value is of that scheme. */
static bool
credential_after(struct slice value, struct slice scheme, struct slice *key)
{
	if (!slice_starts_like(value, scheme) || (value.n > scheme.n && value.p[scheme.n] != ' '))
		return false;
	*key = slice_from(value, scheme.n);
	while (key->n > 0 && key->p[0] == ' ')
		*key = slice_from(*key, 1);
	return true;
}

/* The password of Basic credentials, or where that is empty the user; decoded in place: the field is not sent on. */
static struct slice
credential_basic(struct slice encoded)
{
	char *p = (char *)(uintptr_t)encoded.p, *colon;
	size_t n = encoded.n;

	if (n == 0 || !base64_decode(p, &n) || (colon = memchr(p, ':', n)) == NULL)
		return encoded;
	if (colon + 1 == p + n)
		return (struct slice){p, n - 1};
	return (struct slice){colon + 1, n - (size_t)(colon + 1 - p)};
}

/* The key among the protocols that a WebSocket offers, or nothing. */
static struct slice
credential_protocol(const struct head *h)
{
	struct slice list = h->ws_protocol, one;

	while (head_upgrades(h) && list_next(&list, &one))
		if (slice_starts_like(one, PROTOCOL_KEY))
			return slice_from(one, PROTOCOL_KEY.n);
	return (struct slice){"", 0};
}

enum { CREDENTIALS_MAX = 5 };

/* The keys that a request carries, in the order in which they are tried: Authorization: Bearer, X-Api-Key, Api-Key, Basic, a
 * WebSocket's protocol. A client may send another's Bearer beside our key. Empty ones are passed over. */
static size_t
head_credentials(const struct head *h, struct slice list[CREDENTIALS_MAX])
{
	struct slice basic = {"", 0}, all[CREDENTIALS_MAX] = {{"", 0}, h->x_api_key, h->api_key, {"", 0}, credential_protocol(h)};
	size_t n = 0;

	if (!credential_after(h->authorization, S("Bearer"), &all[0]) && credential_after(h->authorization, S("Basic"), &basic))
		all[3] = credential_basic(basic);
	for (size_t i = 0; i < CREDENTIALS_MAX; i++)
		if (all[i].n > 0)
			list[n++] = all[i];
	return n;
}

/* ============================================================================================================= *
 * USAGE
 * Owns: the token counter that watches response bytes. Not furnished yet
 * ============================================================================================================= */

/* ============================================================================================================= *
 * CERTIFICATE
 * Owns: reading of PEM and DER; the pair of a certificate chain and its private key
 * Calls: BASICS, LOG (dates), CONFIG (mistakes, digests), HTTP (base64)
 * Promises: a pair that would not serve (expired, of another key, too weak) is refused with the reason
 * Never: keeps a byte of a key's file but in the pair, which is left out of dumps and wiped; looks at a certificate of others
 * ============================================================================================================= */

/* A chain and its key, decoded, in a mapping that is left out of memory dumps. Workers have it by fork. */
struct tls_pair {
	br_x509_certificate chain[TLS_CHAIN_MAX];
	size_t certificates;
	br_ec_private_key ec;            /* of curve 0: the key is an RSA one */
	br_rsa_private_key rsa;
	uint64_t epoch;                  /* stands for the key */
	uint64_t from_s, until_s;        /* when the certificate is good, in seconds since 1970 */
	char subject[TLS_WORDS_MAX], names[TLS_WORDS_MAX];
	struct slice public;             /* the leaf's public key, in der */
	size_t n;
	unsigned char der[TLS_DER_MAX];  /* certificates, then the key, to which the above points */
};

static void
pair_forget(struct tls_pair *t)
{
	if (t == NULL)
		return;
	wipe(t, sizeof *t);
	munmap(t, sizeof *t);
}

enum { DER_INTEGER = 2, DER_BITS = 3, DER_OID = 6, DER_UTC = 0x17, DER_TIME = 0x18, DER_SEQUENCE = 0x30, DER_SET = 0x31,
	DER_VERSION = 0xa0, DER_EXTENSIONS = 0xa3, DER_DNS_NAME = 0x82, DER_IP = 0x87, DER_OCTETS = 4 };

/* The next element; `in` is what follows it. Its tag, or 0: there is none, or it is broken. */
static int
der_next(struct slice *in, struct slice *content)
{
	const unsigned char *p = (const unsigned char *)in->p;
	size_t n, used = 2;

	if (in->n < 2 || p[0] == 0)
		return 0;
	if ((n = p[1]) >= 0x80) {
		size_t digits = n & 0x7f;
		if (digits == 0 || digits > 3 || in->n < 2 + digits)
			return 0;
		for (n = 0; used < 2 + digits; used++)
			n = n << 8 | p[used];
	}
	if (n > in->n - used)
		return 0;
	*content = (struct slice){in->p + used, n};
	*in = slice_from(*in, used + n);
	return p[0];
}

/* The content of the next element, when it is of this kind; else nothing. */
static struct slice
der_take(struct slice *in, int tag)
{
	struct slice content;

	return der_next(in, &content) == tag ? content : (struct slice){"", 0};
}

/* `YYMMDDhhmmssZ` or `YYYYMMDDhhmmssZ` in seconds since 1970 [RFC 5280 4.1.2.5]. */
static bool
der_time(int tag, struct slice text, uint64_t *seconds)
{
	uint64_t part[6], year;   /* of the century, month, day, hour, minute, second */
	size_t at = tag == DER_TIME ? 2 : 0;

	if ((tag != DER_UTC && tag != DER_TIME) || text.n != at + 13 || text.p[at + 12] != 'Z')
		return false;
	for (size_t i = 0; i < 6; i++)
		if (!number_read((struct slice){text.p + at + 2 * i, 2}, &part[i]))
			return false;
	if (tag == DER_UTC)
		year = part[0] < 50 ? 2000 : 1900;
	else if (number_read((struct slice){text.p, 2}, &year))
		year *= 100;
	else
		return false;
	*seconds = date_seconds(year + part[0], part[1], part[2]) + part[3] * 3600 + part[4] * 60 + part[5];
	return part[1] >= 1 && part[1] <= 12 && part[2] >= 1 && part[2] <= 31 && year + part[0] >= 1970;
}

/* Bytes of a certificate as words for people. */
static void
out_visible(struct out *o, struct slice s)
{
	for (size_t i = 0; i < s.n; i++)
		out_char(o, s.p[i] >= ' ' && s.p[i] < 0x7f ? s.p[i] : '?');
}

/* `CN=example.org, O=Example` */
static void
cert_subject(struct slice names, struct out *o)
{
	static const struct { unsigned char id; const char *word; } TYPES[] = {
		{3, "CN"}, {10, "O"}, {11, "OU"}, {6, "C"}, {7, "L"}, {8, "ST"}};

	for (struct slice set, value; der_next(&names, &set) == DER_SET;) {
		struct slice pair = der_take(&set, DER_SEQUENCE);
		struct slice oid = der_take(&pair, DER_OID);
		if (der_next(&pair, &value) == 0 || oid.n != 3 || memcmp(oid.p, "\x55\x04", 2) != 0)
			continue;
		for (size_t i = 0; i < LENGTH(TYPES); i++)
			if ((unsigned char)oid.p[2] == TYPES[i].id) {
				out_print(o, "%s%s=", o->n > 0 ? ", " : "", TYPES[i].word);
				out_visible(o, value);
			}
	}
}

/* Host names and addresses that the certificate is for [RFC 5280 4.2.1.6]. */
static void
cert_names(struct slice extensions, struct out *o)
{
	static const struct slice ALT_NAME = {"\x55\x1d\x11", 3};
	struct slice list = der_take(&extensions, DER_SEQUENCE), one;

	for (struct slice extension; der_next(&list, &extension) == DER_SEQUENCE;) {
		struct slice oid = der_take(&extension, DER_OID), value = {"", 0};
		while (der_next(&extension, &value) != 0)   /* a flag may come first; the value is last */
			continue;
		if (!slice_equal(oid, ALT_NAME))
			continue;
		struct slice names = der_take(&value, DER_SEQUENCE);
		for (int tag; (tag = der_next(&names, &one)) != 0;) {
			if (tag != DER_DNS_NAME && tag != DER_IP)
				continue;
			if (o->n > 0)
				out_char(o, ' ');
			struct sockaddr_storage ss = {.ss_family = one.n == 4 ? AF_INET : AF_INET6};
			if (tag == DER_DNS_NAME)
				out_visible(o, one);
			else if (one.n == 4 || one.n == 16) {
				memcpy(one.n == 4 ? (void *)&((struct sockaddr_in *)&ss)->sin_addr
				                  : (void *)&((struct sockaddr_in6 *)&ss)->sin6_addr, one.p, one.n);
				out_ip(o, &ss);
			}
		}
	}
}

/* What we have to know of the leaf. [RFC 5280 4.1] */
static bool
cert_read(struct tls_pair *t, struct slice der)
{
	struct slice body = der_take(&der, DER_SEQUENCE), in = der_take(&body, DER_SEQUENCE), rest = in, skipped, from, until;
	struct out subject = {t->subject, 0, sizeof t->subject - 1, false}, names = {t->names, 0, sizeof t->names - 1, false};

	if (der_next(&rest, &skipped) == DER_VERSION)
		in = rest;
	der_take(&in, DER_INTEGER);              /* serial number */
	der_take(&in, DER_SEQUENCE);             /* signature algorithm */
	der_take(&in, DER_SEQUENCE);             /* issuer */
	struct slice validity = der_take(&in, DER_SEQUENCE);
	int from_tag = der_next(&validity, &from), until_tag = der_next(&validity, &until);
	cert_subject(der_take(&in, DER_SEQUENCE), &subject);
	struct slice key = der_take(&in, DER_SEQUENCE);
	der_take(&key, DER_SEQUENCE);            /* its algorithm */
	t->public = der_take(&key, DER_BITS);
	for (int tag; in.n > 0;) {
		struct slice part;
		if ((tag = der_next(&in, &part)) == 0)
			return false;
		if (tag == DER_EXTENSIONS)
			cert_names(part, &names);
	}
	if (t->public.n < 2 || !der_time(from_tag, from, &t->from_s) || !der_time(until_tag, until, &t->until_s))
		return false;
	t->public = slice_from(t->public, 1);    /* without the count of unused bits */
	return true;
}

/* A positive INTEGER without the zeros in front. */
static struct slice
der_number(struct slice *in)
{
	struct slice number = der_take(in, DER_INTEGER);

	while (number.n > 0 && number.p[0] == 0)
		number = slice_from(number, 1);
	return number;
}

/* What follows the version of an ECPrivateKey [RFC 5915 3]; the curve is named here, or was before. */
static bool
key_read_ec(struct tls_pair *t, struct slice in, struct slice curve)
{
	static const struct { struct slice oid; int curve; } CURVES[] = {
		{{"\x2a\x86\x48\xce\x3d\x03\x01\x07", 8}, BR_EC_secp256r1}, {{"\x2b\x81\x04\x00\x22", 5}, BR_EC_secp384r1}};
	struct slice x = der_take(&in, DER_OCTETS), parameters;

	if (curve.n == 0 && der_next(&in, &parameters) == DER_VERSION)   /* the same tag, [0] */
		curve = der_take(&parameters, DER_OID);
	for (size_t i = 0; i < LENGTH(CURVES); i++)
		if (slice_equal(curve, CURVES[i].oid))
			t->ec = (br_ec_private_key){CURVES[i].curve, (unsigned char *)(uintptr_t)x.p, x.n};
	return t->ec.curve != 0 && x.n > 0;
}

/* What follows the version of an RSAPrivateKey [RFC 8017 A.1.2]. */
static bool
key_read_rsa(struct tls_pair *t, struct slice in)
{
	struct slice n = der_number(&in), part[7];   /* e, d, p, q, d mod p-1, d mod q-1, 1/q mod p */

	for (size_t i = 0; i < LENGTH(part); i++)
		if ((part[i] = der_number(&in)).n == 0)
			return false;
	if (n.n == 0 || n.n > TLS_RSA_MAX)
		return false;
	t->rsa = (br_rsa_private_key){(uint32_t)n.n * 8,
	    (unsigned char *)(uintptr_t)part[2].p, part[2].n, (unsigned char *)(uintptr_t)part[3].p, part[3].n,
	    (unsigned char *)(uintptr_t)part[4].p, part[4].n, (unsigned char *)(uintptr_t)part[5].p, part[5].n,
	    (unsigned char *)(uintptr_t)part[6].p, part[6].n};
	for (unsigned char top = (unsigned char)n.p[0]; !(top & 0x80); top = (unsigned char)(top << 1))
		t->rsa.n_bitlen--;
	return true;
}

/* A private key as PKCS #8 [RFC 5208 5] or in its older forms. */
static bool
key_read(struct tls_pair *t, struct slice der)
{
	struct slice body = der_take(&der, DER_SEQUENCE), curve = {"", 0};

	der_take(&body, DER_INTEGER);
	if (body.n > 0 && body.p[0] == DER_SEQUENCE) {
		struct slice algorithm = der_take(&body, DER_SEQUENCE);
		der_take(&algorithm, DER_OID);
		curve = der_take(&algorithm, DER_OID);
		der = der_take(&body, DER_OCTETS);
		body = der_take(&der, DER_SEQUENCE);
		der_take(&body, DER_INTEGER);
	}
	return body.n > 0 && body.p[0] == DER_INTEGER ? key_read_rsa(t, body) : key_read_ec(t, body, curve);
}

/* The next object of a PEM text [RFC 7468 2], decoded where it stands. 1, 0: there is none, -1: it is broken. */
static int
pem_next(struct slice *text, struct slice *label, struct slice *der)
{
	static const struct slice BEGIN = {"-----BEGIN ", 11}, END = {"-----END ", 9};

	while (text->n > 0) {
		struct slice line = text_line(text);
		if (!slice_starts_like(line, BEGIN))
			continue;
		line = slice_from(line, BEGIN.n);
		const char *dashes = memchr(line.p, '-', line.n);
		*label = (struct slice){line.p, dashes == NULL ? line.n : (size_t)(dashes - line.p)};
		char *to = (char *)(uintptr_t)text->p;
		for (size_t n = 0; text->n > 0; n += line.n) {
			line = text_line(text);
			while (line.n > 0 && (line.p[line.n - 1] == ' ' || line.p[line.n - 1] == '\t'))
				line.n--;
			if (slice_starts_like(line, END)) {
				*der = (struct slice){to, n};
				return base64_decode(to, &der->n) ? 1 : -1;
			}
			if (slice_starts_like(line, S("Proc-Type:"))) {   /* an older way to encrypt */
				*label = S("ENCRYPTED PRIVATE KEY");
				*der = (struct slice){to, 0};
				return 1;
			}
			memmove(to + n, line.p, line.n);
		}
		return -1;
	}
	return 0;
}

static bool
pem_certificate(struct tls_pair *t, struct slice label, struct slice der, struct mistake *m)
{
	if (!slice_equal(label, S("CERTIFICATE")) && !slice_equal(label, S("X509 CERTIFICATE")))
		return true;
	if (t->certificates == TLS_CHAIN_MAX)
		return mistake_is(m, "holds more than %d certificates; leave out those that the chain does not need", TLS_CHAIN_MAX);
	if (t->certificates == 0 && !cert_read(t, der))
		return mistake_is(m, "the first certificate cannot be read; put the server's own first");
	t->chain[t->certificates++] = (br_x509_certificate){(unsigned char *)(uintptr_t)der.p, der.n};
	t->n += der.n;
	return true;
}

static bool
pem_key(struct tls_pair *t, struct slice label, struct slice der, struct mistake *m)
{
	static const struct slice KEY = {"PRIVATE KEY", 11};

	if (slice_equal(label, S("ENCRYPTED PRIVATE KEY")))
		return mistake_is(m, "the key is encrypted; write it without a passphrase: openssl pkey -in FILE -out NEW");
	if (label.n < KEY.n || !slice_equal(slice_from(label, label.n - KEY.n), KEY) || t->ec.curve != 0 || t->rsa.n_bitlen != 0)
		return true;
	t->n += der.n;
	return key_read(t, der) || mistake_is(m, "the key cannot be read; make an EC key on P-256 or P-384, or an RSA key");
}

/* Reads a PEM file and gives each object in it to `take`, in the place that it will stay in when it is wanted. */
static bool
pem_read(struct tls_pair *t, const char *path, bool (*take)(struct tls_pair *, struct slice, struct slice, struct mistake *),
    struct mistake *m)
{
	struct file f;
	struct slice label, der;
	struct mistake what;
	const char *why = file_read(path, TLS_FILE_MAX, &f);
	int found = 0;
	bool good = why == NULL || mistake_is(&what, "cannot be read: %s", why);

	for (struct slice text = {f.p, f.n}; good && (found = pem_next(&text, &label, &der)) != 0;) {
		if (found < 0)
			good = mistake_is(&what, "is not PEM: a line that is not base64, or no END");
		else if (der.n > sizeof t->der - t->n)
			good = mistake_is(&what, "holds more than %d bytes", TLS_DER_MAX);
		else {
			char *place = memcpy(t->der + t->n, der.p, der.n);
			good = take(t, label, (struct slice){place, der.n}, &what);
		}
	}
	file_forget(&f);
	return good || mistake_is(m, "%s: %s", path, what.text);
}

/* What computes on the curve of an EC key. */
static const br_ec_impl *
pair_curve(const struct tls_pair *t)
{
	return t->ec.curve == BR_EC_secp256r1 ? &br_ec_p256_m31 : &br_ec_prime_i31;
}

/* p * q, as it stands in a certificate. BearSSL's own function does not go up to 4096 bits. */
static struct slice
rsa_modulus(const br_rsa_private_key *rsa, unsigned char n[TLS_RSA_MAX])
{
	size_t skip = 0;

	memset(n, 0, TLS_RSA_MAX);
	if (rsa->plen + rsa->qlen > TLS_RSA_MAX)
		return (struct slice){"", 0};
	for (size_t i = 0; i < rsa->plen; i++) {
		unsigned carry = 0;
		for (size_t k = 0; k <= rsa->qlen && i + k < TLS_RSA_MAX; k++) {
			unsigned char *at = &n[TLS_RSA_MAX - 1 - i - k];
			unsigned q = k < rsa->qlen ? rsa->q[rsa->qlen - 1 - k] : 0;
			carry += *at + (unsigned)rsa->p[rsa->plen - 1 - i] * q;
			*at = (unsigned char)carry;
			carry >>= 8;
		}
	}
	while (skip < TLS_RSA_MAX && n[skip] == 0)
		skip++;
	return (struct slice){(char *)n + skip, TLS_RSA_MAX - skip};
}

/* Is the certificate's public key that of our key? Also the key's strength, and what stands for it from now on. */
static bool
pair_matches(struct tls_pair *t, const char *path, struct mistake *m)
{
	unsigned char public[TLS_RSA_MAX], digest[32];
	struct slice ours = {(char *)public, 0}, theirs = t->public;

	if (t->ec.curve != 0)
		ours.n = br_ec_compute_pub(pair_curve(t), NULL, public, &t->ec);
	else {
		if (t->rsa.n_bitlen < 2048 || t->rsa.n_bitlen > 4096)
			return mistake_is(m, "%s: the RSA key has %u bits; 2048 to 4096 are served", path, t->rsa.n_bitlen);
		ours = rsa_modulus(&t->rsa, public);
		struct slice numbers = der_take(&theirs, DER_SEQUENCE);
		theirs = der_number(&numbers);
	}
	if (!slice_equal(ours, theirs))
		return mistake_is(m, "%s: the key is not that of the certificate; name the pair that belongs together", path);
	sha256_of(ours, digest);
	memcpy(&t->epoch, digest, sizeof t->epoch);
	return true;
}

static bool
pair_equal(const struct tls_pair *a, const struct tls_pair *b)
{
	bool equal = a->epoch == b->epoch && a->certificates == b->certificates;

	for (size_t i = 0; equal && i < a->certificates; i++)
		equal = a->chain[i].data_len == b->chain[i].data_len &&
		        memcmp(a->chain[i].data, b->chain[i].data, a->chain[i].data_len) == 0;
	return equal;
}

/* Reads a certificate chain and its key. NULL: `m` says what is wrong, where and how to mend it. */
static struct tls_pair *
pair_load(const char *cert, const char *key, uint64_t now_s, struct mistake *m)
{
	struct tls_pair *t = map_try(sizeof *t, MAP_PRIVATE);
	char date[24];

	if (t == NULL) {
		mistake_is(m, "%s: no memory for it", cert);
		return NULL;
	}
	madvise(t, sizeof *t, MADV_DONTDUMP);
	bool good = pem_read(t, cert, pem_certificate, m) && pem_read(t, key, pem_key, m);
	if (good && t->certificates == 0)
		good = mistake_is(m, "%s: holds no certificate in PEM form", cert);
	if (good && t->ec.curve == 0 && t->rsa.n_bitlen == 0)
		good = mistake_is(m, "%s: holds no private key in PEM form", key);
	if (good && t->until_s <= now_s) {
		date_write(date, t->until_s);
		good = mistake_is(m, "%s: the certificate expired on %s; renew it, or set this machine's clock", cert, date);
	}
	if (good && pair_matches(t, key, m))
		return t;
	pair_forget(t);
	return NULL;
}

/* ============================================================================================================= *
 * LINK
 * Owns: the descriptors of a connection; all of BearSSL's TLS
 * Calls: BASICS, TABLE (sessions), HTTP (classes of bytes), CERTIFICATE
 * Promises: never waits; EINTR is nobody else's business; what was written is told as written when the kernel has it,
 *           in plain and in TLS; one record is read ahead at most
 * Never: lets a TLS type out
 * ============================================================================================================= */

/* ---- TLS ----------------------------------------------------------------------------------------------------- */

static int
entropy_feed(const br_prng_class **generator)
{
	unsigned char seed[32];
	bool good = getentropy(seed, sizeof seed) == 0;

	if (good)
		(*generator)->update(generator, seed, sizeof seed);
	wipe(seed, sizeof seed);
	return good;
}

/* In place of BearSSL's own, which each engine asks anew: it takes RDRAND, or opens /dev/urandom, which a worker cannot. An
 * engine that gets none does not start, and its link is refused. */
br_prng_seeder
br_prng_seeder_system(const char **name)
{
	if (name != NULL)
		*name = "getentropy";
	return entropy_feed;
}

/* What the TLS links of a worker share. */
struct tls {
	const br_ssl_session_cache_class *cache;   /* first: BearSSL hands its address back to us */
	const struct tls_pair *pair;
	struct sessions *sessions;           /* NULL: nothing is resumed */
	const uint16_t *suites;
	size_t suites_n;
	const br_block_ctr_class *aes;
	br_ghash ghash;
	char *stage;                         /* records on their way into an engine; empty between two calls */
	struct pool links;
};

/* One TLS link, in a place of the pool that begins a page of its own. Its context must not move. */
struct tls_link {
	br_ssl_server_context sc;
	struct tls *home;
	size_t owed;                         /* plain bytes of the record that is on its way out */
	uint32_t most_in, most_out;          /* how far the buffers were touched */
	bool spoke;                          /* something came */
	bool cut;                            /* the stream ended, or failed, without close_notify */
	bool shut;                           /* close_notify is written, or on its way */
	unsigned char in[TLS_IN], out[TLS_OUT];
};

enum { STAGE = 32768, TLS_KEEP = 4096 };     /* at least so many bytes of `in` keep their memory */

/* What suits the processor: each constant-time, the faster one where there are two. */
#if defined(__x86_64__)
#define TLS_CHACHA20 br_chacha20_sse2_run
#define TLS_AES_ALWAYS 0
#define TLS_AES NULL
#define TLS_GHASH NULL
#elif defined(__SIZEOF_INT128__)
#define TLS_CHACHA20 br_chacha20_ct_run
#define TLS_AES_ALWAYS 1
#define TLS_AES &br_aes_ct64_ctr_vtable
#define TLS_GHASH br_ghash_ctmul64
#else
#define TLS_CHACHA20 br_chacha20_ct_run
#define TLS_AES_ALWAYS 1
#define TLS_AES &br_aes_ct_ctr_vtable
#define TLS_GHASH br_ghash_ctmul32
#endif
#if defined(__SIZEOF_INT128__)
#define TLS_POLY1305 br_poly1305_ctmulq_run
#define TLS_RSA_PRIVATE br_rsa_i62_private
#define TLS_RSA_SIGN br_rsa_i62_pkcs1_sign
#else
#define TLS_POLY1305 br_poly1305_ctmul_run
#define TLS_RSA_PRIVATE br_rsa_i31_private
#define TLS_RSA_SIGN br_rsa_i31_pkcs1_sign
#endif

/* AES first where the processor has instructions for it, else ChaCha20; x86_64 without them does no AES at all, because
 * code for that would be 5 KB for machines that nearly nobody has. */
static const uint16_t SUITES[] = {
	BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256};
enum { SUITES_CHACHA_FIRST = 0, SUITES_AES_FIRST = 2, SUITES_ALL = 6, SUITES_CHACHA = 2 };

static void
session_save(const br_ssl_session_cache_class **cache, br_ssl_server_context *sc, const br_ssl_session_parameters *params)
{
	const struct tls *home = (const struct tls *)(const void *)cache;
	uint64_t word[SESSION_WORDS] = {0};
	unsigned char *p = (unsigned char *)word;

	(void)sc;
	memcpy(p, params->session_id, 32);
	memcpy(p + 32, params->master_secret, 48);
	memcpy(p + 80, &params->version, 2);
	memcpy(p + 82, &params->cipher_suite, 2);
	if (home->sessions != NULL)
		sessions_put(home->sessions, home->pair->epoch, word, clock_ns() / NS_PER_MS);
	wipe(word, sizeof word);
}

static int
session_load(const br_ssl_session_cache_class **cache, br_ssl_server_context *sc, br_ssl_session_parameters *params)
{
	const struct tls *home = (const struct tls *)(const void *)cache;
	uint64_t word[SESSION_WORDS] = {0};
	unsigned char *p = (unsigned char *)word;

	(void)sc;
	memcpy(p, params->session_id, 32);
	if (home->sessions == NULL || params->session_id_len != 32 ||
	    !sessions_get(home->sessions, home->pair->epoch, word, clock_ns() / NS_PER_MS))
		return 0;
	memcpy(params->master_secret, p + 32, 48);
	memcpy(&params->version, p + 80, 2);
	memcpy(&params->cipher_suite, p + 82, 2);
	wipe(word, sizeof word);
	return 1;
}

static const br_ssl_session_cache_class SESSION_CACHE = {sizeof(struct tls), session_save, session_load};

/* Everything that `max` TLS links of a worker will use. */
static struct tls *
tls_new(const struct tls_pair *pair, struct sessions *sessions, size_t max)
{
	struct tls *home = map_new(sizeof *home, MAP_PRIVATE);

	home->links = pool_new(max, page_round(sizeof(struct tls_link)));
	madvise(home->links.mem, max * home->links.each, MADV_DONTDUMP);
	home->cache = &SESSION_CACHE;
	home->pair = pair;
	home->sessions = sessions;
	home->stage = map_new(STAGE, MAP_PRIVATE);
	home->aes = br_aes_x86ni_ctr_get_vtable();
	home->ghash = br_ghash_pclmul_get();
	bool fast = home->aes != NULL && home->ghash != NULL;
	home->suites = SUITES + (fast ? SUITES_AES_FIRST : SUITES_CHACHA_FIRST);
	home->suites_n = fast || TLS_AES_ALWAYS ? SUITES_ALL : SUITES_CHACHA;
	if (!fast) {
		home->aes = TLS_AES;
		home->ghash = TLS_GHASH;
	}
	return home;
}

/* TLS 1.2 with AEAD suites and ECDHE only; no renegotiation; of protocols HTTP/1.1 or none. */
static void
tls_profile(struct tls_link *t)
{
	static const char *PROTOCOLS[] = {"http/1.1"};
	const struct tls *home = t->home;
	br_ssl_engine_context *eng = &t->sc.eng;

	br_ssl_server_zero(&t->sc);
	br_ssl_engine_set_versions(eng, BR_TLS12, BR_TLS12);
	br_ssl_engine_set_suites(eng, home->suites, home->suites_n);
	br_ssl_engine_add_flags(eng, BR_OPT_ENFORCE_SERVER_PREFERENCES | BR_OPT_NO_RENEGOTIATION | BR_OPT_FAIL_ON_ALPN_MISMATCH);
	br_ssl_engine_set_protocol_names(eng, PROTOCOLS, LENGTH(PROTOCOLS));
	br_ssl_engine_set_hash(eng, br_sha256_ID, &br_sha256_vtable);
	br_ssl_engine_set_hash(eng, br_sha384_ID, &br_sha384_vtable);
	br_ssl_engine_set_hash(eng, br_sha512_ID, &br_sha512_vtable);
	br_ssl_engine_set_prf_sha256(eng, &br_tls12_sha256_prf);
	br_ssl_engine_set_prf_sha384(eng, &br_tls12_sha384_prf);
	br_ssl_engine_set_gcm(eng, &br_sslrec_in_gcm_vtable, &br_sslrec_out_gcm_vtable);
	br_ssl_engine_set_aes_ctr(eng, home->aes);
	br_ssl_engine_set_ghash(eng, home->ghash);
	br_ssl_engine_set_chapol(eng, &br_sslrec_in_chapol_vtable, &br_sslrec_out_chapol_vtable);
	br_ssl_engine_set_chacha20(eng, TLS_CHACHA20);
	br_ssl_engine_set_poly1305(eng, TLS_POLY1305);
	br_ssl_engine_set_ec(eng, &br_ec_p256_m31);   /* ECDHE on P-256, which every client knows */
	br_ssl_server_set_cache(&t->sc, (const br_ssl_session_cache_class **)(uintptr_t)&home->cache);
	if (home->pair->ec.curve != 0)
		br_ssl_server_set_single_ec(&t->sc, home->pair->chain, home->pair->certificates, &home->pair->ec, BR_KEYTYPE_SIGN, 0,
		    pair_curve(home->pair), br_ecdsa_i31_sign_asn1);
	else
		br_ssl_server_set_single_rsa(&t->sc, home->pair->chain, home->pair->certificates, &home->pair->rsa, BR_KEYTYPE_SIGN,
		    TLS_RSA_PRIVATE, TLS_RSA_SIGN);
}

/* Gives a TLS link back to the pool; nothing of it remains readable. */
static void
tls_drop(struct link *l)
{
	struct tls_link *t = l->tls;

	if (t == NULL)
		return;
	struct tls *home = t->home;
	wipe(t, offsetof(struct tls_link, in) + t->most_in);
	wipe(t->out, t->most_out);
	pool_give(&home->links, t);
	l->tls = NULL;
}

/* Gives the system the memory of links that ended. */
static void
tls_trim(struct tls *home)
{
	pool_trim(&home->links);
}

static bool
tls_warm(const struct tls *home)
{
	return pool_warm(&home->links);
}

/* ---- links --------------------------------------------------------------------------------------------------- */

enum { LINK_END = 0, LINK_AGAIN = -1, LINK_FAILED = -2, LINK_PLAIN = -3 };
enum { SEEN_READ = POLLIN | POLLHUP | POLLERR, SEEN_GONE = POLLRDHUP | POLLHUP | POLLERR };

/* Bytes of the socket. A short read means that nothing more is there for now. */
static ssize_t
socket_read(struct link *l, void *p, size_t room)
{
	ssize_t n;

	do
		n = l->out == l->fd ? recv(l->fd, p, room, 0) : read(l->fd, p, room);
	while (n < 0 && errno == EINTR);
	if (n < (ssize_t)room)
		l->seen &= (short)~POLLIN;
	if (n >= 0)
		return n;
	return errno == EAGAIN ? LINK_AGAIN : LINK_FAILED;
}

/* After a short write the link is blocked until poll says otherwise. */
static ssize_t
socket_write(struct link *l, const void *p, size_t n)
{
	ssize_t done;

	if (l->blocked && !(l->seen & (POLLOUT | POLLERR | POLLHUP)))
		return LINK_AGAIN;
	l->blocked = false;
	do
		done = l->out == l->fd ? send(l->fd, p, n, MSG_NOSIGNAL) : write(l->out, p, n);
	while (done < 0 && errno == EINTR);
	if (done < (ssize_t)n) {
		l->blocked = true;
		l->seen &= (short)~POLLOUT;
	}
	if (done >= 0)
		return done;
	/* ENOTCONN: other systems than Linux say so while the connection is not there yet */
	return errno == EAGAIN || errno == ENOBUFS || errno == ENOTCONN ? LINK_AGAIN : LINK_FAILED;
}

/* Sends the records that are ready: 1 all of them, LINK_AGAIN or LINK_FAILED. */
static ssize_t
tls_flush(struct link *l)
{
	size_t n;
	unsigned char *p;

	while ((p = br_ssl_engine_sendrec_buf(&l->tls->sc.eng, &n)) != NULL) {
		ssize_t done = socket_write(l, p, n);
		if (done <= 0)
			return done == 0 ? LINK_AGAIN : done;
		br_ssl_engine_sendrec_ack(&l->tls->sc.eng, (size_t)done);
	}
	return 1;
}

/* Moves decrypted bytes on, and wipes them where they stood. */
static size_t
tls_take(struct tls_link *t, char *p, size_t room)
{
	size_t done = 0, n;
	unsigned char *from;

	while (done < room && (from = br_ssl_engine_recvapp_buf(&t->sc.eng, &n)) != NULL) {
		n = n < room - done ? n : room - done;
		memcpy(p + done, from, n);
		wipe(from, n);
		br_ssl_engine_recvapp_ack(&t->sc.eng, n);
		done += n;
	}
	return done;
}

/* How far the receiving buffer was touched. */
static void
tls_touched(struct tls_link *t, const unsigned char *end)
{
	if (t->most_in < (size_t)(end - t->in))
		t->most_in = (uint32_t)(end - t->in);
}

/* Gives `n` received bytes to the engine, which holds one record: plain bytes that stand in the way of the next one move on
 * to `p`. False: it takes no more. */
static bool
tls_feed(struct tls_link *t, const char *in, size_t n, char *p, size_t room, size_t *done)
{
	size_t space, taken;

	while (n > 0) {
		unsigned char *to = br_ssl_engine_recvrec_buf(&t->sc.eng, &space);
		if (to == NULL) {
			if ((taken = tls_take(t, p + *done, room - *done)) == 0)
				return br_ssl_engine_current_state(&t->sc.eng) == BR_SSL_CLOSED;
			*done += taken;
			continue;
		}
		space = space < n ? space : n;
		memcpy(to, in, space);
		tls_touched(t, to + space);
		br_ssl_engine_recvrec_ack(&t->sc.eng, space);
		in += space;
		n -= space;
	}
	return true;
}

/* Reads from the socket once, exactly what the engine needs. */
static ssize_t
tls_pull(struct link *l)
{
	struct tls_link *t = l->tls;
	size_t need;
	unsigned char *to = br_ssl_engine_recvrec_buf(&t->sc.eng, &need);

	if (to == NULL)
		return LINK_FAILED;
	ssize_t n = socket_read(l, to, need);
	if (n == LINK_AGAIN)
		return n;
	t->cut |= n <= 0;
	if (n <= 0)
		return n;
	tls_touched(t, to + n);
	if (!t->spoke && is_class((char)to[0], C_TOKEN))
		return LINK_PLAIN;
	t->spoke = true;
	br_ssl_engine_recvrec_ack(&t->sc.eng, (size_t)n);
	return tls_flush(l) == LINK_FAILED ? LINK_FAILED : n;   /* what the engine answers by itself, such as an alert */
}

/* The same for a receiver with room: as much as gives plain bytes for it at most, so that nothing is left over that nobody
 * holds. */
static ssize_t
tls_pull_many(struct link *l, char *p, size_t room, size_t *done)
{
	struct tls_link *t = l->tls;
	size_t most = room - *done - TLS_RECORD;

	ssize_t n = socket_read(l, t->home->stage, most < STAGE ? most : STAGE);
	if (n == LINK_AGAIN)
		return n;
	t->cut |= n <= 0 || !tls_feed(t, t->home->stage, (size_t)n, p, room, done);
	return n <= 0 ? n : tls_flush(l) == LINK_FAILED ? LINK_FAILED : n;
}

/* An engine that takes nothing before it has sent something by itself, to a peer that does not read: an answer to its
 * close_notify, or to handshakes that it begins over and over. It has left, or nothing good comes of it. */
static bool
tls_stuck(const struct tls_link *t)
{
	return (br_ssl_engine_current_state(&t->sc.eng) & (BR_SSL_CLOSED | BR_SSL_RECVREC | BR_SSL_RECVAPP)) == 0;
}

static ssize_t
tls_read(struct link *l, char *p, size_t room)
{
	struct tls_link *t = l->tls;
	size_t done = tls_take(t, p, room);

	for (int pulls = 0; pulls < PULLS_MAX && done < room && (l->seen & SEEN_READ) && !t->cut &&
	    br_ssl_engine_current_state(&t->sc.eng) & BR_SSL_RECVREC; pulls++) {
		ssize_t n = room - done >= TLS_RECORD + TLS_KEEP ? tls_pull_many(l, p, room, &done) : tls_pull(l);
		if (n <= 0)
			break;
		done += tls_take(t, p + done, room - done);
	}
	if (done > 0)
		return (ssize_t)done;
	t->cut |= tls_stuck(t);
	if (br_ssl_engine_current_state(&t->sc.eng) == BR_SSL_CLOSED && br_ssl_engine_last_error(&t->sc.eng) == 0)
		return LINK_END;
	return t->cut || br_ssl_engine_last_error(&t->sc.eng) != 0 ? LINK_FAILED : LINK_AGAIN;
}

/* Writes one record. Its bytes are told as written when the kernel has all of it; until then the same ones are given again. */
static ssize_t
tls_write(struct link *l, const char *p, size_t n)
{
	struct tls_link *t = l->tls;
	size_t room;
	ssize_t flushed;

	if (t->owed == 0) {
		if ((flushed = tls_flush(l)) < 0)
			return flushed;
		unsigned char *to = br_ssl_engine_sendapp_buf(&t->sc.eng, &room);
		if (to == NULL)
			return LINK_FAILED;
		t->owed = n < room ? n : room;
		memcpy(to, p, t->owed);
		if (t->most_out < (size_t)(to + t->owed - t->out))
			t->most_out = (uint32_t)(to + t->owed - t->out);
		br_ssl_engine_sendapp_ack(&t->sc.eng, t->owed);
		br_ssl_engine_flush(&t->sc.eng, 0);
	}
	if ((flushed = tls_flush(l)) < 0)
		return flushed;
	n = t->owed;
	t->owed = 0;
	return (ssize_t)n;
}

static void
link_open(struct link *l, int fd)
{
	*l = (struct link){.fd = fd, .out = fd};
}

/* Are these the two ends of pipes instead of a socket? The end of input is then no sign that anybody left. [r32] */
static bool
link_piped(const struct link *l)
{
	return l->out != l->fd;
}

/* Which descriptor poll looks at for these events, and which of them. */
static int
link_poll(const struct link *l, short *events)
{
	if (!link_piped(l))
		return *events != 0 ? l->fd : -1;
	*events &= POLLIN | POLLOUT;
	if (*events & POLLOUT)
		*events = POLLOUT;
	return *events == 0 ? -1 : *events == POLLOUT ? l->out : l->fd;
}

/* What came first, without taking it. Of plain links, and of TLS ones before link_secure(). */
static ssize_t
link_peek(struct link *l, char *p, size_t room)
{
	ssize_t n = recv(l->fd, p, room, MSG_PEEK | MSG_DONTWAIT);

	return n >= 0 ? n : errno == EAGAIN || errno == EINTR ? LINK_AGAIN : LINK_FAILED;
}

/* Poll tells of this many bytes only, or of the end. */
static void
link_await(struct link *l, size_t n)
{
	int bytes = (int)n;

	setsockopt(l->fd, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes);
	l->seen &= (short)~POLLIN;
}

/* The link speaks TLS from now on, its handshake comes first. False: link_error() tells why not. */
static bool
link_secure(struct link *l, struct tls *home)
{
	struct tls_link *t = l->tls = pool_take(&home->links);

	if (t == NULL)
		abort();                     /* there is one for each connection */
	memset(t, 0, offsetof(struct tls_link, in));
	t->home = home;
	tls_profile(t);
	br_ssl_engine_set_buffers_bidi(&t->sc.eng, t->in, sizeof t->in, t->out, sizeof t->out);
	return br_ssl_server_reset(&t->sc) == 1;
}

/* Goes on with the handshake. 1: done; LINK_AGAIN; LINK_END: nobody said a word; LINK_FAILED: link_error() tells why;
 * LINK_PLAIN: the client speaks HTTP without TLS, and the link is a plain one now. */
static ssize_t
link_handshake(struct link *l)
{
	br_ssl_engine_context *eng = &l->tls->sc.eng;

	for (int pulls = 0;; pulls++) {
		ssize_t n = tls_flush(l);
		if (n < 0)
			return n;
		unsigned state = br_ssl_engine_current_state(eng);
		if (state & BR_SSL_SENDAPP)
			return 1;
		if (!(state & BR_SSL_RECVREC))
			return LINK_FAILED;
		if (!(l->seen & SEEN_READ) || pulls == PULLS_MAX)
			return LINK_AGAIN;
		n = tls_pull(l);
		if (n == LINK_PLAIN)
			tls_drop(l);
		if (n <= 0)
			return n == LINK_END && l->tls->spoke ? LINK_FAILED : n;
	}
}

/* The suite, above, and a part of the secret, below. One changes alone when a handshake had costly work done: the signature
 * for a ClientHello, the secret from a ClientKeyExchange. Both at once: a session was resumed. */
static unsigned
link_stage(const struct link *l)
{
	const br_ssl_session_parameters *p = l->tls != NULL ? &l->tls->sc.eng.session : NULL;

	return p != NULL ? (unsigned)p->cipher_suite << 16 | (unsigned)p->master_secret[0] << 8 | p->master_secret[1] : 0;
}

/* Why a TLS link failed, in a word or two. */
static const char *
link_error(const struct link *l, char text[32])
{
	static const struct { int error; const char *word; } WORDS[] = {
		{BR_ERR_UNSUPPORTED_VERSION, "version"}, {BR_ERR_BAD_VERSION, "version"}, {BR_ERR_BAD_MAC, "bad_mac"},
		{BR_ERR_BAD_CIPHER_SUITE, "no_common_suite"}, {BR_ERR_BAD_FINISHED, "bad_finished"}, {BR_ERR_NO_RANDOM, "no_random"},
		{BR_ERR_SEND_FATAL_ALERT + BR_ALERT_HANDSHAKE_FAILURE, "no_common_suite"},
		{BR_ERR_SEND_FATAL_ALERT + BR_ALERT_PROTOCOL_VERSION, "version"},
		{BR_ERR_SEND_FATAL_ALERT + BR_ALERT_NO_APPLICATION_PROTOCOL, "no_common_protocol"},
		{BR_ERR_RECV_FATAL_ALERT + BR_ALERT_BAD_CERTIFICATE, "client_rejects_certificate"},
		{BR_ERR_RECV_FATAL_ALERT + BR_ALERT_CERTIFICATE_EXPIRED, "client_rejects_certificate"},
		{BR_ERR_RECV_FATAL_ALERT + BR_ALERT_CERTIFICATE_UNKNOWN, "client_rejects_certificate"},
		{BR_ERR_RECV_FATAL_ALERT + BR_ALERT_UNKNOWN_CA, "client_rejects_certificate"}};
	int error = br_ssl_engine_last_error(&l->tls->sc.eng);

	if (error == 0)
		return l->tls->cut ? "cut" : "timeout";
	for (size_t i = 0; i < LENGTH(WORDS); i++)
		if (WORDS[i].error == error)
			return WORDS[i].word;
	if (error >= BR_ERR_SEND_FATAL_ALERT)
		text_print(text, 32, "alert_sent_%d", error - BR_ERR_SEND_FATAL_ALERT);
	else if (error >= BR_ERR_RECV_FATAL_ALERT)
		text_print(text, 32, "alert_%d", error - BR_ERR_RECV_FATAL_ALERT);
	else
		text_print(text, 32, "malformed_%d", error);
	return text;
}

/* The name that the client asked for, or "". */
static const char *
link_name(const struct link *l)
{
	return br_ssl_engine_get_server_name(&l->tls->sc.eng);
}

/* Are there decrypted bytes that nobody took? Poll knows nothing of them. */
static bool
link_pending(const struct link *l)
{
	size_t n;

	return l->tls != NULL && br_ssl_engine_recvapp_buf(&l->tls->sc.eng, &n) != NULL;
}

static bool
link_readable(const struct link *l)
{
	return l->seen & SEEN_READ || link_pending(l);
}

/* A TLS peer says that it leaves in a record: it is looked for also while nobody reads, one record ahead. */
static bool
link_looks_ahead(const struct link *l)
{
	return l->tls != NULL && !link_piped(l) && !link_pending(l);
}

/* Has the peer left? `cut`: without saying so as TLS does. */
static bool
link_left(struct link *l, bool *cut)
{
	*cut = false;
	if (link_piped(l))
		return false;
	if (l->tls == NULL)
		return l->seen & SEEN_GONE;
	for (int pulls = 0; pulls < PULLS_MAX && l->seen & SEEN_READ && link_looks_ahead(l) &&
	    br_ssl_engine_current_state(&l->tls->sc.eng) & BR_SSL_RECVREC; pulls++)
		if (l->tls->cut || tls_pull(l) <= 0)
			break;
	l->tls->cut |= tls_stuck(l->tls);
	bool closed = br_ssl_engine_current_state(&l->tls->sc.eng) == BR_SSL_CLOSED;
	bool said = closed && br_ssl_engine_last_error(&l->tls->sc.eng) == 0;
	*cut = !said && !link_pending(l);
	return l->seen & SEEN_GONE || closed || l->tls->cut;
}

/* Bytes read, LINK_END, LINK_AGAIN or LINK_FAILED. */
static ssize_t
link_read(struct link *l, char *p, size_t room)
{
	return l->tls != NULL ? tls_read(l, p, room) : socket_read(l, p, room);
}

/* Bytes written, LINK_AGAIN or LINK_FAILED. */
static ssize_t
link_write(struct link *l, const char *p, size_t n)
{
	return l->tls != NULL ? tls_write(l, p, n) : socket_write(l, p, n);
}

/* Takes bytes off the socket without looking at them: of a TLS link, records that nobody will decrypt. */
static ssize_t
link_discard(struct link *l, char *waste, size_t room)
{
	return socket_read(l, waste, room);
}

/* The kernel asks a silent peer whether it is there, and gives up one that acknowledges nothing: who vanished without a word, in
 * silence or in the middle of a stream, is known within a minute. What a listener is told, connections inherit. */
static void
socket_vigil(int fd)
{
	const struct { int level, name, value; } options[] = {
		{SOL_SOCKET, SO_KEEPALIVE, 1}, {IPPROTO_TCP, TCP_KEEPIDLE, PROBE_FIRST_S}, {IPPROTO_TCP, TCP_KEEPINTVL, PROBE_EVERY_S},
		{IPPROTO_TCP, TCP_KEEPCNT, PROBES},
#ifdef TCP_USER_TIMEOUT
		{IPPROTO_TCP, TCP_USER_TIMEOUT, GONE_MS},
#endif
	};

	for (size_t i = 0; i < LENGTH(options); i++)
		setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof options[i].value);
}

/* The peer takes nothing, and has acknowledged all that it got: it lives, is busy, and may be so for longer than a minute. */
static void
link_bear(const struct link *l)
{
#ifdef TCP_USER_TIMEOUT
	struct tcp_info info;
	socklen_t n = sizeof info;
	int never = 0;

	memset(&info, 0, sizeof info);
	if (getsockopt(l->fd, IPPROTO_TCP, TCP_INFO, &info, &n) == 0 && info.tcpi_unacked == 0)
		setsockopt(l->fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &never, sizeof never);
#else
	(void)l;
#endif
}

/* Small pieces go out at once. What is written in one go does not need this. */
static void
link_prompt(const struct link *l)
{
	int one = 1;

	setsockopt(l->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);   /* no harm to a unix socket */
}

/* Starts connecting; -1 with errno when that failed at once. */
static int
link_connect(struct link *l, const struct addr *to)
{
	int fd = socket(to->ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	if (!addr_loopback(to))              /* nothing on this machine vanishes without a word */
		socket_vigil(fd);
	if (connect(fd, (const struct sockaddr *)&to->ss, to->len) != 0 && errno != EINPROGRESS) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	link_open(l, fd);
	return 0;
}

/* Says that nothing more will be sent: close_notify, then the end. A blocked link has to be shut again later. */
static void
link_shut(struct link *l)
{
	struct tls_link *t = l->tls;

	if (t != NULL && !t->shut) {
		t->shut = true;
		br_ssl_engine_close(&t->sc.eng);
	}
	if (t == NULL || tls_flush(l) != LINK_AGAIN)
		shutdown(l->fd, SHUT_WR);
}

/* Between two requests: pages that only large records need go back to the system. */
static void
link_rest(struct link *l)
{
	struct tls_link *t = l->tls;
	size_t need, at = page_round(offsetof(struct tls_link, in) + TLS_KEEP), kept = at - offsetof(struct tls_link, in);

	if (t == NULL || kept >= TLS_IN || (t->most_in <= kept && t->most_out <= TLS_KEEP) ||
	    br_ssl_engine_sendrec_buf(&t->sc.eng, &need) != NULL ||  /* records on their way out, an alert among them */
	    br_ssl_engine_recvrec_buf(&t->sc.eng, &need) != t->in)   /* the beginning of a record, or bytes that nobody took */
		return;
	if (madvise((char *)t + at, t->home->links.each - at, MADV_DONTNEED) != 0)
		return;                      /* nothing went, and all of it is still to be wiped */
	t->most_in = t->most_in < kept ? t->most_in : (uint32_t)kept;
	t->most_out = 0;
}

/* With `reset` the other side sees a cut instead of an end. */
static void
link_close(struct link *l, bool reset)
{
	struct linger hard = {1, 0};

	if (l->fd < 0)
		return;
	if (reset)
		setsockopt(l->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
	close(l->fd);
	if (link_piped(l))
		close(l->out);
	tls_drop(l);
	link_open(l, -1);
}

/* ============================================================================================================= *
 * CONN
 * Owns: one client connection: state table, two one-way pipes, admission, the end
 * Calls: BASICS, LOG, CONFIG (addresses, trusted networks, digests), KEYS, TABLE, HTTP, LINK
 * Promises: no byte goes upstream before conn_admit() said yes to the request that it belongs to; an upstream connection
 *           carries that one request and ends with it
 * Never: closes anything outside conn_close() but its own upstream link
 * ============================================================================================================= */

/* ---- pipes --------------------------------------------------------------------------------------------------- */

static bool
pipe_on_scratch(const struct worker *w, const struct pipe *p)
{
	return p->mem == w->scratch[p->side][0] || p->mem == w->scratch[p->side][1];
}

static void
pipe_empty(struct pipe *p)
{
	p->mem = NULL;
	p->start = p->ready = p->raw = p->end = SLACK;
}

/* Forgets what the pipe holds. */
static void
pipe_drop(struct worker *w, struct pipe *p)
{
	if (p->mem != NULL && !pipe_on_scratch(w, p)) {
		wipe(p->mem + SLACK, p->end - SLACK);
		pool_give(&w->bufs, p->mem);
	}
	pipe_empty(p);
}

/* At the end of a turn: what is left moves from scratch to a buffer of the pool, and an empty buffer goes back there. The
 * pool holds two buffers for each connection, one for each pipe, so that it is never empty here. */
static void
pipe_settle(struct worker *w, struct pipe *p)
{
	if (p->mem == NULL)
		return;
	if (p->start == p->ready && p->raw == p->end)
		pipe_drop(w, p);
	else if (pipe_on_scratch(w, p)) {
		char *buf = pool_take(&w->bufs);
		memcpy(buf + p->start, p->mem + p->start, p->end - p->start);
		wipe(p->mem + p->raw, p->end - p->raw);      /* a head that is not whole, or the next one's, with its key */
		p->mem = buf;
	}
}

static bool
pipe_waits(const struct pipe *p)
{
	return p->start < p->ready;
}

static struct slice
pipe_raw(const struct pipe *p)
{
	return (struct slice){p->mem + p->raw, p->end - p->raw};
}

/* Reads once, behind what is there. Nothing may be waiting to go out when room has to be made. */
static ssize_t
pipe_fill(struct worker *w, struct pipe *p, struct link *from)
{
	if (p->mem == NULL)
		p->mem = w->scratch[p->side][0];
	if (p->raw == p->end && !pipe_waits(p))
		p->start = p->ready = p->raw = p->end = SLACK;
	if (p->raw > SLACK && p->end - SLACK > RAW_MAX - RAW_MAX / 4) {
		uint32_t rest = p->end - p->raw, stale = rest < p->raw - SLACK ? rest : p->raw - SLACK;
		memmove(p->mem + SLACK, p->mem + p->raw, rest);
		wipe(p->mem + p->end - stale, stale);
		p->end = SLACK + rest;
		p->start = p->ready = p->raw = SLACK;
	}
	ssize_t n = link_read(from, p->mem + p->end, SLACK + RAW_MAX - p->end);
	if (n > 0)
		p->end += (uint32_t)n;
	return n;
}

/* Looks at the raw bytes as part of the body and makes them ready. False: its framing is broken. */
static bool
pipe_run(struct pipe *p)
{
	char *out;
	size_t n;
	ssize_t used = body_run(&p->body, p->mem + p->raw, p->end - p->raw, &out, &n);

	if (used < 0)
		return false;
	p->raw += (uint32_t)used;
	p->in += (uint64_t)used;
	if (!pipe_waits(p))
		p->start = p->ready = (uint32_t)(out - p->mem);
	else if (out != p->mem + p->ready)
		memmove(p->mem + p->ready, out, n);
	p->ready += (uint32_t)n;
	if (p->ready > p->end)               /* the end of a chunk that we made reaches into TAIL */
		p->raw = p->end = p->ready;
	return true;
}

/* Writes what is ready: 1 all of it, 0 blocked, -1 the link failed. */
static int
pipe_flush(struct pipe *p, struct link *to)
{
	while (pipe_waits(p)) {
		ssize_t n = link_write(to, p->mem + p->start, p->ready - p->start);
		if (n < 0)
			return n == LINK_AGAIN ? 0 : -1;
		p->start += (uint32_t)n;
		p->out += (uint64_t)n;
	}
	return 1;
}

/* A head is written anew into the other scratch buffer, while its slices still point into the old one. */
static struct out
pipe_build(const struct worker *w, const struct pipe *p)
{
	char *other = w->scratch[p->side][p->mem == w->scratch[p->side][0]];

	return (struct out){other + SLACK, 0, BUF_SIZE - 2 * SLACK - TAIL - (p->end - p->raw), false};
}

/* Puts the new head in front of the raw bytes that follow the old one. */
static void
pipe_built(struct worker *w, struct pipe *p, const struct out *o)
{
	char *mem = o->p - SLACK;
	uint32_t rest = p->mem == NULL ? 0 : p->end - p->raw;
	struct pipe old = *p;

	p->mem = mem;
	p->start = SLACK;
	p->ready = SLACK + (uint32_t)o->n;
	p->raw = p->ready + SLACK;
	p->end = p->raw + rest;
	if (rest > 0) {
		memcpy(mem + p->raw, old.mem + old.raw, rest);
		wipe(old.mem + old.raw, rest);       /* it may hold the next request's key */
	}
	pipe_drop(w, &old);
}

enum move { MOVE_WAIT, MOVE_DONE, MOVE_END, MOVE_BAD, MOVE_FROM_FAILED, MOVE_TO_FAILED };

/* The sender ended. */
static enum move
pipe_end(struct pipe *p)
{
	struct slice tail;

	if (!body_end(&p->body, &tail))
		return MOVE_END;
	if (!pipe_waits(p))
		p->start = p->ready = SLACK;
	memcpy(p->mem + p->ready, tail.p, tail.n);
	p->ready += (uint32_t)tail.n;
	p->raw = p->end = p->ready;
	return MOVE_DONE;
}

/* Moves a body on: whatever came goes out at once, and nothing more is read while something waits to go out. */
static enum move
pipe_move(struct worker *w, struct pipe *p, struct link *from, struct link *to)
{
	for (int reads = 0;; reads++) {
		if (p->raw < p->end && !p->body.done && !pipe_run(p)) {
			pipe_flush(p, to);   /* what was good before it, such as the head */
			return MOVE_BAD;
		}
		int flushed = pipe_flush(p, to);
		if (flushed <= 0)
			return flushed < 0 ? MOVE_TO_FAILED : MOVE_WAIT;
		if (p->body.done)
			return MOVE_DONE;
		if (reads == MOVES_MAX || !link_readable(from))
			return MOVE_WAIT;
		ssize_t n = pipe_fill(w, p, from);
		if (n == LINK_AGAIN)
			return MOVE_WAIT;
		if (n == LINK_FAILED || (n == LINK_END && pipe_end(p) == MOVE_END))
			return n == LINK_END ? MOVE_END : MOVE_FROM_FAILED;
	}
}

/* ---- states -------------------------------------------------------------------------------------------------- */

enum step { STEP_WAIT, STEP_AGAIN, STEP_CLOSE };

static enum step step_new(struct worker *, struct conn *);
static enum step step_tls(struct worker *, struct conn *);
static enum step step_head(struct worker *, struct conn *);
static enum step step_connect(struct worker *, struct conn *);
static enum step step_relay(struct worker *, struct conn *);
static enum step step_tunnel(struct worker *, struct conn *);
static enum step step_flush(struct worker *, struct conn *);
static enum step step_linger(struct worker *, struct conn *);

static enum step late_end(struct worker *, struct conn *, enum reason);
static enum step late_tls(struct worker *, struct conn *, enum reason);
static enum step late_head(struct worker *, struct conn *, enum reason);
static enum step late_connect(struct worker *, struct conn *, enum reason);
static enum step late_send(struct worker *, struct conn *, enum reason);
static enum step late_wait(struct worker *, struct conn *, enum reason);
static enum step late_relay(struct worker *, struct conn *, enum reason);

/* [r31] Every state with its step, the time it may take, and what happens after that, for which reason. */
static const struct state_row {
	const char *name;
	enum step (*step)(struct worker *, struct conn *);
	size_t deadline;             /* of the time in struct config */
	enum step (*late)(struct worker *, struct conn *, enum reason);
	enum reason reason;
	bool gives_way;              /* to a new connection when the pool is full */
} STATES[STATES_COUNT] = {
#define MS(member) offsetof(struct config, member)
	[S_FREE] = {"free", NULL, MS(idle_ms), NULL, R_NONE, false},
	[S_NEW] = {"new", step_new, MS(header_ms), late_end, R_NONE, true},
	[S_TLS] = {"tls", step_tls, MS(handshake_ms), late_tls, R_NONE, true},
	[S_OPEN] = {"open", step_head, MS(header_ms), late_end, R_NONE, true},
	[S_IDLE] = {"idle", step_head, MS(keepalive_ms), late_end, R_NONE, true},
	[S_HEAD] = {"head", step_head, MS(header_ms), late_head, R_HEADER_TIMEOUT, true},
	[S_CONNECT] = {"connect", step_connect, MS(connect_ms), late_connect, R_UPSTREAM_CONNECT_TIMEOUT, false},
	[S_SEND] = {"send", step_relay, MS(idle_ms), late_send, R_BODY_TIMEOUT, false},
	[S_WAIT] = {"wait", step_relay, MS(first_byte_ms), late_wait, R_UPSTREAM_TIMEOUT, false},
	[S_RELAY] = {"relay", step_relay, MS(idle_ms), late_relay, R_IDLE, false},
	[S_TUNNEL] = {"tunnel", step_tunnel, MS(idle_ms), late_wait, R_IDLE, false},
	[S_FLUSH] = {"flush", step_flush, MS(reader_ms), late_end, R_NONE, true},
	[S_LINGER] = {"linger", step_linger, MS(linger_ms), late_end, R_NONE, true},
#undef MS
};

/* What to wait for, derived from the state on each turn. */
static void
conn_interest(const struct conn *c, short *client, short *upstream)
{
	bool req_waits = pipe_waits(&c->req), resp_waits = pipe_waits(&c->resp);

	*client = *upstream = POLLIN;
	switch (c->state) {
	case S_NEW:
		*client |= POLLRDHUP;
		break;
	case S_TLS:
		*client = c->client.blocked ? POLLOUT : POLLIN;
		break;
	case S_CONNECT:
		*client = POLLRDHUP;
		*upstream = POLLOUT;
		break;
	case S_SEND:
	case S_WAIT:
	case S_RELAY:
		*client = POLLRDHUP;
		*client |= resp_waits ? POLLOUT : 0;
		*client |= !req_waits && !c->req.body.done && !c->req.broken ? POLLIN : 0;
		*client |= c->req.body.done && link_looks_ahead(&c->client) ? POLLIN : 0;
		*upstream = resp_waits ? 0 : POLLIN | POLLRDHUP;
		*upstream |= req_waits && !c->req.broken ? POLLOUT : 0;
		break;
	case S_TUNNEL:
		*client = (req_waits || c->req.broken ? 0 : POLLIN) | (resp_waits ? POLLOUT : 0);
		*upstream = (resp_waits ? 0 : POLLIN) | (req_waits && !c->req.broken ? POLLOUT : 0);
		break;
	case S_FLUSH:
		*client = POLLOUT;
		*upstream = 0;
		break;
	case S_LINGER:
		*client |= c->client.blocked ? POLLOUT : 0;
		break;
	}
}

/* Is there an upstream connection that carried its request, and only waits for its end? */
static bool
conn_spent(const struct conn *c)
{
	return c->request == NULL && c->upstream.fd >= 0;
}

/* The upstream connection is over. An end that is ours to make is a reset: nobody waits for bytes of it, no port is held for a
 * minute, and a server that still works for it hears so at once. A tunnel's last words may still be on their way. */
static void
conn_leave_upstream(struct conn *c)
{
	bool ended = (c->upstream.seen & (POLLIN | SEEN_GONE)) != 0;

	link_close(&c->upstream, !ended && c->state != S_TUNNEL);
}

static void
conn_hasten(struct conn *c, uint64_t deadline_ns)
{
	if (c->deadline_ns > deadline_ns)
		c->deadline_ns = deadline_ns;
}

/* The deadline of the state begins anew: it was entered, or bytes moved. A request body has a second one, the end of the
 * stretch of time in which it has to make its way. */
static void
conn_touch(struct worker *w, struct conn *c)
{
	size_t at = STATES[c->state].deadline;

	if ((c->state == S_RELAY || c->state == S_TUNNEL) && pipe_waits(&c->resp))
		at = offsetof(struct config, reader_ms);
	c->deadline_ns = w->now_ns + *(const uint64_t *)((const char *)&config + at) * NS_PER_MS;
	if (c->state == S_LINGER)
		conn_hasten(c, c->linger_ns);
	if (w->stopping && c->request == NULL)
		conn_hasten(c, w->now_ns + (c->state == S_IDLE ? STOP_IDLE_MS : STOP_HALF_MS) * NS_PER_MS);
	if (c->state == S_CONNECT)
		conn_hasten(c, c->upstream.fd >= 0 ? c->request->connect_ns : w->now_ns + CONNECT_AGAIN_MS * NS_PER_MS);
	if (conn_spent(c))
		conn_hasten(c, w->now_ns + UPSTREAM_END_MS * NS_PER_MS);
	if (c->state == S_SEND || c->state == S_WAIT || c->state == S_TUNNEL) {
		c->request->idle_ns = c->deadline_ns;
		conn_hasten(c, c->state == S_SEND ? c->request->stretch_ns : w->now_ns + BEAR_MS * NS_PER_MS);
	}
	if (c->deadline_ns < w->sweep_ns)
		w->sweep_ns = c->deadline_ns;
}

/* What only waited for its end is over: the time of the state begins now. */
static void
conn_upstream_over(struct worker *w, struct conn *c)
{
	conn_leave_upstream(c);
	conn_touch(w, c);
}

static void
waiting_remove(struct conn *c)
{
	if (!c->waiting)
		return;
	c->old->young = c->young;
	c->young->old = c->old;
	c->waiting = false;
}

static void
conn_enter(struct worker *w, struct conn *c, enum state state)
{
	c->state = (uint8_t)state;
	if (state == S_LINGER)
		c->linger_ns = w->now_ns + LINGER_MS * NS_PER_MS;
	conn_touch(w, c);
	waiting_remove(c);
	if (!STATES[state].gives_way)
		return;
	c->old = w->waiting.old;
	c->young = &w->waiting;
	c->old->young = w->waiting.old = c;
	c->waiting = true;
}

/* ---- who the client is --------------------------------------------------------------------------------------- */

/* Connections by number, from 0 to the first that was never used. */
static struct conn *
conn_at(const struct worker *w, size_t number)
{
	return (struct conn *)(void *)w->conns.mem + number;
}

static size_t
conn_number(const struct worker *w, const struct conn *c)
{
	return (size_t)(c - conn_at(w, 0));
}

/* Tells the other workers of an open connection of an address; id 0: it is closed. */
static void
conn_count(struct worker *w, const struct conn *c, uint64_t id)
{
	uint32_t at = (uint32_t)conn_number(w, c);

	if (w->row == NULL)
		return;
	if (id != 0)
		count_up(&w->row->events, 1);
	atomic_store_explicit(&table_held(w->table, w->row)[at], id, memory_order_relaxed);
	if (w->row->used <= at)
		w->row->used = at + 1;
}

/* A peer's address in words. */
static void
addr_text(const struct sockaddr_storage *peer, char text[ADDR_TEXT_MAX])
{
	struct out o = {text, 0, ADDR_TEXT_MAX - 1, false};

	if (peer->ss_family == AF_INET || peer->ss_family == AF_INET6)
		out_ip(&o, peer);
	else
		out_text(&o, "unix");
	text[o.n] = '\0';
}

/* From now on this address is the client's. */
static void
conn_name(struct worker *w, struct conn *c, const unsigned char ip[16])
{
	struct sockaddr_storage ss = ip_address(ip);

	c->addr_id = table_address_id(w->table, &ss);
	addr_text(&ss, c->addr);
}

/* A trusted peer says of each request whose it is. */
static void
conn_name_forwarded(struct worker *w, struct conn *c)
{
	unsigned char ip[16];

	memcpy(ip, c->peer, sizeof ip);
	head_forwarded_for(&w->head, &config, ip);
	conn_name(w, c, ip);
}

/* ---- a request's life ---------------------------------------------------------------------------------------- */

/* X-Request-Id: the client's if it is sane, else 32 hex digits of our own. */
static void
request_id(struct worker *w, struct request *r, struct slice given)
{
	r->id_len = 0;
	while (r->id_len < given.n && given.n <= ID_MAX && (is_class(given.p[r->id_len], C_TOKEN) || given.p[r->id_len] == ':')) {
		r->id[r->id_len] = given.p[r->id_len];
		r->id_len++;
	}
	if (given.n > 0 && r->id_len == given.n)
		return;
	char *to = r->id;
	for (r->id_len = 32; to < r->id + 32;) {
		uint64_t word[2] = {w->now_ns, w->ids++}, bits = hash_keyed(w->random, word);
		for (int i = 0; i < 16; i++, bits >>= 4)
			*to++ = HEX[bits & 15];
	}
}

/* A new stretch of time begins, in which the body must not fall under 1 KB/s. */
static void
request_stretch(const struct worker *w, struct conn *c)
{
	c->request->stretch_ns = w->now_ns + STRETCH_MS * NS_PER_MS;
	c->request->stretch_in = c->req.in;
}

/* Takes a head's `n` bytes off the pipe and starts the record that lives until request_end(). */
static void
request_begin(struct worker *w, struct conn *c, size_t n)
{
	const struct head *h = &w->head;
	struct request *r = c->request = pool_take(&w->requests);

	if (r == NULL)
		abort();                     /* there is one for each connection */
	conn_leave_upstream(c);              /* that of the request before, if it has not ended */
	memset(r, 0, offsetof(struct request, method));
	r->begin_ns = w->now_ns;
	r->in = n;
	r->minor = h->minor;
	r->dialect = (uint8_t)head_dialect(h);
	r->method_len = (uint8_t)h->method.n;
	r->path_len = (uint16_t)(h->path.n < PATH_KEPT ? h->path.n : PATH_KEPT);
	if (r->method_len > 0)
		memcpy(r->method, h->method.p, r->method_len);
	if (r->path_len > 0)
		memcpy(r->path, h->path.p, r->path_len);
	request_id(w, r, h->request_id);
	r->head_method = slice_equal(h->method, S("HEAD"));
	r->page = h->page;

	c->req.body = head_body(h);
	r->leaves = h->close || (h->minor == 0 && !h->keep_alive);
	r->close = r->leaves || w->draining;
	r->expects = h->expect_continue && !c->req.body.done;
	c->req.raw += (uint32_t)n;
	c->req.in = c->req.out = c->resp.in = c->resp.out = 0;
	c->req.broken = false;
	request_stretch(w, c);
	if (w->row != NULL) {
		count_up(&w->row->events, 1);
		count_up(&w->row->requests, 1);
	}
}

/* The only place that ends a request: gives back what it held and writes the access line. */
static void
request_end(struct worker *w, struct conn *c, enum reason reason)
{
	struct request *r = c->request;

	if (r->reason == R_NONE)
		r->reason = (uint8_t)reason;
	if (r->status == 0)
		r->status = REASONS[r->reason].status;
	if (!r->quiet)
		log_access(w->log, w->now_ns, w->wall_ms, c, REASONS[r->reason].word, r->connected ? config.upstream.text : "");
	if (w->row != NULL)
		count_up(&w->row->requests, (uint64_t)-1);
	pool_give(&w->requests, r);
	c->request = NULL;
}

/* Would an end now look like the end of the answer? */
static bool
conn_looks_whole(const struct conn *c)
{
	return c->state == S_RELAY && c->resp.body.form == FORM_PLAIN;
}

/* Says why a handshake did not come to its end. */
static void
conn_tell_tls(struct worker *w, const struct conn *c)
{
	char error[32];

	log_tls_failed(w->log, w->wall_ms, c->addr, link_name(&c->client), link_error(&c->client, error));
}

/* The client's side is over for good, and the request with it; half-closing counts as that. [r32] */
static enum step
request_abandon(struct worker *w, struct conn *c, enum reason reason)
{
	c->reset = conn_looks_whole(c);
	c->request->status = 0;
	request_end(w, c, reason);
	return STEP_CLOSE;
}

/* After a whole answer: the next request, or the end, which lingers. The upstream was told to end its connection: where it has
 * not yet, that is waited for meanwhile, since who ends first holds the port for a minute. [r21, r27] */
static enum step
request_next(struct worker *w, struct conn *c, bool close_it)
{
	if (c->upstream.seen & (POLLIN | SEEN_GONE))
		conn_leave_upstream(c);
	if (!close_it) {
		if (c->req.raw == c->req.end)
			link_rest(&c->client);
		conn_enter(w, c, S_IDLE);
		return c->req.raw < c->req.end ? STEP_AGAIN : STEP_WAIT;
	}
	pipe_drop(w, &c->req);
	link_shut(&c->client);
	conn_enter(w, c, S_LINGER);
	return STEP_AGAIN;
}

/* Throws away what came of the request's body; true when that is all of it. */
static bool
request_swallow(struct conn *c)
{
	struct pipe *p = &c->req;

	p->start = p->ready;
	if (p->raw < p->end && !p->body.done && !pipe_run(p))
		return false;
	p->start = p->ready;
	return p->body.done;
}

/* Answers the request ourselves. The connection goes on only when nothing of the request is still to come. */
static enum step
conn_refuse(struct worker *w, struct conn *c, enum reason reason)
{
	struct request *r = c->request;
	char seconds[21];
	struct out wait = {seconds, 0, sizeof seconds, false};

	r->close |= r->expects;              /* whether the body still comes is the client's guess [r17] */
	if (pipe_waits(&c->resp)) {          /* half of an interim answer is out: nothing can follow it */
		request_end(w, c, reason);
		return STEP_CLOSE;
	}
	r->reason = (uint8_t)reason;
	r->status = REASONS[reason].status;
	r->quiet = reason == R_HEALTH;
	if (!request_swallow(c))
		r->close = true;
	if (c->req.mem != NULL)              /* a key may stand there that nobody looked at */
		wipe(c->req.mem + SLACK, c->req.raw - SLACK);
	out_number(&wait, (r->retry_ms + 999) / 1000);
	struct verdict v = {.reason = reason, .dialect = r->dialect, .id = {r->id, r->id_len}, .retry_ms = r->retry_ms,
	    .detail = r->detail != NULL ? slice_of(r->detail) : (struct slice){seconds, wait.n},
	    .head_method = r->head_method, .close = r->close, .keep_alive = r->minor == 0, .page = r->page};
	pipe_drop(w, &c->resp);
	struct out o = pipe_build(w, &c->resp);
	answer_own(&v, &o);
	pipe_built(w, &c->resp, &o);
	conn_enter(w, c, S_FLUSH);
	return STEP_AGAIN;
}

/* Refuses after the request went upstream, or should have: that connection is spent. */
static enum step
conn_refuse_upstream(struct worker *w, struct conn *c, enum reason reason)
{
	conn_leave_upstream(c);
	c->request->detail = config.upstream.text;
	return conn_refuse(w, c, reason);
}

/* Refuses because the upstream's answer cannot be taken; `why` is constant text. */
static enum step
conn_refuse_answer(struct worker *w, struct conn *c, const char *why)
{
	char text[sizeof config.upstream.text + 128];

	conn_leave_upstream(c);
	text_print(text, sizeof text, "%s did not answer in HTTP/1.1: %s", config.upstream.text, why);
	c->request->why = why;
	c->request->detail = text;
	enum step step = conn_refuse(w, c, R_UPSTREAM_BAD);
	if (c->request != NULL)
		c->request->detail = NULL;
	return step;
}

static enum step
step_flush(struct worker *w, struct conn *c)
{
	struct request *r = c->request;
	bool close_it = r->close;
	int flushed = pipe_flush(&c->resp, &c->client);

	if (flushed == 0)
		return STEP_WAIT;
	request_end(w, c, R_NONE);
	return flushed < 0 ? STEP_CLOSE : request_next(w, c, close_it);
}

/* Reads on while something comes, so that what the client still sends does not reset the connection under our answer: many look for
 * one only when they have sent all. */
static enum step
step_linger(struct worker *w, struct conn *c)
{
	char *waste = w->scratch[0][0];
	ssize_t n = LINK_AGAIN;

	if (c->upstream.seen != 0)
		conn_upstream_over(w, c);
	if (c->client.blocked)
		link_shut(&c->client);
	if (link_piped(&c->client))
		return STEP_CLOSE;
	for (int reads = 0; reads < MOVES_MAX && c->client.seen & SEEN_READ; reads++) {
		n = link_discard(&c->client, waste, BUF_SIZE);
		wipe(waste, n > 0 ? (size_t)n : 0);
		if (n == LINK_AGAIN)
			return STEP_WAIT;
		if (n <= 0)
			return STEP_CLOSE;
		conn_touch(w, c);
	}
	return STEP_WAIT;
}

/* ---- admission ----------------------------------------------------------------------------------------------- */

/* Finds the key that a request carries: the first that is one. Credentials are wiped where they stand: nothing needs them any
 * more. */
static enum reason
conn_authenticate(struct worker *w, struct conn *c)
{
	const struct head *h = &w->head;
	struct slice secret[CREDENTIALS_MAX], worn[] = {h->authorization, h->x_api_key, h->api_key, {"", 0}};
	size_t n = head_credentials(h, secret);
	enum reason reason = n == 0 ? R_NO_KEY : R_BAD_KEY;
	unsigned char digest[32];

	for (size_t i = 0; i < n && reason != R_NONE; i++) {
		if (secret[i].n > SECRET_MAX)
			continue;
		sha256_of(secret[i], digest);
		if (keys_find(w->keys, digest, &c->request->key))
			reason = c->request->key.flags & KEY_OFF ? R_KEY_OFF : R_NONE;
	}
	if (h->ws_protocol.n > 0)
		worn[3] = credential_protocol(h);
	for (size_t i = 0; i < LENGTH(worn); i++)
		if (worn[i].n > 0)
			wipe((char *)(uintptr_t)worn[i].p, worn[i].n);
	return reason;
}

/* A head that the parser refused: how it is answered. All of these end the connection. */
static enum reason
reason_of_status(int status)
{
	static const struct { int status; enum reason reason; } TABLE[] = {
		{405, R_METHOD}, {414, R_TARGET_LONG}, {417, R_EXPECT}, {431, R_HEAD_LONG}, {501, R_NOT_IMPLEMENTED}, {505, R_VERSION}};

	for (size_t i = 0; i < LENGTH(TABLE); i++)
		if (TABLE[i].status == status)
			return TABLE[i].reason;
	return R_BAD_REQUEST;
}

/* The whole policy: parsed already; then health, address limit, key. The places of preflight, expiry, addresses, route,
 * model, key rate, in-flight and tokens are marked. At last, what the parsers behind us would misread. R_NONE: it may pass. */
static enum reason
conn_admit(struct worker *w, struct conn *c)
{
	const struct head *h = &w->head;
	struct request *r = c->request;
	enum reason reason;

	if (path_matches(h, S("/health")) && (r->head_method || slice_equal(h->method, S("GET"))))
		return R_HEALTH;
	/* preflight */
	uint64_t wait_ns = table_take(w->table, c->addr_id, &config.ip_rate, w->now_ns);
	if (wait_ns > 0) {
		r->retry_ms = wait_ns / NS_PER_MS + 1;
		return R_IP_RATE;
	}
	reason = conn_authenticate(w, c);
	uint32_t stale = atomic_load_explicit(&w->keys->stale, memory_order_acquire);
	if (stale == STALE_ALL || (stale == STALE_PARTLY && reason == R_BAD_KEY)) {
		r->close = true;
		return R_STALE;
	}
	if (reason != R_NONE)
		return reason;
	/* expiry, addresses, route, model, key rate, in-flight, tokens */
	int status = head_unsafe(&w->head);
	if (status == 0)
		return R_NONE;
	r->close = true;
	r->detail = h->why;
	return reason_of_status(status);
}

static enum step
conn_refuse_head(struct worker *w, struct conn *c, enum reason reason)
{
	request_begin(w, c, c->req.end - c->req.raw);
	c->request->close = true;
	c->request->detail = w->head.why;
	return conn_refuse(w, c, reason);
}

/* Answers before any request was read: another protocol, or a connection that is one too many. */
static enum step
conn_turn_away(struct worker *w, struct conn *c, enum reason reason)
{
	head_clear(&w->head);
	request_begin(w, c, c->req.end - c->req.raw);
	c->request->close = true;
	c->request->retry_ms = reason == R_IP_CONNS ? 1000 : 0;
	enum step step = conn_refuse(w, c, reason);
	c->request->quiet = reason == R_IP_CONNS;   /* it was logged when it came */
	return step;
}

/* The TLS handshake, as far as it goes. */
static enum step
step_tls(struct worker *w, struct conn *c)
{
	unsigned stage = link_stage(&c->client);
	ssize_t done = link_handshake(&c->client);

	stage ^= link_stage(&c->client);
	if ((stage >> 16 != 0) != ((stage & 0xffff) != 0))
		w->signed_turn = w->turn;
	if (done == LINK_AGAIN)
		return STEP_WAIT;
	if (done == LINK_END)
		return STEP_CLOSE;
	if (done == LINK_PLAIN)
		return conn_turn_away(w, c, R_PLAIN_HTTP);
	if (done == LINK_FAILED) {
		conn_tell_tls(w, c);
		link_shut(&c->client);
		conn_enter(w, c, S_LINGER);
		return STEP_AGAIN;
	}
	if (c->refused != R_NONE)
		return conn_turn_away(w, c, c->refused);
	link_rest(&c->client);
	conn_enter(w, c, S_OPEN);
	return STEP_AGAIN;
}

/* A connection begins: in TLS, in plain, or by being one too many. */
static enum step
conn_begin(struct worker *w, struct conn *c)
{
	if (c->secure && !link_secure(&c->client, w->tls)) {
		conn_tell_tls(w, c);
		return STEP_CLOSE;
	}
	if (!c->secure && c->refused != R_NONE)
		return conn_turn_away(w, c, c->refused);
	conn_enter(w, c, c->secure ? S_TLS : S_OPEN);
	return STEP_AGAIN;
}

/* A trusted peer may say first for whom it connects. What it says is taken off before anything else is read. */
static enum step
step_new(struct worker *w, struct conn *c)
{
	char in[PROXY_HEAD_MAX];
	unsigned char ip[16];
	bool unnamed = false;

	if (!c->trusted || link_piped(&c->client))
		return conn_begin(w, c);
	ssize_t n = link_peek(&c->client, in, sizeof in);
	if (n == LINK_AGAIN)
		return STEP_WAIT;
	if (n <= 0)
		return STEP_CLOSE;
	memcpy(ip, c->peer, sizeof ip);
	int used = proxy_parse((struct slice){in, (size_t)n}, ip, &unnamed);
	/* Of unix sockets poll cannot be told to wait for the rest; nobody writes so short a header in pieces. */
	if (used == MORE && n < (ssize_t)sizeof in && !(c->client.seen & SEEN_GONE) && !ip_local(c->peer)) {
		link_await(&c->client, (size_t)n + 1);
		return STEP_WAIT;
	}
	if (used == MORE || used < 0) {
		log_turned_away(w->log, w->wall_ms, c->addr, 400, "bad_proxy_header");
		return STEP_CLOSE;
	}
	link_await(&c->client, 1);
	c->client.seen |= POLLIN;
	if (used == PROXY_NONE)
		return conn_begin(w, c);
	if (link_discard(&c->client, in, (size_t)used) != used)
		return STEP_CLOSE;
	c->client.seen |= POLLIN;            /* what follows is often there already */
	c->trusted = !unnamed && ip_trusted(&config, ip);   /* what this client says of others is another matter */
	if (memcmp(ip, c->peer, sizeof ip) != 0) {
		memcpy(c->peer, ip, sizeof ip);
		conn_name(w, c, ip);
		conn_count(w, c, 0);
		bool many = table_connections(w->table, c->addr_id, config.ip_conns) >= config.ip_conns;
		c->refused = (uint8_t)(many ? R_IP_CONNS : R_NONE);
		if (many)
			log_turned_away(w->log, w->wall_ms, c->addr, REASONS[R_IP_CONNS].status, REASONS[R_IP_CONNS].word);
		conn_count(w, c, many ? 0 : c->addr_id);
	}
	return conn_begin(w, c);
}

/* Chooses an address that this request has not tried: the first that does not rest, else the first. None left: `addrs`. */
static void
conn_choose(struct worker *w, struct conn *c)
{
	const struct upstream *u = &config.upstream;
	struct request *r = c->request;
	unsigned first = u->addrs;

	for (r->address = 0; r->address < u->addrs; r->address++) {
		if (r->tried >> r->address & 1)
			continue;
		first = first < u->addrs ? first : r->address;
		if (u->addrs == 1 || !fate_rests(w->table, &u->addr[r->address], w->now_ns))
			break;
	}
	r->address = (uint8_t)(r->address < u->addrs ? r->address : first);
	r->connect_ns = w->now_ns + config.connect_ms * NS_PER_MS;
}

/* The address that was tried does not take the connection; `portless`: there is no local address to reach it from. */
static void
conn_address_failed(struct worker *w, struct conn *c, bool portless)
{
	struct request *r = c->request;

	r->portless = portless && (r->tried == 0 || r->portless);
	if (config.upstream.addrs > 1)
		fate_failed(w->table, &config.upstream.addr[r->address], w->now_ns);
	r->tried |= (uint8_t)(1u << r->address);
	conn_choose(w, c);
}

/* Connects to the chosen address, or the next that takes the attempt. A unix socket whose queue is full is tried again. */
static enum step
conn_connect(struct worker *w, struct conn *c)
{
	struct request *r = c->request;

	conn_leave_upstream(c);
	for (; r->address < config.upstream.addrs; conn_address_failed(w, c, errno == EADDRNOTAVAIL)) {
		if (link_connect(&c->upstream, &config.upstream.addr[r->address]) == 0 || errno == EAGAIN) {
			conn_enter(w, c, S_CONNECT);
			return c->upstream.fd >= 0 ? STEP_AGAIN : STEP_WAIT;
		}
		if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
			r->retry_ms = 1000;
			return conn_refuse(w, c, R_FULL);
		}
	}
	if (r->portless) {
		r->retry_ms = 1000;
		return conn_refuse(w, c, R_FULL);
	}
	w->connect_failed = true;
	return conn_refuse_upstream(w, c, config.upstream.addrs > 0 ? R_UPSTREAM_REFUSED : R_UPSTREAM_UNKNOWN);
}

/* An admitted request: its head is written anew and goes to the upstream. */
static enum step
conn_forward(struct worker *w, struct conn *c)
{
	struct request *r = c->request;
	struct out o = pipe_build(w, &c->req);
	bool https = c->client.tls != NULL || (c->trusted && head_forwarded_https(&w->head));
	struct forward to = {.host = slice_of(config.upstream.host), .addr = slice_of(c->addr), .proto = https ? S("https") : S("http"),
	    .id = {r->id, r->id_len}, .upgrade = head_upgrades(&w->head)};

	r->upgrade = to.upgrade;
	head_rewrite(&w->head, &to, &o);
	if (o.full) {
		r->detail = "the head is too long to be passed on";
		r->close = true;
		return conn_refuse(w, c, R_HEAD_LONG);
	}
	pipe_built(w, &c->req, &o);
	conn_choose(w, c);
	return conn_connect(w, c);
}

/* S_OPEN, S_IDLE and S_HEAD: until a head is whole. */
static enum step
step_head(struct worker *w, struct conn *c)
{
	int n = MORE;

	if (c->upstream.seen != 0)
		conn_upstream_over(w, c);          /* it ended, or said something unasked [r26] */
	if (c->req.raw < c->req.end)
		n = head_parse(&w->head, pipe_raw(&c->req));
	if (n < 0 && head_is_tls(pipe_raw(&c->req)))
		return conn_turn_away(w, c, R_TLS_HELLO);
	if (n < 0)
		return conn_refuse_head(w, c, reason_of_status(-n));
	if (n > 0) {
		request_begin(w, c, (size_t)n);
		if (c->trusted)
			conn_name_forwarded(w, c);
		enum reason reason = conn_admit(w, c);
		return reason != R_NONE ? conn_refuse(w, c, reason) : conn_forward(w, c);
	}
	if (c->req.raw < c->req.end && c->state != S_HEAD) {
		if (c->state == S_OPEN)
			c->state = S_HEAD;   /* the time counts from the begin of S_OPEN: accept, or the handshake's end */
		else
			conn_enter(w, c, S_HEAD);
	}
	if (!link_readable(&c->client))
		return STEP_WAIT;
	ssize_t got = pipe_fill(w, &c->req, &c->client);
	if (got == LINK_AGAIN)
		return STEP_WAIT;
	return got > 0 ? STEP_AGAIN : STEP_CLOSE;
}

/* ---- relaying ------------------------------------------------------------------------------------------------ */

/* Has the client left, and how? */
static enum reason
conn_left(struct conn *c)
{
	bool cut;

	if (!link_left(&c->client, &cut))
		return R_NONE;
	return cut ? R_CLIENT_CUT : R_CLIENT_CLOSED;
}

/* The first bytes go out when the connection stands. */
static enum step
step_connect(struct worker *w, struct conn *c)
{
	struct pipe *p = &c->req;
	uint64_t before = p->out;
	enum reason left;

	if (c->client.seen & SEEN_GONE && (left = conn_left(c)) != R_NONE) {
		if (w->now_ns + config.connect_ms * NS_PER_MS > c->request->connect_ns + CONNECT_SLOW_MS * NS_PER_MS)
			conn_address_failed(w, c, false);    /* its patience ended before ours */
		return request_abandon(w, c, left);
	}
	if (c->upstream.fd < 0)
		return STEP_WAIT;
	if (p->raw < p->end && !p->body.done && !pipe_run(p))
		return conn_refuse_upstream(w, c, R_BAD_BODY);
	if (pipe_flush(p, &c->upstream) < 0 && p->out == before) {
		conn_address_failed(w, c, false);
		return conn_connect(w, c);
	}
	if (p->out == before)
		return STEP_WAIT;
	if (config.upstream.addrs > 1)
		fate_reached(w->table, &config.upstream.addr[c->request->address]);
	if (!p->body.done || pipe_waits(p) || c->request->upgrade)
		link_prompt(&c->upstream);
	c->request->connected = true;
	request_stretch(w, c);
	conn_enter(w, c, S_SEND);
	return STEP_AGAIN;
}

/* After the answer head went out there is no other way to say that something is wrong than to cut. A close-delimited
 * answer must not seem whole: its connection is reset. */
static enum step
conn_cut(struct worker *w, struct conn *c, enum reason reason)
{
	c->reset = conn_looks_whole(c);
	request_end(w, c, reason);
	return STEP_CLOSE;
}

/* The request's way. STEP_AGAIN: go on with the answer's way. */
static enum step
relay_request(struct worker *w, struct conn *c)
{
	struct pipe *p = &c->req;
	uint64_t before = p->out;

	if (p->broken)
		return STEP_AGAIN;
	enum move move = pipe_move(w, p, &c->client, &c->upstream);
	/* What a client sends does not stand for what it should read. */
	if (p->out != before && !(c->state == S_RELAY && pipe_waits(&c->resp)))
		conn_touch(w, c);
	switch (move) {
	case MOVE_DONE:
		if (c->state == S_SEND)
			conn_enter(w, c, S_WAIT);
		return STEP_AGAIN;
	case MOVE_BAD:
		if (c->state == S_RELAY)
			return conn_cut(w, c, R_BAD_BODY);
		return conn_refuse_upstream(w, c, R_BAD_BODY);
	case MOVE_END:
	case MOVE_FROM_FAILED:
		return request_abandon(w, c, move == MOVE_FROM_FAILED && c->client.tls != NULL ? R_CLIENT_CUT : R_CLIENT_CLOSED);
	case MOVE_TO_FAILED:
		p->broken = true;            /* it may have answered already: look, and tell it that no more comes */
		link_shut(&c->upstream);
		c->upstream.seen |= POLLIN;
		return STEP_AGAIN;
	default:
		return STEP_AGAIN;
	}
}

/* An interim answer is passed on, to those who know what that is. [r24] */
static enum step
relay_interim(struct worker *w, struct conn *c)
{
	struct request *r = c->request;

	if (++r->interim > INTERIM_MAX)
		return conn_refuse_answer(w, c, "more than 100 interim answers");
	if (r->minor == 0 || r->interim > INTERIM_RELAYED_MAX)
		return STEP_AGAIN;
	struct out o = pipe_build(w, &c->resp);
	struct body none = {.kind = BODY_NONE};
	struct backward to = {.minor = r->minor, .host = slice_of(config.upstream.host)};
	answer_rewrite(&w->head, &none, &to, &o);
	pipe_built(w, &c->resp, &o);
	return STEP_AGAIN;
}

static enum step
relay_tunnel(struct worker *w, struct conn *c)
{
	struct request *r = c->request;
	struct out o = pipe_build(w, &c->resp);
	struct body bytes = {.kind = BODY_CLOSE, .form = FORM_PLAIN};
	struct backward to = {.minor = r->minor, .connection = S("upgrade"), .id = {r->id, r->id_len},
	    .host = slice_of(config.upstream.host)};

	if (!r->upgrade || !w->head.upgrade_websocket || !w->head.option_upgrade)
		return conn_refuse_answer(w, c, "a 101 that nobody asked for");
	r->status = 101;
	r->first_ns = w->now_ns;
	r->close = true;
	answer_rewrite(&w->head, &bytes, &to, &o);
	pipe_built(w, &c->resp, &o);
	c->req.body = c->resp.body = bytes;
	conn_enter(w, c, S_TUNNEL);
	return STEP_AGAIN;
}

/* The final answer's head goes out in our words, together with what of the body came with it. */
static enum step
relay_final(struct worker *w, struct conn *c)
{
	const struct head *h = &w->head;
	struct request *r = c->request;
	struct out o = pipe_build(w, &c->resp);
	struct body b = answer_body(h, r->head_method);

	b.form = (uint8_t)answer_form(&b, r->minor);
	r->status = (uint16_t)h->status;
	r->first_ns = w->now_ns;
	/* an answer that comes before the request's body is whole ends both connections [r30] */
	if (!c->req.body.done || w->draining || (r->minor == 0 && (b.kind == BODY_CLOSE || b.kind == BODY_CHUNKED)))
		r->close = true;
	struct backward to = {.minor = r->minor, .connection = r->close ? S("close") : r->minor == 0 ? S("keep-alive") : S(""),
	    .id = {r->id, r->id_len}, .host = slice_of(config.upstream.host)};
	answer_rewrite(h, &b, &to, &o);
	if (o.full)
		return conn_refuse_answer(w, c, "a head that is too long to be passed on");
	pipe_built(w, &c->resp, &o);
	c->resp.body = b;
	conn_enter(w, c, S_RELAY);
	return STEP_AGAIN;
}

/* Until the final answer's head is whole. */
static enum step
relay_answer_head(struct worker *w, struct conn *c)
{
	int n = MORE;

	for (int reads = 0; reads <= MOVES_MAX; reads++) {
		int flushed = pipe_flush(&c->resp, &c->client);    /* an interim answer */
		if (flushed <= 0)
			return flushed < 0 ? request_abandon(w, c, R_CLIENT_CLOSED) : STEP_WAIT;
		if (c->resp.raw < c->resp.end)
			n = answer_parse(&w->head, pipe_raw(&c->resp));
		if (n != MORE)
			break;
		if (!(c->upstream.seen & SEEN_READ))
			return STEP_WAIT;
		ssize_t got = pipe_fill(w, &c->resp, &c->upstream);
		if (got == LINK_AGAIN)
			return STEP_WAIT;
		if (got == LINK_END || got == LINK_FAILED)
			return conn_refuse_upstream(w, c, R_UPSTREAM_CLOSED);
	}
	if (n == MORE)
		return STEP_WAIT;
	if (n < 0)
		return conn_refuse_answer(w, c, w->head.why);
	c->resp.raw += (uint32_t)n;
	if (w->head.status == 101)
		return relay_tunnel(w, c);
	return w->head.status < 200 ? relay_interim(w, c) : relay_final(w, c);
}

/* Who said that this is its last request, and sent all of it, sends nothing more that could reset the connection before our
 * answer is read: it need not linger. */
static bool
conn_ends_at_once(const struct conn *c)
{
	return c->request->leaves && c->req.body.done && c->req.raw == c->req.end && !pipe_waits(&c->req) && c->client.tls == NULL &&
	       !link_piped(&c->client) && (c->upstream.seen & (POLLIN | SEEN_GONE)) != 0;
}

/* The answer is whole, and with it both connections end, or the client's goes on. What came behind the answer is nobody's. Of a
 * request's body that is not whole the rest is sent on while the upstream takes it. [r26, r30] */
static enum step
relay_done(struct worker *w, struct conn *c)
{
	bool close_it = c->request->close, sent = c->req.body.done && !pipe_waits(&c->req);

	if (!sent && !c->req.broken && !(c->upstream.seen & (POLLIN | SEEN_GONE)))
		return STEP_WAIT;
	bool at_once = conn_ends_at_once(c);
	c->req.start = c->req.ready;
	pipe_drop(w, &c->resp);
	request_end(w, c, R_NONE);
	return at_once ? STEP_CLOSE : request_next(w, c, close_it);
}

static enum step
relay_answer(struct worker *w, struct conn *c)
{
	uint64_t before = c->resp.out;
	bool waited = pipe_waits(&c->resp);
	enum move move = pipe_move(w, &c->resp, &c->upstream, &c->client);

	if (c->resp.out != before || (!waited && pipe_waits(&c->resp)))
		conn_touch(w, c);
	switch (move) {
	case MOVE_DONE:
		return relay_done(w, c);
	case MOVE_TO_FAILED:
		return request_abandon(w, c, c->client.tls != NULL ? R_CLIENT_CUT : R_CLIENT_CLOSED);
	case MOVE_WAIT:
		return STEP_WAIT;
	default:
		return conn_cut(w, c, R_UPSTREAM_CUT);
	}
}

/* S_SEND, S_WAIT and S_RELAY: both ways at once. */
static enum step
step_relay(struct worker *w, struct conn *c)
{
	uint8_t state = c->state;

	enum reason left = c->req.body.done || c->client.seen & SEEN_GONE ? conn_left(c) : R_NONE;
	if (left != R_NONE)
		return request_abandon(w, c, left);
	enum step step = relay_request(w, c);
	if (step != STEP_AGAIN || c->request == NULL || c->state == S_FLUSH)
		return step;
	if (c->state == S_RELAY)
		return relay_answer(w, c);
	if (c->state != state && !(c->upstream.seen & SEEN_READ) && c->resp.raw == c->resp.end)
		return STEP_WAIT;            /* just sent: no answer yet */
	return relay_answer_head(w, c);
}

/* After 101: bytes both ways until one side ends. */
static enum step
step_tunnel(struct worker *w, struct conn *c)
{
	uint64_t before = c->req.out + c->resp.out;
	enum move up = c->req.broken ? MOVE_WAIT : pipe_move(w, &c->req, &c->client, &c->upstream);
	enum move down = pipe_move(w, &c->resp, &c->upstream, &c->client);

	if (c->req.out + c->resp.out != before)
		conn_touch(w, c);
	if (up == MOVE_TO_FAILED && down == MOVE_WAIT) {
		c->req.broken = true;        /* what the upstream said before it closed still goes down */
		c->upstream.seen |= POLLIN;
		return STEP_AGAIN;
	}
	if (up == MOVE_WAIT && down == MOVE_WAIT)
		return STEP_WAIT;
	request_end(w, c, R_NONE);
	conn_leave_upstream(c);
	return down == MOVE_DONE ? request_next(w, c, true) : STEP_CLOSE;
}

/* ---- the whole connection ------------------------------------------------------------------------------------ */

/* The only place where a connection ends: closes its links, wipes and returns its buffers. */
static void
conn_close(struct worker *w, struct conn *c)
{
	if ((c->state == S_IDLE || c->state == S_OPEN) && c->client.tls != NULL)
		link_shut(&c->client);       /* nothing is cut by this end, and TLS says so */
	link_close(&c->client, c->reset);
	conn_leave_upstream(c);
	pipe_drop(w, &c->req);
	pipe_drop(w, &c->resp);
	waiting_remove(c);
	conn_count(w, c, 0);
	if (!c->parked) {
		c->next->prev = c->prev;
		c->prev->next = c->next;
	}
	c->state = S_FREE;
	pool_give(&w->conns, c);
	w->used--;
}

static struct conn *
conn_open(struct worker *w, int fd, int out, const struct sockaddr_storage *peer, bool secure)
{
	struct conn *c = pool_take(&w->conns);
	bool queued = c->queued, brief = c->brief;   /* by who had the place before and gave way */

	w->used++;
	memset(c, 0, sizeof *c);
	c->queued = queued;
	c->brief = brief;
	link_open(&c->client, fd);
	c->client.out = out;
	link_open(&c->upstream, -1);
	ip_of(peer, c->peer);
	c->secure = secure;
	c->trusted = config.trusts > 0 && ip_trusted(&config, c->peer);
	pipe_empty(&c->req);
	pipe_empty(&c->resp);
	c->resp.side = 1;
	c->addr_id = table_address_id(w->table, peer);
	conn_count(w, c, c->addr_id);
	addr_text(peer, c->addr);
	c->next = &w->polled;
	c->prev = w->polled.prev;
	c->prev->next = w->polled.prev = c;
	conn_enter(w, c, S_NEW);
	return c;
}

/* Ends a connection whatever it is doing. */
static void
conn_end(struct worker *w, struct conn *c, enum reason reason)
{
	if (c->request != NULL) {
		c->reset |= conn_looks_whole(c);
		request_end(w, c, reason);
	}
	conn_close(w, c);
}

/* Takes steps until the connection has to wait, or ends, or until others must have their turn. */
static void
conn_step(struct worker *w, struct conn *c)
{
	enum step step = STEP_AGAIN;

	/* A signature costs as much as hundreds of requests: one a turn. */
	for (int steps = 0; step == STEP_AGAIN && steps < STEPS_MAX && !(c->state == S_TLS && w->signed_turn == w->turn); steps++)
		step = STATES[c->state].step(w, c);
	c->again = step == STEP_AGAIN;
	if (step == STEP_CLOSE) {
		conn_end(w, c, R_CLIENT_CLOSED);
		return;
	}
	pipe_settle(w, &c->req);
	pipe_settle(w, &c->resp);
}

/* The end of a stretch of time: did enough of the request's body come, or is it the upstream that is slow? */
static bool
request_moves(struct worker *w, struct conn *c)
{
	struct request *r = c->request;
	uint64_t idle_ns = r->idle_ns;
	bool told_to_wait = r->expects && r->interim == 0 && c->req.in == 0;

	if (w->now_ns >= idle_ns || (c->req.in - r->stretch_in < STRETCH_BYTES && !pipe_waits(&c->req) && !told_to_wait))
		return false;
	request_stretch(w, c);
	conn_touch(w, c);
	r->idle_ns = idle_ns;
	if (idle_ns < c->deadline_ns)
		c->deadline_ns = idle_ns;
	return true;
}

static enum step
late_end(struct worker *w, struct conn *c, enum reason reason)
{
	(void)w, (void)c, (void)reason;
	return STEP_CLOSE;
}

static enum step
late_tls(struct worker *w, struct conn *c, enum reason reason)
{
	conn_tell_tls(w, c);
	return late_end(w, c, reason);
}

static enum step
late_head(struct worker *w, struct conn *c, enum reason reason)
{
	head_clear(&w->head);
	return conn_refuse_head(w, c, w->stopping ? R_DRAIN : reason);
}

/* Another try at a full unix socket, or another address. */
static enum step
late_connect(struct worker *w, struct conn *c, enum reason reason)
{
	if (w->now_ns < c->request->connect_ns)
		return conn_connect(w, c);
	conn_address_failed(w, c, false);
	w->connect_failed |= c->request->address >= config.upstream.addrs;
	return c->request->address < config.upstream.addrs ? conn_connect(w, c) : conn_refuse_upstream(w, c, reason);
}

static enum step
late_send(struct worker *w, struct conn *c, enum reason reason)
{
	if (pipe_waits(&c->req))
		link_bear(&c->upstream);
	if (request_moves(w, c))
		return STEP_WAIT;
	c->request->close = true;
	return conn_refuse_upstream(w, c, pipe_waits(&c->req) ? R_IDLE : reason);
}

/* Of what the kernel took there may be something left that the upstream does not read yet. */
static enum step
late_wait(struct worker *w, struct conn *c, enum reason reason)
{
	uint64_t end_ns = c->request->idle_ns;

	if (w->now_ns >= end_ns)
		return c->state == S_TUNNEL ? late_relay(w, c, reason) : conn_refuse_upstream(w, c, reason);
	link_bear(&c->upstream);
	conn_touch(w, c);
	c->request->idle_ns = end_ns;
	conn_hasten(c, end_ns);
	return STEP_WAIT;
}

static enum step
late_relay(struct worker *w, struct conn *c, enum reason reason)
{
	return conn_cut(w, c, pipe_waits(&c->resp) ? R_CLIENT_STALLED : reason);
}

/* A deadline passed. */
static void
conn_late(struct worker *w, struct conn *c)
{
	const struct state_row *row = &STATES[c->state];

	if (conn_spent(c)) {                 /* an upstream that does not end as it was told to */
		conn_upstream_over(w, c);
		return;
	}
	enum step step = row->late(w, c, row->reason);
	if (step == STEP_CLOSE)
		conn_end(w, c, row->reason);
	else if (step == STEP_AGAIN)
		conn_step(w, c);
}

/* ============================================================================================================= *
 * SANDBOX
 * Owns: what a process may not do any more: user, root directory, limits, Landlock, seccomp; the looking up of names, which
 *       is done in a child of that kind
 * Calls: BASICS, CONFIG (the user, the upstream, addresses); in the self-test LOG, CERTIFICATE and LINK
 * Promises: a process that serves cannot execute, fork, trace or open for writing, and ends when it tries; another call than
 *           those that it is made of fails, and is no end of it; what the kernel lacks is told
 * Never: lets a worker of a server that was started as root serve as root
 * ============================================================================================================= */

/* Where the upstream's unix socket is seen from inside that directory. */
static void
sandbox_upstream(void)
{
	struct sockaddr_un *un = (struct sockaddr_un *)&config.upstream.addr[0].ss;
	const char *slash = strrchr(un->sun_path, '/');

	if (un->sun_family == AF_UNIX && slash != NULL)
		memmove(un->sun_path, slash, strlen(slash) + 1);
}

static const struct { unsigned wall; const char *name; } WALLS[] = {
	{WALL_USER, "user"}, {WALL_ROOT, "chroot"}, {WALL_PRIVILEGES, "no_new_privs"}, {WALL_SECCOMP, "seccomp"},
	{WALL_FILES, "landlock_files"}, {WALL_CONNECT, "landlock_connect"}};

/* The walls by name: `user,chroot,seccomp`, or `none`. */
static void
out_walls(struct out *o, unsigned walls)
{
	bool first = true;

	for (size_t i = 0; i < LENGTH(WALLS); i++)
		if (walls & WALLS[i].wall) {
			out_print(o, "%s%s", first ? "" : ",", WALLS[i].name);
			first = false;
		}
	if (first)
		out_text(o, "none");
}

#if TINYAUTH_LINUX && !defined(TINYAUTH_NO_SANDBOX)

enum { FOR_WORKER = 1, FOR_RESOLVER = 2, FOR_SUPERVISOR = 4, FOR_SERVING = FOR_WORKER | FOR_RESOLVER, FOR_ALL = 7, FOR_INETD = 8 };

struct call { unsigned number : 24, roles : 8; };

/* What workers, and the child that looks up names, may call: by what our code does with it. What is not here fails as if the
 * kernel lacked it: libc then takes an older call, or we hear of it. */
static const struct call CALLS[] = {
	/* move bytes */
	{SYS_recvfrom, FOR_SERVING}, {SYS_sendto, FOR_SERVING}, {SYS_recvmsg, FOR_SERVING}, {SYS_read, FOR_SERVING},
	{SYS_write, FOR_SERVING},
#ifdef SYS_recv
	{SYS_recv, FOR_SERVING}, {SYS_send, FOR_SERVING},
#endif
	/* wait */
	{SYS_ppoll, FOR_SERVING}, {SYS_epoll_pwait, FOR_WORKER}, {SYS_epoll_ctl, FOR_WORKER}, {SYS_restart_syscall, FOR_SERVING},
#ifdef SYS_poll
	{SYS_poll, FOR_SERVING}, {SYS_epoll_wait, FOR_WORKER},
#endif
#ifdef SYS_ppoll_time64
	{SYS_ppoll_time64, FOR_SERVING},
#endif
	/* begin and end connections */
	{SYS_close, FOR_SERVING}, {SYS_socket, FOR_SERVING}, {SYS_connect, FOR_SERVING}, {SYS_accept4, FOR_WORKER},
	{SYS_shutdown, FOR_SERVING}, {SYS_setsockopt, FOR_SERVING}, {SYS_getsockopt, FOR_SERVING},
#ifdef SYS_accept
	{SYS_accept, FOR_WORKER},            /* musl's accept4() tries it where the other said EINVAL */
#endif
	/* look at the clock, where the kernel has no page for that */
#ifdef SYS_clock_gettime
	{SYS_clock_gettime, FOR_SERVING},
#endif
#ifdef SYS_clock_gettime32
	{SYS_clock_gettime32, FOR_SERVING},
#endif
#ifdef SYS_clock_gettime64
	{SYS_clock_gettime64, FOR_SERVING},
#endif
	/* seed TLS, and make up ids */
	{SYS_getrandom, FOR_SERVING},
	/* give memory back */
	{SYS_madvise, FOR_SERVING}, {SYS_munmap, FOR_SERVING},
	/* look what a new log is: fstat(), which some libcs make of other calls */
	{SYS_fstat, FOR_SERVING},
#if defined(SYS_fstat64) || defined(__GLIBC__)
	{SYS_statx, FOR_SERVING},
#else
	{SYS_statx, FOR_RESOLVER},
#endif
#if defined(SYS_newfstatat) && defined(__GLIBC__)
	{SYS_newfstatat, FOR_SERVING},
#elif defined(SYS_newfstatat)
	{SYS_newfstatat, FOR_RESOLVER},
#endif
#ifdef SYS_fstat64
	{SYS_fstat64, FOR_SERVING}, {SYS_fstatat64, FOR_SERVING},
#endif
	/* give a terminal its flags back under -i; elsewhere it could make listeners block, which all workers share */
	{SYS_fcntl, FOR_RESOLVER | FOR_INETD},
#ifdef SYS_fcntl64
	{SYS_fcntl64, FOR_RESOLVER | FOR_INETD},
#endif
	/* return from a signal */
	{SYS_rt_sigreturn, FOR_SERVING},
#ifdef SYS_sigreturn
	{SYS_sigreturn, FOR_SERVING},        /* 32-bit ARM's, from a handler without siginfo */
#endif
	/* end */
	{SYS_exit, FOR_SERVING}, {SYS_exit_group, FOR_SERVING},
	/* look up a name: read files, ask servers, not for ever */
	{SYS_openat, FOR_RESOLVER}, {SYS_readv, FOR_RESOLVER}, {SYS_lseek, FOR_RESOLVER}, {SYS_bind, FOR_RESOLVER},
	{SYS_sendmsg, FOR_RESOLVER}, {SYS_getsockname, FOR_RESOLVER}, {SYS_rt_sigprocmask, FOR_RESOLVER}, {SYS_brk, FOR_RESOLVER},
	{SYS_ioctl, FOR_RESOLVER}, {SYS_futex, FOR_RESOLVER}, {SYS_setitimer, FOR_RESOLVER},
#ifdef SYS_open
	{SYS_open, FOR_RESOLVER}, {SYS_stat, FOR_RESOLVER},
#endif
#ifdef SYS_stat64
	{SYS_stat64, FOR_RESOLVER},
#endif
#if defined(SYS_alarm) && defined(__GLIBC__)
	{SYS_alarm, FOR_RESOLVER},
#endif
#if defined(__GLIBC__)
	{SYS_uname, FOR_RESOLVER}, {SYS_mprotect, FOR_RESOLVER},
#endif
	{SYS_sendmmsg, FOR_RESOLVER}, {SYS_recvmmsg, FOR_RESOLVER},
#ifdef SYS_mmap
	{SYS_mmap, FOR_RESOLVER},
#endif
#ifdef SYS_mmap2
	{SYS_mmap2, FOR_RESOLVER}, {SYS__llseek, FOR_RESOLVER},
#endif
};

/* What no process of ours ever calls: who does was taken over. One that serves is killed, and the supervisor tells which call it
 * was. The supervisor itself, and what it executes, perhaps a version that knows more, is denied these and nothing else. */
static const struct call NEVER[] = {
	{SYS_execve, FOR_SERVING}, {SYS_execveat, FOR_SERVING}, {SYS_clone, FOR_SERVING}, {SYS_kill, FOR_SERVING},
#ifdef SYS_fork
	{SYS_fork, FOR_SERVING}, {SYS_vfork, FOR_SERVING}, {SYS_creat, FOR_SERVING},
#endif
	{SYS_ptrace, FOR_ALL}, {SYS_process_vm_readv, FOR_ALL}, {SYS_process_vm_writev, FOR_ALL}, {SYS_kcmp, FOR_ALL},
	{438 /* pidfd_getfd */, FOR_ALL}, {440 /* process_madvise */, FOR_ALL},
	{SYS_mount, FOR_ALL}, {SYS_umount2, FOR_ALL}, {SYS_pivot_root, FOR_ALL}, {428 /* open_tree */, FOR_ALL},
	{429 /* move_mount */, FOR_ALL}, {430 /* fsopen */, FOR_ALL}, {431 /* fsconfig */, FOR_ALL}, {432 /* fsmount */, FOR_ALL},
	{433 /* fspick */, FOR_ALL}, {442 /* mount_setattr */, FOR_ALL}, {SYS_unshare, FOR_ALL}, {SYS_setns, FOR_ALL},
	{SYS_bpf, FOR_ALL}, {SYS_perf_event_open, FOR_ALL}, {SYS_userfaultfd, FOR_ALL}, {425 /* io_uring_setup */, FOR_ALL},
	{426 /* io_uring_enter */, FOR_ALL}, {427 /* io_uring_register */, FOR_ALL}, {SYS_add_key, FOR_ALL},
	{SYS_request_key, FOR_ALL}, {SYS_keyctl, FOR_ALL}, {SYS_init_module, FOR_ALL}, {SYS_finit_module, FOR_ALL},
	{SYS_delete_module, FOR_ALL}, {SYS_kexec_load, FOR_ALL}, {SYS_reboot, FOR_ALL}, {SYS_swapon, FOR_ALL},
	{SYS_swapoff, FOR_ALL}, {SYS_acct, FOR_ALL}, {SYS_quotactl, FOR_ALL}, {SYS_open_by_handle_at, FOR_ALL},
	{SYS_fanotify_init, FOR_ALL}, {SYS_sethostname, FOR_ALL}, {SYS_setdomainname, FOR_ALL},
#ifdef SYS_iopl
	{SYS_iopl, FOR_ALL}, {SYS_ioperm, FOR_ALL},
#endif
};

/* The kernel's interface, whose headers a musl toolchain may lack: linux/filter.h, seccomp.h, audit.h, landlock.h, prctl.h. */
struct filter_step { uint16_t code; uint8_t yes, no; uint32_t k; };
struct filter { uint16_t n; struct filter_step *step; };
enum { LOAD_WORD = 0x20, AND = 0x54, JUMP = 0x05, IF_EQUAL = 0x15, IF_AT_LEAST = 0x35, RETURN = 0x06,
	OFFSET_NUMBER = 0, OFFSET_ARCH = 4, OFFSET_ARGUMENTS = 16 };
enum { NO_NEW_PRIVS = 38, SET_DUMPABLE = 4, GET_SECCOMP = 21, SET_SECCOMP = 22, MODE_FILTER = 2, SET_MODE_FILTER = 1, FLAG_LOG = 2 };
#define ALLOW 0x7fff0000u
#define KILL_PROCESS 0x80000000u
#define TRAP 0x00030000u
#define FAIL_ENOSYS (0x00050000u | ENOSYS)
#define FAIL_EPERM (0x00050000u | EPERM)
#define FOREIGN_CALLS 0x40000000u    /* numbers of another interface begin here: x32 */
#if defined(__x86_64__)
#define AUDIT_ARCH 0xc000003eu
#elif defined(__aarch64__)
#define AUDIT_ARCH 0xc00000b7u
#elif defined(__arm__)
#define AUDIT_ARCH 0x40000028u
#elif defined(__riscv) && __riscv_xlen == 64
#define AUDIT_ARCH 0xc00000f3u
#else
#define AUDIT_ARCH 0u                /* not known: no filter */
#endif

/* Other libraries than musl ask daemons and the kernel for names. */
#if defined(__GLIBC__)
enum { FOR_NAMES = FOR_WORKER };
#else
enum { FOR_NAMES = FOR_SERVING };
#endif

/* What else must hold of a call: argument & mask == value, or `action`. `high`: of the upper half of an argument. */
static const struct rule {
	int number;
	uint8_t roles, argument;
	bool high;
	uint32_t mask, value, action;
} RULES[] = {
	{SYS_socket, FOR_NAMES, 0, false, AF_UNIX, 0, TRAP},    /* first: left out when the upstream is a unix socket */
	{SYS_socket, FOR_NAMES, 0, false, ~(uint32_t)(AF_UNIX | AF_INET | AF_INET6), 0, TRAP},
	{SYS_socket, FOR_WORKER, 1, false, ~(uint32_t)(SOCK_NONBLOCK | SOCK_CLOEXEC), SOCK_STREAM, TRAP},
	{SYS_socket, FOR_WORKER, 2, false, UINT32_MAX, 0, TRAP},       /* TCP, not MPTCP, which Landlock lets through */
	{SYS_sendto, FOR_WORKER, 3, false, MSG_FASTOPEN, 0, TRAP},     /* no connecting besides connect() */
	{SYS_sendto, FOR_WORKER, 4, false, UINT32_MAX, 0, TRAP},
#if UINTPTR_MAX > UINT32_MAX
	{SYS_sendto, FOR_WORKER, 4, true, UINT32_MAX, 0, TRAP},
#endif
#ifdef SYS_send
	{SYS_send, FOR_WORKER, 3, false, MSG_FASTOPEN, 0, TRAP},
#endif
	{SYS_fcntl, FOR_SERVING, 1, false, ~7u, 0, FAIL_EPERM},        /* F_SETOWN and what follows it send signals */
#ifdef SYS_fcntl64
	{SYS_fcntl64, FOR_SERVING, 1, false, ~7u, 0, FAIL_EPERM},
#endif
	{SYS_madvise, FOR_WORKER, 2, false, UINT32_MAX, MADV_DONTNEED, FAIL_ENOSYS},   /* others empty mappings for all workers */
	{SYS_openat, FOR_SERVING, 2, false, O_ACCMODE | O_CREAT | O_TRUNC, 0, TRAP},   /* nothing is written but what is open */
#ifdef SYS_open
	{SYS_open, FOR_SERVING, 1, false, O_ACCMODE | O_CREAT | O_TRUNC, 0, TRAP},
#endif
	/* as fstat() calls them; the name is behind a pointer, which no filter sees */
	{SYS_statx, FOR_WORKER, 2, false, AT_EMPTY_PATH, AT_EMPTY_PATH, FAIL_ENOSYS},
#ifdef SYS_newfstatat
	{SYS_newfstatat, FOR_WORKER, 3, false, AT_EMPTY_PATH, AT_EMPTY_PATH, FAIL_ENOSYS},
#endif
#ifdef SYS_fstatat64
	{SYS_fstatat64, FOR_WORKER, 3, false, AT_EMPTY_PATH, AT_EMPTY_PATH, FAIL_ENOSYS},
#endif
	{SYS_clone, FOR_SUPERVISOR, 0, false, 0x7e020000 /* CLONE_NEW... */, 0, FAIL_EPERM},
	{435 /* clone3, whose arguments no filter sees */, FOR_ALL, 0, false, 0, 1, FAIL_ENOSYS},
};

enum { FILTER_MAX = 26 + LENGTH(CALLS) + LENGTH(NEVER) + 6 * LENGTH(RULES) };

static void
filter_add(struct filter *f, uint16_t code, uint8_t yes, uint8_t no, uint32_t k)
{
	f->step[f->n++] = (struct filter_step){code, yes, no, k};
}

/* Numbers of this role end in `action`. */
static void
filter_calls(struct filter *f, const struct call *list, size_t n, unsigned role, uint32_t action)
{
	uint8_t left = 0;

	for (size_t i = 0; i < n; i++)
		left += (list[i].roles & role) != 0;
	for (size_t i = 0; i < n; i++)
		if (list[i].roles & role)
			filter_add(f, IF_EQUAL, left--, 0, list[i].number);
	filter_add(f, JUMP, 0, 0, 1);
	filter_add(f, RETURN, 0, 0, action);
}

static void
filter_rule(struct filter *f, const struct rule *r)
{
	filter_add(f, IF_EQUAL, 0, 5, (uint32_t)r->number);
	filter_add(f, LOAD_WORD, 0, 0, OFFSET_ARGUMENTS + 8u * r->argument + 4u * r->high);
	filter_add(f, AND, 0, 0, r->mask);
	filter_add(f, IF_EQUAL, 1, 0, r->value);
	filter_add(f, RETURN, 0, 0, r->action);
	filter_add(f, LOAD_WORD, 0, 0, OFFSET_NUMBER);
}

/* Descriptors up to `last` are listeners, which all workers share: nobody shuts them or gives them other options. */
static void
filter_listeners(struct filter *f, uint32_t number, int last)
{
	filter_add(f, IF_EQUAL, 0, 4, number);
	filter_add(f, LOAD_WORD, 0, 0, OFFSET_ARGUMENTS);
	filter_add(f, IF_AT_LEAST, 1, 0, (uint32_t)last + 1);
	filter_add(f, RETURN, 0, 0, FAIL_EPERM);
	filter_add(f, LOAD_WORD, 0, 0, OFFSET_NUMBER);
}

/* Closes the system calls that a role has no use for; `last`: the last listener's descriptor, or -1. The kernel's log tells of each
 * call that is refused, where it can. */
static bool
sandbox_seccomp(unsigned role, int last)
{
	static struct filter_step step[FILTER_MAX];
	struct filter f = {0, step};
	bool serving = (role & FOR_SERVING) != 0;

	filter_add(&f, LOAD_WORD, 0, 0, OFFSET_ARCH);
	filter_add(&f, IF_EQUAL, 1, 0, AUDIT_ARCH);
	filter_add(&f, RETURN, 0, 0, serving ? KILL_PROCESS : FAIL_ENOSYS);
	filter_add(&f, LOAD_WORD, 0, 0, OFFSET_NUMBER);
	filter_add(&f, IF_AT_LEAST, 0, 1, FOREIGN_CALLS);
	filter_add(&f, RETURN, 0, 0, FAIL_ENOSYS);
	for (size_t i = config.upstream.addr[0].ss.ss_family == AF_UNIX; i < LENGTH(RULES); i++)
		if (RULES[i].roles & role)
			filter_rule(&f, &RULES[i]);
	if (last >= 0) {
		filter_listeners(&f, SYS_shutdown, last);
		filter_listeners(&f, SYS_setsockopt, last);
	}
	if (serving)
		filter_calls(&f, CALLS, LENGTH(CALLS), role, ALLOW);
	filter_calls(&f, NEVER, LENGTH(NEVER), role, serving ? TRAP : FAIL_EPERM);
	filter_add(&f, RETURN, 0, 0, serving ? FAIL_ENOSYS : ALLOW);
	return AUDIT_ARCH != 0 && (syscall(SYS_seccomp, SET_MODE_FILTER, FLAG_LOG, &f) == 0 ||
	                           prctl(SET_SECCOMP, MODE_FILTER, &f) == 0);
}

/* Whom a process that serves tells of a call that it must never make, before it ends; -1: nobody. */
static int trap_to = -1;

static void
on_trap(int number, siginfo_t *info, void *context)
{
	char text[16];
	struct out o = {text, 0, sizeof text, false};

	(void)number, (void)context;
	out_print(&o, "K%d\n", info->si_syscall);
	if (trap_to >= 0)
		send(trap_to, o.p, o.n, MSG_NOSIGNAL | MSG_DONTWAIT);
	_exit(STATUS_TRAPPED);
}

static void
sandbox_trap(int control)
{
	struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};

	trap_to = control;
	sigaction(SIGSYS, &action, NULL);
}

static uint16_t
addr_port(const struct addr *a)
{
	if (a->ss.ss_family == AF_INET6)
		return ntohs(((const struct sockaddr_in6 *)&a->ss)->sin6_port);
	return a->ss.ss_family == AF_INET ? ntohs(((const struct sockaddr_in *)&a->ss)->sin_port) : 0;
}

struct landlock_rules { uint64_t files, net, scoped; };
struct landlock_port { uint64_t allowed, port; };
struct landlock_file { uint64_t allowed; int32_t fd; } __attribute__((packed));
enum { LANDLOCK_VERSION = 1, LANDLOCK_FILE = 1, LANDLOCK_PORT = 2, READ_FILE = 4, NET_CONNECT = 2, NET_BIND_AND_CONNECT = 3,
	ABSTRACT_SOCKETS_AND_SIGNALS = 3 };

static int
landlock_version(void)
{
	long version = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_VERSION);

	return version < 0 ? 0 : (int)version;
}

/* A list that opens nothing yet, or -1. */
static int
landlock_begin(int version)
{
	static const uint64_t FILES[] = {0, 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff};   /* what each version knows */
	struct landlock_rules rules = {.files = FILES[version < 5 ? version : 5], .net = version >= 4 ? NET_BIND_AND_CONNECT : 0,
	    .scoped = version >= 6 ? ABSTRACT_SOCKETS_AND_SIGNALS : 0};

	if (version == 0)
		return -1;
	return (int)syscall(SYS_landlock_create_ruleset, &rules, version >= 6 ? 24 : version >= 4 ? 16 : 8, 0);
}

static bool
landlock_port(int fd, uint16_t port)
{
	struct landlock_port rule = {NET_CONNECT, port};

	return syscall(SYS_landlock_add_rule, fd, LANDLOCK_PORT, &rule, 0) == 0;
}

/* Puts the list in force, if it is as it should be. */
static bool
landlock_end(int fd, bool good)
{
	good = good && syscall(SYS_landlock_restrict_self, fd, 0) == 0;
	close(fd);
	return good;
}

/* Closes the file system, and of TCP all but connecting to the upstream's ports. */
static unsigned
sandbox_landlock(void)
{
	int version = landlock_version(), fd = landlock_begin(version);
	bool good = fd >= 0;

	for (unsigned i = 0; i < config.upstream.addrs && version >= 4; i++) {
		uint16_t port = addr_port(&config.upstream.addr[i]);
		good = good && (port == 0 || landlock_port(fd, port));
	}
	good = landlock_end(fd, good);
	return !good ? 0 : version >= 4 ? WALL_FILES | WALL_CONNECT : WALL_FILES;
}

#ifdef SYS_setresuid32
enum { SET_USER = SYS_setresuid32, SET_GROUP = SYS_setresgid32, SET_GROUPS = SYS_setgroups32 };
#else
enum { SET_USER = SYS_setresuid, SET_GROUP = SYS_setresgid, SET_GROUPS = SYS_setgroups };
#endif

/* Root becomes another user for good, and that is looked at. libc's own calls would stop threads that there are not. */
static bool
sandbox_user(void)
{
	uid_t uid = (uid_t)config.uid, ids[3];
	gid_t gid = (gid_t)config.gid, groups[3];

	if (geteuid() != 0)
		return true;
	return uid != 0 && syscall(SET_GROUPS, 0, NULL) == 0 && syscall(SET_GROUP, gid, gid, gid) == 0 &&
	       syscall(SET_USER, uid, uid, uid) == 0 && getresuid(&ids[0], &ids[1], &ids[2]) == 0 &&
	       getresgid(&groups[0], &groups[1], &groups[2]) == 0 && ids[0] == uid && ids[1] == uid && ids[2] == uid &&
	       groups[0] == gid && groups[1] == gid && groups[2] == gid && syscall(SET_USER, 0, 0, 0) != 0;
}

/* Walls that this kernel and this user can have, for a worker. */
static unsigned
sandbox_probe(int root)
{
	int version = landlock_version();
	unsigned walls = WALL_PRIVILEGES;

	walls |= geteuid() == 0 ? WALL_USER : 0;
	walls |= geteuid() == 0 && root >= 0 ? WALL_ROOT : 0;
	walls |= AUDIT_ARCH != 0 && prctl(GET_SECCOMP, 0) >= 0 ? WALL_SECCOMP : 0;
	walls |= version >= 1 ? WALL_FILES : 0;
	return walls | (version >= 4 ? WALL_CONNECT : 0);
}

/* No dumps that hold keys, no process that traces another of the same user. */
static void
sandbox_undumpable(void)
{
	struct rlimit none = {0, 0};

	process_limit(RLIMIT_CORE, &none, NULL);
	prctl(SET_DUMPABLE, 0);
}

/* Gives up what rights a user other than root was started with. */
static void
sandbox_capabilities(void)
{
	struct { uint32_t version; int pid; } head = {0x20080522, 0};
	uint32_t none[6] = {0};

	syscall(SYS_capset, &head, none);
}

/* Closes everything that serving does not need; `root`: the directory that becomes the root, or -1; `control`: the supervisor;
 * `last`: up to here descriptors are listeners, or -1. The walls that hold. */
static unsigned
sandbox_worker(int root, int control, int last)
{
	unsigned walls = geteuid() == 0 ? WALL_USER : 0;

	if (walls != 0 && root >= 0 && fchdir(root) == 0 && chroot(".") == 0 && chdir("/") == 0)
		walls |= WALL_ROOT;
	if (root >= 0)
		close(root);
	if (!sandbox_user())
		die(EX_NOPERM, "cannot become user %llu, group %llu: %s; give another --user", (unsigned long long)config.uid,
		    (unsigned long long)config.gid, strerror(errno));
	sandbox_undumpable();
	sandbox_capabilities();
	if (prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
		walls |= WALL_PRIVILEGES;
	walls |= sandbox_landlock();
	sandbox_trap(control);
	return walls | (sandbox_seccomp(FOR_WORKER | (config.inetd ? FOR_INETD : 0), last) ? WALL_SECCOMP : 0);
}

/* `closed`: by the binary before us, whose list is still in force; each further one would slow every call. The supervisor
 * keeps its user: it reads keys and certificate again and opens the log anew. */
static void
sandbox_supervisor(bool closed)
{
	sandbox_undumpable();
	if (prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && !closed)
		sandbox_seccomp(FOR_SUPERVISOR, -1);
}

/* Leaves the files that musl looks at for a name, wherever links of these names lead, and a name server's TCP port. Other
 * libraries read more than can be told here. */
static void
sandbox_names(void)
{
#if !defined(__GLIBC__)
	static const char *const FILES[] = {"/etc/hosts", "/etc/resolv.conf"};
	int fd = landlock_begin(landlock_version());

	for (size_t i = 0; i < LENGTH(FILES) && fd >= 0; i++) {
		struct landlock_file rule = {READ_FILE, open(FILES[i], O_RDONLY | O_CLOEXEC)};
		syscall(SYS_landlock_add_rule, fd, LANDLOCK_FILE, &rule, 0);
		close(rule.fd);
	}
	landlock_port(fd, 53);
	landlock_end(fd, true);
#endif
}

/* The child that looks up names. */
static void
sandbox_resolver(void)
{
	if (!sandbox_user())
		_exit(EXIT_FAILURE);
	sandbox_undumpable();
	if (prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0) {
		sandbox_names();
		sandbox_seccomp(FOR_RESOLVER, -1);
	}
}

/* ---- the self-test ------------------------------------------------------------------------------------------- */

/* What a worker has when its walls close, as far as the self-test needs it. The first of each pair is at the parent's end. */
struct rehearsal {
	int control[2], stream[2], broken[2], listener, caller, epoll;
	struct tls *tls;                     /* NULL: no certificate */
	struct log *log;
	char *page;
};

static volatile sig_atomic_t rehearsal_signalled;

static void
on_rehearsal(int number)
{
	(void)number;
	rehearsal_signalled = 1;
}

static bool
rehearse_clock(struct rehearsal *r)
{
	(void)r;
	return clock_ns() > 0 && clock_wall_ms() > 0;
}

static bool
rehearse_random(struct rehearsal *r)
{
	return getentropy(r->page, 32) == 0;
}

static bool
rehearse_poll(struct rehearsal *r)
{
	struct pollfd p = {r->stream[1], POLLIN | POLLRDHUP, 0};
	char byte;

	return send(r->stream[0], "x", 1, MSG_NOSIGNAL) == 1 && poll(&p, 1, 1000) == 1 &&
	       recv(r->stream[1], &byte, 1, MSG_DONTWAIT) == 1 && write(r->stream[1], "x", 1) == 1 && read(r->stream[0], &byte, 1) == 1;
}

static bool
rehearse_epoll(struct rehearsal *r)
{
	struct epoll_event event = {.events = EPOLLOUT}, got;

	return epoll_ctl(r->epoll, EPOLL_CTL_ADD, r->stream[1], &event) == 0 && epoll_wait(r->epoll, &got, 1, 1000) == 1 &&
	       epoll_ctl(r->epoll, EPOLL_CTL_DEL, r->stream[1], &event) == 0;
}

static bool
rehearse_accept(struct rehearsal *r)
{
	int fd = r->listener < 0 ? -1 : accept4(r->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), one = 1;

	return r->listener < 0 || (fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof one) == 0 && shutdown(fd, SHUT_WR) == 0 && close(fd) == 0);
}

/* Whether anybody takes the connection is another question, and so are the rights of a socket's file. */
static bool
rehearse_connect(struct rehearsal *r)
{
	bool good = config.upstream.addrs == 0;
	struct link l;

	(void)r;
	for (unsigned i = 0; i < config.upstream.addrs; i++) {
		bool file = config.upstream.addr[i].ss.ss_family == AF_UNIX;
		if (link_connect(&l, &config.upstream.addr[i]) == 0) {
			link_close(&l, true);
			good = true;
		} else if (errno == EACCES && file) {
			say(STDERR_FILENO, "tinyauth: %s: this user may not connect to it; look at the rights of the socket and at --user\n",
			    config.upstream.text);
			good = true;
		} else
			good = good || (errno != EACCES && errno != EPERM && errno != ENOSYS && errno != EAFNOSUPPORT);
	}
	return good;
}

/* A client's hello is answered: with random bytes, the certificate and a signature. */
static bool
rehearse_tls(struct rehearsal *r)
{
	static const char HELLO[] = "\x16\x03\x01\0\x55\x01\0\0\x51\x03\x03" "tinyauth greets itself at start."
	    "\0\0\x0c\xc0\x2b\xc0\x2f\xc0\x2c\xc0\x30\xcc\xa9\xcc\xa8\x01\0" "\0\x1c" "\0\x0a\0\4\0\2\0\x17" "\0\x0b\0\2\1\0"
	    "\0\x0d\0\x0a\0\x08\4\3\5\3\4\1\5\1";
	struct link l;
	char answer[5];

	_Static_assert(sizeof HELLO == 5 + 0x55 + 1, "the record is as long as it says");
	if (r->tls == NULL)
		return true;
	link_open(&l, r->stream[1]);
	l.seen = POLLIN;
	return send(r->stream[0], HELLO, sizeof HELLO - 1, MSG_NOSIGNAL) == sizeof HELLO - 1 && link_secure(&l, r->tls) &&
	       link_handshake(&l) == LINK_AGAIN && recv(r->stream[0], answer, sizeof answer, MSG_DONTWAIT) == sizeof answer &&
	       answer[0] == 0x16;
}

static bool
rehearse_log(struct rehearsal *r)
{
	char word;
	int fd;

	if (word_receive(r->control[1], &word, &fd) != 1 || fd < 0)
		return false;
	errno = 0;
	log_take(r->log, fd, true);
	return errno == 0 && log_write(r->log, "", 0) == 0;
}

static bool
rehearse_memory(struct rehearsal *r)
{
	return madvise(r->page, page_size(), MADV_DONTNEED) == 0 && munmap(r->page, page_size()) == 0;
}

/* Who writes where nobody reads gets one. */
static bool
rehearse_signal(struct rehearsal *r)
{
	return write(r->broken[1], "x", 1) < 0 && errno == EPIPE && rehearsal_signalled;
}

enum { REHEARSED = 0x7f, REHEARSAL_MS = 5000 };

static const struct { const char *name; bool (*try)(struct rehearsal *); } REHEARSALS[] = {
	{"look at the clock", rehearse_clock}, {"get random bytes", rehearse_random}, {"wait by poll", rehearse_poll},
	{"wait by epoll", rehearse_epoll}, {"accept a connection", rehearse_accept}, {"connect to the upstream", rehearse_connect},
	{"shake hands in TLS", rehearse_tls}, {"open the log anew", rehearse_log}, {"give memory back", rehearse_memory},
	{"take a signal", rehearse_signal}};

/* Says the number of each step before it is taken; behind one that failed, its errno; at the end REHEARSED. */
__attribute__((noreturn)) static void
rehearsal_run(struct rehearsal *r, int root)
{
	unsigned char said;
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	alarm(REHEARSAL_MS / 1000);
	signal(SIGPIPE, on_rehearsal);
	if (sandbox_worker(root, r->control[1], -1) & WALL_ROOT)
		sandbox_upstream();
	for (said = 0; said < LENGTH(REHEARSALS); said++) {
		send(r->control[1], &said, 1, MSG_NOSIGNAL);
		errno = 0;
		if (!REHEARSALS[said].try(r)) {
			said = (unsigned char)(errno | 0x80);
			send(r->control[1], &said, 1, MSG_NOSIGNAL);
			_exit(EXIT_FAILURE);
		}
	}
	said = REHEARSED;
	send(r->control[1], &said, 1, MSG_NOSIGNAL);
	_exit(EXIT_SUCCESS);
}

/* What is needed before the walls close. */
static bool
rehearsal_prepare(struct rehearsal *r, const struct tls_pair *pair)
{
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	socklen_t len = sizeof un;

	r->tls = pair != NULL ? tls_new(pair, NULL, 1) : NULL;
	r->log = map_new(sizeof *r->log, MAP_PRIVATE);
	r->page = map_new(page_size(), MAP_PRIVATE);
	r->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	r->caller = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	r->epoll = epoll_create1(EPOLL_CLOEXEC);
	/* with the family alone the kernel finds a name, which no file has; where that may not be, there is nothing to accept */
	if (r->listener < 0 || r->caller < 0)
		return false;
	if (bind(r->listener, (struct sockaddr *)&un, sizeof un.sun_family) != 0 || listen(r->listener, 1) != 0 ||
	    getsockname(r->listener, (struct sockaddr *)&un, &len) != 0 || connect(r->caller, (struct sockaddr *)&un, len) != 0)
		r->listener = -1;
	return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r->broken) == 0 && close(r->broken[0]) == 0 &&
	       socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r->control) == 0 &&
	       socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, r->stream) == 0 &&
	       word_send(r->control[0], 'L', r->stream[0]);
}

/* Hears a rehearsal to its end. */
static bool
rehearsal_hear(const struct rehearsal *r, struct mistake *m)
{
	struct pollfd p = {r->control[0], POLLIN, 0};
	const char *name = "close the walls";
	unsigned char said;

	while (poll(&p, 1, REHEARSAL_MS) == 1 && recv(r->control[0], &said, 1, 0) == 1) {
		if (said == REHEARSED)
			return true;
		if (said & 0x80)
			return mistake_is(m, "behind the sandbox's walls a worker cannot %s: %s", name,
			    said == 0x80 ? "it does not work" : strerror(said & 0x7f));
		if (said == 'K') {
			char number[16] = "";
			recv(r->control[0], number, sizeof number - 1, 0);
			return mistake_is(m, "behind the sandbox's walls a worker ends as it tries to %s: system call %.*s", name,
			    (int)strspn(number, "0123456789"), number);
		}
		if (said < LENGTH(REHEARSALS))
			name = REHEARSALS[said].name;
	}
	return mistake_is(m, "behind the sandbox's walls a worker ends, or hangs, as it tries to %s", name);
}

/* Takes each step that serving is made of once, in a child behind a worker's walls. `m` names the first that fails. */
static bool
sandbox_rehearse(int root, const struct tls_pair *pair, struct mistake *m)
{
	struct rehearsal r = {.listener = -1};
	int pid = -1;

	if (!rehearsal_prepare(&r, pair) || (pid = fork()) < 0)
		return mistake_is(m, "the sandbox cannot be tried: %s", strerror(errno));
	if (pid == 0)
		rehearsal_run(&r, root);
	close(r.control[1]);
	bool good = rehearsal_hear(&r, m);
	kill(pid, SIGKILL);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		continue;
	return good;
}

#elif defined(TINYAUTH_NO_SANDBOX)

/* For sanitizers and coverage, which need files and memory at the end of a process. */
static unsigned
sandbox_probe(int root)
{
	(void)root;
	return 0;
}

static unsigned
sandbox_worker(int root, int control, int last)
{
	(void)control, (void)last;
	if (root >= 0)
		close(root);
	return 0;
}

static void
sandbox_supervisor(bool closed)
{
	(void)closed;
}

static void
sandbox_resolver(void)
{
}

static bool
sandbox_rehearse(int root, const struct tls_pair *pair, struct mistake *m)
{
	(void)root, (void)pair, (void)m;
	return true;
}

#else

static bool
sandbox_user(void)
{
	uid_t uid = (uid_t)config.uid;
	gid_t gid = (gid_t)config.gid;

	if (geteuid() != 0)
		return true;
	return uid != 0 && setgroups(0, NULL) == 0 && setgid(gid) == 0 && setuid(uid) == 0 && geteuid() == uid && setuid(0) != 0;
}

static unsigned
sandbox_probe(int root)
{
	return geteuid() != 0 ? 0 : root >= 0 ? WALL_USER | WALL_ROOT : WALL_USER;
}

static unsigned
sandbox_worker(int root, int control, int last)
{
	(void)control, (void)last;
	unsigned walls = geteuid() == 0 ? WALL_USER : 0;

	if (walls != 0 && root >= 0 && fchdir(root) == 0 && chroot(".") == 0 && chdir("/") == 0)
		walls |= WALL_ROOT;
	if (root >= 0)
		close(root);
	if (!sandbox_user())
		die(EX_NOPERM, "cannot become user %llu, group %llu: %s; give another --user", (unsigned long long)config.uid,
		    (unsigned long long)config.gid, strerror(errno));
	return walls;
}

static void
sandbox_supervisor(bool closed)
{
	(void)closed;
}

static void
sandbox_resolver(void)
{
	if (!sandbox_user())
		_exit(EXIT_FAILURE);
}

static bool
sandbox_rehearse(int root, const struct tls_pair *pair, struct mistake *m)
{
	(void)root, (void)pair, (void)m;
	return true;
}

#endif

/* The directory that becomes the root of workers when the server is started as root: that of an upstream's unix socket,
 * else an empty one that exists, else one that is made and removed while it is open. -1: there is none. */
static int
sandbox_directory(void)
{
	static const char *const MADE[] = {"/run", "/tmp", "/dev/shm", "/"};
	const struct sockaddr_un *un = (const struct sockaddr_un *)&config.upstream.addr[0].ss;
	char path[64];
	struct stat st;

	if (geteuid() != 0)
		return -1;
	if (un->sun_family == AF_UNIX)
		return directory_open(un->sun_path);
	int fd = open("/var/empty", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd >= 0 && fstat(fd, &st) == 0 && st.st_uid == 0 && (st.st_mode & 022) == 0 && st.st_nlink == 2)
		return fd;
	if (fd >= 0)
		close(fd);
	for (size_t i = 0; i < LENGTH(MADE); i++) {
		text_print(path, sizeof path, "%s/.tinyauth-empty-%d", MADE[i], getpid());
		if (mkdir(path, 0500) != 0)
			continue;
		fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		rmdir(path);
		return fd;
	}
	return -1;
}

/* ---- names --------------------------------------------------------------------------------------------------- */

enum { NAME_ADDRS = 32 };            /* addresses of a name that are looked at; the first of them, sorted, are used */

/* In an order that does not change when a name server turns its answers round. */
static void
addrs_sort(struct addr *list, size_t n)
{
	for (size_t i = 1; i < n; i++)
		for (size_t k = i; k > 0 && strcmp(list[k - 1].text, list[k].text) > 0; k--) {
			struct addr swapped = list[k];
			list[k] = list[k - 1];
			list[k - 1] = swapped;
		}
}

/* Looks up HOST:PORT in a child that can do nothing else: IPv4 first, because model servers on localhost often have nothing
 * else, and each family by itself, because musl gives up both when a name server fails to answer one. What is found is told at
 * once. `forget` lets go of mappings that the child must not have. Exit status: 0, or the positive number of getaddrinfo's
 * error. */
__attribute__((noreturn)) static void
name_child(const char *text, bool passive, int to, void (*forget)(void *), void *of)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0)};
	struct addrinfo *list;
	struct addr found[NAME_ADDRS];
	struct mistake m;
	char host[NI_MAXHOST] = "";
	const char *port = NULL;
	size_t told = 0;
	int error = 0;

	memset(found, 0, sizeof found);
	if (forget != NULL)
		forget(of);
	descriptors_close_but(&to, 1);
	sandbox_resolver();
	if (!addr_split(text, host, &port, &m))
		_exit(EXIT_FAILURE);
	for (int family = 0; family < 2 && told < UPSTREAM_ADDRS; family++) {
		size_t n = 0;
		hints.ai_family = family == 0 ? AF_INET : AF_INET6;
		if (told > 0)
			alarm(RESOLVE_REST_MS / 1000);
		int failed = getaddrinfo(host, port, &hints, &list);
		error = error != 0 ? error : failed;
		for (struct addrinfo *i = failed == 0 ? list : NULL; i != NULL && n < NAME_ADDRS; i = i->ai_next) {
			memcpy(&found[n].ss, i->ai_addr, i->ai_addrlen);
			found[n].len = i->ai_addrlen;
			addr_write(&found[n++]);
		}
		addrs_sort(found, n);
		n = n < UPSTREAM_ADDRS - told ? n : UPSTREAM_ADDRS - told;
		if (!write_whole(to, (struct slice){(char *)found, n * sizeof *found}))
			_exit(EXIT_FAILURE);
		told += n;
	}
	if (told == 0 && error == 0)
		error = EAI_NONAME;
	_exit(told > 0 ? EXIT_SUCCESS : error < 0 ? -error : error);
}

/* Starts such a child; returns where its answer comes from, or -1. */
static int
name_ask(const char *text, bool passive, void (*forget)(void *), void *of, int *pid)
{
	int pair[2];

	if (pipe(pair) != 0)
		return -1;
	fcntl(pair[0], F_SETFD, FD_CLOEXEC);
	fcntl(pair[0], F_SETFL, O_NONBLOCK);
	if ((*pid = fork()) == 0)
		name_child(text, passive, pair[1], forget, of);
	close(pair[1]);
	if (*pid > 0)
		return pair[0];
	close(pair[0]);
	return -1;
}

/* What it found: how many addresses, 0: none. */
static unsigned
name_answer(int from, const char *asked, struct addr found[UPSTREAM_ADDRS])
{
	ssize_t n = read(from, found, UPSTREAM_ADDRS * sizeof *found);   /* what a pipe holds at once, in two parts perhaps */
	unsigned good = 0;
	uint64_t port = 0;

	close(from);
	number_read(slice_of(strrchr(asked, ':') + 1), &port);
	for (size_t i = 0; n > 0 && i < (size_t)n / sizeof *found; i++) {
		struct addr a = {.ss = found[i].ss};
		if (a.ss.ss_family == AF_INET) {
			a.len = sizeof(struct sockaddr_in);
			((struct sockaddr_in *)&a.ss)->sin_port = htons((uint16_t)port);
		} else if (a.ss.ss_family == AF_INET6) {
			a.len = sizeof(struct sockaddr_in6);
			((struct sockaddr_in6 *)&a.ss)->sin6_port = htons((uint16_t)port);
		} else
			continue;
		addr_write(&a);
		found[good++] = a;
	}
	return good;
}

/* Looks up a name at start, where waiting is allowed, for `ms`. `failure`: the exit status when it has no address; EXIT_SUCCESS: 0
 * is returned then. */
static unsigned
name_find(const char *text, const char *option, bool passive, struct addr found[UPSTREAM_ADDRS], int ms, int failure)
{
	int pid = 0, status = 0, from = name_ask(text, passive, NULL, NULL, &pid);
	struct pollfd answer = {from, POLLIN, 0};

	if (from < 0 && failure == EXIT_SUCCESS)
		return 0;
	if (from < 0)
		die(EXIT_FAILURE, "--%s: '%s': no process to look up the name: %s", option, text, strerror(errno));
	while (poll(&answer, 1, ms) < 0 && errno == EINTR)
		continue;
	if (answer.revents == 0)
		kill(pid, SIGKILL);                  /* with addresses of one family told it ends by itself */
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		continue;
	unsigned n = name_answer(from, text, found);
	if (n == 0 && failure != EXIT_SUCCESS)
		die(failure, "--%s: '%s': cannot find the address of '%.*s': %s", option, text, (int)(strrchr(text, ':') - text), text,
		    answer.revents == 0 || !WIFEXITED(status) ? "no answer"
		        : gai_strerror(EAI_NONAME < 0 ? -WEXITSTATUS(status) : WEXITSTATUS(status)));
	return n;
}

/* Names of our own addresses, at start. */
static void
names_find_listen(int failure)
{
	struct addr found[UPSTREAM_ADDRS];

	for (unsigned i = 0; i < config.listens; i++)
		if (config.listen[i].len == 0 && name_find(config.listen[i].text, "listen", true, found, RESOLVE_MS, failure) > 0)
			config.listen[i] = found[0];
}

/* The upstream's name, at start. */
static void
names_find_upstream(int ms, int failure)
{
	struct addr found[UPSTREAM_ADDRS];

	if (config.upstream.named && config.upstream.addrs == 0) {
		config.upstream.addrs = name_find(config.upstream.text, "upstream", false, found, ms, failure);
		memcpy(config.upstream.addr, found, config.upstream.addrs * sizeof *found);
		upstream_host(&config.upstream);
	}
}

/* ============================================================================================================= *
 * WORKER
 * Owns: the connection pool, the loop around poll and epoll, who is turned away at the door, the drain
 * Calls: BASICS, LOG, CONFIG (trusted networks), TABLE, HTTP (an answer at the door), LINK, CONN, SANDBOX
 * Promises: all memory is mapped in worker_map(); one clock look and at most one log write a turn
 * Never: waits anywhere but in worker_wait()
 * ============================================================================================================= */

#if TINYAUTH_LINUX
enum { WATCH_EVENT = sizeof(struct epoll_event) };
_Static_assert(POLLIN == EPOLLIN && POLLOUT == EPOLLOUT && POLLERR == EPOLLERR && POLLHUP == EPOLLHUP &&
    POLLRDHUP == EPOLLRDHUP, "what poll and epoll say is kept in the same words");
#else
enum { WATCH_EVENT = 1 };
#endif

/* Who calls a worker but its links: the listeners, by their numbers, and the supervisor. */
enum { CALLER_CONTROL = LISTEN_MAX, CALLERS };

/* Two links a connection, and the callers: what a worker can wait for at most. */
static size_t
worker_waits(void)
{
	return 2 * config.max_conns + CALLERS;
}

/* Everything a worker will ever use. Pages that nothing touches cost nothing: see the formula at the top. */
static void
worker_map(struct worker *w)
{
	size_t max = config.max_conns;

	w->conns = pool_new(max, sizeof(struct conn));
	w->requests = pool_new(max, sizeof(struct request));
	w->bufs = pool_new(2 * max, page_round(BUF_SIZE));
	w->ready = map_new(max * sizeof *w->ready, MAP_PRIVATE);
	w->pfd = map_new(worker_waits() * sizeof *w->pfd, MAP_PRIVATE);
	w->event = map_new(worker_waits() * WATCH_EVENT, MAP_PRIVATE);
	char *scratch = map_new(4 * BUF_SIZE, MAP_PRIVATE);

	for (int i = 0; i < 4; i++)
		w->scratch[i / 2][i % 2] = scratch + i * BUF_SIZE;
	w->tls = w->pair != NULL ? tls_new(w->pair, w->sessions, max) : NULL;
	w->polled.next = w->polled.prev = &w->polled;
	w->waiting.young = w->waiting.old = &w->waiting;
}

/* ---- waiting ------------------------------------------------------------------------------------------------- *
 * While a worker has few connections they are in one poll set, gathered anew each turn, so that nothing has to be
 * registered. Once there are many, all of them wait in an epoll set, where waiting costs nothing, until the last is gone. */

/* A place of the pool stands in the list at most once, whoever has it: `queued` stays with the place, and the list has room
 * for every one. */
static void
worker_queue(struct worker *w, struct conn *c)
{
	if (!c->queued)
		w->ready[w->readies++] = c;
	c->queued = true;
}

#if TINYAUTH_LINUX

static int
watch_open(void)
{
	return epoll_create1(EPOLL_CLOEXEC);
}

/* In the epoll set links have the numbers 0 to 2 * max_conns - 1, client and upstream in turn; behind them stand the
 * callers. */
static bool
watch_set(const struct worker *w, int op, int fd, short events, uint64_t number)
{
	struct epoll_event e = {.events = (uint32_t)events, .data.u64 = number};

	return epoll_ctl(w->epoll, op, fd, &e) == 0;
}

static bool
watch_caller(const struct worker *w, int op, int fd, unsigned caller)
{
	return watch_set(w, op, fd, POLLIN, 2 * config.max_conns + caller);
}

static void
watch(struct worker *w, struct conn *c, struct link *l, int side, short interest)
{
	int op = l->watched == 0 ? EPOLL_CTL_ADD : interest == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;

	if (l->fd < 0 || (l->watched == 0 && interest == 0))
		return;
	l->watched = interest;
	if (watch_set(w, op, l->fd, interest, (uint64_t)conn_number(w, c) * 2 + (unsigned)side))
		return;
	l->watched = 0;                      /* no memory for the watch: the connection cannot go on, the sweep ends it */
	c->deadline_ns = w->sweep_ns = w->now_ns;
	if (c->request != NULL)
		c->request->idle_ns = w->now_ns;
}

/* Without it there would be an epoll set in which nobody hears the supervisor: then there is none. */
static void
watch_control(struct worker *w)
{
	if (watch_caller(w, EPOLL_CTL_ADD, w->control, CALLER_CONTROL))
		return;
	close(w->epoll);
	w->epoll = -1;
}

/* Others hold the listeners too, so that closing them does not end the watch. */
static void
watch_listeners(struct worker *w, bool on)
{
	bool good = true;

	if (w->listening == on)
		return;
	w->listening = on;
	for (unsigned i = 0; i < w->listeners; i++)
		good = watch_caller(w, on ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, w->listener[i], i) && good;
	if (!on || good)
		return;
	watch_listeners(w, false);           /* no memory for them now: tried again shortly, as when accepting failed */
	w->accept_ns = w->now_ns + ACCEPT_PAUSE_MS * NS_PER_MS;
}

/* All events of the epoll set in one look: of two for one connection both are seen before it is stepped. */
static void
watch_wait(struct worker *w, int ms)
{
	int n = epoll_wait(w->epoll, w->event, (int)worker_waits(), ms);

	for (int i = 0; i < n; i++) {
		uint64_t number = w->event[i].data.u64;
		if (number >= 2 * config.max_conns) {
			w->called |= 1u << (number - 2 * config.max_conns);
			continue;
		}
		struct conn *c = conn_at(w, number / 2);
		if (!c->queued)
			c->client.seen = c->upstream.seen = 0;
		*(number % 2 == 0 ? &c->client.seen : &c->upstream.seen) = (short)w->event[i].events;
		worker_queue(w, c);
	}
}

#else

/* Everything stays in the poll set. */
static int
watch_open(void)
{
	return -1;
}

static void
watch(struct worker *w, struct conn *c, struct link *l, int side, short interest)
{
	(void)w, (void)c, (void)l, (void)side, (void)interest;
}

static void
watch_control(struct worker *w)
{
	(void)w;
}

static void
watch_listeners(struct worker *w, bool on)
{
	(void)w, (void)on;
}

static void
watch_wait(struct worker *w, int ms)
{
	(void)w, (void)ms;
}

#endif

/* Keeps the epoll set true for a link in it. What is watched beyond the interest stays, so that a kept-alive connection
 * costs no call a request, until an event comes that nobody wanted. */
static void
watch_again(struct worker *w, struct conn *c, struct link *l, int side, short interest, bool unwanted)
{
	if ((interest & ~l->watched) != 0 || (unwanted && l->watched != interest))
		watch(w, c, l, side, unwanted ? interest : interest | l->watched);
}

/* The upstream's link of a connection in the epoll set: most are over before it would pay to register them. Those that last go
 * into the set after some turns. */
static void
watch_upstream(struct worker *w, struct conn *c, short interest, bool unwanted)
{
	if (c->upstream.fd < 0 || c->upstream.watched != 0 || interest == 0 || (!c->brief && w->briefs == BRIEFS_MAX)) {
		watch_again(w, c, &c->upstream, 1, interest, unwanted);
		return;
	}
	if (c->brief)
		return;
	w->brief[w->briefs++] = c;
	c->brief = true;
	c->turns = 0;
}

/* From the poll set into the epoll set. */
static void
worker_park(struct worker *w, struct conn *c)
{
	short client, upstream;

	c->next->prev = c->prev;
	c->prev->next = c->next;
	c->parked = true;
	conn_interest(c, &client, &upstream);
	watch(w, c, &c->client, 0, client | POLLRDHUP);
	watch_upstream(w, c, upstream, false);
}

static void
worker_want(struct worker *w, int fd, short events)
{
	w->pfd[w->pollfds++] = (struct pollfd){fd, events, 0};
}

/* The poll set: control, listeners, then two entries a connection. */
static void
worker_gather_poll(struct worker *w, bool accepting)
{
	short client, upstream;

	w->pollfds = 0;
	worker_want(w, w->control, POLLIN);
	for (unsigned i = 0; i < w->listeners; i++)
		worker_want(w, accepting ? w->listener[i] : -1, POLLIN);
	for (struct conn *c = w->polled.next; c != &w->polled; c = c->next) {
		conn_interest(c, &client, &upstream);
		int fd = link_poll(&c->client, &client);
		worker_want(w, fd, client);
		worker_want(w, upstream != 0 ? c->upstream.fd : -1, upstream);
	}
}

/* Tells the other workers whether there is room for a connection here. */
static void
worker_tell_room(struct worker *w)
{
	uint32_t room = w->conns.left > 0 && !w->draining ? w->server : 0;

	if (w->row != NULL && atomic_load_explicit(&w->row->room, memory_order_relaxed) != room)
		atomic_store(&w->row->room, room);   /* before a look at theirs: of two that fill up at once one sees it */
}

/* The poll set beside the epoll set: that set itself, and upstream links that are not in it. */
static void
worker_gather_brief(struct worker *w)
{
	unsigned kept = 0;

	w->pollfds = 0;
	worker_want(w, w->epoll, POLLIN);
	for (unsigned i = 0; i < w->briefs; i++) {
		struct conn *c = w->brief[i];
		short client, upstream;
		c->brief = c->state != S_FREE && c->parked && c->upstream.fd >= 0 && c->upstream.watched == 0;
		if (!c->brief)
			continue;
		conn_interest(c, &client, &upstream);
		if (++c->turns > BRIEF_TURNS) {
			c->brief = false;
			watch(w, c, &c->upstream, 1, upstream);
			continue;
		}
		worker_want(w, upstream != 0 ? c->upstream.fd : -1, upstream);
		w->brief[kept++] = c;
	}
	w->briefs = kept;
}

static void
worker_collect_brief(struct worker *w)
{
	const struct pollfd *p = w->pfd + 1;

	for (unsigned i = 0; i < w->briefs; i++, p++)
		if (p->revents != 0) {
			w->brief[i]->client.seen = 0;
			w->brief[i]->upstream.seen = p->revents;
			worker_queue(w, w->brief[i]);
		}
}

static void
worker_gather(struct worker *w)
{
	bool accepting = !w->draining && w->now_ns >= w->accept_ns;

	worker_tell_room(w);
	w->many = w->epoll >= 0 && (w->used > POLL_MANY || (w->many && w->used > 0));   /* who is parked never comes back */
	if (!w->many) {
		worker_gather_poll(w, accepting);
		return;
	}
	watch_listeners(w, accepting);
	while (w->polled.next != &w->polled)
		worker_park(w, w->polled.next);
	if (w->briefs > 0)
		worker_gather_brief(w);
}

static void
worker_collect_poll(struct worker *w)
{
	const struct pollfd *p = w->pfd;

	w->called |= p++->revents != 0 ? 1u << CALLER_CONTROL : 0;
	for (unsigned i = 0; i < w->listeners; i++)
		w->called |= p++->revents != 0 ? 1u << i : 0;
	for (struct conn *c = w->polled.next; c != &w->polled; c = c->next, p += 2) {
		c->client.seen = p[0].revents;
		c->upstream.seen = p[1].revents;
		if ((p[0].revents | p[1].revents) != 0)
			worker_queue(w, c);
	}
}

/* Are there buffers that hold memory and that nobody uses? */
static bool
worker_warm(const struct worker *w)
{
	return pool_warm(&w->bufs) || (w->tls != NULL && tls_warm(w->tls));
}

/* After a burst: what its buffers hold goes back to the system. */
static void
worker_trim(struct worker *w)
{
	w->trim_ns = w->now_ns + TRIM_MS * NS_PER_MS;
	pool_trim(&w->bufs);
	if (w->tls != NULL)
		tls_trim(w->tls);
}

/* How long a worker may sleep: until the next deadline, or the next try of whatever had to be put off. */
static int
worker_patience(const struct worker *w)
{
	uint64_t until = w->sweep_ns, ms;

	if (w->readies > 0)
		return 0;
	if (w->log->n > 0 && until > w->now_ns + LOG_RETRY_MS * NS_PER_MS)
		until = w->now_ns + LOG_RETRY_MS * NS_PER_MS;
	if (w->accept_ns > w->now_ns && w->accept_ns < until)
		until = w->accept_ns;
	if (w->draining && w->drain_ns < until)
		until = w->drain_ns;
	if (worker_warm(w) && w->trim_ns < until)
		until = w->trim_ns;
	if (until <= w->now_ns)
		return 0;
	ms = (until - w->now_ns) / NS_PER_MS + 1;
	return ms < 60000 ? (int)ms : 60000;
}

/* Waits, and finds who is ready. */
static void
worker_wait(struct worker *w)
{
	w->called = 0;
	worker_gather(w);                    /* which may bring a deadline near */
	int ms = worker_patience(w);
	if (!w->many) {
		if (poll(w->pfd, w->pollfds, ms) > 0)
			worker_collect_poll(w);
		return;
	}
	if (w->briefs > 0) {
		if (poll(w->pfd, w->pollfds, ms) <= 0)
			return;
		worker_collect_brief(w);
		if (w->pfd->revents == 0)
			return;
		ms = 0;
	}
	watch_wait(w, ms);
}

/* ---- words of the supervisor --------------------------------------------------------------------------------- */

/* From now on: no new connections, each kept-alive one gets one more answer, streams run to their end. */
static void
worker_drain(struct worker *w)
{
	if (w->draining)
		return;
	w->draining = true;
	if (w->row != NULL)
		atomic_store_explicit(&w->row->room, 0, memory_order_relaxed);
	w->drain_ns = w->now_ns + config.drain_ms * NS_PER_MS;
	watch_listeners(w, false);
	for (unsigned i = 0; i < w->listeners; i++) {
		close(w->listener[i]);
		/* its number stays taken: behind the walls what has it may not be given options */
		(void)!socket(config.upstream.addrs > 0 ? config.upstream.addr[0].ss.ss_family : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	}
	w->listeners = 0;
}

/* The server stops: idle connections get some seconds more for a request that is on its way, those that have not sent a whole
 * one yet a moment. */
static void
worker_hurry_idle(struct worker *w)
{
	w->stopping = true;
	for (size_t i = 0; i < w->conns.fresh; i++) {
		struct conn *c = conn_at(w, i);
		if (c->state != S_FREE && c->request == NULL)
			conn_touch(w, c);
	}
}

/* A word from the supervisor: D, drain; T, drain because the server stops; X, end at once; P, answer with the same; L and a
 * descriptor, the new log. Its end: it is gone. What a worker says: S, it serves; P; R, the upstream's name should be
 * looked up; K, a number and LF, the system call that it ends for. */
static void
worker_control(struct worker *w)
{
	char word;
	int fd;
	ssize_t n = word_receive(w->control, &word, &fd);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		close(w->control);
		w->control = -1;
		worker_drain(w);
	} else if (word == 'D' || word == 'T' || word == 'X') {
		worker_drain(w);
		if (word == 'T')
			worker_hurry_idle(w);
		w->drain_ns = word == 'X' ? w->now_ns : w->drain_ns;
	} else if (word == 'P')
		send(w->control, "P", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
	else if (word == 'L' && fd >= 0) {
		log_close(w->log);
		log_take(w->log, fd, true);
	}
}

/* ---- stepping ------------------------------------------------------------------------------------------------ */

static void
worker_step(struct worker *w, struct conn *c)
{
	short client, upstream;

	conn_interest(c, &client, &upstream);
	bool client_unwanted = (c->client.seen & ~client) != 0, upstream_unwanted = (c->upstream.seen & ~upstream) != 0;
	conn_step(w, c);
	if (link_pending(&c->client)) {      /* poll knows nothing of what a TLS link holds */
		conn_interest(c, &client, &upstream);
		c->again |= (client & POLLIN) != 0;
	}
	if (c->state != S_FREE && c->parked) {
		conn_interest(c, &client, &upstream);
		watch_again(w, c, &c->client, 0, client, client_unwanted);
		watch_upstream(w, c, upstream, upstream_unwanted);
	}
	c->client.seen = c->upstream.seen = 0;
}

/* ---- accepting ----------------------------------------------------------------------------------------------- */

/* A full pool, or a full descriptor table, takes nothing from those who hold an authenticated request; the oldest of the
 * others makes room. */
static bool
worker_make_room(struct worker *w)
{
	struct conn *oldest = w->waiting.young;

	if (oldest == &w->waiting)
		return false;
	conn_end(w, oldest, R_FULL);
	return true;
}

/* No connection for this one: too many of its address, or no room and nobody to make it. What it sent already is read, so
 * that the answer is not lost to a reset. Over TLS there is no answer without a handshake, but an alert; `heard`: it will get
 * one. [r33] */
static void
worker_turn_away(struct worker *w, int fd, const struct sockaddr_storage *peer, enum reason reason, bool secure, bool heard)
{
	static const struct slice ALERT = {"\x15\x03\x03\0\2\2\x50", 7};   /* fatal, internal error [RFC 5246 7.2] */
	char text[1024], addr[ADDR_TEXT_MAX];
	struct out o = {text, 0, sizeof text, false};
	struct verdict v = {.reason = reason, .detail = S("1"), .id = S("-"), .retry_ms = 1000, .close = true};

	addr_text(peer, addr);
	log_turned_away(w->log, w->wall_ms, addr, REASONS[reason].status, REASONS[reason].word);
	if (heard)
		return;
	if (secure)
		out_slice(&o, ALERT);
	else
		answer_own(&v, &o);
	ssize_t n = recv(fd, w->scratch[0][0], BUF_SIZE, MSG_DONTWAIT);
	wipe(w->scratch[0][0], n > 0 ? (size_t)n : 0);
	(void)!write(fd, o.p, o.n);          /* under -i it may be a pipe */
	shutdown(fd, SHUT_WR);
	close(fd);
}

/* The kernel looks for a descriptor before it looks whether anybody waits. */
static bool
worker_someone_waits(int listener)
{
	struct pollfd p = {listener, POLLIN, 0};

	return poll(&p, 1, 0) == 1;
}

/* Is there room for one more connection of this address? Over TLS the answer needs a handshake first, `heard`: it gets one;
 * only so many of an address get that far. A trusted peer connects for others. */
static enum reason
worker_admits(struct worker *w, const struct sockaddr_storage *peer, bool secure, bool *heard)
{
	unsigned char ip[16];

	*heard = false;
	ip_of(peer, ip);
	if (!ip_trusted(&config, ip)) {
		uint64_t open = table_connections(w->table, table_address_id(w->table, peer), 2 * config.ip_conns);
		*heard = secure && open >= config.ip_conns && open < 2 * config.ip_conns && w->conns.left > 0;
		if (open >= config.ip_conns)
			return R_IP_CONNS;
	}
	return w->conns.left > 0 || worker_make_room(w) ? R_NONE : R_FULL;
}

/* A worker whose places are taken leaves a connection to those of its server that have some. Who has done nothing by the time that it
 * looks again, while somebody still waits, is stuck: then it goes on as if it were alone. */
static bool
worker_yields(struct worker *w)
{
	uint64_t events;

	worker_tell_room(w);
	if (w->conns.left > 0 || w->row == NULL || !table_room_elsewhere(w->table, w->row, w->server, &events))
		return w->knocked = false;
	if (w->knocked && w->knocked_events == events)
		return w->knocked = false;
	w->knocked = true;
	w->knocked_events = events;
	w->accept_ns = w->now_ns + ACCEPT_PAUSE_MS * NS_PER_MS;
	return true;
}

/* Takes what waits on a listener. When descriptors or memory run out, accepting pauses instead of spinning. */
static void
worker_accept(struct worker *w, int listener, bool secure)
{
	for (int i = 0; i < ACCEPTS_MAX; i++) {
		struct sockaddr_storage peer;
		socklen_t len = sizeof peer;
		if (worker_yields(w))
			return;
		memset(&peer, 0, sizeof peer);
		int fd = accept4(listener, (struct sockaddr *)&peer, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd < 0 && (errno == ECONNABORTED || errno == EINTR))
			continue;
		if (fd < 0 && errno == EMFILE && worker_someone_waits(listener) && worker_make_room(w))
			continue;
		if (fd < 0) {
			if (errno != EAGAIN) {
				w->accept_ns = w->now_ns + ACCEPT_PAUSE_MS * NS_PER_MS;
				log_failure(w->log, "accept_paused", "a connection could not be accepted; trying again shortly", errno);
			}
			return;
		}
		bool heard;
		enum reason refused = worker_admits(w, &peer, secure, &heard);
		if (refused != R_NONE)
			worker_turn_away(w, fd, &peer, refused, secure, heard);
		if (refused != R_NONE && !heard)
			continue;
		struct conn *c = conn_open(w, fd, fd, &peer, secure);
		c->refused = (uint8_t)refused;
		c->client.seen = POLLIN;     /* its request is often there already */
		worker_step(w, c);
		if (c->state != S_FREE && c->again)
			worker_queue(w, c);
	}
}

/* ---- the loop ------------------------------------------------------------------------------------------------ */

/* Ends what is over its time, and finds when to look again. */
static void
worker_sweep(struct worker *w)
{
	uint64_t next = UINT64_MAX;

	w->sweep_ns = UINT64_MAX;
	for (size_t i = 0; i < w->conns.fresh && w->used > 0; i++) {
		struct conn *c = conn_at(w, i);
		if (c->state == S_FREE)
			continue;
		if (c->deadline_ns <= w->now_ns) {
			conn_late(w, c);
			if (c->state != S_FREE)
				worker_queue(w, c);  /* its interest changed */
		}
		if (c->state != S_FREE && c->deadline_ns < next)
			next = c->deadline_ns;
	}
	if (next < w->now_ns + SWEEP_MIN_MS * NS_PER_MS)
		next = w->now_ns + SWEEP_MIN_MS * NS_PER_MS;
	w->sweep_ns = next;
}

/* Steps all that are ready. Those that could go on at once stay in the list for the next turn, which does not wait. */
static void
worker_step_ready(struct worker *w)
{
	size_t kept = 0;

	for (size_t i = 0; i < w->readies; i++) {
		struct conn *c = w->ready[i];
		c->queued = false;
		if (c->state == S_FREE)
			continue;
		worker_step(w, c);
		if (c->state != S_FREE && c->again) {
			c->queued = true;
			w->ready[kept++] = c;
		}
	}
	w->readies = kept;
}

static void
worker_turn(struct worker *w)
{
	worker_wait(w);
	w->now_ns = clock_ns();
	w->wall_ms = clock_wall_ms();
	w->turn++;
	worker_step_ready(w);
	for (unsigned i = 0; i < w->listeners; i++)
		if (w->called & 1u << i)
			worker_accept(w, w->listener[i], w->secure[i]);
	if (w->called & 1u << CALLER_CONTROL)
		worker_control(w);
	if (w->now_ns >= w->sweep_ns)
		worker_sweep(w);
	if (w->now_ns >= w->trim_ns)
		worker_trim(w);
	if (w->connect_failed && config.upstream.named && w->control >= 0)
		send(w->control, "R", 1, MSG_NOSIGNAL | MSG_DONTWAIT);   /* its name may mean another address by now */
	w->connect_failed = false;
	if (w->log->n > 0 || w->log->dropped > 0)
		log_flush(w->log);
}

/* Asks itself how it is, over a socket pair and all the way: who can answer that can serve. */
static bool
worker_greets(struct worker *w, int asking, int asked)
{
	struct slice question = S("GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
	struct sockaddr_storage peer = {.ss_family = AF_UNIX};
	unsigned listeners = w->listeners;
	char answer[16] = "";

	if (send(asking, question.p, question.n, MSG_NOSIGNAL) != (ssize_t)question.n)
		return false;
	w->listeners = 0;                    /* nobody else is served meanwhile */
	struct conn *c = conn_open(w, asked, asked, &peer, false);
	c->client.seen = POLLIN;
	worker_queue(w, c);
	worker_turn(w);
	bool good = recv(asking, answer, sizeof answer - 1, MSG_DONTWAIT) > 0 && strncmp(answer, "HTTP/1.1 200", 12) == 0;
	close(asking);
	while (w->used > 0 && good)
		worker_turn(w);
	w->listeners = listeners;
	return good;
}

/* Up to which descriptor there are listeners; what is free below is filled, so that no connection comes to lie there. -1: none. */
static int
worker_last_listener(const struct worker *w)
{
	int last = -1, fd;

	for (unsigned i = 0; i < w->listeners; i++)
		last = last > w->listener[i] ? last : w->listener[i];
	if (w->control < last)               /* not as a server of ours lays them */
		return -1;
	do
		fd = last < 0 ? -1 : fcntl(w->control, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
	while (fd >= 0 && fd < last);
	if (fd >= 0)
		close(fd);
	return last;
}

/* Takes everything that serving needs, then closes the sandbox behind it. */
static void
worker_ready(struct worker *w, int root, unsigned expected)
{
	char text[128];
	struct out o = {text, 0, sizeof text, false};
	int ends[2];

	worker_map(w);
	random_fill(w->random, sizeof w->random);
	w->epoll = -1;
	if (!config.inetd) {
		w->epoll = watch_open();
		watch_control(w);
	}
	w->sweep_ns = UINT64_MAX;
	w->now_ns = clock_ns();
	w->wall_ms = clock_wall_ms();
	bool greets = w->control >= 0;
	if (greets && socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0)
		die(EXIT_FAILURE, "a worker cannot ask itself whether it serves: %s", strerror(errno));
	unsigned walls = sandbox_worker(root, w->control, worker_last_listener(w)), missing = expected & ~walls;
	if (walls & WALL_ROOT)
		sandbox_upstream();
	if (greets && !worker_greets(w, ends[0], ends[1]))
		die(EXIT_FAILURE, "a worker cannot serve a request of its own; 'tinyauth check' may tell why");
	if (greets)
		send(w->control, "S", 1, MSG_NOSIGNAL | MSG_DONTWAIT);   /* it serves */
	out_walls(&o, missing);
	if (missing != 0)
		log_sandbox(w->log, "sandbox_missing", config.uid, config.gid, (struct slice){text, o.n});
}

/* A worker's whole life, in a process of its own. */
static void
worker_run(struct worker *w)
{
	while (!w->draining || (w->used > 0 && w->now_ns < w->drain_ns))
		worker_turn(w);
	for (size_t i = 0; i < w->conns.fresh && w->used > 0; i++)
		if (conn_at(w, i)->state != S_FREE)
			conn_end(w, conn_at(w, i), R_DRAIN);
	log_flush(w->log);
}

/* ============================================================================================================= *
 * SUPERVISOR
 * Owns: listeners, children, generations, signals; publishes the keys; renews the certificate and the upstream's addresses;
 *       speaks to the service manager; hands everything over to a new binary. Also -i, which has no supervisor
 * Calls: BASICS, LOG, CONFIG, KEYS, TABLE, CERTIFICATE, LINK (options of listeners), CONN (under -i), SANDBOX, WORKER
 * Promises: a dead worker is replaced; a bad keys file or certificate leaves the old one in force; an upgrade loses no
 *           connection
 * Never: reads a client's byte, but under -i, where this process is the worker
 * ============================================================================================================= */

static volatile sig_atomic_t signal_hup, signal_usr1, signal_usr2, signal_stop, signal_child;

static void
on_signal(int number)
{
	if (number == SIGHUP)
		signal_hup = 1;
	else if (number == SIGUSR1)
		signal_usr1 = 1;
	else if (number == SIGUSR2)
		signal_usr2 = 1;
	else if (number == SIGCHLD)
		signal_child = 1;
	else if (signal_stop < 2)
		signal_stop++;
}

static const int SIGNALS[] = {SIGHUP, SIGUSR1, SIGUSR2, SIGTERM, SIGINT, SIGCHLD};

/* Signals arrive only while the supervisor waits, so that none is lost between a look and a wait. */
static void
supervisor_signals(void)
{
	struct sigaction action = {.sa_handler = on_signal};
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < LENGTH(SIGNALS); i++) {
		sigaddset(&set, SIGNALS[i]);
		sigaction(SIGNALS[i], &action, NULL);
	}
	sigprocmask(SIG_BLOCK, &set, NULL);
}

/* A worker hears from the supervisor alone: a signal to the whole process group must not cut its streams. */
static void
worker_signals(void)
{
	sigset_t none;

	for (size_t i = 0; i < LENGTH(SIGNALS); i++)
		signal(SIGNALS[i], SIGNALS[i] == SIGCHLD ? SIG_DFL : SIG_IGN);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/* ---- listeners ----------------------------------------------------------------------------------------------- */

/* A socket file that nobody serves any more is in the way of bind(). */
static void
listener_clear_unix(const struct addr *a)
{
	const struct sockaddr_un *un = (const struct sockaddr_un *)&a->ss;
	struct stat st;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return;
	if (lstat(un->sun_path, &st) == 0 && S_ISSOCK(st.st_mode) &&
	    connect(fd, (const struct sockaddr *)un, a->len) != 0 && errno == ECONNREFUSED)
		unlink(un->sun_path);
	close(fd);
}

static int
listener_open(struct addr *a)
{
	int one = 1, zero = 0;
	int fd = socket(a->ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0 && errno == EAFNOSUPPORT && strncmp(a->text, "[::]:", 5) == 0) {
		/* A kernel without IPv6: the dual-stack wildcard is the IPv4 one. */
		struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = ((struct sockaddr_in6 *)&a->ss)->sin6_port};
		memcpy(&a->ss, &in, sizeof in);
		a->len = sizeof in;
		addr_write(a);
		fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	}
	if (fd < 0)
		die(EXIT_FAILURE, "cannot listen on %s: %s", a->text, strerror(errno));
	if (a->ss.ss_family == AF_UNIX)
		listener_clear_unix(a);
	else {
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);   /* what is accepted inherits it */
		socket_vigil(fd);
	}
	if (a->ss.ss_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
	if (bind(fd, (struct sockaddr *)&a->ss, a->len) != 0 || listen(fd, BACKLOG) != 0)
		die(EXIT_FAILURE, "cannot listen on %s: %s; %s", a->text, strerror(errno),
		    errno == EADDRINUSE ? "stop the other server, or choose another address with --listen"
		                        : "choose another address with --listen");
	return fd;
}

/* A socket that was passed in must be one that connections come to: another would serve nobody, and say that it is ready. */
static void
listener_verify(int fd)
{
	int type = 0, listens = 0;
	socklen_t n = sizeof type, len = sizeof listens;

	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n) != 0)
		die(EX_CONFIG, "LISTEN_FDS: descriptor %d is no socket: %s; pass in listening stream sockets", fd, strerror(errno));
	if (type != SOCK_STREAM)
		die(EX_CONFIG, "LISTEN_FDS: descriptor %d is a %s socket; write ListenStream= in the socket unit", fd,
		    type == SOCK_DGRAM ? "datagram" : type == SOCK_SEQPACKET ? "packet" : "raw");
	if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) == 0 && !listens)
		die(EX_CONFIG, "LISTEN_FDS: descriptor %d is a stream socket that does not listen, such as one connection; write Accept=no "
		    "in the socket unit, or serve it with -i", fd);
}

/* Sockets that were passed in (LISTEN_FDS) go before --listen. */
static unsigned
listeners_passed(struct supervisor *s)
{
	const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS");
	uint64_t owner = 0, n = 0;
	int one = 1;

	if (pid == NULL || count == NULL || !number_read(slice_of(pid), &owner) || owner != (uint64_t)getpid() ||
	    !number_read(slice_of(count), &n))
		return 0;
	if (n > LISTEN_MAX)
		die(EX_CONFIG, "%llu sockets were passed in; at most %d are served", (unsigned long long)n, LISTEN_MAX);
	for (unsigned i = 0; i < n; i++) {
		int fd = 3 + (int)i;
		if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) != 0)
			die(EX_CONFIG, "LISTEN_FDS: descriptor %d: %s", fd, strerror(errno));
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);   /* no harm to a unix socket */
		socket_vigil(fd);
		s->listener[i] = fd;
	}
	unsetenv("LISTEN_PID");
	unsetenv("LISTEN_FDS");
	unsetenv("LISTEN_FDNAMES");
	return (unsigned)n;
}

/* Room for two descriptors a connection. Where the hard limit is lower, so is the number of connections: the pool must be
 * full, and somebody give way, before descriptors run out. */
static void
supervisor_descriptors(void)
{
	enum { OTHERS = LISTEN_MAX + 64 };
	rlim_t need = 2 * config.max_conns + OTHERS;
	struct rlimit limit, wanted;

	if (process_limit(RLIMIT_NOFILE, NULL, &limit) != 0 || limit.rlim_cur >= need)
		return;
	wanted = limit;
	wanted.rlim_cur = limit.rlim_max < need ? limit.rlim_max : need;
	if (process_limit(RLIMIT_NOFILE, &wanted, NULL) == 0)
		limit = wanted;
	if (limit.rlim_cur < need) {
		uint64_t fit = limit.rlim_cur > OTHERS + 1 ? (limit.rlim_cur - OTHERS) / 2 : limit.rlim_cur / 4;
		if (fit < 2)
			die(EX_CONFIG, "only %llu open files are allowed; raise the limit (ulimit -Hn)", (unsigned long long)limit.rlim_cur);
		config.max_conns = fit;
	}
}

static void
supervisor_listen(struct supervisor *s)
{
	s->listeners = listeners_passed(s);
	s->bound = s->listeners == 0;
	if (s->bound)
		names_find_listen(EX_CONFIG);
	if (s->bound)
		for (; s->listeners < config.listens; s->listeners++)
			s->listener[s->listeners] = listener_open(&config.listen[s->listeners]);
	for (unsigned i = 0; i < s->listeners; i++) {
		struct addr a = {.len = sizeof a.ss};
		listener_verify(s->listener[i]);
		getsockname(s->listener[i], (struct sockaddr *)&a.ss, &a.len);
		s->secure[i] = config.tls_cert != NULL && a.ss.ss_family != AF_UNIX;
	}
}

static void
supervisor_log_listeners(struct supervisor *s)
{
	for (unsigned i = 0; i < s->listeners; i++) {
		struct addr a = {.len = sizeof a.ss};
		if (getsockname(s->listener[i], (struct sockaddr *)&a.ss, &a.len) == 0)
			addr_write(&a);
		log_listening(s->log, a.text, s->secure[i]);
	}
}

/* ---- children ------------------------------------------------------------------------------------------------ */

static void
children_tell(const struct supervisor *s, char word, int fd)
{
	for (unsigned i = 0; i < s->children; i++)
		word_send(s->child[i].control, word, fd);
}

/* The file of the shared table, or -1. */
static int
supervisor_state(const struct supervisor *s)
{
	return config.state != NULL ? s->shared[SHARED_TABLE] : -1;
}

/* Who may have what of the supervisor's mappings. */
enum { HEIR_WORKER = 1, HEIR_RESOLVER = 2 };

static void
owned_unmap(const struct supervisor *s, unsigned heir)
{
	const struct { void *p; size_t n; unsigned heirs; } owned[] = {
		{s->keys, s->keys_size, HEIR_WORKER}, {s->table, (size_t)geometry.size, HEIR_WORKER},
		{s->sessions, sizeof *s->sessions, HEIR_WORKER}};

	for (size_t i = 0; i < LENGTH(owned); i++)
		if (owned[i].p != NULL && !(owned[i].heirs & heir))
			munmap(owned[i].p, owned[i].n);
	if (heir != HEIR_WORKER)
		pair_forget(s->pair);        /* and wipe */
}

/* The descriptors that a worker has; all else that the supervisor has open is closed. */
static void
owned_close(const struct supervisor *s, int control)
{
	int keep[LISTEN_MAX + 4] = {control, s->root, s->log->fd, supervisor_state(s)};

	memcpy(keep + 4, s->listener, sizeof s->listener);
	descriptors_close_but(keep, LENGTH(keep));
}

/* What the forked child becomes: it has of the supervisor's what those two leave it. */
__attribute__((noreturn)) static void
child_run(const struct supervisor *s, int control)
{
	owned_close(s, control);
	owned_unmap(s, HEIR_WORKER);
	worker_signals();
	struct worker *w = map_new(sizeof *w, MAP_PRIVATE);
	w->log = s->log;
	w->log->n = w->log->dropped = 0;
	w->keys = s->keys;
	mprotect(s->keys, s->keys_size, PROT_READ);
	w->table = s->table;
	w->pair = s->pair;
	w->sessions = s->sessions;
	w->row = table_row_take(s->table, supervisor_state(s));
	w->control = control;
	w->server = s->id;
	w->listeners = s->listeners;
	memcpy(w->listener, s->listener, sizeof w->listener);
	memcpy(w->secure, s->secure, sizeof w->secure);
	worker_ready(w, s->root, s->walls);
	worker_run(w);
	pair_forget(s->pair);
	exit(EXIT_SUCCESS);
}

/* A worker takes its place: those of older generations in it, or in one that is no more, drain. That is when it is started,
 * but of a binary no worker of which has served yet when it says that it serves: one that cannot start does no harm. */
static void
supervisor_relieve(struct supervisor *s, const struct child *by)
{
	for (struct child *child = s->child; child < s->child + s->children; child++)
		if (!child->draining && child->generation < by->generation &&
		    (child->slot == by->slot || (uint64_t)child->slot >= config.workers)) {
			child->draining = true;
			word_send(child->control, 'D', -1);
		}
}

/* Has another worker taken the place of this one? */
static bool
supervisor_relieved(const struct supervisor *s, const struct child *by)
{
	for (const struct child *child = s->child; child < s->child + s->children; child++)
		if (child->generation > by->generation && child->slot == by->slot)
			return true;
	return false;
}

static void
supervisor_spawn(struct supervisor *s, int slot)
{
	int pair[2], pid;

	s->respawn_ns[slot] = s->now_ns + RESPAWN_MAX_MS * NS_PER_MS;   /* when this try fails */
	if (s->children == CHILDREN_MAX || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) {
		log_failure(s->log, "worker_missing", "no worker could be started; trying again", errno);
		s->failed++;
		return;
	}
	log_flush(s->log);
	pid = fork();
	if (pid == 0) {
		close(pair[0]);
		child_run(s, pair[1]);
	}
	close(pair[1]);
	if (pid < 0) {
		close(pair[0]);
		log_failure(s->log, "worker_missing", "no worker could be started; trying again", errno);
		s->failed++;
		return;
	}
	struct child *child = &s->child[s->children++];
	*child = (struct child){.pid = pid, .control = pair[0], .slot = slot, .generation = s->generation, .born_ns = s->now_ns};
	s->respawn_ns[slot] = 0;
	log_worker_started(s->log, slot, pid);
	if (s->proven)
		supervisor_relieve(s, child);
}

/* The next generation of workers, on the same sockets; those before it drain as it takes their places. None once the server
 * stops: it would have no sockets, hear no T and keep the supervisor waiting. */
static void
supervisor_generation(struct supervisor *s)
{
	s->due = false;
	s->generation++;
	for (uint64_t slot = 0; slot < config.workers && !s->draining; slot++)
		supervisor_spawn(s, (int)slot);
}

/* The generation that an operation made due, now that the operation is over and nothing of it lies about. */
static void
supervisor_follow(struct supervisor *s)
{
	if (s->due)
		supervisor_generation(s);
}

/* When the slot of a worker that died is filled again. */
static void
supervisor_replace(struct supervisor *s, const struct child *child)
{
	uint64_t *ms = &s->respawn_ms[child->slot];
	bool young = s->now_ns - child->born_ns < YOUNG_MS * NS_PER_MS;

	*ms = !young ? 0 : *ms == 0 ? RESPAWN_FIRST_MS : *ms * 2 < RESPAWN_MAX_MS ? *ms * 2 : RESPAWN_MAX_MS;
	s->respawn_ns[child->slot] = s->now_ns + *ms * NS_PER_MS;
}

/* What a worker said since the last look: that it serves, lives, could not reach the upstream, or ends for a forbidden call. */
static void
child_hear(struct supervisor *s, struct child *child)
{
	char words[64];
	bool number = false;
	ssize_t n;

	for (int reads = 0; reads < 16 && (n = recv(child->control, words, sizeof words, MSG_DONTWAIT)) > 0; reads++)
		for (ssize_t k = 0; k < n; k++) {
			if (number && is_digit(words[k]) && child->call < 100000)
				child->call = child->call * 10 + (words[k] - '0');
			number = words[k] == 'K' || (number && is_digit(words[k]));
			if (words[k] == 'K')
				child->call = 0;
			else if (words[k] == 'P')
				child->pings = 0;
			else if (words[k] == 'S' && child->generation > 0) {
				s->proven = child->serves = true;
				supervisor_relieve(s, child);
			} else if (words[k] == 'R') {
				s->unreached = true;
				bool moved = s->moved_ns != 0 && s->now_ns - s->moved_ns < RESOLVE_EVERY_MS * NS_PER_MS;
				uint64_t again_ns = s->resolved_ns + (moved ? RESOLVE_EVERY_MS : RESOLVE_AGAIN_MS) * NS_PER_MS;
				if (s->resolver == 0 && s->resolve_ns > again_ns)
					s->resolve_ns = again_ns;
			}
		}
}

static void
children_hear(struct supervisor *s)
{
	for (struct child *child = s->child; child < s->child + s->children; child++)
		child_hear(s, child);
}

static void
supervisor_reap(struct supervisor *s)
{
	int status, pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		struct child *child = s->child;
		if (pid == s->resolver)
			s->resolved = true;
		while (child < s->child + s->children && child->pid != pid)
			child++;
		if (child == s->child + s->children)
			continue;
		if (WIFEXITED(status) && WEXITSTATUS(status) == EX_NOPERM && child->generation > 0 && !s->proven)
			s->hopeless = EX_CONFIG;
		child_hear(s, child);
		s->failed += child->generation > 0 && !s->proven;
		close(child->control);
		table_recover(s->table, supervisor_state(s), (uint32_t)pid);
		if (!child->draining || status != 0)
			log_worker_died(s->log, child, status);
		if (!child->draining && !s->draining && !supervisor_relieved(s, child))
			supervisor_replace(s, child);
		*child = s->child[--s->children];
	}
}

/* ---- keys ---------------------------------------------------------------------------------------------------- */

static struct look
look_of(const struct stat *st)
{
	return (struct look){.ctime_ns = (uint64_t)st->st_ctim.tv_sec * NS_PER_S + (uint64_t)st->st_ctim.tv_nsec,
	    .size = (uint64_t)st->st_size, .inode = st->st_ino, .device = st->st_dev, .there = true};
}

static bool
look_equal(const struct look *a, const struct look *b)
{
	return a->there == b->there && a->ctime_ns == b->ctime_ns && a->size == b->size && a->inode == b->inode &&
	       a->device == b->device;
}

/* Reads the keys into the idle half of a mapping that has room for them: the one in use, or a larger new one. */
static struct keys_map *
supervisor_parse(struct supervisor *s, struct slice text, struct complaints *bad, size_t *size, int *fd)
{
	uint64_t bound = keys_bound(text);
	struct keys_map *map = s->keys != NULL && bound <= s->keys->capacity ? s->keys : keys_new(2 * bound, size, fd);

	if (map == NULL)
		complain(bad, 0, "no memory for so many keys");
	bool good = map != NULL && keys_parse(map, text, bound, &config, bad);
	complaints_end(bad);
	if (map != NULL && !good && map != s->keys) {
		munmap(map, *size);
		if (*fd >= 0)
			close(*fd);
	}
	return good ? map : NULL;
}

/* The old workers go on with a mapping that is too small for all keys: it gets those that fit, so that what was revoked is
 * refused there as well. A key that is not found there may be a new one, and is sent to a new connection. */
static void
supervisor_retire(struct keys_map *old, struct slice text)
{
	struct complaints ignored = {.to = -1};
	struct slice rest = text;

	for (uint32_t lines = 1; lines < old->capacity && rest.n > 0; lines++)
		text_line(&rest);
	bool fits = keys_parse(old, (struct slice){text.p, (size_t)(rest.p - text.p)}, old->capacity, &config, &ignored);
	if (fits)
		keys_flip(old);
	atomic_store(&old->stale, fits ? STALE_PARTLY : STALE_ALL);
}

/* Puts new keys in force. A file that outgrew the mapping gets a larger one, and workers that know it. */
static bool
supervisor_publish(struct supervisor *s, struct complaints *bad)
{
	struct file file = {.p = NULL};
	struct keys_map *old = s->keys;
	size_t size = 0;
	int fd = -1;

	if (config.keys != NULL && !keys_read(config.keys, &file, bad)) {
		s->watched[WATCHED_KEYS].again_ns = s->now_ns + AGAIN_MS * NS_PER_MS;
		return false;
	}
	if (file.p != NULL)
		s->watched[WATCHED_KEYS].loaded = s->watched[WATCHED_KEYS].last = look_of(&file.st);
	s->watched[WATCHED_KEYS].again_ns = 0;
	struct slice text = {file.p == NULL ? "" : file.p, file.n};
	struct keys_map *map = supervisor_parse(s, text, bad, &size, &fd);
	if (map != NULL && file.p != NULL)
		keys_warn_exposed(&file, config.keys);
	if (map != NULL)
		keys_flip(map);
	if (map != NULL && map != old) {
		if (old != NULL) {
			supervisor_retire(old, text);
			munmap(old, s->keys_size);
			close(s->shared[SHARED_KEYS]);
		}
		s->keys = map;
		s->keys_size = size;
		s->shared[SHARED_KEYS] = fd;
		s->due |= s->serving;
	}
	file_forget(&file);
	return map != NULL;
}

static uint64_t
supervisor_keys(const struct supervisor *s)
{
	return s->keys->half[atomic_load(&s->keys->generation) & 1].count;
}

/* When the keys file changed, or on HUP. */
static void
supervisor_reload_keys(struct supervisor *s)
{
	struct complaints bad = {.to = STDERR_FILENO, .hasty = true, .file = config.keys != NULL ? config.keys : "TINYAUTH_KEY"};

	bool good = supervisor_publish(s, &bad);
	supervisor_follow(s);                /* workers that know all of them, before that is told */
	if (good)
		log_keys_published(s->log, supervisor_keys(s));
	else
		log_keys_refused(s->log, bad.file, bad.n);
}

/* ---- certificate --------------------------------------------------------------------------------------------- */

/* Says that the certificate ends soon, once a day. */
static void
supervisor_warn(struct supervisor *s)
{
	if (s->pair == NULL || s->now_ns < s->warn_ns)
		return;
	s->warn_ns = s->now_ns + 86400 * NS_PER_S;
	uint64_t now_s = clock_wall_ms() / 1000;
	if (s->pair->until_s < now_s + TLS_WARN_DAYS * 86400)
		log_certificate(s->log, s->pair->until_s <= now_s ? "certificate_expired" : "certificate_ends_soon", s->pair->subject,
		    s->pair->names, s->pair->until_s);
	if (s->pair->from_s > now_s)
		log_note(s->log, "certificate_not_yet_good", "it begins in the future: look at this machine's clock");
}

/* Takes the certificate into use for the workers that are forked from now on. */
static void
supervisor_certify(struct supervisor *s, struct tls_pair *pair)
{
	pair_forget(s->pair);
	s->pair = pair;
	sessions_begin(s->sessions, pair->epoch);
	log_certificate(s->log, "certificate", pair->subject, pair->names, pair->until_s);
	s->warn_ns = 0;
	supervisor_warn(s);
}

/* When the certificate or its key changed, or on HUP: a new generation that has them. A broken pair changes nothing. */
static void
supervisor_renew(struct supervisor *s)
{
	struct mistake m;
	struct tls_pair *pair;

	if (config.tls_cert == NULL)
		return;
	if ((pair = pair_load(config.tls_cert, config.tls_key, clock_wall_ms() / 1000, &m)) == NULL)
		log_note(s->log, "certificate_refused", m.text);
	else if (pair_equal(pair, s->pair))
		pair_forget(pair);
	else {
		supervisor_certify(s, pair);
		s->due = true;
	}
}

/* ---- files that are watched ---------------------------------------------------------------------------------- */

/* Did this file change since it was loaded, and does it stand still? */
static bool
watched_changed(struct watched *file, uint64_t now_ns)
{
	struct stat st;
	struct look look = {.there = false};

	if (file->path == NULL)
		return false;
	if (stat(file->path, &st) == 0)
		look = look_of(&st);
	bool settled = look_equal(&look, &file->last);
	file->last = look;
	bool again = file->again_ns != 0 && file->again_ns <= now_ns;
	if (!settled || (!again && look_equal(&look, &file->loaded)))
		return false;
	file->loaded = look;
	file->again_ns = 0;
	return true;
}

/* The state of a file from which changes count. */
static void
watched_begin(struct watched *file, const char *path)
{
	struct stat st;

	file->path = path;
	if (path != NULL && stat(path, &st) == 0)
		file->loaded = file->last = look_of(&st);
}

/* The directory of the upstream's unix socket, where it is the workers' root, may be removed and made anew, as by systemd's
 * RuntimeDirectory=: workers that run would look for the socket in the old one. */
static void
supervisor_watch_root(struct supervisor *s)
{
	const struct sockaddr_un *un = (const struct sockaddr_un *)&config.upstream.addr[0].ss;
	struct stat held, named, top;

	if (s->root < 0 || un->sun_family != AF_UNIX || (s->moved_ns != 0 && s->now_ns - s->moved_ns < ROOT_REST_MS * NS_PER_MS))
		return;
	int fd = directory_open(un->sun_path);
	/* no way for somebody else to the whole file system, or to a new generation in every turn */
	if (fd >= 0 && fstat(s->root, &held) == 0 && fstat(fd, &named) == 0 && stat("/", &top) == 0 && !stat_same(&held, &named) &&
	    !stat_same(&top, &named) && (named.st_uid == held.st_uid || named.st_uid == 0)) {
		int old = s->root;
		s->root = fd;
		fd = old;
		s->moved_ns = s->now_ns;
		log_note(s->log, "upstream_moved", "its socket's directory was made anew");
		s->due = true;
	}
	close(fd);
}

/* A look a second; a file is read when two looks agree that it is another one. */
static void
supervisor_watch(struct supervisor *s)
{
	if (s->now_ns < s->look_ns)
		return;
	s->look_ns = s->now_ns + WATCH_MS * NS_PER_MS;
	if (watched_changed(&s->watched[WATCHED_KEYS], s->now_ns))
		supervisor_reload_keys(s);
	bool cert = watched_changed(&s->watched[WATCHED_TLS_CERT], s->now_ns);
	bool key = watched_changed(&s->watched[WATCHED_TLS_KEY], s->now_ns);
	if ((cert || key) && !s->draining)
		supervisor_renew(s);
	supervisor_watch_root(s);
	supervisor_warn(s);
}

/* ---- upgrade ------------------------------------------------------------------------------------------------- */

/* Would the new binary start with our command line? It says so itself, in a child. */
static bool
upgrade_checks(const struct supervisor *s)
{
	size_t n = 0;
	int status = -1, pid, ends[2];

	while (s->argv[n] != NULL)
		n++;
	char **argv = calloc(n + 2, sizeof *argv);
	if (argv == NULL || pipe(ends) != 0) {
		free(argv);
		return false;
	}
	struct pollfd end = {ends[0], POLLIN, 0};    /* of the child, which keeps the other end */
	memcpy(argv + 2, s->argv + 1, (n - 1) * sizeof *argv);
	argv[0] = s->argv[0];
	argv[1] = (char *)(uintptr_t)"check";
	if ((pid = fork()) == 0) {
		worker_signals();
		int null = open("/dev/null", O_WRONLY);
		if (null >= 0)
			dup2(null, STDOUT_FILENO);
		if (setenv("TINYAUTH_UPGRADE", "1", 1) == 0)
			execv(s->binary, argv);
		_exit(127);
	}
	free(argv);
	close(ends[1]);
	if (pid > 0 && poll(&end, 1, CHECK_MS) == 0)
		kill(pid, SIGKILL);
	close(ends[0]);
	while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
		continue;
	return pid > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* Moves a descriptor out of the way of LISTEN_FDS. */
static int
upgrade_lift(int fd, int above)
{
	if (fd < 0 || fd >= above)
		return fd;
	int lifted = fcntl(fd, F_DUPFD_CLOEXEC, above);
	if (lifted < 0)
		return fd;
	close(fd);
	return lifted;
}

/* Shows or hides from exec() what the next binary takes over besides the listeners. */
static void
upgrade_expose(const struct supervisor *s, bool shown)
{
	int flags = shown ? 0 : FD_CLOEXEC;

	for (unsigned i = 0; i < SHARED_COUNT; i++)
		fcntl(s->shared[i], F_SETFD, flags);   /* of -1, where there is none, nothing */
	for (unsigned i = 0; i < s->children; i++)
		fcntl(s->child[i].control, F_SETFD, flags);
}

/* TINYAUTH_HANDOVER: the mappings' descriptors, whether the listeners are our own and the sandbox is closed, and
 * `pid:control:slot:state` of each child; -2: it drains, -1: it serves. In older versions the last was a row or -1. */
static bool
upgrade_environment(const struct supervisor *s)
{
	static char text[64 + CHILDREN_MAX * 48];
	struct out o = {text, 0, sizeof text - 1, false};
	char number[24];

	for (unsigned i = 0; i < SHARED_COUNT; i++)
		out_print(&o, "%d ", s->shared[i]);
	out_print(&o, "%d %d", s->bound, s->closed);
	for (const struct child *child = s->child; child < s->child + s->children; child++)
		out_print(&o, " %d:%d:%d:%d", child->pid, child->control, child->slot, child->draining ? -2 : -1);
	text[o.n] = '\0';
	bool set = setenv("TINYAUTH_HANDOVER", text, 1) == 0;
	text_print(number, sizeof number, "%u", s->listeners);
	set = set && setenv("LISTEN_FDS", number, 1) == 0;
	text_print(number, sizeof number, "%d", getpid());
	return set && setenv("LISTEN_PID", number, 1) == 0;
}

/* USR2: the new binary takes our place, pid, listeners, mappings and children. It is asked first whether it can. */
static void
supervisor_upgrade(struct supervisor *s)
{
	int above = 3 + (int)s->listeners;

	if (!upgrade_checks(s)) {
		log_note(s->log, "upgrade_refused", "the new binary does not pass its check; the old one goes on");
		return;
	}
	log_note(s->log, "upgrade", NULL);
	log_flush(s->log);
	for (unsigned i = 0; i < SHARED_COUNT; i++)
		s->shared[i] = upgrade_lift(s->shared[i], above);
	s->log->fd = s->log->fd > STDERR_FILENO ? upgrade_lift(s->log->fd, above) : s->log->fd;
	for (unsigned i = 0; i < s->listeners; i++)
		s->listener[i] = upgrade_lift(s->listener[i], above);
	for (unsigned i = 0; i < s->children; i++)
		s->child[i].control = upgrade_lift(s->child[i].control, above);
	bool listening = true;
	for (unsigned i = 0; i < s->listeners; i++)
		listening = listening && s->listener[i] >= above && dup2(s->listener[i], 3 + (int)i) >= 0;
	upgrade_expose(s, true);
	if (s->shared[SHARED_KEYS] < 0)      /* cannot be handed over: the old workers must not go on with keys nobody edits */
		atomic_store(&s->keys->stale, STALE_ALL);
	if (listening && upgrade_environment(s))
		execv(s->binary, s->argv);
	log_failure(s->log, "upgrade_refused", "the new binary cannot be executed; the old one goes on", errno);
	atomic_store(&s->keys->stale, 0);
	upgrade_expose(s, false);
	for (unsigned i = 0; i < s->listeners; i++)
		if (s->listener[i] != 3 + (int)i)    /* it was lifted */
			close(3 + (int)i);
	unsetenv("LISTEN_PID");
	unsetenv("LISTEN_FDS");
	unsetenv("TINYAUTH_HANDOVER");
}

/* A mapping that the old binary left us, if its layout is ours and it has `least` bytes or more; else *fd becomes -1. An older
 * key table is marked: nobody writes it any more. */
static void *
inherit_map(int *fd, uint64_t magic, size_t least, size_t *size)
{
	struct stat st;
	uint64_t *map = MAP_FAILED;

	if (*fd >= 0 && fcntl(*fd, F_SETFD, FD_CLOEXEC) == 0 && fstat(*fd, &st) == 0 && st.st_size >= (off_t)sizeof(struct keys_map))
		map = mmap(NULL, *size = (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (map != MAP_FAILED && *map == magic && *size >= least)
		return map;
	if (map != MAP_FAILED && magic == KEYS_MAGIC)
		atomic_store(&((struct keys_map *)map)->stale, STALE_ALL);
	if (map != MAP_FAILED)
		munmap(map, *size);
	close(*fd);
	*fd = -1;
	return NULL;
}

/* The table that the old binary left us, unless it is of another geometry: then the old workers count for themselves. */
static struct table *
inherit_table(int *fd)
{
	size_t size;
	struct table *t = inherit_map(fd, TABLE_MAGIC, sizeof *t, &size);

	if (t == NULL)
		return NULL;
	table_believe(t);
	if (geometry.rows <= ROWS_MAX && geometry.conns <= CONNS_MAX && geometry.conns >= config.max_conns &&
	    table_size(geometry.rows, geometry.conns) == size)
		return t;
	munmap(t, size);
	close(*fd);
	*fd = -1;
	return NULL;
}

/* Takes over from the binary that ran under this pid before. Its workers are our children and drain. */
static void
supervisor_inherit(struct supervisor *s)
{
	char *text = getenv("TINYAUTH_HANDOVER");
	size_t size;

	if (text == NULL)
		return;
	s->upgraded = true;
	for (unsigned i = 0; i < SHARED_COUNT; i++)
		s->shared[i] = (int)strtol(text, &text, 10);
	s->bound = strtol(text, &text, 10) != 0;
	s->closed = strtol(text, &text, 10) != 0;
	s->keys = inherit_map(&s->shared[SHARED_KEYS], KEYS_MAGIC, sizeof *s->keys, &s->keys_size);
	s->table = inherit_table(&s->shared[SHARED_TABLE]);
	s->sessions = inherit_map(&s->shared[SHARED_SESSIONS], SESSIONS_MAGIC, sizeof *s->sessions, &size);
	if (s->sessions != NULL)
		madvise(s->sessions, sizeof *s->sessions, MADV_DONTDUMP);
	while (*text == ' ' && s->children < CHILDREN_MAX) {
		struct child *child = &s->child[s->children++];
		child->pid = (int)strtol(text, &text, 10);
		child->control = (int)strtol(text + 1, &text, 10);
		child->slot = (int)strtol(text + 1, &text, 10);
		child->draining = *text == ':' && strtol(text + 1, NULL, 10) == -2;
		text += strcspn(text, " ");          /* another version may say more */
		fcntl(child->control, F_SETFD, FD_CLOEXEC);
	}
	unsetenv("TINYAUTH_HANDOVER");
}

/* ---- the service manager ------------------------------------------------------------------------------------- */

/* Tells systemd how things stand, in its own words [sd_notify(3)]. */
__attribute__((format(printf, 2, 3))) static void
supervisor_notify(const struct supervisor *s, const char *format, ...)
{
	char text[256];
	struct out o = {text, 0, sizeof text, false};
	va_list rest;

	if (s->notify < 0)
		return;
	va_start(rest, format);
	out_vprint(&o, format, rest);
	va_end(rest);
	send(s->notify, text, o.n, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void
supervisor_notify_ready(const struct supervisor *s)
{
	if (!s->told_ready)
		return;
	supervisor_notify(s, "READY=1\nSTATUS=%llu workers, %llu keys, upstream %s\n", (unsigned long long)config.workers,
	    (unsigned long long)supervisor_keys(s), config.upstream.text);
}

/* A reload begins; supervisor_notify_ready() says that it is done. */
static void
supervisor_notify_reloading(const struct supervisor *s)
{
	if (s->told_ready)
		supervisor_notify(s, "RELOADING=1\nMONOTONIC_USEC=%llu\n", (unsigned long long)(clock_ns() / 1000));
}

/* Finds the manager's socket, and whether it wants to hear from us now and then. */
static void
supervisor_notify_open(struct supervisor *s)
{
	const char *path = getenv("NOTIFY_SOCKET"), *usec = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	uint64_t us = 0, owner = (uint64_t)getpid();

	s->notify = -1;
	if (path == NULL || path[0] == '\0' || strlen(path) >= sizeof un.sun_path)
		return;
	strcpy(un.sun_path, path);
	socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
	if (path[0] == '@')
		un.sun_path[0] = '\0';
	s->notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (s->notify >= 0 && connect(s->notify, (struct sockaddr *)&un, len) != 0) {
		close(s->notify);
		s->notify = -1;
	}
	if (pid != NULL && !number_read(slice_of(pid), &owner))
		return;
	if (s->notify >= 0 && usec != NULL && owner == (uint64_t)getpid() && number_read(slice_of(usec), &us))
		s->watchdog_ns = us * 1000 / 2;
}

/* Says that all is well, and looks whether it is: a worker that does not answer is killed, and so replaced. */
static void
supervisor_pet(struct supervisor *s)
{
	if (s->watchdog_ns == 0 || s->now_ns < s->pet_ns)
		return;
	s->pet_ns = s->now_ns + s->watchdog_ns;
	supervisor_notify(s, "WATCHDOG=1\n");
	for (struct child *child = s->child; child < s->child + s->children; child++) {
		if (child->pings++ >= PINGS_MAX) {
			log_note(s->log, "worker_stuck", "it did not answer, and is killed and replaced");
			kill(child->pid, SIGKILL);
		} else
			word_send(child->control, 'P', -1);
	}
}

/* Socket-activated, and nothing happened for so long: true, it is time to end. What comes later starts the service again,
 * because the sockets stay open in the manager. */
static bool
supervisor_idle(struct supervisor *s)
{
	uint64_t events = 0, requests = 0;

	if (config.idle_exit_ms == 0 || s->bound)
		return false;
	for (uint32_t i = 0; i < geometry.rows; i++) {
		events += atomic_load(&table_row(s->table, i)->events);
		requests += atomic_load(&table_row(s->table, i)->requests);
	}
	if (events != s->events || requests > 0)
		s->active_ns = s->now_ns;
	s->events = events;
	return s->now_ns - s->active_ns >= config.idle_exit_ms * NS_PER_MS;
}

/* ---- the upstream's name ------------------------------------------------------------------------------------- */

static bool
addrs_hold(const struct addr *list, unsigned n, const struct addr *a)
{
	for (unsigned i = 0; i < n; i++)
		if (strcmp(list[i].text, a->text) == 0)
			return true;
	return false;
}

/* The name was looked up. Many answer with a few of their addresses at a time, in turn: a new generation is made only when none of
 * ours is among them any more, or ours do not take connections. No answer leaves everything as it was. */
static void
supervisor_resolved(struct supervisor *s)
{
	struct upstream *u = &config.upstream;
	struct addr found[UPSTREAM_ADDRS];
	unsigned n = name_answer(s->resolver_fd, u->text, found), same = 0;

	bool wanted = s->unreached || u->addrs == 0;
	s->resolver = 0;
	s->resolver_fd = -1;
	s->unreached = false;
	s->resolved_ns = s->now_ns;
	s->resolve_ns = s->now_ns + (u->addrs == 0 && n == 0 ? RESOLVE_AGAIN_MS : RESOLVE_EVERY_MS) * NS_PER_MS;
	for (unsigned i = 0; i < n; i++)
		same += addrs_hold(u->addr, u->addrs, &found[i]);
	if (n == 0 || (same == n && n == u->addrs) || (same > 0 && !wanted))
		return;
	log_note(s->log, u->addrs == 0 ? "upstream_found" : "upstream_moved", found[0].text);
	s->moved_ns = s->now_ns;
	memcpy(u->addr, found, n * sizeof *found);
	u->addrs = n;
	upstream_host(u);
	s->due = true;
}

/* In the child that looks up a name: nothing that a name server's answer could do harm with. */
static void
supervisor_forget(void *of)
{
	owned_unmap(of, HEIR_RESOLVER);
}

static void
supervisor_resolve(struct supervisor *s)
{
	if (!config.upstream.named || s->draining || s->now_ns < s->resolve_ns)
		return;
	if (s->resolver != 0) {
		kill(s->resolver, SIGKILL);          /* it takes too long; when it is gone, there is no answer */
		s->resolve_ns = s->now_ns + RESOLVE_MS * NS_PER_MS;
		return;
	}
	s->resolver_fd = name_ask(config.upstream.text, false, supervisor_forget, s, &s->resolver);
	if (s->resolver_fd < 0)
		s->resolver = 0;
	s->resolve_ns = s->now_ns + (s->resolver != 0 ? RESOLVE_MS : RESOLVE_EVERY_MS) * NS_PER_MS;
}

/* ---- the loop ------------------------------------------------------------------------------------------------ */

static void
supervisor_reopen_log(struct supervisor *s)
{
	if (config.log != NULL) {
		int fd = log_open_file(config.log);
		if (fd < 0) {
			log_failure(s->log, "log_not_reopened", "the log file cannot be opened; the old one goes on", errno);
			return;
		}
		children_tell(s, 'L', fd);
		log_close(s->log);
		log_take(s->log, fd, true);
	}
	log_note(s->log, "log_reopened", NULL);
}

/* TERM or INT: no new connections, and the end when the last worker has drained. */
static void
supervisor_stop(struct supervisor *s)
{
	s->draining = true;
	s->kill_ns = s->now_ns + (config.drain_ms + HURRY_MS) * NS_PER_MS;   /* a worker that hangs does not end by itself */
	if (s->resolver != 0)
		kill(s->resolver, SIGKILL);
	supervisor_notify(s, "STOPPING=1\n");
	log_note(s->log, "draining", NULL);
	for (unsigned i = 0; i < s->listeners; i++) {
		close(s->listener[i]);
		s->listener[i] = -1;
	}
	for (unsigned i = 0; s->bound && i < config.listens; i++)
		if (config.listen[i].ss.ss_family == AF_UNIX)
			unlink(((const struct sockaddr_un *)&config.listen[i].ss)->sun_path);
	s->listeners = 0;
	memset(s->respawn_ns, 0, sizeof s->respawn_ns);
	for (unsigned i = 0; i < s->children; i++)
		s->child[i].draining = true;
	children_tell(s, 'T', -1);
}

/* The second one: workers end at once, so that cut streams look cut, and are killed when they do not. */
static void
supervisor_hurry(struct supervisor *s)
{
	s->kill_ns = s->now_ns + HURRY_MS * NS_PER_MS;
	children_tell(s, 'X', -1);
}

static void
supervisor_wait(struct supervisor *s)
{
	uint64_t until = s->look_ns, ns;
	struct pollfd first[16];             /* new workers: the server is ready, or a reload done, when they say that they serve */
	nfds_t n = 0;
	sigset_t none;

	for (uint64_t slot = 0; slot < config.workers; slot++)
		if (s->respawn_ns[slot] != 0 && s->respawn_ns[slot] < until)
			until = s->respawn_ns[slot];
	if (s->kill_ns != 0 && s->kill_ns < until)
		until = s->kill_ns;
	if (s->watchdog_ns != 0 && s->pet_ns < until)
		until = s->pet_ns;
	if (config.idle_exit_ms != 0 && !s->bound && s->now_ns + config.idle_exit_ms * NS_PER_MS / 4 < until)
		until = s->now_ns + config.idle_exit_ms * NS_PER_MS / 4;
	ns = until > s->now_ns ? until - s->now_ns : 0;
	if ((s->log->n > 0 || !s->proven) && ns > LOG_RETRY_MS * NS_PER_MS)   /* a line waits, or there are more of the first */
		ns = LOG_RETRY_MS * NS_PER_MS;
	struct timespec time = {(time_t)(ns / NS_PER_S), (long)(ns % NS_PER_S)};
	sigemptyset(&none);
	for (unsigned i = 0; i < s->children && (!s->proven || s->reloading) && n < LENGTH(first); i++)
		if (s->child[i].generation > 0 && !s->child[i].serves)
			first[n++] = (struct pollfd){s->child[i].control, POLLIN, 0};
	if (ppoll(first, n, &time, &none) > 0)
		signal_child = 1;            /* it may have ended instead, and a descriptor that is ready keeps signals waiting */
	s->now_ns = clock_ns();
}

/* The first worker serves: so does the server. */
static void
supervisor_tell_ready(struct supervisor *s)
{
	if (!s->proven || s->told_ready)
		return;
	s->told_ready = true;
	log_ready(s->log, config.workers, supervisor_keys(s), config.upstream.text);
	supervisor_notify_ready(s);
}

/* A reload is done when what it began serves. */
static void
supervisor_tell_reloaded(struct supervisor *s)
{
	bool done = s->reloading;

	for (unsigned i = 0; i < s->children; i++)
		done = done && (s->child[i].generation != s->generation || s->child[i].serves);
	if (!done)
		return;
	s->reloading = false;
	supervisor_notify_ready(s);
}

/* None of the first workers comes to serve, and there are none of a binary before: that is an error, whose reason they told. */
static void
supervisor_despair(struct supervisor *s)
{
	if (s->proven || s->hopeless != 0 || s->failed < HOPELESS_TRIES || s->now_ns - s->start_ns < HOPELESS_MS * NS_PER_MS)
		return;
	for (unsigned i = 0; i < s->children; i++)
		if (s->child[i].generation == 0)
			return;
	s->hopeless = EXIT_FAILURE;
	log_note(s->log, "no_worker", "none of the first workers came to serve; look above for what ended them");
}

/* What signals asked for. */
static void
supervisor_obey(struct supervisor *s)
{
	if (signal_stop > s->stops && s->stops++ < 2) {
		if (s->draining)
			supervisor_hurry(s);
		else
			supervisor_stop(s);
	}
	if (signal_usr1 && !(signal_usr1 = 0))
		supervisor_reopen_log(s);
	if (s->draining)
		return;
	if (signal_usr2 && !(signal_usr2 = 0)) {
		supervisor_notify_reloading(s);
		supervisor_notify(s, "WATCHDOG=1\n");        /* the check may take a while */
		supervisor_upgrade(s);
		s->reloading = true;
	}
	if (signal_hup && !(signal_hup = 0)) {
		supervisor_notify_reloading(s);
		supervisor_reload_keys(s);
		supervisor_renew(s);
		supervisor_follow(s);
		s->reloading = true;
	}
}

/* What is due by the clock. */
static void
supervisor_tend(struct supervisor *s)
{
	if (s->resolved && !(s->resolved = false))
		supervisor_resolved(s);
	children_hear(s);
	supervisor_tell_ready(s);
	supervisor_tell_reloaded(s);
	supervisor_despair(s);
	supervisor_pet(s);
	supervisor_resolve(s);
	supervisor_watch(s);
	supervisor_follow(s);
	for (uint64_t slot = 0; slot < config.workers && !s->draining; slot++)
		if (s->respawn_ns[slot] != 0 && s->respawn_ns[slot] <= s->now_ns)
			supervisor_spawn(s, (int)slot);
	if (!s->draining && (s->hopeless != 0 || supervisor_idle(s))) {
		if (s->hopeless != EXIT_FAILURE)
			log_note(s->log, s->hopeless != 0 ? "sandbox_impossible" : "idle", NULL);
		supervisor_stop(s);
	}
}

/* Serves until it is told to stop. Returns the exit status. */
static int
supervisor_serve(struct supervisor *s)
{
	while (!s->draining || s->children > 0) {
		supervisor_wait(s);
		if (signal_child && !(signal_child = 0))
			supervisor_reap(s);
		supervisor_obey(s);
		if (s->kill_ns != 0 && s->now_ns >= s->kill_ns)
			break;
		supervisor_tend(s);
		log_flush(s->log);
	}
	for (unsigned i = 0; i < s->children; i++)
		kill(s->child[i].pid, SIGKILL);
	pair_forget(s->pair);
	log_note(s->log, "stopped", NULL);
	log_flush(s->log);
	return s->hopeless;
}

/* What USR2 will execute: the path that we were called by, so that a link to a newer version is followed. */
static const char *
supervisor_binary(const char *argv0)
{
	static char path[PATH_MAX];
	ssize_t n;

	if (strchr(argv0, '/') != NULL && argv0[0] == '/')
		return argv0;
	if (strchr(argv0, '/') != NULL && getcwd(path, sizeof path) != NULL && strlen(path) + strlen(argv0) + 2 < sizeof path)
		return strcat(strcat(path, "/"), argv0);
	n = readlink("/proc/self/exe", path, sizeof path - 1);
	return n > 0 ? (path[n] = '\0', path) : argv0;
}

/* The shared table: that of the file, with `least` rows or more, else a new one with `rows`. After an upgrade any will do. */
static struct table *
table_from_config(uint64_t least, uint64_t rows, int *fd, bool upgraded)
{
	struct mistake m;
	bool aside;

	if (config.state == NULL)
		return table_new(rows, config.max_conns, fd);
	struct table *t = table_open(config.state, least, rows, config.max_conns, fd, &aside, &m);
	if (t == NULL && !upgraded)
		die(EX_CONFIG, "%s", m.text);
	if (t == NULL) {                     /* the server that runs must not end for it */
		say(STDERR_FILENO, "tinyauth: %s; serving goes on without it\n", m.text);
		config.state = NULL;
		return table_new(rows, config.max_conns, fd);
	}
	if (aside)
		say(STDERR_FILENO, "tinyauth: %s: was no table of this version and size; set aside as %s.old\n", config.state, config.state);
	table_recover(t, *fd, 0);
	return t;
}

static struct log *
log_new_from_config(bool upgraded)
{
	struct log *log = map_new(sizeof *log, MAP_PRIVATE);
	int fd = config.log != NULL ? log_open_file(config.log) : STDERR_FILENO;

	if (fd < 0 && upgraded)
		fd = STDERR_FILENO;
	if (fd < 0)
		die(EX_CONFIG, "%s: cannot be opened for the log: %s; name another with --log", config.log, strerror(errno));
	log->format = config.log_format;
	log_use(log, fd);
	return log;
}

static struct tls_pair *
pair_from_config(int failure)
{
	struct mistake m;
	struct tls_pair *pair = NULL;

	if (config.tls_cert != NULL && (pair = pair_load(config.tls_cert, config.tls_key, clock_wall_ms() / 1000, &m)) == NULL)
		die(failure, "%s", m.text);
	return pair;
}

/* What keys there are is looked at before anything is opened. */
static void
keys_must_be_named(int failure)
{
	if (config.keys == NULL && !config.env_key)
		die(failure, "no keys: there is neither ./keys nor /etc/tinyauth/keys; make one with 'tinyauth key add NAME'");
}

static void
supervisor_tell_start(struct supervisor *s, uint64_t asked)
{
	char text[128];
	struct out o = {text, 0, sizeof text, false};

	supervisor_log_listeners(s);
	out_walls(&o, s->walls);
	log_sandbox(s->log, "sandbox", config.uid, config.gid, (struct slice){text, o.n});
	if (config.max_conns < asked)
		log_fewer_connections(s->log, config.max_conns);
	if (config.idle_exit_ms != 0 && s->bound)
		log_note(s->log, "idle_exit_ignored", "nobody would start the service again: the sockets are its own");
	if (config.upstream.addrs == 0)
		log_note(s->log, "upstream_unknown", "its name has no address yet: requests get 502 while it is looked up again and again");
	log_flush(s->log);
}

static int
supervisor_run(char *const *argv)
{
	struct supervisor *s = map_new(sizeof *s, MAP_PRIVATE);
	struct complaints bad = {.to = STDERR_FILENO, .file = config.keys != NULL ? config.keys : "keys"};

	s->argv = argv;
	s->binary = supervisor_binary(argv[0]);
	s->root = s->notify = s->resolver_fd = -1;
	for (size_t i = 0; i < LENGTH(s->listener); i++)
		s->listener[i] = -1;
	for (size_t i = 0; i < SHARED_COUNT; i++)
		s->shared[i] = -1;
	s->watched[WATCHED_KEYS].path = config.keys;
	random_fill(&s->id, sizeof s->id);
	s->id |= 1;
	s->now_ns = s->active_ns = s->start_ns = clock_ns();
	supervisor_signals();
	uint64_t asked = config.max_conns, rows = ROWS_PER_WORKER * config.workers;
	supervisor_descriptors();
	keys_must_be_named(EX_CONFIG);
	supervisor_listen(s);
	names_find_upstream(RESOLVE_START_MS, EXIT_SUCCESS);   /* it may come later */
	supervisor_inherit(s);
	if (s->table == NULL)
		s->table = table_from_config(rows, rows, &s->shared[SHARED_TABLE], s->upgraded);
	else if (config.state != NULL)
		table_recover(s->table, s->shared[SHARED_TABLE], 0);
	if (!supervisor_publish(s, &bad) && s->keys == NULL)   /* an upgrade goes on with the keys it was handed */
		return EX_CONFIG;
	watched_begin(&s->watched[WATCHED_TLS_CERT], config.tls_cert);
	watched_begin(&s->watched[WATCHED_TLS_KEY], config.tls_key);
	struct tls_pair *pair = pair_from_config(EX_CONFIG);
	if (pair != NULL && s->sessions == NULL)
		s->sessions = sessions_new(&s->shared[SHARED_SESSIONS]);
	s->log = log_new_from_config(s->upgraded);
	if (pair != NULL)
		supervisor_certify(s, pair);
	supervisor_notify_open(s);
	s->root = sandbox_directory();
	s->walls = sandbox_probe(s->root);
	sandbox_supervisor(s->closed);
	s->closed = true;
	supervisor_generation(s);
	s->serving = true;
	supervisor_tell_start(s, asked);
	s->look_ns = s->now_ns + WATCH_MS * NS_PER_MS;
	s->resolve_ns = s->now_ns + (config.upstream.addrs > 0 ? RESOLVE_EVERY_MS * NS_PER_MS : 0);
	signal_child = 1;
	return supervisor_serve(s);
}

/* ---- one connection ------------------------------------------------------------------------------------------ */

/* The connection: what systemd passed in, else stdin, with stdout where that is no socket. */
static void
inetd_descriptors(struct supervisor *s, int *in, int *out)
{
	struct stat st;
	int listens = 0, type = SOCK_STREAM;
	socklen_t len = sizeof listens, n = sizeof type;

	*in = listeners_passed(s) == 1 ? s->listener[0] : STDIN_FILENO;
	bool socket = fstat(*in, &st) == 0 && S_ISSOCK(st.st_mode);
	if (socket && getsockopt(*in, SOL_SOCKET, SO_TYPE, &type, &n) == 0 && type != SOCK_STREAM)
		die(EX_USAGE, "-i takes a stream connection; write stream and tcp in inetd.conf, ListenStream= in a socket unit");
	*out = socket ? *in : STDOUT_FILENO;
	if (socket && getsockopt(*in, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) == 0 && listens)
		die(EX_USAGE, "-i takes a connection, not a listening socket: write nowait in inetd.conf, Accept=yes in a socket unit");
}

/* Who is at the other end: the socket knows; of a pipe the environment may tell, as inetd, tcpserver and systemd write it. */
static void
inetd_peer(int fd, struct sockaddr_storage *peer)
{
	static const char *const NAMES[] = {"REMOTE_ADDR", "TCPREMOTEIP", "REMOTE_HOST"};
	socklen_t len = sizeof *peer;
	unsigned char ip[16];

	memset(peer, 0, sizeof *peer);
	if (getpeername(fd, (struct sockaddr *)peer, &len) == 0 && peer->ss_family != AF_UNIX)
		return;
	*peer = (struct sockaddr_storage){.ss_family = AF_UNIX};
	for (size_t i = 0; i < LENGTH(NAMES); i++) {
		const char *value = getenv(NAMES[i]);
		if (value != NULL && ip_read(slice_of(value), ip)) {
			*peer = ip_address(ip);
			return;
		}
	}
}

static bool
same_file(int a, int b)
{
	struct stat x, y;

	return fstat(a, &x) == 0 && fstat(b, &y) == 0 && stat_same(&x, &y);
}

/* inetd makes the connection stderr as well: what we say there must not reach the client. True: there is no stderr now. */
static bool
inetd_mute(int in, int out)
{
	if (!same_file(STDERR_FILENO, in) && !same_file(STDERR_FILENO, out))
		return false;
	int idle = descriptor_idle();
	dup2(idle, STDERR_FILENO);
	close(idle);
	return true;
}

/* Serves the one connection on stdin and stdout. Limits are shared with other such processes through --state. */
static int
inetd_run(void)
{
	struct supervisor *s = map_new(sizeof *s, MAP_PRIVATE);
	struct worker *w = map_new(sizeof *w, MAP_PRIVATE);
	struct complaints bad = {.to = STDERR_FILENO, .file = config.keys != NULL ? config.keys : "keys"};
	struct sockaddr_storage peer;
	bool heard;
	int in, out, one = 1, *table_fd = &s->shared[SHARED_TABLE];

	inetd_descriptors(s, &in, &out);
	bool mute = inetd_mute(in, out);
	keys_must_be_named(EX_CONFIG);
	inetd_peer(in, &peer);
	names_find_upstream(RESOLVE_MS, EXIT_SUCCESS);
	if (!supervisor_publish(s, &bad))
		return EX_CONFIG;
	config.max_conns = 1;
	w->keys = s->keys;
	w->pair = pair_from_config(EX_CONFIG);
	w->table = table_from_config(1, config.state != NULL ? INETD_ROWS : 1, table_fd, false);
	w->row = table_row_take(w->table, supervisor_state(s));
	w->log = log_new_from_config(false);
	w->log->off = mute && config.log == NULL;
	if (config.state == NULL)
		log_note(w->log, "limits_not_shared", "they hold for this connection alone; share them with --state FILE");
	w->control = -1;
	int root = sandbox_directory(), ends[2] = {dup(in), dup(out)}, flags[2] = {fcntl(in, F_GETFL), fcntl(out, F_GETFL)};
	fcntl(in, F_SETFL, flags[0] | O_NONBLOCK);
	fcntl(out, F_SETFL, flags[1] | O_NONBLOCK);
	setsockopt(in, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	socket_vigil(in);
	worker_ready(w, root, sandbox_probe(root));
	bool secure = w->pair != NULL && peer.ss_family != AF_UNIX;
	enum reason refused = worker_admits(w, &peer, secure, &heard);
	if (refused != R_NONE)
		worker_turn_away(w, out, &peer, refused, secure, heard);
	if (refused == R_NONE || heard) {
		struct conn *c = conn_open(w, in, out, &peer, secure);
		c->refused = (uint8_t)refused;
		c->client.seen = POLLIN;
		worker_queue(w, c);
	}
	while (w->used > 0)
		worker_turn(w);
	log_flush(w->log);
	if (w->row != NULL)
		table_row_give(w->table, w->row);
	for (int i = 0; i < 2; i++)
		fcntl(ends[i], F_SETFL, flags[i]);   /* others may go on with this terminal or pipe */
	return EXIT_SUCCESS;
}

/* ============================================================================================================= *
 * COMMANDS
 * Owns: check, check --url, key add, key rotate, key rm, key list
 * Calls: BASICS, LOG (dates), CONFIG, KEYS, CERTIFICATE, CONN (addr_text), SANDBOX, SUPERVISOR (what a start looks at first)
 * Promises: the keys file changes as a whole or not at all, keeps owner and mode, and has one writer at a time
 * Never: prints a secret but the one it just made, and never stores that one
 * ============================================================================================================= */

/* The keys file while it is being changed: locked, read, and found without fault. */
struct edit {
	char path[PATH_MAX];         /* with links resolved: the file itself is replaced */
	int fd;
	struct file file;
};

/* Waits for the lock. A file that was replaced while we waited is opened anew. `make`: it may be a new one. */
static void
edit_lock(struct edit *e, bool make)
{
	struct stat held, named;

	for (;;) {
		e->fd = open(e->path, O_RDWR | (make ? O_CREAT : 0) | O_CLOEXEC | O_NOCTTY, 0600);
		if (e->fd < 0)
			die(EXIT_FAILURE, "%s: cannot be opened for writing: %s", e->path,
			    make && errno == ENOENT ? "make its directory first" : strerror(errno));
		if (flock(e->fd, LOCK_EX) != 0 || fstat(e->fd, &held) != 0)
			die(EXIT_FAILURE, "%s: cannot be locked: %s", e->path, strerror(errno));
		if (stat(e->path, &named) == 0 && stat_same(&named, &held))
			return;
		close(e->fd);
	}
}

/* Refuses to touch a file that has a fault, whole as it is refused by the server. */
static void
edit_verify(struct slice text, const char *path)
{
	struct complaints bad = {.to = STDERR_FILENO, .file = path};
	struct config plain = {.env_key = false};
	size_t size;
	int fd;

	if (keys_count(text) == 0)
		return;
	uint64_t bound = keys_bound(text);
	struct keys_map *map = keys_new(bound, &size, &fd);
	if (map == NULL)
		die(EXIT_FAILURE, "%s: no memory to read it", path);
	if (!keys_parse(map, text, bound, &plain, &bad)) {
		complaints_end(&bad);
		die(EXIT_FAILURE, "%s: mend it first; nothing was changed", path);
	}
}

/* Follows links, so that the file itself is replaced and not the link to it. */
static void
edit_follow(char path[PATH_MAX])
{
	char target[PATH_MAX];
	ssize_t n;

	for (int links = 0; links < 8 && (n = readlink(path, target, sizeof target - 1)) > 0; links++) {
		char *slash = strrchr(path, '/'), *to = target[0] == '/' || slash == NULL ? path : slash + 1;
		if ((size_t)n >= PATH_MAX - (size_t)(to - path))
			return;
		memcpy(to, target, (size_t)n);
		to[n] = '\0';
	}
}

static struct slice
edit_open(struct edit *e, bool make)
{
	struct complaints bad = {.to = STDERR_FILENO};
	const char *path = config.keys != NULL ? config.keys : "keys";

	if (strlen(path) >= sizeof e->path)
		die(EXIT_FAILURE, "%s: the path is too long", path);
	strcpy(e->path, path);
	edit_follow(e->path);
	edit_lock(e, make);
	bad.file = e->path;
	if (!keys_read(e->path, &e->file, &bad))
		exit(EXIT_FAILURE);
	struct slice text = {e->file.p, e->file.n};
	edit_verify(text, e->path);
	return text;
}

/* Makes the rename last: the directory is written, too. */
static void
sync_directory(const char *path)
{
	int fd = directory_open(path);

	if (fd >= 0) {
		fsync(fd);
		close(fd);
	}
}

/* Replaces the file by the parts: a temporary file beside it, written through, then renamed over it. */
static void
edit_replace(struct edit *e, const struct slice *part, size_t parts)
{
	char temporary[PATH_MAX + 16];
	bool good = true;
	int fd;

	text_print(temporary, sizeof temporary, "%s.XXXXXX", e->path);
	fd = mkostemp(temporary, O_CLOEXEC);
	if (fd < 0)
		die(EXIT_FAILURE, "%s: cannot be made: %s; look who may write to its directory", temporary, strerror(errno));
	for (size_t i = 0; good && i < parts; i++)
		good = write_whole(fd, part[i]);
	good = good && fchown(fd, e->file.st.st_uid, e->file.st.st_gid) == 0 && fchmod(fd, e->file.st.st_mode & 07777) == 0 &&
	       fsync(fd) == 0;
	if (!good || rename(temporary, e->path) != 0) {
		int error = errno;
		unlink(temporary);
		die(EXIT_FAILURE, "%s: not changed: %s", e->path,
		    error == EPERM ? "its owner and group cannot be kept; do it as root" :
		    error == EBUSY ? "it is mounted alone; mount its directory instead" : strerror(error));
	}
	sync_directory(e->path);
	close(fd);
	file_forget(&e->file);
}

/* Finds the line of a name: `line` covers it with its end, `secret` the second field in it. */
static bool
edit_find(struct slice text, const char *name, struct slice *line, struct slice *secret)
{
	while (text.n > 0) {
		const char *from = text.p;
		struct slice rest = text_line(&text);
		if (!slice_equal(line_field(&rest), slice_of(name)))
			continue;
		*line = (struct slice){from, (size_t)(text.p - from)};
		*secret = line_field(&rest);
		return true;
	}
	return false;
}

enum { SECRET_TEXT = 3 + 43 + 1 };

/* `sk-` and 256 random bits, and what the file keeps of them. */
static void
secret_make(char secret[SECRET_TEXT], char hashed[HASHED_TEXT])
{
	static const char ALPHABET[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
	unsigned char bytes[33] = {0}, digest[32];
	struct mistake m = {""};

	random_fill(bytes, 32);
	strcpy(secret, "sk-");
	for (size_t i = 0; i < 43; i++) {
		size_t bit = i * 6;
		unsigned pair = (unsigned)bytes[bit / 8] << 8 | bytes[bit / 8 + 1];
		secret[3 + i] = ALPHABET[pair >> (10 - bit % 8) & 63];
	}
	secret[SECRET_TEXT - 1] = '\0';
	secret_read(slice_of(secret), digest, &m);
	digest_write(digest, hashed);
	wipe(bytes, sizeof bytes);
}

/* Says the new secret, once. */
static void
secret_tell(const char *name, char secret[SECRET_TEXT])
{
	say(STDERR_FILENO, "tinyauth: the key of %s, shown this once; only its hash is kept:\n", name);
	if (!say(STDOUT_FILENO, "%s\n", secret))
		die(EXIT_FAILURE, "the key could not be shown: %s; make another with 'tinyauth key rotate %s'", strerror(errno), name);
	wipe(secret, SECRET_TEXT);
}

static int
key_add(char *const *words, size_t n)
{
	struct edit e;
	struct slice text, line, found;
	struct key_row row;
	struct mistake m = {""};
	char secret[SECRET_TEXT], hashed[HASHED_TEXT], added[1024];
	struct out o = {added, 0, sizeof added, false};

	secret_make(secret, hashed);
	for (size_t i = 0; i < n; i++) {
		out_text(&o, words[i]);
		out_char(&o, ' ');
		if (i == 0)
			out_text(&o, hashed);
		if (i == 0 && n > 1)
			out_char(&o, ' ');
	}
	while (o.n > 0 && added[o.n - 1] == ' ')
		o.n--;
	struct slice fields = {added, o.n}, name = line_field(&fields);
	if (o.full || !slice_equal(name, slice_of(words[0])) || memchr(added, '\n', o.n) != NULL)
		die(EX_USAGE, "key add: '%s' and its attributes do not make one line of a keys file", words[0]);
	if (!key_line(name, fields, &row, &m))
		die(EX_USAGE, "key add %s: %s", words[0], m.text);
	if (config.env_key && slice_equal(name, S("env")))
		die(EX_USAGE, "key add env: TINYAUTH_KEY has this name; choose another");
	text = edit_open(&e, true);
	if (edit_find(text, words[0], &line, &found))
		die(EXIT_FAILURE, "%s: there is a key '%s' already; choose another name, or 'tinyauth key rotate %s'", e.path,
		    words[0], words[0]);
	bool ended = text.n == 0 || text.p[text.n - 1] == '\n';
	edit_replace(&e, (struct slice[]){text, ended ? S("") : S("\n"), {added, o.n}, S("\n")}, 4);
	secret_tell(words[0], secret);
	return EXIT_SUCCESS;
}

/* Opens the file and finds the key that is to be changed. */
static struct slice
key_find_line(struct edit *e, const char *name, struct slice *line, struct slice *secret)
{
	struct slice text = edit_open(e, false);

	if (!edit_find(text, name, line, secret))
		die(EXIT_FAILURE, "%s: there is no key '%s'; 'tinyauth key list' shows those there are", e->path, name);
	return text;
}

static int
key_rotate(char *const *words, size_t n)
{
	struct edit e;
	struct slice line, old, text;
	char secret[SECRET_TEXT], hashed[HASHED_TEXT];

	if (n != 1)
		die(EX_USAGE, "key rotate takes one name");
	text = key_find_line(&e, words[0], &line, &old);
	secret_make(secret, hashed);
	struct slice before = {text.p, (size_t)(old.p - text.p)};
	edit_replace(&e, (struct slice[]){before, slice_of(hashed), slice_from(text, before.n + old.n)}, 3);
	secret_tell(words[0], secret);
	return EXIT_SUCCESS;
}

static int
key_remove(char *const *words, size_t n)
{
	struct edit e;
	struct slice line, secret, text;

	if (n != 1)
		die(EX_USAGE, "key rm takes one name");
	text = key_find_line(&e, words[0], &line, &secret);
	struct slice before = {text.p, (size_t)(line.p - text.p)};
	if (keys_count(text) == 1)
		say(STDERR_FILENO, "tinyauth: %s: this was the last key; a server refuses an empty file and goes on with the old keys\n",
		    e.path);
	edit_replace(&e, (struct slice[]){before, slice_from(text, before.n + line.n)}, 2);
	return EXIT_SUCCESS;
}

static int
key_list(size_t n)
{
	struct complaints bad = {.to = STDERR_FILENO, .file = config.keys};
	struct file file;
	char shown[SAID_MAX - 1];
	bool good = true;

	if (n != 0)
		die(EX_USAGE, "key list takes no name");
	if (config.keys == NULL)
		die(EXIT_FAILURE, "no keys file: make one with 'tinyauth key add NAME', or name it with --keys");
	if (!keys_read(config.keys, &file, &bad))
		return EXIT_FAILURE;
	struct slice text = {file.p, file.n};
	edit_verify(text, config.keys);
	while (text.n > 0) {
		struct slice line = text_line(&text), name = line_field(&line), secret = line_field(&line), word;
		if (name.n == 0)
			continue;
		struct out o = {shown, 0, sizeof shown, false};
		out_slice(&o, name);
		out_text(&o, secret_hashed(secret) ? " sha256" : " plain");
		while ((word = line_field(&line)).n > 0) {
			out_char(&o, ' ');
			out_slice(&o, word);
		}
		good = good && say(STDOUT_FILENO, "%.*s\n", (int)o.n, shown);
	}
	file_forget(&file);
	return good ? EXIT_SUCCESS : EXIT_FAILURE;
}

static int
command_key(char *const *words, size_t n)
{
	if (n >= 1 && strcmp(words[0], "list") == 0)
		return key_list(n - 1);
	if (n >= 2 && strcmp(words[0], "add") == 0)
		return key_add(words + 1, n - 1);
	if (n >= 2 && strcmp(words[0], "rotate") == 0)
		return key_rotate(words + 1, n - 1);
	if (n >= 2 && strcmp(words[0], "rm") == 0)
		return key_remove(words + 1, n - 1);
	die(EX_USAGE, "key needs one of: add NAME [attr ...], rotate NAME, rm NAME, list");
}

/* What is fixed at start for one worker, in KB: the formula at the top of this file. */
static uint64_t
check_memory(void)
{
	uint64_t each = sizeof(struct conn) + sizeof(struct request) + 2 * page_round(BUF_SIZE) + 2 * sizeof(struct pollfd) + 112 +
	                (config.tls_cert != NULL ? page_round(sizeof(struct tls_link)) : 0);

	return (config.max_conns * each + 4 * BUF_SIZE + sizeof(struct worker) + LOG_BUF) / 1024;
}

/* The certificate as clients will see it, with a warning when it ends soon. */
static bool
check_certificate(void)
{
	uint64_t now_s = clock_wall_ms() / 1000;
	char from[24], until[24];

	if (config.tls_cert == NULL)
		return say(STDOUT_FILENO, "tls       none: keys go over the wire in plain text\n");
	struct tls_pair *pair = pair_from_config(EXIT_FAILURE);
	date_write(from, pair->from_s);
	date_write(until, pair->until_s);
	bool good = say(STDOUT_FILENO, "tls       %s, %u certificates\nsubject   %s\nnames     %s\nexpires   %sZ\n", config.tls_cert,
	    (unsigned)pair->certificates, pair->subject, pair->names, until);
	if (pair->until_s < now_s + TLS_WARN_DAYS * 86400)
		say(STDERR_FILENO, "tinyauth: %s: the certificate expires within %d days; renew it\n", config.tls_cert, TLS_WARN_DAYS);
	if (pair->from_s > now_s)
		say(STDERR_FILENO, "tinyauth: %s: the certificate is good from %sZ only; look at this machine's clock\n", config.tls_cert,
		    from);
	pair_forget(pair);
	return good;
}

/* What a worker's sandbox would be made of here, and whether a worker can serve in it. */
static bool
check_sandbox(void)
{
	char text[128];
	struct out o = {text, 0, sizeof text, false};
	int root = sandbox_directory();
	struct mistake m;

	struct tls_pair *pair = pair_from_config(EXIT_FAILURE);
	if (!sandbox_rehearse(root, pair, &m))
		die(EXIT_FAILURE, "%s", m.text);
	pair_forget(pair);
	out_walls(&o, sandbox_probe(root));
	if (geteuid() == 0)
		return say(STDOUT_FILENO, "sandbox   %.*s; workers run as %llu:%llu\n", (int)o.n, text, (unsigned long long)config.uid,
		    (unsigned long long)config.gid);
	return say(STDOUT_FILENO, "sandbox   %.*s; workers run as who starts them\n", (int)o.n, text);
}

static bool
check_rate(void)
{
	char text[32];
	struct out o = {text, 0, sizeof text, false};

	if (config.ip_rate.interval_ns == 0)
		return say(STDOUT_FILENO, "address   no rate limit\n");
	out_ms(&o, config.ip_rate.interval_ns);
	while (text[o.n - 1] == '0')
		o.n--;
	o.n -= text[o.n - 1] == '.';
	return say(STDOUT_FILENO, "address   one request per %.*s ms, burst %llu\n", (int)o.n, text,
	    (unsigned long long)config.ip_rate.burst);
}

static bool
check_trust(const struct cidr *net)
{
	char text[ADDR_TEXT_MAX];
	struct sockaddr_storage ss = ip_address(net->ip);

	if (net->local)
		return say(STDOUT_FILENO, "trusted   unix sockets\n");
	addr_text(&ss, text);
	return say(STDOUT_FILENO, "trusted   %s/%u\n", ip_local(net->ip) ? "::" : text, net->bits - (ip_v4(net->ip) ? 96u : 0));
}

static void
check_written(const char *option, const char *path)
{
	if (path != NULL && !file_writable(path))
		die(EXIT_FAILURE, "%s: cannot be opened for writing: %s; name another with --%s", path, strerror(errno), option);
}

/* Prints what would run. Exit status 0: it would. */
static int
command_check(void)
{
	struct complaints bad = {.to = STDERR_FILENO, .file = config.keys != NULL ? config.keys : "TINYAUTH_KEY"};
	struct file file = {.p = NULL};
	size_t size;
	int fd;

	keys_must_be_named(EXIT_FAILURE);
	if (getenv("TINYAUTH_UPGRADE") == NULL) {   /* asked by the binary before, which serves, and knows all names */
		names_find_listen(EXIT_FAILURE);
		names_find_upstream(RESOLVE_MS, EXIT_FAILURE);
	}
	check_written("log", config.log);
	check_written("state", config.state);
	if (config.keys != NULL && !keys_read(config.keys, &file, &bad))
		return EXIT_FAILURE;
	struct slice text = {file.p == NULL ? "" : file.p, file.n};
	uint64_t bound = keys_bound(text);
	struct keys_map *map = keys_new(bound, &size, &fd);
	bool good = map != NULL && keys_parse(map, text, bound, &config, &bad);
	complaints_end(&bad);
	if (!good)
		return EXIT_FAILURE;
	if (file.p != NULL)
		keys_warn_exposed(&file, config.keys);
	file_forget(&file);
	keys_flip(map);
	good = say(STDOUT_FILENO, "keys      %u from %s%s\n", map->half[1].count, config.keys != NULL ? config.keys : "",
	    config.env_key ? config.keys != NULL ? " and TINYAUTH_KEY" : "TINYAUTH_KEY" : "");
	for (unsigned i = 0; i < config.listens; i++)
		good = good && say(STDOUT_FILENO, "listen    %s\n", config.listen[i].text);
	if (config.inetd)
		good = good && say(STDOUT_FILENO, "limits    %s\n", config.state != NULL ? config.state
		    : "hold for each connection alone; share them with --state FILE");
	for (unsigned i = 0; i < config.trusts; i++)
		good = good && check_trust(&config.trust[i]);
	good = good && say(STDOUT_FILENO, "upstream  %s (Host: %s)\n", config.upstream.text, config.upstream.host) &&
	    say(STDOUT_FILENO, "workers   %llu, %llu connections each, at most %llu KB each\n", (unsigned long long)config.workers,
	        (unsigned long long)config.max_conns, (unsigned long long)check_memory()) &&
	    check_rate() &&
	    say(STDOUT_FILENO, "log       %s, %s\n", config.log != NULL ? config.log : "stderr",
	        config.log_format == LOG_JSON ? "json" : "logfmt");
	return good && check_certificate() && check_sandbox() ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* `http://HOST[:PORT][/PATH]` or `unix:PATH`: who is asked, and for what. */
static void
probe_read(const char *url, struct addr *a, struct slice *path)
{
	struct slice rest = slice_of(url), scheme = S("http://");
	struct addr found[UPSTREAM_ADDRS];
	struct mistake m;
	char host[sizeof a->text];
	unsigned n = 0;

	config = (struct config){.uid = NOBODY, .gid = NOBODY};   /* for looking up a name */
	*path = S("/health");
	if (strncmp(url, "https://", 8) == 0)
		scheme = S("https://");
	if (slice_starts_like(rest, scheme))
		rest = slice_from(rest, scheme.n);
	else if (strncmp(url, "unix:", 5) != 0)
		die(EX_USAGE, "check --url: '%s' is not http://HOST[:PORT][/PATH], https://... or unix:PATH", url);
	bool local = strncmp(url, "unix:", 5) == 0;
	const char *slash = local ? NULL : memchr(rest.p, '/', rest.n);
	struct slice authority = {rest.p, slash == NULL ? rest.n : (size_t)(slash - rest.p)};
	if (slash != NULL && rest.p + rest.n - slash > 1)
		*path = slice_from(rest, authority.n);
	bool port = local || (memrchr(authority.p, ':', authority.n) != NULL && authority.p[authority.n - 1] != ']');
	text_print(host, sizeof host, "%.*s%s", (int)(authority.n < sizeof host - 5 ? authority.n : sizeof host - 5), authority.p,
	    port ? "" : scheme.n == 8 ? ":443" : ":80");
	if (!addr_read(host, a, &n, false, &m))
		die(EX_USAGE, "check --url: %s", m.text);
	if (n == 0 && name_find(host, "url", false, found, RESOLVE_MS, EXIT_FAILURE) > 0)
		*a = found[0];
}

/* Asks a server that runs, as a container's health check does where there is neither shell nor curl. To a TLS port it speaks
 * plain HTTP: the refusal that a worker answers with shows that it is alive. */
static int
command_probe(const char *url)
{
	struct timeval limit = {.tv_sec = 5};
	struct addr a;
	struct slice path;
	char text[2048];
	struct out o = {text, 0, sizeof text, false};
	bool tls = strncmp(url, "https://", 8) == 0;
	size_t got = 0;
	ssize_t n = 0;

	probe_read(url, &a, &path);
	int fd = socket(a.ss.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd >= 0) {
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	}
	if (fd < 0 || connect(fd, (struct sockaddr *)&a.ss, a.len) != 0)
		die(EXIT_FAILURE, "check --url: cannot connect to %s: %s", a.text, strerror(errno));
	out_print(&o, "GET %.*s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (int)path.n, path.p);
	if (!write_whole(fd, (struct slice){o.p, o.n}))
		die(EXIT_FAILURE, "check --url: %s: %s", a.text, strerror(errno));
	for (uint64_t end_ns = clock_ns() + 5 * NS_PER_S; clock_ns() < end_ns && got < sizeof text - 1; got += (size_t)n)
		if ((n = recv(fd, text + got, sizeof text - 1 - got, 0)) <= 0)
			break;
	text[got] = '\0';
	struct slice answer = {text, got}, line = text_line(&answer), want = tls ? S("HTTP/1.1 400 ") : S("HTTP/1.1 200 ");
	bool alive = slice_starts_like(line, want) && (!tls || strstr(text, "speaks TLS") != NULL);
	if (!alive && got == 0)
		die(EXIT_FAILURE, "check --url: %s: no answer within 5 s", a.text);
	if (!alive)
		die(EXIT_FAILURE, "check --url: %s answers '%.*s'", a.text, (int)line.n, line.p);
	return EXIT_SUCCESS;
}

/* ============================================================================================================= *
 * MAIN
 * ============================================================================================================= */

int
main(int argc, char **argv)
{
	descriptors_fill();
	memory_small();
	signal(SIGPIPE, SIG_IGN);            /* a failed write is an error like others */
	signal(SIGXFSZ, SIG_IGN);
	bool check = argc > 1 && strcmp(argv[1], "check") == 0, key = argc > 1 && strcmp(argv[1], "key") == 0, usage;
	char *words[WORDS_MAX + 1] = {NULL};
	struct mistake m;
	size_t n = 0;

	const char *first = argc > 1 ? argv[(check || key) && argc > 2 ? 2 : 1] : "";
	if (strcmp(first, "-h") == 0 || strcmp(first, "--help") == 0)
		return config_help(STDOUT_FILENO) ? EXIT_SUCCESS : EXIT_FAILURE;
	if (strcmp(first, "-V") == 0 || strcmp(first, "--version") == 0)
		return say(STDOUT_FILENO, "tinyauth " TINYAUTH_VERSION "\n") ? EXIT_SUCCESS : EXIT_FAILURE;
	if (check && argc == 4 && strcmp(argv[2], "--url") == 0)
		return command_probe(argv[3]);
	if (check && argc == 3 && strncmp(argv[2], "--url=", 6) == 0)
		return command_probe(argv[2] + 6);
	if (!config_read(&config, argv + 1 + (check || key), words, key ? WORDS_MAX : 0, &usage, &m))
		die(usage ? EX_USAGE : check ? EXIT_FAILURE : EX_CONFIG, "%s", m.text);
	while (words[n] != NULL)
		n++;
	if (key)
		return command_key(words, n);
	if (check)
		return command_check();
	return config.inetd ? inetd_run() : supervisor_run(argv);
}
