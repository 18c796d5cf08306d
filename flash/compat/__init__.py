"""Private interfaces of dependencies, in one module per dependency.

Private and undocumented names of a library are used only here and in `flash.lowering.patches`,
which replaces parts of ExecuTorch (checked by tests/compat/test_private_names.py). Each module
lists the names that it uses with the reasons, and imports only its dependency. Its contract test in
tests/compat fails with an explanation if a new version of the library behaves differently.
"""
