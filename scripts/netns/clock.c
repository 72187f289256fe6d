/* Moves the clocks of one program: LD_PRELOAD this, and $RINGTAIL_CLOCK names a file of two 64-bit numbers, the
 * seconds that are added to the clock that counts sleep and to the wall clock. Both may change while it runs. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *moved;

__attribute__((constructor)) static void begin(void) {
  const char *name = getenv("RINGTAIL_CLOCK");
  int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
  void *map = file < 0 ? MAP_FAILED : mmap(NULL, 16, PROT_READ, MAP_SHARED, file, 0);
  if (map == MAP_FAILED) _exit(99);
  close(file);
  moved = map;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  int result = (int)syscall(SYS_clock_gettime, clock, time);
  if (result == 0 && moved) {
    if (clock == CLOCK_BOOTTIME) time->tv_sec += moved[0];
    if (clock == CLOCK_REALTIME) time->tv_sec += moved[1];
  }
  return result;
}
