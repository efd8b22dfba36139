"""`AddRmsNormQuantize`: a residual, RMSNorm and the quantizer of FP8 linears, once for all that read the value."""
