/* tinyauth.h: the nouns of tinyauth. Limits with their units, states, structs and the layout of what processes
 * share. No function lives here; the verbs are in tinyauth.c. */
#ifndef TINYAUTH_H
#define TINYAUTH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#define TINYAUTH_VERSION "0.1.0"

/* ---- limits ------------------------------------------------------------------------------------------------- */

enum {
	METHOD_MAX = 32,             /* bytes of a request method; longer is 501 [RFC 9110 9.1] */
	TARGET_MAX = 8192,           /* bytes of a request target; longer is 414 [RFC 9112 3] */
	HEAD_MAX = 16384,            /* bytes of a request head, line and fields; longer is 431 [RFC 6585 5] */
	FIELDS_MAX = 100,            /* fields of a head; more is 431, in a response 502 */
	FIELDS_ADDED = 12,           /* fields that the rewriting adds at most; those and the client's are FIELDS_MAX at most */
	LINE_MAX_SENT = 8192,        /* bytes of a line that goes upstream */
	OPTIONS_NAMED_MAX = 32,      /* connection options of a head; more is 431, in a response 502 [RFC 9110 7.6.1] */
	ANSWER_HEAD_MAX = 32768,     /* bytes of a response head; longer is 502 */
	TRAILER_MAX = 4096,          /* bytes of a body's trailer section */
	CHUNK_DIGITS_MAX = 15,       /* hex digits of a chunk size: 60 bits, no sum of two wraps [RFC 9112 7.1] */
	CHUNK_EXT_MAX = 256,         /* bytes of extensions of one chunk */
	CHUNK_EXT_BODY_MAX = 4096,   /* bytes of extensions of one body */
	LENGTH_DIGITS_MAX = 18,      /* digits of a Content-Length: below 2^60 [RFC 9110 8.6] */
	INTERIM_RELAYED_MAX = 16,    /* 1xx answers passed on for one request; later ones are dropped */
	INTERIM_MAX = 100,           /* 1xx answers read for one request; more is 502 */
	PATH_KEPT = 512,             /* bytes of a path kept for the access line */
	ID_MAX = 64,                 /* bytes of an X-Request-Id that is kept */
	ADDR_TEXT_MAX = 46,          /* INET6_ADDRSTRLEN: a textual address and its NUL */

	SLACK = 32,                  /* bytes kept free before raw bytes: a chunk line (17) always fits in front */
	TAIL = 8,                    /* bytes kept free behind them: the CRLF that ends a chunk we made */
	BUF_SIZE = 40960,            /* one pipe buffer: the largest head, what the rewriting adds, SLACK and TAIL */
	ADDED_MAX = 4096,            /* of it, bytes that the rewriting of a head may add */
	RAW_MAX = BUF_SIZE - ADDED_MAX - 2 * SLACK - TAIL,  /* bytes read ahead at most: a head, rewritten, and the rest still fit */
	STEPS_MAX = 64,              /* steps of one connection in a turn: some 16 pipelined requests */
	MOVES_MAX = 4,               /* full buffers one pipe moves in a turn before the others get theirs */

	KEY_NAME_MAX = 64,           /* bytes of a key's name */
	SECRET_MAX = 4096,           /* bytes of a secret */
	KEYS_MIN = 100000,           /* keys that a fresh key table has room for */
	KEYS_FILE_MAX = 512 << 20,   /* bytes of a keys file */
	KEYS_ERRORS_SHOWN = 100,     /* bad lines named in one go; the rest is counted */

	RATE_WAYS = 8,               /* addresses that share one set of the rate table */
	RATE_SETS = 4096,            /* sets: 32,768 addresses are limited exactly at one time */

	SESSION_WAYS = 8,            /* TLS sessions that share one set of the cache */
	SESSION_SETS = 512,          /* sets: 4,096 sessions can be resumed at one time */
	SESSION_MS = 3600000,        /* how long a session can be resumed */

	TLS_CHAIN_MAX = 8,           /* certificates of a chain */
	TLS_DER_MAX = 65536,         /* bytes of them all, decoded, and of the key */
	TLS_FILE_MAX = 262144,       /* bytes of a PEM file */
	TLS_WORDS_MAX = 512,         /* bytes of a certificate's subject, and of its names, as they are shown */
	TLS_IN = 16384 + 325,        /* the largest record with what may surround it [RFC 5246 6.2.3] */
	TLS_OUT = 16384 + 85,        /* the same for the cipher suites that we send with */
	TLS_RECORD = 16384,          /* plain bytes of a record at most */
	TLS_RSA_MAX = 512,           /* bytes of an RSA modulus: 4096 bits, the most that BearSSL computes with */
	TLS_WARN_DAYS = 14,          /* a certificate that ends sooner is warned about, once a day */
	PULLS_MAX = 32,              /* reads of one TLS link in a step: what comes may mean nothing, without end */
	HANDSHAKE_MS = 10000,        /* for a TLS handshake, from accept or the end of a PROXY header */

