"""The tests of dist_moe: unit (mirrors the package), dist (several ranks), gpu, and mutants to be caught."""
