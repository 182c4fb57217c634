/* tinyauth under a clock that is set back and forth: each look at CLOCK_REALTIME sees another hour. */
#define _GNU_SOURCE

#include <time.h>

static int clock_jumping(clockid_t which, struct timespec *t);

#define clock_gettime clock_jumping
#include "../../tinyauth.c"
#undef clock_gettime

static int
clock_jumping(clockid_t which, struct timespec *t)
{
	static unsigned looks;
	int result = clock_gettime(which, t);

	if (which != CLOCK_MONOTONIC)
		t->tv_sec += (++looks % 2 ? 7 : -5) * 3600;
	return result;
}
