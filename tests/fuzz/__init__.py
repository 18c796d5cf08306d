"""Bad and odd input of every kind, tried on whole commands.

A kind is a function of a random generator that yields attempts. `run` makes each attempt in a
forked process with an empty working folder, and `fault` says what is wrong with its end: a crash, a
hang, a traceback, more than one line of error, or the silent use of what no one could mean.
Attempts are numbered, so that a kind and a number repeat one:
`python -m tests.fuzz KIND --only NUMBER`.
"""
