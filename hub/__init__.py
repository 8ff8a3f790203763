"""Published checkpoints and benchmarks in and out: weights, templates, answer files, servers."""
