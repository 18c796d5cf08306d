"""Private interfaces of dependencies, one module a dependency.

A private or undocumented name of a library is used here, or in `flash.lowering.patches` where a
part of ExecuTorch is replaced, and nowhere else (tests/compat/test_private_names.py). Each module
names what it uses and why, imports nothing but its dependency, and has a contract test in
tests/compat that fails with a sentence when a new version of the library behaves differently.
"""
