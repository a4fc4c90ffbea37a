"""Benchmarks of mas_fast: cases × methods, one tidy row each."""
