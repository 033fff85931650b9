"""Benchmarks: `make bench-quality`, `bench-kernels`, `bench-engines`, `gpu-check`: each prints a table, writes JSON."""
