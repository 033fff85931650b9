"""Benchmarks: `make bench`, `make bench-quality`, …; each prints a table and writes JSON; none of them is a test.

They may call any room; nothing calls them.
"""
