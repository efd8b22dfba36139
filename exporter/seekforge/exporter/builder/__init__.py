"""From a canonical program to an engine for one target: specialize, fold or bind weights, compile, prove."""