	ROWS_MAX = 1 << 16,          /* rows of a table that is believed */
	CONNS_MAX = 1000000,         /* connections of a row likewise: the most of --max-conns */
	ROWS_PER_WORKER = 8,         /* rows of open connections: a worker that serves, and generations that drain; a worker that
	                              * finds none goes uncounted by --ip-conns */

	RETRY_MS_MAX = 30000,        /* clients are not told to wait longer than this: to their users they would seem to hang */

	BEAR_MS = 30000,             /* how often an upstream that is waited for is looked at whether it lives; less than GONE_MS */
	ROOT_REST_MS = 5000,         /* time between two generations for a directory that was made anew */
	STRETCH_MS = 30000,          /* a request body is looked at over so long */
	STRETCH_BYTES = 30 << 10,    /* and cut when fewer bytes came */

	CLOCK_SKEW_MS = 60000,       /* how far the clocks of two turns may lie apart */

	FATES = 16,                  /* addresses of upstreams of which the shared table remembers that they could not be reached */
	FATE_REST_MS = 10000,        /* for so long the other addresses go first */
	CONNECT_SLOW_MS = 1000,      /* an address that did not connect by then, when its client left, counts as out of reach */
	CONNECT_AGAIN_MS = 20,       /* until a unix socket whose queue is full is tried again */

	LOG_BUF = 65536,             /* bytes of log lines waiting in a process */
	LOG_LINE = 4096,             /* bytes of one line: PIPE_BUF, so that lines of several workers never mix */

	WORDS_MAX = 64,              /* words of a command: `key add` with its attributes */
	LISTEN_MAX = 16,             /* listeners */
	BACKLOG = 4096,              /* connections that wait to be accepted; the kernel's own limit may be lower */
	NOBODY = 65534,              /* the user that workers become when none is named */
	TRUST_MAX = 32,              /* networks of trusted peers */
	PROXY_HEAD_MAX = 1024,       /* bytes of a PROXY header; longer is refused */
	INETD_ROWS = 1024,           /* rows of a --state file that inetd made: connections at one time that are counted */
	RESOLVE_MS = 12000,          /* for a name to be looked up */
	RESOLVE_EVERY_MS = 30000,    /* time between two looks at the upstream's name */
	RESOLVE_AGAIN_MS = 2000,     /* the same while it has no address, or none that takes connections */
	RESOLVE_START_MS = 1000,     /* at start: for the upstream's name, before serving begins without an address of it */
	RESOLVE_REST_MS = 2000,      /* with IPv4 addresses in hand: for a name server to tell of IPv6 ones */
	PINGS_MAX = 3,               /* a worker that leaves more pings unanswered is stuck, and killed */
	UPSTREAM_ADDRS = 4,          /* addresses tried for one upstream name */
	WORKERS_MAX = 256,           /* workers of a generation */
	CHILDREN_MAX = 1024,         /* workers alive: the serving generation and all that still drain */
	ACCEPTS_MAX = 16,            /* connections taken from one listener in a turn */
	BRIEFS_MAX = 64,             /* upstream links in a poll set beside the epoll set */
	BRIEF_TURNS = 8,             /* for so many turns */
	POLL_MANY = 32,              /* connections in a worker beyond which all wait in its epoll set */

