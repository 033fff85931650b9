"""Benchmarks: `make bench`, `make bench-quality`. Each prints a table and writes JSON; none of them is a test."""
