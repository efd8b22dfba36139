// ONNX Runtime's own product for operators that need one of memory that is no tensor of the step: of rows that they
// gathered, with a matrix out of a stack. Its threads are the session's.
#pragma once

#include "op.hpp"

namespace seekforge {

// Whether every row has to go through ONNX Runtime's product, however few there are: another product of few rows is
// quicker, and sums in another order.
bool rows_keep_their_bits();

class Product {
  public:
    explicit Product(const Attributes& attributes) : api_(attributes.api()) {
        check(api_, api_.create_op(attributes.info(), "MatMul", 13, "T", ort::Type::kF32, &op_));
        if (ort::Status* failed = api_.cpu_memory(&memory_)) {
            api_.release(op_);
            check(api_, failed);
        }
    }
    ~Product() {
        api_.release(memory_);
        api_.release(op_);
    }
    Product(const Product&) = delete;
    Product& operator=(const Product&) = delete;

    // out [m, n] = a [m, k] · b [k, n], f32.
    void run(const Call& call, const float* a, const float* b, int64_t m, int64_t k, int64_t n, float* out) const {
        const Borrowed left(*this, a, m, k), right(*this, b, k, n), result(*this, out, m, n);
        const ort::Value* inputs[] = {left.value, right.value};
        ort::Value* outputs[] = {result.value};
        check(api_, api_.invoke(call.context(), op_, inputs, 2, outputs, 1));
    }

  private:
    struct Borrowed {
        Borrowed(const Product& of, const float* data, int64_t rows, int64_t columns) : api(of.api_) {
            const int64_t sizes[] = {rows, columns};
            check(api, api.borrow(of.memory_, const_cast<float*>(data), rows * columns * sizeof(float), sizes, 2,
                                  ort::Type::kF32, &value));
        }
        ~Borrowed() { api.release(value); }
        Borrowed(const Borrowed&) = delete;
        Borrowed& operator=(const Borrowed&) = delete;
        const ort::Api& api;
        ort::Value* value = nullptr;
    };

    ort::Api api_;
    ort::Op* op_ = nullptr;
    ort::MemoryInfo* memory_ = nullptr;
};

}  // namespace seekforge