	LINGER_MS = 30000,           /* how long a closing connection is read on, so that our answer is not lost to a reset, */
	LINGER_PAUSE_MS = 5000,      /* and the longest pause meanwhile */
	UPSTREAM_END_MS = 1000,      /* after a whole answer: for the upstream to end its connection; then we do */
	READER_MS = 55000,           /* how long bytes wait for a client that reads nothing; less than GONE_MS, which would end it, too */
	GONE_MS = 57000,             /* a peer that vanished without a word is known after so long: bytes unacknowledged, or */
	PROBE_FIRST_S = 21,          /* after so much silence, in seconds, the kernel begins to ask it whether it is there, */
	PROBE_EVERY_S = 12,          /* then every so often, and with the fourth question unanswered it is gone */
	PROBES = 3,
	ACCEPT_PAUSE_MS = 100,       /* no accepting for so long when descriptors or memory ran out */
	SWEEP_MIN_MS = 10,           /* shortest time between two looks at all deadlines */
	LOG_RETRY_MS = 200,          /* a log that could not be written is tried again after so long */
	WATCH_MS = 1000,             /* time between two looks at the keys file, the certificate and its key */
	AGAIN_MS = 30000,            /* until a keys file that could not be read is read again though it did not change */
	CHECK_MS = 10000,            /* for a new binary to check what it would run */
	STOP_IDLE_MS = 5000,         /* when the server stops: for the next request of an idle connection */
	STOP_HALF_MS = 500,          /* the same for a handshake or a head to become whole */
	TRIM_MS = 2000,              /* time between two looks for buffers that nobody uses */
	TRIM_KEEP = 8,               /* buffers that keep their memory all the same */
	HURRY_MS = 500,              /* after a second TERM, or when draining is over: for workers to end by themselves */
	RESPAWN_FIRST_MS = 50,       /* delay before a worker that died young is replaced, doubling to */
	RESPAWN_MAX_MS = 1000,
	YOUNG_MS = 1000,             /* a worker that lived shorter died young */
	HOPELESS_TRIES = 4,          /* so many of the first workers that do not come to serve, */
	HOPELESS_MS = 2000           /* over so long, and the server ends */
};

#define DURATION_MAX_MS (366ull * 86400 * 1000)  /* longest time of an option */

/* ---- basics -------------------------------------------------------------------------------------------------- */

/* Bytes that belong to somebody else. */
struct slice {
	const char *p;
	size_t n;
};

/* A writer into a fixed place. What does not fit is left out and `full` tells; nothing is written past `max`. */
struct out {
	char *p;
	size_t n, max;
	bool full;
};

/* Places of one size. They are mapped at start, and touched only when they are used for the first time. */
struct pool {
	char *mem;
	size_t each;                 /* bytes of one */
	size_t fresh;                /* places that were never used begin here */
	size_t left;                 /* places that can be taken */
	void **given;                /* those that came back, the last of them on top */
	size_t n, cold;              /* so many of these; so many of them, at the bottom, hold no memory */
};

/* A socket address and how people write it. */
struct addr {
	struct sockaddr_storage ss;
	socklen_t len;
	char text[128];
};

/* ---- HTTP ---------------------------------------------------------------------------------------------------- */

/* Fields that we act upon. The groups say what a rewriting does with the rest. */
enum field_id {
	F_OTHER,                     /* passed on */
	F_ANTHROPIC_VERSION, F_SEC_FETCH_MODE, F_CONTENT_TYPE, F_X_ACCEL_BUFFERING,
	F_LOCATION,                  /* and Content-Location */
	F_PASSED = F_LOCATION,       /* up to here passed on, and looked at */
	F_HOP,                       /* hop-by-hop: dropped both ways [RFC 9110 7.6.1] */
	F_FORWARDED,                 /* says who the client is: dropped from a request, passed in a response */
	F_UNDERSCORE,                /* `_` in the name: dropped from a request, passed in a response */
	F_HOST, F_CONTENT_LENGTH, F_TRANSFER_ENCODING, F_CONNECTION, F_AUTHORIZATION, F_X_API_KEY, F_API_KEY,
	F_EXPECT, F_UPGRADE, F_X_REQUEST_ID,
	F_ORIGIN,                    /* passed with a WebSocket only: a key is stronger than an origin */
	F_WS_PROTOCOL                /* passed without the key that a browser puts there */
};

struct field {
	struct slice name, value;    /* value without the blanks around it */
	enum field_id id;
};

/* One parsed head, of a request or a response. Its slices point into the bytes that were parsed. */
struct head {
	struct slice method, target; /* request: target as received, without an absolute-form's scheme and authority */
	struct slice path;           /* request: the target before `?` */
	struct slice host;           /* request: Host, or the authority of an absolute-form target */
	struct slice reason;         /* response */
	struct field field[FIELDS_MAX];
	struct slice option[OPTIONS_NAMED_MAX];  /* connection options */
	struct slice length_text;    /* Content-Length as it was spelled */
	struct slice authorization, x_api_key, api_key, request_id;
	struct slice ws_protocol;    /* the last Sec-WebSocket-Protocol */
	uint64_t length;             /* Content-Length, when has_length */
	const char *why;             /* what is wrong, when the parser says no */
	int status;                  /* response */
	unsigned fields, options;
	uint8_t minor;               /* HTTP/1.minor: 0 or 1 */
	bool has_host, has_length, has_authorization, has_x_api_key, has_api_key;
	bool chunked;
	bool close, keep_alive;      /* connection options */
	bool option_upgrade, upgrade_websocket;
	bool expect_continue;
	bool anthropic;              /* anthropic-version is there */
	bool page;                   /* a page in a browser asks, not its user */
	bool streams, accel;         /* response: an event stream or NDJSON; X-Accel-Buffering is there */
	bool path_odd;               /* matches no rule but "everything": dot segments, `//`, `;`, encoded slashes */
	bool slash_missing;          /* absolute-form with an empty path: `/` goes before the target */
};

