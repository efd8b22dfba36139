"""`Bf16Linear`: y = x · Wᵀ of bf16 values with results in f32."""
