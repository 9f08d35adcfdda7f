"""Measurements of the operators beside what users would run instead; `make bench`."""
