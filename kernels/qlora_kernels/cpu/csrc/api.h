// What api_decoder.cpp calls of the C interface, declared for it and for the files that define it.
#pragma once

#include "attention.h"
#include "kernels.h"

extern "C" {

int64_t qlora_partials(int64_t rows);

int64_t qlora_layer_bytes(int by_integers, int bf16, int64_t tokens, int64_t rows, int64_t columns, int64_t rank,
                          int threads);
void qlora_layer_forward(const qlora::Weight* weight, float* factors, int by_integers, int bf16, const void* x,
                         int64_t tokens, const void* x_narrow, const float* A, const float* B, const float* m,
                         int makes_n, int64_t rank, float scaling, char* memory, void* down, void* up, float* u,
                         void* y, int threads);
void qlora_layer_backward(const qlora::Weight* weight, const float* gain, int by_integers, int bf16, const void* dy,
                          const void* x, const float* down, const float* up, const float* u, const void* y,
                          int64_t tokens, int64_t rank, float scaling, const float* safe, char* memory, void* dx,
                          float* dA, float* dB, float* dm, int threads);

void qlora_rms_norm(int dtype, const void* x, const void* more, const void* weight, int64_t rows, int64_t columns,
                    float eps, void* sums, void* y, float* inverse, int threads);
void qlora_rms_norm_backward(int dtype, const void* dy, const void* x, const void* weight, const float* inverse,
                             int64_t rows, int64_t columns, const void* onto, void* dx, int threads);
void qlora_add(int dtype, const void* a, const void* b, int64_t n, void* sum, int threads);
void qlora_swiglu(int dtype, const void* gate, const void* up, int64_t n, void* y, int threads);
void qlora_swiglu_backward(int dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate,
                           void* dup, int threads);
void qlora_swiglu_backward_dots(int dtype, const void* dy, const void* gate, const void* up, int64_t rows,
                                int64_t columns, void* dgate, void* dup, float* partial, float* dots, int threads);
void qlora_rotate(int dtype, int back, const void* q, int64_t q_stride, int64_t heads, const void* k, int64_t k_stride,
                  int64_t groups, int64_t D, int64_t tokens, const void* cos, const void* sin, int64_t positions,
                  void* q_out, void* k_out, int threads);

int64_t qlora_attention_bytes(int is_backward, int floats, const int64_t* lengths, int64_t examples, int64_t tokens,
                              int64_t heads, int64_t groups, int64_t D, int threads);
void qlora_attention(int is_backward, int floats, const qlora::Heads* views, float* lse, const int64_t* starts,
                     const int64_t* lengths, int64_t examples, int64_t tokens, int64_t heads, int64_t groups, int64_t D,
                     float scale, char* work, int threads);

}  // extern "C"
