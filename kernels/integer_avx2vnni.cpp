// The AVX2 kernels with the four-product instruction of AVX-VNNI.
#define PYMLLM_AVX_VNNI 1
#include "integer_avx2.cpp"
