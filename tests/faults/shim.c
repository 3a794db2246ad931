/* Stands between the service and the system calls that touch its data, and does to one of them what a test wants.
 *
 * The test and the service share one page of memory, the file that FAULT_CONTROL names, so that a test can aim while
 * the service runs. Only calls on files below the directory of FAULT_ROOT count (and, as call WRITE, those on the log,
 * which is a pipe). C, because it must be there before anything else in the process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* In the order of the test's list. */
enum call { FSYNC, FDATASYNC, RENAME, OPENAT, MKDIR, PWRITE64, WRITE, PREAD64, FTRUNCATE, UNLINK, WRITEV };

enum action { FAIL = 1, KILL = 2, LIE = 3 };

/* The same as struct Control in calls.rs. */
struct control {
    int call;     /* which call; -1 for none */
    int action;
    int error;    /* what FAIL puts into errno */
    int lasting;  /* not only the chosen call but every later one */
    long chosen;  /* the how manyth, from 1 on */
    long seen;    /* how many there were since the test aimed */
    long injected;
    long resynced; /* a sync, or a rename to its place, of a spool file whose sync has failed */
};

static struct control *control;
static const char *root;

/* Spool files whose sync has failed, by device and inode; one is forgotten when its name is removed. */
static struct { dev_t dev; ino_t ino; int used; } lost[64];

__attribute__((constructor)) static void map(void) {
    const char *path = getenv("FAULT_CONTROL");
    root = getenv("FAULT_ROOT");
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    int fd = path ? real(path, O_RDWR) : -1;
    void *page = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    control = page == MAP_FAILED ? NULL : page;
}

static int ours(const char *path) {
    return root && !strncmp(path, root, strlen(root));
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int ours_fd(int fd) {
    char path[4096];
    return control && path_of(fd, path) && ours(path);
}

/* What becomes of this call: 0 to make it, 1 for an error (errno is set), 2 to pretend success. */
static int aimed(enum call call) {
    if (!control || control->call != (int)call) return 0;
    long number = __sync_add_and_fetch(&control->seen, 1);
    if (control->lasting ? number < control->chosen : number != control->chosen) return 0;
    __sync_add_and_fetch(&control->injected, 1);
    if (control->action == KILL) kill(getpid(), SIGKILL);
    errno = control->error;
    return control->action == LIE ? 2 : 1;
}

static int slot_of(const struct stat *file) {
    for (int i = 0; i < 64; i++)
        if (lost[i].used && lost[i].dev == file->st_dev && lost[i].ino == file->st_ino) return i;
    return -1;
}

static void note_lost(int fd) {
    struct stat file;
    if (fstat(fd, &file) || !S_ISREG(file.st_mode) || slot_of(&file) >= 0) return;
    for (int i = 0; i < 64; i++)
        if (__sync_bool_compare_and_swap(&lost[i].used, 0, 1)) {
            lost[i].dev = file.st_dev;
            lost[i].ino = file.st_ino;
            return;
        }
}

static int spooled(const char *path) {
    return strstr(path, "/.spool/") != NULL;
}

static int synced(int fd, enum call call) {
    char path[4096];
    struct stat file;
    if (!control || !path_of(fd, path) || !ours(path)) return 0;
    if (spooled(path) && !fstat(fd, &file) && slot_of(&file) >= 0) __sync_add_and_fetch(&control->resynced, 1);
    int what = aimed(call);
    if (what == 1 && spooled(path)) {
        int error = errno;
        note_lost(fd);
        errno = error;
    }
    return what;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define SYNC(name, call)                                                                                              \
    int name(int fd) {                                                                                                \
        int what = synced(fd, call);                                                                                  \
        return what ? what == 1 ? -1 : 0 : REAL(name)(fd);                                                            \
    }
SYNC(fsync, FSYNC)
SYNC(fdatasync, FDATASYNC)

int rename(const char *from, const char *to) {
    struct stat file;
    if (control && ours(from)) {
        if (!stat(from, &file) && slot_of(&file) >= 0) __sync_add_and_fetch(&control->resynced, 1);
        int what = aimed(RENAME);
        if (what) return what == 1 ? -1 : 0;
    }
    return REAL(rename)(from, to);
}

#define OPEN(name)                                                                                                    \
    int name(const char *path, int flags, ...) {                                                                      \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        mode_t mode = va_arg(rest, mode_t);                                                                           \
        va_end(rest);                                                                                                 \
        if (control && ours(path) && aimed(OPENAT)) return -1;                                                        \
        return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)

int mkdir(const char *path, mode_t mode) {
    if (control && ours(path) && aimed(MKDIR)) return -1;
    return REAL(mkdir)(path, mode);
}

#define PWRITE(name)                                                                                                  \
    ssize_t name(int fd, const void *bytes, size_t count, off64_t offset) {                                           \
        if (ours_fd(fd) && aimed(PWRITE64)) return -1;                                                                \
        return ((ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, #name))(fd, bytes, count, offset);  \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define PREAD(name)                                                                                                   \
    ssize_t name(int fd, void *bytes, size_t count, off64_t offset) {                                                 \
        if (ours_fd(fd) && aimed(PREAD64)) return -1;                                                                 \
        return ((ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, #name))(fd, bytes, count, offset);        \
    }
PREAD(pread)
PREAD(pread64)

static int is_output(int fd) {
    struct stat file;
    return control && !fstat(fd, &file) && S_ISFIFO(file.st_mode);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    if ((is_output(fd) || ours_fd(fd)) && aimed(WRITE)) return -1;
    return REAL(write)(fd, bytes, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (ours_fd(fd) && aimed(WRITEV)) return -1;
    return REAL(writev)(fd, parts, count);
}

#define TRUNCATE(name)                                                                                                \
    int name(int fd, off64_t length) {                                                                                \
        if (ours_fd(fd) && aimed(FTRUNCATE)) return -1;                                                               \
        return ((int (*)(int, off64_t))dlsym(RTLD_NEXT, #name))(fd, length);                                          \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int unlink(const char *path) {
    struct stat file;
    if (control && ours(path)) {
        if (aimed(UNLINK)) return -1;
        int slot = stat(path, &file) ? -1 : slot_of(&file);
        if (slot >= 0) lost[slot].used = 0;
    }
    return REAL(unlink)(path);
}
