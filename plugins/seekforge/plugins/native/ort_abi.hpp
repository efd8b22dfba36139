// The part of ONNX Runtime's C interface that custom operators need; its wheel brings no headers.
//
// OrtApi is a table of function pointers to which releases append and from which none takes away, so an entry is known
// by its number. OrtCustomOp is a structure whose later fields ONNX Runtime reads only if `version` promises them.
// Source: ONNX Runtime, include/onnxruntime/core/session/onnxruntime_c_api.h, ORT_API_VERSION 29; the numbers are those
// of `offsetof` in that header, divided by the size of a pointer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace seekforge::ort {

// The first version that has every entry below: asked for of ONNX Runtime, which gives none if it is older.
constexpr uint32_t kApiVersion = 24;

struct Status;
struct Value;
struct KernelContext;
struct KernelInfo;
struct MemoryInfo;
struct Op;
struct SessionOptions;
struct CustomOpDomain;

enum class Type : int { kF32 = 1, kI32 = 6, kI64 = 7 };  // ONNXTensorElementDataType
constexpr int kFail = 1;                                  // OrtErrorCode: ORT_FAIL

// The entries of OrtApi.
enum Entry : size_t {
    kCreateStatus = 0,
    kGetErrorMessage = 2,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kCreateTensorWithDataAsOrtValue = 49,
    kGetTensorMutableData = 51,
    kCreateCpuMemoryInfo = 69,
    kKernelInfoGetAttributeFloat = 85,
    kKernelInfoGetAttributeInt64 = 86,
    kKernelInfoGetAttributeString = 87,
    kKernelContextGetInput = 90,
    kKernelContextGetOutput = 91,
    kReleaseStatus = 93,
    kReleaseMemoryInfo = 94,
    kReleaseValue = 96,
    kCreateOp = 213,
    kInvokeOp = 214,
    kReleaseOp = 215,
    kKernelContextParallelFor = 274,
    kGetTensorElementTypeAndShapeDataReference = 414,
};

struct ApiBase {
    const void* const* (*GetApi)(uint32_t version) noexcept;
    const char* (*GetVersionString)() noexcept;
};

class Api {
  public:
    explicit Api(const void* const* table) : table_(table) {}

    Status* create_status(const char* message) const {
        return entry<Status* (*)(int, const char*)>(kCreateStatus)(kFail, message);
    }
    const char* message(const Status* status) const {
        return entry<const char* (*)(const Status*)>(kGetErrorMessage)(status);
    }
    void release(Status* status) const { entry<void (*)(Status*)>(kReleaseStatus)(status); }
    Status* create_domain(const char* name, CustomOpDomain** out) const {
        return entry<Status* (*)(const char*, CustomOpDomain**)>(kCreateCustomOpDomain)(name, out);
    }
    Status* add_op(CustomOpDomain* domain, const void* op) const {
        return entry<Status* (*)(CustomOpDomain*, const void*)>(kCustomOpDomainAdd)(domain, op);
    }
    Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
        return entry<Status* (*)(SessionOptions*, CustomOpDomain*)>(kAddCustomOpDomain)(options, domain);
    }
    Status* attribute(const KernelInfo* info, const char* name, float* out) const {
        using Get = Status* (*)(const KernelInfo*, const char*, float*);
        return entry<Get>(kKernelInfoGetAttributeFloat)(info, name, out);
    }
    Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
        using Get = Status* (*)(const KernelInfo*, const char*, int64_t*);
        return entry<Get>(kKernelInfoGetAttributeInt64)(info, name, out);
    }
    // `size`: of the memory at `out`; what is longer is an error.
    Status* attribute(const KernelInfo* info, const char* name, char* out, size_t* size) const {
        using Get = Status* (*)(const KernelInfo*, const char*, char*, size_t*);
        return entry<Get>(kKernelInfoGetAttributeString)(info, name, out, size);
    }
    Status* input(const KernelContext* context, size_t index, const Value** out) const {
        using Get = Status* (*)(const KernelContext*, size_t, const Value**);
        return entry<Get>(kKernelContextGetInput)(context, index, out);
    }
    Status* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** out) const {
        using Get = Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**);
        return entry<Get>(kKernelContextGetOutput)(context, index, sizes, rank, out);
    }
    Status* data(const Value* value, void** out) const {
        return entry<Status* (*)(const Value*, void**)>(kGetTensorMutableData)(value, out);
    }
    Status* shape(const Value* value, Type* type, const int64_t** sizes, size_t* rank) const {
        using Get = Status* (*)(const Value*, Type*, const int64_t**, size_t*);
        return entry<Get>(kGetTensorElementTypeAndShapeDataReference)(value, type, sizes, rank);
    }
    Status* cpu_memory(MemoryInfo** out) const {
        return entry<Status* (*)(int, int, MemoryInfo**)>(kCreateCpuMemoryInfo)(0, 0, out);  // a device's, the default
    }
    void release(MemoryInfo* memory) const { entry<void (*)(MemoryInfo*)>(kReleaseMemoryInfo)(memory); }
    // A tensor whose memory is the caller's.
    Status* borrow(const MemoryInfo* memory, void* data, size_t num_bytes, const int64_t* sizes, size_t rank, Type type,
                   Value** out) const {
        using Make = Status* (*)(const MemoryInfo*, void*, size_t, const int64_t*, size_t, Type, Value**);
        return entry<Make>(kCreateTensorWithDataAsOrtValue)(memory, data, num_bytes, sizes, rank, type, out);
    }
    void release(Value* value) const { entry<void (*)(Value*)>(kReleaseValue)(value); }
    // An operator of ONNX Runtime without attributes, whose types `constraint` fixes.
    Status* create_op(const KernelInfo* info, const char* name, int version, const char* constraint, Type type,
                      Op** out) const {
        using Make = Status* (*)(const KernelInfo*, const char*, const char*, int, const char**, const Type*, int,
                                 const void* const*, int, int, int, Op**);
        return entry<Make>(kCreateOp)(info, name, "", version, &constraint, &type, 1, nullptr, 0, 2, 1, out);
    }
    Status* invoke(const KernelContext* context, const Op* op, const Value* const* inputs, int num_inputs,
                   Value* const* outputs, int num_outputs) const {
        using Run = Status* (*)(const KernelContext*, const Op*, const Value* const*, int, Value* const*, int);
        return entry<Run>(kInvokeOp)(context, op, inputs, num_inputs, outputs, num_outputs);
    }
    void release(Op* op) const { entry<void (*)(Op*)>(kReleaseOp)(op); }
    // Runs fn(user, i) for i < total on the threads of the session, which may be this one alone.
    Status* parallel_for(const KernelContext* context, void (*fn)(void*, size_t), size_t total, void* user) const {
        using Run = Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
        return entry<Run>(kKernelContextParallelFor)(context, fn, total, 0, user);
    }

  private:
    template <class Function>
    Function entry(Entry number) const {
        return reinterpret_cast<Function>(const_cast<void*>(table_[number]));
    }
    const void* const* table_;
};

