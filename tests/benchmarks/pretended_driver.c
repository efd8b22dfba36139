/* A CUDA driver that does nothing: what the bindings ask for is there, says that all went well, and counts launches.
   tests/benchmarks/plugin_calls.py compiles it, to time all that a process does before the driver's own work. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static long launches;

long pretended_launches(void) { return launches; }

static int succeed(void) { return 0; }

static int give_handle(void **handle) {
    *handle = (void *)0x1000;
    return 0;
}

static int give_version(int *version) {
    *version = 13000;
    return 0;
}

static int launch_kernel(void) {
    launches++;
    return 0;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    static const char *const makers[] = {"cuLibraryLoadData", "cuLibraryGetKernel", "cuCtxGetCurrent"};
    *function = (void *)succeed;
    if (!strcmp(name, "cuLaunchKernel") || !strcmp(name, "cuLaunchKernelEx")) *function = (void *)launch_kernel;
    if (!strcmp(name, "cuDriverGetVersion")) *function = (void *)give_version;
    for (size_t i = 0; i < sizeof makers / sizeof *makers; i++)
        if (!strcmp(name, makers[i])) *function = (void *)give_handle;
    if (status) *status = 0;
    return 0;
}