/* How a body is framed as it comes, and as it goes on. */
enum body_kind { BODY_NONE, BODY_LENGTH, BODY_CHUNKED, BODY_CLOSE };
enum body_form { FORM_SAME, FORM_PLAIN, FORM_CHUNKED };  /* as it came; chunks undone; made into chunks */

struct body {
	uint64_t left;               /* bytes to come of this length or chunk */
	uint16_t ext, ext_body;      /* extension bytes of this chunk, of all chunks */
	uint16_t trailer;            /* bytes of the trailer section */
	uint8_t kind, form, state, digits;
	bool answer;                 /* of a response: blanks are read where RFC 9112 7.1.1 allows them */
	bool done;                   /* the body is whole; nothing more belongs to it */
};

/* Errors in the three dialects that the callers speak, see CLIENTS in the manual. */
enum dialect { DIALECT_OPENAI, DIALECT_OLLAMA, DIALECT_ANTHROPIC };

/* Why a request ended as it did. The table `REASONS` holds status, words and sentences. */
enum reason {
	R_NONE, R_HEALTH,
	R_BAD_REQUEST, R_PLAIN_HTTP, R_TLS_HELLO, R_BAD_BODY, R_NO_KEY, R_BAD_KEY, R_KEY_OFF, R_METHOD, R_HEADER_TIMEOUT, R_BODY_TIMEOUT,
	R_TARGET_LONG, R_EXPECT, R_IP_RATE, R_IP_CONNS, R_HEAD_LONG, R_NOT_IMPLEMENTED, R_VERSION,
	R_CLIENT_CLOSED, R_CLIENT_CUT, R_CLIENT_STALLED, R_UPSTREAM_UNKNOWN, R_UPSTREAM_REFUSED, R_UPSTREAM_CONNECT_TIMEOUT, R_UPSTREAM_CLOSED,
	R_UPSTREAM_BAD, R_UPSTREAM_TIMEOUT, R_UPSTREAM_CUT, R_IDLE, R_FULL, R_STALE, R_DRAIN,
	REASONS_COUNT
};

/* ---- keys ---------------------------------------------------------------------------------------------------- */

enum { KEY_OFF = 1 };

/* One key in a half of the key table: no secret, only its SHA-256. */
struct key_row {
	unsigned char digest[32];
	uint32_t name_at;            /* offset of the name in the half's text */
	uint8_t name_len;            /* 1 to KEY_NAME_MAX */
	uint8_t flags;               /* KEY_OFF */
	uint16_t unused;
};
_Static_assert(sizeof(struct key_row) == 40, "layout shared by processes of different versions");

/* One half: header; then rows, index (open addressing, row number + 1, 0 is empty) and text. */
struct keys_half {
	uint32_t count;              /* rows in use */
	uint32_t mask;               /* index slots in use - 1; a power of two, at least twice the rows */
	uint32_t text;               /* bytes of text in use */
	uint32_t unused;
};

enum { STALE_ALL = 1, STALE_PARTLY = 2 };

/* The published keys: one mapping, written by the supervisor, read-only in workers. `generation & 1` is the half that
 * holds; a reader that sees the generation changed while it read, reads again. */
struct keys_map {
	uint64_t magic;              /* KEYS_MAGIC, which changes with the layout */
	uint64_t salt;               /* odd; where in the index a digest goes is nobody's guess */
	uint32_t capacity;           /* rows of a half */
	uint32_t slots;              /* index slots of a half */
	_Atomic uint32_t stale;      /* a newer mapping took over: STALE_ALL, refuse everything; STALE_PARTLY, this one has not all
	                              * keys. Always at this offset, whatever the layout, so that an older worker hears of it */
	uint32_t unused;
	_Atomic uint64_t generation;
	struct keys_half half[2];
};
#define KEYS_MAGIC 0x3179656b61796e74ull
_Static_assert(offsetof(struct keys_map, stale) == 24, "stale stays where older processes look for it");

