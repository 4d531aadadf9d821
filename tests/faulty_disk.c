// A disk that fails, for LD_PRELOAD: every pread does what the file named by FAULT says at that time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static ssize_t faulty(const char *name, int fd, void *to, size_t size, off_t at) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, name);
    char fault[32] = "";
    FILE *file = fopen(getenv("FAULT"), "r");
    if (file) {
        if (!fgets(fault, sizeof fault, file)) fault[0] = 0;
        fclose(file);
    }
    if (!strcmp(fault, "error")) return errno = EIO, -1;
    if (!strcmp(fault, "not direct") && fcntl(fd, F_GETFL) & O_DIRECT) return errno = EINVAL, -1;
    if (!strcmp(fault, "interrupted") && at / 4096 % 2 && rand() % 2) return errno = EINTR, -1;
    if (!strcmp(fault, "short")) return fcntl(fd, F_GETFL) & O_DIRECT ? real(fd, to, 512, at) : real(fd, to, size / 3 + 1, at);
    if (!strncmp(fault, "slow ", 5)) usleep(1000 * atoi(fault + 5));
    return real(fd, to, size, at);
}

ssize_t pread(int fd, void *to, size_t size, off_t at) { return faulty("pread", fd, to, size, at); }
ssize_t pread64(int fd, void *to, size_t size, off_t at) { return faulty("pread64", fd, to, size, at); }
