// What an operator's file needs to become an operator of ONNX Runtime: its tensors, its threads, its registration.
//
// An operator is a class with `kName`, `kInputs` and `kOutputs` (element types), a constructor that reads attributes, and
// `compute(Call&) const`. Every size and every index that comes with a step is checked before it is used: what is
// wrong ends as an exception before the threads start, and the exception as an error of the session.
#pragma once

#include <cstring>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.hpp"

namespace seekforge {

constexpr int64_t kBlockSize = 64;  // formats/paged_cache.py: BLOCK_SIZE

inline void check(const ort::Api& api, ort::Status* status) {
    if (status == nullptr) return;
    const std::string message = api.message(status);
    api.release(status);
    throw std::runtime_error(message);
}

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// A tensor of a step, whose memory ONNX Runtime owns.
struct Tensor {
    const int64_t* sizes = nullptr;
    size_t rank = 0;
    void* bytes = nullptr;

    int64_t size(size_t axis) const { return sizes[axis]; }
    int64_t count() const {
        int64_t result = 1;
        for (size_t axis = 0; axis < rank; ++axis) result *= sizes[axis];
        return result;
    }
    template <class T>
    T* as() const {
        return static_cast<T*>(bytes);
    }
    float* f32() const { return as<float>(); }
};

class Attributes {
  public:
    Attributes(const ort::Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}
    int64_t integer(const char* name) const { return get<int64_t>(name); }
    float number(const char* name) const { return get<float>(name); }
    std::string text(const char* name) const {
        char value[32] = "";
        size_t size = sizeof value;
        check(api_, api_.attribute(info_, name, value, &size));
        return value;
    }
    const ort::Api& api() const { return api_; }
    const ort::KernelInfo* info() const { return info_; }

  private:
    template <class T>
    T get(const char* name) const {
        T value{};
        check(api_, api_.attribute(info_, name, &value));
        return value;
    }
    const ort::Api& api_;
    const ort::KernelInfo* info_;
};

// One call of a kernel.
class Call {
  public:
    Call(const ort::Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

    Tensor input(size_t index) const {
        const ort::Value* value = nullptr;
        check(api_, api_.input(context_, index, &value));
        require(value != nullptr, "an input that its attributes ask for is missing");
        return tensor(value);
    }
    Tensor input(size_t index, size_t rank, const char* what) const {
        const Tensor result = input(index);
        require(result.rank == rank, what);
        return result;
    }
    Tensor output(size_t index, std::initializer_list<int64_t> sizes) const {
        return output(index, sizes.begin(), sizes.size());
    }
    Tensor output(size_t index, const int64_t* sizes, size_t rank) const {
        ort::Value* value = nullptr;
        check(api_, api_.output(context_, index, sizes, rank, &value));
        return tensor(value);
    }
    // An output in the memory of an input if the session is bound so, else a copy of it.
    Tensor output_of(size_t index, const Tensor& input, size_t item_bytes) const {
        const Tensor result = output(index, input.sizes, input.rank);
        if (result.bytes != input.bytes) std::memcpy(result.bytes, input.bytes, input.count() * item_bytes);
        return result;
    }
    // work(i) for i < count; where the work is little, `worth` false, by this thread. It must not throw.
    template <class Work>
    void parallel(size_t count, bool worth, const Work& work) const {
        if (count <= 1 || !worth) {
            for (size_t i = 0; i < count; ++i) work(i);
            return;
        }
        const auto run = [](void* user, size_t i) { (*static_cast<const Work*>(user))(i); };
        check(api_, api_.parallel_for(context_, run, count, const_cast<Work*>(&work)));
    }
    const ort::KernelContext* context() const { return context_; }

  private:
    Tensor tensor(const ort::Value* value) const {
        Tensor result;
        ort::Type type;
        check(api_, api_.shape(value, &type, &result.sizes, &result.rank));
        check(api_, api_.data(value, &result.bytes));
        return result;
    }
    const ort::Api& api_;
    ort::KernelContext* context_;
};

// work(first, last) of rows of so many values, in pieces that are worth a thread.
template <class Work>
void by_rows(const Call& call, int64_t rows, int64_t width, const Work& work) {
    constexpr int64_t kValuesOfPiece = 16384;
    const int64_t some = kValuesOfPiece / width > 0 ? kValuesOfPiece / width : 1;
    call.parallel((rows + some - 1) / some, true, [&](size_t piece) {
        const int64_t first = piece * some, last = first + some < rows ? first + some : rows;
        work(first, last);
    });
}

// Memory of a thread for the time of one piece of work; its content is what was left there.
inline float* scratch(size_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < count) memory.resize(count);
    return memory.data();
}

// The first input that may be left out: Op::kOptional where the operator has one.
template <class Op>
constexpr decltype(Op::kOptional) optional_from(int) {
    return Op::kOptional;
}
template <class Op>
constexpr size_t optional_from(long) {
    return std::size(Op::kInputs);
}

// The number of outputs: Op::kNumOutputs where it differs with a parameter of a template.
template <class Op>
constexpr decltype(Op::kNumOutputs) outputs_of(int) {
    return Op::kNumOutputs;
}
template <class Op>
constexpr size_t outputs_of(long) {
    return std::size(Op::kOutputs);
}

template <class Op>
struct Registered : ort::CustomOp {
    struct Kernel {
        ort::Api api;
        Op op;
    };

    Registered() {
        GetName = [](const ort::CustomOp*) { return Op::kName; };
        GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
        GetInputType = [](const ort::CustomOp*, size_t i) { return Op::kInputs[i]; };
        GetInputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kInputs); };
        GetOutputType = [](const ort::CustomOp*, size_t i) { return Op::kOutputs[i]; };
        GetOutputTypeCount = [](const ort::CustomOp*) { return outputs_of<Op>(0); };
        GetInputCharacteristic = [](const ort::CustomOp*, size_t i) { return int(i >= optional_from<Op>(0)); };
        GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
        GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };  // OrtMemTypeDefault
        GetStartVersion = [](const ort::CustomOp*) { return 1; };
        GetEndVersion = [](const ort::CustomOp*) { return 1; };
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        CreateKernelV2 = [](const ort::CustomOp*, const void* const* table, const ort::KernelInfo* info, void** out) {
            const ort::Api api(table);
            return guarded(api, [&] { *out = new Kernel{api, Op(Attributes(api, info))}; });
        };
        KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
            const Kernel& self = *static_cast<Kernel*>(kernel);
            return guarded(self.api, [&] {
                Call call(self.api, context);
                self.op.compute(call);
            });
        };
    }

  private:
    template <class Body>
    static ort::Status* guarded(const ort::Api& api, const Body& body) {
        try {
            body();
            return nullptr;
        } catch (const std::exception& error) {
            return api.create_status((std::string(Op::kName) + ": " + error.what()).c_str());
        }
    }
};

// Each operator's file defines one of these; `library.cpp` registers them.
template <class Op>
const ort::CustomOp* registered() {
    static const Registered<Op> op;
    return &op;
}

}  // namespace seekforge