/* What a worker takes along of a key that it found. */
struct key {
	char name[KEY_NAME_MAX + 1];
	uint8_t flags;
};

/* ---- the shared table ---------------------------------------------------------------------------------------- */

/* A GCRA limiter: one request every `interval_ns`, and `burst` more at once. interval_ns 0: no limit. */
struct rate {
	uint64_t interval_ns;
	uint64_t burst;
};

struct rate_slot {
	_Atomic uint64_t id;         /* keyed hash of an address; 0: free */
	_Atomic uint64_t tat_ns;     /* theoretical arrival time, CLOCK_MONOTONIC; one that no running clock gave counts as long past */
};

/* An address of an upstream that could not be reached. */
struct fate_slot {
	_Atomic uint64_t id;         /* keyed hash of address and port; 0: free */
	_Atomic uint64_t failed_ns;  /* when it was tried last, CLOCK_MONOTONIC; 0: it was reached since */
};

/* What one worker holds. Only that worker writes it, and who finds it dead: each has a line of the processor's cache. */
struct conn_row {
	_Alignas(64) _Atomic uint32_t taken;  /* process id of the worker that has it; 0: none */
	_Atomic uint32_t used;       /* entries that may be other than 0 */
	_Atomic uint32_t room;       /* the server whose worker this is, a random number, while it has room for another connection */
	_Atomic uint64_t events;     /* connections that it took and requests that began, ever */
	_Atomic uint64_t requests;   /* in flight */
};

struct table {
	uint64_t magic;              /* TABLE_MAGIC, which changes with the layout */
	uint64_t size;               /* bytes of the mapping */
	uint64_t seed[2];            /* key of the address hash, random at creation */
	uint32_t rows, conns;        /* rows that follow this struct; identities of addresses of each, which follow them */
	struct fate_slot fate[FATES];
	_Alignas(64) struct rate_slot address[RATE_SETS][RATE_WAYS];
};
#define TABLE_MAGIC 0x366c626174796e74ull
_Static_assert(sizeof(struct rate_slot) == 16, "layout shared by processes of different versions");

/* TLS sessions that can be resumed, by every worker of every generation: one mapping of its own, never in a file. A slot
 * whose `seal`, a keyed hash, does not match holds nothing: it was torn by two writers, or belongs to another key. */
enum { SESSION_ID_WORDS = 4, SESSION_WORDS = 11 };

struct session_slot {
	_Atomic uint64_t born_ms;    /* CLOCK_MONOTONIC; 0: free */
	_Atomic uint64_t word[SESSION_WORDS];  /* the id, then what the handshake needs of it */
	_Atomic uint64_t seal;
};

struct sessions {
	uint64_t magic;              /* SESSIONS_MAGIC, which changes with the layout */
	uint64_t seed[2];            /* key of the seals, random at creation */
	_Atomic uint64_t epoch;      /* of the certificate's key; another one wipes the cache */
	struct session_slot slot[SESSION_SETS][SESSION_WAYS];
};
#define SESSIONS_MAGIC 0x31736e73736e7974ull
_Static_assert(sizeof(struct session_slot) == 104, "layout shared by processes of different versions");

/* ---- configuration ------------------------------------------------------------------------------------------- */

enum log_format { LOG_LOGFMT, LOG_JSON };

/* A network, IPv4 as ::ffff:a.b.c.d/96+n. */
struct cidr {
	unsigned char ip[16];
	uint8_t bits;
	bool local;                  /* peers of unix sockets instead */
};

struct upstream {
	char text[128];              /* as configured, for logs and messages */
	char host[128];              /* what the Host field says to it */
	struct addr addr[UPSTREAM_ADDRS];
	unsigned addrs;
	bool named;                  /* by a name, which is looked up again now and then */
};

/* Frozen once serving starts, but that the supervisor may give the next workers other upstream addresses. Times in ms. */
struct config {
	const char *keys;            /* path, or NULL: none given and none of the default ones exists */
	bool env_key;                /* TINYAUTH_KEY was set; its digest follows */
	unsigned char env_digest[32];
	struct addr listen[LISTEN_MAX];
	unsigned listens;
	struct upstream upstream;
	bool upstream_given;
	uint64_t workers, max_conns;
	struct rate ip_rate;
	uint64_t ip_conns;
	const char *tls_cert, *tls_key;  /* paths; both or neither */
	const char *state;           /* path, or NULL: the shared table is anonymous */
	uint64_t uid, gid;           /* what workers become when the server is started as root */
	struct cidr trust[TRUST_MAX];
	unsigned trusts;
	uint64_t idle_exit_ms;       /* 0: never */
	bool inetd;                  /* serve one connection, on stdin and stdout */
	const char *log;             /* path, or NULL: stderr */
	int log_format;
	uint64_t header_ms, connect_ms, first_byte_ms, idle_ms, keepalive_ms, drain_ms;
	uint64_t linger_ms, reader_ms, handshake_ms;  /* not options: LINGER_PAUSE_MS, READER_MS and HANDSHAKE_MS, here because
	                              * deadlines are looked up here */
};

