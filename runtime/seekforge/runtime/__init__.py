"""Run a compiled engine: `LLM(engine).generate(prompts, SamplingParams(...))`. No torch, no onnx."""
