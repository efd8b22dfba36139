// In place of the header of this name in a CUDA toolkit.
#include "cuda_on_cpu.h"