/* ---- log ----------------------------------------------------------------------------------------------------- */

struct log {
	int fd;
	int format;                  /* enum log_format */
	bool regular;                /* a file: any length in one write */
	bool socket;                 /* sent with MSG_DONTWAIT */
	bool own;                    /* the description is ours and non-blocking */
	bool off;                    /* there is nowhere to write to */
	size_t n;                    /* bytes waiting in buf */
	uint64_t dropped;            /* lines that found no room */
	uint64_t second;             /* the second that `date` shows */
	char date[24];
	char buf[LOG_BUF];
};

/* ---- connections --------------------------------------------------------------------------------------------- */

/* What TLS keeps, known to CERTIFICATE and LINK alone: a certificate chain with its key, what the TLS links of a worker share,
 * one link. */
struct tls_pair;
struct tls;
struct tls_link;

/* One side of a connection. Interest in it is derived from the state on each turn. */
struct link {
	int fd;                      /* -1: closed */
	int out;                     /* the same, or where to write when they are the two ends of pipes */
	struct tls_link *tls;        /* NULL: plain */
	short seen;                  /* poll events of this turn that nobody used up yet */
	short watched;               /* events registered in the epoll set; 0: not there */
	bool blocked;                /* the last write was cut short: wait for POLLOUT */
};

/* One direction: start <= ready <= raw <= end, and SLACK bytes before start, TAIL bytes behind end are there to be
 * written to. mem[start,ready) is understood and goes out next, mem[raw,end) came in and is not looked at yet.
 * mem is NULL, one of the worker's scratch buffers (only within a turn) or a pool buffer. */
struct pipe {
	char *mem;
	uint32_t start, ready, raw, end;
	bool broken;                 /* the receiving side takes nothing more */
	uint8_t side;                /* 0: client to upstream, 1: back; chooses the scratch buffers */
	struct body body;
	uint64_t in, out;            /* bytes of the body taken; all bytes written */
};

enum state {
	S_FREE,
	S_NEW,                       /* accepted; a trusted peer may send a PROXY header first */
	S_TLS,                       /* in the TLS handshake */
	S_OPEN,                      /* ready for a request, nothing came yet */
	S_IDLE,                      /* between two requests */
	S_HEAD,                      /* some of a head is there */
	S_CONNECT,                   /* connecting upstream */
	S_SEND,                      /* request body on its way */
	S_WAIT,                      /* request sent, no answer yet */
	S_RELAY,                     /* answer on its way */
	S_TUNNEL,                    /* after 101: bytes */
	S_FLUSH,                     /* our own answer on its way */
	S_LINGER,                    /* answered and shut: reading on, so that no reset overtakes the answer */
	STATES_COUNT
};

/* One request in flight. Idle connections have none. */
struct request {
	uint64_t begin_ns, first_ns; /* head complete; first byte of the answer. CLOCK_MONOTONIC */
	uint64_t in;                 /* bytes of the head */
	uint64_t idle_ns;            /* in S_SEND: when a body that stands still is cut; in S_WAIT: when the answer is too late; in
	                              * S_TUNNEL: when nothing moved for too long */
	uint64_t stretch_ns, stretch_in;  /* end of this stretch of time; body bytes before it */
	const char *detail;          /* of the reason: configured or constant text */
	const char *why;             /* what was wrong with the upstream's answer: constant text, or NULL */
	uint64_t retry_ms;           /* what Retry-After tells */
	uint64_t connect_ns;         /* in S_CONNECT: when this address is given up */
	struct key key;              /* name "" until found */
	uint16_t path_len;
	uint8_t method_len, id_len;
	uint16_t status;             /* sent to the client; 0: none yet */
	uint8_t reason, dialect, interim, minor;
	uint8_t address;             /* which of the upstream's addresses is tried */
	uint8_t tried;               /* bits: those that were */
	bool head_method;            /* HEAD: the answer has no body */
	bool connected;              /* reached the upstream */
	bool upgrade;                /* asked for a WebSocket */
	bool expects;                /* asked for 100-continue, with a body to come */
	bool close;                  /* the client connection ends with this request */
	bool leaves;                 /* its client said that it ends the connection */
	bool quiet;                  /* no access line */
	bool page;                   /* as in struct head */
	bool portless;               /* no address could be tried for want of a local one */
	char method[METHOD_MAX];
	char id[ID_MAX];
	char path[PATH_KEPT];
};