// OrtCustomOp: fields in their order. Those that are null are not called.
struct CustomOp {
    uint32_t version = kApiVersion;
    void* (*CreateKernel)(const CustomOp*, const void* const*, const KernelInfo*) = nullptr;
    const char* (*GetName)(const CustomOp*) = nullptr;
    const char* (*GetExecutionProviderType)(const CustomOp*) = nullptr;
    Type (*GetInputType)(const CustomOp*, size_t) = nullptr;
    size_t (*GetInputTypeCount)(const CustomOp*) = nullptr;
    Type (*GetOutputType)(const CustomOp*, size_t) = nullptr;
    size_t (*GetOutputTypeCount)(const CustomOp*) = nullptr;
    void (*KernelCompute)(void*, KernelContext*) = nullptr;
    void (*KernelDestroy)(void*) = nullptr;
    int (*GetInputCharacteristic)(const CustomOp*, size_t) = nullptr;
    int (*GetOutputCharacteristic)(const CustomOp*, size_t) = nullptr;
    int (*GetInputMemoryType)(const CustomOp*, size_t) = nullptr;
    int (*GetVariadicInputMinArity)(const CustomOp*) = nullptr;
    int (*GetVariadicInputHomogeneity)(const CustomOp*) = nullptr;
    int (*GetVariadicOutputMinArity)(const CustomOp*) = nullptr;
    int (*GetVariadicOutputHomogeneity)(const CustomOp*) = nullptr;
    Status* (*CreateKernelV2)(const CustomOp*, const void* const*, const KernelInfo*, void**) = nullptr;
    Status* (*KernelComputeV2)(void*, KernelContext*) = nullptr;
    Status* (*InferOutputShapeFn)(const CustomOp*, void*) = nullptr;
    int (*GetStartVersion)(const CustomOp*) = nullptr;
    int (*GetEndVersion)(const CustomOp*) = nullptr;
    size_t (*GetMayInplace)(int**, int**) = nullptr;
    void (*ReleaseMayInplace)(int*, int*) = nullptr;
    size_t (*GetAliasMap)(int**, int**) = nullptr;
    void (*ReleaseAliasMap)(int*, int*) = nullptr;
};
static_assert(sizeof(void*) == 8 && sizeof(CustomOp) == 208, "the layout of OrtCustomOp at 64 bits");

}  // namespace seekforge::ort
