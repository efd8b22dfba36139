"""From a canonical program to an engine for one target: specialise, fold or bind weights, compile, prove."""