struct conn {
	struct conn *next, *prev;    /* in the worker's poll list, or in the free list by `next` */
	struct conn *young, *old;    /* in the list of those that give way when the pool is full, oldest first */
	struct link client;
	struct link upstream;        /* carries one request; without one it only waits for its end, UPSTREAM_END_MS at most */
	struct pipe req, resp;
	struct request *request;     /* NULL between requests */
	uint64_t deadline_ns;
	uint64_t linger_ns;          /* when reading on ends, whatever still comes */
	uint8_t state;
	bool parked;                 /* watched by epoll instead of being in the poll set */
	bool again;                  /* it could go on at once, but others come first */
	bool brief;                  /* in the worker's list of those whose upstream link is not in the epoll set */
	uint8_t turns;               /* for how many it is */
	bool queued;                 /* among those to be stepped in this turn */
	bool waiting;                /* in the list of those that give way */
	bool reset;                  /* the client has to see a cut, not an end */
	uint8_t refused;             /* enum reason: turned away as soon as that can be said, after the TLS handshake */
	bool secure;                 /* the listener speaks TLS */
	bool trusted;                /* the peer's word on who its clients are is believed */
	unsigned char peer[16];      /* who is at the other end, IPv4 as ::ffff:a.b.c.d; zeros: a unix socket */
	char addr[ADDR_TEXT_MAX];    /* the client, which a trusted peer may have named */
	uint64_t addr_id;            /* keyed hash of its address, IPv6 by its /64 */
};
_Static_assert(sizeof(struct conn) <= 512, "an idle connection costs a struct of at most 512 bytes");

/* ---- processes ----------------------------------------------------------------------------------------------- */

struct worker {
	struct log *log;
	const struct keys_map *keys;
	struct table *table;
	struct conn_row *row;        /* in it: what this worker holds; NULL: there was none left */
	struct pool conns, requests; /* max_conns of each */
	struct pool bufs;            /* twice as many pipe buffers */
	struct conn polled;          /* head of the ring of connections in the poll set */
	struct conn waiting;         /* head of the ring of those that give way, oldest behind `young` */
	struct pollfd *pfd;          /* control, listeners, then two a connection that is polled */
	struct conn **ready;         /* to be stepped in this turn, or to go on in the next */
	struct epoll_event *event;   /* what the epoll set told */
	char *scratch[2][2];         /* per direction: one that bytes are read into, one to build a head in */
	uint64_t now_ns;             /* CLOCK_MONOTONIC, read once a turn */
	uint64_t wall_ms;            /* CLOCK_REALTIME, likewise; for the log only */
	uint64_t turn, signed_turn;  /* its number; the last in which a handshake had costly work done */
	uint64_t sweep_ns;           /* no deadline lies before this */
	uint64_t accept_ns;          /* no accepting before this */
	uint64_t trim_ns;            /* no buffers are given back to the system before this */
	uint64_t drain_ns;           /* when draining: the end of it */
	uint64_t random[2], ids;     /* for request ids: key and counter */
	size_t used;                 /* connections open */
	struct conn *brief[BRIEFS_MAX];      /* parked ones whose upstream link stands in the poll set; some may be over */
	unsigned briefs;
	size_t pollfds, readies;     /* entries in use of pfd, of ready */
	const struct tls_pair *pair; /* NULL: all listeners are plain */
	struct sessions *sessions;
	struct tls *tls;             /* of that pair, for all TLS links */
	int listener[LISTEN_MAX];
	bool secure[LISTEN_MAX];     /* this listener speaks TLS */
	unsigned listeners;
	int control;                 /* from the supervisor; its end means that it is gone */
	uint32_t server;             /* whose worker this is, a random number; 0: nobody's, under -i */
	bool knocked;                /* somebody waited at a listener while all places were taken, and others had some; */
	uint64_t knocked_events;     /* what those had done by then */
	int epoll;                   /* -1: none, all go in the poll set */
	unsigned called;             /* bits: listeners, and behind them control, that are ready in this turn */
	bool many;                   /* all wait in the epoll set */
	bool listening;              /* the listeners are in it */
	bool draining;
	bool stopping;               /* the whole server does: idle connections have STOP_IDLE_MS, also those that become so */
	bool connect_failed;         /* the upstream's name may mean another address by now */
	struct head head;            /* the head that is being looked at; valid within one step */
};

struct child {
	int pid;
	int control;                 /* socket to it */
	int slot;                    /* number among the workers of its generation */
	unsigned generation;         /* 0: of the binary before */
	unsigned pings;              /* that it did not answer yet */
	int call;                    /* that ended it, as it told last; 0: none */
	bool serves;                 /* it said so */
	bool draining;
	uint64_t born_ns;
};

enum watched_file { WATCHED_KEYS, WATCHED_TLS_CERT, WATCHED_TLS_KEY, WATCHED_COUNT };

/* Parts of the sandbox. */
enum { WALL_USER = 1, WALL_ROOT = 2, WALL_PRIVILEGES = 4, WALL_SECCOMP = 8, WALL_FILES = 16, WALL_CONNECT = 32 };

/* How a process ends that made a call which none of ours ever makes. */
enum { STATUS_TRAPPED = 128 + 31 };

/* Mappings that workers share. */
enum { SHARED_KEYS, SHARED_TABLE, SHARED_SESSIONS, SHARED_COUNT };

struct supervisor {
	struct log *log;
	struct keys_map *keys;
	size_t keys_size;
	struct table *table;
	struct tls_pair *pair;       /* NULL: no TLS */
	struct sessions *sessions;   /* NULL: no TLS */
	int shared[SHARED_COUNT];    /* descriptors of keys, table and sessions: memfds, or --state's file; -1: anonymous, or none */
	int listener[LISTEN_MAX];
	bool secure[LISTEN_MAX];     /* this listener speaks TLS */
	unsigned listeners;
	struct child child[CHILDREN_MAX];   /* those that live, in no order */
	unsigned children;
	unsigned generation;         /* of workers; a binary's first is 1 */
	uint64_t respawn_ns[WORKERS_MAX];   /* when a slot is filled again; 0: it is filled */
	uint64_t respawn_ms[WORKERS_MAX];   /* the delay that was used last */
	struct watched {             /* a file, and what looks at it saw */
		const char *path;    /* NULL: none */
		struct look {
			uint64_t ctime_ns, size, inode, device;
			bool there;
		} loaded, last;
		uint64_t again_ns;   /* when it is read once more, as it could not be; 0: it could */
	} watched[WATCHED_COUNT];
	uint64_t look_ns, now_ns;    /* when files are looked at again; CLOCK_MONOTONIC, read once a turn */
	int root;                    /* directory that becomes the workers' root; -1: none */
	unsigned walls;              /* what a worker's sandbox should have */
	int notify;                  /* socket of the service manager; -1: none */
	uint64_t watchdog_ns;        /* time between two words to it that all is well; 0: it does not want them */
	uint64_t pet_ns;             /* when the next one is due */
	bool resolved;               /* the child is gone, its answer is there */
	bool unreached;              /* a worker could not connect since the name was looked up last */
	uint64_t resolved_ns, moved_ns;  /* when that was; when it meant other addresses last */
	uint32_t id;                 /* of this server in the shared table, a random number */
	bool upgraded;               /* took over from a binary before */
	int hopeless;                /* exit status: a worker could not give up root, or none comes to serve; 0: there is hope */
	bool proven;                 /* one serves */
	bool told_ready;             /* and that was told */
	bool reloading;              /* a reload is told as done when all of the newest generation serve */
	bool due;                    /* a new generation is, as soon as the operation that made it so is over */
	unsigned failed;             /* first workers that did not come to serve */
	uint64_t start_ns;
	bool closed;                 /* the sandbox of this process is in force */
	int resolver, resolver_fd;   /* child that looks up the upstream's name, and its answer; 0: none */
	uint64_t resolve_ns;         /* when the name is looked up again; with a child: when that one is given up */
	uint64_t events, active_ns;  /* what happened ever; when something happened last */
	uint64_t warn_ns;            /* when a certificate that ends soon is warned about again */
	bool draining;
	int stops;                   /* TERM and INT that were acted on */
	uint64_t kill_ns;            /* when workers that do not end are killed; 0: not yet */
	bool serving;                /* workers run: a larger key mapping needs new ones */
	bool bound;                  /* the listeners are our own, not passed in */
	char *const *argv;
	const char *binary;          /* what USR2 executes */
};

#endif
